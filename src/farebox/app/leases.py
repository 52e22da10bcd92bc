"""Slices of limits, spent in memory.

A process takes a slice of a counter's remainder from the database and spends it synchronously, call by call (``take``) or
byte by byte (``take_units``). Slots come back to the slice when their calls end; of a rate a process holds a share, and
paces by it. What holds, for every kind:

* **Never oversold.** A slice is taken in one conditional statement and belongs to one process until that process gives
  it back, or its host's shipper does after the process is dead and its spool says what was spent.
* **Never spent blindly.** Each lease has a deadline on a clock that runs while the process (or the machine) sleeps, counted
  from before the request was sent. A process that was stopped past it asks the database first, which knows whether the
  lease is still its own. What was taken from one window is never spent in another.
* **Nobody is turned away for want of asking.** When nothing is left but other processes hold unspent slices, they are told
  to give them back and the asker waits; only then is it refused, and so that it may try again. Of slots and rates they
  give half of what they have, of all else whatever they have not spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final
from weakref import WeakValueDictionary

from farebox.base.errors import InvariantError, Unavailable
from farebox.domain.access import GrantLimit
from farebox.domain.limits import BYTE_KINDS, RATE_KINDS, LimitKind, Pace
from farebox.store import changes, limits
from farebox.store.pool import Database, Tx

#: The first slice of a counter whose rate is not known yet, and how fast slices may grow from one ask to the next.
FIRST_SLICE: Final = 8
SLICE_GROWTH_MAX: Final = 8
#: The same for bytes; and the most bytes of a slice, so that a lost host does not strand more.
FIRST_SLICE_BYTES: Final = 262_144
SLICE_BYTES_MAX: Final = 268_435_456
#: A lease's local deadline is this much before the database's: clocks differ in rate by far less within a lease.
DEADLINE_MARGIN_S: Final = 1.0
#: The same for a window, which may be short: so much, and this share of what is left of it.
WINDOW_MARGIN_S: Final = 0.002
WINDOW_MARGIN_SHARE: Final = 0.0005
#: An unused slice goes back after this long; sooner where little is left for everyone.
IDLE_S: Final = 30.0
IDLE_NEAR_END_S: Final = 1.0
#: How long a call waits for slices that others hold, and how often it looks.
WAIT_FOR_OTHERS_S: Final = 3.0
LOOK_AGAIN_S: Final = 0.05
CALL_OTHERS_EVERY_S: Final = 0.5
#: A counter found exhausted is not asked about again for this long.
EXHAUSTED_FOR_S: Final = 0.5
#: When to come back for a slot, or for what others hold.
RETRY_AFTER_S: Final = 1.0
#: Slots and shares of a process that says nothing any more are free this long after its lease ran out: its calls, which
#: nobody can end in its name, are over by then.
ABANDONED_MARGIN_S: Final = 30.0
#: How long a paced transfer sleeps at most before it looks at its share again.
PACE_SLEEP_S_MAX: Final = 1.0
#: Leases that one heartbeat speaks of; the least recently mentioned come first.
HEARTBEAT_LEASES_MAX: Final = 2000


def elapsed_clock() -> Callable[[], float]:
    """Seconds that pass also while the machine sleeps, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        boot, read = time.CLOCK_BOOTTIME, time.clock_gettime
        return lambda: read(boot)
    return time.monotonic


@dataclass(frozen=True, slots=True)
class _Slicing:
    """How much of a counter a process asks for: at ``first``, and at ``most``; ``share`` and ``smallest`` as in ``limits.take``."""

    first: int
    most: int
    share: int = limits.SLICE_SHARE
    smallest: int = 1


_CALLS: Final = _Slicing(FIRST_SLICE, 1 << 62)
_BYTES: Final = _Slicing(FIRST_SLICE_BYTES, SLICE_BYTES_MAX, smallest=FIRST_SLICE_BYTES)
_SLOTS: Final = _Slicing(1, 1, share=1)  # as many as are waited for: they come back and are used again
_SHARE: Final = _Slicing(1 << 62, 1 << 62, share=1)  # whatever nobody else paces by


