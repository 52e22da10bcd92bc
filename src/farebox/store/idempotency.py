"""The answers of keyed requests. Rows older than the retention are forgotten by the worker."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import LiteralString

from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class Kept:
    """A row. ``status`` None: claimed, not answered yet; ``age_s`` counts from the claim."""

    digest: bytes
    status: int | None
    body: bytes | None
    age_s: float

    def lapsed(self, lease_s: float) -> bool:
        """Whether this is a claim whose owner is taken for dead."""
        return self.status is None and self.age_s > lease_s


# Held until the transaction ends, however it ends. Two keys that share the 64-bit hash see each other as "running":
# a retry, not a wrong answer.
LOCK: LiteralString = "SELECT pg_try_advisory_xact_lock(hashtextextended(%(what)s, 4021))"


async def lock(tx: Tx, actor: str, key: str) -> bool:
    """Take the key for this transaction. False: another one has it."""
    row = await (await tx.execute(LOCK, {"what": f"{len(actor)}:{actor}:{key}"})).fetchone()
    return bool(row and row[0])


# Primary key (actor, key).
GET: LiteralString = """
    SELECT request_digest, status, body, extract(epoch FROM clock_timestamp() - created_at)::float8
      FROM idempotent_answer
     WHERE actor = %(actor)s AND key = %(key)s"""


async def get(tx: Tx, actor: str, key: str) -> Kept | None:
    """What is kept under a key."""
    row = await (await tx.execute(GET, {"actor": actor, "key": key})).fetchone()
    return None if row is None else Kept(row[0], row[1], row[2], row[3])


CLAIM: LiteralString = """
    INSERT INTO idempotent_answer (actor, key, request_digest)
    VALUES (%(actor)s, %(key)s, %(digest)s)
    ON CONFLICT (actor, key) DO UPDATE
       SET request_digest = excluded.request_digest, created_at = now(), status = NULL, body = NULL"""


async def claim(tx: Tx, actor: str, key: str, digest: bytes) -> None:
    """Write "running" under a key that is free or whose claim has lapsed; the caller holds the lock."""
    await tx.execute(CLAIM, {"actor": actor, "key": key, "digest": digest})


KEEP: LiteralString = """
    INSERT INTO idempotent_answer (actor, key, request_digest, status, body)
    VALUES (%(actor)s, %(key)s, %(digest)s, %(status)s, %(body)s)
    ON CONFLICT (actor, key) DO UPDATE
       SET request_digest = excluded.request_digest, status = excluded.status, body = excluded.body"""


async def keep(tx: Tx, actor: str, key: str, digest: bytes, status: int, body: bytes) -> None:
    """Write the answer under the key."""
    await tx.execute(KEEP, {"actor": actor, "key": key, "digest": digest, "status": status, "body": body})


RELEASE: LiteralString = """
    DELETE FROM idempotent_answer
     WHERE actor = %(actor)s AND key = %(key)s AND request_digest = %(digest)s AND status IS NULL"""


async def release(tx: Tx, actor: str, key: str, digest: bytes) -> None:
    """Give a claim back after a refusal: nothing happened, the key is free."""
    await tx.execute(RELEASE, {"actor": actor, "key": key, "digest": digest})


# Oldest first by the index on created_at; bounded, so that one round never holds many row locks.
FORGET: LiteralString = """
    DELETE FROM idempotent_answer
     WHERE (actor, key) IN (
           SELECT actor, key FROM idempotent_answer
            WHERE created_at < now() - %(older_than)s::interval
            ORDER BY created_at
            LIMIT %(rows_max)s)"""


async def forget(tx: Tx, older_than: timedelta, rows_max: int) -> int:
    """Delete what is older than the retention; returns how many rows went."""
    return (await tx.execute(FORGET, {"older_than": older_than, "rows_max": rows_max})).rowcount
