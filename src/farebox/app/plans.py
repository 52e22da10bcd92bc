"""The catalog of an account: metrics, and price plans in versions that never change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from farebox.app.joining import joined
from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.base.errors import InvariantError, Reason, Refused, refuse
from farebox.base.ids import new_id
from farebox.domain.catalog import (
    LimitEntitlement,
    Metric,
    PlanVersion,
    check_metric,
    plan_document,
    plan_faults,
)
from farebox.store import audit, plans
from farebox.store.plans import StoredMetric, StoredPlan
from farebox.store.pool import Database, Tx

__all__ = ["Outcome", "Plans", "PutMetric", "PutPlan", "StoredMetric", "StoredPlan"]

Outcome = Literal["created", "changed", "unchanged"]

CHANGELOG_CHARS_MAX = 2_000
_VERSION_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PutPlan:
    """``outcome`` created: version 1; changed: a further version; unchanged: the document is that of the newest one."""

    stored: StoredPlan
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class PutMetric:
    """What ``put_metric`` found and left."""

    stored: StoredMetric
    outcome: Outcome


class Plans:
    """Writes metrics and plans."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create_metric(self, actor: str, metric: Metric, within: Tx | None = None) -> StoredMetric:
        """A new metric. Refuses ``METRIC_KEY_DUPLICATE`` and the faults of ``check_metric``."""
        check_metric(metric)
        async with joined(self._database, within) as tx:
            stored = await plans.add_metric(tx, new_id("met"), metric)
            if stored is None:
                raise refuse("METRIC_KEY_DUPLICATE", f"a metric {metric.key} exists already", "key")
            await audit.add(tx, actor, "metric.create", metric.key)
        return stored

    async def put_metric(self, actor: str, metric: Metric, within: Tx | None = None) -> PutMetric:
        """Create the metric, or give the one with this key this name and description (what ``apply`` does).

        Refuses ``METRIC_FIXED`` when it would count differently: recorded usage would change its meaning.
        """
        check_metric(metric)
        async with joined(self._database, within) as tx:
            created = await plans.add_metric(tx, new_id("met"), metric)
            if created is not None:
                await audit.add(tx, actor, "metric.create", metric.key)
                return PutMetric(created, "created")
            before = await plans.get_metric(tx, metric.key)
            if before is None:
                raise InvariantError(f"metric {metric.key} is neither new nor there")
            wanted = dataclasses.replace(metric, status=before.metric.status)
            if wanted == before.metric:
                return PutMetric(before, "unchanged")
            for name in ("aggregation", "property", "value_type"):
                if getattr(wanted, name) != getattr(before.metric, name):
                    raise refuse(
                        "METRIC_FIXED",
                        f"metric {metric.key} has {name} {getattr(before.metric, name)!r}: take a new key to count differently",
                        name,
                    )
            return PutMetric(await self._update_metric(tx, actor, wanted), "changed")

    async def get_metric(self, key: str) -> StoredMetric:
        """Refuses ``METRIC_NOT_FOUND``."""
        async with self._database.connection() as tx:
            return await _metric(tx, key)

    async def list_metrics(self, limit: int = 50, cursor: str | None = None) -> Page[StoredMetric]:
        """By key."""
        async with self._database.connection() as tx:
            rows = await plans.metrics_after(tx, decode_cursor(cursor) or "", rows_wanted(limit))
        return page_of(rows, limit, lambda stored: stored.metric.key)

    async def patch_metric(
        self,
        actor: str,
        key: str,
        name: str | None = None,
        description: str | None = None,
        within: Tx | None = None,
    ) -> StoredMetric:
        """Change the name or the description (None leaves it). Refuses ``METRIC_NOT_FOUND`` and faults of the texts."""
        async with joined(self._database, within) as tx:
            before = (await _metric(tx, key)).metric
            after = dataclasses.replace(
                before,
                name=before.name if name is None else name,
                description=before.description if description is None else description,
            )
            check_metric(after)
            return await self._update_metric(tx, actor, after)

    async def deactivate_metric(self, actor: str, key: str, within: Tx | None = None) -> StoredMetric:
        """Take no new events for this metric; its history and the plans that price it stay. Doing it twice is once.

        Processes that take events in remember metrics for a few seconds.
        """
        async with joined(self._database, within) as tx:
            before = (await _metric(tx, key)).metric
            return await self._update_metric(tx, actor, dataclasses.replace(before, status="inactive"))

    async def _update_metric(self, tx: Tx, actor: str, metric: Metric) -> StoredMetric:
        stored = await plans.update_metric(tx, metric)
        if stored is None:
            raise InvariantError(f"metric {metric.key} vanished")
        await audit.add(tx, actor, "metric.change", metric.key, {"status": metric.status})
        return stored

    # ── price plans ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def put_plan(
        self, actor: str, plan: PlanVersion, changelog: str = "", within: Tx | None = None
    ) -> PutPlan:
        """Write a plan: the next version of its id, or the newest one when the document is the same.

        ``plan.version`` is not read. Running subscriptions keep the version they began with. Refuses every fault of
        ``plan_faults`` at once, ``METRIC_UNKNOWN`` among them, and ``LIMIT_METRIC_UNSUPPORTED``.
        """
        async with joined(self._database, within) as tx:
            await plans.lock_plan(tx, plan.plan_id)
            newest = await plans.latest_plan(tx, plan.plan_id)
            plan = dataclasses.replace(plan, version=1 if newest is None else newest[0].plan.version + 1)
            await _check(tx, plan, changelog)
            digest = _digest(plan)
            if newest is not None and newest[1] == digest and newest[0].deprecated_at is None:
                return PutPlan(newest[0], "unchanged")
            stored = await plans.add_plan(tx, plan, digest, changelog)
            await audit.add(tx, actor, "price_plan.version", plan.plan_id, {"version": plan.version})
        return PutPlan(stored, "created" if newest is None else "changed")

    async def get_plan(self, plan_id: str, version: int | None = None) -> StoredPlan:
        """One version, or the newest. Refuses ``PLAN_NOT_FOUND``."""
        async with self._database.connection() as tx:
            if version is not None:
                return await plan_version(tx, plan_id, version)
            newest = await plans.latest_plan(tx, plan_id)
        if newest is None:
            raise plan_not_found("plan_id")
        return newest[0]

    async def list_plans(self, limit: int = 50, cursor: str | None = None) -> Page[StoredPlan]:
        """The newest version of each plan, by id."""
        async with self._database.connection() as tx:
            rows = await plans.plans_after(tx, decode_cursor(cursor) or "", rows_wanted(limit))
        return page_of(rows, limit, lambda stored: stored.plan.plan_id)

    async def list_versions(
        self, plan_id: str, limit: int = 50, cursor: str | None = None
    ) -> Page[StoredPlan]:
        """A plan's versions, newest first. Refuses ``PLAN_NOT_FOUND``."""
        before = decode_cursor(cursor)
        if before is not None and not before.isascii():
            raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor")
        if before is not None and not before.isdigit():
            raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor")
        async with self._database.connection() as tx:
            rows = await plans.versions_before(
                tx, plan_id, min(int(before or _VERSION_MAX), _VERSION_MAX), rows_wanted(limit)
            )
        if not rows and before is None:
            raise plan_not_found("plan_id")
        return page_of(rows, limit, lambda stored: str(stored.plan.version))

    async def deprecate(self, actor: str, plan_id: str, version: int, within: Tx | None = None) -> StoredPlan:
        """Close a version to new subscriptions; there is no way back, and running ones keep it. Refuses ``PLAN_NOT_FOUND``."""
        async with joined(self._database, within) as tx:
            before = await plan_version(tx, plan_id, version)
            if before.deprecated_at is not None:
                return before
            stored = await plans.deprecate(tx, plan_id, version)
            if stored is None:
                raise InvariantError(f"version {version} of plan {plan_id} vanished")
            await audit.add(tx, actor, "price_plan.deprecate", plan_id, {"version": version})
        return stored


