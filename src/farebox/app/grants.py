"""Admission grants as a gateway process remembers them: by API key and by pass.

What is remembered is used for ``ttl_s`` without looking again. A change notice drops it at once, and what was being read
of it meanwhile is read again. While no notices are heard nothing is used longer than ``DEAF_TTL_S`` without looking again.
While the database does not answer, what was known goes on serving until it is ``stale_s_max`` old, counted from the last
moment at which nothing had been missed; what was never seen is ``Unavailable``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from farebox.app.questions import Questions
from farebox.base.errors import Unavailable
from farebox.domain.access import AdmissionGrant
from farebox.store import grants
from farebox.store.grants import KeyOwner
from farebox.store.pool import Database, Tx

ENTRIES_MAX: Final = 100_000
ABSENT_MAX: Final = 10_000
#: How long an unknown key or pass is not asked about again.
ABSENT_TTL_S: Final = 5.0
#: A remembered value is read again in the background when this share of its time is over.
AHEAD: Final = 0.8
#: As ``ttl_s`` while change notices are not heard.
DEAF_TTL_S: Final = 1.0
#: A read takes no longer, and no known value waits longer for one.
PATIENCE_S: Final = 2.0
#: How long an old value is used after a failed look before the next look, which it does not wait for.
LOOK_AGAIN_S: Final = 1.0
#: A value that changes each time while it is read is given up after this many tries.
READS_MAX: Final = 5
#: Reads of keys, and of passes, that are under way at the same time.
ASKERS: Final = 2
#: What changed while something was being read; beyond it everything counts as changed.
CHANGED_IDS_MAX: Final = 10_000

#: SHA-256 of a customer key, or a pass id.
Name = bytes | str


@dataclass(slots=True)
class Known:
    """A key or pass and its grant. ``prepared`` is the owner's (app/door.py): what follows from the grant, per route."""

    name: Name
    grant: AdmissionGrant | None
    customer_id: str | None  # None: a pass
    ids: frozenset[str]  # change notices with one of these ids are about this
    as_of: float  # it was so at this moment
    fresh_until: float
    look_ahead_at: float
    expires_s: float  # of the grant, seconds since the epoch; inf: never
    key_id: str = ""  # of a customer's key
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
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owners: Questions[bytes, KeyOwner | None] = Questions(
            database, _owners_of, bytes, name="read keys", answer_s=patience_s, askers=ASKERS
        )
        self._passes: Questions[str, AdmissionGrant | None] = Questions(
            database, _grants_of, str, name="read passes", answer_s=patience_s, askers=ASKERS
        )
        self._ttl_s = ttl_s
        self._stale_s_max = stale_s_max
        self._entries_max = entries_max
        self._patience_s = patience_s
        self._clock = clock
        # Ordered by when an entry was last read, and whoever is in use is read once a ttl: the first one is the one to forget.
        self._entries: dict[Name, Known] = {}
        self._names: dict[str, set[Name]] = {}  # id in a notice → what it is about
        self._absent: dict[Name, float] = {}
        self._flights: dict[tuple[Name, int], asyncio.Task[Known | None]] = {}
        self._changes = 0  # the invalidation counter
        self._reading = 0
        self._changed: dict[
            str, int
        ] = {}  # id → the counter at its last change; kept while something is being read
        self._flushed = 0  # the counter at the last flush
        self._ttl_now_s = ttl_s
        self._hears_since = math.inf  # what was read from here on is kept right by notices
        self._heard_to = -math.inf  # no change committed before this moment was missed

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
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(self._fly(name))
        except (Unavailable, TimeoutError) as error:
            if self._goes_on(known):
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
        if self._reading:
            if len(self._changed) >= CHANGED_IDS_MAX:
                self._changed.clear()
                self._flushed = self._changes
            self._changed[changed_id] = self._changes
        for name in list(self._names.get(changed_id, ())):
            self._drop(name)
        self._absent.clear()

    def flush(self) -> None:
        """Notices may have been missed: everything is read again before it is used, but still serves in an outage."""
        self._changes += 1
        self._flushed = self._changes
        for known in self._entries.values():
            known.fresh_until = known.look_ahead_at = 0.0
        self._absent.clear()

    def listening(self) -> None:
        """From here on notices are heard (again); some may have been missed before."""
        self.flush()
        self._ttl_now_s = self._ttl_s
        self._hears_since = self._clock()

    def confirmed(self, as_of: float) -> None:
        """Every change committed before ``as_of`` (on this cache's clock) has been heard of."""
        self._heard_to = as_of

    def deaf(self) -> None:
        """No notices are heard any more, perhaps since ``confirmed`` was last said."""
        for known in self._entries.values():
            known.as_of = self._right_at(known)
        self._hears_since = math.inf
        self._ttl_now_s = min(self._ttl_s, DEAF_TTL_S)
        self.flush()

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
        if task is None or task.done() or anew:
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
        self._reading += 1
        try:
            return await self._read_unchanged(name)
        finally:
            self._reading -= 1
            if not self._reading:
                self._changed.clear()

    async def _read_unchanged(self, name: Name) -> Known | None:
        """A value that began to be read before a change of it is neither used nor remembered: it is read again."""
        for _ in range(READS_MAX):
            before = self._changes
            try:
                found = await self._found(name)
            except Unavailable:
                # A look ahead has nobody who waits: the value goes on for a while, and is looked at again.
                known = self._entries.get(name)
                if known is not None and self._flushed <= before:
                    self._goes_on(known)
                raise
            if found is None:
                self._remember_absent(name, before)
                return None
            if not self._changed_since(found, before):
                return self._remember(name, found)
        raise Unavailable("this credential changes faster than it can be read")

    async def _found(self, name: Name) -> Known | None:
        began_at = self._clock()
        if isinstance(name, bytes):
            owner = await self._owners.put(name)
            if owner is None:
                return None
            return self._known(name, began_at, owner.grant, owner.customer_id, owner.key_id)
        grant = await self._passes.put(name)
        return None if grant is None else self._known(name, began_at, grant, None, name)

    def _changed_since(self, found: Known, before: int) -> bool:
        return self._flushed > before or any(self._changed.get(i, 0) > before for i in found.ids)

    def _remember_absent(self, name: Name, before: int) -> None:
        self._drop(name)
        if self._changes != before:
            return  # it may have come into being meanwhile
        if len(self._absent) >= ABSENT_MAX:
            self._absent.clear()
        self._absent[name] = self._clock() + ABSENT_TTL_S

    def _remember(self, name: Name, found: Known) -> Known:
        before_it = self._drop(name)
        if before_it is not None and before_it.grant == found.grant:
            found.prepared = before_it.prepared
        if len(self._entries) >= self._entries_max:
            self._drop(next(iter(self._entries)))
        self._entries[name] = found
        for changed_id in found.ids:
            self._names.setdefault(changed_id, set()).add(name)
        return found

    def _right_at(self, known: Known) -> float:
        """The last moment at which a value is known to have been right."""
        return max(known.as_of, self._heard_to) if known.as_of >= self._hears_since else known.as_of

    def _goes_on(self, known: Known) -> bool:
        """Use a value that cannot be read again a little longer, if it is not too old. False: it is, or it was dropped."""
        now, until = self._clock(), self._right_at(known) + self._stale_s_max
        if self._entries.get(known.name) is not known or now >= until:
            return False
        known.look_ahead_at = min(now + LOOK_AGAIN_S, until)
        known.fresh_until = min(now + LOOK_AGAIN_S + self._patience_s, until)
        return True

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
            as_of=now,
            fresh_until=now + self._ttl_now_s,
            look_ahead_at=now + self._ttl_now_s * AHEAD,
            expires_s=expires_at.timestamp() if expires_at else math.inf,
            key_id=key_id if customer_id else "",
        )


async def _owners_of(tx: Tx, key_hashes: Sequence[bytes]) -> list[KeyOwner | None]:
    found = await grants.by_customer_keys(tx, key_hashes)
    return [found.get(key_hash) for key_hash in key_hashes]


async def _grants_of(tx: Tx, pass_ids: Sequence[str]) -> list[AdmissionGrant | None]:
    found = await grants.by_subjects(tx, "pass", pass_ids)
    return [found.get(pass_id) for pass_id in pass_ids]
