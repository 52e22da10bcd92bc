"""Subscriptions: a customer on a plan version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    Reader,
    Writer,
    listed,
    moment,
    moment_or_none,
    router,
)
from farebox.app.documents.scalars import Instant
from farebox.app.subscriptions import StoredSubscription, Subscriptions


class NewSubscription(Body):
    """Who is on which plan from when. No `plan_version`: the newest open one; no `start_date`: now."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "trial_days": "trials are",
        "overrides": "overrides are",
        "quantities": "quantities are",
    }

    customer_id: str
    plan_id: str
    plan_version: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    start_date: Instant | None = None
    end_date: Instant | None = None
    billing_anchor: Literal["anniversary", "calendar"] = "anniversary"


class SubscriptionAnswer(Answer):
    """A subscription."""

    id: str
    customer_id: str
    plan_id: str
    plan_version: int
    status: str
    start_date: str
    end_date: str | None
    billing_anchor: str
    timezone: str
    created_at: str


def subscription_answer(stored: StoredSubscription) -> SubscriptionAnswer:
    s = stored.subscription
    return SubscriptionAnswer(
        id=s.id,
        customer_id=s.customer_id,
        plan_id=s.plan_id,
        plan_version=s.plan_version,
        status=str(s.status),
        start_date=moment(s.start_at),
        end_date=moment_or_none(s.end_at),
        billing_anchor=s.billing_anchor,
        timezone=s.timezone,
        created_at=moment(stored.created_at),
    )


def subscriptions(subscriptions: Subscriptions) -> APIRouter:
    """``/v1/subscriptions``."""
    api = router("subscriptions")

    @api.post("/subscriptions", status_code=201)
    async def create_subscription(caller: Writer, body: NewSubscription) -> SubscriptionAnswer:
        """Put a customer on a plan; the gateways hear of it at once."""
        stored = await subscriptions.create(
            caller.actor,
            body.customer_id,
            body.plan_id,
            start=body.start_date,
            plan_version_number=body.plan_version,
            end=body.end_date,
            billing_anchor=body.billing_anchor,
            within=caller.within,
        )
        return subscription_answer(stored)

    @api.get("/subscriptions")
    async def list_subscriptions(
        caller: Reader, customer_id: str | None = None, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[SubscriptionAnswer]:
        """Oldest first."""
        return listed(await subscriptions.list(customer_id, limit, cursor), subscription_answer)

    @api.get("/subscriptions/{subscription_id}")
    async def get_subscription(caller: Reader, subscription_id: str) -> SubscriptionAnswer:
        return subscription_answer(await subscriptions.get(subscription_id))

    return api
