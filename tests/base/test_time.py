"""Periods touch and never overlap, in every zone, across every change of the clocks."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError, Refused
from farebox.base.time import (
    Anchor,
    Interval,
    Period,
    day_bounds,
    from_wall,
    local_day,
    parse_instant,
    to_rfc3339,
    zone_named,
)
from tests.periods import periods_of

DAY, WEEK, MONTH, QUARTER, YEAR = (
    Interval(1, "day"),
    Interval(1, "week"),
    Interval(1, "month"),
    Interval(3, "month"),
    Interval(1, "year"),
)
#: Half-hour changes, changes at midnight, a zone that skipped a day, zones without changes.
ZONES = [
    "UTC",
    "Europe/Warsaw",
    "America/New_York",
    "America/Juneau",
    "America/Sao_Paulo",
    "America/Havana",
    "America/Nuuk",
    "Africa/Cairo",
    "Asia/Kolkata",
    "Asia/Beirut",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Pacific/Chatham",
]
INTERVALS = st.sampled_from([DAY, WEEK, MONTH, QUARTER, YEAR, Interval(30, "day"), Interval(7, "day")])
FROM, TO = datetime.fromisoformat("2010-01-01"), datetime.fromisoformat("2035-01-01")
INSTANTS = st.datetimes(FROM, TO, timezones=st.just(UTC))
ANCHORS = st.builds(Anchor, INSTANTS, st.sampled_from(ZONES), st.booleans())


def at(text: str) -> datetime:
    return parse_instant(text)


def ends(anchor: Anchor, interval: Interval, until: str) -> list[str]:
    return [to_rfc3339(p.end) for p in periods_of(anchor, interval, at(until))]


# ── wall time ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wall", "zone", "instant"),
    [
        (
            "2026-03-29 02:30",
            "Europe/Warsaw",
            "2026-03-29T01:00:00Z",
        ),  # in the gap: the first instant after it
        ("2026-03-29 02:00", "Europe/Warsaw", "2026-03-29T01:00:00Z"),
        ("2026-03-29 03:00", "Europe/Warsaw", "2026-03-29T01:00:00Z"),
        ("2026-03-29 01:59", "Europe/Warsaw", "2026-03-29T00:59:00Z"),
        ("2026-10-25 02:30", "Europe/Warsaw", "2026-10-25T00:30:00Z"),  # twice: the earlier
        ("2018-11-04 00:00", "America/Sao_Paulo", "2018-11-04T03:00:00Z"),  # no midnight that day
        ("2026-10-04 02:15", "Australia/Lord_Howe", "2026-10-03T15:30:00Z"),  # a gap of half an hour
        ("2011-12-30 12:00", "Pacific/Apia", "2011-12-30T10:00:00Z"),  # the day that was left out
    ],
)
def test_a_wall_time_means_the_earlier_of_two_or_the_first_instant_after_a_gap(
    wall: str, zone: str, instant: str
) -> None:
    assert from_wall(datetime.fromisoformat(wall), ZoneInfo(zone)) == at(instant)


@given(st.datetimes(FROM, TO), st.sampled_from(ZONES))
def test_wall_time_never_runs_backwards_and_never_ahead(wall: datetime, zone: str) -> None:
    z = ZoneInfo(zone)
    instant = from_wall(wall, z)
    shown = instant.astimezone(z).replace(tzinfo=None)

    assert shown >= wall
    assert from_wall(wall + timedelta(minutes=1), z) >= instant
    # nothing earlier in the same hour already showed this time or a later one
    for minutes in range(1, 60):
        before = (instant - timedelta(minutes=minutes)).astimezone(z).replace(tzinfo=None)
        assert before != wall


@given(INSTANTS, st.sampled_from(ZONES))
def test_an_instant_lies_in_its_own_local_day(instant: datetime, zone: str) -> None:
    day = day_bounds(local_day(instant, zone), zone)

    assert instant in day
    assert day.duration <= timedelta(hours=25)


@pytest.mark.parametrize(
    ("day", "hours"), [(date(2026, 3, 29), 23), (date(2026, 10, 25), 25), (date(2026, 6, 1), 24)]
)
def test_a_local_day_has_23_24_or_25_hours(day: date, hours: int) -> None:
    assert day_bounds(day, "Europe/Warsaw").duration == timedelta(hours=hours)


@pytest.mark.parametrize(
    "zone", ["", "Europe/Warschau", "../../etc/passwd", "localtime", "right/UTC", "é", "a\0b", "X" * 999]
)
def test_a_zone_that_is_not_an_iana_name_is_refused(zone: str) -> None:
    with pytest.raises(Refused) as refused:
        zone_named(zone)
    assert refused.value.reason.code == "TIMEZONE_UNKNOWN"
    assert refused.value.reason.field == "timezone"


# ── anchors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(ANCHORS, INTERVALS, INSTANTS)
def test_an_instant_is_in_the_period_found_for_it_and_the_neighbours_touch(
    anchor: Anchor, interval: Interval, instant: datetime
) -> None:
    period = anchor.period_at(interval, instant)

    assert instant in period
    assert anchor.period_at(interval, period.end).start == period.end
    assert anchor.period_at(interval, period.start - timedelta(microseconds=1)).end == period.start
    assert anchor.period_at(interval, period.start) == period


@given(ANCHORS, INTERVALS)
def test_the_first_period_starts_at_the_anchor_and_the_rest_follow_without_gap(
    anchor: Anchor, interval: Interval
) -> None:
    until = anchor.at + timedelta(days=100)
    periods = periods_of(anchor, interval, until)

    assert periods[0].start == anchor.at
    assert all(a.end == b.start for a, b in pairwise(periods))
    assert periods[-1].start < until <= periods[-1].end
    assert all(p.duration > timedelta(0) for p in periods)


@given(ANCHORS, st.integers(-20, 20))
def test_a_monthly_boundary_shows_the_anchors_day_or_the_last_of_a_shorter_month(
    anchor: Anchor, n: int
) -> None:
    zone = ZoneInfo(anchor.zone)
    shown = anchor.boundary(MONTH, n).astimezone(zone)
    wanted = 1 if anchor.calendar else anchor.at.astimezone(zone).day
    last = monthrange(shown.year, shown.month)[1]

    assert (
        shown.day == min(wanted, last) or shown.day == min(wanted, last) + 1
    )  # a gap may end on the next day


def test_the_31st_comes_back_after_february_at_local_midnight() -> None:
    anchor = Anchor(at("2026-01-30T23:00:00Z"), "Europe/Warsaw")

    assert ends(anchor, MONTH, "2026-05-30") == [
        "2026-02-27T23:00:00Z",
        "2026-03-30T22:00:00Z",
        "2026-04-29T22:00:00Z",
        "2026-05-30T22:00:00Z",
    ]


def test_a_daily_period_that_would_begin_in_a_gap_begins_right_after_it() -> None:
    anchor = Anchor(at("2026-03-28T01:30:00Z"), "Europe/Warsaw")  # 02:30

    assert ends(anchor, DAY, "2026-03-31") == [
        "2026-03-29T01:00:00Z",
        "2026-03-30T00:30:00Z",
        "2026-03-31T00:30:00Z",
    ]


def test_an_anchor_in_the_second_of_two_equal_hours_stays_where_it_is() -> None:
    second = at("2026-10-25T01:30:00Z")  # 02:30 in Warsaw for the second time that night
    anchor = Anchor(second, "Europe/Warsaw")

    assert anchor.boundary(MONTH, 0) == second
    assert anchor.period_at(MONTH, second) == Period(second, at("2026-11-25T01:30:00Z"))
    assert anchor.period_at(MONTH, at("2026-10-25T00:45:00Z")).end == second


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (WEEK, ["2026-05-17T22:00:00Z", "2026-05-24T22:00:00Z"]),  # Mondays
        (MONTH, ["2026-05-31T22:00:00Z", "2026-06-30T22:00:00Z"]),
        (QUARTER, ["2026-06-30T22:00:00Z", "2026-09-30T22:00:00Z"]),
        (Interval(6, "month"), ["2026-06-30T22:00:00Z", "2026-12-31T23:00:00Z"]),
        (YEAR, ["2026-12-31T23:00:00Z", "2027-12-31T23:00:00Z"]),
        (Interval(10, "day"), ["2026-05-22T22:00:00Z", "2026-06-01T22:00:00Z"]),
    ],
)
def test_calendar_periods_end_with_the_calendars_own(interval: Interval, expected: list[str]) -> None:
    anchor = Anchor(at("2026-05-13T15:00:00Z"), "Europe/Warsaw", calendar=True)
    first = anchor.period_at(interval, anchor.at)
    second = anchor.period_at(interval, first.end)

    assert first.start == anchor.at
    assert [to_rfc3339(first.end), to_rfc3339(second.end)] == expected


def test_quarters_from_a_month_end_remember_the_day() -> None:
    anchor = Anchor(at("2025-11-30T00:00:00Z"))

    assert ends(anchor, QUARTER, "2026-11-29") == [
        "2026-02-28T00:00:00Z",
        "2026-05-30T00:00:00Z",
        "2026-08-30T00:00:00Z",
        "2026-11-30T00:00:00Z",
    ]


def test_a_day_that_a_zone_left_out_makes_no_empty_period() -> None:
    anchor = Anchor(at("2011-12-29T10:00:00Z"), "Pacific/Apia")  # midnight on 29 December

    assert ends(anchor, DAY, "2012-01-01") == [
        "2011-12-30T10:00:00Z",
        "2011-12-31T10:00:00Z",
        "2012-01-01T10:00:00Z",
    ]


def test_the_end_of_time_is_refused_and_not_a_crash() -> None:
    with pytest.raises(Refused) as refused:
        Anchor(at("2026-01-31")).period_at(MONTH, at("9999-12-31"))
    assert refused.value.reason.code == "DATE_OUT_OF_RANGE"


def test_an_interval_of_nothing_stops_the_line() -> None:
    with pytest.raises(InvariantError):
        Interval(0, "month")


# ── periods and instants ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_period_holds_its_start_and_not_its_end() -> None:
    period = Period(at("2026-01-01"), at("2026-02-01"))

    assert at("2026-01-01") in period
    assert at("2026-01-31T23:59:59.999999Z") in period
    assert at("2026-02-01") not in period


def test_a_period_compares_instants_and_not_wall_clocks() -> None:
    zone = ZoneInfo("Europe/Warsaw")
    first = datetime(2026, 10, 25, 2, 45, tzinfo=zone)
    later = datetime(
        2026, 10, 25, 2, 15, tzinfo=zone, fold=1
    )  # half an hour after, though the clock shows less

    assert Period(first, later).duration == timedelta(minutes=30)
    assert Period(first, later).start.tzinfo is UTC


def test_naive_times_and_backward_periods_stop_the_line() -> None:
    with pytest.raises(InvariantError):
        Period(datetime(2026, 1, 1), at("2026-02-01"))  # noqa: DTZ001
    with pytest.raises(InvariantError):
        Anchor(datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(InvariantError):
        Period(at("2026-02-01"), at("2026-01-01"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00Z"),
        ("2026-11-21t10:00:00z", "2026-11-21T10:00:00Z"),
        ("2026-11-21 10:00:00+02:00", "2026-11-21T08:00:00Z"),
        ("2026-11-21T10:00:00.123456789Z", "2026-11-21T10:00:00.123456Z"),
        ("2026-11-21T10:00:00.5-00:30", "2026-11-21T10:30:00.500000Z"),
        ("2026-11-21", "2026-11-21T00:00:00Z"),
    ],
)
def test_an_instant_is_read_and_written_in_utc(text: str, expected: str) -> None:
    assert to_rfc3339(parse_instant(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-21T10:00:00",
        "2026-W47-6",
        "20261121",
        "20261121T101010Z",
        "2026-11-21T10Z",
        "2026-11-21T10:00Z",
        "2026-13-01",
        "2026-02-30",
        "2026-11-21T24:00:00Z",
        "2026-11-21T10:00:60Z",
        "2026-11-21T10:00:00+25:00",
        "0001-01-01T00:00:00+14:00",
        "٢٠٢٦-11-21",
        "2026-11-21\n",
        "1763719200",
    ],
)
def test_other_spellings_of_time_are_refused_with_their_field(text: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_instant(text, "timestamp")
    assert refused.value.reason.code == "TIMESTAMP_MALFORMED"
    assert refused.value.reason.field == "timestamp"


@given(st.datetimes(timezones=st.just(UTC)))
def test_writing_an_instant_and_reading_it_back_is_the_same_instant(instant: datetime) -> None:
    assert parse_instant(to_rfc3339(instant)) == instant
