"""WebSockets and other upgrades: asked for by the client, granted by the upstream, then bytes both ways until one side is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from farebox.app.admission import Headers, Refusal
from farebox.domain.access import Match, Route
from farebox.gateway.problems import refusal
from tests.gateway.kit import PATIENT, QUICK, Answers, Heard, House, catalog, open_house, says_hello
from tests.gateway.test_flows import Allowance, Gate, limit
from tests.gateway.test_streaming import MIB, PIECE, until

ASK = (
    b"GET /talk HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: chat/2\r\nX-Key: 1\r\n\r\n"
)
GRANTED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat/2\r\nX-Up: 1\r\n\r\n"


async def echoes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Grants the upgrade and says everything back, until the client has said all."""
    writer.write(GRANTED)
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")
    writer.write_eof()


async def opened(house: House, ask: bytes = ASK) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    reader, writer = await house.connect()
    writer.write(ask)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    return reader, writer, head


@asynccontextmanager
async def a_websocket_server() -> AsyncIterator[int]:
    async def says_back(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(says_back, "127.0.0.1", 0, max_size=1 << 22) as server:
        yield next(iter(server.sockets)).getsockname()[1]


async def test_a_websocket_client_talks_through_the_gateway(house: House):
    async with a_websocket_server() as port:
        house.gateway.replace_catalog(
            replace(
                catalog(f"http://127.0.0.1:{port}", routes=[Route("all", Match("/{*rest}"), "up0")]),
                version=2,
            )
        )
        uri = f"ws://127.0.0.1:{house.port}/chat"
        async with connect(uri, compression=None, max_size=1 << 22) as talk:
            await talk.send("hello")
            assert await talk.recv() == "hello"
            await talk.send(b"x" * 2 * MIB)
            assert await talk.recv() == b"x" * 2 * MIB
            await asyncio.wait_for(await talk.ping(), 10)
        assert talk.close_code == 1000
    await until(lambda: house.door.finished)

    [call] = house.door.finished
    assert call.status == 101
    assert call.bytes_up > 2 * MIB
    assert call.bytes_down > 2 * MIB
    assert len(house.door.calls) == 1
    assert websockets.__version__


async def test_any_protocol_that_was_asked_for_passes_bytes_both_ways_and_half_closes(house: House):
    house.upstream.answer = echoes
    reader, writer, head = await opened(house)
    heard = house.upstream.heard[0]
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    writer.write(b"two")
    writer.write_eof()
    rest = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await until(lambda: house.door.finished)

    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert head.count(b"Upgrade: chat/2") == head.count(b"Connection: Upgrade") == head.count(b"X-Up: 1") == 1
    assert b"Farebox-Request-Id" in head
    assert (heard.one("Connection"), heard.one("Upgrade"), heard.one("X-Key")) == ("Upgrade", "chat/2", "1")
    assert heard.one("Farebox-Customer") == "acme"
    assert rest == b"twobye"
    assert [(f.status, f.bytes_up, f.bytes_down) for f in house.door.finished] == [(101, 6, 9)]
    await until(lambda: house.upstream.open == 0 and house.gateway.counters.connections_open == 0)


async def test_what_either_side_says_at_once_is_not_lost(house: House):
    async def eager(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GRANTED + b"first")
        writer.write(await reader.readexactly(5))
        writer.write_eof()

    house.upstream.answer = eager
    reader, writer, _ = await opened(house, ASK + b"ahead")
    said = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await until(lambda: house.door.finished)

    assert said == b"firstahead"
    assert [(f.status, f.bytes_up, f.bytes_down) for f in house.door.finished] == [(101, 5, 10)]


async def test_an_upstream_that_declines_gives_an_ordinary_answer_and_the_connection_goes_on(house: House):
    answers = await house.says(ASK, b"GET /b HTTP/1.1\r\nHost: a\r\n\r\n", methods=["GET", "GET"])

    assert [(s.status, s.body) for s in answers.said] == [(200, b"GET /talk 0"), (200, b"GET /b 0")]
    assert [f.status for f in house.door.finished] == [200, 200]


async def test_an_upstream_that_wants_another_protocol_can_say_so(house: House):
    async def declines(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade\r\nUpgrade: chat/3\r\nContent-Length: 0\r\n\r\n"
        )

    house.upstream.answer = declines
    said = await house.get()

    assert (said.status, said.headers["upgrade"]) == (426, "chat/3")


NOT_ASKED = {
    "no upgrade asked": b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n",
    "another protocol": ASK.replace(b"chat/2", b"other"),
    "h2c only": ASK.replace(b"chat/2", b"h2c"),
    "HTTP/1.0": ASK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "Upgrade not in Connection": ASK.replace(b"keep-alive, Upgrade", b"keep-alive"),
}


@pytest.mark.parametrize("name", list(NOT_ASKED))
async def test_a_switch_nobody_asked_for_is_a_502(house: House, name: str):
    house.upstream.answer = echoes
    answers = await house.says(NOT_ASKED[name], methods=["GET"])

    assert answers.said[0].status == 502
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(0, 0)]
    if name not in ("another protocol",):
        assert house.upstream.heard[0].one("Upgrade") is None


