"""Limits on bytes hold at the exact byte, both ways; rates pace and never cut; credits are read and never shown."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from farebox.app.admission import Admitted, Call, Flow
from tests.gateway.kit import QUICK, Answers, Heard, House, open_house, read_body, read_request, says_hello
from tests.gateway.test_streaming import MIB, PIECE, gives, resident_mib, until

#: A gigabyte in a campaign; enough to show a leak in an ordinary run.
STREAMED_BYTES = 1024 * MIB if os.environ.get("FAREBOX_CAMPAIGN") else 64 * MIB


class Allowance(Flow):
    """So many bytes and no more. ``step``: they are leased in slices of that size."""

    def __init__(self, total: int, step: int = 1 << 30) -> None:
        self.left = total
        self.step = step
        self.slice = min(step, total)
        self.taken = 0
        self.asked = 0

    def take(self, size: int) -> int:
        taken = min(size, self.slice)
        self.slice -= taken
        self.left -= taken
        self.taken += taken
        return taken

    async def more(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        self.slice = min(self.step, self.left)
        return self.slice > 0


class Gate(Flow):
    """Nothing passes while it is shut: a rate that paces for as long as the test wants."""

    def __init__(self, first: int = 0) -> None:
        self.may = first
        self.taken = 0
        self.opened = asyncio.Event()

    def take(self, size: int) -> int:
        taken = min(size, self.may)
        self.may -= taken
        self.taken += taken
        return taken

    async def more(self) -> bool:
        await self.opened.wait()
        return True

    def open(self, size: int = 1 << 40) -> None:
        self.may += size
        self.opened.set()


class Broken(Flow):
    def take(self, size: int) -> int:
        return 0

    async def more(self) -> bool:
        raise RuntimeError("secret")


@dataclass
class Limits:
    upload: Flow | None = None
    download: Flow | None = None
    said: list[bytes] = field(default_factory=list)
    finished_before: list[int] = field(default_factory=list)

    def credits(self, value: bytes) -> None:
        self.said.append(value)


def limit(house: House, **flows: Flow) -> Limits:
    """Every call of this house is under these."""
    limits = Limits(**flows)

    def decide(call: Call) -> Admitted:
        return house.door.admitted(call, fare="pass", meter=limits)

    house.door.decide = decide
    return limits


Answer = Callable[[Heard, asyncio.StreamReader, asyncio.StreamWriter], object]


def pours(size: int, chunked: bool = False):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing)
        left = size
        while left:
            piece = PIECE[: min(left, len(PIECE))]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            left -= len(piece)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")

    return answer


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
async def test_a_download_limit_delivers_exactly_that_and_closes(house: House, chunked: bool):
    limits = limit(house, download=Allowance(1_000_000, step=65_000))
    house.upstream.answer = pours(3 * MIB, chunked)
    answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")

    [said] = answers.said
    assert (said.status, len(said.body), said.whole) == (200, 1_000_000, False)
    assert limits.download.taken == 1_000_000
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(200, 1_000_000)]
    await until(lambda: house.upstream.open == 0)


async def test_an_answer_of_exactly_what_is_left_is_whole(house: House):
    limit(house, download=Allowance(100_000))
    house.upstream.answer = pours(100_000)
    said = await house.get()

    assert (said.whole, len(said.body)) == (True, 100_000)


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
async def test_a_small_answer_in_one_piece_is_cut_too(house: House, chunked: bool):
    limit(house, download=Allowance(7))

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"Transfer-Encoding: chunked\r\n\r\na\r\n" if chunked else b"Content-Length: 10\r\n\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"0123456789" + (b"\r\n0\r\n\r\n" if chunked else b""))

    house.upstream.answer = answer
    answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")

    # Of a chunked answer that came whole the length is known, so it is said, and the cut shows.
    assert [(s.body, s.whole, s.headers["content-length"]) for s in answers.said] == [
        (b"0123456", False, "10")
    ]
    assert [f.bytes_down for f in house.door.finished] == [7]


async def test_a_download_limit_of_nothing_releases_the_head_and_closes(house: House):
    limit(house, download=Allowance(0))
    answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")

    assert [(s.status, s.body, s.whole) for s in answers.said] == [(200, b"", False)]


async def test_an_upload_limit_passes_exactly_that_and_says_402(house: House):
    limits = limit(house, upload=Allowance(100_000, step=30_000))
    received = 0

    async def swallows(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        while data := await reader.read(1 << 16):
            received += len(data)

    house.upstream.reads_bodies = False
    house.upstream.answer = swallows
    said = await house.get(method="POST", body=b"x" * 150_000)

    assert said.status == 402
    problem = json.loads(said.body)
    assert (problem["code"], problem["limit"]) == ("pass_exhausted", "upload_bytes")
    assert problem["quotes"].startswith("/.farebox/quotes?route=")
    await until(lambda: house.upstream.open == 0)
    assert received == limits.upload.taken == 100_000
    assert [(f.status, f.bytes_up) for f in house.door.finished] == [(0, 100_000)]


async def test_an_upload_limit_met_after_the_answer_began_closes(house: House):
    limit(house, upload=Allowance(10))

    async def answers_early(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nearly")
        await writer.drain()
        await reader.read()

    house.upstream.reads_bodies = False
    house.upstream.answer = answers_early
    reader, writer = await house.connect()
    writer.write(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n01234")
    await reader.readuntil(b"early")
    writer.write(b"5678901234")
    rest = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    assert rest == b""
    assert [f.bytes_up for f in house.door.finished] == [10]


async def test_a_paced_answer_and_a_paced_upload_outlast_every_stall(house: House):
    """Both sides' patience is shorter than the pace."""
    async with open_house(QUICK) as hasty:
        up, down = Gate(first=1000), Gate(first=1000)
        limit(hasty, upload=up, download=down)

        async def echoes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.body = await read_body(heard, reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(heard.body) + heard.body)

        hasty.upstream.reads_bodies = False
        hasty.upstream.answer = echoes
        asking = asyncio.ensure_future(hasty.get(method="POST", body=b"x" * 50_000))
        await until(lambda: up.taken == 1000)
        await asyncio.sleep(3 * QUICK.body_stall_timeout_s)
        assert not asking.done()
        up.open()
        await until(lambda: down.taken == 1000)
        await asyncio.sleep(1.5 * QUICK.upstream_stall_timeout_s)
        assert not asking.done()
        down.open()
        said = await asking

        assert (said.status, said.body) == (200, b"x" * 50_000)
        assert [(f.status, f.bytes_up, f.bytes_down) for f in hasty.door.finished] == [(200, 50_000, 50_000)]


