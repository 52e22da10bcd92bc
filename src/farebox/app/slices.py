"""The conversation with the database about one process's slices: what is asked, together with what, and within what time.

Statements about several leases of this process run one after the other: each locks its leases in an order of its own, and
two of them could wait for each other in a circle. Those about one lease run beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from farebox.app.questions import ANSWER_S, Questions
from farebox.store import changes, limits
from farebox.store.pool import Database, Tx

#: Leases that one statement speaks of, so that it does not keep the others, or the event loop, for long.
LEASES_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class _Said:
    lease_id: int
    used: int
    answer: bool


class Slices:
    """Every method raises ``Unavailable`` when the database does not answer within seconds; the outcome is then unknown."""

    def __init__(self, database: Database, process_id: str, lease_s: float) -> None:
        self._database = database
        self._process_id = process_id
        self._lease_s = lease_s
        self._one_by_one = asyncio.Lock()
        self._takes: Questions[limits.Wish, limits.Slice | limits.Nothing] = Questions(
            database,
            self._take_each,
            lambda wish: wish.counter_id,
            name="take slices",
            alone=self._one_by_one,
        )
        self._renewals: Questions[_Said, limits.Renewed | None] = Questions(
            database,
            self._renew_each,
            lambda said: said.lease_id,
            name="renew leases",
            alone=self._one_by_one,
        )

    async def take(self, wish: limits.Wish) -> limits.Slice | limits.Nothing:
        """A slice of one counter; asked together with those of others."""
        return await self._takes.put(wish)

    async def renew(self, lease_id: int, used: int, *, answer: bool = False) -> limits.Renewed | None:
        """Say what was used of one lease and keep it alive; None: it is lost. ``answer`` as in ``limits.renew``."""
        return await self._renewals.put(_Said(lease_id, used, answer))

    async def renew_some(self, used: Mapping[int, int]) -> dict[int, limits.Renewed]:
        """The same for at most ``LEASES_MAX`` at once; lost ones are missing."""
        async with self._one_by_one, self._database.connection(within_s=ANSWER_S) as tx:
            return await limits.renew(tx, self._process_id, used, self._lease_s)

    async def give_back(self, used: Mapping[int, int]) -> None:
        """Return what is left of at most ``LEASES_MAX`` leases (id → units used)."""
        async with self._one_by_one, self._database.connection(within_s=ANSWER_S) as tx:
            await limits.give_back(tx, self._process_id, used)

    async def keep(self, lease_id: int, units: int, used: int) -> bool:
        """Return all but so many units of a lease. False: the lease is lost."""
        async with self._database.connection(within_s=ANSWER_S) as tx:
            return await limits.keep(tx, self._process_id, lease_id, units, used) is not None

    async def owe(self, counter_id: str, used: int) -> limits.Slice | None:
        """Raise the lease to all that was used of it. None: there is no such counter."""
        async with self._database.connection(within_s=ANSWER_S) as tx:
            return await limits.owe(tx, counter_id, self._process_id, used, self._lease_s)

    async def gain(self, counter_id: str, used: int, units: int) -> None:
        """Return units that no open lease of this process has spent."""
        async with self._database.connection(within_s=ANSWER_S) as tx, tx.transaction():
            await limits.gain(tx, counter_id, self._process_id, used, units)

    async def free_abandoned(self, counter_id: str, margin_s: float) -> bool:
        """Free the slots or shares of processes that vanished. Whether there were any."""
        async with self._database.connection(within_s=ANSWER_S) as tx:
            return await limits.free_abandoned(tx, counter_id, margin_s)

    async def call_others(self, counter_id: str) -> None:
        """Ask all other processes for what they have left of a counter, or to say that it is nothing."""
        async with self._database.connection(within_s=ANSWER_S) as tx:
            await changes.announce(tx, "lease", counter_id)

    async def _take_each(
        self, tx: Tx, wishes: Sequence[limits.Wish]
    ) -> Sequence[limits.Slice | limits.Nothing]:
        return await limits.take_each(tx, self._process_id, wishes, self._lease_s)

    async def _renew_each(self, tx: Tx, said: Sequence[_Said]) -> Sequence[limits.Renewed | None]:
        kept: dict[int, limits.Renewed] = {}
        for answer in (False, True):
            # Said twice in one batch: the later one holds, as it was put later.
            used = {s.lease_id: s.used for s in said if s.answer is answer}
            if used:
                kept |= await limits.renew(tx, self._process_id, used, self._lease_s, answer=answer)
        return [kept.get(s.lease_id) for s in said]
