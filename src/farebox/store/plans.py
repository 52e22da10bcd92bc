"""Metrics and price plan versions. A version is written once; only its deprecation is ever added."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.domain.catalog import Metric, PlanVersion, plan_document, plan_from_document
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class StoredMetric:
    """A metric as stored."""

    id: str
    metric: Metric
    created_at: datetime


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan version as stored. ``deprecated_at`` set: no new subscription takes it."""

    plan: PlanVersion
    changelog: str
    effective_from: datetime
    deprecated_at: datetime | None
    created_at: datetime


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ADD_METRIC: LiteralString = """
    INSERT INTO metric (key, id, name, description, aggregation, property, value_type, status)
    VALUES (%(key)s, %(id)s, %(name)s, %(description)s, %(aggregation)s, %(property)s, %(value_type)s, %(status)s)
    ON CONFLICT (key) DO NOTHING
    RETURNING id, key, name, description, aggregation, property, value_type, status, created_at"""


async def add_metric(tx: Tx, metric_id: str, metric: Metric) -> StoredMetric | None:
    """Store a metric. None: the key is taken."""
    row = await (await tx.execute(ADD_METRIC, {"id": metric_id, **_metric_values(metric)})).fetchone()
    return None if row is None else _metric(row)


# Primary key; held against a deactivation at the same time.
GET_METRIC: LiteralString = """
    SELECT id, key, name, description, aggregation, property, value_type, status, created_at
      FROM metric
     WHERE key = %(key)s
       FOR SHARE"""


async def get_metric(tx: Tx, key: str) -> StoredMetric | None:
    """The metric with this key."""
    row = await (await tx.execute(GET_METRIC, {"key": key})).fetchone()
    return None if row is None else _metric(row)


UPDATE_METRIC: LiteralString = """
    UPDATE metric
       SET name = %(name)s, description = %(description)s, status = %(status)s
     WHERE key = %(key)s
    RETURNING id, key, name, description, aggregation, property, value_type, status, created_at"""


async def update_metric(tx: Tx, metric: Metric) -> StoredMetric | None:
    """Write what may change of a metric: name, description, status. Not how it counts."""
    row = await (await tx.execute(UPDATE_METRIC, _metric_values(metric))).fetchone()
    return None if row is None else _metric(row)


# Primary key order.
LIST_METRICS: LiteralString = """
    SELECT id, key, name, description, aggregation, property, value_type, status, created_at
      FROM metric
     WHERE key > %(after)s
     ORDER BY key
     LIMIT %(rows)s"""


async def metrics_after(tx: Tx, after: str, rows: int) -> list[StoredMetric]:
    """Metrics by key."""
    cursor = await tx.execute(LIST_METRICS, {"after": after, "rows": rows})
    return [_metric(row) for row in await cursor.fetchall()]


# Primary key, one probe a key.
METRICS: LiteralString = """
    SELECT id, key, name, description, aggregation, property, value_type, status, created_at
      FROM metric
     WHERE key = ANY (%(keys)s)"""


async def metrics(tx: Tx, keys: list[str]) -> dict[str, Metric]:
    """Those of the keys that are metrics."""
    rows = await (await tx.execute(METRICS, {"keys": keys})).fetchall()
    return {row[1]: _metric(row).metric for row in rows}


# ── plans ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# Two writers of the same plan at once must not both see version n and write n+1.
LOCK_PLAN: LiteralString = "SELECT pg_advisory_xact_lock(hashtextextended(%(plan_id)s, 4022))"


async def lock_plan(tx: Tx, plan_id: str) -> None:
    """Keep other writers of this plan out until the transaction ends."""
    await tx.execute(LOCK_PLAN, {"plan_id": plan_id})


ADD_PLAN: LiteralString = """
    INSERT INTO price_plan_version (plan_id, version, name, currency, document, digest, changelog)
    VALUES (%(plan_id)s, %(version)s, %(name)s, %(currency)s, %(document)s, %(digest)s, %(changelog)s)
    RETURNING plan_id, version, document, changelog, effective_from, deprecated_at, created_at"""


async def add_plan(tx: Tx, plan: PlanVersion, digest: bytes, changelog: str) -> StoredPlan:
    """Write a new version; ``lock_plan`` is held."""
    row = await (
        await tx.execute(
            ADD_PLAN,
            {
                "plan_id": plan.plan_id,
                "version": plan.version,
                "name": plan.name,
                "currency": plan.currency.code,
                "document": Jsonb(plan_document(plan)),
                "digest": digest,
                "changelog": changelog,
            },
        )
    ).fetchone()
    assert row is not None
    return _plan(row)


