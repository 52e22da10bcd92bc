"""Usage events as people read them, newest first; metering writes them (store/usage)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from farebox.base.time import Period
from farebox.domain.usage import UsageEvent
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class Seen:
    """The last event of the page before: its instant, and its id among those of the same instant."""

    timestamp: datetime
    event_id: str


# Index usage_event_read (customer_id, metric_key, timestamp); days outside the period are not looked at.
OF_CUSTOMER: LiteralString = """
    SELECT event_id, customer_id, metric_key, value, "timestamp", idempotency_key, properties, batch_id
      FROM usage_event
     WHERE customer_id = %(customer_id)s
       AND (%(metric_key)s::text IS NULL OR metric_key = %(metric_key)s)
       AND "timestamp" >= %(start)s AND "timestamp" < %(end)s
       AND ("timestamp", event_id) < (%(seen_at)s, %(seen_id)s)
     ORDER BY "timestamp" DESC, event_id DESC
     LIMIT %(rows)s"""

# No index but the partitions: the period is what keeps it short.
OF_ALL: LiteralString = """
    SELECT event_id, customer_id, metric_key, value, "timestamp", idempotency_key, properties, batch_id
      FROM usage_event
     WHERE (%(metric_key)s::text IS NULL OR metric_key = %(metric_key)s)
       AND "timestamp" >= %(start)s AND "timestamp" < %(end)s
       AND ("timestamp", event_id) < (%(seen_at)s, %(seen_id)s)
     ORDER BY "timestamp" DESC, event_id DESC
     LIMIT %(rows)s"""


async def list_before(
    tx: Tx, period: Period, seen: Seen | None, rows: int, customer_id: str | None, metric_key: str | None
) -> list[UsageEvent]:
    """Events of a period before ``seen`` (None: from the end), newest first."""
    values = {
        "customer_id": customer_id,
        "metric_key": metric_key,
        "start": period.start,
        "end": period.end,
        "seen_at": seen.timestamp if seen else period.end,
        "seen_id": seen.event_id if seen else "",
        "rows": rows,
    }
    if customer_id is None:
        del values["customer_id"]
        cursor = await tx.execute(OF_ALL, values)
    else:
        cursor = await tx.execute(OF_CUSTOMER, values)
    return [_event(row) for row in await cursor.fetchall()]


def _event(row: tuple[Any, ...]) -> UsageEvent:
    return UsageEvent(*row)
