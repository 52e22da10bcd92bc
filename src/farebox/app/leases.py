"""Slices of limits, spent in memory.

A process takes a slice of a counter's remainder from the database and spends it synchronously, call by call. What holds:

* **Never oversold.** A slice is taken in one conditional statement and belongs to one process until that process gives
  it back, or its host's shipper does after the process is dead and its spool says what was spent.
* **Never spent blindly.** Each lease has a deadline on a clock that runs while the process (or the machine) sleeps, counted
  from before the request was sent. A process that was stopped past it asks the database first, which knows whether the
  lease is still its own.
* **Nobody is turned away for want of asking.** When nothing is left but other processes hold unspent slices, they are told
  to give them back and the asker waits; only then is it refused, and so that it may try again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final
from weakref import WeakValueDictionary

from farebox.base.errors import InvariantError, Unavailable
from farebox.domain.access import GrantLimit
from farebox.store import changes, limits
from farebox.store.pool import Database, Tx

#: The first slice of a counter whose rate is not known yet, and how fast slices may grow from one ask to the next.
FIRST_SLICE: Final = 8
SLICE_GROWTH_MAX: Final = 8
#: A lease's local deadline is this much before the database's: clocks differ in rate by far less within a lease.
DEADLINE_MARGIN_S: Final = 1.0
#: An unused slice goes back after this long; sooner where little is left for everyone.
IDLE_S: Final = 30.0
IDLE_NEAR_END_S: Final = 1.0
#: How long a call waits for slices that others hold, and how often it looks.
WAIT_FOR_OTHERS_S: Final = 3.0
LOOK_AGAIN_S: Final = 0.05
CALL_OTHERS_EVERY_S: Final = 0.5
#: A counter found exhausted is not asked about again for this long.
EXHAUSTED_FOR_S: Final = 0.5
#: Leases that one heartbeat speaks of; the least recently mentioned come first.
HEARTBEAT_LEASES_MAX: Final = 2000


def elapsed_clock() -> Callable[[], float]:
    """Seconds that pass also while the machine sleeps, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        boot, read = time.CLOCK_BOOTTIME, time.clock_gettime
        return lambda: read(boot)
    return time.monotonic


class Holding:
    """What this process holds of one counter. ``left`` is what the fast path spends; all else serves the slow one."""

    __slots__ = (
        "__weakref__",
        "asked_at",
        "asking",
        "called_at",
        "capacity",
        "counter_id",
        "deadline",
        "dirty",
        "granted",
        "hard",
        "lease_id",
        "left",
        "left_at_ask",
        "low",
        "near_end",
        "nothing",
        "nothing_until",
        "remainder",
        "said_at",
        "touched",
        "waiting",
        "wanted",
    )

    def __init__(self, limit: GrantLimit) -> None:
        self.counter_id = limit.counter_id
        self.capacity = limit.limit
        self.hard = limit.on_exceed == "block"
        self.lease_id = 0
        self.granted = 0
        self.left = 0
        self.deadline = 0.0  # local; 0: must ask first
        self.low = 0  # ask ahead when this little is left
        self.remainder: int | None = None  # what nobody holds, as last heard
        self.near_end = False
        self.wanted = FIRST_SLICE
        self.waiting = 0  # calls that wait for this counter
        self.asking: asyncio.Task[None] | None = None
        self.nothing: limits.Nothing | None = None
        self.nothing_until = 0.0
        self.touched = 0.0
        self.asked_at = 0.0
        self.left_at_ask = 0
        self.called_at = 0.0
        self.said_at = 0.0
        self.dirty = False

    @property
    def used(self) -> int:
        """Units of the open lease that are spent or in flight. Negative when calls of an earlier lease were taken back."""
        return self.granted - self.left

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


