"""How long a call may take as a whole, and what a route says of its own: patience, and how large a body may be."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from farebox.app.admission import Headers, Refusal
from farebox.domain.access import GatewayCatalog, Match, Route, Upstream
from tests.gateway.kit import QUICK, Heard, House, open_house, says_hello
from tests.gateway.test_buffering import chunked, post
from tests.gateway.test_streaming import until


def a_route(**more: object) -> Route:
    return Route("all", Match("/{*rest}"), "up0", **more)  # type: ignore[arg-type]


async def trickles(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never stalls, never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\nx\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


async def says_nothing(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_a_call_that_had_no_answer_in_its_total_time_is_a_504():
    async with open_house(QUICK, routes=[a_route(total_timeout_s=0.4)], timeout_s=60.0) as house:
        house.upstream.answer = says_nothing
        said = await house.get()

        assert said.status == 504
        assert json.loads(said.body)["code"] == "upstream_timeout"
        assert [f.status for f in house.door.finished] == [0]
        assert not house.gateway.timed
        await until(lambda: house.upstream.open == 0)


async def test_an_answer_that_trickles_past_its_total_time_is_cut():
    async with open_house(QUICK, routes=[a_route(total_timeout_s=0.4)]) as house:
        house.upstream.answer = trickles
        answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")

        assert [(s.status, s.whole) for s in answers.said] == [(200, False)]
        assert [f.status for f in house.door.finished] == [0]
        assert house.door.finished[0].bytes_down == len(answers.said[0].body) > 0
        await until(lambda: house.upstream.open == 0)


async def test_the_upstream_s_total_time_holds_where_the_route_says_none():
    async with open_house(QUICK) as house:
        served = GatewayCatalog(
            2, (Upstream("up0", house.upstream.url, timeout_s=60.0, total_timeout_s=0.3),), (a_route(),)
        )
        house.gateway.replace_catalog(served)
        house.upstream.answer = says_nothing
        assert (await house.get()).status == 504

        house.gateway.replace_catalog(replace(served, version=3, routes=(a_route(total_timeout_s=60.0),)))
        house.upstream.answer = says_hello
        assert (await house.get()).status == 200
        assert not house.gateway.timed


async def test_an_upload_that_takes_longer_than_the_whole_call_may_is_a_504():
    async with open_house(
        replace(QUICK, body_stall_timeout_s=5.0), routes=[a_route(total_timeout_s=0.4)]
    ) as house:
        house.upstream.reads_bodies = False
        house.upstream.answer = says_nothing
        answers = await house.says(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")

        assert answers.said[0].status == 504
        assert [f.bytes_up for f in house.door.finished] == [4]


async def test_time_that_runs_out_while_a_payment_settles_cuts_what_was_paid_after_it():
    settling = asyncio.Event()
    told: list[str] = []

    async def settle(status: int, headers: Headers) -> Refusal | None:
        await settling.wait()
        return None

    async with open_house(QUICK, routes=[a_route(total_timeout_s=0.3)]) as house:
        house.door.decide = lambda call: house.door.admitted(
            call, fare="exact", before_release=settle, broken=lambda: told.append("broken")
        )
        house.upstream.answer = trickles
        asking = asyncio.ensure_future(house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"))
        await until(lambda: house.upstream.heard)
        await until(lambda: house.upstream.open == 0)
        settling.set()
        answers = await asking

        assert [(s.status, s.whole) for s in answers.said] == [(200, False)]
        assert told == ["broken"]


async def test_a_route_waits_for_its_first_byte_as_long_as_it_says():
    async with open_house(QUICK, routes=[a_route(timeout_s=0.2)], timeout_s=60.0) as house:
        house.upstream.answer = says_nothing
        assert (await house.get()).status == 504


@pytest.mark.parametrize(
    "raw", [post(11, 11), chunked(11) + b"0\r\n\r\n"], ids=["with its length", "chunked"]
)
async def test_a_route_takes_bodies_as_large_as_it_says(raw: bytes):
    async with open_house(QUICK, routes=[a_route(body_bytes_max=10)]) as house:
        fits = await house.get(method="POST", body=b"x" * 10)
        answers = await house.says(raw)

        assert fits.status == 200
        assert [s.status for s in answers.said] == [413]
        assert b"10 bytes" in answers.said[0].body


async def test_a_route_s_limit_holds_for_bodies_that_are_held_whole(house: House):
    async with open_house(QUICK, routes=[a_route(body_bytes_max=10)]) as small:
        small.door.binds_bodies = True
        answers = await small.says(chunked(11) + b"0\r\n\r\n")

        assert [s.status for s in answers.said] == [413]
        assert small.gateway.buffered_bytes == 0


async def test_a_paid_body_that_trickles_steadily_is_given_up_all_the_same():
    async with open_house(replace(QUICK, paid_body_timeout_s=0.5)) as house:
        house.door.binds_bodies = True
        reader, writer = await house.connect()
        writer.write(post(10_000, 0))

        async def drips() -> None:
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drips())
        said = await asyncio.wait_for(reader.readline(), 10)
        dripping.cancel()
        writer.close()

        assert said.startswith(b"HTTP/1.1 408 ")
        assert house.gateway.buffered_bytes == 0
        assert not house.upstream.heard


async def test_one_address_cannot_fill_the_room_for_everyone():
    """Through a trusted proxy, so that addresses differ."""
    settings = replace(
        QUICK, buffered_bytes_max=100_000, buffered_bytes_per_client_max=30_000, body_stall_timeout_s=5.0
    )
    async with open_house(settings, trusted_proxies=("127.0.0.0/8",)) as house:
        house.door.binds_bodies = True
        holders = []
        for _ in range(3):
            reader, writer = await house.connect()
            writer.write(post(10_000, 0)[:-2] + b"X-Forwarded-For: 192.0.2.1\r\n\r\n" + b"x" * 9_900)
            holders.append((reader, writer))
        await until(lambda: house.gateway.buffered_bytes == 29_700)

        greedy = await house.get(method="POST", body=b"x" * 1000, X_Forwarded_For="192.0.2.1")
        other = await house.get(method="POST", body=b"x" * 1000, X_Forwarded_For="192.0.2.2")
        for reader, writer in holders:
            writer.write(b"x" * 100)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()

        assert greedy.status == 429
        assert int(greedy.headers["retry-after"]) >= 1
        assert other.status == 200
        await until(lambda: house.gateway.buffered_bytes == 0)
        assert not house.gateway.held_bodies._by_address
