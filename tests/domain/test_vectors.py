"""Published worked examples, one row a number, under the ids of docs/reference/vectors.md.

The last test holds that page to these tables: it may claim exactly what is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

from farebox.base.money import Asset, Money, plain
from farebox.base.time import Anchor, Interval, parse_instant, to_rfc3339
from farebox.domain.catalog import (
    Charge,
    FlatFee,
    LimitEntitlement,
    Package,
    PerUnit,
    PlanVersion,
    Pricing,
    Tier,
    Tiered,
    Volume,
)
from farebox.domain.entitlements import resolve, view
from farebox.domain.rating import rate
from tests.domain.strategies import rate_charge
from tests.periods import periods_of

USD, JPY, KWD = Asset.named("USD"), Asset.named("JPY"), Asset.named("KWD")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "vectors.md"
DAY, MONTH, QUARTER, YEAR = (
    Interval(1, "day"),
    Interval(1, "month"),
    Interval(3, "month"),
    Interval(1, "year"),
)
D = Decimal


def tiers(*rows: tuple[str | None, str] | tuple[str | None, str, str]) -> tuple[Tier, ...]:
    """``(up_to, unit price[, flat price])`` each."""
    return tuple(
        Tier(None if r[0] is None else D(r[0]), D(r[1]), D(r[2]) if len(r) == 3 else D(0)) for r in rows
    )


def line(pricing: Pricing, quantity: str, currency: Asset = USD) -> Decimal:
    return rate_charge(currency, Charge("c", _metric(pricing), pricing), D(quantity)).exact_amount


def _metric(pricing: Pricing) -> str | None:
    return None if isinstance(pricing, FlatFee) else "usage"


CALLS = Tiered(tiers(("100000", "0"), ("1000000", "0.0001"), (None, "0.00005")))
L1 = Tiered(tiers(("10", "10", "2"), ("20", "5", "3"), (None, "5", "3")))
L2 = Tiered(tiers(("0.1", "10"), ("1", "5"), (None, "2")))
O1 = Volume(tiers(("5", "0", "100"), ("10", "0", "150"), ("15", "10"), (None, "5")))
O3 = Tiered(tiers(("5", "0", "100"), ("10", "0", "50"), ("15", "5"), (None, "1")))
TEN_A_PACKAGE = Package(D(10), D(15))
K8 = Tiered(tiers(("10", "1.5"), ("110", "1"), (None, "0.5")))
K9 = Volume(K8.tiers)

#: id, price, (quantity, amount before rounding)…
AMOUNTS: list[tuple[str, Pricing, list[tuple[str, str]]]] = [
    ("A1", PerUnit(D("0.0002")), [("500000", "100")]),
    ("A2", CALLS, [("1374923", "108.74615")]),
    ("A6", Volume(tiers(("1000", "0.08"), ("10000", "0.07"), (None, "0.05"))), [("5000", "350")]),
    ("A7", Package(D(1000), D(8)), [("1500", "16")]),
    ("L1", L1, [("0", "2"), ("1", "12"), ("10", "102"), ("11", "110"), ("12", "115"), ("21", "163")]),
    ("L2", L2, [("0.05", "0.5"), ("0.5", "3")]),
    ("L5", Package(D(10), D(100), D(0)), [("121", "1300")]),
    ("L5", Package(D(10), D(100), D(10)), [("121", "1200")]),
    ("L5", Package(D(10), D(100), D(200)), [("121", "0")]),
    (
        "O1",
        O1,
        [
            ("0", "100"),
            ("3", "100"),
            ("5", "100"),
            ("14", "140"),
            ("15", "150"),
            ("16", "80"),
            ("100", "500"),
        ],
    ),
    ("O3", O3, [("22", "182")]),
    ("O6", TEN_A_PACKAGE, [("10", "15"), ("5", "15")]),
    ("O7", Package(D(10), D(1)), [("0", "0"), ("1", "1"), ("9", "1"), ("10", "1"), ("11", "2")]),
    ("K8", K8, [("111", "115.5")]),
    ("K9", K9, [("111", "55.5")]),
    ("F25", Volume(tiers(("50000", "0.001"), (None, "0.0006"))), [("65000", "39")]),
    ("F25", Package(D(1000), D(1)), [("4500", "5")]),
    ("M10", PerUnit(D("0.001")), [("100", "0.1")]),
    ("M12", Package(D(20), D(5)), [("45", "15")]),
    ("D5", PerUnit(D("1E-18")), [("1E+18", "1"), ("1", "0.000000000000000001")]),
    ("D6", CALLS, [("100000", "0"), ("100001", "0.0001"), ("1000000", "90"), ("1000001", "90.00005")]),
]

#: id, price, already billed, then this much more, what the second part adds
CONTINUED = [
    ("O4", O3, "12", "10", "22"),
    ("O6", TEN_A_PACKAGE, "17", "5", "15"),
]

#: id, currency, the lines before rounding, their total in minor units
TOTALS: list[tuple[str, Asset, list[str], int]] = [
    ("F6", USD, ["10.333333"] * 3, 3099),
    ("F7", USD, ["33.333333", "33.333333", "33.333334"], 9999),
    ("F8", JPY, ["100.4", "200.5", "300.6"], 602),
    ("F9", JPY, ["1023.45"], 1023),
    ("F9", JPY, ["1023.5"], 1024),
    ("F11", USD, ["10.275"], 1028),
    ("F11", USD, ["10.278798"], 1028),
]

#: id, unit price, quantity, currency, minor units
ROUNDED_PRODUCTS = [
    ("F11", "0.5", "123.456", USD, 6173),
    ("P14", "1", "1.994", USD, 199),
    ("P14", "1", "1.995", USD, 200),
    ("M10", "0.001", "100", USD, 10),
]

#: id, interval, anchor, zone, calendar, the boundaries that follow (local dates, or instants)
BOUNDARIES: list[tuple[str, Interval, str, str, bool, list[str]]] = [
    ("F15", MONTH, "2026-01-31", "UTC", False, ["2026-02-28", "2026-03-31", "2026-04-30"]),
    ("F15", MONTH, "2028-01-31", "UTC", False, ["2028-02-29"]),
    ("M11", MONTH, "2024-01-31", "UTC", False, ["2024-02-29", "2024-03-31", "2024-04-30"]),
    ("F20", YEAR, "2024-02-29", "UTC", False, ["2025-02-28", "2026-02-28", "2027-02-28", "2028-02-29"]),
    (
        "K12",
        Interval(30, "day"),
        "2016-04-08",
        "UTC",
        False,
        ["2016-05-08", "2016-06-07", "2016-07-07", "2016-08-06", "2016-09-05", "2016-10-05", "2016-11-04"],
    ),
    ("F19", MONTH, "2026-08-18T12:00:00Z", "UTC", True, ["2026-09-01T00:00:00Z"]),
    ("F19", MONTH, "2026-08-18T12:00:00Z", "Asia/Kolkata", True, ["2026-08-31T18:30:00Z"]),
    ("F19", MONTH, "2026-08-18T12:00:00Z", "America/Los_Angeles", True, ["2026-09-01T07:00:00Z"]),
    ("F19", MONTH, "2026-08-18T12:00:00Z", "Europe/Rome", True, ["2026-08-31T22:00:00Z"]),
]

#: id, zone, two local midnights as instants, how many local days lie between
LOCAL_DAYS = [
    ("F18", "America/New_York", "2024-03-09T05:00:00Z", "2024-03-11T04:00:00Z", 2),
    ("F18", "America/New_York", "2024-11-02T04:00:00Z", "2024-11-04T05:00:00Z", 2),
    ("F18", "Australia/Sydney", "2024-04-05T13:00:00Z", "2024-04-07T14:00:00Z", 2),
    ("F18", "America/New_York", "2024-03-09T05:00:00Z", "2024-03-09T05:00:00Z", 0),
]

ALONE: set[str] = set()


def vector(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A vector that is a test of its own."""

    def named(test: Callable[[], None]) -> Callable[[], None]:
        ALONE.add(name)
        return test

    return named


