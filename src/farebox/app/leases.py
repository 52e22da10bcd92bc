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
  give half of what they have, of all else whatever they have not spent. That nothing is left is said only when every
  process that holds some has answered so after it was asked.
* **Nobody hangs on the database.** Each question has a bound; a call whose question is not answered is ``Unavailable``.

What one counter's state is and how answers change it: ``holdings.py``. What is said to the database: ``slices.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

from farebox.app.holdings import (
    DEADLINE_MARGIN_S,
    EXHAUSTED_FOR_S,
    RETRY_AFTER_S,
    SLOTS,
    Holding,
    NotTaken,
    Terms,
)
from farebox.app.returns import Returns, batches, observed
from farebox.app.slices import Slices
from farebox.base.errors import InvariantError, Unavailable
from farebox.domain.access import GrantLimit
from farebox.domain.limits import Pace
from farebox.store import limits
from farebox.store.pool import Database

#: An unused slice goes back after this long; sooner where little is left for everyone.
IDLE_S: Final = 30.0
IDLE_NEAR_END_S: Final = 1.0
#: How long a call waits for slices that others hold, and how often it looks.
WAIT_FOR_OTHERS_S: Final = 3.0
LOOK_AGAIN_S: Final = 0.05
CALL_OTHERS_EVERY_S: Final = 0.5
#: Slots and shares of a process that says nothing any more are free this long after its lease ran out: its calls, which
#: nobody can end in its name, are over by then.
ABANDONED_MARGIN_S: Final = 30.0
#: How long a paced transfer sleeps at most before it looks at its share again.
PACE_SLEEP_S_MAX: Final = 1.0
#: Leases that one heartbeat keeps alive; those said least recently come first. At a lease of a minute and a word each third
#: of it that is enough for twenty times as many.
KEPT_ALIVE_MAX: Final = 2000
#: Leases of which a heartbeat says what was used although nothing depends on it but what people see.
SAID_MAX: Final = 512


