"""Keys that may ask for admission (scope ``gateway``), as a gateway process remembers them.

They are remembered as grants are (app/grants.py): used for ``ttl_s`` without looking again, dropped at once by a change
notice, no longer than ``DEAF_TTL_S`` while no notices are heard; and in an outage of the database what was known goes on
serving until it is ``stale_s_max`` old.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from farebox.app.grants import DEAF_TTL_S, PATIENCE_S
from farebox.app.ports.clock import Clock
from farebox.base.errors import Unavailable
from farebox.store import api_keys
from farebox.store.api_keys import ApiKey
from farebox.store.pool import Database

ENTRIES_MAX: Final = 1_000
ABSENT_MAX: Final = 1_000
#: How long a key that may not ask is not looked up again.
ABSENT_TTL_S: Final = 5.0

_SCOPES: Final = frozenset({"admin", "gateway"})


@dataclass(slots=True)
class _Entry:
    key_id: str
    read_at: float
    fresh_until: float
    expires_s: float  # seconds since the epoch; inf: never


class EdgeKeys:
    """By SHA-256 of the key. ``fresh`` is synchronous and the fast path; ``find`` asks the database where it must."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        ttl_s: float = 60.0,
        stale_s_max: float = 900.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._ttl_s = self._ttl_now_s = ttl_s
        self._stale_s_max = stale_s_max
        self._monotonic = monotonic
        self._entries: dict[bytes, _Entry] = {}
        self._absent: dict[bytes, float] = {}
        self._changes = 0  # the invalidation counter

    def fresh(self, digest: bytes) -> bool:
        """Whether this key is known to be good; False: ask ``find``."""
        entry = self._entries.get(digest)
        return (
            entry is not None
            and self._monotonic() < entry.fresh_until
            and self._clock.now().timestamp() < entry.expires_s
        )

    async def find(self, digest: bytes) -> bool:
        """Whether this key may ask. ``Unavailable``: not known well enough, and not to be read."""
        if self.fresh(digest):
            return True
        now = self._monotonic()
        if now < self._absent.get(digest, -math.inf):
            return False
        before = self._changes
        try:
            async with self._database.connection(within_s=PATIENCE_S) as tx:
                key = await api_keys.by_hash(tx, digest)
        except Unavailable:
            entry = self._entries.get(digest)
            if entry is None or now >= entry.read_at + self._stale_s_max:
                raise
            return self._clock.now().timestamp() < entry.expires_s
        good = key is not None and self._may_ask(key)
        if self._changes != before:
            return good  # used for this once: what changed meanwhile may be this very key
        self._entries.pop(digest, None)
        remembered: dict[bytes, _Entry] | dict[bytes, float] = self._entries if good else self._absent
        if len(remembered) >= (ENTRIES_MAX if good else ABSENT_MAX):
            remembered.clear()
        if good:
            assert key is not None
            expires_s = key.expires_at.timestamp() if key.expires_at else math.inf
            self._entries[digest] = _Entry(key.id, now, now + self._ttl_now_s, expires_s)
        else:
            self._absent[digest] = now + ABSENT_TTL_S
        return good

    def invalidate(self, key_id: str) -> None:
        """This key changed."""
        self._changes += 1
        self._absent.clear()
        for digest in [d for d, entry in self._entries.items() if entry.key_id == key_id]:
            del self._entries[digest]

    def listening(self) -> None:
        """Notices are heard (again); some may have been missed before."""
        self._ttl_now_s = self._ttl_s
        self._flush()

    def deaf(self) -> None:
        """Notices are not heard any more."""
        self._ttl_now_s = min(self._ttl_s, DEAF_TTL_S)
        self._flush()

    def _flush(self) -> None:
        """Each is read again before it is used, but still serves in an outage."""
        self._changes += 1
        self._absent.clear()
        for entry in self._entries.values():
            entry.fresh_until = 0.0

    def _may_ask(self, key: ApiKey) -> bool:
        return (
            key.revoked_at is None
            and (key.expires_at is None or self._clock.now() < key.expires_at)
            and not _SCOPES.isdisjoint(key.scopes)
        )
