"""The events themselves, to look at: what came in, newest first."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.app.ports.clock import BusinessClock
from farebox.base.errors import Refused, refuse
from farebox.base.time import Period, parse_instant, to_rfc3339
from farebox.domain.usage import UsageEvent
from farebox.store import event_list
from farebox.store.pool import Database

#: Events may be stamped up to an hour ahead.
AHEAD: Final = timedelta(hours=2)
DAYS_OF_CUSTOMER: Final = 31
DAYS_OF_ALL: Final = 1
DAYS_MAX: Final = 400
_BEGINNING_OF_TIME: Final = datetime.min.replace(tzinfo=UTC)


class EventLog:
    """Reads usage events."""

    def __init__(self, database: Database, business_date: BusinessClock) -> None:
        self._database = database
        self._business_date = business_date

    async def list(
        self,
        customer_id: str | None = None,
        metric_key: str | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[UsageEvent]:
        """Newest first. Without a period: the last 31 days of a customer, or the last day of all.

        Refuses ``PERIOD_EMPTY``, ``PERIOD_TOO_LONG`` (400 days) and ``CURSOR_INVALID``.
        """
        end = end or await self._business_date.now() + AHEAD
        days = timedelta(days=DAYS_OF_CUSTOMER if customer_id else DAYS_OF_ALL)
        start = start or max(end, _BEGINNING_OF_TIME + days) - days
        if end <= start:
            raise refuse("PERIOD_EMPTY", "period_end must be after period_start", "period_end")
        if end - start > timedelta(days=DAYS_MAX):
            raise refuse("PERIOD_TOO_LONG", f"look at {DAYS_MAX} days at most", "period_start")
        seen = _seen(decode_cursor(cursor))
        async with self._database.connection() as tx:
            rows = await event_list.list_before(
                tx, Period(start, end), seen, rows_wanted(limit), customer_id, metric_key
            )
        return page_of(rows, limit, lambda event: f"{to_rfc3339(event.timestamp)}\n{event.event_id}")


def _seen(cursor: str | None) -> event_list.Seen | None:
    if cursor is None:
        return None
    timestamp, _, event_id = cursor.partition("\n")
    try:
        return event_list.Seen(parse_instant(timestamp), event_id)
    except Refused:
        raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor") from None
