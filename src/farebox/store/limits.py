"""Counters and the slices of them that processes hold.

``limit_counter.spent`` includes what open leases hold, so a slice is taken in one conditional statement and can never be
granted twice. ``lease.used`` is what its holder said last: for people and for the question who still has something left.

The unit is the kind's: calls, credits, bytes, slots (``used``: in flight), bytes a second (``granted``: a share of the rate).
A counter with ``window_s`` counts one window at a time, aligned to the epoch by the database's clock; a lease is void in
any window but the one it was taken in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final, Literal, LiteralString

from farebox.domain.limits import LimitKind
from farebox.store.pool import PLANNED_ANEW, Tx

#: A slice is at most this share of what remains, so that slices shrink to 1 near the end.
SLICE_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class Slice:
    """What one process holds of a counter after asking. ``granted`` is all of the open lease, not only the new part.

    ``amount`` is the new part. ``capacity`` None: counted, not limited. ``remainder`` is what nobody holds (it may be
    negative on a soft limit). ``window_left_s``: seconds until the counter's window ends; None: it has none.
    """

    lease_id: int
    granted: int
    amount: int
    capacity: Decimal | None
    remainder: Decimal | None
    window_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class Nothing:
    """Why there was no slice.

    ``held``: all is spent, but other processes hold unspent slices, or have not answered yet; they come back when idle or
    asked for. ``exhausted``: nobody has any. ``asked_at``: when the question reached the database, by its clock.
    """

    why: Literal["exhausted", "held", "revoked", "unknown"]
    capacity: Decimal | None = None
    period_end: datetime | None = None
    window_left_s: float | None = None
    asked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a process asks of one counter.

    ``needed`` units are waited for right now, ``wanted`` (whole units) would be good to have, ``used`` is what the process
    has spent of its open lease so far. A slice is at most 1/``share`` of what remains (or ``smallest``, where four of these
    remain, or ``needed``). What others answered before ``heard_since`` is too old to say that they have nothing left; None:
    whatever they said is.
    """

    counter_id: str
    wanted: int
    needed: int
    used: int
    share: int = SLICE_SHARE
    smallest: int = 1
    heard_since: datetime | None = None


#: For ``Wish.heard_since``: whatever others said last is believed.
ANY_TIME: Final = datetime.min.replace(year=1970, tzinfo=UTC)

