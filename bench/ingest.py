"""Taking usage in, against what PostgreSQL can do at all: `python bench/ingest.py [--short]`, `farebox bench ingest`.

One run, one server, one machine; every figure is rows that are counted in the table afterwards.

* ``COPY``: the anchor. N connections copy ready-made text lines into the same partitioned table, one COPY of all its rows a
  connection: no JSON, no checks, no idempotency keys, one commit at the end.
* ``COPY 1k``: the same with a commit every 1,000 rows, for comparison.
* ``COPY one``: the same rows by one COPY on one connection, which is how a bulk load is usually done and quoted.
* ``batch``: N connections hand over bodies of ``POST /v1/events/batch`` with 1,000 events each. Each body is read and checked,
  its keys are made unique, its quota is counted, and it is committed before the answer. Goal: 0.6 of the anchor.
* ``single``: 64 callers hand over one event each and wait for the commit. Goal: 10,000 a second.

Rounds alternate, so that a busy moment hits both sides; the ratio is that of the medians. FAREBOX_BENCH_DATABASE_URL names a
migrated, empty database to use instead of an embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import uvloop
from psycopg.rows import TupleRow

from farebox.app.entitlements import Entitlements
from farebox.app.events import read_batch, read_event
from farebox.app.metering import Accepted, Metering
from farebox.app.plans import Plans
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.subscriptions import Subscriptions
from farebox.base.ids import CustomerId
from farebox.base.money import Asset
from farebox.base.time import Interval
from farebox.domain.catalog import LimitEntitlement, Metric, PlanVersion
from farebox.domain.customer import Customer
from farebox.embedded import EmbeddedPostgres
from farebox.store import customers, usage
from farebox.store.migrate import migrate
from farebox.store.pool import Database

CUSTOMERS = 100
BATCH = 1_000
SINGLE_CALLERS = 64
#: Room for the whole run, so that no checkpoint falls into one side's round and not into the other's.
SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "8GB", "checkpoint_timeout": "30min"}

_numbers = itertools.count(1)


async def main(short: bool, connections: int) -> int:
    directory = Path(tempfile.mkdtemp(prefix="farebox-bench-"))
    directory.chmod(0o755)
    server = None
    try:
        url = os.environ.get("FAREBOX_BENCH_DATABASE_URL")
        if url is None:
            server = EmbeddedPostgres(directory, settings=SETTINGS)
            url = server.start()
            migrate(url, "sandbox")
        async with await Database.open(
            url, size_min=connections, size_max=connections, name="bench"
        ) as database:
            return await measure(url, database, short, connections)
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def measure(url: str, database: Database, short: bool, connections: int) -> int:
    clock = WallClock()
    business = BusinessDate(database, clock)
    metering = Metering(database, clock, business)
    await furnish(database, business)
    rows, rounds = (4_000, 3) if short else (25_000, 7)
    print(
        f"{os.cpu_count()} cores, {connections} connections, {CUSTOMERS} customers with a quota each, "
        f"{rows:,} rows a connection and round, {rounds} rounds"
    )
    sides: dict[str, Callable[[], Awaitable[Round]]] = {
        "COPY": lambda: copies(url, connections, rows, rows),
        "COPY 1k": lambda: copies(url, connections, rows, BATCH),
        "COPY one": lambda: copies(url, 1, connections * rows, connections * rows),
        "batch": lambda: batches(metering, connections, rows),
        "single": lambda: singles(metering, rows),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            speeds[name].append(await timed(name, database, sides[name]))
    await metering.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:8} {medians[name]:>10,.0f} rows/s   (best {max(values):,.0f})")
    for name in ("COPY", "COPY 1k", "COPY one"):
        best = max(speeds["batch"]) / max(speeds[name])
        print(f"batch / {name:8} {medians['batch'] / medians[name]:.2f}   (of the best rounds {best:.2f})")
    return 0


@dataclass
class Round:
    """What one side is about to do, everything ready: how many rows, and the work itself."""

    rows: int
    run: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]] | None = None


async def timed(name: str, database: Database, side: Callable[[], Awaitable[Round]]) -> float:
    """Rows a second, from rows that are in the table."""
    ready = await side()
    before = await counted(database)
    started = time.perf_counter()
    await ready.run()
    seconds = time.perf_counter() - started
    stored = await counted(database) - before
    if ready.close is not None:
        await ready.close()
    if stored != ready.rows:
        raise SystemExit(f"{name}: {ready.rows} rows were answered for, {stored} are in the table")
    async with database.connection() as tx:
        # The next round finds what the last one left behind, as in service; the write-ahead log is flushed for both.
        await tx.execute("CHECKPOINT")
    return stored / seconds


async def counted(database: Database) -> int:
    async with database.connection() as tx:
        row = await (await tx.execute("SELECT count(*) FROM usage_event")).fetchone()
    return int(row[0]) if row else 0


async def furnish(database: Database, business: BusinessDate) -> None:
    """A metric, a plan with a quota, and customers on it."""
    plans = Plans(database)
    await plans.create_metric("bench", Metric("api_calls", "API calls", "sum"))
    quota = LimitEntitlement("api_calls", "api_calls", None)
    plan = PlanVersion("bench", 0, "Bench", Asset.named("USD"), Interval(1, "month"), (), (quota,))
    await plans.put_plan("bench", plan)
    subscriptions = Subscriptions(database, business, Entitlements(database, business))
    begun = datetime.now(UTC) - timedelta(days=3)
    for n in range(CUSTOMERS):
        async with database.transaction() as tx:
            await customers.add(tx, Customer(CustomerId(f"customer-{n}"), f"Customer {n}"))
        await subscriptions.create("bench", f"customer-{n}", "bench", begun)


# ── the two sides ────────────────────────────────────────────────────────────────────────────────────────────────────


def event(number: int) -> dict[str, object]:
    return {
        "customer_id": f"customer-{number * 7919 % CUSTOMERS}",
        "metric_key": "api_calls",
        "value": str(number % 17 + 1),
        "timestamp": (datetime.now(UTC) - timedelta(seconds=number % 7200)).isoformat(),
        # Spread like the keys of many clients, not rising: the unique index is hit all over.
        "idempotency_key": f"{number * 2654435761 % 2**32:08x}-{number}",
        "properties": {"region": "eu-central-1", "request_id": f"req-{number}"},
    }


def line(number: int) -> str:
    e = event(number)
    properties = json.dumps(e["properties"])
    return (
        f"evt_06f3{number:022d}\t{e['customer_id']}\t{e['metric_key']}\t{e['value']}\t{e['timestamp']}"
        f"\t{e['idempotency_key']}\t{properties}\t0\n"
    )


async def copies(url: str, connections: int, rows: int, rows_a_commit: int) -> Round:
    texts = [
        [
            "".join(line(next(_numbers)) for _ in range(rows_a_commit)).encode()
            for _ in range(rows // rows_a_commit)
        ]
        for _ in range(connections)
    ]
    opened = [await psycopg.AsyncConnection.connect(url, autocommit=True) for _ in range(connections)]

    async def client(connection: psycopg.AsyncConnection[TupleRow], own: list[bytes]) -> None:
        for text in own:
            async with connection.cursor().copy(usage.COPY_EVENTS) as copy:
                await copy.write(text)

    async def run() -> None:
        await asyncio.gather(*(client(c, t) for c, t in zip(opened, texts, strict=True)))

    async def close() -> None:
        for connection in opened:
            await connection.close()

    return Round(connections * rows, run, close)


async def batches(metering: Metering, connections: int, rows: int) -> Round:
    bodies = [
        [
            json.dumps({"events": [event(next(_numbers)) for _ in range(BATCH)]}).encode()
            for _ in range(rows // BATCH)
        ]
        for _ in range(connections)
    ]

    async def client(own: list[bytes]) -> None:
        for body in own:
            answers = await metering.accept_batch(read_batch(body))
            if not all(isinstance(answer, Accepted) for answer in answers):
                raise SystemExit(f"batch: {answers[0]}")

    async def run() -> None:
        await asyncio.gather(*(client(own) for own in bodies))

    return Round(connections * rows, run)


async def singles(metering: Metering, rows: int) -> Round:
    bodies = [
        [json.dumps(event(next(_numbers))).encode() for _ in range(rows // SINGLE_CALLERS)]
        for _ in range(SINGLE_CALLERS)
    ]

    async def caller(own: list[bytes]) -> None:
        for body in own:
            await metering.accept_one(read_event(body))

    async def run() -> None:
        await asyncio.gather(*(caller(own) for own in bodies))

    return Round(rows // SINGLE_CALLERS * SINGLE_CALLERS, run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few seconds: does it run, roughly how fast")
    parser.add_argument("--connections", type=int, default=8)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(main(given.short, given.connections)))
