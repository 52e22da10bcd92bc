"""Counters and the slices of them that processes hold.

``limit_counter.spent`` includes what open leases hold, so a slice is taken in one conditional statement and can never be
granted twice. ``lease.used`` is what its holder said last: for people and for the question who still has something left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal, LiteralString

from farebox.store.pool import Tx

#: A slice is at most this share of what remains, so that slices shrink to 1 near the end.
SLICE_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class Slice:
    """What one process holds of a counter after asking. ``granted`` is all of the open lease, not only the new part.

    ``amount`` is the new part. ``capacity`` None: counted, not limited. ``remainder`` is what nobody holds (it may be
    negative on a soft limit).
    """

    lease_id: int
    granted: int
    amount: int
    capacity: Decimal | None
    remainder: Decimal | None


@dataclass(frozen=True, slots=True)
class Nothing:
    """Why there was no slice.

    ``held``: all is spent, but other processes hold unspent slices; they come back when idle. ``exhausted``: nobody does.
    """

    why: Literal["exhausted", "held", "revoked", "unknown"]
    capacity: Decimal | None = None
    period_end: datetime | None = None


# The row lock makes the arithmetic exact: the amount is computed on the locked row, and the same statement raises spent
# and writes the lease. A slice is what waits for it now (needed), or up to 1/16 of the remainder for what will come.
# Soft and unlimited counters grant what is wanted. used already counts what waits: it is spent the moment it arrives.
_TAKE: LiteralString = """
    WITH slice AS (
        SELECT c.id,
               CASE WHEN c.capacity IS NULL OR NOT c.hard THEN greatest(%(wanted)s, %(needed)s, 1)
                    ELSE least(floor(c.capacity - c.spent),
                               greatest(%(needed)s, least(%(wanted)s, floor((c.capacity - c.spent) / %(share)s)), 1))
               END AS amount
          FROM limit_counter c
          JOIN admission_grant g ON g.id = c.grant_id
         WHERE c.id = %(counter)s AND g.revoked_at IS NULL
           AND (c.capacity IS NULL OR NOT c.hard OR c.spent + 1 <= c.capacity)
           FOR UPDATE OF c
    ), raised AS (
        UPDATE limit_counter c SET spent = c.spent + slice.amount
          FROM slice WHERE c.id = slice.id
        RETURNING c.id, slice.amount, c.capacity, c.capacity - c.spent AS remainder
    ), held AS (
        INSERT INTO lease AS old (counter_id, process_id, granted, used, expires_at)
        SELECT id, %(process)s, amount, least(%(needed)s, amount), now() + make_interval(secs => %(ttl_s)s) FROM raised
        ON CONFLICT (counter_id, process_id) WHERE closed_at IS NULL DO UPDATE
           SET granted = old.granted + excluded.granted, used = %(used)s + excluded.used, expires_at = excluded.expires_at
        RETURNING old.id, old.granted
    )
    SELECT held.id, held.granted, raised.amount, raised.capacity, raised.remainder FROM held, raised"""

_WHY_NOT: LiteralString = """
    SELECT g.revoked_at IS NOT NULL, c.capacity, c.period_end,
           coalesce((SELECT sum(l.granted - l.used) FROM lease l
                      WHERE l.counter_id = c.id AND l.closed_at IS NULL AND l.expires_at > now()
                        AND l.process_id <> %(process)s), 0) > 0
      FROM limit_counter c
      JOIN admission_grant g ON g.id = c.grant_id
     WHERE c.id = %(counter)s"""


async def take(
    tx: Tx, counter_id: str, process_id: str, *, wanted: int, needed: int, used: int, ttl_s: float
) -> Slice | Nothing:
    """Take or extend this process's slice of a counter.

    ``needed`` calls wait right now, ``wanted`` (whole units) would be good to have, ``used`` is what the process has
    spent of its open lease so far. The lease then lives ``ttl_s`` seconds from the database's now.
    """
    values = {
        "counter": counter_id,
        "process": process_id,
        "wanted": wanted,
        "needed": needed,
        "used": used,
        "ttl_s": ttl_s,
        "share": SLICE_SHARE,
    }
    row = await (await tx.execute(_TAKE, values)).fetchone()
    if row is not None:
        return Slice(row[0], int(row[1]), int(row[2]), row[3], row[4])
    why = await (await tx.execute(_WHY_NOT, {"counter": counter_id, "process": process_id})).fetchone()
    if why is None:
        return Nothing("unknown")
    revoked, capacity, period_end, held = why
    return Nothing("revoked" if revoked else "held" if held else "exhausted", capacity, period_end)


# Only the holder's own, still open leases: what the host's shipper has closed for a process taken for dead stays closed.
_RENEW: LiteralString = """
    UPDATE lease l
       SET used = said.used, expires_at = now() + make_interval(secs => %(ttl_s)s)
      FROM unnest(%(ids)s::bigint[], %(used)s::numeric[]) AS said (id, used), limit_counter c
     WHERE l.id = said.id AND l.process_id = %(process)s AND l.closed_at IS NULL AND c.id = l.counter_id
    RETURNING l.id, l.granted, c.capacity - c.spent"""


@dataclass(frozen=True, slots=True)
class Renewed:
    """A lease that is still its holder's. ``remainder`` as in ``Slice``."""

    granted: int
    remainder: Decimal | None


