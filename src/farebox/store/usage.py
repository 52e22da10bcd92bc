"""Usage events: stored once, folded into days, read exactly.

An ingest transaction does, in this order: shared locks on its customers, keys (sorted), events, counters (sorted), one
``ingest_batch`` row. Everything that locks does so in that order, so overlapping batches wait for each other and never
deadlock.

What a calculation may see is decided by the snapshot it froze: a batch is in when its transaction id is visible in that
snapshot (``pg_visible_in_snapshot``), whatever was committed meanwhile and however long a writer was held open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Final, LiteralString

from psycopg.errors import UniqueViolation

from farebox.domain.catalog import Aggregation, Metric
from farebox.store.pool import Tx

# ── taking events in ─────────────────────────────────────────────────────────────────────────────────────────────────

# Shared among ingests, exclusive for whoever makes new counters: it then sees every event that no counter has counted.
# Taken in a statement of its own, so that what follows reads a snapshot from after the wait.
HOLD_CUSTOMERS: LiteralString = """
    SELECT count(pg_advisory_xact_lock_shared(hashtextextended(id, 4023)))
      FROM (SELECT unnest(string_to_array(%(ids)s::text, E'\\n')) AS id ORDER BY 1) AS sorted"""


@dataclass(frozen=True, slots=True)
class Counter:
    """A quota that events of one customer and metric spend from while their timestamp lies in its period."""

    id: str
    customer_id: str
    metric_key: str
    period_start: datetime
    period_end: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What the database knows about a batch before it is written."""

    batch_id: int
    customers: frozenset[str]
    metrics: dict[str, Metric]
    counters: tuple[Counter, ...]


# Primary keys, and limit_counter_metric for the counters. The batch's number is drawn here because the events carry it.
KNOWN: LiteralString = """
    SELECT nextval(pg_get_serial_sequence('ingest_batch', 'id')),
           array(SELECT id FROM customer
                  WHERE id = ANY (string_to_array(%(customers)s::text, E'\\n')) AND erased_at IS NULL),
           (SELECT json_agg(json_build_array(key, name, aggregation, property, value_type, status))
              FROM metric WHERE key = ANY (string_to_array(%(metrics)s::text, E'\\n'))),
           (SELECT json_agg(json_build_array(id, customer_id, metric_key, period_start, period_end)) FROM limit_counter
             WHERE customer_id = ANY (string_to_array(%(customers)s::text, E'\\n'))
               AND metric_key = ANY (string_to_array(%(metrics)s::text, E'\\n'))
               AND period_start <= %(last)s AND period_end > %(first)s)"""


async def hold_customers(tx: Tx, customer_ids: Sequence[str]) -> None:
    """Keep new counters of these customers from being made until this transaction has counted its events."""
    await tx.execute(HOLD_CUSTOMERS, {"ids": _column(customer_ids)})


async def known(
    tx: Tx, customer_ids: Sequence[str], metric_keys: Sequence[str], first: datetime, last: datetime
) -> Known:
    """Which of the customers and metrics exist, which counters the events may spend from, and the batch's number."""
    row = await (
        await tx.execute(
            KNOWN,
            {
                "customers": _column(customer_ids),
                "metrics": _column(metric_keys),
                "first": first,
                "last": last,
            },
        )
    ).fetchone()
    assert row is not None
    metrics = {m[0]: Metric(m[0], m[1], m[2], m[3], m[4], "", m[5]) for m in row[2] or ()}
    return Known(row[0], frozenset(row[1]), metrics, tuple(_counter(*c) for c in row[3] or ()))


def _counter(id: str, customer_id: str, metric_key: str, start: str, end: str) -> Counter:
    return Counter(id, customer_id, metric_key, datetime.fromisoformat(start), datetime.fromisoformat(end))


# The key's table is what makes an event happen once over all partitions. Both ways of writing it take the keys sorted, so
# that two batches with the same keys wait for each other in the same order.

# COPY writes a page of rows at a time and costs half of an insert, but one key that exists fails it.
COPY_KEYS: LiteralString = "COPY usage_event_key (idempotency_key, event_id, digest) FROM STDIN"


class KeyTaken(Exception):
    """At least one key of the batch exists. The transaction is lost: roll back, and ``claim_keys`` in a new one."""


async def copy_keys(tx: Tx, lines: str) -> None:
    """Write keys that are expected to be new: lines of COPY's text format, in the columns' order. Raises ``KeyTaken``."""
    try:
        async with tx.cursor().copy(COPY_KEYS) as copy:
            await copy.write(lines)
    except UniqueViolation as error:
        raise KeyTaken from error


