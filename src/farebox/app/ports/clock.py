"""Two clocks. The wall's is for keys, leases and payment windows; the business date is for billing and expiry.

Only the business date can be moved, forward, in the sandbox: a month of billing is then a matter of seconds, while
tokens and signatures still live in real time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol

from farebox.store import installation
from farebox.store.pool import Database


class Clock(Protocol):
    """What time it is."""

    def now(self) -> datetime:
        """The present instant, aware, UTC."""
        ...


class WallClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class BusinessClock(Protocol):
    """What day it is for billing."""

    async def now(self) -> datetime:
        """The present instant of the business, aware, UTC."""
        ...


class BusinessDate:
    """The test clock of a sandbox where it was set, else the wall clock. Read from one row and remembered until
    ``forget()``, which the owner of a change listener calls on ``clock`` notices and on reconnects."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._known = False
        self._set_to: datetime | None = None
        self._changes = 0

    async def now(self) -> datetime:
        """A test clock stands still until it is moved again; without one this is the wall clock."""
        if not self._known:
            before = self._changes
            async with self._database.connection() as tx:
                set_to = (await installation.get(tx)).business_date
            if before != self._changes:  # moved while we read: use it, remember nothing
                return set_to or self._clock.now()
            self._known, self._set_to = True, set_to
        return self._set_to or self._clock.now()

    def forget(self) -> None:
        """The clock may have been moved: read it again at the next question."""
        self._changes += 1
        self._known = False
