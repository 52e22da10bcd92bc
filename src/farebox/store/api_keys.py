"""Keys of the control API, kept as SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString

from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. ``hint`` is the last four characters, for people to tell keys apart."""

    id: str
    name: str
    hint: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


# A root key that was revoked stays revoked when a process starts again with the same master key.
ADD: LiteralString = """
    INSERT INTO api_key (id, name, key_hash, hint, scopes, expires_at)
    VALUES (%(id)s, %(name)s, %(hash)s, %(hint)s, %(scopes)s, %(expires_at)s)
    ON CONFLICT ON CONSTRAINT api_key_hash_unique DO NOTHING
    RETURNING id, name, hint, scopes, created_at, expires_at, revoked_at"""


async def add(
    tx: Tx,
    *,
    id: str,
    name: str,
    key_hash: bytes,
    hint: str,
    scopes: tuple[str, ...],
    expires_at: datetime | None = None,
) -> ApiKey | None:
    """Store a key by its hash. None: that very key is stored already."""
    row = await (
        await tx.execute(
            ADD,
            {
                "id": id,
                "name": name,
                "hash": key_hash,
                "hint": hint,
                "scopes": list(scopes),
                "expires_at": expires_at,
            },
        )
    ).fetchone()
    return None if row is None else _key(row)


# Unique index api_key_hash_unique.
BY_HASH: LiteralString = """
    SELECT id, name, hint, scopes, created_at, expires_at, revoked_at
      FROM api_key
     WHERE key_hash = %(hash)s"""


async def by_hash(tx: Tx, key_hash: bytes) -> ApiKey | None:
    """The key with this SHA-256, revoked and expired ones included."""
    row = await (await tx.execute(BY_HASH, {"hash": key_hash})).fetchone()
    return None if row is None else _key(row)


# Locked, so that of a rotation and a revocation at once the second sees the first.
GET: LiteralString = """
    SELECT id, name, hint, scopes, created_at, expires_at, revoked_at
      FROM api_key
     WHERE id = %(id)s
       FOR UPDATE"""


async def get(tx: Tx, key_id: str) -> ApiKey | None:
    """The key with this id, locked until the transaction ends."""
    row = await (await tx.execute(GET, {"id": key_id})).fetchone()
    return None if row is None else _key(row)


LIST: LiteralString = """
    SELECT id, name, hint, scopes, created_at, expires_at, revoked_at
      FROM api_key
     WHERE id > %(after)s
     ORDER BY id
     LIMIT %(rows)s"""


async def list_after(tx: Tx, after: str, rows: int) -> list[ApiKey]:
    """Keys by id, oldest first."""
    return [_key(row) for row in await (await tx.execute(LIST, {"after": after, "rows": rows})).fetchall()]


REVOKE: LiteralString = "UPDATE api_key SET revoked_at = now() WHERE id = %(id)s AND revoked_at IS NULL"


async def revoke(tx: Tx, key_id: str) -> bool:
    """End a key now. False: unknown, or revoked before."""
    return (await tx.execute(REVOKE, {"id": key_id})).rowcount == 1


EXPIRE: LiteralString = """
    UPDATE api_key
       SET expires_at = least(coalesce(expires_at, 'infinity'), %(at)s)
     WHERE id = %(id)s AND revoked_at IS NULL"""


async def expire(tx: Tx, key_id: str, at: datetime) -> None:
    """Let a key live until ``at`` at the longest."""
    await tx.execute(EXPIRE, {"id": key_id, "at": at})


# A deed that leaves the house without an admin cannot be undone through the API. The rows are locked: two
# administrators who revoke each other at once must not both succeed.
LIVING_ADMINS: LiteralString = """
    SELECT id
      FROM api_key
     WHERE 'admin' = ANY (scopes) AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
     ORDER BY id
       FOR UPDATE"""


async def living_admins(tx: Tx) -> list[str]:
    """Ids of the keys that can still do everything, locked until the transaction ends."""
    return [row[0] for row in await (await tx.execute(LIVING_ADMINS)).fetchall()]


def _key(row: tuple[object, ...]) -> ApiKey:
    id_, name, hint, scopes, created_at, expires_at, revoked_at = row
    return ApiKey(id_, name, hint, tuple(scopes), created_at, expires_at, revoked_at)  # type: ignore[arg-type]
