"""Money: whole minor units of a named asset. Decimal until the line, rounded once, half up.

An asset is a currency (``USD``: two decimals, ISO 4217) or a token (``USDC``: six). Amounts of different assets
never meet: adding them is an ``InvariantError``, not a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import (
    ROUND_HALF_UP,
    Context,
    Decimal,
    DivisionByZero,
    FloatOperation,
    Inexact,
    InvalidOperation,
    Overflow,
    localcontext,
)
from fractions import Fraction
from typing import Final

from farebox.base.errors import InvariantError, refuse

#: Arithmetic that never loses a digit: 120 are enough for a 70-digit quantity at a 33-digit price, and if they were not,
#: the operation raises instead of rounding. A float that strays in raises too.
EXACT: Final = Context(
    prec=120,
    rounding=ROUND_HALF_UP,
    traps=[InvalidOperation, DivisionByZero, Overflow, Inexact, FloatOperation],
)

_DECIMAL = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,30})?\Z", re.ASCII)
_PRICE = re.compile(
    r"\s*(?P<number>[0-9]{1,30}(\.[0-9]{1,18})?)\s+(?P<asset>[A-Za-z][A-Za-z0-9]{1,11})\s*\Z", re.ASCII
)

#: ISO 4217: the currencies in use by the decimals of their minor unit.
_CURRENCIES: Final = {
    2: """
        AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP
        CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR
        JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN
        NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP
        SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG
        """,
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
}
_CURRENCY_DECIMALS: Final = {
    code: decimals for decimals, codes in _CURRENCIES.items() for code in codes.split()
}
_TOKEN_DECIMALS: Final = {"USDC": 6, "EURC": 6, "USDT": 6, "XLM": 7}


@dataclass(frozen=True, slots=True)
class Asset:
    """What money is counted in. ``code`` is the name in the book, ``decimals`` the minor unit's exponent."""

    code: str
    decimals: int

    @classmethod
    def named(cls, code: str) -> Asset:
        """The asset of an ISO 4217 code (``USD``, ``JPY``) or of a known token symbol (``USDC``).

        Raises ``Refused`` for anything that is neither.
        """
        upper = code.upper()
        decimals = _TOKEN_DECIMALS.get(upper, _CURRENCY_DECIMALS.get(upper))
        if decimals is None:
            raise refuse(
                "ASSET_UNKNOWN", f"{code[:60]!r} is neither an ISO 4217 currency nor a known token", "asset"
            )
        return cls(upper, decimals)


@dataclass(frozen=True, slots=True, order=False)
class Money:
    """``units`` whole minor units of ``asset``."""

    units: int
    asset: Asset

    @classmethod
    def parse(cls, text: str) -> Money:
        """Read ``"0.001 USDC"``. More decimals than the asset has are refused, not rounded."""
        found = _PRICE.match(text)
        if found is None:
            raise refuse(
                "PRICE_MALFORMED",
                f'{text!r} is not a price: write a number and an asset, such as "0.001 USDC"',
            )
        asset = Asset.named(found["asset"])
        units = EXACT.scaleb(Decimal(found["number"]), asset.decimals)
        if units != units.to_integral_value():
            raise refuse(
                "PRICE_TOO_FINE", f"{text!r} has more than the {asset.decimals} decimals of {asset.code}"
            )
        return cls(int(units), asset)

    @classmethod
    def rounded(cls, amount: Decimal, asset: Asset) -> Money:
        """The one rounding: a decimal amount in major units, half up (away from zero), to minor units."""
        with localcontext(EXACT):
            return cls(int(amount.scaleb(asset.decimals).to_integral_value(ROUND_HALF_UP)), asset)

    @property
    def major(self) -> Decimal:
        """The amount in major units, exact."""
        with localcontext(EXACT):
            return Decimal(self.units).scaleb(-self.asset.decimals)

    def __add__(self, other: Money) -> Money:
        return Money(self.units + self._same_asset(other).units, self.asset)

    def __sub__(self, other: Money) -> Money:
        return Money(self.units - self._same_asset(other).units, self.asset)

    def __neg__(self) -> Money:
        return Money(-self.units, self.asset)

    def __lt__(self, other: Money) -> bool:
        return self.units < self._same_asset(other).units

    def __le__(self, other: Money) -> bool:
        return self.units <= self._same_asset(other).units

    def __bool__(self) -> bool:
        return self.units != 0

    def __str__(self) -> str:
        """As people write it: ``20.00 USD`` with all its decimals, ``0.001 USDC`` without a token's idle zeros."""
        number = plain(self.major) if self.asset.decimals > 3 else f"{self.major:f}"
        return f"{number} {self.asset.code}"

    def allocate(self, weights: Sequence[int]) -> list[Money]:
        """Split by whole-number weights; the parts always sum to the whole (largest remainder, earlier first on ties)."""
        total = sum(weights)
        if total <= 0 or min(weights) < 0:
            raise InvariantError("allocate needs weights that are not negative and not all zero")
        sign = -1 if self.units < 0 else 1
        whole = abs(self.units)
        shares = [Fraction(whole * w, total) for w in weights]
        parts = [int(s) for s in shares]
        by_remainder = sorted(range(len(weights)), key=lambda i: (parts[i] - shares[i], i))
        for i in by_remainder[: whole - sum(parts)]:
            parts[i] += 1
        return [Money(sign * p, self.asset) for p in parts]

    def _same_asset(self, other: Money) -> Money:
        if other.asset != self.asset:
            raise InvariantError(f"{self.asset.code} and {other.asset.code} do not add up")
        return other


def parse_decimal(text: str, field: str | None = None) -> Decimal:
    """A finite decimal written plainly: at most 40 digits before and 30 after the point, no exponent, no NaN."""
    if not _DECIMAL.match(text):
        raise refuse("DECIMAL_MALFORMED", f"{text[:60]!r} is not a plain decimal number", field)
    return Decimal(text)


def plain(number: Decimal) -> str:
    """Write a decimal without exponent and without trailing zeros: ``0.00005``, ``100``."""
    text = f"{number:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text
