"""Rating keeps its laws for any price and any quantity, and agrees with a slow reference that shares no code with it."""

from __future__ import annotations

import ast
import inspect
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from farebox.base.errors import Refused
from farebox.base.money import EXACT, Asset, Money
from farebox.domain import rating
from farebox.domain.catalog import Charge, FlatFee, Package, PerUnit, Pricing, Tier, Tiered, Volume
from farebox.domain.rating import line_document, line_from_document, rate
from tests.domain import reference
from tests.domain.strategies import (
    CURRENCIES,
    FLAT_FEE,
    KEYS,
    PACKAGE,
    PER_UNIT,
    PRICES,
    PRICING,
    QUANTITIES,
    TIERED,
    charge,
    charges,
    rate_charge,
    tiers,
)

USD = Asset.named("USD")
D = Decimal


def exact(pricing: Pricing, quantity: Decimal) -> Decimal:
    return rate_charge(USD, charge(pricing), quantity).exact_amount


def plus(a: Decimal, b: Decimal) -> Decimal:
    with localcontext(EXACT):
        return a + b


@given(PRICING, QUANTITIES, CURRENCIES)
def test_rating_agrees_with_a_reference_in_fractions(
    pricing: Pricing, quantity: Decimal, currency: Asset
) -> None:
    line = rate_charge(currency, charge(pricing), quantity)
    expected = reference.amount(pricing, Fraction(quantity))

    assert Fraction(line.exact_amount) == expected
    assert line.amount.units == reference.minor_units(expected, currency.decimals)


@given(tiers(whole=True), st.integers(0, 400))
def test_tiers_agree_with_pricing_every_single_unit(rows: tuple[Tier, ...], quantity: int) -> None:
    assert Fraction(exact(Tiered(rows), D(quantity))) == reference.unit_by_unit(rows, quantity)


@given(st.one_of(PER_UNIT, TIERED, PACKAGE, FLAT_FEE), QUANTITIES, QUANTITIES)
def test_more_usage_never_costs_less_except_by_volume(pricing: Pricing, a: Decimal, b: Decimal) -> None:
    less, more = sorted((a, b))

    assert exact(pricing, less) <= exact(pricing, more)


def test_by_volume_more_usage_may_cost_less() -> None:
    pricing = Volume((Tier(D(10), D(1)), Tier(None, D("0.5"))))

    assert exact(pricing, D(10)) == 10
    assert exact(pricing, D(11)) == D("5.5")


@given(PER_UNIT, QUANTITIES, QUANTITIES)
def test_per_unit_does_not_care_how_usage_is_split(pricing: PerUnit, a: Decimal, b: Decimal) -> None:
    assert exact(pricing, plus(a, b)) == plus(exact(pricing, a), exact(pricing, b))


@given(
    tiers(flats=False),
    QUANTITIES,
    st.integers(0, 5),
    st.decimals(D("0.001"), 10**6, places=4, allow_nan=False),
)
def test_cutting_a_tier_in_two_at_the_same_price_changes_nothing(
    rows: tuple[Tier, ...], quantity: Decimal, index: int, cut: Decimal
) -> None:
    index %= len(rows)
    lower = rows[index - 1].up_to if index else D(0)
    upper = rows[index].up_to
    assume(lower is not None and cut > lower and (upper is None or cut < upper))
    finer = (*rows[:index], Tier(cut, rows[index].unit_price), *rows[index:])

    assert exact(Tiered(finer), quantity) == exact(Tiered(rows), quantity)


@given(PRICES, PRICES, QUANTITIES)
def test_one_open_tier_is_a_price_per_unit(price: Decimal, flat: Decimal, quantity: Decimal) -> None:
    row = (Tier(None, price, flat),)
    expected = plus(exact(PerUnit(price), quantity), flat)

    assert exact(Tiered(row), quantity) == exact(Volume(row), quantity) == expected


@given(TIERED, QUANTITIES)
def test_the_tiers_share_the_usage_and_the_amount_without_rest(pricing: Tiered, quantity: Decimal) -> None:
    line = rate_charge(USD, charge(pricing), quantity)

    with localcontext(EXACT):
        assert sum(s.quantity for s in line.tier_breakdown) == quantity
        assert sum(s.amount for s in line.tier_breakdown) == line.exact_amount
        for share in line.tier_breakdown:
            assert share.amount == share.quantity * share.unit_price + share.flat_price
    assert [s.tier for s in line.tier_breakdown] == list(range(1, len(line.tier_breakdown) + 1))


@given(st.builds(Volume, tiers()), QUANTITIES)
def test_by_volume_one_tier_has_it_all(pricing: Volume, quantity: Decimal) -> None:
    line = rate_charge(USD, charge(pricing), quantity)
    (share,) = line.tier_breakdown

    assert share.quantity == quantity
    assert share.amount == line.exact_amount


