"""The sandbox's test clock: it jumps forward, so that a month of billing takes a second."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import ClassVar, Final

from farebox.app.joining import joined
from farebox.app.ports.clock import Clock, WallClock
from farebox.base.errors import InvariantError, refuse
from farebox.store import audit, changes, installation
from farebox.store.pool import Database, Tx

AHEAD_MAX: Final = timedelta(days=10 * 366)


class TestClock:
    """Moves the business date of a sandbox."""

    __test__: ClassVar = False  # pytest takes every Test… for a test

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._database = database
        self._clock = clock or WallClock()

    async def read(self) -> datetime | None:
        """Where the business date was set to; None: the wall clock counts."""
        async with self._database.connection() as tx:
            return (await installation.get(tx)).business_date

    async def move(self, actor: str, to: datetime, within: Tx | None = None) -> datetime:
        """Set the business date to ``to``, where it stands still until moved again; returns it. Every process hears of it.

        Refuses ``TEST_CLOCK_LIVE`` (only a sandbox has one), ``TEST_CLOCK_BACKWARDS``, ``TEST_CLOCK_TOO_FAR``.
        """
        if to.tzinfo is None:
            raise InvariantError("the test clock needs an aware datetime")
        if to > self._clock.now() + AHEAD_MAX:
            raise refuse("TEST_CLOCK_TOO_FAR", "the test clock goes at most ten years ahead", "now")
        async with joined(self._database, within) as tx:
            before = await installation.get(tx)
            if before.mode != "sandbox":
                raise refuse("TEST_CLOCK_LIVE", "only a sandbox has a test clock", "now")
            # While nobody has set one, the wall clock is the date that it may not fall behind.
            behind = before.business_date is None and to < self._clock.now() - timedelta(minutes=1)
            if behind or not await installation.move_business_date(tx, to):
                raise refuse("TEST_CLOCK_BACKWARDS", "the test clock moves forward only", "now")
            await audit.add(tx, actor, "test_clock.set", "installation", {"to": to.isoformat()})
            await changes.announce(tx, "clock", "business_date")
        return to
