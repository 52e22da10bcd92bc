"""Admission grants and their counters: what billing, purchases and operators tell the gateways.

One grant a subject. ``put`` and ``revoke`` announce the change themselves (kind ``grant``, id: the subject's id), so
that no gateway can keep serving an old one because a caller forgot to say so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, LiteralString, cast

from psycopg.types.json import Jsonb

from farebox.base.errors import InvariantError
from farebox.base.money import plain
from farebox.base.time import Period
from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.store import changes
from farebox.store.pool import PLANNED_ANEW, Tx


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """Who a customer key belongs to. ``grant`` None: a customer without any active subscription."""

    key_id: str
    customer_id: str
    grant: AdmissionGrant | None


# Zero rows: the stored grant already says exactly this. Nothing is written and nobody is told, so that several
# gateways which find the same period turned do not make each other forget what they have just read.
_PUT: LiteralString = """
    INSERT INTO admission_grant AS old (id, subject_kind, subject_id, plan, routes, features, limits, expires_at, revoked_at)
    VALUES (%(id)s, %(subject_kind)s, %(subject_id)s, %(plan)s, %(routes)s, %(features)s, %(limits)s, %(expires_at)s, %(revoked_at)s)
    ON CONFLICT ON CONSTRAINT admission_grant_subject_unique DO UPDATE
       SET plan = excluded.plan, routes = excluded.routes, features = excluded.features, limits = excluded.limits,
           expires_at = excluded.expires_at, revoked_at = excluded.revoked_at, version = old.version + 1, updated_at = now()
     WHERE (old.plan, old.routes, old.features, old.limits, old.expires_at, old.revoked_at)
           IS DISTINCT FROM
           (excluded.plan, excluded.routes, excluded.features, excluded.limits, excluded.expires_at, excluded.revoked_at)
    RETURNING id"""

# spent is never touched: what was called stays called when a plan changes in the middle of a period.
_PUT_COUNTER: LiteralString = """
    INSERT INTO limit_counter AS old
           (id, grant_id, customer_id, feature_key, metric_key, kind, capacity, hard, window_s, period_start, period_end)
    VALUES (%(id)s, %(grant_id)s, %(customer_id)s, %(feature_key)s, %(metric_key)s, %(kind)s, %(capacity)s, %(hard)s,
            %(window_s)s, %(period_start)s, %(period_end)s)
    ON CONFLICT (id) DO UPDATE
       SET grant_id = excluded.grant_id, metric_key = excluded.metric_key, kind = excluded.kind, capacity = excluded.capacity,
           hard = excluded.hard, window_s = excluded.window_s,
           period_start = coalesce(excluded.period_start, old.period_start),
           period_end = coalesce(excluded.period_end, old.period_end)"""


# In the order of their ids, as whoever takes slices of several counters at once (store/limits.py).
_LOCK_COUNTERS: LiteralString = "SELECT FROM limit_counter WHERE id = ANY(%(ids)s) ORDER BY id FOR UPDATE"


async def put(tx: Tx, grant: AdmissionGrant, period: Period | None = None) -> AdmissionGrant:
    """Write a subject's grant and the counters it names, and announce it; returns it as stored.

    The subject's existing grant keeps its id and gets the next version; ``grant.version`` is not read. A counter that
    exists keeps what was spent of it. ``period`` is the period the quotas belong to (None for a pass). Putting what is
    already there changes nothing and announces nothing.
    """
    written = await (
        await tx.execute(
            _PUT,
            {
                "id": grant.id,
                "subject_kind": grant.subject_kind,
                "subject_id": grant.subject_id,
                "plan": grant.plan,
                "routes": None if grant.routes is None else sorted(grant.routes),
                "features": sorted(grant.features),
                "limits": Jsonb([_limit_document(limit) for limit in grant.limits]),
                "expires_at": grant.expires_at,
                "revoked_at": grant.revoked_at,
            },
        )
    ).fetchone()
    if written is not None:
        if len(grant.limits) > 1:
            await tx.execute(_LOCK_COUNTERS, {"ids": [limit.counter_id for limit in grant.limits]})
        for limit in grant.limits:
            await tx.execute(
                _PUT_COUNTER,
                {
                    "id": limit.counter_id,
                    "grant_id": written[0],
                    "customer_id": grant.subject_id if grant.subject_kind == "customer" else None,
                    "feature_key": limit.feature_key,
                    "metric_key": limit.metric_key,
                    "kind": limit.kind,
                    "capacity": limit.limit,
                    "hard": limit.on_exceed == "block",
                    # A rate's window bounds its burst in each process; its counter knows shares, not windows.
                    "window_s": limit.window_s if limit.kind == "requests" else None,
                    "period_start": period and period.start,
                    "period_end": period and period.end,
                },
            )
        await changes.announce(tx, "grant", grant.subject_id)
    stored = await by_subject(tx, grant.subject_kind, grant.subject_id)
    if stored is None:
        raise InvariantError(
            f"the grant of {grant.subject_kind} {grant.subject_id} is gone right after it was written"
        )
    return stored


_REVOKE: LiteralString = """
    UPDATE admission_grant
       SET revoked_at = now(), version = version + 1, updated_at = now()
     WHERE subject_kind = %(kind)s AND subject_id = %(id)s AND revoked_at IS NULL"""


async def revoke(tx: Tx, subject_kind: str, subject_id: str) -> bool:
    """End a subject's grant now and announce it. False: there was none, or it was revoked before."""
    cursor = await tx.execute(_REVOKE, {"kind": subject_kind, "id": subject_id})
    if cursor.rowcount == 0:
        return False
    await changes.announce(tx, "grant", subject_id)
    return True