# Primary key, backwards.
LATEST_PLAN: LiteralString = """
    SELECT plan_id, version, document, changelog, effective_from, deprecated_at, created_at, digest
      FROM price_plan_version
     WHERE plan_id = %(plan_id)s
     ORDER BY version DESC
     LIMIT 1"""


async def latest_plan(tx: Tx, plan_id: str) -> tuple[StoredPlan, bytes] | None:
    """The newest version of a plan and the digest of its document."""
    row = await (await tx.execute(LATEST_PLAN, {"plan_id": plan_id})).fetchone()
    return None if row is None else (_plan(row), bytes(row[7]))


# Primary key. Shared with other subscribers, not with a deprecation.
GET_PLAN: LiteralString = """
    SELECT plan_id, version, document, changelog, effective_from, deprecated_at, created_at
      FROM price_plan_version
     WHERE plan_id = %(plan_id)s AND version = %(version)s
       FOR SHARE"""


async def get_plan(tx: Tx, plan_id: str, version: int) -> StoredPlan | None:
    """One version of a plan."""
    row = await (await tx.execute(GET_PLAN, {"plan_id": plan_id, "version": version})).fetchone()
    return None if row is None else _plan(row)


# What a new subscription takes when it names no version.
NEWEST_OPEN: LiteralString = """
    SELECT plan_id, version, document, changelog, effective_from, deprecated_at, created_at
      FROM price_plan_version
     WHERE plan_id = %(plan_id)s AND deprecated_at IS NULL
     ORDER BY version DESC
     LIMIT 1
       FOR SHARE"""


async def newest_open(tx: Tx, plan_id: str) -> StoredPlan | None:
    """The newest version that is not deprecated."""
    row = await (await tx.execute(NEWEST_OPEN, {"plan_id": plan_id})).fetchone()
    return None if row is None else _plan(row)


# Primary key order: the newest version of each plan.
LIST_PLANS: LiteralString = """
    SELECT DISTINCT ON (plan_id) plan_id, version, document, changelog, effective_from, deprecated_at, created_at
      FROM price_plan_version
     WHERE plan_id > %(after)s
     ORDER BY plan_id, version DESC
     LIMIT %(rows)s"""


async def plans_after(tx: Tx, after: str, rows: int) -> list[StoredPlan]:
    """The newest version of each plan, by plan id."""
    return [
        _plan(row) for row in await (await tx.execute(LIST_PLANS, {"after": after, "rows": rows})).fetchall()
    ]


# Primary key order.
LIST_VERSIONS: LiteralString = """
    SELECT plan_id, version, document, changelog, effective_from, deprecated_at, created_at
      FROM price_plan_version
     WHERE plan_id = %(plan_id)s AND version < %(before)s
     ORDER BY version DESC
     LIMIT %(rows)s"""


async def versions_before(tx: Tx, plan_id: str, before: int, rows: int) -> list[StoredPlan]:
    """A plan's versions, newest first."""
    cursor = await tx.execute(LIST_VERSIONS, {"plan_id": plan_id, "before": before, "rows": rows})
    return [_plan(row) for row in await cursor.fetchall()]


DEPRECATE: LiteralString = """
    UPDATE price_plan_version
       SET deprecated_at = coalesce(deprecated_at, now())
     WHERE plan_id = %(plan_id)s AND version = %(version)s
    RETURNING plan_id, version, document, changelog, effective_from, deprecated_at, created_at"""


async def deprecate(tx: Tx, plan_id: str, version: int) -> StoredPlan | None:
    """Close a version to new subscriptions, once and for all. None: there is no such version."""
    row = await (await tx.execute(DEPRECATE, {"plan_id": plan_id, "version": version})).fetchone()
    return None if row is None else _plan(row)


def _metric_values(metric: Metric) -> dict[str, Any]:
    return {
        "key": metric.key,
        "name": metric.name,
        "description": metric.description,
        "aggregation": metric.aggregation,
        "property": metric.property,
        "value_type": metric.value_type,
        "status": metric.status,
    }


def _metric(row: tuple[Any, ...]) -> StoredMetric:
    id_, key, name, description, aggregation, property_, value_type, status, created_at = row
    metric = Metric(key, name, aggregation, property_, value_type, description, status)
    return StoredMetric(id_, metric, created_at)


def _plan(row: tuple[Any, ...]) -> StoredPlan:
    plan_id, version, document, changelog, effective_from, deprecated_at, created_at = row[:7]
    return StoredPlan(
        plan_from_document(plan_id, version, document), changelog, effective_from, deprecated_at, created_at
    )