# The number comes as a row: in a pipeline that is what the server is waited for.
CLAIM_KEYS: LiteralString = """
    WITH claimed AS (
        INSERT INTO usage_event_key (idempotency_key, event_id, digest)
        SELECT key, event_id, decode(digest, 'hex')
          FROM unnest(string_to_array(%(keys)s::text, E'\\n'), string_to_array(%(event_ids)s::text, E'\\n'),
                      string_to_array(%(digests)s::text, E'\\n')) AS new (key, event_id, digest)
        ON CONFLICT (idempotency_key) DO NOTHING
        RETURNING 1
    )
    SELECT count(*) FROM claimed"""


async def claim_keys(tx: Tx, keys: Sequence[str], event_ids: Sequence[str], digests: Sequence[str]) -> int:
    """Write the keys (sorted, each once, without line ends) with the events' ids and digests (hexadecimal); how many were
    new. The others belong to events stored before."""
    values = {"keys": _column(keys), "event_ids": _column(event_ids), "digests": _column(digests)}
    row = await (await tx.execute(CLAIM_KEYS, values)).fetchone()
    return int(row[0]) if row else 0


# Primary key, one probe a key.
OWNERS: LiteralString = """
    SELECT idempotency_key, event_id, digest
      FROM usage_event_key
     WHERE idempotency_key = ANY (%(keys)s)"""