@pytest.mark.parametrize(("name", "pricing", "rows"), AMOUNTS)
def test_a_quantity_costs_what_the_vector_says(
    name: str, pricing: Pricing, rows: list[tuple[str, str]]
) -> None:
    assert [line(pricing, quantity) for quantity, _ in rows] == [D(amount) for _, amount in rows]


@pytest.mark.parametrize(("name", "pricing", "before", "more", "added"), CONTINUED)
def test_what_comes_later_costs_the_difference(
    name: str, pricing: Pricing, before: str, more: str, added: str
) -> None:
    together = plain(D(before) + D(more))

    assert line(pricing, together) - line(pricing, before) == D(added)


@pytest.mark.parametrize(("name", "currency", "lines", "total"), TOTALS)
def test_lines_are_rounded_first_and_then_summed(
    name: str, currency: Asset, lines: list[str], total: int
) -> None:
    charges = [Charge(f"c{i}", None, FlatFee(D(amount))) for i, amount in enumerate(lines)]

    assert rate(currency, charges, {}).total == Money(total, currency)


@pytest.mark.parametrize(("name", "unit_price", "quantity", "currency", "units"), ROUNDED_PRODUCTS)
def test_a_product_is_rounded_half_up(
    name: str, unit_price: str, quantity: str, currency: Asset, units: int
) -> None:
    rated = rate_charge(currency, Charge("c", "usage", PerUnit(D(unit_price))), D(quantity))

    assert rated.amount == Money(units, currency)