class Holding:
    """What this process holds of one counter. ``left`` is what the fast path spends; all else serves the slow one."""

    __slots__ = (
        "__weakref__",
        "asked_at",
        "asking",
        "called_at",
        "capacity",
        "ceding",
        "counter_id",
        "deadline",
        "dirty",
        "gained",
        "granted",
        "hard",
        "kind",
        "lease_id",
        "left",
        "left_at_ask",
        "low",
        "near_end",
        "nothing",
        "nothing_until",
        "pace",
        "particular",
        "remainder",
        "said_at",
        "slicing",
        "stale",
        "touched",
        "waiting",
        "wanted",
        "window_s",
    )

    def __init__(self, limit: GrantLimit, now: float) -> None:
        self.counter_id = limit.counter_id
        self.kind: LimitKind = limit.kind
        self.slicing = (
            _SHARE
            if limit.kind in RATE_KINDS
            else _BYTES
            if limit.kind in BYTE_KINDS
            else _SLOTS
            if limit.kind == "concurrency"
            else _CALLS
        )
        self.capacity = limit.limit
        self.hard = limit.on_exceed == "block"
        self.lease_id = 0
        self.granted = 0
        self.left = 0
        self.deadline = 0.0  # local; 0: must ask first
        self.low = 0  # ask ahead when this little is left
        self.remainder: int | None = None  # what nobody holds, as last heard
        self.near_end = False
        self.wanted = self.slicing.first
        self.waiting = 0  # units that are waited for
        self.asking: asyncio.Task[None] | None = None
        self.nothing: limits.Nothing | None = None
        self.nothing_until = 0.0
        self.touched = 0.0
        self.asked_at = 0.0
        self.left_at_ask = 0
        self.called_at = 0.0
        self.said_at = 0.0
        self.dirty = False
        self.particular = limit.kind in ("concurrency", "requests")  # what is put back needs a look
        self.stale = 0  # slots in flight whose lease is lost: they do not come back to this one
        self.ceding = 0  # slots promised to other processes, as soon as calls end
        self.gained = 0  # credits to be told to the database: more than this lease has used
        self.window_s = limit.window_s
        self.pace: Pace | None = None
        if limit.kind in RATE_KINDS:
            self.pace = Pace(int(limit.limit or 0), limit.window_s or 1, now)
            self.pace.turn_to(0, now)  # nothing is leased yet

    @property
    def used(self) -> int:
        """Units of the open lease that are spent or in flight. Negative when calls of an earlier lease were taken back,
        more than was granted when credits were overdrawn."""
        return self.granted - self.left - self.ceding

    @property
    def share(self) -> int:
        """Of a rate: bytes a second that this process may pass now."""
        return self.granted if self.pace is not None else 0

    @property
    def remaining(self) -> int | None:
        """Units nobody has spent yet, as far as this process knows; None: not limited."""
        if self.capacity is None or self.remainder is None:
            return None
        return max(0, self.remainder + self.left)


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Why a call got nothing. ``why`` as in ``limits.Nothing``; ``held`` may be tried again soon."""

    holding: Holding
    nothing: limits.Nothing

    @property
    def retry_after_s(self) -> float | None:
        """When there may be some again: at the window's end, or soon. None: not by waiting here."""
        if self.nothing.window_left_s is not None:
            return self.nothing.window_left_s
        if self.nothing.why == "held" or self.holding.kind == "concurrency":
            return RETRY_AFTER_S
        return None


