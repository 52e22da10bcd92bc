"""Events come to one number a metric, whatever order they are read in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.domain.catalog import AGGREGATIONS, Aggregation, Metric
from farebox.domain.usage import UsageEvent, aggregate, event_faults

D = Decimal
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def metric(aggregation: Aggregation, **changes: Any) -> Metric:
    return Metric("m", "M", aggregation, "user" if aggregation == "unique_count" else None, **changes)


def event(
    value: str = "1", minutes: int = 0, batch: int = 0, event_id: str = "evt_1", **properties: Any
) -> UsageEvent:
    return UsageEvent(
        event_id,
        "cus",
        "m",
        D(value),
        NOON + timedelta(minutes=minutes),
        properties=properties,
        batch_id=batch,
    )


EVENTS = st.lists(
    st.builds(
        UsageEvent,
        event_id=st.uuids().map(str),
        customer_id=st.just("cus"),
        metric_key=st.just("m"),
        value=st.decimals(0, 10**9, places=4),
        timestamp=st.integers(0, 3).map(lambda minutes: NOON + timedelta(minutes=minutes)),
        properties=st.fixed_dictionaries(
            {}, optional={"user": st.sampled_from(["a", "b", 1, "1", True, None, 1.5])}
        ),
        batch_id=st.integers(0, 2),
    ),
    max_size=12,
)


@given(EVENTS, st.sampled_from(AGGREGATIONS), st.randoms())
def test_the_order_of_reading_never_changes_the_number(
    events: list[UsageEvent], aggregation: Aggregation, random: Any
) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)

    assert aggregate(metric(aggregation), shuffled) == aggregate(metric(aggregation), events)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("sum", "6"), ("count", "2"), ("max", "5"), ("min", "1"), ("last", "1"), ("unique_count", "1")],
)
def test_each_aggregation_gives_its_own_number(aggregation: Aggregation, expected: str) -> None:
    events = [event("5", minutes=0, user="a"), event("1", minutes=1, user="a")]

    assert aggregate(metric(aggregation), events) == D(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_events_come_to_zero(aggregation: Aggregation) -> None:
    assert aggregate(metric(aggregation), []) == 0


def test_of_two_events_at_the_same_time_the_one_that_arrived_later_is_the_last() -> None:
    earlier, later = event("7", batch=1, event_id="evt_z"), event("9", batch=2, event_id="evt_a")

    assert aggregate(metric("last"), [later, earlier]) == 9
    assert aggregate(metric("last"), [event("7", event_id="evt_a"), event("9", event_id="evt_b")]) == 9


def test_a_sum_keeps_every_digit() -> None:
    events = [event("9" * 40), event("0." + "0" * 29 + "1"), event("1E-18")]

    assert aggregate(metric("sum"), events) == D("9" * 40 + ".000000000000000001000000000001")


def test_unique_values_are_told_apart_as_their_text() -> None:
    users: list[Any] = ["a", "a", "b", 1, "1", 1.5, True, "true", None, ["x"]]
    events = [event(user=user) for user in users] + [event()]

    assert aggregate(metric("unique_count"), events) == 5  # a, b, 1, 1.5, true


@pytest.mark.parametrize(
    ("checked", "sent", "expected"),
    [
        (metric("sum"), event("1.5"), []),
        (metric("sum", value_type="integer"), event("1.5"), [("value", "VALUE_NOT_INTEGER")]),
        (metric("sum", value_type="integer"), event("2.0"), []),
        (metric("sum"), event("-1"), [("value", "DECIMAL_NEGATIVE")]),
        (metric("sum"), event("NaN"), [("value", "DECIMAL_NOT_FINITE")]),
        (metric("sum"), event("1E+40"), [("value", "DECIMAL_TOO_LARGE")]),
        (metric("sum", status="inactive"), event(), [("metric_key", "METRIC_INACTIVE")]),
        (metric("unique_count"), event(user="a"), []),
        (metric("unique_count"), event(), [("properties.user", "PROPERTY_MISSING")]),
        (metric("unique_count"), event(user={"id": 1}), [("properties.user", "PROPERTY_MISSING")]),
    ],
)
def test_an_event_the_metric_cannot_take_is_refused_with_its_field(
    checked: Metric, sent: UsageEvent, expected: list[tuple[str, str]]
) -> None:
    assert [(r.field, r.code) for r in event_faults(checked, sent)] == expected
