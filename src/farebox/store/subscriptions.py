"""Subscriptions: a customer on one plan version, from a start to an end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from farebox.base.ids import CustomerId, SubscriptionId
from farebox.domain.catalog import PlanVersion, plan_from_document
from farebox.domain.subscription import Status, Subscription
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class StoredSubscription:
    """A subscription as stored."""

    subscription: Subscription
    created_at: datetime


ADD: LiteralString = """
    INSERT INTO subscription
           (id, customer_id, plan_id, plan_version, status, start_at, end_at, billing_anchor, timezone)
    VALUES (%(id)s, %(customer_id)s, %(plan_id)s, %(plan_version)s, %(status)s, %(start_at)s, %(end_at)s,
            %(billing_anchor)s, %(timezone)s)
    RETURNING id, customer_id, plan_id, plan_version, status, start_at, end_at, billing_anchor, timezone, created_at"""


async def add(tx: Tx, subscription: Subscription) -> StoredSubscription:
    """Store a new subscription; the caller holds the customer."""
    row = await (
        await tx.execute(
            ADD,
            {
                "id": subscription.id,
                "customer_id": subscription.customer_id,
                "plan_id": subscription.plan_id,
                "plan_version": subscription.plan_version,
                "status": str(subscription.status),
                "start_at": subscription.start_at,
                "end_at": subscription.end_at,
                "billing_anchor": subscription.billing_anchor,
                "timezone": subscription.timezone,
            },
        )
    ).fetchone()
    assert row is not None
    return _stored(row)


# Primary key.
GET: LiteralString = """
    SELECT id, customer_id, plan_id, plan_version, status, start_at, end_at, billing_anchor, timezone, created_at
      FROM subscription
     WHERE id = %(id)s"""


async def get(tx: Tx, subscription_id: str) -> StoredSubscription | None:
    """The subscription with this id."""
    row = await (await tx.execute(GET, {"id": subscription_id})).fetchone()
    return None if row is None else _stored(row)


# Primary key order; a filter on the customer takes subscription_customer and sorts the few.
LIST: LiteralString = """
    SELECT id, customer_id, plan_id, plan_version, status, start_at, end_at, billing_anchor, timezone, created_at
      FROM subscription
     WHERE id > %(after)s AND (%(customer_id)s::text IS NULL OR customer_id = %(customer_id)s)
     ORDER BY id
     LIMIT %(rows)s"""


async def list_after(tx: Tx, customer_id: str | None, after: str, rows: int) -> list[StoredSubscription]:
    """Subscriptions, oldest first; of one customer or of all."""
    cursor = await tx.execute(LIST, {"customer_id": customer_id, "after": after, "rows": rows})
    return [_stored(row) for row in await cursor.fetchall()]


# Index subscription_customer.
OF_CUSTOMER: LiteralString = """
    SELECT id, customer_id, plan_id, plan_version, status, start_at, end_at, billing_anchor, timezone, created_at
      FROM subscription
     WHERE customer_id = %(customer_id)s
     ORDER BY id"""


async def of_customer(tx: Tx, customer_id: str) -> list[Subscription]:
    """All subscriptions of a customer, oldest first, ended ones included."""
    cursor = await tx.execute(OF_CUSTOMER, {"customer_id": customer_id})
    return [_stored(row).subscription for row in await cursor.fetchall()]


# Index subscription_customer, then the plan's primary key.
WITH_PLANS: LiteralString = """
    SELECT s.id, s.customer_id, s.plan_id, s.plan_version, s.status, s.start_at, s.end_at, s.billing_anchor, s.timezone,
           s.created_at, p.document
      FROM subscription s
      JOIN price_plan_version p ON p.plan_id = s.plan_id AND p.version = s.plan_version
     WHERE s.customer_id = %(customer_id)s
       AND s.start_at < %(before)s
       AND (s.end_at IS NULL OR s.end_at > %(after)s)
     ORDER BY s.id"""


async def with_plans(
    tx: Tx, customer_id: str, after: datetime, before: datetime
) -> list[tuple[Subscription, PlanVersion]]:
    """The customer's subscriptions that run at some time in ``(after, before)``, with their plan versions, oldest first."""
    cursor = await tx.execute(WITH_PLANS, {"customer_id": customer_id, "after": after, "before": before})
    return [
        (_stored(row).subscription, plan_from_document(row[2], row[3], row[10]))
        for row in await cursor.fetchall()
    ]


# A sequential read of a small table, by the worker, once a round; rows are taken in id order against deadlocks.
END_DUE: LiteralString = """
    UPDATE subscription
       SET status = 'ended'
     WHERE id IN (SELECT id FROM subscription
                   WHERE status <> 'ended' AND end_at <= %(now)s
                   ORDER BY id LIMIT %(rows_max)s FOR UPDATE SKIP LOCKED)
    RETURNING customer_id"""


async def end_due(tx: Tx, now: datetime, rows_max: int) -> list[str]:
    """Mark subscriptions ended whose end has come; returns their customers (who need a new grant)."""
    cursor = await tx.execute(END_DUE, {"now": now, "rows_max": rows_max})
    return [row[0] for row in await cursor.fetchall()]


def _stored(row: tuple[Any, ...]) -> StoredSubscription:
    subscription = Subscription(
        id=SubscriptionId(row[0]),
        customer_id=CustomerId(row[1]),
        plan_id=row[2],
        plan_version=row[3],
        status=Status(row[4]),
        start_at=row[5],
        end_at=row[6],
        billing_anchor=row[7],
        timezone=row[8],
    )
    return StoredSubscription(subscription, row[9])