async def test_a_gate_that_is_shut_holds_less_than_a_megabyte_of_either_side(house: House):
    given = 0

    async def gushes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given
        writer.transport.set_write_buffer_limits(0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1000 * MIB))
        while True:
            writer.write(PIECE)
            await writer.drain()
            given += len(PIECE)

    house.upstream.answer = gushes
    limit(house, download=Gate())
    _, writer = await house.connect()
    writer.write(b"GET /down HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: given > 0)
    before = -1
    while before != given:
        before = given
        await asyncio.sleep(0.3)
    exchange = next(iter(house.gateway._connections))._exchange
    assert exchange is not None
    assert exchange._metering is not None
    assert exchange._metering.down is not None
    held = len(exchange._metering.down._held)
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert 0 < held < MIB
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(0, 0)]


async def test_a_client_that_leaves_while_it_is_paced_ends_its_call(house: House):
    gate = Gate(first=5)
    limit(house, upload=gate)
    _, writer = await house.connect()
    writer.write(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n0123456789")
    await until(lambda: gate.taken == 5)
    writer.transport.abort()
    await until(lambda: house.door.finished)
    gate.open()

    assert [(f.status, f.bytes_up) for f in house.door.finished] == [(0, 5)]
    await until(lambda: house.upstream.open == 0)


async def test_who_leaves_while_the_rest_of_a_whole_answer_is_paced_has_been_served(house: House):
    """The upstream is done with it; that the client did not wait makes the call no less forwarded."""
    gate, seen = Gate(first=5), []

    def decide(call: Call) -> Admitted:
        seen.append(house.door.admitted(call, meter=Limits(download=gate)))
        return seen[-1]

    house.door.decide = decide
    reader, writer = await house.connect()
    writer.write(b"GET /abcdefgh HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.readuntil(b"GET /")
    writer.transport.abort()
    await until(lambda: house.door.finished)
    gate.open()

    assert [a.abandoned for a in seen] == [True]
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(0, 5)]


async def test_a_limit_that_cannot_be_looked_up_sends_nothing_on(house: House):
    limit(house, upload=Broken())
    said = await house.get(method="POST", body=b"hello")

    assert said.status == 503
    assert b"secret" not in said.body
    assert [f.bytes_up for f in house.door.finished] == [0]


async def test_an_expensive_upload_in_chunks_is_counted_by_its_payload(house: House):
    limits = limit(house, upload=Allowance(11, step=3), download=Allowance(1000))
    raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;name=value\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    answers = await house.says(raw, methods=["POST"])

    assert answers.said[0].status == 200
    assert house.upstream.heard[0].body == b"hello world"
    assert limits.upload.taken == 11


async def test_an_answer_to_head_and_one_without_a_body_take_nothing(house: House):
    limits = limit(house, download=Allowance(0))
    said = await house.get(method="HEAD")

    assert (said.status, said.whole) == (200, True)
    assert limits.download.asked == 0


async def test_a_metered_connection_serves_one_call_after_the_other(house: House):
    limits = limit(house, download=Allowance(1 << 20, step=10))
    answers = await house.says(b"GET /abcdefgh HTTP/1.1\r\nHost: a\r\n\r\n" * 3, methods=["GET"] * 3)

    assert [s.body for s in answers.said] == [b"GET /abcdefgh 0"] * 3
    assert limits.download.taken == 45


# ── credits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["Farebox-Credits", "farebox_credits", "apicharge_credits", "ApiCharge-Credits"]
)
async def test_what_the_upstream_says_a_call_costs_is_heard_once_and_never_shown(house: House, name: str):
    limits = limit(house)

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-A: 1\r\n%b: -5\r\nContent-Length: 2\r\n\r\nhi" % name.encode())

    house.upstream.answer = answer
    said = await house.get()

    assert limits.said == [b"-5"]
    assert said.headers["x-a"] == "1"
    assert not [n for n in said.headers if "credits" in n]


