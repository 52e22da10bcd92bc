"""Keys of the control API: who may do what, and how a key is known again.

A key is ``fbx_sk_`` and 32 base-32 characters (160 random bits), shown once and stored as SHA-256.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from farebox.app.joining import joined
from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.app.ports.clock import Clock
from farebox.base.errors import InvariantError, Reason, refuse
from farebox.base.ids import new_id
from farebox.base.secrets import key_hash, new_admin_key
from farebox.store import api_keys, audit, changes
from farebox.store.api_keys import ApiKey
from farebox.store.pool import Database, Tx

__all__ = ["SCOPES", "ApiKey", "ApiKeys", "NewApiKey"]

#: ``admin`` includes all others.
SCOPES: Final = (
    "admin",
    "billing:read",
    "billing:write",
    "events:write",
    "entitlements:read",
    "gateway",
)

CACHE_TTL_S: Final = 30.0
CACHE_KEYS_MAX: Final = 10_000
NAME_CHARS_MAX: Final = 200
OVERLAP_S_MAX: Final = 30 * 24 * 3600
ROOT_KEY_ID: Final = "key_root"


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """The only moment at which the secret is seen."""

    key_id: str
    key: str
    record: ApiKey


class ApiKeys:
    """Makes, lists, rotates, revokes and recognises keys."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._cache: dict[bytes, tuple[float, ApiKey]] = {}
        self._changes = 0

    async def create(
        self,
        actor: str,
        name: str,
        scopes: tuple[str, ...],
        expires_at: datetime | None = None,
        within: Tx | None = None,
    ) -> NewApiKey:
        """A new key. Refuses ``SCOPE_UNKNOWN``, ``NAME_INVALID``, ``EXPIRY_PASSED``."""
        if not 1 <= len(name.strip()) <= NAME_CHARS_MAX:
            raise refuse("NAME_INVALID", f"a key needs a name of 1 to {NAME_CHARS_MAX} characters", "name")
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise refuse(
                "SCOPE_UNKNOWN", f"take one or more of {', '.join(SCOPES)}", "scopes", unknown=unknown
            )
        if expires_at is not None and expires_at <= self._clock.now():
            raise refuse("EXPIRY_PASSED", "expires_at must lie in the future", "expires_at")
        async with joined(self._database, within) as tx:
            made = await self._add(tx, name, tuple(dict.fromkeys(scopes)), expires_at)
            await audit.add(tx, actor, "api_key.create", made.key_id, {"name": name, "scopes": list(scopes)})
        return made

    async def list(self, limit: int = 50, cursor: str | None = None) -> Page[ApiKey]:
        """All keys without their secrets, oldest first."""
        async with self._database.connection() as tx:
            rows = await api_keys.list_after(tx, decode_cursor(cursor) or "", rows_wanted(limit))
        return page_of(rows, limit, lambda key: key.id)

    async def rotate(
        self, actor: str, key_id: str, overlap_s: int = 0, within: Tx | None = None
    ) -> NewApiKey:
        """A new key with the same name and scopes; the old one ends after ``overlap_s`` (0: now).

        Refuses ``API_KEY_NOT_FOUND``, ``API_KEY_ENDED``, ``OVERLAP_OUT_OF_RANGE``.
        """
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise refuse("OVERLAP_OUT_OF_RANGE", f"overlap_s is 0 to {OVERLAP_S_MAX} seconds", "overlap_s")
        async with joined(self._database, within) as tx:
            old = await self._living(tx, key_id)
            made = await self._add(tx, old.name, old.scopes, old.expires_at)
            if overlap_s:
                await api_keys.expire(tx, key_id, self._clock.now() + timedelta(seconds=overlap_s))
            else:
                await api_keys.revoke(tx, key_id)
            await audit.add(
                tx, actor, "api_key.rotate", key_id, {"successor": made.key_id, "overlap_s": overlap_s}
            )
            await changes.announce(tx, "key", key_id)
        return made

    async def revoke(self, actor: str, key_id: str, within: Tx | None = None) -> None:
        """End a key now. Revoking twice is once. Refuses ``API_KEY_NOT_FOUND`` and ``API_KEY_LAST_ADMIN``."""
        async with joined(self._database, within) as tx:
            # All administrators are locked first, in one order: two who revoke each other do not deadlock.
            admins = await api_keys.living_admins(tx)
            key = await api_keys.get(tx, key_id)
            if key is None:
                raise _not_found()
            if key.revoked_at is not None:
                return
            if admins == [key_id]:
                raise refuse(
                    "API_KEY_LAST_ADMIN", "this is the last key with scope admin: make another one first"
                )
            await api_keys.revoke(tx, key_id)
            await audit.add(tx, actor, "api_key.revoke", key_id)
            await changes.announce(tx, "key", key_id)

    async def authenticate(self, digest: bytes) -> ApiKey | Reason:
        """Whose key this is, by its SHA-256; remembered for ``CACHE_TTL_S``.

        Unknown keys are not remembered (they would push out the known ones) and answered with ``API_KEY_UNKNOWN``;
        revoked and expired ones with ``API_KEY_ENDED``.
        """
        found = self._cache.get(digest)
        if found is None or found[0] < time.monotonic():
            before = self._changes
            async with self._database.connection() as tx:
                key = await api_keys.by_hash(tx, digest)
            if key is None:
                return Reason(
                    "API_KEY_UNKNOWN", "this API key does not exist: send Authorization: Bearer fbx_sk_…"
                )
            if before == self._changes:  # a change told meanwhile may concern the row just read
                if len(self._cache) >= CACHE_KEYS_MAX:
                    self._cache.clear()
                self._cache[digest] = (time.monotonic() + CACHE_TTL_S, key)
        else:
            key = found[1]
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= self._clock.now()):
            return Reason("API_KEY_ENDED", "this API key was revoked or has expired")
        return key

    def forget(self) -> None:
        """Some key changed: ask the database again. For ``key`` notices and reconnects of the change listener."""
        self._changes += 1
        self._cache.clear()

    async def _add(
        self, tx: Tx, name: str, scopes: tuple[str, ...], expires_at: datetime | None
    ) -> NewApiKey:
        secret = new_admin_key()
        record = await api_keys.add(
            tx,
            id=new_id("key"),
            name=name,
            key_hash=key_hash(secret),
            hint=secret[-4:],
            scopes=scopes,
            expires_at=expires_at,
        )
        if record is None:
            raise InvariantError("a fresh key of 160 random bits exists already")
        return NewApiKey(record.id, secret, record)

    async def _living(self, tx: Tx, key_id: str) -> ApiKey:
        key = await api_keys.get(tx, key_id)
        if key is None:
            raise _not_found()
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= self._clock.now()):
            raise refuse("API_KEY_ENDED", "this API key was revoked or has expired", "key_id")
        return key


async def ensure_root(tx: Tx, key: str) -> None:
    """Make sure the admin key derived from the master key opens this database; called at every start.

    A root key that an operator revoked stays revoked. A new master key adds a new root key.
    """
    digest = key_hash(key)
    await api_keys.add(
        tx,
        id=f"{ROOT_KEY_ID}_{digest.hex()[:12]}",
        name="root",
        key_hash=digest,
        hint=key[-4:],
        scopes=("admin",),
    )


def _not_found() -> Exception:
    return refuse("API_KEY_NOT_FOUND", "there is no API key with this id", "key_id")
