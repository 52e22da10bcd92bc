"""Money is whole minor units; it is rounded once, half up, and never lost when it is split."""

from __future__ import annotations

import decimal
import operator
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError, Refused
from farebox.base.money import EXACT, Asset, Money, parse_decimal, plain

USD, JPY, KWD, USDC = (Asset.named(code) for code in ("USD", "JPY", "KWD", "USDC"))

UNITS = st.integers(-(10**78), 10**78)
WEIGHTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=20).filter(any)


@pytest.mark.parametrize(
    ("code", "decimals"),
    [("usd", 2), ("EUR", 2), ("JPY", 0), ("CLP", 0), ("KWD", 3), ("USDC", 6), ("XLM", 7)],
)
def test_an_asset_knows_its_decimals(code: str, decimals: int) -> None:
    assert Asset.named(code) == Asset(code.upper(), decimals)


@pytest.mark.parametrize("code", ["", "US", "UDS", "ABC", "DOGE", "U$D", "ＵＳＤ", "x" * 5000])
def test_a_currency_that_does_not_exist_is_refused(code: str) -> None:
    with pytest.raises(Refused) as refused:
        Asset.named(code)
    assert refused.value.reason.code == "ASSET_UNKNOWN"
    assert len(refused.value.reason.message) < 200


@pytest.mark.parametrize(
    ("text", "money"),
    [
        ("0.001 USDC", Money(1000, USDC)),
        ("  12.5 usd ", Money(1250, USD)),
        ("0 EUR", Money(0, Asset.named("EUR"))),
        ("100 JPY", Money(100, JPY)),
        ("123456789012345678901234567890 JPY", Money(123456789012345678901234567890, JPY)),
        ("123456789012345678901234567890.000001 USDC", Money(123456789012345678901234567890000001, USDC)),
    ],
)
def test_a_price_is_read(text: str, money: Money) -> None:
    assert Money.parse(text) == money


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("0.0000001 USDC", "PRICE_TOO_FINE"),
        ("1.5 JPY", "PRICE_TOO_FINE"),
        ("1.005 USD", "PRICE_TOO_FINE"),
        ("1USDC", "PRICE_MALFORMED"),
        ("-1 USDC", "PRICE_MALFORMED"),
        ("1e3 USDC", "PRICE_MALFORMED"),
        ("NaN USDC", "PRICE_MALFORMED"),
        ("1,000 USD", "PRICE_MALFORMED"),
        (".5 USD", "PRICE_MALFORMED"),
        ("١ USD", "PRICE_MALFORMED"),
        ("1 USD\n2 USD", "PRICE_MALFORMED"),
        ("", "PRICE_MALFORMED"),
        ("1 ABC", "ASSET_UNKNOWN"),
    ],
)
def test_what_is_not_a_price_is_refused(text: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        Money.parse(text)
    assert refused.value.reason.code == code


@pytest.mark.parametrize(
    ("amount", "asset", "units"),
    [
        ("1.005", USD, 101),
        ("-1.005", USD, -101),
        ("1.0049999999", USD, 100),
        ("0.5", JPY, 1),
        ("12.3455", KWD, 12346),
    ],
)
def test_halves_are_rounded_away_from_zero(amount: str, asset: Asset, units: int) -> None:
    assert Money.rounded(Decimal(amount), asset) == Money(units, asset)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**40), max_value=10**40, places=12))
def test_rounding_is_off_by_half_a_minor_unit_at_most(amount: Decimal) -> None:
    assert abs(Fraction(Money.rounded(amount, USD).units, 100) - Fraction(amount)) <= Fraction(1, 200)


@given(UNITS)
def test_major_units_and_back_is_the_same_money(units: int) -> None:
    money = Money(units, USDC)

    assert Money.rounded(money.major, USDC) == money


@given(UNITS, WEIGHTS)
def test_the_parts_of_a_split_sum_to_the_whole_and_each_is_within_one_unit_of_its_share(
    units: int, weights: list[int]
) -> None:
    parts = Money(units, USD).allocate(weights)

    assert sum(p.units for p in parts) == units
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part.units - Fraction(units * weight, sum(weights))) < 1
        assert weight or not part


def test_the_rest_of_a_split_goes_to_the_largest_remainder_and_then_to_the_earlier() -> None:
    assert [p.units for p in Money(100, USD).allocate([1, 1, 1])] == [34, 33, 33]
    assert [p.units for p in Money(-100, USD).allocate([1, 1, 1])] == [-34, -33, -33]
    assert [p.units for p in Money(10, USD).allocate([1, 0, 5])] == [2, 0, 8]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [-1, 3]])
def test_a_split_without_sense_stops_the_line(weights: list[int]) -> None:
    with pytest.raises(InvariantError):
        Money(1, USD).allocate(weights)


def test_amounts_of_different_assets_never_meet() -> None:
    for meet in (operator.add, operator.sub, operator.lt, operator.le):
        with pytest.raises(InvariantError):
            meet(Money(1, USD), Money(1, USDC))
    assert Money(1, USD) != Money(1, JPY)


def test_money_is_written_in_major_units() -> None:
    assert str(Money(15775, USD)) == "157.75 USD"
    assert str(Money(-5, USD)) == "-0.05 USD"
    assert str(Money(1, USDC)) == "0.000001 USDC"
    assert str(Money(1024, JPY)) == "1024 JPY"


def test_exact_arithmetic_raises_where_it_would_have_to_round() -> None:
    with localcontext(EXACT), pytest.raises(decimal.Inexact):
        _ = Decimal(1) / Decimal(3)
    with localcontext(EXACT), pytest.raises(decimal.Inexact):
        _ = Decimal("1E+119") + Decimal("0.1")


def test_exact_arithmetic_does_not_take_floats() -> None:
    with localcontext(EXACT), pytest.raises(decimal.FloatOperation):
        Decimal(0.1)  # noqa: RUF032
    with localcontext(EXACT), pytest.raises(decimal.FloatOperation):
        _ = Decimal(1) < 0.1


def test_the_surrounding_decimal_context_does_not_matter() -> None:
    with localcontext() as narrow:
        narrow.prec, narrow.rounding = 3, decimal.ROUND_DOWN

        assert Money.rounded(Decimal("123456.785"), USD) == Money(12345679, USD)
        assert Money.parse("123456.78 USD") == Money(12345678, USD)
        assert Money(12345678, USD).major == Decimal("123456.78")
    assert EXACT.rounding == ROUND_HALF_UP


@pytest.mark.parametrize("text", ["0", "-1.5", "1" * 40 + "." + "2" * 30, "00.10"])
def test_plain_decimals_are_read(text: str) -> None:
    assert parse_decimal(text) == Decimal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "1 ",
        "1e3",
        "NaN",
        "Infinity",
        "+1",
        "1.",
        ".1",
        "1_000",
        "٣",
        "1" * 41,
        "1." + "1" * 31,
        "1\n",
    ],
)
def test_other_spellings_of_numbers_are_refused_with_their_field(text: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_decimal(text, "charges[0].unit_price")
    assert refused.value.reason.code == "DECIMAL_MALFORMED"
    assert refused.value.reason.field == "charges[0].unit_price"


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30))
def test_a_decimal_is_written_without_exponent_and_reads_back(number: Decimal) -> None:
    text = plain(number)

    assert "E" not in text.upper()
    assert Decimal(text) == number
    assert text == "0" or not ("." in text and text.endswith("0"))