class Leases:
    """All slices that this process holds.

    ``take`` and ``take_units`` are synchronous; ``take_soon`` and ``more_units`` ask the database. ``take`` is for the
    kinds of ``CALL_KINDS``, the ``…_units`` for ``BYTE_KINDS`` and ``RATE_KINDS`` (and ``put_back_units`` for credits).
    """

    def __init__(
        self,
        database: Database,
        process_id: str,
        *,
        lease_s: float = 60.0,
        slice_max: int = 100_000,
        wait_for_others_s: float = WAIT_FOR_OTHERS_S,
        idle_s: float = IDLE_S,
        idle_near_end_s: float = IDLE_NEAR_END_S,
        abandoned_margin_s: float = ABANDONED_MARGIN_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if lease_s <= 2 * DEADLINE_MARGIN_S:
            raise InvariantError(f"a lease of {lease_s} s would be over before it is used")
        self._database = database
        self._process_id = process_id
        self._lease_s = lease_s
        self._slice_max = slice_max
        self._wait_for_others_s = wait_for_others_s
        self._idle_s = idle_s
        self._idle_near_end_s = idle_near_end_s
        self._abandoned_margin_s = abandoned_margin_s
        self._clock = clock or elapsed_clock()
        # One holding a counter and process, whoever asks: the database has one lease row for the two of them.
        self._known: WeakValueDictionary[str, Holding] = WeakValueDictionary()
        self._open: dict[str, Holding] = {}
        self._unsettled: dict[
            str, Holding
        ] = {}  # credits overdrawn or gained that the database has not heard of
        self._writing = asyncio.Lock()  # two statements over many leases could wait for each other
        self._returning: set[asyncio.Task[None]] = set()
        self._closing = False

    # ── the fast path ────────────────────────────────────────────────────────────────────────────────────────────

    def holding(self, limit: GrantLimit) -> Holding:
        """The holding of a limit's counter. Keep it: taking from it needs no look-up."""
        known = self._known.get(limit.counter_id)
        if known is None:
            known = self._known[limit.counter_id] = Holding(limit, self._clock())
        known.capacity = limit.limit
        known.window_s = limit.window_s
        known.hard = limit.on_exceed == "block"
        return known

    def take(self, holdings: Sequence[Holding]) -> bool:
        """One unit of every holding, or nothing of any. Never waits."""
        now = self._clock()
        for held in holdings:
            if held.left < 1 or now >= held.deadline:
                return False
        for held in holdings:
            held.left -= 1
            held.touched = now
            held.dirty = True
            if held.left < held.low and held.asking is None:
                self._ask(held)
        return True

    def put_back(self, holdings: Sequence[Holding], lease_ids: Sequence[int] = ()) -> None:
        """A call that took one unit of each was not served after all; or it has ended, and its slot is free.

        ``lease_ids`` are those the units came from, in the same order. Without them a ``requests`` unit is not put back:
        its window may be over.
        """
        for n, held in enumerate(holdings):
            if held.particular and not self._comes_back(held, lease_ids[n] if lease_ids else 0):
                continue
            held.left += 1
            held.dirty = True
            if held.ceding:
                self._cede_free(held)

    def take_units(self, held: Holding, units: int) -> int:
        """How many of ``units`` bytes may pass now: 0 to all of them, which then are taken. Never waits."""
        now = self._clock()
        if now >= held.deadline:
            return 0
        held.touched = now
        if held.pace is not None:
            held.dirty = True
            return held.pace.take(now, units)
        taken = min(units, held.left)
        if taken <= 0:
            return 0
        held.left -= taken
        held.dirty = True
        if held.left < held.low and held.asking is None:
            self._ask(held)
        return taken

    def put_back_units(self, held: Holding, units: int) -> None:
        """Bytes that were taken and did not pass; credits that a call did not cost, or that it brought.

        Credits beyond what this lease has used are told to the database, which knows what was bought.
        """
        if held.pace is not None:
            held.pace.give_back(units)
            return
        if held.kind == "credits":
            back = min(units, max(0, held.used))
            if back < units:
                held.gained += units - back
                self._unsettled[held.counter_id] = held
            units = back
        held.left += units
        held.dirty = True

    def overdraw(self, held: Holding, units: int) -> None:
        """A call cost so many credits more than were taken for it. What is not there is owed: the counter goes below zero."""
        held.left -= units
        held.dirty = True
        if held.left < 0:
            self._unsettled[held.counter_id] = held

    def _comes_back(self, held: Holding, lease_id: int) -> bool:
        if held.kind == "requests":
            return lease_id == held.lease_id != 0  # of this window
        if held.stale:
            held.stale -= 1
            return False
        return True

    # ── the slow path ────────────────────────────────────────────────────────────────────────────────────────────

    async def take_soon(self, holdings: Sequence[Holding]) -> NotTaken | None:
        """As ``take``, asking the database where needed; None: taken.

        Raises ``Unavailable`` when the database does not answer. Waits up to ``wait_for_others_s`` for slices that other
        processes hold, then answers ``held``.
        """
        patience = self._clock() + self._wait_for_others_s
        for held in holdings:
            held.waiting += 1
        try:
            while not self.take(holdings):
                now = self._clock()
                short = next(h for h in holdings if h.left < 1 or now >= h.deadline)
                not_taken = await self._look(short, now, patience)
                if not_taken is not None:
                    return not_taken
        finally:
            for held in holdings:
                held.waiting -= 1
        return None

    async def more_units(self, held: Holding, units: int) -> NotTaken | None:
        """After ``take_units`` gave less than was asked: wait until some of ``units`` more may pass. None: try again.

        Raises ``Unavailable`` when the database does not answer, but not for a rate, which waits. Of a rate ``NotTaken``
        is only said when the grant is gone.
        """
        if held.pace is not None:
            return await self._paced(held, held.pace)
        patience = self._clock() + self._wait_for_others_s
        units = min(units, held.slicing.first)
        held.waiting += units
        try:
            while held.left < 1 or self._clock() >= held.deadline:
                not_taken = await self._look(held, self._clock(), patience)
                if not_taken is not None:
                    return not_taken
        finally:
            held.waiting -= units
        return None

    async def _look(self, short: Holding, now: float, patience: float) -> NotTaken | None:
        """Ask for more of one counter, or wait a moment for what others hold. None: try again."""
        if short.nothing is not None and now < short.nothing_until:
            return NotTaken(short, short.nothing)
        await asyncio.shield(self._ask(short))
        if short.left > 0 or short.nothing is None:
            return None
        if short.nothing.why != "held" or self._clock() >= patience:
            return NotTaken(short, short.nothing)
        await asyncio.sleep(LOOK_AGAIN_S)
        return None

    async def _paced(self, held: Holding, pace: Pace) -> NotTaken | None:
        now = self._clock()
        if held.granted and now < held.deadline:
            await asyncio.sleep(min(pace.wait_s(now), PACE_SLEEP_S_MAX))
            return None
        held.waiting += 1
        try:
            await asyncio.shield(self._ask(held))
        except Unavailable as error:
            if self._closing:
                raise
            await asyncio.sleep(min(error.retry_after_s or RETRY_AFTER_S, RETRY_AFTER_S))
            return None
        finally:
            held.waiting -= 1
        if held.granted or held.nothing is None:
            return None
        if held.nothing.why in ("revoked", "unknown"):
            return NotTaken(held, held.nothing)
        await asyncio.sleep(LOOK_AGAIN_S)
        return None

    def _ask(self, held: Holding) -> asyncio.Task[None]:
        """One question a counter at a time: whoever comes meanwhile waits for the same answer."""
        if held.asking is None:
            held.asking = asyncio.create_task(self._asked(held), name=f"lease {held.counter_id}")
            held.asking.add_done_callback(_observed)
        return held.asking

    async def _asked(self, held: Holding) -> None:
        try:
            if self._closing:
                raise Unavailable("this gateway process is stopping")
            async with self._database.connection() as tx:
                sent = self._clock()
                if (
                    held.left > 0
                    and held.lease_id
                    and sent >= held.deadline
                    and await self._still_ours(tx, held, sent)
                ):
                    return
                if held.kind == "credits" and held.left < 0:
                    await self._pay_debt(tx, held)
                self._adapt(held, sent)
                got = await self._take(tx, held)
                if isinstance(got, limits.Nothing) and await self._free_abandoned(tx, held, got):
                    got = await self._take(tx, held)
                if isinstance(got, limits.Slice):
                    self._received(held, got, sent)
                    return
                self._told_nothing(held, got)
                if self._calls_others(held, got) and sent >= held.called_at + CALL_OTHERS_EVERY_S:
                    held.called_at = sent
                    await changes.announce(tx, "lease", held.counter_id)
        except Unavailable:
            held.low //= 2  # what is asked ahead can wait for the database; what is left is spent meanwhile
            raise
        finally:
            held.asking = None

    async def _take(self, tx: Tx, held: Holding) -> limits.Slice | limits.Nothing:
        slicing = held.slicing
        return await limits.take(
            tx,
            held.counter_id,
            self._process_id,
            wanted=held.wanted,
            needed=max(0, held.waiting - max(0, held.left)) if held.pace is None else 1,
            used=held.used,
            ttl_s=self._lease_s,
            share=slicing.share,
            smallest=slicing.smallest,
        )

    def _calls_others(self, held: Holding, got: limits.Nothing) -> bool:
        """Of slots and rates each process has some: whoever has none asks for a part of what others are using."""
        if held.slicing is _SLOTS and held.granted == 0 and got.why == "exhausted":
            return True
        return got.why == "held" and (held.pace is None or held.granted == 0)

    async def _free_abandoned(self, tx: Tx, held: Holding, got: limits.Nothing) -> bool:
        """Slots and shares do not stay with a process whose spool is lost."""
        if got.why not in ("exhausted", "held") or (held.slicing is not _SLOTS and held.pace is None):
            return False
        return await limits.free_abandoned(tx, held.counter_id, self._abandoned_margin_s)

    async def _still_ours(self, tx: Tx, held: Holding, sent: float) -> bool:
        """After the local deadline: the lease continues if the database still has it open, else what was left is lost."""
        lease_id = held.lease_id
        kept = await limits.renew(tx, self._process_id, {lease_id: held.used}, self._lease_s)
        if lease_id in kept:
            # An answer may have been lost on the way: the database knows how much it is.
            held.left += kept[lease_id].granted - held.granted
            held.granted = kept[lease_id].granted
            self._repace(held)
            self._confirmed(held, kept[lease_id], sent)
            return True
        self._lost(held)
        return False

    def _adapt(self, held: Holding, now: float) -> None:
        """Want what one lease's time will use at the present rate, growing no faster than the rate is believed."""
        if held.asked_at and held.slicing.first < held.slicing.most:
            rate = max(0, held.left_at_ask - held.left) / max(now - held.asked_at, 0.05)
            most = min(held.slicing.most, held.wanted * SLICE_GROWTH_MAX)
            if held.slicing is _CALLS:
                most = min(most, self._slice_max)
            lasting_s = min(self._lease_s, held.window_s or self._lease_s)
            held.wanted = max(held.slicing.first, min(most, math.ceil(rate * lasting_s)))
        held.asked_at = now

    def _received(self, held: Holding, got: limits.Slice, sent: float) -> None:
        if held.lease_id not in (0, got.lease_id):
            self._lost(held)  # closed by someone else; this is a new one
        used = held.used
        held.lease_id = got.lease_id
        # The database's total, not the part this answer speaks of: an earlier answer may have been lost on the way.
        held.granted = got.granted
        held.left = held.left_at_ask = got.granted - used - held.ceding
        held.deadline = self._deadline(sent, got.window_left_s)
        held.capacity = got.capacity
        held.nothing = None
        held.said_at = sent
        self._heard(held, got.remainder)
        if got.amount < held.wanted and held.slicing is not _SLOTS:
            held.near_end = held.hard
        held.low = 0 if held.near_end or held.slicing is _SLOTS else got.amount // 2
        held.touched = max(held.touched, sent)
        self._open[held.counter_id] = held
        self._repace(held)

    def _confirmed(self, held: Holding, kept: limits.Renewed, sent: float) -> None:
        held.deadline = max(held.deadline, self._deadline(sent, kept.window_left_s))
        held.said_at = sent
        self._heard(held, kept.remainder)

    def _deadline(self, sent: float, window_left_s: float | None) -> float:
        """By our own clock, counted from before the question was sent: never later than by the database's."""
        after_s = self._lease_s - DEADLINE_MARGIN_S
        if window_left_s is not None:
            after_s = min(after_s, window_left_s * (1 - WINDOW_MARGIN_SHARE) - WINDOW_MARGIN_S)
        return sent + after_s

    def _heard(self, held: Holding, remainder: Decimal | None) -> None:
        """Near the end slices go back sooner. Slots are asked for when others want them; a rate is for whoever transfers."""
        held.remainder = None if remainder is None else math.floor(remainder)
        held.near_end = held.pace is not None or (
            held.hard
            and held.remainder is not None
            and held.slicing is not _SLOTS
            and held.remainder < held.slicing.first * limits.SLICE_SHARE
        )

    def _told_nothing(self, held: Holding, got: limits.Nothing) -> None:
        held.nothing = got
        if got.why == "held":
            held.nothing_until = 0.0
        else:
            left_s = math.inf if got.window_left_s is None else got.window_left_s
            held.nothing_until = self._clock() + min(EXHAUSTED_FOR_S, left_s)
        held.remainder = 0
        held.near_end = held.slicing is not _SLOTS
        held.low = 0

    def _lost(self, held: Holding) -> None:
        """The lease was closed in our name, or its window is over: nothing of it may be spent."""
        if held.slicing is _SLOTS:
            held.stale += max(0, held.used)  # these calls run on, but their slots are not ours to use again
        held.lease_id = held.granted = held.left = held.ceding = 0
        held.deadline = 0.0
        self._open.pop(held.counter_id, None)
        self._repace(held)

    def _repace(self, held: Holding) -> None:
        if held.pace is not None and held.pace.rate != held.granted:
            held.pace.turn_to(held.granted, self._clock())

    # ── credits that were not foreseen ───────────────────────────────────────────────────────────────────────────

    async def _settle(self) -> None:
        """Tell the database of credits that were overdrawn or gained."""
        for held in list(self._unsettled.values()):
            if held.asking is None:
                held.asking = asyncio.create_task(self._settled(held), name=f"settle {held.counter_id}")
                held.asking.add_done_callback(_observed)
                await asyncio.shield(held.asking)

    async def _settled(self, held: Holding) -> None:
        try:
            if held.gained:
                # At most once: what was not heard for certain is not said again, and stays spent.
                units, held.gained = held.gained, 0
                async with self._database.transaction() as tx:
                    await limits.gain(tx, held.counter_id, self._process_id, held.used, units)
            if held.left < 0:
                async with self._database.connection() as tx:
                    await self._pay_debt(tx, held)
            if held.left >= 0 and not held.gained:
                self._unsettled.pop(held.counter_id, None)
        finally:
            held.asking = None

    async def _pay_debt(self, tx: Tx, held: Holding) -> None:
        """Raise the lease to what was used of it. It may be a new one, where the former was given back before the call's end."""
        got = await limits.owe(tx, held.counter_id, self._process_id, held.used, self._lease_s)
        if got is None:
            held.left = 0  # the counter is gone, and the debt with it
        elif held.lease_id not in (0, got.lease_id):
            self._lost(held)
        else:
            held.left += got.granted - held.granted
            held.granted, held.lease_id = got.granted, got.lease_id
            self._open[held.counter_id] = (
                held  # its deadline stays as it is: a new one is asked about before it is spent
            )
            self._heard(held, got.remainder)

    # ── heartbeat, giving back, the end ──────────────────────────────────────────────────────────────────────────

    async def heartbeat(self) -> None:
        """Once a second: give back what is idle, say what was used, keep alive what is in use.

        Raises ``Unavailable`` when the database does not answer; the next heartbeat makes up for it.
        """
        await self._settle()
        now = self._clock()
        idle = [held for held in self._open.values() if self._idle(held, now)]
        await self._give_back([held for held in idle if held.slicing is not _SLOTS or held.used <= 0])
        for held in list(self._open.values()):
            if held.slicing is _SLOTS and held.left > 0 and self._idle(held, now):
                self._cede(held, held.left)
            elif held.ceding:
                self._cede_free(held)
        async with self._writing:
            now = self._clock()
            due = [h for h in self._open.values() if h.dirty or now - h.said_at >= self._lease_s / 3]
            due.sort(key=lambda h: (not h.near_end, h.said_at))
            said = {held.lease_id: held for held in due[:HEARTBEAT_LEASES_MAX]}
            if not said:
                return
            async with self._database.connection() as tx:
                sent = self._clock()
                kept = await limits.renew(
                    tx, self._process_id, {i: h.used for i, h in said.items()}, self._lease_s
                )
            for lease_id, held in said.items():
                if held.lease_id != lease_id:
                    continue  # it was given back or replaced meanwhile
                if lease_id in kept:
                    held.dirty = False
                    self._confirmed(held, kept[lease_id], sent)
                    if held.pace is not None and held.asking is None and (held.remainder or 0) > 0:
                        self._ask(held)  # others gave their shares back: it is ours to use meanwhile
                else:
                    self._lost(held)

    def _idle(self, held: Holding, now: float) -> bool:
        return now - held.touched >= (self._idle_near_end_s if held.near_end else self._idle_s)

    def wanted_elsewhere(self, counter_id: str) -> None:
        """Another process asks for the last of a counter (change notice ``lease``): give back what nobody here waits for.

        Of slots and of a rate that is in use, half.
        """
        held = self._open.get(counter_id)
        if held is None:
            return
        now = self._clock()
        if held.slicing is _SLOTS and held.used > 0:
            if held.nothing is not None and now < held.called_at + 2 * CALL_OTHERS_EVERY_S:
                return  # it was we who asked
            if held.left <= 0:  # all are in use, and what comes free is not for us for a moment
                self._told_nothing(held, limits.Nothing("exhausted", held.capacity))
                held.nothing_until = now + 2 * EXHAUSTED_FOR_S
            self._cede(held, (held.granted + 1) // 2 - held.ceding)
        elif held.pace is not None and not self._idle(held, now):
            self._cede(held, held.granted // 2)
        elif held.left > 0 and (held.nothing is None or held.pace is not None):
            task = asyncio.create_task(self._give_back([held]), name=f"give back {counter_id}")
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            task.add_done_callback(_observed)

    def _cede(self, held: Holding, units: int) -> None:
        """Promise units to others: those that are free go now, those in flight when their calls end."""
        if units > 0:
            held.ceding += units
            held.left -= units
            self._cede_free(held)

    def _cede_free(self, held: Holding) -> None:
        if held.asking is not None:
            return  # the next heartbeat, or the next call that ends
        units = min(held.ceding, held.left + held.ceding)
        if held.granted <= units:
            held.left += held.ceding
            held.ceding = 0
            held.asking = asyncio.create_task(self._gave_back([held]), name=f"give back {held.counter_id}")
            held.deadline = 0.0
        elif units > 0:
            held.ceding -= units
            held.granted -= units
            self._repace(held)
            held.asking = asyncio.create_task(self._ceded(held), name=f"cede {held.counter_id}")
        else:
            return
        self._returning.add(held.asking)
        held.asking.add_done_callback(self._returning.discard)
        held.asking.add_done_callback(_observed)

    async def _ceded(self, held: Holding) -> None:
        lease_id = held.lease_id
        try:
            async with self._database.connection() as tx:
                if await limits.keep(tx, self._process_id, lease_id, held.granted, held.used) is None:
                    self._lost(held)
        except Unavailable:
            held.deadline = 0.0  # how much is ours is not known: whoever comes next asks
            raise
        finally:
            held.asking = None

    async def close(self) -> None:
        """Give everything back and take nothing more. Call it when no call is in flight."""
        self._closing = True
        with contextlib.suppress(Unavailable):
            await self._settle()
        for held in list(self._open.values()):
            if held.asking is not None:
                with contextlib.suppress(Unavailable):
                    await held.asking
        await self._give_back(list(self._open.values()))

    def open_leases(self) -> dict[int, int]:
        """Lease id → units used, in flight included: what the spool notes when it begins a file."""
        return {held.lease_id: held.used for held in self._open.values()}

    async def _give_back(self, idle: Sequence[Holding]) -> None:
        async with self._writing:
            for batch in _batches(idle):
                some = [h for h in batch if h.lease_id and h.asking is None and h.waiting == 0]
                if not some:
                    continue
                # Whoever needs one of these meanwhile waits for the outcome and then asks anew.
                task = asyncio.create_task(self._gave_back(some), name="give back leases")
                for held in some:
                    held.deadline = 0.0
                    held.asking = task
                await asyncio.shield(task)

    async def _gave_back(self, some: Sequence[Holding]) -> None:
        used = {held.lease_id: held.used for held in some}
        try:
            async with self._database.transaction() as tx:
                await limits.give_back(tx, self._process_id, used)
            # If this was not reached the outcome is unknown: the deadline stays 0, so that the next call asks first.
            for held in some:
                taken_back = used[held.lease_id] - held.used
                self._lost(held)
                held.left = taken_back
                if taken_back < 0 and held.kind == "credits":
                    self._unsettled[held.counter_id] = held  # overdrawn while the lease was on its way
        finally:
            for held in some:
                held.asking = None


def _batches(holdings: Sequence[Holding]) -> list[Sequence[Holding]]:
    return [holdings[n : n + HEARTBEAT_LEASES_MAX] for n in range(0, len(holdings), HEARTBEAT_LEASES_MAX)]


def _observed(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task hears of its failure; where nobody does, the next call asks again."""
    if not task.cancelled():
        task.exception()