async def owners(tx: Tx, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Key → (event id, digest in hexadecimal) as stored."""
    rows = await (await tx.execute(OWNERS, {"keys": list(keys)})).fetchall()
    return {row[0]: (row[1], bytes(row[2]).hex()) for row in rows}


COPY_EVENTS: LiteralString = """
    COPY usage_event (event_id, customer_id, metric_key, value, "timestamp", idempotency_key, properties, batch_id)
    FROM STDIN"""


async def copy_events(tx: Tx, lines: str) -> None:
    """Store events: lines of COPY's text format, in the columns' order."""
    async with tx.cursor().copy(COPY_EVENTS) as copy:
        await copy.write(lines)


# For few events, and in a pipeline, where COPY cannot be.
INSERT_EVENTS: LiteralString = """
    INSERT INTO usage_event (event_id, customer_id, metric_key, value, "timestamp", idempotency_key, properties, batch_id)
    SELECT event_id, customer_id, metric_key, value::numeric, at::timestamptz, key, properties::jsonb, %(batch_id)s
      FROM unnest(string_to_array(%(event_ids)s::text, E'\\n'), string_to_array(%(customers)s::text, E'\\n'),
                  string_to_array(%(metrics)s::text, E'\\n'), string_to_array(%(values)s::text, E'\\n'),
                  string_to_array(%(times)s::text, E'\\n'), string_to_array(%(keys)s::text, E'\\n'),
                  string_to_array(%(properties)s::text, E'\\n'))
           AS new (event_id, customer_id, metric_key, value, at, key, properties)"""


async def insert_events(tx: Tx, columns: Mapping[str, Sequence[str]], batch_id: int) -> None:
    """Store events: ``event_ids``, ``customers``, ``metrics``, ``values``, ``times``, ``keys`` and ``properties``, as
    texts without line ends."""
    await tx.execute(
        INSERT_EVENTS, {name: _column(texts) for name, texts in columns.items()} | {"batch_id": batch_id}
    )


# Rows are locked in the order of their ids. The batch row comes last: what it counts is known by then.
CLOSE_BATCH: LiteralString = """
    WITH spent AS (
        SELECT id, amount::numeric
          FROM unnest(string_to_array(%(counters)s::text, E'\\n'), string_to_array(%(amounts)s::text, E'\\n')) AS s (id, amount)
    ), held AS (
        SELECT c.id FROM limit_counter c JOIN spent USING (id) ORDER BY c.id FOR UPDATE OF c
    ), counted AS (
        UPDATE limit_counter c SET spent = c.spent + spent.amount FROM spent, held WHERE c.id = spent.id AND held.id = c.id
    )
    INSERT INTO ingest_batch (id, source, row_count) OVERRIDING SYSTEM VALUE
    VALUES (%(batch_id)s, %(source)s, %(rows)s)"""


async def close_batch(tx: Tx, batch_id: int, source: str, rows: int, spent: Mapping[str, Decimal]) -> None:
    """Write the batch's row and what its events spend of each counter (id → amount)."""
    values = {
        "batch_id": batch_id,
        "source": source,
        "rows": rows,
        "counters": _column(spent),
        "amounts": _column([str(amount) for amount in spent.values()]),
    }
    await tx.execute(CLOSE_BATCH, values)


def _column(texts: Iterable[str]) -> str:
    """How a column travels: as one text, a line a row. A driver's array of a thousand texts costs more than the insert, and
    no id, key or name has a line end in it."""
    return "\n".join(texts)


# ── counters of a period that begins ─────────────────────────────────────────────────────────────────────────────────

WITHOUT_COUNTER: LiteralString = """
    SELECT wanted.id
      FROM unnest(%(ids)s::text[]) AS wanted (id)
     WHERE NOT EXISTS (SELECT FROM limit_counter c WHERE c.id = wanted.id)
     ORDER BY wanted.id"""

HOLD_ALONE: LiteralString = "SELECT pg_advisory_xact_lock(hashtextextended(%(id)s, 4023))"


async def begin_counters(tx: Tx, customer_id: str, counter_ids: Sequence[str]) -> list[str]:
    """Which of the counters do not exist yet. If any: from here to the end of the transaction no event of the customer is
    taken in, so that ``seed_counters`` and later ingests count each event once between them."""
    missing = await _without_counter(tx, counter_ids)
    if not missing:
        return []
    await tx.execute(HOLD_ALONE, {"id": customer_id})
    return await _without_counter(tx, missing)


async def _without_counter(tx: Tx, counter_ids: Sequence[str]) -> list[str]:
    return [
        row[0] for row in await (await tx.execute(WITHOUT_COUNTER, {"ids": list(counter_ids)})).fetchall()
    ]


# Index usage_event_read for each new counter.
SEED: LiteralString = """
    UPDATE limit_counter c
       SET spent = c.spent + coalesce((
           SELECT CASE m.aggregation WHEN 'count' THEN count(*) ELSE sum(e.value) END
             FROM usage_event e
            WHERE e.customer_id = c.customer_id AND e.metric_key = c.metric_key
              AND e."timestamp" >= c.period_start AND e."timestamp" < c.period_end), 0)
      FROM metric m
     WHERE c.id = ANY (%(ids)s) AND m.key = c.metric_key"""


async def seed_counters(tx: Tx, counter_ids: Sequence[str]) -> None:
    """Count the usage that new counters' periods hold already."""
    if counter_ids:
        await tx.execute(SEED, {"ids": list(counter_ids)})


# ── the rollup ───────────────────────────────────────────────────────────────────────────────────────────────────────

# A batch is folded when it is visible and not folded yet, whatever its number: one that was held open is folded when it
# commits. Its own row is the memory of it, so no cursor can run past a late commit, and nothing waits for a slow writer.
FOLD: LiteralString = """
    WITH due AS MATERIALIZED (
        SELECT id FROM ingest_batch
         WHERE folded_at IS NULL
         ORDER BY id
         LIMIT %(batches_max)s
           FOR UPDATE SKIP LOCKED
    ), days AS (
        SELECT e.customer_id, e.metric_key, (e."timestamp" AT TIME ZONE c.timezone)::date AS day,
               count(*) AS events, sum(e.value) AS total, max(e.value) AS highest, min(e.value) AS lowest
          FROM usage_event e
          JOIN customer c ON c.id = e.customer_id
         WHERE e.batch_id = ANY (array(SELECT id FROM due))
         GROUP BY 1, 2, 3
         ORDER BY 1, 2, 3
    ), folded AS (
        INSERT INTO usage_day AS old (customer_id, metric_key, day, events, total, highest, lowest)
        SELECT customer_id, metric_key, day, events, total, highest, lowest FROM days
        ON CONFLICT (customer_id, metric_key, day) DO UPDATE
           SET events = old.events + excluded.events, total = old.total + excluded.total,
               highest = greatest(old.highest, excluded.highest), lowest = least(old.lowest, excluded.lowest)
    )
    UPDATE ingest_batch b SET folded_at = now() FROM due WHERE b.id = due.id
    RETURNING b.row_count"""

#: One folder at a time: two would wait for each other on the same popular day.
HOLD_FOLD: LiteralString = "SELECT pg_try_advisory_xact_lock(4024)"

FOLD_BATCHES_MAX: Final = 2_000


async def fold(tx: Tx, batches_max: int = FOLD_BATCHES_MAX) -> tuple[int, int]:
    """Add unfolded batches to the days; returns (batches, events). (0, 0): nothing to do, or another one is at it.

    A day is one of the customer's zone as it is when folded.
    """
    held = await (await tx.execute(HOLD_FOLD)).fetchone()
    if held is None or not held[0]:
        return 0, 0
    rows = await (await tx.execute(FOLD, {"batches_max": batches_max})).fetchall()
    return len(rows), sum(row[0] for row in rows)


# Index ingest_batch_unfolded.
LAG: LiteralString = """
    SELECT coalesce(extract(epoch FROM now() - min(ingested_at)), 0)::float8
      FROM (SELECT ingested_at FROM ingest_batch WHERE folded_at IS NULL ORDER BY id LIMIT 1000) AS oldest"""


async def lag_s(tx: Tx) -> float:
    """The age in seconds of the oldest usage that is not in the days yet."""
    row = await (await tx.execute(LAG)).fetchone()
    return float(row[0]) if row else 0.0


@dataclass(frozen=True, slots=True)
class UsageDay:
    """A customer's usage of a metric on one local day."""

    day: date
    events: int
    total: Decimal
    highest: Decimal
    lowest: Decimal


# Primary key.
DAYS: LiteralString = """
    SELECT day, events, total, highest, lowest
      FROM usage_day
     WHERE customer_id = %(customer_id)s AND metric_key = %(metric_key)s AND day BETWEEN %(first)s AND %(last)s
     ORDER BY day"""


async def days(tx: Tx, customer_id: str, metric_key: str, first: date, last: date) -> list[UsageDay]:
    """The rollup of ``[first, last]``."""
    values = {"customer_id": customer_id, "metric_key": metric_key, "first": first, "last": last}
    return [UsageDay(*row) for row in await (await tx.execute(DAYS, values)).fetchall()]


# ── exact reads ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Used:
    """What the events of a period come to."""

    value: Decimal
    events: int


# One statement an aggregation; all by usage_event_read within the partitions of the period, then ingest_batch by its
# primary key. A null snapshot takes everything that is committed. ``last`` is decided as domain.usage does: by
# timestamp, then by arrival.
_USED_SUM: LiteralString = """
    SELECT coalesce(sum(e.value), 0), count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""
_USED_COUNT: LiteralString = """
    SELECT count(*)::numeric, count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""
_USED_MAX: LiteralString = """
    SELECT coalesce(max(e.value), 0), count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""
_USED_MIN: LiteralString = """
    SELECT coalesce(min(e.value), 0), count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""
_USED_LAST: LiteralString = """
    SELECT coalesce((array_agg(e.value ORDER BY e."timestamp" DESC, e.batch_id DESC, e.event_id DESC))[1], 0), count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""
_USED_UNIQUE: LiteralString = """
    SELECT count(DISTINCT e.properties ->> %(property)s)::numeric, count(*)
      FROM usage_event e JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND (%(snapshot)s::pg_snapshot IS NULL OR pg_visible_in_snapshot(b.xid, %(snapshot)s::pg_snapshot))"""

USED: Final[Mapping[Aggregation, LiteralString]] = {
    "sum": _USED_SUM,
    "count": _USED_COUNT,
    "max": _USED_MAX,
    "min": _USED_MIN,
    "last": _USED_LAST,
    "unique_count": _USED_UNIQUE,
}


async def used(
    tx: Tx, customer_id: str, metric: Metric, start: datetime, end: datetime, snapshot: str | None = None
) -> Used:
    """What the events of ``[start, end)`` come to for the metric, exact; only those visible in the snapshot if given."""
    values = {
        "customer_id": customer_id,
        "metric_key": metric.key,
        "property": metric.property,
        "start": start,
        "end": end,
        "snapshot": snapshot,
    }
    row = await (await tx.execute(USED[metric.aggregation], values)).fetchone()
    assert row is not None
    return Used(row[0], row[1])


# The caller's own transaction has no id yet when it asks first, so its snapshot shows exactly what others have committed.
SNAPSHOT: LiteralString = "SELECT pg_current_snapshot()::text"


async def snapshot(tx: Tx) -> str:
    """The present snapshot: what is committed now, and nothing else, for ever."""
    row = await (await tx.execute(SNAPSHOT)).fetchone()
    assert row is not None
    return str(row[0])


# ── partitions ───────────────────────────────────────────────────────────────────────────────────────────────────────

ENSURE_PARTITIONS: LiteralString = "SELECT ensure_usage_partitions(%(first)s, %(last)s)"


async def ensure_partitions(tx: Tx, first: date, last: date) -> int:
    """Create the daily partitions of ``[first, last]`` (UTC) that are missing, with the events of these days that came
    before them; how many were missing."""
    row = await (await tx.execute(ENSURE_PARTITIONS, {"first": first, "last": last})).fetchone()
    return int(row[0]) if row else 0
