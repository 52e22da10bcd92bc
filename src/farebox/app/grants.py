"""Admission grants as a gateway process remembers them: by API key and by pass.

What is remembered is used for ``ttl_s`` without looking again. A change notice drops it at once; a value that was read
while something changed is used for the call at hand and not remembered. While the database is away, what was known goes
on serving until it is ``stale_s_max`` old; what was never seen is ``Unavailable``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from farebox.base.errors import Unavailable
from farebox.domain.access import AdmissionGrant
from farebox.store import grants
from farebox.store.pool import Database

ENTRIES_MAX: Final = 100_000
ABSENT_MAX: Final = 10_000
#: How long an unknown key or pass is not asked about again.
ABSENT_TTL_S: Final = 5.0
#: A remembered value is read again in the background when this share of its time is over.
AHEAD: Final = 0.8
#: A known value does not wait longer than this for a database that hangs.
PATIENCE_S: Final = 2.0
#: How long an old value is used after a failed look before the next look.
LOOK_AGAIN_S: Final = 1.0

#: SHA-256 of a customer key, or a pass id.
Name = bytes | str


@dataclass(slots=True)
class Known:
    """A key or pass and its grant. ``prepared`` is the owner's (app/door.py): what follows from the grant, per route."""

    name: Name
    grant: AdmissionGrant | None
    customer_id: str | None  # None: a pass
    ids: frozenset[str]  # change notices with one of these ids are about this
    read_at: float
    fresh_until: float
    look_ahead_at: float
    expires_s: float  # of the grant, seconds since the epoch; inf: never
    prepared: dict[str, Any] = field(default_factory=dict)


class GrantCache:
    """``fresh`` is synchronous and the fast path; ``find`` asks the database where it must."""

    def __init__(
        self,
        database: Database,
        *,
        ttl_s: float = 60.0,
        stale_s_max: float = 900.0,
        entries_max: int = ENTRIES_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._ttl_s = ttl_s
        self._stale_s_max = stale_s_max
        self._entries_max = entries_max
        self._clock = clock
        # Ordered by when an entry was last read, and whoever is in use is read once a ttl: the first one is the one to forget.
        self._entries: dict[Name, Known] = {}
        self._names: dict[str, set[Name]] = {}  # id in a notice → what it is about
        self._absent: dict[Name, float] = {}
        self._flights: dict[tuple[Name, int], asyncio.Task[Known | None]] = {}
        self._changes = 0  # the invalidation counter

    def fresh(self, name: Name) -> Known | None:
        """What is known and may be used as it is; None: ask ``find``."""
        known = self._entries.get(name)
        if known is None:
            return None
        now = self._clock()
        if now >= known.look_ahead_at:
            if now >= known.fresh_until:
                return None
            known.look_ahead_at = known.fresh_until  # once
            self._fly(name)
        return known

    def remembers(self, name: Name) -> bool:
        """Whether it was good when it was last read, however long ago."""
        return name in self._entries

    async def find(self, name: Name) -> Known | None:
        """The key or pass, None if there is none (or the key is revoked). ``Unavailable``: not known and not to be read."""
        known = self.fresh(name)
        if known is not None:
            return known
        if self._clock() < self._absent.get(name, -math.inf):
            return None
        known = self._entries.get(name)
        if known is None:
            return await asyncio.shield(self._fly(name))
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.shield(self._fly(name))
        except (Unavailable, TimeoutError) as error:
            now = self._clock()
            if self._entries.get(name) is known and now < known.read_at + self._stale_s_max:
                known.fresh_until = known.look_ahead_at = now + LOOK_AGAIN_S
                return known
            raise Unavailable(
                "the database is away, and what is known of this credential is too old"
            ) from error

    async def read(self, name: Name) -> Known | None:
        """As ``find``, but never from memory: after something was changed on purpose."""
        return await asyncio.shield(self._fly(name, anew=True))

    def invalidate(self, changed_id: str) -> None:
        """Something (a key, a customer, a pass) changed: forget all that is about it."""
        self._changes += 1
        for name in list(self._names.get(changed_id, ())):
            self._drop(name)
        self._absent.clear()

    def flush(self) -> None:
        """Notices may have been missed: everything is read again before it is used, but still serves in an outage."""
        self._changes += 1
        for known in self._entries.values():
            known.fresh_until = known.look_ahead_at = 0.0
        self._absent.clear()

    def forget_prepared(self) -> None:
        """The catalog changed: what was derived from the routes is derived anew."""
        for known in self._entries.values():
            known.prepared.clear()

    def __len__(self) -> int:
        return len(self._entries)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _fly(self, name: Name, *, anew: bool = False) -> asyncio.Task[Known | None]:
        """One read at a time for a name; a read that began before a change is not shared with whoever comes after it."""
        flight = (name, self._changes)
        task = self._flights.get(flight)
        if task is None or anew:
            task = asyncio.create_task(self._read(name), name="grant")
            self._flights[flight] = task
            task.add_done_callback(lambda done: self._landed(flight, done))
        return task

    def _landed(self, flight: tuple[Name, int], task: asyncio.Task[Known | None]) -> None:
        if self._flights.get(flight) is task:
            del self._flights[flight]
        if not task.cancelled():
            task.exception()  # whoever waits hears of it; a look ahead has nobody who waits

    async def _read(self, name: Name) -> Known | None:
        before, began_at = self._changes, self._clock()
        found: Known | None = None
        async with self._database.connection() as tx:
            if isinstance(name, bytes):
                owner = await grants.by_customer_key(tx, name)
                if owner is not None:
                    found = self._known(name, began_at, owner.grant, owner.customer_id, owner.key_id)
            else:
                grant = await grants.by_subject(tx, "pass", name)
                if grant is not None:
                    found = self._known(name, began_at, grant, None, name)
        if self._changes != before:
            return found
        before_it = self._drop(name)
        if found is None:
            if len(self._absent) >= ABSENT_MAX:
                self._absent.clear()
            self._absent[name] = self._clock() + ABSENT_TTL_S
            return None
        if before_it is not None and before_it.grant == found.grant:
            found.prepared = before_it.prepared
        if len(self._entries) >= self._entries_max:
            self._drop(next(iter(self._entries)))
        self._entries[name] = found
        for changed_id in found.ids:
            self._names.setdefault(changed_id, set()).add(name)
        return found

    def _drop(self, name: Name) -> Known | None:
        known = self._entries.pop(name, None)
        if known is not None:
            for changed_id in known.ids:
                names = self._names[changed_id]
                names.discard(name)
                if not names:
                    del self._names[changed_id]
        return known

    def _known(
        self, name: Name, now: float, grant: AdmissionGrant | None, customer_id: str | None, key_id: str
    ) -> Known:
        expires_at = grant.expires_at if grant else None
        return Known(
            name=name,
            grant=grant,
            customer_id=customer_id,
            ids=frozenset(i for i in (key_id, customer_id, grant.id if grant else None) if i),
            read_at=now,
            fresh_until=now + self._ttl_s,
            look_ahead_at=now + self._ttl_s * AHEAD,
            expires_s=expires_at.timestamp() if expires_at else math.inf,
        )
