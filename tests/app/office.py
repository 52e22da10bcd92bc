"""A billing office for tests: the use cases over one real database, and a business date that the test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from farebox.app.billing import Billing
from farebox.app.books import Books
from farebox.app.customers import Customers
from farebox.app.entitlements import Entitlements
from farebox.app.events import IncomingEvent, event_from
from farebox.app.keys import ApiKeys
from farebox.app.metering import Accepted, Metering
from farebox.app.plans import Plans
from farebox.app.ports.clock import WallClock
from farebox.app.subscriptions import StoredSubscription, Subscriptions
from farebox.base.ids import CustomerId
from farebox.base.money import Asset
from farebox.base.time import Interval, Period
from farebox.domain.catalog import (
    Aggregation,
    Charge,
    Entitlement,
    FlatFee,
    Metric,
    PerUnit,
    PlanVersion,
)
from farebox.domain.customer import Customer
from farebox.store import usage
from farebox.store.pool import Database

USD = Asset("USD", 2)


def at(text: str) -> datetime:
    """``"2026-11-15"`` or ``"2026-11-15T10:30"`` in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def period(start: str, end: str) -> Period:
    return Period(at(start), at(end))


@dataclass
class SetDate:
    """A business date that stands where the test put it."""

    instant: datetime = field(default_factory=lambda: at("2026-11-21"))

    async def now(self) -> datetime:
        return self.instant


@dataclass
class SetClock:
    """A wall clock likewise."""

    instant: datetime

    def now(self) -> datetime:
        return self.instant


class Office:
    """Everything the billing rooms offer, with short words for what tests do often."""

    def __init__(self, database: Database, today: str = "2026-11-21") -> None:
        self.database = database
        self.date = SetDate(at(today))
        self.clock = SetClock(at(today))
        self.plans = Plans(database)
        self.customers = Customers(database, self.clock)
        self.entitlements = Entitlements(database, self.date)
        self.subscriptions = Subscriptions(database, self.date, self.entitlements)
        self.metering = Metering(database, self.clock, self.date, retention_days=4_000)
        self.billing = Billing(database, self.clock, self.date)
        self.books = Books(database)
        self.keys = ApiKeys(database, WallClock())
        self._sent = 0

    async def close(self) -> None:
        await self.metering.close()

    def today_is(self, day: str) -> None:
        self.date.instant = self.clock.instant = at(day)

    async def metric(self, key: str = "api_calls", aggregation: Aggregation = "sum", **more: Any) -> None:
        await self.plans.create_metric("test", Metric(key, key, aggregation, **more))

    async def plan(
        self,
        plan_id: str = "starter",
        charges: tuple[Charge, ...] | None = None,
        entitlements: tuple[Entitlement, ...] = (),
        interval: Interval = Interval(1, "month"),
        currency: Asset = USD,
    ) -> int:
        """A plan of one cent a call and 49 dollars a month, unless told otherwise; its version."""
        if charges is None:
            charges = (
                Charge("calls", "api_calls", PerUnit(Decimal("0.01"))),
                Charge("base", None, FlatFee(Decimal(49))),
            )
        plan = PlanVersion(plan_id, 0, plan_id.title(), currency, interval, charges, entitlements)
        return (await self.plans.put_plan("test", plan)).stored.plan.version

    async def customer(self, customer_id: str = "acme", **more: Any) -> None:
        await self.customers.create("test", Customer(CustomerId(customer_id), customer_id.title(), **more))

    async def subscribed(
        self, customer_id: str = "acme", plan_id: str = "starter", start: str = "2026-11-01", **more: Any
    ) -> StoredSubscription:
        return await self.subscriptions.create("test", customer_id, plan_id, at(start), **more)

    async def opened(self, **plan: Any) -> None:
        """The usual beginning: a metric, a plan, a customer on it since 1 November 2026."""
        await self.metric()
        await self.plan(**plan)
        await self.customer()
        await self.subscribed()

    def event(self, value: str = "1", when: str | None = None, **more: Any) -> IncomingEvent:
        self._sent += 1
        document = {
            "customer_id": "acme",
            "metric_key": "api_calls",
            "idempotency_key": f"event-{self._sent}",
            "value": value,
            **more,
        }
        if when is not None:
            document["timestamp"] = at(when).isoformat()
        return event_from(document)

    async def used(self, value: str = "1", when: str | None = None, **more: Any) -> Accepted:
        """One event, stored."""
        return await self.metering.accept_one(self.event(value, when, **more))

    async def folded(self) -> tuple[int, int]:
        async with self.database.transaction() as tx:
            return await usage.fold(tx)

    async def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        async with self.database.connection() as tx:
            return await (await tx.execute(statement, values)).fetchall()  # type: ignore[arg-type]