async def test_a_tunnel_stops_at_the_exact_byte_of_its_download_limit(house: House):
    async def gushes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GRANTED)
        while True:
            writer.write(PIECE)
            await writer.drain()

    limits = limit(house, download=Allowance(1_000_000, step=50_000))
    house.upstream.answer = gushes
    reader, writer, _ = await opened(house)
    said = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    assert len(said) == limits.download.taken == 1_000_000
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(101, 1_000_000)]
    await until(lambda: house.upstream.open == 0)


async def test_a_tunnel_stops_at_the_exact_byte_of_its_upload_limit(house: House):
    received = b""

    async def listens(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        writer.write(GRANTED)
        while data := await reader.read(1 << 16):
            received += data

    limit(house, upload=Allowance(7))
    house.upstream.answer = listens
    reader, writer, _ = await opened(house)
    writer.write(b"0123456789")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await until(lambda: house.upstream.open == 0)

    assert received == b"0123456"
    assert [(f.status, f.bytes_up) for f in house.door.finished] == [(101, 7)]


async def test_a_paced_tunnel_goes_on_where_it_was(house: House):
    gate = Gate(first=4)
    limit(house, upload=gate)
    house.upstream.answer = echoes
    reader, writer, _ = await opened(house)
    writer.write(b"0123456789")
    writer.write_eof()
    assert await asyncio.wait_for(reader.readexactly(4), 10) == b"0123"
    gate.open()
    assert await asyncio.wait_for(reader.read(), 10) == b"456789bye"
    writer.close()


async def test_a_tunnel_whose_reader_takes_nothing_stops_its_upstream(house: House):
    given = 0

    async def gushes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given
        writer.transport.set_write_buffer_limits(0)
        writer.write(GRANTED)
        while True:
            writer.write(PIECE)
            await writer.drain()
            given += len(PIECE)

    house.upstream.answer = gushes
    _, writer, _ = await opened(house)
    writer.transport.pause_reading()
    before = -1
    while before != given or not given:
        before = given
        await asyncio.sleep(0.3)
    transport = next(iter(house.gateway._connections))._transport
    assert transport is not None
    held = transport.get_write_buffer_size()
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert 0 < held < MIB
    assert house.door.finished[0].status == 101
    await until(lambda: house.upstream.open == 0)


async def test_a_tunnel_in_which_nothing_moves_is_closed():
    async with open_house(replace(QUICK, tunnel_idle_timeout_s=0.6, upstream_stall_timeout_s=0.2)) as house:
        house.upstream.answer = echoes
        reader, writer, _ = await opened(house)
        for _ in range(4):
            await asyncio.sleep(0.3)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

        assert [(f.status, f.bytes_up, f.bytes_down) for f in house.door.finished] == [(101, 4, 4)]
        await until(lambda: house.upstream.open == 0)


async def test_an_upstream_that_closes_ends_the_tunnel(house: House):
    async def leaves(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GRANTED + b"last words")
        await writer.drain()
        writer.close()

    house.upstream.answer = leaves
    reader, writer, _ = await opened(house)
    assert await asyncio.wait_for(reader.read(), 10) == b"last words"
    writer.close()
    await until(lambda: house.door.finished and house.gateway.counters.connections_open == 0)

    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(101, 10)]


async def test_a_drain_closes_tunnels_at_its_end():
    async with open_house(PATIENT) as house:
        house.upstream.answer = echoes
        reader, writer, _ = await opened(house)
        await house.gateway.drain(0.3)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()

        assert [f.status for f in house.door.finished] == [101]


@pytest.mark.parametrize("settles", [True, False])
async def test_a_paid_tunnel_settles_by_its_101(house: House, settles: bool):
    statuses: list[int] = []

    async def settle(status: int, headers: Headers) -> Refusal | None:
        statuses.append(status)
        receipt.append((b"PAYMENT-RESPONSE", b"paid"))
        return None if settles else refusal("settlement_failed", "no money")

    receipt: Headers = []
    house.door.decide = lambda call: house.door.admitted(
        call, fare="exact", before_release=settle, answer_headers=receipt, keep_answer_bytes_max=1000
    )
    house.upstream.answer = echoes
    reader, writer = await house.connect()
    writer.write(ASK)
    head = await reader.readuntil(b"\r\n\r\n")
    if settles:
        writer.write(b"paid words")
        assert await reader.readexactly(10) == b"paid words"
    writer.close()
    await until(lambda: house.door.finished)

    assert statuses == [101]
    if settles:
        assert b"101 Switching" in head
        assert b"PAYMENT-RESPONSE: paid" in head
        assert house.door.finished[0].status == 101
    else:
        assert head.startswith(b"HTTP/1.1 402 ")
        assert house.door.finished[0].status == 402
    await until(lambda: house.upstream.open == 0)


async def test_an_upgrade_is_not_sent_a_second_time(house: House):
    """The kept connection went stale; a plain GET would be sent again."""
    await house.get("/a")

    async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    house.upstream.answer = dies
    answers = await house.says(ASK, methods=["GET"])

    assert answers.said[0].status == 502
    assert [h.target for h in house.upstream.heard] == ["/a", "/talk"]


__all__ = ["Answers", "says_hello"]