@pytest.mark.parametrize(("name", "interval", "anchor", "zone", "calendar", "boundaries"), BOUNDARIES)
def test_periods_end_where_the_vector_says(
    name: str, interval: Interval, anchor: str, zone: str, calendar: bool, boundaries: list[str]
) -> None:
    expected = [parse_instant(b) for b in boundaries]
    begin = parse_instant(anchor)

    periods = periods_of(Anchor(begin, zone, calendar), interval, expected[-1])

    assert periods[0].start == begin
    assert [p.end for p in periods] == expected
    assert [p.start for p in periods[1:]] == expected[:-1]


@pytest.mark.parametrize(("name", "zone", "start", "end", "days"), LOCAL_DAYS)
def test_a_local_day_counts_once_however_long_it_is(
    name: str, zone: str, start: str, end: str, days: int
) -> None:
    assert len(periods_of(Anchor(parse_instant(start), zone), DAY, parse_instant(end))) == days


@vector("A3")
def test_the_calls_and_the_base_fee_make_one_total() -> None:
    charges = [Charge("calls", "api_calls", CALLS), Charge("base", None, FlatFee(D(49)))]

    rating = rate(USD, charges, {"api_calls": D(1374923)})

    assert [line.amount.units for line in rating.lines] == [10875, 4900]
    assert rating.total == Money(15775, USD)


@vector("A8")
def test_limits_of_two_subscriptions_add_up() -> None:
    plans = [_plan_with_limit("team", "100000"), _plan_with_limit("scale", "500000")]

    (feature,) = resolve(plans)

    assert feature.limit == D(600000)
    assert view(feature, D(47293)).remaining == D(552707)


def _plan_with_limit(plan_id: str, limit: str) -> PlanVersion:
    entitlement = LimitEntitlement("api_calls", "api_calls", D(limit))
    return PlanVersion(plan_id, 1, plan_id, USD, MONTH, entitlements=(entitlement,))