# The row locks make the arithmetic exact: the amounts are computed on the locked rows, and the same statement raises spent
# and writes the leases. The counters are locked in the order of their ids, as in _GIVE_BACK. A slice is what waits for it
# now (needed), or a share of the remainder for what will come (1/16; a quarter where that is less than the smallest slice
# worth asking for). Soft and unlimited counters grant what is wanted. used already counts what waits: it is spent the moment
# it arrives.
# Windows: whoever comes first after a window's end turns it over, here, by a clock that is read behind the lock. The own
# lease of an earlier window is closed before the new one is written (the insert reads the count of those closed); those of
# others are closed where nobody is at work on them, and void in any case.
# The empty text behind a process id keeps the planner, while it has no statistics, from looking for one lease among all of
# the process's.
_TAKE: LiteralString = """
    WITH asked AS (
        SELECT * FROM unnest(%(ids)b::text[], %(wanted)b::bigint[], %(needed)b::bigint[], %(used)b::bigint[],
                             %(share)b::bigint[], %(smallest)b::bigint[])
                   AS asked (counter_id, wanted, needed, used, share, smallest)
    ), found AS (
        SELECT c.id, c.capacity, c.hard, c.spent, c.window_s, c.window_start AS began,
               CASE WHEN c.window_s IS NOT NULL THEN
                    greatest(c.window_start,
                             to_timestamp(floor(extract(epoch FROM clock_timestamp()) / c.window_s) * c.window_s))
               END AS window_start,
               asked.wanted, asked.needed, asked.used, asked.share, asked.smallest
          FROM asked
          JOIN limit_counter c ON c.id = asked.counter_id
          JOIN admission_grant g ON g.id = c.grant_id
         WHERE g.revoked_at IS NULL
         ORDER BY c.id
           FOR UPDATE OF c
    ), counter AS (
        SELECT id, capacity, hard, window_s, window_start, window_start IS DISTINCT FROM began AS turned,
               CASE WHEN window_start IS DISTINCT FROM began THEN 0 ELSE spent END AS spent,
               wanted, needed, used, share, smallest
          FROM found
    ), slice AS (
        SELECT counter.*,
               CASE WHEN capacity IS NULL OR NOT hard THEN greatest(wanted, needed, 1)
                    ELSE least(floor(capacity - spent),
                               greatest(needed, 1,
                                        least(wanted, greatest(floor((capacity - spent) / share),
                                                               least(smallest, floor((capacity - spent) / 4))))))
               END AS amount
          FROM counter
         WHERE capacity IS NULL OR NOT hard OR spent + 1 <= capacity
    ), raised AS (
        UPDATE limit_counter c SET spent = slice.spent + slice.amount, window_start = slice.window_start
          FROM slice WHERE c.id = slice.id
        RETURNING c.id, slice.amount, slice.needed, slice.used, slice.turned, c.capacity, c.capacity - c.spent AS remainder,
                  c.window_start, c.window_start + make_interval(secs => c.window_s) AS window_end
    ), idle AS (
        SELECT l.id FROM lease l, slice
         WHERE slice.turned AND l.counter_id = slice.id AND l.closed_at IS NULL AND l.process_id <> %(process)s
           FOR UPDATE OF l SKIP LOCKED
    ), void AS (
        UPDATE lease l SET closed_at = now() FROM slice
         WHERE slice.turned AND l.counter_id = slice.id AND l.closed_at IS NULL
           AND (l.process_id = %(process)s OR l.id IN (SELECT id FROM idle))
        RETURNING 1
    ), held AS (
        INSERT INTO lease AS old (counter_id, process_id, granted, used, expires_at, window_start)
        SELECT raised.id, %(process)s, amount,
               least(needed, amount)
                   + CASE WHEN NOT turned AND EXISTS (SELECT FROM lease mine
                                                       WHERE mine.counter_id = raised.id AND mine.process_id || '' = %(process)s
                                                         AND mine.closed_at IS NULL)
                          THEN raised.used ELSE 0 END,
               least(now() + make_interval(secs => %(ttl_s)s), window_end), raised.window_start
          FROM (SELECT count(*) FROM void) AS emptied, raised
         ORDER BY raised.id
        ON CONFLICT (counter_id, process_id) WHERE closed_at IS NULL DO UPDATE
           SET granted = old.granted + excluded.granted, used = excluded.used, expires_at = excluded.expires_at
        RETURNING old.id, old.counter_id, old.granted
    )
    SELECT held.counter_id, held.id, held.granted, raised.amount, raised.capacity, raised.remainder,
           extract(epoch FROM raised.window_end - clock_timestamp())::float8
      FROM held JOIN raised ON raised.id = held.counter_id"""

# What a holder says by itself may be on its way while it changes: only an answer that was given after it was asked for can
# say that nothing is left.
_WHY_NOT: LiteralString = """
    SELECT c.id, g.revoked_at IS NOT NULL, c.capacity, c.period_end,
           EXISTS (SELECT FROM lease l
                    WHERE l.counter_id = c.id AND l.closed_at IS NULL AND l.expires_at > now()
                      AND l.window_start IS NOT DISTINCT FROM c.window_start AND l.process_id <> %(process)s
                      AND (l.granted > l.used OR coalesce(l.answered_at, 'epoch') < coalesce(asked.since, 'infinity'))),
           greatest(extract(epoch FROM c.window_start + make_interval(secs => c.window_s) - clock_timestamp()), 0)::float8,
           now()
      FROM unnest(%(ids)b::text[], %(since)b::timestamptz[]) AS asked (counter_id, since)
      JOIN limit_counter c ON c.id = asked.counter_id
      JOIN admission_grant g ON g.id = c.grant_id"""


