"""Time: aware UTC instants, half-open periods, billing anchors. All zone arithmetic lives here and nowhere else.

Boundaries are computed in the customer's zone and returned in UTC. The *anchor* is remembered, not the last boundary,
so the 31st comes back after a February. A wall time inside a spring gap means the first instant after it; one that
occurs twice in autumn means the earlier.
"""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from farebox.base.errors import InvariantError, refuse

Unit = Literal["day", "week", "month", "year"]

_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})\Z",
    re.ASCII,
)
_ZONE = re.compile(r"[A-Z][A-Za-z0-9_+/-]{0,63}\Z", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z", re.ASCII)
#: Mean days of a unit, to land near the right period before looking closely.
_DAYS: Final = {"day": 1.0, "week": 7.0, "month": 30.436875, "year": 365.2425}


@dataclass(frozen=True, slots=True)
class Period:
    """``[start, end)`` in UTC. Any aware instants may be given: two datetimes of one zone compare by the wall clock,
    which is wrong in the hour that occurs twice, so both are turned to UTC first."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _utc(self.start))
        object.__setattr__(self, "end", _utc(self.end))
        if self.end < self.start:
            raise InvariantError(f"a period cannot end ({self.end}) before it starts ({self.start})")

    def __contains__(self, instant: datetime) -> bool:
        return self.start <= instant < self.end

    @property
    def duration(self) -> timedelta:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Interval:
    """How long one billing period is: ``Interval(1, "month")``, ``Interval(3, "month")``, ``Interval(30, "day")``."""

    count: int
    unit: Unit

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvariantError(f"an interval of {self.count} {self.unit}s has no end")


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where periods begin: an instant, seen in a zone. ``calendar=True`` aligns to the zone's calendar instead
    (1 January for years and quarters, the 1st for months, Monday for weeks; the first period is then a partial one)."""

    at: datetime
    zone: str = "UTC"
    calendar: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _utc(self.at))

    def boundary(self, interval: Interval, n: int) -> datetime:
        """The start of the n-th period (n may be negative), counted from the anchor, never from the last boundary."""
        if n == 0 and not self.calendar:
            return self.at  # not by way of the wall clock: in the hour that occurs twice that would move it
        zone = zone_named(self.zone)
        try:
            local = self._aligned(interval, self.at.astimezone(zone))
            return from_wall(_shift(local, interval, n), zone)
        except (ValueError, OverflowError) as exc:
            raise refuse("DATE_OUT_OF_RANGE", "this reaches beyond the years 1 to 9999") from exc

    def period_at(self, interval: Interval, instant: datetime) -> Period:
        """The period that contains the instant. Under ``calendar`` the first one starts at the anchor itself, and the
        one before it ends there."""
        n = self._guess(interval, instant)
        while self.boundary(interval, n) > instant:
            n -= 1
        while self.boundary(interval, n + 1) <= instant:
            n += 1
        start, end = self.boundary(interval, n), self.boundary(interval, n + 1)
        if start < self.at < end:
            return Period(self.at, end) if instant >= self.at else Period(start, self.at)
        return Period(start, end)

    def _aligned(self, interval: Interval, local: datetime) -> datetime:
        if not self.calendar:
            return local
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        if interval.unit == "year":
            return midnight.replace(month=1, day=1)
        if interval.unit == "month":
            step = interval.count if 12 % interval.count == 0 else 1
            return midnight.replace(month=(midnight.month - 1) // step * step + 1, day=1)
        if interval.unit == "week":
            return midnight - timedelta(days=midnight.weekday())
        return midnight

    def _guess(self, interval: Interval, instant: datetime) -> int:
        return int((instant - self.at) / timedelta(days=_DAYS[interval.unit] * interval.count)) - 1


def zone_named(name: str) -> ZoneInfo:
    """The zone of an IANA name; ``Refused`` for an unknown one.

    Names with a small first letter are files of one machine (``localtime``) or count leap seconds (``right/UTC``).
    """
    try:
        if not _ZONE.match(name):
            raise ValueError(name)
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise refuse(
            "TIMEZONE_UNKNOWN", f"{name[:60]!r} is not an IANA time zone such as Europe/Warsaw", "timezone"
        ) from exc


def from_wall(local: datetime, zone: ZoneInfo) -> datetime:
    """The instant of a wall time: the earlier of two, or the first one after a gap."""
    early = local.replace(tzinfo=zone, fold=0)
    back = early.astimezone(UTC).astimezone(zone)
    if back.replace(tzinfo=None) == local.replace(tzinfo=None, fold=0):
        return early.astimezone(UTC)
    # In a gap: fold=1 reads the wall clock with the offset after it, which lands before the jump; fold=0 lands after.
    before = local.replace(tzinfo=zone, fold=1).astimezone(UTC)
    after = early.astimezone(UTC)
    low, high = min(before, after), max(before, after)
    offset = low.astimezone(zone).utcoffset()
    while high - low > timedelta(seconds=1):
        middle = low + (high - low) / 2
        if middle.astimezone(zone).utcoffset() == offset:
            low = middle
        else:
            high = middle
    return high.replace(microsecond=0)


def local_day(instant: datetime, zone: str) -> date:
    """The calendar day of an instant in a zone."""
    return instant.astimezone(zone_named(zone)).date()


def day_bounds(day: date, zone: str) -> Period:
    """The 23, 24 or 25 hours of a local day."""
    z = zone_named(zone)
    return Period(
        from_wall(datetime.combine(day, time()), z),
        from_wall(datetime.combine(day + timedelta(days=1), time()), z),
    )


def _utc(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise InvariantError(f"{instant} says no zone: instants are aware")
    return instant.astimezone(UTC)


def _shift(local: datetime, interval: Interval, n: int) -> datetime:
    steps = interval.count * n
    if interval.unit == "day":
        return local.replace(tzinfo=None) + timedelta(days=steps)
    if interval.unit == "week":
        return local.replace(tzinfo=None) + timedelta(weeks=steps)
    months = local.year * 12 + local.month - 1 + steps * (12 if interval.unit == "year" else 1)
    year, month = divmod(months, 12)
    last = calendar.monthrange(year, month + 1)[1]
    return local.replace(tzinfo=None, year=year, month=month + 1, day=min(local.day, last))


def parse_instant(text: str, field: str | None = None) -> datetime:
    """RFC 3339 with an offset, or a plain date (midnight UTC); the answer is UTC. Naive times are refused."""
    try:
        if _DAY.match(text):
            return datetime.combine(date.fromisoformat(text), time(), UTC)
        if _RFC3339.match(text):
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # a month 13, a year 0, a second 61
    raise refuse(
        "TIMESTAMP_MALFORMED",
        f"{text[:60]!r} is not an RFC 3339 time with an offset, such as 2026-11-21T10:00:00Z",
        field,
    )


def to_rfc3339(instant: datetime) -> str:
    """``2026-11-21T10:00:00Z``; microseconds only when there are any."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
