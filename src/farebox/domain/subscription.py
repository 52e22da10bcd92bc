"""A customer's subscription to one plan version: its life, and which billing periods it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

from farebox.base.errors import InvariantError, refuse
from farebox.base.ids import CustomerId, SubscriptionId
from farebox.base.time import Anchor, Interval, Period

BillingAnchor = Literal["anniversary", "calendar"]


class Status(StrEnum):
    ACTIVE = "active"
    CANCELED = "canceled"  # still running, and will end at end_at
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Subscription:
    """``[start_at, end_at)`` on one plan version. ``timezone`` is the customer's zone when it began: moving house does
    not move the boundaries."""

    id: SubscriptionId
    customer_id: CustomerId
    plan_id: str
    plan_version: int
    status: Status
    start_at: datetime
    end_at: datetime | None = None
    billing_anchor: BillingAnchor = "anniversary"
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.end_at is not None and self.end_at <= self.start_at:
            raise refuse("SUBSCRIPTION_ENDS_EARLY", "end_date must be after start_date", "end_date")


def runs_at(subscription: Subscription, instant: datetime) -> bool:
    """Whether the subscription covers the instant: begun, and not yet at its end."""
    begun = subscription.start_at <= instant
    return begun and (subscription.end_at is None or instant < subscription.end_at)


def billing_period(subscription: Subscription, interval: Interval, instant: datetime) -> Period:
    """The billing period that contains the instant, cut at the subscription's start and end.

    Ask ``runs_at`` first: an instant outside the subscription is in no period (``InvariantError``).
    """
    if not runs_at(subscription, instant):
        raise InvariantError(f"{instant.isoformat()} is outside subscription {subscription.id}")
    return _cut(subscription, _anchor(subscription).period_at(interval, instant))


def billing_periods(
    subscription: Subscription, interval: Interval, start: datetime, until: datetime
) -> Iterator[Period]:
    """The billing periods that touch ``[start, until)``, whole, oldest first."""
    start = max(start, subscription.start_at)
    if subscription.end_at is not None:
        until = min(until, subscription.end_at)
    while start < until:
        period = billing_period(subscription, interval, start)
        yield period
        start = period.end


def _anchor(subscription: Subscription) -> Anchor:
    return Anchor(
        subscription.start_at, subscription.timezone, calendar=subscription.billing_anchor == "calendar"
    )


def _cut(subscription: Subscription, period: Period) -> Period:
    start = max(period.start, subscription.start_at)
    end = period.end if subscription.end_at is None else min(period.end, subscription.end_at)
    return Period(start, end)