async def take_each(tx: Tx, process_id: str, wishes: Sequence[Wish], ttl_s: float) -> list[Slice | Nothing]:
    """Take or extend this process's slices of some counters, none of which comes twice; what came of each wish, in order.

    On an autocommit connection this is one durable statement, and one read more where there was nothing. A lease then lives
    ``ttl_s`` seconds from the database's now, but never past its window.
    """
    cursor = await tx.execute(
        _TAKE,
        {
            "process": process_id,
            "ttl_s": ttl_s,
            "ids": [w.counter_id for w in wishes],
            "wanted": [w.wanted for w in wishes],
            "needed": [w.needed for w in wishes],
            "used": [w.used for w in wishes],
            "share": [w.share for w in wishes],
            "smallest": [w.smallest for w in wishes],
        },
        prepare=PLANNED_ANEW,
    )
    came: dict[str, Slice | Nothing] = {
        row[0]: Slice(row[1], int(row[2]), int(row[3]), row[4], row[5], row[6])
        for row in await cursor.fetchall()
    }
    if short := [wish for wish in wishes if wish.counter_id not in came]:
        cursor = await tx.execute(
            _WHY_NOT,
            {
                "process": process_id,
                "ids": [w.counter_id for w in short],
                "since": [w.heard_since for w in short],
            },
            prepare=PLANNED_ANEW,
        )
        for (
            counter_id,
            revoked,
            capacity,
            period_end,
            held,
            window_left_s,
            asked_at,
        ) in await cursor.fetchall():
            why: Literal["exhausted", "held", "revoked"] = (
                "revoked" if revoked else "held" if held else "exhausted"
            )
            came[counter_id] = Nothing(why, capacity, period_end, window_left_s, asked_at)
    return [came.get(wish.counter_id, _UNKNOWN) for wish in wishes]


_UNKNOWN: Final = Nothing("unknown")


async def take(
    tx: Tx,
    counter_id: str,
    process_id: str,
    *,
    wanted: int,
    needed: int,
    used: int,
    ttl_s: float,
    share: int = SLICE_SHARE,
    smallest: int = 1,
) -> Slice | Nothing:
    """As ``take_each``, of one counter."""
    [came] = await take_each(tx, process_id, [Wish(counter_id, wanted, needed, used, share, smallest)], ttl_s)
    return came


# Only the holder's own, still open leases: what the host's shipper has closed for a process taken for dead stays closed,
# and what was taken from a window that is over is not kept.
_RENEW: LiteralString = """
    UPDATE lease l
       SET used = said.used,
           expires_at = least(now() + make_interval(secs => %(ttl_s)s), c.window_start + make_interval(secs => c.window_s)),
           answered_at = CASE WHEN %(answer)s THEN now() ELSE l.answered_at END
      FROM unnest(%(ids)b::bigint[], %(used)b::bigint[]) AS said (id, used), limit_counter c
     WHERE l.id = said.id AND l.process_id = %(process)s AND l.closed_at IS NULL AND c.id = l.counter_id
       AND (c.window_s IS NULL OR (l.window_start = c.window_start
                                   AND clock_timestamp() < c.window_start + make_interval(secs => c.window_s)))
    RETURNING l.id, l.granted, c.capacity - c.spent,
              extract(epoch FROM c.window_start + make_interval(secs => c.window_s) - clock_timestamp())::float8"""


@dataclass(frozen=True, slots=True)
class Renewed:
    """A lease that is still its holder's. ``remainder`` and ``window_left_s`` as in ``Slice``."""

    granted: int
    remainder: Decimal | None
    window_left_s: float | None = None


async def renew(
    tx: Tx, process_id: str, used: Mapping[int, int], ttl_s: float, *, answer: bool = False
) -> dict[int, Renewed]:
    """Say what was used of each lease (id → units) and keep them alive. Leases missing in the answer are lost.

    ``answer``: another process has asked what is left of them, and this is said since.
    """
    values = {
        "process": process_id,
        "ids": list(used),
        "used": list(used.values()),
        "ttl_s": ttl_s,
        "answer": answer,
    }
    cursor = await tx.execute(_RENEW, values, prepare=PLANNED_ANEW)
    return {row[0]: Renewed(int(row[1]), row[2], row[3]) for row in await cursor.fetchall()}


# The counters are locked in the order of their ids: two processes that give back the same ones do not block each other.
# A process has one open lease of a counter, so no counter comes twice. What is left of a window that is over is worth nothing.
_GIVE_BACK: LiteralString = """
    WITH closed AS (
        UPDATE lease l
           SET closed_at = now(), used = said.used
          FROM unnest(%(ids)s::bigint[], %(used)s::numeric[]) AS said (id, used)
         WHERE l.id = said.id AND l.process_id = %(process)s AND l.closed_at IS NULL
        RETURNING l.id, l.counter_id, l.window_start, l.granted - l.used AS unspent
    ), back AS (
        SELECT c.id, closed.window_start, closed.unspent
          FROM closed JOIN limit_counter c ON c.id = closed.counter_id
         ORDER BY c.id
           FOR UPDATE OF c
    ), lowered AS (
        UPDATE limit_counter c SET spent = greatest(c.spent - back.unspent, 0)
          FROM back WHERE c.id = back.id AND c.window_start IS NOT DISTINCT FROM back.window_start
        RETURNING 1
    )
    SELECT count(*) FROM closed"""