class Leases:
    """All slices that this process holds. ``take`` is synchronous; ``take_soon`` asks the database."""

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
        self._clock = clock or elapsed_clock()
        # One holding a counter and process, whoever asks: the database has one lease row for the two of them.
        self._known: WeakValueDictionary[str, Holding] = WeakValueDictionary()
        self._open: dict[str, Holding] = {}
        self._writing = asyncio.Lock()  # two statements over many leases could wait for each other
        self._returning: set[asyncio.Task[None]] = set()
        self._closing = False

    # ── the fast path ────────────────────────────────────────────────────────────────────────────────────────────

    def holding(self, limit: GrantLimit) -> Holding:
        """The holding of a limit's counter. Keep it: taking from it needs no look-up."""
        known = self._known.get(limit.counter_id)
        if known is None:
            known = self._known[limit.counter_id] = Holding(limit)
        known.capacity = limit.limit
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

    def put_back(self, holdings: Iterable[Holding]) -> None:
        """A call that took one unit of each was not served after all."""
        for held in holdings:
            held.left += 1
            held.dirty = True

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
                if short.nothing is not None and now < short.nothing_until:
                    return NotTaken(short, short.nothing)
                await asyncio.shield(self._ask(short))
                if short.left > 0 or short.nothing is None:
                    continue
                if short.nothing.why != "held":
                    return NotTaken(short, short.nothing)
                if self._clock() >= patience:
                    return NotTaken(short, short.nothing)
                await asyncio.sleep(LOOK_AGAIN_S)
        finally:
            for held in holdings:
                held.waiting -= 1
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
                self._adapt(held, sent)
                got = await limits.take(
                    tx,
                    held.counter_id,
                    self._process_id,
                    wanted=held.wanted,
                    needed=max(0, held.waiting - max(0, held.left)),
                    used=held.used,
                    ttl_s=self._lease_s,
                )
                if isinstance(got, limits.Slice):
                    self._received(held, got, sent)
                    return
                self._told_nothing(held, got)
                if got.why == "held" and sent >= held.called_at + CALL_OTHERS_EVERY_S:
                    held.called_at = sent
                    await changes.announce(tx, "lease", held.counter_id)
        except Unavailable:
            held.low //= 2  # what is asked ahead can wait for the database; what is left is spent meanwhile
            raise
        finally:
            held.asking = None

    async def _still_ours(self, tx: Tx, held: Holding, sent: float) -> bool:
        """After the local deadline: the lease continues if the database still has it open, else what was left is lost."""
        lease_id = held.lease_id
        kept = await limits.renew(tx, self._process_id, {lease_id: held.used}, self._lease_s)
        if lease_id in kept:
            self._confirmed(held, kept[lease_id], sent)
            return True
        self._lost(held)
        return False

    def _adapt(self, held: Holding, now: float) -> None:
        """Want what one lease's time will use at the present rate, growing no faster than the rate is believed."""
        if held.asked_at:
            rate = max(0, held.left_at_ask - held.left) / max(now - held.asked_at, 0.05)
            most = min(self._slice_max, held.wanted * SLICE_GROWTH_MAX)
            held.wanted = max(FIRST_SLICE, min(most, math.ceil(rate * self._lease_s)))
        held.asked_at = now

    def _received(self, held: Holding, got: limits.Slice, sent: float) -> None:
        if held.lease_id not in (0, got.lease_id):
            self._lost(held)  # closed by someone else; this is a new one
        used = held.used
        held.lease_id = got.lease_id
        # The database's total, not the part this answer speaks of: an earlier answer may have been lost on the way.
        held.granted = got.granted
        held.left = held.left_at_ask = got.granted - used
        held.deadline = sent + self._lease_s - DEADLINE_MARGIN_S
        held.capacity = got.capacity
        held.nothing = None
        held.said_at = sent
        self._heard(held, got.remainder)
        if got.amount < held.wanted:
            held.near_end = held.hard
        held.low = 0 if held.near_end else got.amount // 2
        held.touched = max(held.touched, sent)
        self._open[held.counter_id] = held

    def _confirmed(self, held: Holding, kept: limits.Renewed, sent: float) -> None:
        held.deadline = max(held.deadline, sent + self._lease_s - DEADLINE_MARGIN_S)
        held.said_at = sent
        self._heard(held, kept.remainder)

    def _heard(self, held: Holding, remainder: Decimal | None) -> None:
        held.remainder = None if remainder is None else math.floor(remainder)
        held.near_end = (
            held.hard and held.remainder is not None and held.remainder < FIRST_SLICE * limits.SLICE_SHARE
        )

    def _told_nothing(self, held: Holding, got: limits.Nothing) -> None:
        held.nothing = got
        held.nothing_until = 0.0 if got.why == "held" else self._clock() + EXHAUSTED_FOR_S
        held.remainder = 0
        held.near_end = True
        held.low = 0

    def _lost(self, held: Holding) -> None:
        """The lease was closed in our name: nothing of it may be spent."""
        held.lease_id = held.granted = held.left = 0
        held.deadline = 0.0
        self._open.pop(held.counter_id, None)

    # ── heartbeat, giving back, the end ──────────────────────────────────────────────────────────────────────────

    async def heartbeat(self) -> None:
        """Once a second: give back what is idle, say what was used, keep alive what is in use.

        Raises ``Unavailable`` when the database does not answer; the next heartbeat makes up for it.
        """
        now = self._clock()
        idle = [
            held
            for held in self._open.values()
            if now - held.touched >= (self._idle_near_end_s if held.near_end else self._idle_s)
        ]
        await self._give_back(idle)
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
                else:
                    self._lost(held)

    def wanted_elsewhere(self, counter_id: str) -> None:
        """Another process asks for the last of a counter (change notice ``lease``): give back what nobody here waits for."""
        held = self._open.get(counter_id)
        if held is not None and held.left > 0 and held.nothing is None:
            task = asyncio.create_task(self._give_back([held]), name=f"give back {counter_id}")
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            task.add_done_callback(_observed)

    async def close(self) -> None:
        """Give everything back and take nothing more. Call it when no call is in flight."""
        self._closing = True
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
        finally:
            for held in some:
                held.asking = None


def _batches(holdings: Sequence[Holding]) -> list[Sequence[Holding]]:
    return [holdings[n : n + HEARTBEAT_LEASES_MAX] for n in range(0, len(holdings), HEARTBEAT_LEASES_MAX)]


def _observed(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task hears of its failure; where nobody does, the next call asks again."""
    if not task.cancelled():
        task.exception()
