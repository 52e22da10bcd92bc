"""Waits, hot catalog changes, and how a gateway ends."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from farebox.base.errors import Refused
from farebox.domain.access import Match, Route, Upstream
from tests.gateway.kit import PATIENT, QUICK, Answers, Heard, House, open_house, says_hello
from tests.gateway.test_streaming import until

REQUEST = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_head_that_trickles_in_is_given_up(hasty: House):
    """Slowloris: each byte is in time, the whole is not."""
    reader, writer = await hasty.connect()

    async def trickle() -> None:
        for n in range(1000):
            writer.write(b"GET /x HTTP/1.1\r\nX-Slow: "[n : n + 1] or b"y")
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    answers = Answers()
    answers.feed(await asyncio.wait_for(reader.read(65536), 10))
    trickling.cancel()
    writer.close()

    assert [s.status for s in answers.said] == [408]
    assert json.loads(answers.said[0].body)["code"] == "request_timeout"


async def test_a_connection_that_never_speaks_is_closed(hasty: House):
    reader, writer = await hasty.connect()
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_an_idle_connection_is_closed_after_its_wait(hasty: House):
    answers = await hasty.says(REQUEST)

    assert [s.status for s in answers.said] == [200]


async def test_a_body_that_stalls_is_given_up(hasty: House):
    answers = await hasty.says(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")

    assert [s.status for s in answers.said] == [408]
    assert [(f.status, f.bytes_up) for f in hasty.door.finished] == [(0, 3)]
    assert hasty.upstream.heard == []


async def test_a_bound_body_that_stalls_is_given_up(hasty: House):
    hasty.door.binds_bodies = True
    answers = await hasty.says(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")

    assert [s.status for s in answers.said] == [408]
    assert hasty.door.calls == []


async def test_a_client_that_takes_nothing_is_given_up(hasty: House):
    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    hasty.upstream.answer = pours
    _, writer = await hasty.connect()
    writer.transport.pause_reading()
    writer.write(REQUEST)
    await until(lambda: hasty.door.finished, 20)
    writer.transport.abort()

    assert [f.status for f in hasty.door.finished] == [0]


async def test_a_slow_decision_is_no_fault_of_the_client(hasty: House):
    async def think(call: object) -> object:
        await asyncio.sleep(1.5)
        return hasty.door.admitted(call)  # type: ignore[arg-type]

    hasty.door.decide = think  # type: ignore[assignment]

    assert (await hasty.get()).status == 200


async def test_half_open_connections_cost_only_themselves(hasty: House):
    opened = [await hasty.connect() for _ in range(300)]
    for _, writer in opened[::2]:
        writer.write(b"GET /x HTTP/1.1\r\nHo")

    assert (await hasty.get()).status == 200
    await until(lambda: hasty.gateway.counters.connections_open == 0)
    for _, writer in opened:
        writer.close()


async def test_too_many_connections_are_turned_away():
    async with open_house(replace(PATIENT, connections_max=2)) as house:
        opened = [await house.connect() for _ in range(2)]
        await until(lambda: house.gateway.counters.connections_open == 2)
        answers = await house.says()
        for _, writer in opened:
            writer.close()

        assert [s.status for s in answers.said] == [503]


async def test_idle_upstream_connections_are_closed():
    async with open_house(replace(QUICK, upstream_idle_timeout_s=0.1)) as house:
        await house.get()
        await until(lambda: house.upstream.open == 0)
        assert (await house.get()).status == 200


async def test_a_catalog_changes_under_load_without_a_lost_request(house: House):
    async with open_house() as other:
        catalogs = [
            replace(house.gateway.layout.catalog, version=1),
            replace(
                house.gateway.layout.catalog, version=2, upstreams=(Upstream("up0", other.upstream.url),)
            ),
            replace(
                house.gateway.layout.catalog,
                version=3,
                routes=(Route("new", Match("/{a}/{b}"), "up0"), Route("old", Match("/{*r}"), "up0")),
            ),
        ]
        stop = asyncio.Event()
        statuses: list[int] = []

        async def client() -> None:
            reader, writer = await house.connect()
            while not stop.is_set():
                writer.write(b"POST /a/b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
                head = await reader.readuntil(b"\r\n\r\n")
                statuses.append(int(head[9:12]))
                await reader.readexactly(len(b"POST /a/b 5"))
            writer.close()

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for n in range(60):
            house.gateway.replace_catalog(catalogs[n % 3])
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)

        assert set(statuses) == {200}
        assert len(statuses) > 50
        assert house.upstream.heard
        assert other.upstream.heard
        assert {c.route.id for c in house.door.calls} == {"all", "new"}
        assert len(house.door.finished) == len(house.door.calls) == len(statuses)
        house.gateway.replace_catalog(replace(catalogs[0], upstreams=(), routes=()))
        await until(lambda: house.upstream.open == other.upstream.open == 0)


async def test_a_call_under_way_ends_where_it_began(house: House):
    go_on = asyncio.Event()

    async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await says_hello(heard, reader, writer)

    house.upstream.answer = waits
    call = asyncio.create_task(house.get())
    await until(lambda: house.upstream.heard)
    house.gateway.replace_catalog(replace(house.gateway.layout.catalog, routes=(), upstreams=()))
    go_on.set()

    assert (await call).status == 200
    assert (await house.get()).status == 404


@pytest.mark.parametrize(
    "broken",
    [
        {"routes": (Route("r", Match("weather"), "up0"),)},
        {"routes": (Route("r", Match("/a{b}"), "up0"),)},
        {"routes": (Route("r", Match("/{*rest}/b"), "up0"),)},
        {"routes": (Route("r", Match("/{a}/{a}"), "up0"),)},
        {"routes": (Route("r", Match("/a"), "nowhere"),)},
        {"upstreams": (Upstream("up0", "ftp://x"),)},
        {"upstreams": (Upstream("up0", "http://"),)},
    ],
)
async def test_a_catalog_that_cannot_be_served_changes_nothing(house: House, broken: dict[str, object]):
    before = house.gateway.layout
    with pytest.raises(Refused):
        house.gateway.replace_catalog(replace(before.catalog, version=9, **broken))  # type: ignore[arg-type]

    assert house.gateway.layout is before
    assert (await house.get()).status == 200


async def test_draining_finishes_what_is_under_way_and_takes_nothing_new(house: House):
    go_on = asyncio.Event()

    async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await says_hello(heard, reader, writer)

    house.upstream.answer = waits
    call = asyncio.create_task(house.get("/slow"))
    await until(lambda: house.upstream.heard)
    idle_reader, idle = await house.connect()
    draining = asyncio.create_task(house.gateway.drain(10))
    await asyncio.sleep(0.05)
    with pytest.raises(ConnectionError):
        await house.connect()
    go_on.set()
    answer = await call
    await asyncio.wait_for(draining, 10)

    assert answer.status == 200
    assert answer.headers["connection"] == "close"
    assert await idle_reader.read() == b""
    assert house.gateway.counters.connections_open == 0
    assert [f.status for f in house.door.finished] == [200]
    idle.close()


async def test_a_request_on_an_idle_connection_is_still_answered_while_draining(house: House):
    reader, writer = await house.connect()
    writer.write(REQUEST)
    await reader.readuntil(b"GET /x 0")
    draining = asyncio.create_task(house.gateway.drain(10))
    await asyncio.sleep(0.05)
    writer.write(REQUEST)
    answers = Answers()
    answers.feed(await reader.read())
    await draining

    assert [s.status for s in answers.said] == [200]
    assert answers.said[0].headers["connection"] == "close"


async def test_connections_waiting_to_be_accepted_are_served_before_the_end(house: House):
    import socket

    waiting = [socket.create_connection(("127.0.0.1", house.port)) for _ in range(20)]
    for sock in waiting:
        sock.sendall(REQUEST)
    await house.gateway.drain(10)

    for sock in waiting:
        sock.settimeout(5)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200"), "reset"
        sock.close()


async def test_a_gateway_that_gets_little_time_still_lets_in_who_waits(house: House):
    """Each turn of its loop takes long, as on a machine that is busy with other things."""
    import socket
    import time

    loop = asyncio.get_running_loop()
    drags = True

    def drag() -> None:
        time.sleep(0.002)
        if drags:
            loop.call_soon(drag)

    waiting = [socket.create_connection(("127.0.0.1", house.port)) for _ in range(60)]
    for sock in waiting:
        sock.sendall(REQUEST)
    loop.call_soon(drag)
    await house.gateway.drain(20)
    drags = False

    for sock in waiting:
        sock.settimeout(5)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200"), "reset"
        sock.close()


async def test_what_does_not_end_in_time_is_cut_off_and_closed_out(house: House):
    async def sleeps(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    house.upstream.answer = sleeps
    _, writer = await house.connect()
    writer.write(REQUEST)
    await until(lambda: house.upstream.heard)
    await house.gateway.drain(0.2)

    assert [f.status for f in house.door.finished] == [0]
    writer.close()
