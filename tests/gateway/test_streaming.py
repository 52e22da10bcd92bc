"""Large and slow bodies, both ways: nothing is held but what is on its way, and every end is reported once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path

from farebox.domain.access import Match, Route, Upstream
from tests.gateway.kit import PATIENT, QUICK, Answers, Heard, House, open_house, read_body, says_hello

MIB = 1024 * 1024
PIECE = b"x" * 65536


def resident_mib() -> float:
    """What this process holds in memory now (gateway, upstream and client of a test are one process)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


async def until(condition: object, timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def gives(writer: asyncio.StreamWriter, size: int, chunked: bool = False) -> None:
    """Write a body of that size, as fast as it is taken."""
    for _ in range(size // len(PIECE)):
        writer.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE)
        await writer.drain()
    if chunked:
        writer.write(b"0\r\n\r\n")


async def test_a_hundred_megabytes_go_up_with_flat_memory(house: House):
    size = 100 * MIB
    received = 0

    async def swallows(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        left = int(heard.one("content-length") or 0)
        while left:
            data = await reader.read(min(left, 1 << 16))
            received += len(data)
            left -= len(data)
        await says_hello(heard, reader, writer)

    house.upstream.reads_bodies = False
    house.upstream.answer = swallows
    reader, writer = await house.connect()
    before = resident_mib()
    writer.write(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
    await gives(writer, size)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    grown = resident_mib() - before
    writer.close()

    assert received == size
    assert house.door.finished[0].bytes_up == size
    assert grown < 32, f"{grown:.0f} MiB more"


async def test_a_hundred_megabytes_come_down_chunked_with_flat_memory(house: House):
    size = 100 * MIB

    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await gives(writer, size, chunked=True)

    house.upstream.answer = pours
    reader, writer = await house.connect()
    before = resident_mib()
    writer.write(b"GET /down HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    received = 0
    while length := int(await reader.readline(), 16):
        left = length
        while left:
            left -= len(await reader.read(min(left, 1 << 16)))
        await reader.readexactly(2)
        received += length
    grown = resident_mib() - before
    writer.close()

    assert received == size
    assert house.door.finished[0].bytes_down == size
    assert grown < 32, f"{grown:.0f} MiB more"


async def test_a_reader_that_takes_nothing_holds_less_than_a_megabyte(house: House):
    """Beyond kernel buffers and the gateway's own, the upstream cannot get rid of its answer."""
    given = 0

    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given
        writer.transport.set_write_buffer_limits(0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1000 * MIB))
        while True:
            writer.write(PIECE)
            await writer.drain()
            given += len(PIECE)

    house.upstream.answer = pours
    _, writer = await house.connect()
    writer.transport.pause_reading()
    writer.write(b"GET /down HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: given > 0)
    before = -1
    while before != given:
        before = given
        await asyncio.sleep(0.3)
    connection = next(iter(house.gateway._connections))
    assert connection._transport is not None
    held = connection._transport.get_write_buffer_size()
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert held < MIB, held
    assert house.door.finished[0].status == 0


async def test_an_upstream_that_reads_nothing_stops_the_client(house: House):
    release = asyncio.Event()

    async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await release.wait()
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        left = int(heard.one("content-length") or 0)
        while left:
            left -= len(await reader.read(min(left, 1 << 16)))
        await says_hello(heard, reader, writer)

    house.upstream.reads_bodies = False
    house.upstream.answer = waits
    reader, writer = await house.connect()
    writer.transport.set_write_buffer_limits(0)
    writer.write(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (40 * MIB))
    sending = asyncio.create_task(gives(writer, 40 * MIB))
    done, _ = await asyncio.wait([sending], timeout=1.5)
    assert not done, "40 MiB went somewhere"
    release.set()
    await asyncio.wait_for(sending, 20)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_the_first_byte_comes_before_the_last_is_there(house: House):
    go_on = asyncio.Event()

    async def events(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await writer.drain()
        for n in range(3):
            event = b"data: %d\n\n" % n
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await go_on.wait()
            go_on.clear()
        writer.write(b"0\r\n\r\n")

    house.upstream.answer = events
    reader, writer = await house.connect()
    writer.write(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"text/event-stream" in await reader.readuntil(b"\r\n\r\n")
    for n in range(3):
        assert await reader.readuntil(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % n
        assert house.door.finished == []
        go_on.set()
    assert await reader.readexactly(5) == b"0\r\n\r\n"
    writer.close()

    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(200, 27)]


async def test_a_body_in_many_small_chunks_arrives_whole(house: House):
    body = b"".join(b"1\r\n%c\r\n" % (97 + n % 26) for n in range(5000))
    raw = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"
    answers = await house.says(*[raw[i : i + 999] for i in range(0, len(raw), 999)], methods=["POST"])

    assert answers.said[0].status == 200
    assert house.upstream.heard[0].body == bytes(97 + n % 26 for n in range(5000))


async def test_a_client_that_goes_away_ends_the_upstreams_work(house: House):
    gone = asyncio.Event()

    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            await gives(writer, 1000 * MIB, chunked=True)
        finally:
            gone.set()

    house.upstream.answer = pours
    reader, writer = await house.connect()
    writer.write(b"GET /down HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readexactly(100_000)
    writer.transport.abort()
    await asyncio.wait_for(gone.wait(), 10)
    await until(lambda: house.door.finished)

    assert [f.status for f in house.door.finished] == [0]
    assert house.door.finished[0].bytes_down > 0


async def test_a_client_that_goes_away_in_its_body_ends_the_call(house: House):
    _, writer = await house.connect()
    writer.write(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
    await until(lambda: house.door.calls and house.upstream.connections)
    writer.close()
    await until(lambda: house.door.finished)

    assert [(f.status, f.bytes_up) for f in house.door.finished] == [(0, 3)]
    assert house.upstream.heard == []


async def test_a_client_that_closes_while_it_waits_is_gone(house: House):
    """Nothing tells a closed socket from a half-closed one; a call whose buyer left is not worth finishing."""
    gone = asyncio.Event()

    async def thinks(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(1) == b""
        gone.set()

    house.upstream.answer = thinks
    _, writer = await house.connect()
    writer.write(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: house.upstream.heard)
    writer.close()
    await asyncio.wait_for(gone.wait(), 10)

    assert [f.status for f in house.door.finished] == [0]


async def test_an_upstream_that_dies_in_its_answer_breaks_the_clients_answer_too(house: House):
    async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunked = heard.target == "/chunked"
        writer.write(
            b"HTTP/1.1 200 OK\r\n"
            + (
                b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
                if chunked
                else b"Content-Length: 10\r\n\r\nhello"
            )
        )
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    house.upstream.answer = dies
    for path in ("/length", "/chunked"):
        answers = await house.says(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode())

        assert [(s.status, s.body, s.whole) for s in answers.said] == [(200, b"hello", False)]
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(0, 5), (0, 5)]
    assert house.gateway.counters.upstream_errors == {"upstream_failed": 2}


async def test_an_upstream_that_dies_before_its_answer_is_a_502(house: House):
    async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    house.upstream.answer = dies
    answer = await house.get()

    assert answer.status == 502
    assert json.loads(answer.body)["code"] == "upstream_failed"
    assert len(house.upstream.heard) == 1, "a fresh connection is not tried twice"


async def test_an_upstream_that_is_not_there_is_a_502(house: House):
    nowhere = replace(house.gateway.layout.catalog, upstreams=(Upstream("up0", "http://127.0.0.1:1"),))
    house.gateway.replace_catalog(nowhere)
    answers = await house.says(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" * 2, methods=["POST", "POST"]
    )

    assert [s.status for s in answers.said] == [502, 502], "the connection stays in step"
    assert json.loads(answers.said[0].body)["code"] == "upstream_unreachable"
    assert [f.status for f in house.door.finished] == [0, 0]


async def test_an_upstream_that_says_nothing_is_a_504(house: House):
    async def sleeps(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    house.upstream.answer = sleeps
    impatient = replace(
        house.gateway.layout.catalog, upstreams=(Upstream("up0", house.upstream.url, timeout_s=0.2),)
    )
    house.gateway.replace_catalog(impatient)
    answer = await house.get()

    assert answer.status == 504
    assert json.loads(answer.body)["code"] == "upstream_timeout"


async def test_an_upstream_that_stalls_in_its_answer_is_given_up(hasty: House):
    async def stalls(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        await writer.drain()
        await asyncio.sleep(60)

    hasty.upstream.answer = stalls
    hasty.gateway.replace_catalog(
        replace(hasty.gateway.layout.catalog, upstreams=(Upstream("up0", hasty.upstream.url, timeout_s=0.2),))
    )
    answers = await hasty.says(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

    assert [(s.status, s.whole) for s in answers.said] == [(200, False)]
    assert [f.status for f in hasty.door.finished] == [0]


async def test_an_early_answer_is_passed_on_and_the_rest_of_the_body_taken_off(house: House):
    async def refuses(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    house.upstream.reads_bodies = False
    house.upstream.answer = refuses
    reader, writer = await house.connect()
    writer.write(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (50 * MIB))
    with contextlib.suppress(ConnectionError):
        for _ in range(8):
            writer.write(PIECE)
            await asyncio.sleep(0.01)
    answers = Answers()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            answers.feed(data)
    writer.close()

    assert [(s.status, s.body) for s in answers.said] == [(413, b"no!")]
    assert answers.said[0].headers["connection"] == "close"
    assert [f.status for f in house.door.finished] == [413]


async def test_a_stale_connection_is_replaced_for_a_request_that_may_be_repeated(house: House):
    """The upstream closes each connection after one answer, without saying so."""
    served: set[int] = set()

    async def once(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if heard.connection in served:
            writer.close()
            return
        served.add(heard.connection)
        await says_hello(heard, reader, writer)

    house.upstream.answer = once
    assert (await house.get("/1")).status == 200
    assert (await house.get("/2")).status == 200
    assert house.gateway.counters.retries == 1
    assert [h.target for h in house.upstream.heard] == ["/1", "/2", "/2"]
    assert [f.status for f in house.door.finished] == [200, 200]

    assert (await house.get("/3", method="PUT", body=b"same again")).status == 200
    assert house.upstream.heard[-1].body == b"same again"

    answer = await house.get("/4", method="POST", body=b"pay")
    assert answer.status == 502
    assert [h.target for h in house.upstream.heard].count("/4") == 1


async def test_calls_beyond_the_connections_wait_their_turn():
    settings = replace(PATIENT, upstream_connections_max=2)
    async with open_house(settings) as house:
        running = most = 0

        async def works(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            await says_hello(heard, reader, writer)

        house.upstream.answer = works
        answers = await asyncio.gather(*(house.get(f"/{n}") for n in range(20)))

        assert [a.status for a in answers] == [200] * 20
        assert most == house.upstream.connections == 2


async def test_too_many_waiting_calls_are_told_to_come_back():
    settings = replace(
        QUICK, upstream_connections_max=1, upstream_waiting_max=1, upstream_waiting_timeout_s=0.3
    )
    async with open_house(settings) as house:

        async def sleeps(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(1)
            await says_hello(heard, reader, writer)

        house.upstream.answer = sleeps
        answers = await asyncio.gather(*(house.get(f"/{n}") for n in range(3)))

        assert sorted(a.status for a in answers) == [200, 503, 503]
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status == 503)


async def test_an_upload_waits_for_its_connection_without_filling_memory():
    settings = replace(PATIENT, upstream_connections_max=1)
    async with open_house(settings) as house:
        free = asyncio.Event()

        async def answers(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if heard.target == "/first":
                await free.wait()
            heard.body = await read_body(heard, reader)
            await says_hello(heard, reader, writer)

        house.upstream.reads_bodies = False
        house.upstream.answer = answers
        first = asyncio.create_task(house.get("/first"))
        await until(lambda: house.upstream.heard)
        reader, writer = await house.connect()
        writer.write(b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (20 * MIB))
        sending = asyncio.create_task(gives(writer, 20 * MIB))
        done, _ = await asyncio.wait([sending], timeout=0.5)
        assert not done
        free.set()
        assert (await first).status == 200
        assert (await reader.readuntil(b"POST /up %d" % (20 * MIB))).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_routes_may_go_to_different_upstreams():
    async with open_house() as one, open_house() as other:
        catalog = replace(
            one.gateway.layout.catalog,
            upstreams=(Upstream("a", one.upstream.url), Upstream("b", other.upstream.url)),
            routes=(Route("a", Match("/a/{*rest}"), "a"), Route("b", Match("/b/{*rest}"), "b")),
        )
        one.gateway.replace_catalog(catalog)
        await one.get("/a/1")
        await one.get("/b/2")

        assert [h.target for h in one.upstream.heard] == ["/a/1"]
        assert [h.target for h in other.upstream.heard] == ["/b/2"]
