"""What a customer may use: answered to those who ask, and written down for the gateways as an admission grant.

This room knows plans and quotas and no price. Quotas are counted per billing period of the customer's oldest running
subscription that limits anything; limits of several plans add up into one counter a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

import structlog

from farebox.app.ports.clock import BusinessClock
from farebox.base.errors import Refused, refuse
from farebox.base.ids import new_id
from farebox.base.time import Period, to_rfc3339
from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.domain.catalog import LimitEntitlement, PlanVersion
from farebox.domain.entitlements import EntitlementView, Feature, absent, resolve, view
from farebox.domain.subscription import Subscription, billing_period, runs_at
from farebox.store import customers, entitlements, grants, subscriptions, usage
from farebox.store.pool import Database, Tx

__all__ = ["EntitlementView", "Entitlements", "Resolved"]

_END_OF_TIME: Final = datetime.fromisoformat("9999-01-01T00:00:00+00:00")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """All of a customer's features over all running subscriptions, by key."""

    customer_id: str
    resolved_at: datetime
    entitlements: tuple[EntitlementView, ...]


class Entitlements:
    """Answers and grants."""

    def __init__(self, database: Database, business_date: BusinessClock) -> None:
        self._database = database
        self._business_date = business_date

    async def check(self, customer_id: str, feature_key: str) -> EntitlementView:
        """One feature, as of now; one statement. A feature no plan speaks of is not granted.

        ``current_usage`` is what the quota counter has spent less what gateways hold and have not used, so gateway calls
        count as soon as they are admitted and API events as soon as they are stored. Refuses ``CUSTOMER_NOT_FOUND``.
        """
        resolved = await self.list(customer_id)
        return next((e for e in resolved.entitlements if e.feature_key == feature_key), absent(feature_key))

    async def list(self, customer_id: str) -> Resolved:
        """Every feature of the customer. Refuses ``CUSTOMER_NOT_FOUND``."""
        now = await self._business_date.now()
        async with self._database.connection() as tx:
            standing = await entitlements.standing(tx, customer_id, now)
        if standing is None:
            raise refuse("CUSTOMER_NOT_FOUND", "there is no customer with this id", "customer_id")
        features = resolve(standing.plans)
        turned = standing.counted_until is None or standing.counted_until <= now
        if standing.plans and (turned or _uncounted(features, standing.used)):
            # The period has turned and nobody has written the new counters yet.
            await self.renew(customer_id)
            async with self._database.connection() as tx:
                standing = await entitlements.standing(tx, customer_id, now) or standing
        views = tuple(view(f, standing.used.get(f.feature_key, Decimal(0))) for f in features)
        return Resolved(customer_id, now, views)

    async def renew(self, customer_id: str) -> None:
        """``refresh_customer`` in a transaction of its own; for whoever finds a grant expired."""
        # The date may have to be read: not while a connection is held, or a few at once would hold all there are.
        await self._business_date.now()
        async with self._database.transaction() as tx:
            await self.refresh_customer(tx, customer_id)

    async def refresh_customer(self, tx: Tx, customer_id: str) -> AdmissionGrant | None:
        """Derive the customer's grant from the running subscriptions and write it; None (and revoked) without any.

        Called on every change of subscriptions, by the worker when a period turns, and by a gateway that finds a grant
        expired. The grant expires when it would come out differently: at the end of the quota period, or when a
        subscription ends or begins. Counters that are new begin with the usage already stored for their period.
        """
        now = await self._business_date.now()
        if await customers.lock(tx, customer_id) is None:
            raise refuse("CUSTOMER_NOT_FOUND", "there is no customer with this id", "customer_id")
        coming = await subscriptions.with_plans(tx, customer_id, now, _END_OF_TIME)
        running = [(s, p) for s, p in coming if runs_at(s, now)]
        if not running:
            await grants.revoke(tx, "customer", customer_id)
            return None
        features = resolve(plan for _, plan in running)
        period = _quota_period(running, now)
        limits = tuple(_grant_limit(customer_id, f, period) for f in features if f.kind == "limit")
        fresh = await usage.begin_counters(tx, customer_id, [limit.counter_id for limit in limits])
        grant = await grants.put(
            tx,
            AdmissionGrant(
                id=new_id("grn"),
                subject_kind="customer",
                subject_id=customer_id,
                plan=running[0][1].plan_id,
                routes=None,
                features=frozenset(f.feature_key for f in features if f.granted),
                limits=limits,
                expires_at=min([period.end, *_changes_ahead(coming, now)]),
                version=0,
            ),
            period,
        )
        await usage.seed_counters(tx, fresh)
        return grant

    async def refuse_conflicts_ahead(self, tx: Tx, customer_id: str) -> None:
        """Refuse ``ENTITLEMENT_CONFLICT`` where plans will run together that do not go together.

        Said to whoever subscribes; on the day it begins there would be nobody to say it to, and no grant.
        """
        now = await self._business_date.now()
        coming = await subscriptions.with_plans(tx, customer_id, now, _END_OF_TIME)
        for start in sorted({s.start_at for s, _ in coming if s.start_at > now}):
            resolve(plan for s, plan in coming if runs_at(s, start))

    async def refresh_due(self, rows_max: int = 200) -> int:
        """Renew the grants whose period has turned or whose first subscription has begun; how many. For the worker."""
        now = await self._business_date.now()
        async with self._database.connection() as tx:
            due = await entitlements.due(tx, now, rows_max)
        renewed = 0
        for customer_id in due:
            async with self._database.transaction() as tx:
                renewed += await self.refreshed(tx, customer_id)
        return renewed

    async def refreshed(self, tx: Tx, customer_id: str) -> bool:
        """Renew one customer's grant among many. A refusal is logged, its work undone, and the next customer's turn comes."""
        try:
            async with tx.transaction():
                await self.refresh_customer(tx, customer_id)
        except Refused as refused:
            log.error(
                "grant_not_renewed",
                customer_id=customer_id,
                code=refused.reason.code,
                message=refused.reason.message,
            )
            return False
        return True


def _uncounted(features: Sequence[Feature], used: dict[str, Decimal]) -> bool:
    return any(f.kind == "limit" and f.feature_key not in used for f in features)


def _quota_period(running: Sequence[tuple[Subscription, PlanVersion]], now: datetime) -> Period:
    limiting = [(s, p) for s, p in running if any(isinstance(e, LimitEntitlement) for e in p.entitlements)]
    subscription, plan = (limiting or running)[0]
    return billing_period(subscription, plan.interval, now)


def _changes_ahead(coming: Sequence[tuple[Subscription, PlanVersion]], now: datetime) -> list[datetime]:
    ends = [s.end_at for s, _ in coming if s.end_at is not None]
    starts = [s.start_at for s, _ in coming if s.start_at > now]
    return ends + starts


def _grant_limit(customer_id: str, feature: Feature, period: Period) -> GrantLimit:
    return GrantLimit(
        counter_id=f"quota:{customer_id}:{feature.feature_key}:{to_rfc3339(period.start)}",
        kind="quota",
        limit=feature.limit,
        feature_key=feature.feature_key,
        metric_key=feature.metric_key,
        on_exceed=feature.on_exceed,
    )