@vector("L28")
def test_a_whole_calendar_february_costs_the_whole_fee() -> None:
    anchor = Anchor(datetime(2024, 2, 1, tzinfo=UTC), calendar=True)

    (february,) = periods_of(anchor, MONTH, datetime(2024, 3, 1, tzinfo=UTC))

    assert to_rfc3339(february.start) == "2024-02-01T00:00:00Z"
    assert datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC) in february
    assert february.end == datetime(2024, 3, 1, tzinfo=UTC)
    assert rate_charge(USD, Charge("fee", None, FlatFee(D(7))), D(1)).amount == Money(700, USD)


@vector("P16")
def test_halves_go_away_from_zero() -> None:
    assert [Money.rounded(D(x), JPY).units for x in ("232.5", "-232.5", "0.5")] == [233, -233, 1]


@vector("K14")
def test_eighteen_months_in_juneau_cross_two_clock_changes_and_cost_the_same_each() -> None:
    begin = parse_instant("2015-06-21T00:00:00-08:00")
    anchor = Anchor(begin, "America/Juneau")
    fee = Charge("fee", None, FlatFee(D("249.95")))

    periods = periods_of(anchor, MONTH, parse_instant("2016-12-21T00:00:00-09:00"))

    assert len(periods) == 18
    assert all(a.end == b.start for a, b in pairwise(periods))
    assert {p.start.hour for p in periods} == {8, 9}  # local midnight, in summer and in winter
    assert {rate(USD, [fee], {}).total for _ in periods} == {Money(24995, USD)}


def test_a_price_of_one_wei_is_written_without_exponent() -> None:
    assert plain(D("1E-18")) == "0.000000000000000001"


def test_packages_in_tiers_can_only_be_said_as_two_charges() -> None:
    assert line(Package(D(100), D(1)), "1000") == 10
    assert line(Package(D(1000), D(1)), "4325") == 5


def test_a_dinar_has_three_decimals() -> None:
    assert Money.rounded(D("12.345"), KWD) == Money(12345, KWD)


@pytest.mark.parametrize(
    ("price", "quantity", "units"),
    [
        (Tiered(tiers(("200000", "0"), ("1000000", "0.00009"), (None, "0.00004"))), "1374923", 8700),
        (Tiered(tiers(("10000", "0.001"), (None, "0.0005"))), "12000", 1100),
        (PerUnit(D("0.08")), "142.75", 1142),
    ],
)
def test_further_examples_hold(price: Pricing, quantity: str, units: int) -> None:
    assert rate_charge(USD, Charge("c", "usage", price), D(quantity)).amount == Money(units, USD)


def test_the_page_of_vectors_claims_what_is_checked_here_and_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    covered, waiting = text.split("## Covered")[1].split("## Waiting")
    tables = (AMOUNTS, CONTINUED, TOTALS, ROUNDED_PRODUCTS, BOUNDARIES, LOCAL_DAYS)
    checked = ALONE | {row[0] for table in tables for row in table}

    assert _ids(covered) == checked
    assert not _ids(covered) & _ids(waiting)
    assert _ids(covered) | _ids(waiting) == set(ALL.split())


#: Every id there is, so that none can drop out of the page unnoticed.
ALL = """
A1 A2 A3 A6 A7 A8
L1 L2 L5 L7 L8 L11 L13 L14 L15 L20 L22 L23 L26 L28 L29 L30 L31 L32 L33 L34 L36 L39 L40 L42 L43 L44 L45 L48 L49
O1 O2 O3 O4 O6 O7 O8 O11 O13 O14 O16 O17
F1 F2 F3 F4 F6 F7 F8 F9 F11 F12 F14 F15 F18 F19 F20 F23 F25
M1 M2 M3 M4 M6 M8 M10 M11 M12
P1 P3 P5 P6 P7 P9 P10 P11 P13 P14 P16
K1 K2 K3 K3b K4 K8 K9 K10 K12 K14
D1 D2 D4 D5 D6 D8 D10
"""


def _ids(section: str) -> set[str]:
    """The ids in the first column of a section's table."""
    cells = re.findall(r"^\| ([A-Z0-9b, ]+) \|", section, re.MULTILINE)
    return {name for cell in cells for name in cell.split(", ")}
