"""Usage: events come in by the raw endpoints here, and are read back as events, summaries and exact totals.

``POST /v1/events`` and ``/v1/events/batch`` do not go through FastAPI: at thousands a second its checks would cost more
than the work. Their shapes are read by msgspec (app/events.py), their answers written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final

import msgspec
from fastapi import APIRouter, Query

from farebox.api.errors import status_of
from farebox.api.front import Hot, HotRequest, Reply
from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    Reader,
    listed,
    moment,
    number,
    router,
)
from farebox.app.documents.scalars import Instant, Key
from farebox.app.event_log import EventLog
from farebox.app.events import IncomingEvent, event_from, read_batch, read_event
from farebox.app.metering import Accepted, Metering, UsageExact, UsageSummary
from farebox.base.errors import Reason, refuse
from farebox.base.time import Period
from farebox.domain.usage import UsageEvent
from farebox.protocols import strict_json

_ENCODER: Final = msgspec.json.Encoder()


def event_endpoints(metering: Metering) -> dict[tuple[str, str], Hot]:
    """The raw endpoints by (method, path)."""

    async def accept_event(request: HotRequest) -> Reply:
        request.caller.need("events:write")
        accepted = await metering.accept_one(_single(request))
        return Reply(202, _ENCODER.encode(_queued(accepted)))

    async def accept_events(request: HotRequest) -> Reply:
        request.caller.need("events:write")
        results = await metering.accept_batch(read_batch(request.body))
        return Reply(207, _ENCODER.encode({"results": [_result(result) for result in results]}))

    return {("POST", "/v1/events"): accept_event, ("POST", "/v1/events/batch"): accept_events}


def _single(request: HotRequest) -> IncomingEvent:
    """The event; its key may stand in the ``Idempotency-Key`` header instead of in the body (the body's wins)."""
    header = request.headers.get(b"idempotency-key")
    if header is None or b'"idempotency_key"' in request.body:
        return read_event(request.body)
    document = strict_json.loads(request.body, "EVENT_MALFORMED")
    if not isinstance(document, dict):
        raise refuse("EVENT_MALFORMED", "an event is a JSON object")
    return event_from({**document, "idempotency_key": header.decode("latin-1").strip()})


def _queued(accepted: Accepted) -> dict[str, str]:
    return {
        "event_id": accepted.event_id,
        "status": "queued",
        "idempotency_key": accepted.idempotency_key,
    }


def _result(result: Accepted | Reason) -> dict[str, Any]:
    if isinstance(result, Accepted):
        return _queued(result)
    error = {"code": result.code, "message": result.message, "field": result.field}
    return {"status": "rejected", "http_status": status_of(result.code), "error": error}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class EventAnswer(Answer):
    """A usage event as stored."""

    event_id: str
    customer_id: str | None
    metric_key: str
    value: str
    timestamp: str
    idempotency_key: str | None
    properties: dict[str, Any]


class SummaryMeta(Answer):
    """``lag_seconds`` is the age of the oldest usage that is not in the summary yet."""

    lag_seconds: float


class DayAnswer(Answer):
    """One day in the customer's zone."""

    day: str
    value: str
    events: int


class SummaryAnswer(Answer):
    """Usage from the rollup of days."""

    customer_id: str
    metric_key: str
    aggregation: str
    period_start: str
    period_end: str
    value: str
    events: int
    days: list[DayAnswer]
    meta: SummaryMeta


class ExactMeta(Answer):
    """``late_event_count`` are events that came in after their period was invoiced."""

    late_event_count: int


class ExactAnswer(Answer):
    """Usage from every single event."""

    customer_id: str
    metric_key: str
    aggregation: str
    period_start: str
    period_end: str
    value: str
    events: int
    meta: ExactMeta


class ComputeUsage(Body):
    """Which usage to compute."""

    not_yet: ClassVar[Mapping[str, str]] = {"group_by": "grouping is", "window": "windows are"}

    customer_id: str
    metric_key: Key
    period_start: Instant
    period_end: Instant


def period(start: datetime, end: datetime) -> Period:
    """``[start, end)``; refused when it is empty or runs backwards."""
    if end <= start:
        raise refuse("PERIOD_INVALID", "period_end must be after period_start", "period_end")
    return Period(start, end)


def event_answer(event: UsageEvent) -> EventAnswer:
    return EventAnswer(
        event_id=event.event_id,
        customer_id=event.customer_id,
        metric_key=event.metric_key,
        value=number(event.value),
        timestamp=moment(event.timestamp),
        idempotency_key=event.idempotency_key,
        properties=dict(event.properties),
    )


def _summary(summary: UsageSummary) -> SummaryAnswer:
    return SummaryAnswer(
        customer_id=summary.customer_id,
        metric_key=summary.metric_key,
        aggregation=summary.aggregation,
        period_start=moment(summary.period.start),
        period_end=moment(summary.period.end),
        value=number(summary.value),
        events=summary.events,
        days=[DayAnswer(day=d.day.isoformat(), value=number(d.value), events=d.events) for d in summary.days],
        meta=SummaryMeta(lag_seconds=summary.lag_s),
    )


def _exact(exact: UsageExact) -> ExactAnswer:
    return ExactAnswer(
        customer_id=exact.customer_id,
        metric_key=exact.metric_key,
        aggregation=exact.aggregation,
        period_start=moment(exact.period.start),
        period_end=moment(exact.period.end),
        value=number(exact.value),
        events=exact.events,
        meta=ExactMeta(late_event_count=exact.late_events),
    )


def usage(metering: Metering, events: EventLog) -> APIRouter:
    """``GET /v1/events`` and ``/v1/usage``."""
    api = router("usage")

    @api.get("/events")
    async def list_events(
        caller: Reader,
        customer_id: str | None = None,
        metric_key: str | None = None,
        period_start: Annotated[Instant | None, Query()] = None,
        period_end: Annotated[Instant | None, Query()] = None,
        limit: Limit = LIMIT_DEFAULT,
        cursor: Cursor = None,
    ) -> Listed[EventAnswer]:
        """Newest first. Without a period: the last 31 days of a customer, or the last day of all."""
        page = await events.list(customer_id, metric_key, period_start, period_end, limit, cursor)
        return listed(page, event_answer)

    @api.get("/usage/summary")
    async def usage_summary(
        caller: Reader,
        customer_id: str,
        metric_key: str,
        period_start: Annotated[Instant, Query()],
        period_end: Annotated[Instant, Query()],
    ) -> SummaryAnswer:
        """Fast and a little behind: `meta.lag_seconds` says how much."""
        return _summary(await metering.summary(customer_id, metric_key, period(period_start, period_end)))

    @api.post("/usage/compute")
    async def compute_usage(caller: Reader, body: ComputeUsage) -> ExactAnswer:
        """Exact, from every event."""
        span = period(body.period_start, body.period_end)
        return _exact(await metering.compute(body.customer_id, body.metric_key, span))

    return api