async def give_back(tx: Tx, process_id: str, used: Mapping[int, int]) -> int:
    """Close leases (id → units used) and return their rest to the counters; how many were still open.

    Called by the holder, who knows what it used, or in its name once its spool says so. ``used`` above what was granted
    is spent all the same (credits that were overdrawn).
    """
    row = await (
        await tx.execute(
            _GIVE_BACK,
            {"process": process_id, "ids": list(used), "used": list(used.values())},
            prepare=PLANNED_ANEW,
        )
    ).fetchone()
    return int(row[0]) if row else 0


# Slots and shares of a rate: the lease goes on with less. Saying it again changes nothing.
_KEEP: LiteralString = """
    WITH mine AS (
        SELECT l.id, l.counter_id, l.granted - %(keep)s AS back
          FROM lease l JOIN limit_counter c ON c.id = l.counter_id
         WHERE l.id = %(lease)s AND l.process_id = %(process)s AND l.closed_at IS NULL
           FOR UPDATE OF c, l
    ), lowered AS (
        UPDATE limit_counter c SET spent = greatest(c.spent - mine.back, 0)
          FROM mine WHERE c.id = mine.counter_id AND mine.back > 0
        RETURNING 1
    )
    UPDATE lease l SET granted = least(l.granted, %(keep)s), used = %(used)s
      FROM mine, (SELECT count(*) FROM lowered) AS done WHERE l.id = mine.id
    RETURNING l.granted"""


async def keep(tx: Tx, process_id: str, lease_id: int, units: int, used: int) -> int | None:
    """Keep only ``units`` (at least 1) of a lease and return the others; what it has now. None: the lease is lost."""
    row = await (
        await tx.execute(_KEEP, {"process": process_id, "lease": lease_id, "keep": units, "used": used})
    ).fetchone()
    return None if row is None else int(row[0])


# Exactly once: what the open lease covers already (an answer may have been lost) is not taken again.
_OWE: LiteralString = """
    WITH counter AS (
        SELECT id FROM limit_counter WHERE id = %(counter)s FOR UPDATE
    ), owed AS (
        SELECT counter.id,
               %(used)s - coalesce((SELECT l.granted FROM lease l WHERE l.counter_id = counter.id
                                      AND l.process_id = %(process)s AND l.closed_at IS NULL), 0) AS units
          FROM counter
    ), raised AS (
        UPDATE limit_counter c SET spent = c.spent + owed.units FROM owed WHERE c.id = owed.id AND owed.units > 0
        RETURNING 1
    ), held AS (
        INSERT INTO lease AS old (counter_id, process_id, granted, used, expires_at)
        SELECT id, %(process)s, units, %(used)s, now() + make_interval(secs => %(ttl_s)s)
          FROM owed, (SELECT count(*) FROM raised) AS done WHERE units > 0
        ON CONFLICT (counter_id, process_id) WHERE closed_at IS NULL DO UPDATE
           SET granted = old.granted + excluded.granted, used = %(used)s, expires_at = excluded.expires_at
        RETURNING 1
    )
    SELECT count(*) FROM held"""

_MINE: LiteralString = """
    SELECT l.id, l.granted, 0, c.capacity, c.capacity - c.spent
      FROM lease l JOIN limit_counter c ON c.id = l.counter_id
     WHERE l.counter_id = %(counter)s AND l.process_id = %(process)s AND l.closed_at IS NULL"""


async def owe(tx: Tx, counter_id: str, process_id: str, used: int, ttl_s: float) -> Slice | None:
    """A call cost more than there was: raise the lease to all that was ``used``, whatever is left of the counter.

    Returns what the process then holds (``amount`` 0); None: there is no such counter.
    """
    values = {"counter": counter_id, "process": process_id, "used": used, "ttl_s": ttl_s}
    await tx.execute(_OWE, values)
    row = await (await tx.execute(_MINE, {"counter": counter_id, "process": process_id})).fetchone()
    return None if row is None else Slice(row[0], int(row[1]), 0, row[3], row[4])


_LOCK: LiteralString = "SELECT FROM limit_counter WHERE id = %(counter)s FOR UPDATE"

_SAY: LiteralString = """
    UPDATE lease SET used = %(used)s
     WHERE counter_id = %(counter)s AND process_id = %(process)s AND closed_at IS NULL"""

