"""The database adds usage up exactly as the domain's own function does, for every aggregation and any mixture of events."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from farebox.domain.catalog import AGGREGATIONS, Metric
from farebox.domain.usage import UsageEvent, aggregate
from farebox.store import usage
from farebox.store.pool import Database, Tx

BEGIN = datetime(
    2026, 11, 21, 23, 50, tzinfo=UTC
)  # events lie on both sides of a day's end, and so of a partition's
CUSTOMERS, EVENTS_MAX, BATCHES = 60, 15, 3
USERS: list[Any] = [
    "a",
    "b",
    "1",
    1,
    1.5,
    "1.5",
    1.0,
    -0.0,
    1e22,
    10**22,
    1e-7,
    True,
    "true",
    False,
    None,
    "ü 'q'",
]


async def test_sql_and_the_domain_agree_on_what_was_used(database: Database) -> None:
    dice = random.Random(4)
    events = {f"cus_{n}": _events(dice, f"cus_{n}") for n in range(CUSTOMERS)}
    async with database.transaction() as tx:
        batch_ids = await _batches(tx)
        await _store(tx, [e for some in events.values() for e in some], batch_ids)

    async with database.connection() as tx:
        for customer_id, some in events.items():
            start = BEGIN + timedelta(minutes=dice.randrange(10))
            end = start + timedelta(minutes=dice.randrange(20))
            inside = [e for e in some if start <= e.timestamp < end]
            for aggregation in AGGREGATIONS:
                metric = Metric("m", "M", aggregation, "user" if aggregation == "unique_count" else None)
                used = await usage.used(tx, customer_id, metric, start, end)

                assert used.value == aggregate(metric, inside), (aggregation, inside)
                assert used.events == len(inside)


def _events(dice: random.Random, customer_id: str) -> list[UsageEvent]:
    return [
        UsageEvent(
            event_id=f"evt_{dice.randrange(10**9):09}",
            customer_id=customer_id,
            metric_key="m",
            value=Decimal(dice.randrange(10**6)).scaleb(-dice.randrange(7)),
            timestamp=BEGIN + timedelta(minutes=dice.randrange(20)),
            properties={} if dice.random() < 0.1 else {"user": dice.choice(USERS)},
            batch_id=dice.randrange(BATCHES),
        )
        for _ in range(dice.randrange(EVENTS_MAX))
    ]


async def _batches(tx: Tx) -> list[int]:
    rows = await tx.execute(
        "INSERT INTO ingest_batch (source, row_count) SELECT 'api', 0 FROM generate_series(1, %s) RETURNING id",
        [BATCHES],
    )
    return sorted(row[0] for row in await rows.fetchall())


async def _store(tx: Tx, events: list[UsageEvent], batch_ids: list[int]) -> None:
    await usage.ensure_partitions(tx, BEGIN.date(), BEGIN.date() + timedelta(days=1))
    async with tx.cursor() as cursor:
        await cursor.executemany(
            """INSERT INTO usage_event (event_id, customer_id, metric_key, value, "timestamp", properties, batch_id)
               VALUES (%s, %s, %s, %s, %s, %s, %s)""",
            [
                (
                    e.event_id,
                    e.customer_id,
                    e.metric_key,
                    e.value,
                    e.timestamp,
                    json.dumps(dict(e.properties)),
                    batch_ids[e.batch_id],
                )
                for e in events
            ],
        )
