"""Bodies that are held whole: so many bytes of all clients together, and not one of them forgotten afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from farebox.app.admission import Answer, Call, Decision, Headers, Refusal
from farebox.base.errors import Unavailable
from farebox.gateway.problems import refusal
from tests.gateway.kit import QUICK, Heard, House, open_house, says_hello
from tests.gateway.test_streaming import until

KIB = 1024
SMALL = replace(QUICK, paid_body_bytes_max=64 * KIB, buffered_bytes_max=100 * KIB)
#: Every story here ends one way or another; none is worth waiting for.
HURRIED = replace(SMALL, head_timeout_s=0.1, idle_timeout_s=0.1, body_stall_timeout_s=0.1, linger_s=0.05)


def post(size: int, sent: int, path: str = "/paid") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path.encode(), size) + b"x" * sent


def chunked(sent: int, path: str = "/paid") -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()
    return head + b"%x\r\n%b\r\n" % (sent, b"x" * sent)


async def test_beyond_the_total_a_body_is_refused_for_now_and_the_others_go_on():
    async with open_house(replace(SMALL, body_stall_timeout_s=5.0)) as house:
        house.door.binds_bodies = True
        holders = [await house.connect() for _ in range(2)]
        for _, writer in holders:
            writer.write(post(50 * KIB, 45 * KIB))
        await until(lambda: house.gateway.buffered_bytes == 90 * KIB)

        declared = await house.get("/paid", "POST", b"x" * 20 * KIB)
        unsaid = await house.says(chunked(20 * KIB))
        fitting = await house.get("/paid", "POST", b"x" * 10 * KIB)
        for reader, writer in holders:
            writer.write(b"x" * 5 * KIB)
            await reader.readuntil(b"POST /paid %d" % (50 * KIB))
            writer.close()
        later = await house.get("/paid", "POST", b"x" * 20 * KIB)

        for refused in (declared, unsaid.said[0]):
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert json.loads(refused.body)["code"] == "unavailable"
        assert [fitting.status, later.status] == [200, 200]
        assert house.gateway.buffered_bytes == 0
        assert len(house.upstream.heard) == 4


async def test_a_body_that_streams_is_not_counted():
    async with open_house(SMALL) as house:
        assert (await house.get("/streams", "POST", b"x" * 500 * KIB)).status == 200
        assert house.gateway.buffered_bytes == 0


async def test_a_paid_body_counts_until_its_call_is_over():
    async with open_house(SMALL) as house:
        house.door.binds_bodies = True
        may_answer = asyncio.Event()

        async def works(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await may_answer.wait()
            await says_hello(heard, reader, writer)

        house.upstream.answer = works
        asking = asyncio.ensure_future(house.get("/paid", "POST", b"x" * 10 * KIB))
        await until(lambda: house.upstream.heard)
        assert house.gateway.buffered_bytes == 10 * KIB
        may_answer.set()
        await asking
        assert house.gateway.buffered_bytes == 0


class SlowPages:
    """Pages that take a while, or fail."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = 0

    def owns(self, path: str) -> bool:
        return path.startswith("/.farebox/")

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal:
        self.asked += 1
        await asyncio.sleep(0.1)
        self.left += 1
        if path.endswith("/bug"):
            raise RuntimeError("secret")
        return Answer(200, [], b"{}")


def answers_after(
    seconds: float, decide: Callable[[Call], Decision]
) -> Callable[[Call], Awaitable[Decision]]:
    async def think(call: Call) -> Decision:
        await asyncio.sleep(seconds)
        return decide(call)

    return think


def away(call: Call) -> Decision:
    raise Unavailable("the database", 1.0)


def no(call: Call) -> Decision:
    return refusal("payment_invalid", "no")


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
@pytest.mark.parametrize(
    "sent",
    [post(9000, 9000), post(9000, 5000), chunked(5000) + b"0\r\n\r\n", chunked(5000), chunked(5000) + b"zz\r\n",
     chunked(50_000) + b"c350\r\n" + b"x" * 50_000, post(9000, 9000, "/.farebox/page"), post(9000, 5000, "/.farebox/page"),
     post(9000, 9000, "/.farebox/bug"), post(9000, 9000) * 3, post(9000, 9000, "/.farebox/page") + post(9000, 5000)],
    ids=["whole", "half", "chunks", "half-chunks", "bad-chunk", "too-large", "page", "half-page", "page-fails", "pipelined", "page-then-half"],
)  # fmt: skip
@pytest.mark.parametrize("door", ["yes", "slow yes", "no", "slow away"])
async def test_every_end_gives_back_what_was_held(sent: bytes, leaves: bool, door: str):
    pages = SlowPages()
    async with open_house(HURRIED, site=pages) as house:
        house.door.binds_bodies = True
        decide = {"yes": house.door.admitted, "no": no, "away": away}[door.split()[-1]]
        house.door.decide = answers_after(0.05, decide) if door.startswith("slow") else decide
        reader, writer = await house.connect()
        writer.write(sent)
        await until(
            lambda: house.gateway.buffered_bytes or house.gateway.counters.refusals or house.upstream.heard
        )
        if leaves:
            writer.transport.abort()
        else:
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
        await until(lambda: house.gateway.counters.connections_open == 0 and pages.asked == pages.left)
        await until(lambda: house.gateway.buffered_bytes == 0)
        await asyncio.sleep(0.05)

        assert house.gateway.buffered_bytes == 0


async def test_a_page_that_outlives_its_client_holds_its_body_to_the_end():
    pages = SlowPages()
    async with open_house(SMALL, site=pages) as house:
        _, writer = await house.connect()
        writer.write(post(9000, 9000, "/.farebox/page"))
        await until(lambda: pages.asked)
        writer.transport.abort()
        await until(lambda: house.gateway.counters.connections_open == 0)

        assert (house.gateway.buffered_bytes, pages.left) == (9000, 0)
        await until(lambda: pages.left)
        await until(lambda: house.gateway.buffered_bytes == 0)


async def test_an_upstream_that_fails_gives_back_what_was_held(house: House):
    house.door.binds_bodies = True

    async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    house.upstream.answer = dies
    assert (await house.get("/paid", "POST", b"x" * 9000)).status == 502
    assert house.gateway.buffered_bytes == 0
