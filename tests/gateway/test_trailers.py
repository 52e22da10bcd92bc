"""Trailers go on where the other side can take them, and only those that have a business behind a body."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from farebox.app.admission import Answer, Call
from farebox.domain.access import Match, Rewrite, Route
from farebox.gateway.bodies import ChunkedBody
from farebox.gateway.problems import Fault
from tests.gateway.kit import Heard, House, open_house

ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Content-Length, X-Set\r\n\r\n"
TRAILED = b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\nSet-Cookie: a=1\r\nFarebox-Customer: eve\r\nX-Set: eve\r\n\r\n"


def answering(house: House, *pieces: bytes) -> None:
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)

    house.upstream.answer = answer


async def ask(house: House, *lines: str, version: str = "1.1") -> tuple[bytes, bytes]:
    reader, writer = await house.connect()
    writer.write(
        "\r\n".join([f"GET /1 HTTP/{version}", "Host: a", "Connection: close", *lines, "", ""]).encode()
    )
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    return head, body


PIECES: dict[str, Sequence[bytes]] = {"in pieces": (ANSWER, TRAILED), "in one piece": (ANSWER + TRAILED,)}


@pytest.mark.parametrize("name", list(PIECES))
async def test_a_client_that_takes_trailers_gets_those_of_the_answer(house: House, name: str):
    house.door.decide = lambda call: house.door.admitted(call, answer_headers=[(b"X-Set", b"ours")])
    answering(house, *PIECES[name])
    head, body = await ask(house, "TE: trailers")

    assert body == b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"
    assert b"Trailer: X-Sum\r\n" in head + b"\r\n"
    heard = house.upstream.heard[0]
    assert (heard.one("TE"), heard.one("Connection")) == ("trailers", "TE")


async def test_a_client_that_did_not_ask_gets_none(house: House):
    answering(house, ANSWER, TRAILED)
    head, body = await ask(house)

    assert body == b"2\r\nhi\r\n0\r\n\r\n"
    assert b"Trailer" not in head
    assert house.upstream.heard[0].one("TE") is None


async def test_an_http_1_0_client_gets_none(house: House):
    answering(house, ANSWER, TRAILED)
    _, body = await ask(house, "TE: trailers", version="1.0")

    assert body == b"hi"


async def test_a_request_s_trailers_go_up_when_they_were_announced(house: House):
    house.upstream.reads_bodies = False
    got = b""

    async def listens(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        got = await reader.readuntil(b"0\r\n") + await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    house.upstream.answer = listens
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Authorization, Farebox-Plan\r\n\r\n"
    for pieces in ([head, b"2\r\nhi\r\n", TRAILS], [head + b"2\r\nhi\r\n" + TRAILS]):
        answers = await house.says(*pieces, methods=["POST"], pause_s=0.02)
        assert answers.said[0].status == 200
        assert got == b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"
        assert house.upstream.heard[-1].one("Trailer") == "x-sum"


TRAILS = b"0\r\nX-Sum: 1\r\nX-Other: 2\r\nAuthorization: Bearer x\r\nFarebox-Plan: gold\r\nHost: b\r\n\r\n"


async def test_a_name_the_route_sets_cannot_come_as_a_trailer():
    route = Route("all", Match("/{*rest}"), "up0", rewrite=Rewrite(set_headers=(("X-Sum", "ours"),)))
    async with open_house(routes=[route]) as house:
        raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X_Sum, X-Sum\r\n\r\n"
        house.upstream.reads_bodies = False
        got = b""

        async def listens(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal got
            got = await reader.readuntil(b"0\r\n") + await reader.readuntil(b"\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        house.upstream.answer = listens
        answers = await house.says(raw + b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nX_Sum: 1\r\n\r\n", methods=["POST"])

        assert answers.said[0].status == 200
        assert got == b"2\r\nhi\r\n0\r\n\r\n"


async def test_a_body_that_is_held_whole_goes_up_with_its_length_and_without_trailers(house: House):
    house.door.binds_bodies = True
    raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"
    answers = await house.says(raw, methods=["POST"])

    heard = house.upstream.heard[0]
    assert answers.said[0].status == 200
    assert (heard.one("Content-Length"), heard.body, heard.one("X-Sum")) == ("2", b"hi", None)


def test_so_many_trailers_and_no_more():
    body = ChunkedBody()
    with pytest.raises(Fault):
        body.feed(b"0\r\n" + b"X-A: 1\r\n" * 33 + b"\r\n")


__all__ = ["Answer", "Call"]
