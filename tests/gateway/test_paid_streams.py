"""Server-sent events that are paid for: the receipt comes first, and a stream that the upstream breaks off is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farebox.store.sandbox import FIRST_BALANCE
from tests.app.till import rows
from tests.gateway.kit import Heard, says_hello
from tests.gateway.test_paid_calls import Shop, a_shop
from tests.gateway.test_streaming import until

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"e\r\ndata: rain\r\n\r\n\r\n"


@pytest.fixture
async def shop(database_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    async with a_shop(database_url, tmp_path / "spool") as opened:
        yield opened


async def ask(
    shop: Shop, path: str, payment: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    reader, writer = await shop.house.connect()
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: api.example.com\r\nPAYMENT-SIGNATURE: {payment}\r\n\r\n".encode()
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    return reader, writer, head


async def test_the_receipt_and_the_first_event_come_before_the_stream_ends(shop: Shop):
    may_end = asyncio.Event()

    async def streams(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        await writer.drain()
        writer.write(EVENT)
        await may_end.wait()
        writer.write(b"0\r\n\r\n")

    shop.house.upstream.answer = streams
    reader, writer, head = await ask(shop, "/rome", await shop.pays("/rome"))
    first = await asyncio.wait_for(reader.readexactly(len(EVENT)), 10)
    may_end.set()
    rest = await asyncio.wait_for(reader.readexactly(5), 10)
    writer.close()

    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"PAYMENT-RESPONSE: " in head
    assert first == EVENT
    assert rest == b"0\r\n\r\n"
    assert await rows(shop.till.database, "SELECT status FROM payment") == [("settled",)]


@pytest.mark.parametrize("events", [0, 1, 20_000], ids=["before its first event", "midway", "far along"])
async def test_a_stream_that_breaks_off_is_given_back_and_booked_so(shop: Shop, events: int):
    async def breaks(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        await writer.drain()
        writer.write(EVENT * events)
        await writer.drain()
        writer.close()

    shop.house.upstream.answer = breaks
    payment = await shop.pays("/rome")
    reader, writer, head = await ask(shop, "/rome", payment)
    body = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    database = shop.till.database

    async def given_back() -> list[tuple[object, ...]]:
        while not (found := await rows(database, "SELECT metadata FROM payment WHERE status = 'refunded'")):
            await asyncio.sleep(0.02)
        return found

    [(facts,)] = await asyncio.wait_for(given_back(), 20)
    again = await shop.fetches("/rome", payment)
    shop.house.upstream.answer = says_hello
    anew = await shop.fetches("/rome", await shop.pays("/rome"))

    assert b"PAYMENT-RESPONSE: " in head
    assert not body.endswith(b"0\r\n\r\n")
    assert facts["refund"]["reason"] == "upstream_broke"  # type: ignore[index]
    postings = await rows(
        database, "SELECT kind, source, destination, amount FROM posting WHERE reference = (SELECT id FROM payment"
        " WHERE status = 'refunded') ORDER BY id"
    )  # fmt: skip
    [(sale, earned, wallet, price), (refund, source, destination, back)] = postings
    assert (sale, refund) == ("exact_fare", "refund")
    assert (earned, wallet, price) == (destination, source, back)
    payers = await rows(
        database, "SELECT a.balance, p.status FROM payment p JOIN sandbox_account a ON a.address = p.payer_address"
        " WHERE a.asset = p.asset OR a.asset = lower(p.asset) ORDER BY p.status"
    )  # fmt: skip
    assert [(int(balance), status) for balance, status in payers] == [
        (FIRST_BALANCE, "refunded"),
        (FIRST_BALANCE - int(price), "settled"),
    ]
    assert (again.status, b"given back" in again.body) == (409, True)
    assert anew.status == 200
    assert [(d.status, d.billed) for d in shop.gate.done()] == [(0, False), (200, True)]


async def test_who_leaves_a_stream_has_paid_for_it(shop: Shop):
    """Only the upstream's break gives money back: a buyer could always break off himself."""

    async def streams(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        while True:
            writer.write(EVENT * 500)
            await writer.drain()
            await asyncio.sleep(0.01)

    shop.house.upstream.answer = streams
    reader, writer, _ = await ask(shop, "/rome", await shop.pays("/rome"))
    await reader.readexactly(100_000)  # more than is kept for a replay
    writer.transport.abort()
    await until(lambda: shop.gate.done())

    assert await rows(shop.till.database, "SELECT status FROM payment") == [("settled",)]
    assert await shop.transfers() == 1
    assert [(d.status, d.billed) for d in shop.gate.done()] == [(0, True)]
