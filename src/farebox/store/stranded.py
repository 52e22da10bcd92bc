"""What was left behind: slices of limits that nobody will give back by himself, and the state of what runs.

For people and for ``farebox doctor``; nothing here is on the way of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, LiteralString

from farebox.store.pool import Tx

ROWS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class ProcessLife:
    """A gateway process that is not settled. ``silent_s``: since its last heartbeat; ``behind_s``: what of its calls is
    not in the database yet (None: nothing was shipped so far)."""

    id: str
    host: str
    pid: int
    started_at: datetime
    stopped: bool
    silent_s: float
    behind_s: float | None


_UNSETTLED: LiteralString = """
    SELECT id, host, pid, started_at, stopped_at IS NOT NULL,
           extract(epoch FROM now() - heartbeat_at)::float8, extract(epoch FROM now() - shipped_to)::float8
      FROM process
     WHERE settled_at IS NULL AND kind = 'gateway'
     ORDER BY epoch DESC
     LIMIT %(rows_max)s"""


async def unsettled(tx: Tx) -> list[ProcessLife]:
    """Every gateway process that runs, or whose spool was not shipped to its end; the latest first."""
    cursor = await tx.execute(_UNSETTLED, {"rows_max": ROWS_MAX})
    return [ProcessLife(*row) for row in await cursor.fetchall()]


@dataclass(frozen=True, slots=True)
class StrandedLease:
    """An open slice of a process. ``unspent`` as of its last heartbeat: the units that nobody can use."""

    process_id: str
    lease_id: int
    counter_id: str
    subject_id: str
    kind: str
    granted: Decimal
    unspent: Decimal


_OPEN_LEASES: LiteralString = """
    SELECT l.process_id, l.id, l.counter_id, g.subject_id, c.kind, l.granted, greatest(l.granted - l.used, 0)
      FROM lease l
      JOIN limit_counter c ON c.id = l.counter_id
      JOIN admission_grant g ON g.id = c.grant_id
     WHERE l.closed_at IS NULL AND l.process_id = ANY(%(processes)s)
     ORDER BY l.process_id, l.id
     LIMIT %(rows_max)s"""


async def open_leases(tx: Tx, process_ids: Sequence[str]) -> list[StrandedLease]:
    """What these processes hold."""
    cursor = await tx.execute(_OPEN_LEASES, {"processes": list(process_ids), "rows_max": ROWS_MAX})
    return [StrandedLease(*row) for row in await cursor.fetchall()]


_HEARD_FROM: LiteralString = """
    SELECT host, settled_at IS NOT NULL, extract(epoch FROM now() - heartbeat_at)::float8
      FROM process WHERE id = %(id)s FOR UPDATE"""


async def heard_from(tx: Tx, process_id: str) -> tuple[str, bool, float] | None:
    """(host, settled, seconds since its last heartbeat) of a process, locked; None: there is no such process."""
    row = await (await tx.execute(_HEARD_FROM, {"id": process_id})).fetchone()
    return None if row is None else (row[0], row[1], row[2])


_DEAD_JOBS: LiteralString = (
    "SELECT kind, count(*) FROM job WHERE status = 'dead' GROUP BY kind ORDER BY kind LIMIT 100"
)


async def dead_jobs(tx: Tx) -> dict[str, int]:
    """Jobs that were given up, by kind."""
    return {row[0]: int(row[1]) for row in await (await tx.execute(_DEAD_JOBS)).fetchall()}


_NOW: LiteralString = "SELECT extract(epoch FROM clock_timestamp())::float8"


async def now_s(tx: Tx) -> float:
    """Seconds since the epoch by the database's clock."""
    row = await (await tx.execute(_NOW)).fetchone()
    assert row is not None, "a SELECT without FROM gives a row"
    return float(row[0])