# Never below what open leases may still spend, as their holders said last: a balance does not rise above what was bought.
_GAIN: LiteralString = """
    UPDATE limit_counter c
       SET spent = greatest(c.spent - %(units)s,
                            least(c.spent, coalesce((SELECT sum(l.granted - greatest(l.used, 0)) FROM lease l
                                                      WHERE l.counter_id = c.id AND l.closed_at IS NULL), 0)))
     WHERE c.id = %(counter)s"""


async def gain(tx: Tx, counter_id: str, process_id: str, used: int, units: int) -> None:
    """Credits given back beyond what the process has ``used`` of its open lease.

    Call it in a transaction: the counter is locked before its leases are looked at.
    """
    values = {"counter": counter_id, "process": process_id, "used": used, "units": units}
    await tx.execute(_LOCK, values)
    await tx.execute(_SAY, values)
    await tx.execute(_GAIN, values)


# The counter first, as in _TAKE; a lease that somebody is at work on is no abandoned one.
_FREE_ABANDONED: LiteralString = """
    WITH counter AS (
        SELECT id FROM limit_counter
         WHERE id = %(counter)s AND kind IN ('concurrency', 'upload_rate', 'download_rate')
           FOR UPDATE
    ), abandoned AS (
        SELECT l.id, l.counter_id, l.granted FROM lease l JOIN counter ON counter.id = l.counter_id
         WHERE l.closed_at IS NULL AND l.expires_at < now() - make_interval(secs => %(margin_s)s)
           FOR UPDATE OF l SKIP LOCKED
    ), closed AS (
        UPDATE lease l SET closed_at = now() FROM abandoned WHERE l.id = abandoned.id
        RETURNING abandoned.counter_id, abandoned.granted
    ), freed AS (
        SELECT counter_id, sum(granted) AS units FROM closed GROUP BY counter_id
    )
    UPDATE limit_counter c SET spent = greatest(c.spent - freed.units, 0) FROM freed WHERE c.id = freed.counter_id"""


async def free_abandoned(tx: Tx, counter_id: str, margin_s: float) -> bool:
    """Free the slots or shares of processes whose leases ran out ``margin_s`` ago. Whether there were any.

    Amounts are never freed so: what their holder spent is not known, and counts as spent.
    """
    return (await tx.execute(_FREE_ABANDONED, {"counter": counter_id, "margin_s": margin_s})).rowcount > 0


@dataclass(frozen=True, slots=True)
class OpenLease:
    """What a process holds of one counter, as the database has it."""

    granted: int
    kind: LimitKind
    grant_id: str


_OPEN_OF: LiteralString = """
    SELECT l.id, l.granted, c.kind, c.grant_id
      FROM lease l JOIN limit_counter c ON c.id = l.counter_id
     WHERE l.process_id = %(process)s AND l.closed_at IS NULL
       FOR UPDATE OF l"""


async def open_of(tx: Tx, process_id: str) -> dict[int, OpenLease]:
    """The open leases of a process by id, locked until the transaction ends."""
    cursor = await tx.execute(_OPEN_OF, {"process": process_id})
    return {row[0]: OpenLease(int(row[1]), row[2], row[3]) for row in await cursor.fetchall()}


@dataclass(frozen=True, slots=True)
class Counted:
    """How far a counter is: ``used`` leaves out what processes hold unspent (as of their last heartbeat)."""

    counter_id: str
    capacity: Decimal | None
    used: Decimal
    spent: Decimal


# A window that is over has nothing spent; its row is turned when the next slice is taken.
_COUNTED: LiteralString = """
    SELECT id, capacity, CASE WHEN over THEN 0 ELSE spent - unspent END, CASE WHEN over THEN 0 ELSE spent END
      FROM (SELECT c.id, c.capacity, c.spent,
                   coalesce(c.window_start + make_interval(secs => c.window_s) <= now(), false) AS over,
                   coalesce((SELECT sum(l.granted - l.used) FROM lease l
                              WHERE l.counter_id = c.id AND l.closed_at IS NULL
                                AND l.window_start IS NOT DISTINCT FROM c.window_start), 0) AS unspent
              FROM limit_counter c
             WHERE c.id = ANY(%(ids)s)) AS counter"""


async def counted(tx: Tx, counter_ids: Sequence[str]) -> dict[str, Counted]:
    """What has been used of each counter, for people and for entitlement checks; unknown ids are missing."""
    cursor = await tx.execute(_COUNTED, {"ids": list(counter_ids)})
    return {row[0]: Counted(row[0], row[1], row[2], row[3]) for row in await cursor.fetchall()}