async def plan_version(tx: Tx, plan_id: str, version: int) -> StoredPlan:
    """One version of a plan; refuses ``PLAN_NOT_FOUND``."""
    stored = await plans.get_plan(tx, plan_id, version) if 0 < version <= _VERSION_MAX else None
    if stored is None:
        raise plan_not_found("plan_version")
    return stored


def plan_not_found(field: str) -> Refused:
    """There is no such plan, or no such version of it."""
    return refuse("PLAN_NOT_FOUND", "there is no price plan with this id and version", field)


async def _metric(tx: Tx, key: str) -> StoredMetric:
    stored = await plans.get_metric(tx, key)
    if stored is None:
        raise refuse("METRIC_NOT_FOUND", "there is no metric with this key", "metric_key")
    return stored


async def _check(tx: Tx, plan: PlanVersion, changelog: str) -> None:
    """Every fault of the plan at once, those that only the database knows included."""
    limits = [e for e in plan.entitlements if isinstance(e, LimitEntitlement)]
    keys = {c.metric_key for c in plan.charges if c.metric_key is not None} | {e.metric_key for e in limits}
    known = await plans.metrics(tx, [key for key in keys if "\0" not in key])
    faults = plan_faults(plan, known)
    for entitlement in limits:
        metric = known.get(entitlement.metric_key)
        # A quota is one number that ingest and gateway add to. A maximum or a count of distinct values does not add up.
        if metric is not None and metric.aggregation not in ("sum", "count"):
            faults.append(
                Reason(
                    "LIMIT_METRIC_UNSUPPORTED",
                    f"a limit needs a metric that adds up (sum or count); {metric.key} is {metric.aggregation}",
                    f"entitlements.{entitlement.feature_key}.metric_key",
                )
            )
    if len(changelog) > CHANGELOG_CHARS_MAX or "\0" in changelog:
        faults.append(Reason("CHANGELOG_INVALID", f"at most {CHANGELOG_CHARS_MAX} characters", "changelog"))
    if faults:
        raise Refused(*faults)


def _digest(plan: PlanVersion) -> bytes:
    return hashlib.sha256(json.dumps(plan_document(plan), sort_keys=True).encode()).digest()