@given(charges(), st.dictionaries(KEYS, QUANTITIES), CURRENCIES)
def test_the_total_is_the_sum_of_the_rounded_lines(
    some: tuple[Charge, ...], usage: dict[str, Decimal], currency: Asset
) -> None:
    result = rate(currency, some, usage)

    assert [line.charge_id for line in result.lines] == [c.id for c in some]
    assert result.total.units == sum(line.amount.units for line in result.lines)


@given(PRICING, QUANTITIES, CURRENCIES)
def test_a_line_survives_being_stored(pricing: Pricing, quantity: Decimal, currency: Asset) -> None:
    line = rate_charge(currency, charge(pricing), quantity)

    assert line_from_document(currency, line_document(line)) == line


@given(PRICING, QUANTITIES)
def test_the_last_step_ends_in_the_amount_of_the_line(pricing: Pricing, quantity: Decimal) -> None:
    line = rate_charge(USD, charge(pricing), quantity)
    shown = line.steps[-1].removesuffix(" USD").rpartition(" ")[2].replace(",", "")

    assert D(shown) == line.amount.major


def test_the_steps_can_be_followed_with_a_pencil() -> None:
    calls = Tiered(
        (Tier(D(100000), D(0)), Tier(D(1000000), D("0.0001"), D("2.50")), Tier(None, D("0.00005")))
    )

    assert rate_charge(USD, charge(calls), D(1374923)).steps == (
        "tier 1: 100,000 × 0 = 0",
        "tier 2: 900,000 × 0.0001 = 90",
        "tier 2: flat price 2.5",
        "tier 3: 374,923 × 0.00005 = 18.74615",
        "0 + 90 + 2.5 + 18.74615 = 111.24615",
        "111.24615 rounded to 111.25 USD",
    )
    assert rate_charge(USD, charge(PerUnit(D("0.0002"))), D(500000)).steps == ("500,000 × 0.0002 = 100",)
    assert rate_charge(USD, charge(Package(D(1000), D(8), D(100))), D(1500)).steps == (
        "1,500 − 100 free = 1,400 to pay for",
        "1,400 in packages of 1,000 = 2 packages",
        "2 × 8 = 16",
    )
    assert rate_charge(USD, charge(Volume((Tier(D(10), D(1)), Tier(None, D("0.5"))))), D(11)).steps == (
        "11 falls in tier 2, which has no upper end",
        "tier 2: 11 × 0.5 = 5.5",
    )
    assert rate_charge(USD, charge(FlatFee(D(49))), D(0)).steps == ("fixed fee 49",)


def test_a_package_that_the_free_units_cover_costs_nothing() -> None:
    line = rate_charge(USD, charge(Package(D(10), D(100), D(200))), D(121))

    assert line.amount == Money(0, USD)
    assert line.steps[0] == "121 − 200 free = 0 to pay for"


def test_a_metric_without_usage_counts_as_zero_and_a_stray_one_costs_nothing() -> None:
    result = rate(USD, [charge(PerUnit(D(1)), metric_key="calls")], {"other": D(5)})

    assert result.total == Money(0, USD)


def test_every_bad_quantity_is_named_at_once() -> None:
    some = [charge(PerUnit(D(1)), f"c{key}", key) for key in ("a", "b", "c", "d")]

    with pytest.raises(Refused) as refused:
        rate(USD, some, {"a": D(-1), "b": D("NaN"), "c": D("1E40"), "d": D("1E-31")})

    assert [(r.field, r.code) for r in refused.value.reasons] == [
        ("usage.a", "DECIMAL_NEGATIVE"),
        ("usage.b", "DECIMAL_NOT_FINITE"),
        ("usage.c", "DECIMAL_TOO_LARGE"),
        ("usage.d", "DECIMAL_TOO_FINE"),
    ]


def test_the_largest_quantity_at_the_longest_price_loses_no_digit() -> None:
    quantity = D("9" * 40 + "." + "9" * 30)
    price = D("9" * 15 + "." + "9" * 18)

    assert Fraction(exact(PerUnit(price), quantity)) == Fraction(quantity) * Fraction(price)
    package = Package(D("1E-30"), price)
    assert Fraction(exact(package, quantity)) == Fraction(quantity) * 10**30 * Fraction(price)


def test_there_is_no_float_in_the_source_of_rating() -> None:
    tree = ast.parse(inspect.getsource(rating))
    floats = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
    divisions = [n for n in ast.walk(tree) if isinstance(n, ast.Div)]
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}

    assert not floats
    assert not divisions
    assert not names & {"float", "round"}


def test_a_negative_zero_is_a_zero() -> None:
    line = rate_charge(USD, charge(PerUnit(D(2))), D("-0"))

    assert line.steps == ("0 × 2 = 0",)
    assert line_document(line)["quantity"] == "0"
