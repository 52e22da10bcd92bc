"""A plan is checked as a whole, every fault with its path, and survives being stored."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError, Refused
from farebox.base.money import Asset
from farebox.base.time import Interval
from farebox.domain.catalog import (
    BooleanEntitlement,
    Charge,
    CustomEntitlement,
    FlatFee,
    LimitEntitlement,
    Metric,
    Package,
    PerUnit,
    PlanVersion,
    Tier,
    Tiered,
    Volume,
    check_metric,
    check_plan,
    interval_document,
    interval_from_document,
    plan_document,
    plan_faults,
    plan_from_document,
)
from farebox.domain.catalog import places as places_needed
from tests.domain.strategies import PLANS

D = Decimal
USD = Asset.named("USD")
MONTH = Interval(1, "month")


def plan(*charges: Charge, **changes: object) -> PlanVersion:
    """A plan that is right but for what a test changes."""
    return dataclasses.replace(PlanVersion("pro", 1, "Pro", USD, MONTH, charges), **changes)  # type: ignore[arg-type]


def faults(checked: PlanVersion, known: set[str] | None = None) -> list[tuple[str | None, str]]:
    return [(r.field, r.code) for r in plan_faults(checked, known)]


@given(PLANS)
def test_a_plan_survives_being_stored_as_json(stored: PlanVersion) -> None:
    document = json.loads(json.dumps(plan_document(stored)))

    assert plan_from_document(stored.plan_id, stored.version, document) == stored


@given(PLANS)
def test_the_document_of_a_plan_holds_no_float(stored: PlanVersion) -> None:
    assert not _floats(plan_document(stored))


def _floats(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_floats, value.values()))
    if isinstance(value, list):
        return any(map(_floats, value))
    return isinstance(value, float)


@given(PLANS)
def test_plans_made_by_the_rules_have_no_fault(stored: PlanVersion) -> None:
    check_plan(stored)


def test_a_plan_document_reads_like_the_public_one() -> None:
    document = plan_document(
        plan(
            Charge("calls", "api_calls", Tiered((Tier(D(10), D("0.10")), Tier(None, D("1E-5"), D(2))))),
            Charge("base", None, FlatFee(D("49.00")), "Base fee"),
            Charge("sms", "sms", Package(D(1000), D(8))),
            entitlements=(
                BooleanEntitlement("weather_api"),
                LimitEntitlement("calls", "api_calls", D(10000)),
                CustomEntitlement("sla", "4h"),
            ),
        )
    )

    assert document == {
        "name": "Pro",
        "currency": "USD",
        "billing_period": "monthly",
        "charges": [
            {
                "id": "calls",
                "metric_key": "api_calls",
                "pricing_model": "tiered",
                "properties": {
                    "tiers": [
                        {"up_to": "10", "unit_price": "0.1", "flat_price": "0"},
                        {"up_to": None, "unit_price": "0.00001", "flat_price": "2"},
                    ]
                },
                "description": "",
                "timing": "arrears",
            },
            {
                "id": "base",
                "metric_key": None,
                "pricing_model": "flat_fee",
                "properties": {"amount": "49"},
                "description": "Base fee",
                "timing": "arrears",
            },
            {
                "id": "sms",
                "metric_key": "sms",
                "pricing_model": "package",
                "properties": {"package_size": "1000", "package_price": "8", "free_units": "0"},
                "description": "",
                "timing": "arrears",
            },
        ],
        "entitlements": {
            "weather_api": {"type": "boolean", "granted": True},
            "calls": {"type": "limit", "metric_key": "api_calls", "limit": "10000", "on_exceed": "block"},
            "sla": {"type": "custom", "value": "4h"},
        },
    }


def test_every_fault_of_a_plan_is_reported_at_once_with_its_path() -> None:
    bad = plan(
        Charge("a", "calls", Tiered((Tier(D(10), D(1)), Tier(D(10), D(-1)), Tier(D(5), D(1))))),
        Charge("a", None, PerUnit(D("NaN"))),
        Charge("b", "calls", FlatFee(D(1))),
        Charge("c", "calls", Package(D(0), D(1), D(-1))),
        Charge("d", "calls", Volume((Tier(None, D(1)), Tier(None, D(1), D("Infinity"))))),
        Charge("e", "calls", Tiered(())),
        plan_id="",
        version=0,
        name=" ",
        interval=Interval(2, "week"),
        entitlements=(
            LimitEntitlement("quota", "calls", D(-1), "grace"),  # type: ignore[arg-type]
            LimitEntitlement("quota", "other", None),
            CustomEntitlement("sla", "x" * 1001),
        ),
    )

    assert faults(bad, {"calls"}) == [
        ("id", "KEY_MALFORMED"),
        ("version", "VERSION_INVALID"),
        ("name", "NAME_EMPTY"),
        ("billing_period", "PERIOD_UNKNOWN"),
        ("charges[1].id", "CHARGE_ID_DUPLICATE"),
        ("charges[0].properties.tiers[1].up_to", "TIERS_NOT_ASCENDING"),
        ("charges[0].properties.tiers[1].unit_price", "DECIMAL_NEGATIVE"),
        ("charges[0].properties.tiers[2].up_to", "TIER_LAST_CLOSED"),
        ("charges[0].properties.tiers[2].up_to", "TIERS_NOT_ASCENDING"),
        ("charges[1].metric_key", "METRIC_REQUIRED"),
        ("charges[1].properties.unit_price", "DECIMAL_NOT_FINITE"),
        ("charges[2].metric_key", "METRIC_UNUSED"),
        ("charges[3].properties.package_size", "PACKAGE_SIZE_INVALID"),
        ("charges[3].properties.free_units", "DECIMAL_NEGATIVE"),
        ("charges[4].properties.tiers[0].up_to", "TIER_OPEN_EARLY"),
        ("charges[4].properties.tiers[1].flat_price", "DECIMAL_NOT_FINITE"),
        ("charges[5].properties.tiers", "TIERS_EMPTY"),
        ("entitlements", "FEATURE_KEY_DUPLICATE"),
        ("entitlements.quota.limit", "DECIMAL_NEGATIVE"),
        ("entitlements.quota.on_exceed", "ON_EXCEED_UNKNOWN"),
        ("entitlements.quota.metric_key", "METRIC_UNKNOWN"),
        ("entitlements.sla.value", "VALUE_TOO_LONG"),
    ]
    with pytest.raises(Refused) as refused:
        check_plan(bad, {"calls"})
    assert len(refused.value.reasons) == 22


@pytest.mark.parametrize(
    ("price", "code"),
    [
        ("1E+15", "DECIMAL_TOO_LARGE"),
        ("1E-19", "DECIMAL_TOO_FINE"),
        ("-0.01", "DECIMAL_NEGATIVE"),
        ("sNaN", "DECIMAL_NOT_FINITE"),
        ("-Infinity", "DECIMAL_NOT_FINITE"),
        ("1E+999999", "DECIMAL_TOO_LARGE"),
    ],
)
def test_a_price_out_of_bounds_is_refused(price: str, code: str) -> None:
    bad = plan(Charge("a", "calls", PerUnit(D(price))))

    assert faults(bad) == [("charges[0].properties.unit_price", code)]


@pytest.mark.parametrize(
    "price", ["0", "-0", "999999999999999.999999999999999999", "1E-18", "1.0000000000000000000000"]
)
def test_a_price_at_the_bounds_is_taken(price: str) -> None:
    assert faults(plan(Charge("a", "calls", PerUnit(D(price))))) == []


@pytest.mark.parametrize(
    ("number", "places"),
    [
        ("1.50", 1),
        ("1E+5", 0),
        ("0.000", 0),
        ("0E-40", 0),
        ("100", 0),
        ("1E-18", 18),
        ("-0.25", 2),
        ("10.0", 0),
    ],
)
def test_trailing_zeros_are_no_places(number: str, places: int) -> None:
    assert places_needed(D(number)) == places


def test_a_plan_has_a_bounded_number_of_everything() -> None:
    tiers = (*(Tier(D(n), D(1)) for n in range(1, 101)), Tier(None, D(1)))
    charges = tuple(Charge(f"c{n}", None, FlatFee(D(1))) for n in range(100))
    features = tuple(BooleanEntitlement(f"f{n}") for n in range(201))

    assert faults(plan(*charges)) == []
    assert faults(plan(*charges, Charge("one_more", "m", Tiered(tiers)), entitlements=features)) == [
        ("charges", "CHARGES_TOO_MANY"),
        ("charges[100].properties.tiers", "TIERS_TOO_MANY"),
        ("entitlements", "ENTITLEMENTS_TOO_MANY"),
    ]


@pytest.mark.parametrize("key", ["", "a b", "-a", "a/b", "é", "a" * 101, "a\n"])
def test_a_key_that_cannot_stand_in_a_path_is_refused(key: str) -> None:
    assert ("charges[0].metric_key", "KEY_MALFORMED") in faults(plan(Charge("a", key, PerUnit(D(1)))))


@given(st.integers(1, 3660))
def test_a_billing_period_of_days_reads_back(days: int) -> None:
    interval = Interval(days, "day")

    assert interval_document(interval) == {"days": days}
    assert interval_from_document({"days": days}) == interval


@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("weekly", Interval(1, "week")),
        ("monthly", MONTH),
        ("quarterly", Interval(3, "month")),
        ("annual", Interval(1, "year")),
    ],
)
def test_a_named_billing_period_reads_back(name: str, interval: Interval) -> None:
    assert interval_document(interval) == name
    assert interval_from_document(name) == interval


@pytest.mark.parametrize(
    "document", ["daily", "", {"days": 0}, {"days": True}, {"days": 3661}, {"days": 1, "weeks": 1}, {}]
)
def test_an_unknown_billing_period_is_refused(document: str | dict[str, int]) -> None:
    with pytest.raises(Refused) as refused:
        interval_from_document(document)
    assert refused.value.reason.field == "billing_period"


def test_a_stored_plan_that_makes_no_sense_stops_the_line() -> None:
    document = plan_document(plan(Charge("a", "calls", PerUnit(D(1)))))
    document["charges"][0]["pricing_model"] = "guess"

    with pytest.raises(InvariantError):
        plan_from_document("pro", 1, document)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric("calls", "Calls", "sum"), []),
        (Metric("users", "Users", "unique_count", "user_id"), []),
        (Metric("users", "Users", "unique_count"), [("property", "PROPERTY_REQUIRED")]),
        (Metric("calls", "Calls", "sum", "bytes"), [("property", "PROPERTY_UNUSED")]),
        (
            Metric("a b", "", "median"),  # type: ignore[arg-type]
            [("key", "KEY_MALFORMED"), ("name", "NAME_EMPTY"), ("aggregation", "AGGREGATION_UNKNOWN")],
        ),
        (
            Metric("calls", "Calls", "sum", value_type="text"),  # type: ignore[arg-type]
            [("value_type", "VALUE_TYPE_UNKNOWN")],
        ),
    ],
)
def test_a_metric_is_checked_as_a_whole(metric: Metric, expected: list[tuple[str, str]]) -> None:
    try:
        check_metric(metric)
        found = []
    except Refused as refused:
        found = [(r.field, r.code) for r in refused.reasons]

    assert found == expected
