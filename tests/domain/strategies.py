"""Prices, plans and usage to try the rules with."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import strategies as st

from farebox.base.money import Asset
from farebox.domain.catalog import (
    PERIOD_NAMES,
    BooleanEntitlement,
    Charge,
    CustomEntitlement,
    Entitlement,
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
from farebox.domain.rating import RatedLine, rate

CURRENCIES = st.sampled_from([Asset.named(code) for code in ("USD", "JPY", "KWD", "USDC")])
#: From a wei to a million, plainly written or with trailing zeros or an exponent.
PRICES = st.one_of(
    st.decimals(0, 1000, places=4),
    st.decimals(0, 1, places=18),
    st.integers(0, 10**6).map(Decimal),
    st.sampled_from([Decimal("1E+3"), Decimal("1E-18"), Decimal("0.10")]),
)
QUANTITIES = st.one_of(
    st.integers(0, 400).map(Decimal), st.decimals(0, 10**6, places=3), st.integers(0, 10**20).map(Decimal)
)
KEYS = st.from_regex(r"\A[a-z][a-z0-9_]{0,12}\Z")
TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40)


@st.composite
def tiers(draw: st.DrawFn, flats: bool = True, whole: bool = False) -> tuple[Tier, ...]:
    """Ascending tiers, the last one open; ``whole`` keeps the bounds to small whole numbers."""
    bound = st.integers(1, 300).map(Decimal) if whole else st.decimals("0.001", 10**6, places=3)
    bounds: list[Decimal] = sorted(draw(st.sets(bound, max_size=5)))
    flat = PRICES if flats else st.just(Decimal(0))
    return tuple(Tier(up_to, draw(PRICES), draw(flat)) for up_to in [*bounds, None])


PER_UNIT = st.builds(PerUnit, PRICES)
TIERED = st.builds(Tiered, tiers())
VOLUME = st.builds(Volume, tiers())
PACKAGE = st.builds(
    Package, st.decimals("0.001", 10**4, places=3), PRICES, st.one_of(st.just(Decimal(0)), QUANTITIES)
)
FLAT_FEE = st.builds(FlatFee, PRICES)
USAGE_PRICING = st.one_of(PER_UNIT, TIERED, VOLUME, PACKAGE)
PRICING: st.SearchStrategy[Pricing] = st.one_of(USAGE_PRICING, FLAT_FEE)


def charge(pricing: Pricing, charge_id: str = "charge", metric_key: str = "usage") -> Charge:
    return Charge(charge_id, None if isinstance(pricing, FlatFee) else metric_key, pricing)


@st.composite
def charges(draw: st.DrawFn) -> tuple[Charge, ...]:
    ids = draw(st.lists(KEYS, unique=True, max_size=6))
    metrics = draw(st.lists(KEYS, min_size=1, max_size=3))
    return tuple(
        Charge(c.id, c.metric_key, c.pricing, draw(TEXTS))
        for i in ids
        for c in [charge(draw(PRICING), i, draw(st.sampled_from(metrics)))]
    )


@st.composite
def entitlements(draw: st.DrawFn) -> tuple[Entitlement, ...]:
    def one(key: str) -> st.SearchStrategy[Entitlement]:
        return st.one_of(
            st.builds(BooleanEntitlement, st.just(key), st.booleans()),
            st.builds(
                LimitEntitlement,
                st.just(key),
                KEYS,
                st.none() | QUANTITIES,
                st.sampled_from(["block", "allow"]),
            ),
            st.builds(CustomEntitlement, st.just(key), TEXTS),
        )

    return tuple(draw(one(key)) for key in draw(st.lists(KEYS, unique=True, max_size=5)))


PLANS = st.builds(
    PlanVersion,
    plan_id=KEYS,
    version=st.integers(1, 1000),
    name=TEXTS.map(lambda text: f"Plan {text}"),
    currency=CURRENCIES,
    interval=st.sampled_from(list(PERIOD_NAMES.values())),
    charges=charges(),
    entitlements=entitlements(),
)


def rate_charge(currency: Asset, charge: Charge, quantity: Decimal) -> RatedLine:
    """The line of one charge on its own."""
    used = {} if charge.metric_key is None else {charge.metric_key: quantity}
    return rate(currency, (charge,), used).lines[0]
