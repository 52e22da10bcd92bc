"""A subscription's periods begin with it, touch, and end with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError, Refused
from farebox.base.ids import CustomerId, SubscriptionId
from farebox.base.time import Interval, Period, parse_instant
from farebox.domain.catalog import PERIOD_NAMES
from farebox.domain.subscription import (
    BillingAnchor,
    Status,
    Subscription,
    billing_period,
    billing_periods,
    runs_at,
)

MONTH = Interval(1, "month")


def subscription(
    start: str, end: str | None = None, anchor: BillingAnchor = "anniversary", zone: str = "UTC"
) -> Subscription:
    return Subscription(
        SubscriptionId("sub_1"),
        CustomerId("acme"),
        "pro",
        1,
        Status.ACTIVE,
        parse_instant(start),
        None if end is None else parse_instant(end),
        anchor,
        zone,
    )


def period(start: str, end: str) -> Period:
    return Period(parse_instant(start), parse_instant(end))


def periods_due(some: Subscription, interval: Interval, cutoff: datetime) -> list[Period]:
    """What an invoice at the cutoff may charge for as a whole."""
    return [p for p in billing_periods(some, interval, some.start_at, cutoff) if p.end <= cutoff]


@st.composite
def subscriptions(draw: st.DrawFn) -> Subscription:
    start = draw(
        st.datetimes(
            datetime.fromisoformat("2020-01-01"), datetime.fromisoformat("2027-01-01"), timezones=st.just(UTC)
        )
    )
    length = draw(st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=500)))
    return Subscription(
        SubscriptionId("sub_1"),
        CustomerId("acme"),
        "pro",
        1,
        Status.ACTIVE,
        start,
        None if length is None else start + length,
        draw(st.sampled_from(["anniversary", "calendar"])),
        draw(
            st.sampled_from(
                ["UTC", "Europe/Warsaw", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"]
            )
        ),
    )


INTERVALS = st.sampled_from(list(PERIOD_NAMES.values()))
AHEAD = st.timedeltas(timedelta(0), timedelta(days=800))


@given(subscriptions(), INTERVALS, AHEAD)
def test_due_periods_cover_the_subscription_from_its_start_without_gap(
    some: Subscription, interval: Interval, ahead: timedelta
) -> None:
    cutoff = some.start_at + ahead
    due = periods_due(some, interval, cutoff)

    assert all(p.end <= cutoff for p in due)
    assert all(a.end == b.start for a, b in pairwise(due))
    assert all(p.duration > timedelta(0) for p in due)
    assert [p.start for p in due[:1]] == [some.start_at][: len(due)]
    rest = due[-1].end if due else some.start_at
    if rest != some.end_at:
        assert billing_period(some, interval, rest).end > cutoff  # the next one is not over yet


@given(subscriptions(), INTERVALS, AHEAD)
def test_the_period_of_an_instant_is_one_of_those_that_fall_due(
    some: Subscription, interval: Interval, ahead: timedelta
) -> None:
    instant = some.start_at + ahead
    if not runs_at(some, instant):
        with pytest.raises(InvariantError):
            billing_period(some, interval, instant)
        return
    found = billing_period(some, interval, instant)

    assert instant in found
    assert found in periods_due(some, interval, found.end)


def test_a_calendar_subscription_begins_with_a_part_of_a_month() -> None:
    some = subscription("2026-08-18T12:00:00Z", anchor="calendar", zone="Europe/Rome")

    assert periods_due(some, MONTH, parse_instant("2026-10-01")) == [
        period("2026-08-18T12:00:00Z", "2026-08-31T22:00:00Z"),
        period("2026-08-31T22:00:00Z", "2026-09-30T22:00:00Z"),
    ]


def test_an_end_cuts_the_last_period_which_is_due_from_then_on() -> None:
    some = subscription("2026-01-15", end="2026-03-01")
    last = period("2026-02-15", "2026-03-01")

    assert billing_period(some, MONTH, parse_instant("2026-02-20")) == last
    assert periods_due(some, MONTH, parse_instant("2026-02-28"))[-1].end == parse_instant("2026-02-15")
    assert periods_due(some, MONTH, parse_instant("2026-03-01"))[-1] == last
    assert periods_due(some, MONTH, parse_instant("2027-01-01"))[-1] == last


def test_an_end_on_a_boundary_leaves_no_empty_period_behind() -> None:
    some = subscription("2026-01-15", end="2026-03-15")

    assert [p.end for p in periods_due(some, MONTH, parse_instant("2027-01-01"))] == [
        parse_instant("2026-02-15"),
        parse_instant("2026-03-15"),
    ]


def test_nothing_is_due_before_or_at_the_start() -> None:
    some = subscription("2026-01-15")

    assert periods_due(some, MONTH, parse_instant("2025-12-01")) == []
    assert periods_due(some, MONTH, parse_instant("2026-01-15")) == []


def test_a_subscription_covers_its_start_and_not_its_end() -> None:
    some = subscription("2026-01-15", end="2026-03-15")

    assert not runs_at(some, parse_instant("2026-01-14T23:59:59Z"))
    assert runs_at(some, parse_instant("2026-01-15"))
    assert runs_at(some, parse_instant("2026-03-14T23:59:59Z"))
    assert not runs_at(some, parse_instant("2026-03-15"))


@pytest.mark.parametrize("end", ["2026-01-15", "2026-01-01"])
def test_a_subscription_that_ends_before_it_begins_is_refused(end: str) -> None:
    with pytest.raises(Refused) as refused:
        subscription("2026-01-15", end=end)
    assert refused.value.reason.field == "end_date"


def test_billing_periods_are_found_whole_from_any_instant_on() -> None:
    some = subscription("2026-01-15", end="2026-04-01")

    assert list(billing_periods(some, MONTH, parse_instant("2026-02-20"), parse_instant("2026-03-16"))) == [
        period("2026-02-15", "2026-03-15"),
        period("2026-03-15", "2026-04-01"),
    ]
    assert list(billing_periods(some, MONTH, parse_instant("2026-04-01"), parse_instant("2027-01-01"))) == []