_BY_CUSTOMER_KEY: LiteralString = """
    SELECT k.key_hash, k.id, k.customer_id,
           g.id, g.subject_kind, g.subject_id, g.plan, g.routes, g.features, g.limits, g.expires_at, g.version, g.revoked_at
      FROM customer_key k
      LEFT JOIN admission_grant g ON g.subject_kind = 'customer' AND g.subject_id = k.customer_id
     WHERE k.key_hash = ANY(%(hashes)b) AND k.revoked_at IS NULL"""


async def by_customer_keys(tx: Tx, key_hashes: Sequence[bytes]) -> dict[bytes, KeyOwner]:
    """The owners of living ``fbx_ck_`` keys (by their SHA-256) and the owners' grants; unknown and revoked keys are missing."""
    cursor = await tx.execute(_BY_CUSTOMER_KEY, {"hashes": list(key_hashes)}, prepare=PLANNED_ANEW)
    return {
        bytes(row[0]): KeyOwner(row[1], row[2], None if row[3] is None else _grant(row[3:]))
        for row in await cursor.fetchall()
    }


async def by_customer_key(tx: Tx, key_hash: bytes) -> KeyOwner | None:
    """The owner of a living ``fbx_ck_`` key (by its SHA-256) and the owner's grant. None: no such key, or revoked."""
    return (await by_customer_keys(tx, [key_hash])).get(key_hash)


_BY_SUBJECT: LiteralString = """
    SELECT id, subject_kind, subject_id, plan, routes, features, limits, expires_at, version, revoked_at
      FROM admission_grant
     WHERE subject_kind = %(kind)s AND subject_id = ANY(%(ids)b)"""


async def by_subjects(tx: Tx, subject_kind: str, subject_ids: Sequence[str]) -> dict[str, AdmissionGrant]:
    """The grants of customers or of passes by their ids, revoked and expired ones included."""
    cursor = await tx.execute(
        _BY_SUBJECT, {"kind": subject_kind, "ids": list(subject_ids)}, prepare=PLANNED_ANEW
    )
    return {row[2]: _grant(row) for row in await cursor.fetchall()}


async def by_subject(tx: Tx, subject_kind: str, subject_id: str) -> AdmissionGrant | None:
    """The grant of a customer or a pass, revoked and expired ones included."""
    return (await by_subjects(tx, subject_kind, [subject_id])).get(subject_id)


_REVOKED_AMONG: LiteralString = """
    SELECT subject_id FROM admission_grant
     WHERE subject_kind IN ('customer', 'pass') AND subject_id = ANY(%(ids)s) AND revoked_at IS NOT NULL
    UNION
    SELECT id FROM customer_key WHERE id = ANY(%(ids)s) AND revoked_at IS NOT NULL"""


async def revoked_among(tx: Tx, ids: Collection[str]) -> set[str]:
    """Which of these ids of customers, passes and customer keys are revoked."""
    return {row[0] for row in await (await tx.execute(_REVOKED_AMONG, {"ids": list(ids)})).fetchall()}


def _limit_document(limit: GrantLimit) -> dict[str, Any]:
    return {
        "counter_id": limit.counter_id,
        "kind": limit.kind,
        "limit": None if limit.limit is None else plain(limit.limit),
        "feature_key": limit.feature_key,
        "metric_key": limit.metric_key,
        "on_exceed": limit.on_exceed,
        **({} if limit.window_s is None else {"window_s": limit.window_s}),
    }


def _grant(row: tuple[Any, ...]) -> AdmissionGrant:
    grant_id, kind, subject_id, plan, routes, features, limits, expires_at, version, revoked_at = row
    return AdmissionGrant(
        id=grant_id,
        subject_kind=kind,
        subject_id=subject_id,
        plan=plan,
        routes=None if routes is None else frozenset(routes),
        features=frozenset(features),
        limits=tuple(_limit(document) for document in limits),
        expires_at=expires_at,
        version=version,
        revoked_at=revoked_at,
    )


def _limit(document: dict[str, Any]) -> GrantLimit:
    limit = cast("str | None", document["limit"])
    return GrantLimit(**{**document, "limit": None if limit is None else Decimal(limit)})
