"""One key, one effect: a client that did not hear our answer asks again and gets the same one.

``once`` is the way for everything that one transaction can do. The effect and the stored answer are committed
together, and what says "still running" is an advisory lock of that same transaction. So there is no moment at which
an effect exists without its answer, and a process or a connection that dies leaves neither a half-done effect nor a
locked key: nothing has to expire. The use cases of this package take part by ``within=tx``.

``once_apart`` is for effects that commit on their own (they call the outside world, or gather their writes). There the
key is claimed in a transaction before the effect and answered in one after it. A claim whose owner died lapses after
``CLAIM_LEASE_S``; whoever asks then runs the effect again, so such an effect must itself be keyed.

Refusals are not stored: a refused request changed nothing, and asking again may rightly be answered differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from farebox.base.errors import Refused, refuse
from farebox.store import idempotency
from farebox.store.pool import Database, Tx

KEY_CHARS_MAX: Final = 255
CLAIM_LEASE_S: Final = 60
RETRY_AFTER_S: Final = 1
ANSWER_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as it went out. ``replayed`` True: it is the first request's answer, given again."""

    status: int
    body: bytes
    replayed: bool = False


def digest_of(method: str, path: str, body: bytes) -> bytes:
    """What a request is, for "the same body": SHA-256 over method, path and body, each with its length."""
    digest = hashlib.sha256()
    for part in (method.encode(), path.encode(), body):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


class Idempotency:
    """Keeps the answers of keyed requests, one actor's keys apart from another's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def once(
        self, actor: str, key: str, digest: bytes, effect: Callable[[Tx], Awaitable[KeptAnswer]]
    ) -> KeptAnswer:
        """Run ``effect(tx)`` and keep its answer, in one transaction; or give the answer kept under this key.

        Refuses: ``IDEMPOTENCY_CONFLICT`` (the key was used for another request), ``IDEMPOTENCY_IN_PROGRESS`` (the
        first request is still running; ``facts["retry_after_s"]``), ``IDEMPOTENCY_KEY_INVALID``.
        """
        _check_key(key)
        async with self._database.transaction() as tx:
            if not await idempotency.lock(tx, actor, key):
                raise _in_progress()
            kept = await idempotency.get(tx, actor, key)
            if kept is not None and not kept.lapsed(CLAIM_LEASE_S):
                return _replay(kept, digest)
            answer = await effect(tx)
            await idempotency.keep(tx, actor, key, digest, answer.status, _bounded(answer.body))
            return answer

    async def once_apart(
        self, actor: str, key: str, digest: bytes, effect: Callable[[], Awaitable[KeptAnswer]]
    ) -> KeptAnswer:
        """As ``once``, for an effect with transactions of its own. It must be keyed itself: see above."""
        _check_key(key)
        async with self._database.transaction() as tx:
            if not await idempotency.lock(tx, actor, key):
                raise _in_progress()
            kept = await idempotency.get(tx, actor, key)
            if kept is not None and not kept.lapsed(CLAIM_LEASE_S):
                return _replay(kept, digest)
            if kept is not None and kept.digest != digest:
                raise _conflict()
            await idempotency.claim(tx, actor, key, digest)
        try:
            answer = await effect()
        except Refused:
            async with self._database.transaction() as tx:
                await idempotency.release(tx, actor, key, digest)
            raise
        async with self._database.transaction() as tx:
            await idempotency.keep(tx, actor, key, digest, answer.status, _bounded(answer.body))
        return answer


def _check_key(key: str) -> None:
    if not 1 <= len(key) <= KEY_CHARS_MAX or not key.isprintable():
        raise refuse(
            "IDEMPOTENCY_KEY_INVALID",
            f"an idempotency key is 1 to {KEY_CHARS_MAX} printable characters",
            "idempotency_key",
        )


def _replay(kept: idempotency.Kept, digest: bytes) -> KeptAnswer:
    if kept.digest != digest:
        raise _conflict()
    if kept.status is None or kept.body is None:
        raise _in_progress()
    return KeptAnswer(kept.status, kept.body, replayed=True)


def _conflict() -> Refused:
    return refuse(
        "IDEMPOTENCY_CONFLICT",
        "this idempotency key was used for another request: take a new key for a new request",
        "idempotency_key",
    )


def _in_progress() -> Refused:
    return refuse(
        "IDEMPOTENCY_IN_PROGRESS",
        "the first request with this idempotency key is still running: ask again shortly",
        "idempotency_key",
        retry_after_s=RETRY_AFTER_S,
    )


def _bounded(body: bytes) -> bytes:
    if len(body) > ANSWER_BYTES_MAX:
        raise refuse(
            "ANSWER_TOO_LARGE",
            f"the answer is longer than the {ANSWER_BYTES_MAX} bytes that are kept for a key: ask without one",
        )
    return body
