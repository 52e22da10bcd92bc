"""How slices go back: whole and in parts, from the heartbeat or when others ask; and what the database has to hear of late.

A holding whose lease is on its way back is being asked about (``asking``): whoever needs it waits for the outcome.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from farebox.app.holdings import SLOTS, Holding
from farebox.app.slices import LEASES_MAX, Slices
from farebox.base.errors import Unavailable

#: Debts and gains that one heartbeat tells of.
SETTLED_MAX: Final = 256


class Returns:
    """``held_open`` is shared with ``Leases``: the holdings with an open lease, by counter."""

    def __init__(self, slices: Slices, held_open: dict[str, Holding], clock: Callable[[], float]) -> None:
        self._slices = slices
        self._open = held_open
        self._clock = clock
        # Of these the database has not heard: credits overdrawn or gained, units that came back after their lease was gone.
        self.unsettled: dict[str, Holding] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    # ── credits that were not foreseen ───────────────────────────────────────────────────────────────────────────

    async def settle(self) -> None:
        """Tell the database what it does not know of."""
        for held in list(itertools.islice(self.unsettled.values(), SETTLED_MAX)):
            if held.asking is None:
                await asyncio.shield(self.settling(held))

    def settling(self, held: Holding) -> asyncio.Task[None]:
        held.asking = asyncio.create_task(self._settled(held), name=f"settle {held.counter_id}")
        held.asking.add_done_callback(observed)
        return held.asking

    async def _settled(self, held: Holding) -> None:
        try:
            if (
                not held.lease_id and held.left > 0
            ):  # of calls that ended after their lease had been given back
                held.gained += held.left
                held.left = 0
            if held.gained:
                # At most once: what was not heard for certain is not said again, and stays spent.
                units, held.gained = held.gained, 0
                await self._slices.gain(held.counter_id, held.used, units)
            if held.left < 0:
                await self.pay_debt(held)
            if held.left >= 0 and not held.gained and (held.lease_id or not held.left):
                self.unsettled.pop(held.counter_id, None)
        finally:
            held.asking = None

    async def pay_debt(self, held: Holding) -> None:
        """Raise the lease to what was used of it. It may be a new one, where the former was given back before the call's end."""
        got = await self._slices.owe(held.counter_id, held.used)
        held.owed(got, self._clock())
        if held.lease_id:
            self._open[held.counter_id] = held
        else:
            self._open.pop(held.counter_id, None)

    async def give_back(self, idle: Sequence[Holding]) -> None:
        for batch in batches(idle):
            some = [h for h in batch if h.asking is None and _may_go(h)]
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
            await self._slices.give_back(used)
            # If this was not reached the outcome is unknown: the deadline stays 0, so that the next call asks first.
            for held in some:
                taken_back = used[held.lease_id] - held.used
                self.lost(held, by_others=False)
                held.left = taken_back
                if taken_back > 0 or (taken_back < 0 and held.kind == "credits"):
                    self.unsettled[held.counter_id] = held  # changed while the lease was on its way
        finally:
            for held in some:
                held.asking = None

    def cede(self, held: Holding, units: int) -> None:
        """Promise units to others: those that are free go now, those in flight when their calls end."""
        if units > 0:
            held.ceding += units
            held.left -= units
            self.cede_free(held)

    def cede_free(self, held: Holding) -> None:
        if held.asking is not None:
            return  # the next heartbeat, or the next call that ends
        units = min(held.ceding, held.left + held.ceding)
        if held.granted <= units:
            held.left += held.ceding
            held.ceding = 0
            held.asking = self.in_background(self._gave_back([held]), f"give back {held.counter_id}")
            held.deadline = 0.0
        elif units > 0:
            held.ceding -= units
            held.granted -= units
            held.repace(self._clock())
            held.asking = self.in_background(self._ceded(held), f"cede {held.counter_id}")

    async def _ceded(self, held: Holding) -> None:
        lease_id = held.lease_id
        try:
            if not await self._slices.keep(lease_id, held.granted, held.used):
                self.lost(held, by_others=True)
        except Unavailable:
            held.deadline = 0.0  # how much is ours is not known: whoever comes next asks
            raise
        finally:
            held.asking = None

    def lost(self, held: Holding, *, by_others: bool) -> None:
        held.lost(self._clock(), by_others=by_others)
        self._open.pop(held.counter_id, None)

    def in_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        task.add_done_callback(observed)
        return task


def _may_go(held: Holding) -> bool:
    """Slots in use keep their lease: a call that began a moment ago will bring its slot back to it."""
    return held.lease_id != 0 and held.waiting == 0 and (held.slicing is not SLOTS or held.used <= 0)


def batches(holdings: Sequence[Holding]) -> list[Sequence[Holding]]:
    return [holdings[n : n + LEASES_MAX] for n in range(0, len(holdings), LEASES_MAX)]


def observed(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task hears of its failure; where nobody does, the next call asks again."""
    if not task.cancelled():
        task.exception()
