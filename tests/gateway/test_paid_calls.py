"""Exact fares over the wire: a real gateway, front door, spool and database, and buyers who sign, and leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from farebox.domain.access import AccountFare, Match
from tests.app.gate import Gate, a_customer, a_gate, sell_pass
from tests.app.till import CATALOG, ROUTE, Buyer, Json, Process, a_process, read_header, rows, write_header
from tests.gateway.kit import Answering, Heard, House, Said, open_house, says_hello
from tests.gateway.test_streaming import until

PAID = replace(ROUTE, match=Match("/{*rest}"), upstream="up0", account=AccountFare())
FREE_NONCES = 5  # what the kit's budget lets one address lose a minute


@dataclass
class Shop:
    till: Process
    gate: Gate
    house: House

    async def challenge(self, path: str, method: str = "GET", body: bytes = b"") -> Json:
        unpaid = await self.house.get(path, method, body)
        assert unpaid.status == 402
        return read_header(
            [(b"PAYMENT-REQUIRED", unpaid.headers["payment-required"].encode())], b"PAYMENT-REQUIRED"
        )

    async def pays(self, path: str, method: str = "GET", body: bytes = b"") -> str:
        """The header of a payment for a request."""
        return write_header(Buyer().signs(await self.challenge(path, method, body))).decode()

    async def leaves(self, path: str, payment: str, method: str = "GET", body: bytes = b"") -> None:
        """Send a paid request and hang up once the upstream has it."""
        heard = len(self.house.upstream.heard)
        _, writer = await self.house.connect()
        head = f"{method} {path} HTTP/1.1\r\nHost: api.example.com\r\nPAYMENT-SIGNATURE: {payment}\r\n"
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        writer.write(f"{head}{length}\r\n".encode() + body)
        await until(lambda: len(self.house.upstream.heard) > heard)
        writer.transport.abort()

    async def fetches(self, path: str, payment: str, method: str = "GET", body: bytes = b"") -> Said:
        """Send a paid request until it is no longer under way."""
        async with asyncio.timeout(20):
            while True:
                said = await self.house.get(path, method, body, PAYMENT_SIGNATURE=payment)
                if said.status != 409 or b"payment_in_flight" not in said.body:
                    return said
                await asyncio.sleep(0.05)

    async def transfers(self) -> int:
        [(count,)] = await rows(self.till.database, "SELECT count(*) FROM sandbox_transfer")
        return int(count)


@asynccontextmanager
async def a_shop(database_url: str, directory: Path, timeout_s: float = 5.0) -> AsyncIterator[Shop]:
    """``timeout_s``: how long the upstream may take."""
    async with (
        a_process(database_url, catalog=replace(CATALOG, routes=(PAID,))) as till,
        a_gate(database_url, directory, fares=till.fares) as gate,
        open_house(routes=[PAID], door=gate.door, timeout_s=timeout_s) as house,
    ):
        yield Shop(till, gate, house)


@pytest.fixture
async def shop(database_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    async with a_shop(database_url, tmp_path / "spool") as opened:
        yield opened


def slowly(seconds: float = 0.3, size: int = 0) -> Answering:
    async def works(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        if not size:
            await says_hello(heard, reader, writer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)

    return works


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b"order=1")])
async def test_who_hangs_up_on_a_paid_call_has_paid_and_fetches_the_answer_with_the_same_payment(
    shop: Shop, method: str, body: bytes
):
    shop.house.upstream.answer = slowly()
    payment = await shop.pays("/rome", method, body)

    await shop.leaves("/rome", payment, method, body)
    meanwhile = await shop.house.get("/rome", method, body, PAYMENT_SIGNATURE=payment)
    fetched = await shop.fetches("/rome", payment, method, body)

    assert meanwhile.status == 409
    assert fetched.status == 200
    assert fetched.body == f"{method} /rome {len(body)}".encode()
    assert "payment-response" in fetched.headers
    assert len(shop.house.upstream.heard) == 1
    assert await shop.transfers() == 1
    assert [(d.status, d.billed) for d in shop.gate.done()] == [(0, True)]
    assert shop.house.gateway.buffered_bytes == 0


async def test_hanging_up_each_time_makes_no_call_free(shop: Shop):
    """More often than the budget for lost payments would have allowed."""
    shop.house.upstream.answer = slowly(0.05)
    offer = await shop.challenge("/rome")
    for _ in range(FREE_NONCES + 2):
        await shop.leaves("/rome", write_header(Buyer().signs(offer)).decode())
    await until(lambda: len(shop.gate.done()) == FREE_NONCES + 2)

    assert len(shop.house.upstream.heard) == FREE_NONCES + 2
    assert await shop.transfers() == FREE_NONCES + 2


async def test_a_large_answer_to_somebody_who_left_is_owed_once_more(shop: Shop):
    shop.house.upstream.answer = slowly(size=70_000)
    payment = await shop.pays("/rome")

    await shop.leaves("/rome", payment)
    again = await shop.fetches("/rome", payment)
    third = await shop.fetches("/rome", payment)

    assert (again.status, len(again.body)) == (200, 70_000)
    assert third.status == 409
    assert len(shop.house.upstream.heard) == 2
    assert await shop.transfers() == 1


async def test_an_upstream_that_never_answers_takes_no_money_and_does_not_hold_the_payment_for_ever(
    database_url: str, tmp_path: Path
):
    async with a_shop(database_url, tmp_path / "spool", timeout_s=0.4) as shop:
        shop.house.upstream.answer = slowly(60)
        payment = await shop.pays("/rome")
        await shop.leaves("/rome", payment)
        await until(lambda: shop.gate.done())
        shop.house.upstream.answer = says_hello
        fetched = await shop.fetches("/rome", payment)

        assert fetched.status == 200
        assert await shop.transfers() == 1
        assert [(d.status, d.billed) for d in shop.gate.done()] == [(0, False), (200, True)]


async def test_calls_left_alone_that_are_never_answered_are_soon_refused(database_url: str, tmp_path: Path):
    async with a_shop(database_url, tmp_path / "spool", timeout_s=0.3) as shop:
        shop.house.upstream.answer = slowly(60)
        payment = await shop.pays("/rome")
        for n in range(1, FREE_NONCES + 1):
            await shop.leaves("/rome", payment)
            await until(lambda n=n: len(shop.gate.done()) == n)
            await _until_given_back(shop)
        limited = await shop.house.get("/rome", PAYMENT_SIGNATURE=payment)

        assert limited.status == 429
        assert len(shop.house.upstream.heard) == FREE_NONCES


async def test_of_a_call_that_is_paid_no_other_credential_of_ours_reaches_the_upstream(shop: Shop):
    key = await a_customer(shop.gate.database)
    token = await sell_pass(shop.gate, calls=5, route=PAID)
    lines: list[dict[str, str]] = [
        {"Authorization": f"Bearer {token}"},
        {"Authorization": f"bearer  {token}", "X_API_Key": key},
        {"X_API_Key": token, "Authorization": f"Bearer {key}"},
        {"Authorization": key},
        {"Authorization": "Bearer theirs", "X_API_Key": "theirs"},
        {"Authorization": "Bearer eyJhbGciOiJub25lIn0.e30.theirs"},
    ]
    paid = await shop.challenge("/rome")
    for headers in lines:
        payment = write_header(Buyer().signs(paid)).decode()
        said = await shop.house.get("/rome", "GET", b"", PAYMENT_SIGNATURE=payment, **headers)
        assert said.status == 200

    seen = [(h.one("Authorization"), h.one("X-API-Key")) for h in shop.house.upstream.heard]
    assert seen == [(None, None)] * 4 + [
        ("Bearer theirs", "theirs"),
        ("Bearer eyJhbGciOiJub25lIn0.e30.theirs", None),
    ]
    assert await shop.transfers() == len(lines)


async def _until_given_back(shop: Shop) -> None:
    async with asyncio.timeout(10):
        while await rows(shop.till.database, "SELECT 1 FROM payment WHERE status = 'reserved'"):
            await asyncio.sleep(0.01)