async def test_without_a_meter_credits_are_stripped_all_the_same(house: House):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\napicharge_credits: 3\r\n\r\n2\r\nhi\r\n0\r\n"
        )
        writer.write(b"Farebox-Credits: 4\r\nX-Sum: 1\r\n\r\n")

    house.upstream.answer = answer
    reader, writer = await house.connect()
    writer.write(b"GET /1 HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: close\r\n\r\n")
    raw = await reader.read()
    writer.close()

    assert b"redits" not in raw
    assert raw.endswith(b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n")


async def test_the_trailer_has_the_last_word_on_credits_and_it_comes_before_the_end_is_told(house: House):
    limits = limit(house)
    order: list[str] = []
    limits.credits = lambda value: order.append(f"credits {value.decode()}")  # type: ignore[method-assign]

    def decide(call: Call) -> Admitted:
        return house.door.admitted(call, meter=limits, finish=lambda *_: order.append("finish"))

    house.door.decide = decide

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nFarebox-Credits: -1\r\n\r\n2\r\nhi\r\n"
        )
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"0\r\nFarebox-Credits: -9\r\n\r\n")

    house.upstream.answer = answer
    await house.get()

    assert order == ["credits -9", "finish"]


# ── large ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_streams_up_and_down_under_limits_with_flat_memory_and_the_first_byte_before_the_end(
    house: House,
):
    """Each direction's bytes pass a limit that is leased in slices; the echo begins with the first piece."""
    size = STREAMED_BYTES
    limits = limit(house, upload=Allowance(size, step=5 * MIB), download=Allowance(size, step=3 * MIB))
    house.upstream.reads_bodies = False
    upstream_ended = False

    async def echoes(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal upstream_ended
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            data = await reader.read(min(left, 1 << 16))
            left -= len(data)
            writer.write(data)
            await writer.drain()
        upstream_ended = True

    house.upstream.answer = echoes
    reader, writer = await house.connect()
    before = resident_mib()
    writer.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
    sending = asyncio.create_task(gives(writer, size))
    await reader.readuntil(b"\r\n\r\n")
    received = len(await reader.read(1 << 16))
    first_before_end = not upstream_ended
    while received < size:
        received += len(await reader.read(1 << 18))
    await sending
    grown = resident_mib() - before
    writer.close()
    await until(lambda: house.door.finished)

    assert first_before_end
    assert (limits.upload.taken, limits.download.taken) == (size, size)
    assert [(f.bytes_up, f.bytes_down) for f in house.door.finished] == [(size, size)]
    assert grown < 32, f"{grown:.0f} MiB more"


__all__ = ["Allowance", "Answers", "Gate", "Limits", "limit", "read_request", "says_hello"]
