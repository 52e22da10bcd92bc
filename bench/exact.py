"""Exact fares in process: decode, verify, reserve, settle in the sandbox, at 64 calls at once, on a real PostgreSQL.

    .venv/bin/python bench/exact.py [--short] [--payments 20000] [--tasks 64] [--database URL]

Payments are signed before the clock starts. Prints the rate of calls from the payment header to the settled answer, what
decoding and verifying alone costs, and counts the rows afterwards: every call one settled payment, one transfer, one
posting, and balances that add up. Without --database an embedded PostgreSQL is started, with its durability as shipped.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from farebox.app.admission import Admitted, Call
from farebox.app.exact_fares import ExactFares, Owner
from farebox.app.offers import offers_for
from farebox.app.ports.clock import WallClock
from farebox.app.proofs import GoodProof, check
from farebox.base.money import Money
from farebox.client import Purse, Wallet
from farebox.domain.access import ExactFare, GatewayCatalog, Match, Route, Upstream
from farebox.embedded import EmbeddedPostgres
from farebox.protocols.x402 import PaymentRequired
from farebox.rails.sandbox import SandboxChain
from farebox.store import processes
from farebox.store.migrate import migrate
from farebox.store.pool import Database

ROUTE = Route("forecast", Match("/weather/{city}"), "weather", exact=ExactFare(Money.parse("0.001 USDC"), ()))
CATALOG = GatewayCatalog(1, (Upstream("weather", "http://127.0.0.1:9"),), (ROUTE,))
SELLER = "0x" + "5e" * 20
PAYERS = 100


def call(number: int) -> Call:
    return Call(f"req_{number}", "GET", "shop.test", f"/weather/{number}", "", [], "127.0.0.1", ROUTE)


def signed(fares: ExactFares, payments: int) -> list[bytes]:
    """One payment a call, from a hundred payers."""
    header = next(v for k, v in fares.payment_required(call(0)).answer_headers if k == b"PAYMENT-REQUIRED")
    required = PaymentRequired.from_wire(json.loads(base64.b64decode(header)))
    # A clock ahead of ours: signing takes a while, and the last payment must not have expired when it is used.
    purses = [Purse(Wallet.new(), clock=lambda: time.time() + 3600) for _ in range(PAYERS)]
    return [purses[n % PAYERS].pay(required).header for n in range(payments)]


async def buy(fares: ExactFares, number: int, proof: bytes) -> None:
    decision = await fares.admit(call(number), proof)
    assert isinstance(decision, Admitted), decision
    assert decision.before_release is not None
    refused = await decision.before_release(200, [])
    assert refused is None, refused
    decision.finish(200, 0, 1 << 20)  # too large to keep: keeping answers is not measured here


async def run(url: str, payments: int, tasks: int) -> float:
    async with await Database.open(url, size_min=4, size_max=8, name="bench") as database:
        async with database.connection() as tx:
            name = f"gw_{secrets.token_hex(4)}"
            owner = Owner(name, await processes.register(tx, name, "gateway", "bench", os.getpid()))
        chain = SandboxChain(database, SELLER)
        fares = ExactFares(database, [chain], WallClock(), owner, lambda: CATALOG)
        proofs = signed(fares, payments)
        verify_us = verify_cost_us(chain, proofs[:2000])
        before = await counted(database)
        await every(fares, proofs[: tasks * 4], tasks, 0)  # accounts opened, statements prepared
        started, cpu = time.perf_counter(), time.process_time()
        await every(fares, proofs[tasks * 4 :], tasks, tasks * 4)
        elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        await fares.close()
        await chain.close()
        after = await counted(database)
    made = {k: after[k] - before[k] for k in after}
    rate = (payments - tasks * 4) / elapsed_s
    print(
        f"exact fare in process: {rate:,.0f} calls/s  ({payments - tasks * 4} calls, {tasks} at once, {elapsed_s:.2f} s)"
    )
    print(f"of which this process computed: {cpu_s / (payments - tasks * 4) * 1e6:.0f} µs a call")
    print(f"decode + verify alone: {verify_us:.0f} µs a payment")
    print(f"rows: {made}   cores: {os.cpu_count()}")
    expected = {"settled": payments, "transfers": payments, "postings": payments, "seller": payments * 1000}
    if made != expected:
        print(f"the rows do not add up, expected {expected}", file=sys.stderr)
        raise SystemExit(1)
    return rate


async def every(fares: ExactFares, proofs: list[bytes], tasks: int, first: int) -> None:
    queue = iter(list(enumerate(proofs, first)))

    async def one() -> None:
        for number, proof in queue:
            await buy(fares, number, proof)

    await asyncio.gather(*(one() for _ in range(tasks)))


def verify_cost_us(chain: SandboxChain, proofs: list[bytes]) -> float:
    """The median over ten slices."""
    assert ROUTE.exact is not None
    offers, now_s = offers_for(ROUTE.exact.price, (), [chain]), time.time()
    costs = []
    for start in range(0, len(proofs), max(1, len(proofs) // 10)):
        part = proofs[start : start + max(1, len(proofs) // 10)]
        began = time.process_time()
        for proof in part:
            assert isinstance(check(proof, offers, now_s), GoodProof)
        costs.append((time.process_time() - began) / len(part) * 1e6)
    return statistics.median(costs)


async def counted(database: Database) -> dict[str, int]:
    async with database.connection() as tx:
        row: Any = await (
            await tx.execute(
                """SELECT (SELECT count(*) FROM payment WHERE status = 'settled'), (SELECT count(*) FROM sandbox_transfer),
                          (SELECT count(*) FROM posting WHERE kind = 'exact_fare'),
                          coalesce((SELECT balance FROM sandbox_account WHERE address = %s), 100000000)""",
                (SELLER,),
            )
        ).fetchone()
    return dict(zip(("settled", "transfers", "postings", "seller"), map(int, row), strict=True))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--payments", type=int, default=20_000)
    options.add_argument("--tasks", type=int, default=64)
    options.add_argument("--short", action="store_true", help="3,000 payments: a few seconds")
    options.add_argument("--database", help="a migrated sandbox database; default: an embedded one")
    options.add_argument("--least", type=float, default=0.0, help="exit 1 below this many calls a second")
    chosen = options.parse_args()
    payments = 3000 if chosen.short else chosen.payments
    if chosen.database:
        rate = uvloop.run(run(chosen.database, payments, chosen.tasks))
    else:
        with tempfile.TemporaryDirectory(prefix="farebox-bench-") as directory:
            Path(directory).chmod(0o755)
            postgres = EmbeddedPostgres(Path(directory))
            url = postgres.start()
            try:
                migrate(url, "sandbox")
                rate = uvloop.run(run(url, payments, chosen.tasks))
            finally:
                postgres.stop()
    if rate < chosen.least:
        print(f"below {chosen.least:,.0f} calls/s", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