async def renew(tx: Tx, process_id: str, used: Mapping[int, int], ttl_s: float) -> dict[int, Renewed]:
    """Say what was used of each lease (id → units) and keep them alive. Leases missing in the answer are lost."""
    cursor = await tx.execute(
        _RENEW, {"process": process_id, "ids": list(used), "used": list(used.values()), "ttl_s": ttl_s}
    )
    return {row[0]: Renewed(int(row[1]), row[2]) for row in await cursor.fetchall()}


# The counters are locked in the order of their ids: two processes that give back the same ones do not block each other.
_GIVE_BACK: LiteralString = """
    WITH closed AS (
        UPDATE lease l
           SET closed_at = now(), used = said.used
          FROM unnest(%(ids)s::bigint[], %(used)s::numeric[]) AS said (id, used)
         WHERE l.id = said.id AND l.process_id = %(process)s AND l.closed_at IS NULL
        RETURNING l.id, l.counter_id, l.granted - l.used AS unspent
    ), back AS (
        SELECT c.id, sums.unspent
          FROM (SELECT counter_id, sum(unspent) AS unspent FROM closed GROUP BY counter_id) AS sums
          JOIN limit_counter c ON c.id = sums.counter_id
         ORDER BY c.id
           FOR UPDATE OF c
    ), lowered AS (
        UPDATE limit_counter c SET spent = c.spent - back.unspent FROM back WHERE c.id = back.id
        RETURNING 1
    )
    SELECT count(*) FROM closed"""


async def give_back(tx: Tx, process_id: str, used: Mapping[int, int]) -> int:
    """Close leases (id → units used) and return their rest to the counters; how many were still open.

    Called by the holder, who knows what it used, or in its name once its spool says so.
    """
    row = await (
        await tx.execute(_GIVE_BACK, {"process": process_id, "ids": list(used), "used": list(used.values())})
    ).fetchone()
    return int(row[0]) if row else 0


_OPEN_OF: LiteralString = """
    SELECT id, granted FROM lease WHERE process_id = %(process)s AND closed_at IS NULL FOR UPDATE"""


async def open_of(tx: Tx, process_id: str) -> dict[int, int]:
    """The open leases of a process (id → granted), locked until the transaction ends."""
    cursor = await tx.execute(_OPEN_OF, {"process": process_id})
    return {row[0]: int(row[1]) for row in await cursor.fetchall()}


@dataclass(frozen=True, slots=True)
class Counted:
    """How far a counter is: ``used`` leaves out what processes hold unspent (as of their last heartbeat)."""

    counter_id: str
    capacity: Decimal | None
    used: Decimal
    spent: Decimal


_COUNTED: LiteralString = """
    SELECT c.id, c.capacity,
           c.spent - coalesce((SELECT sum(l.granted - l.used) FROM lease l
                                WHERE l.counter_id = c.id AND l.closed_at IS NULL), 0),
           c.spent
      FROM limit_counter c
     WHERE c.id = ANY(%(ids)s)"""


async def counted(tx: Tx, counter_ids: Sequence[str]) -> dict[str, Counted]:
    """What has been used of each counter, for people and for entitlement checks; unknown ids are missing."""
    cursor = await tx.execute(_COUNTED, {"ids": list(counter_ids)})
    return {row[0]: Counted(row[0], row[1], row[2], row[3]) for row in await cursor.fetchall()}
