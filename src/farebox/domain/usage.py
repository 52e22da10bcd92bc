"""What was used: events, and the one number a period's events come to for a metric.

The order in which events are read never changes the number: ``last`` decides by timestamp, then by order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, localcontext
from typing import Any, Final, assert_never

from farebox.base.errors import Reason
from farebox.base.money import EXACT
from farebox.domain.catalog import QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX, Metric, decimal_faults

_ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One thing that happened. ``batch_id`` and then ``event_id`` give the order of arrival; ``timestamp`` decides the period."""

    event_id: str
    customer_id: str | None
    metric_key: str
    value: Decimal
    timestamp: datetime
    idempotency_key: str | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)
    batch_id: int = 0


def event_faults(metric: Metric, event: UsageEvent) -> list[Reason]:
    """Why the metric cannot take this event: inactive, a value out of bounds, a missing property."""
    faults = list(decimal_faults(event.value, "value", QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX))
    if metric.status != "active":
        faults.append(Reason("METRIC_INACTIVE", f"{metric.key} takes no new events", "metric_key"))
    if not faults and metric.value_type == "integer" and event.value != event.value.to_integral_value():
        faults.append(Reason("VALUE_NOT_INTEGER", f"{metric.key} counts whole units", "value"))
    if metric.aggregation == "unique_count" and _property_text(event, metric.property) is None:
        faults.append(
            Reason(
                "PROPERTY_MISSING",
                f"{metric.key} counts different values of {metric.property!r}: send it as text or a number",
                f"properties.{metric.property}",
            )
        )
    return faults


def aggregate(metric: Metric, events: Iterable[UsageEvent]) -> Decimal:
    """The metric's number for these events, exact; nothing at all comes to zero."""
    match metric.aggregation:
        case "sum":
            with localcontext(EXACT):
                return sum((e.value for e in events), _ZERO)
        case "count":
            return Decimal(sum(1 for _ in events))
        case "max":
            return max((e.value for e in events), default=_ZERO)
        case "min":
            return min((e.value for e in events), default=_ZERO)
        case "last":
            latest = max(events, key=_arrival, default=None)
            return _ZERO if latest is None else latest.value
        case "unique_count":
            texts = {_property_text(e, metric.property) for e in events}
            return Decimal(len(texts - {None}))
    assert_never(metric.aggregation)


def _arrival(event: UsageEvent) -> tuple[datetime, int, str]:
    return event.timestamp, event.batch_id, event.event_id


def _property_text(event: UsageEvent, name: str | None) -> str | None:
    """The property as PostgreSQL's ``->>`` gives it, so that SQL and this function count alike; None when absent."""
    value = event.properties.get(name) if name is not None else None
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return _number_text(Decimal(repr(value)))
        case Decimal():
            return _number_text(value)
    return None


def _number_text(number: Decimal) -> str:
    """Without exponent, trailing zeros kept; PostgreSQL knows no negative zero."""
    return f"{number if number else abs(number):f}"
