"""What is on record about a customer's entitlements, in one read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import LiteralString

from farebox.domain.catalog import PlanVersion, plan_from_document
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class Standing:
    """The plans of the running subscriptions (without their charges), and what is used of each limited feature.

    ``counted_until`` is when the grant that names the counters runs out; None: there is no living grant.
    """

    plans: tuple[PlanVersion, ...]
    used: dict[str, Decimal]
    counted_until: datetime | None


# Every part by an index: customer and plan by primary key, subscription_customer, admission_grant_subject_unique, the
# counters by primary key, their open leases by lease_open_counter. Charges stay in the database: nobody prices here.
STANDING: LiteralString = """
    SELECT (SELECT jsonb_agg(jsonb_build_array(s.plan_id, s.plan_version, p.document || '{"charges": []}') ORDER BY s.id)
              FROM subscription s
              JOIN price_plan_version p ON p.plan_id = s.plan_id AND p.version = s.plan_version
             WHERE s.customer_id = c.id AND s.start_at <= %(now)s AND (s.end_at IS NULL OR s.end_at > %(now)s)),
           (SELECT jsonb_object_agg(k.feature_key,
                       (k.spent - coalesce((SELECT sum(l.granted - l.used) FROM lease l
                                             WHERE l.counter_id = k.id AND l.closed_at IS NULL), 0))::text)
              FROM jsonb_array_elements(g.limits) AS named
              JOIN limit_counter k ON k.id = named ->> 'counter_id'),
           CASE WHEN g.revoked_at IS NULL THEN g.expires_at END
      FROM customer c
      LEFT JOIN admission_grant g ON g.subject_kind = 'customer' AND g.subject_id = c.id
     WHERE c.id = %(customer_id)s"""


async def standing(tx: Tx, customer_id: str, now: datetime) -> Standing | None:
    """What is on record for a customer at an instant; None: there is no such customer."""
    row = await (await tx.execute(STANDING, {"customer_id": customer_id, "now": now})).fetchone()
    if row is None:
        return None
    plans = tuple(
        plan_from_document(plan_id, version, document) for plan_id, version, document in row[0] or ()
    )
    return Standing(plans, {key: Decimal(used) for key, used in (row[1] or {}).items()}, row[2])


# Read once a round by the worker; a sequential read of subscriptions and grants.
DUE: LiteralString = """
    SELECT s.customer_id
      FROM subscription s
      LEFT JOIN admission_grant g ON g.subject_kind = 'customer' AND g.subject_id = s.customer_id
     WHERE s.status <> 'ended' AND s.start_at <= %(now)s AND (s.end_at IS NULL OR s.end_at > %(now)s)
       AND (g.id IS NULL OR g.revoked_at IS NOT NULL OR g.expires_at <= %(now)s)
     UNION
    SELECT g.subject_id
      FROM admission_grant g
     WHERE g.subject_kind = 'customer' AND g.revoked_at IS NULL AND g.expires_at <= %(now)s
     ORDER BY 1
     LIMIT %(rows_max)s"""


async def due(tx: Tx, now: datetime, rows_max: int) -> list[str]:
    """Customers whose grant no longer says what their subscriptions say."""
    return [row[0] for row in await (await tx.execute(DUE, {"now": now, "rows_max": rows_max})).fetchall()]
