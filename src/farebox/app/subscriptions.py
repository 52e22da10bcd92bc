"""Subscriptions: which customer is on which plan version, from when to when."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Final

from farebox.app.customers import locked
from farebox.app.entitlements import Entitlements
from farebox.app.joining import joined
from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.app.plans import plan_not_found, plan_version
from farebox.app.ports.clock import BusinessClock
from farebox.base.errors import InvariantError, Refused, refuse
from farebox.base.ids import CustomerId, SubscriptionId, new_id
from farebox.base.money import Asset
from farebox.domain.subscription import BillingAnchor, Status, Subscription
from farebox.store import audit, customers, plans, subscriptions
from farebox.store.plans import StoredPlan
from farebox.store.pool import Database, Tx
from farebox.store.subscriptions import StoredSubscription

__all__ = ["StoredSubscription", "Subscription", "Subscriptions"]

#: A customer's grant and invoice are computed from all running subscriptions at once.
RUNNING_MAX: Final = 100
START_YEARS_BACK_MAX: Final = 10
START_YEARS_AHEAD_MAX: Final = 10


class Subscriptions:
    """Begins subscriptions, and with them what the customer may call."""

    def __init__(self, database: Database, business_date: BusinessClock, entitlements: Entitlements) -> None:
        self._database = database
        self._business_date = business_date
        self._entitlements = entitlements

    async def create(
        self,
        actor: str,
        customer_id: str,
        plan_id: str,
        start: datetime | None = None,
        plan_version_number: int | None = None,
        end: datetime | None = None,
        billing_anchor: BillingAnchor = "anniversary",
        within: Tx | None = None,
    ) -> StoredSubscription:
        """Put a customer on a plan from ``start`` (None: now) to ``end`` (None: open), pinned to one plan version
        (None: the newest that is not deprecated). The admission grant changes in the same transaction.

        Refuses ``CUSTOMER_NOT_FOUND``, ``CUSTOMER_ERASED``, ``PLAN_NOT_FOUND``, ``PLAN_DEPRECATED``, ``CURRENCY_MISMATCH``
        (one customer is billed in one currency), ``ENTITLEMENT_CONFLICT`` (now or when it begins), ``SUBSCRIPTION_ENDS_EARLY``,
        ``SUBSCRIPTIONS_TOO_MANY``, ``START_OUT_OF_RANGE``.
        """
        now = await self._business_date.now()
        start = now if start is None else start
        _check_start(start, now)
        if end is not None and end <= start:
            raise refuse("SUBSCRIPTION_ENDS_EARLY", "end_date must be after start_date", "end_date")
        async with joined(self._database, within) as tx:
            customer = await locked(tx, customer_id)
            stored_plan = await _open_version(tx, plan_id, plan_version_number)
            currency = stored_plan.plan.currency
            others = await subscriptions.of_customer(tx, customer_id)
            if len([s for s in others if s.status is not Status.ENDED]) >= RUNNING_MAX:
                raise refuse(
                    "SUBSCRIPTIONS_TOO_MANY",
                    f"a customer runs at most {RUNNING_MAX} subscriptions",
                    "customer_id",
                )
            if customer.currency is None:
                await customers.update(tx, dataclasses.replace(customer, currency=currency.code))
            elif Asset.named(customer.currency) != currency:
                raise refuse(
                    "CURRENCY_MISMATCH",
                    f"{customer_id} is billed in {customer.currency}, plan {plan_id} is in {currency.code}",
                    "plan_id",
                )
            stored = await subscriptions.add(
                tx,
                Subscription(
                    id=SubscriptionId(new_id("sub")),
                    customer_id=CustomerId(customer_id),
                    plan_id=plan_id,
                    plan_version=stored_plan.plan.version,
                    status=_status(end, now),
                    start_at=start,
                    end_at=end,
                    billing_anchor=billing_anchor,
                    timezone=customer.timezone,
                ),
            )
            await self._entitlements.refuse_conflicts_ahead(tx, customer_id)
            await self._entitlements.refresh_customer(tx, customer_id)
            await audit.add(
                tx,
                actor,
                "subscription.create",
                stored.subscription.id,
                {"customer_id": customer_id, "plan_id": plan_id, "plan_version": stored_plan.plan.version},
            )
        return stored

    async def get(self, subscription_id: str) -> StoredSubscription:
        """Refuses ``SUBSCRIPTION_NOT_FOUND``."""
        async with self._database.connection() as tx:
            stored = await subscriptions.get(tx, subscription_id)
        if stored is None:
            raise refuse("SUBSCRIPTION_NOT_FOUND", "there is no subscription with this id", "subscription_id")
        return stored

    async def list(
        self, customer_id: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> Page[StoredSubscription]:
        """Oldest first; of one customer or of all."""
        async with self._database.connection() as tx:
            rows = await subscriptions.list_after(
                tx, customer_id, decode_cursor(cursor) or "", rows_wanted(limit)
            )
        return page_of(rows, limit, lambda stored: stored.subscription.id)

    async def end_due(self, rows_max: int = 200) -> int:
        """Mark subscriptions whose end has come and take what they granted away; how many. The worker calls this."""
        now = await self._business_date.now()
        async with self._database.transaction() as tx:
            ended = await subscriptions.end_due(tx, now, rows_max)
            for customer_id in sorted(set(ended)):
                await self._entitlements.refreshed(tx, customer_id)
        return len(ended)


def _status(end: datetime | None, now: datetime) -> Status:
    if end is None:
        return Status.ACTIVE
    return Status.ENDED if end <= now else Status.CANCELED


def _check_start(start: datetime, now: datetime) -> None:
    if start.tzinfo is None:
        raise InvariantError("start_date needs an offset")
    year = timedelta(days=366)
    if not now - START_YEARS_BACK_MAX * year <= start <= now + START_YEARS_AHEAD_MAX * year:
        raise refuse(
            "START_OUT_OF_RANGE",
            f"start_date lies within {START_YEARS_BACK_MAX} years back and {START_YEARS_AHEAD_MAX} ahead",
            "start_date",
        )


async def _open_version(tx: Tx, plan_id: str, version: int | None) -> StoredPlan:
    if version is None:
        newest = await plans.newest_open(tx, plan_id)
        if newest is not None:
            return newest
        if await plans.latest_plan(tx, plan_id) is None:
            raise plan_not_found("plan_id")
        raise _deprecated(plan_id)
    stored = await plan_version(tx, plan_id, version)
    if stored.deprecated_at is not None:
        raise _deprecated(plan_id)
    return stored


def _deprecated(plan_id: str) -> Refused:
    return refuse("PLAN_DEPRECATED", f"plan {plan_id} takes no new subscriptions in this version", "plan_id")