def elapsed_clock() -> Callable[[], float]:
    """Seconds that pass also while the machine sleeps, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        boot, read = time.CLOCK_BOOTTIME, time.clock_gettime
        return lambda: read(boot)
    return time.monotonic


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
        self._slices = Slices(database, process_id, lease_s)
        self._terms = Terms(lease_s, slice_max)
        self._wait_for_others_s = wait_for_others_s
        self._idle_s = idle_s
        self._idle_near_end_s = idle_near_end_s
        self._abandoned_margin_s = abandoned_margin_s
        self._clock = clock or elapsed_clock()
        # One holding a counter and process, whoever asks: the database has one lease row for the two of them.
        self._known: WeakValueDictionary[str, Holding] = WeakValueDictionary()
        self._open: dict[str, Holding] = {}
        self._returns = Returns(self._slices, self._open, self._clock)
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

        ``lease_ids`` are those the units came from, in the same order. Without them a ``requests`` unit is not put back
        (its window may be over), nor any other where somebody else has closed a lease of this counter.
        """
        for n, held in enumerate(holdings):
            if held.particular and not held.comes_back(lease_ids[n] if lease_ids else 0):
                continue
            held.left += 1
            held.dirty = True
            if not held.lease_id:
                self._returns.unsettled[held.counter_id] = held
            if held.ceding:
                self._returns.cede_free(held)

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

    def put_back_units(self, held: Holding, units: int, lease_id: int | None = None) -> None:
        """Bytes that were taken and did not pass; credits that a call did not cost, or that it brought.

        Credits beyond what this lease has used are told to the database, which knows what was bought. ``lease_id``: whence
        they were taken, where they may come from a lease that somebody else has closed.
        """
        if lease_id is not None and held.particular and lease_id <= held.fenced:
            return
        if held.pace is not None:
            held.pace.give_back(units)
            return
        if held.kind == "credits":
            back = min(units, max(0, held.used))
            if back < units:
                held.gained += units - back
                self._returns.unsettled[held.counter_id] = held
            units = back
        held.left += units
        held.dirty = True
        if not held.lease_id and units:
            self._returns.unsettled[held.counter_id] = held

    def overdraw(self, held: Holding, units: int) -> None:
        """A call cost so many credits more than were taken for it. What is not there is owed: the counter goes below zero."""
        held.left -= units
        held.dirty = True
        if held.left < 0:
            self._returns.unsettled[held.counter_id] = held

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
            held.asking.add_done_callback(observed)
        return held.asking

    async def _asked(self, held: Holding) -> None:
        try:
            if self._closing:
                raise Unavailable("this gateway process is stopping")
            if (
                held.left > 0
                and held.lease_id
                and self._clock() >= held.deadline
                and await self._still_ours(held)
            ):
                return
            if held.kind == "credits" and held.left < 0:
                await self._returns.pay_debt(held)
            got, sent = await self._take(held)
            if isinstance(got, limits.Nothing) and await self._free_abandoned(held, got):
                got, sent = await self._take(held)
            if isinstance(got, limits.Slice):
                held.received(got, sent, self._terms)
                self._open[held.counter_id] = held
                return
            held.told_nothing(got, self._clock())
            if _calls_others(held, got) and sent >= held.called_at + CALL_OTHERS_EVERY_S:
                held.called_at, held.heard_since = sent, got.asked_at
                await self._slices.call_others(held.counter_id)
        except Unavailable:
            held.low //= 2  # what is asked ahead can wait for the database; what is left is spent meanwhile
            raise
        finally:
            held.asking = None

    async def _take(self, held: Holding) -> tuple[limits.Slice | limits.Nothing, float]:
        """What came of it, and when it was asked."""
        sent = self._clock()
        return await self._slices.take(held.wish(sent, self._terms)), sent

    async def _free_abandoned(self, held: Holding, got: limits.Nothing) -> bool:
        """Slots and shares do not stay with a process whose spool is lost."""
        if got.why not in ("exhausted", "held") or (held.slicing is not SLOTS and held.pace is None):
            return False
        return await self._slices.free_abandoned(held.counter_id, self._abandoned_margin_s)

    async def _still_ours(self, held: Holding) -> bool:
        """After the local deadline: the lease continues if the database still has it open, else what was left is lost."""
        sent = self._clock()
        kept = await self._slices.renew(held.lease_id, held.used)
        if kept is None:
            self._returns.lost(held, by_others=True)
            return False
        held.renewed(kept, sent, self._terms)
        return True

    async def _answer(self, held: Holding) -> None:
        """Say what is left to whoever has asked."""
        lease_id, sent = held.lease_id, self._clock()
        self._heard_of(held, lease_id, await self._slices.renew(lease_id, held.used, answer=True), sent)

    def _heard_of(self, held: Holding, lease_id: int, kept: limits.Renewed | None, sent: float) -> None:
        """What became of a lease that was spoken of at ``sent``."""
        if held.lease_id != lease_id:
            return  # it was given back or replaced meanwhile
        if kept is not None:
            held.confirmed(kept, sent, self._terms)
        elif held.asking is None:  # else whoever asks hears it too
            self._returns.lost(held, by_others=True)

    # ── heartbeat, giving back, the end ──────────────────────────────────────────────────────────────────────────

    async def heartbeat(self) -> None:
        """Once a second: give back what is idle, say what was used, keep alive what is in use.

        Raises ``Unavailable`` when the database does not answer; the next heartbeat makes up for it.
        """
        await self._returns.settle()
        now = self._clock()
        idle = [held for held in self._open.values() if self._idle(held, now)]
        await self._returns.give_back([held for held in idle if held.slicing is not SLOTS or held.used <= 0])
        for held in list(self._open.values()):
            if held.slicing is SLOTS and held.left > 0 and self._idle(held, now):
                self._returns.cede(held, held.left)
            elif held.ceding:
                self._returns.cede_free(held)
        for batch in batches(self._due()):
            said = [(held, held.lease_id) for held in batch if held.lease_id]
            for held, _ in said:
                held.dirty = False  # what is taken from here on is said the next time
            sent = self._clock()
            try:
                kept = await self._slices.renew_some({lease_id: held.used for held, lease_id in said})
            except Unavailable:
                for held, _ in said:
                    held.dirty = True
                raise
            for held, lease_id in said:
                self._heard_of(held, lease_id, kept.get(lease_id), sent)
                if (
                    held.pace is not None
                    and held.asking is None
                    and held.lease_id
                    and (held.remainder or 0) > 0
                ):
                    self._ask(held)  # others gave their shares back: it is ours to use meanwhile

    def _due(self) -> list[Holding]:
        """Of which leases to speak now: first what must be kept alive, then what others will want to know of soonest."""
        now = self._clock()
        old, changed = [], []
        for held in self._open.values():
            if now - held.said_at >= self._terms.lease_s / 3:
                old.append(held)
            elif held.dirty:
                changed.append(held)
        old.sort(key=lambda held: held.said_at)
        changed.sort(key=lambda held: (not held.near_end, held.said_at))
        return old[:KEPT_ALIVE_MAX] + changed[:SAID_MAX]

    def _idle(self, held: Holding, now: float) -> bool:
        return now - held.touched >= (self._idle_near_end_s if held.near_end else self._idle_s)

    def wanted_elsewhere(self, counter_id: str) -> None:
        """Another process asks for the last of a counter (change notice ``lease``): give back what nobody here waits for.

        Of slots and of a rate that is in use, half.
        """
        held = self._open.get(counter_id)
        if held is None:
            held = self._returns.unsettled.get(counter_id)
            if held is not None and held.asking is None:
                self._returns.settling(held)
            return
        now = self._clock()
        if held.slicing is SLOTS and held.used > 0:
            if (
                held.nothing is None or now >= held.called_at + 2 * CALL_OTHERS_EVERY_S
            ):  # else it was we who asked
                if held.left <= 0:  # all are in use, and what comes free is not for us for a moment
                    held.told_nothing(limits.Nothing("exhausted", held.capacity), now)
                    held.nothing_until = now + 2 * EXHAUSTED_FOR_S
                self._returns.cede(held, (held.granted + 1) // 2 - held.ceding)
        elif held.pace is not None and not self._idle(held, now):
            self._returns.cede(held, held.granted // 2)
            return
        elif held.left > 0 and held.waiting == 0 and held.asking is None:
            self._returns.in_background(self._returns.give_back([held]), f"give back {counter_id}")
            return
        self._returns.in_background(self._answer(held), f"answer {counter_id}")

    async def close(self) -> None:
        """Give everything back and take nothing more. Call it when no call is in flight."""
        self._closing = True
        with contextlib.suppress(Unavailable):
            await self._returns.settle()
        for held in list(self._open.values()):
            if held.asking is not None:
                with contextlib.suppress(Unavailable):
                    await held.asking
        await self._returns.give_back(list(self._open.values()))

    def open_leases(self) -> dict[int, int]:
        """Lease id → units used, in flight included: what the spool notes when it begins a file."""
        return {held.lease_id: held.used for held in self._open.values()}


def _calls_others(held: Holding, got: limits.Nothing) -> bool:
    """Of a rate each process has a share: only whoever has none asks for a part of what others are using."""
    return got.why == "held" and (held.pace is None or held.granted == 0)
