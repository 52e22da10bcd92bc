"""Rating done again, slowly and with fractions, by walking along the quantity; shares no code with farebox.domain.rating.

Amounts are exact ``Fraction``s of major units. Tiers are walked edge by edge instead of cut by ``min``, packages are
filled one after the other, and rounding goes through whole-number division.
"""

from __future__ import annotations

from fractions import Fraction

from farebox.domain.catalog import FlatFee, Package, PerUnit, Pricing, Tier, Tiered, Volume


def amount(pricing: Pricing, quantity: Fraction) -> Fraction:
    if isinstance(pricing, FlatFee):
        return Fraction(pricing.amount)
    if isinstance(pricing, PerUnit):
        return quantity * Fraction(pricing.unit_price)
    if isinstance(pricing, Tiered):
        return _walk(pricing.tiers, quantity)
    if isinstance(pricing, Volume):
        tier = _tier_of(pricing.tiers, quantity)
        return quantity * Fraction(tier.unit_price) + Fraction(tier.flat_price)
    assert isinstance(pricing, Package)
    return _fill(pricing, quantity)


def minor_units(exact: Fraction, decimals: int) -> int:
    """Half away from zero."""
    scaled = abs(exact) * 10**decimals
    units: int = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)
    return -units if exact < 0 else units


def _walk(tiers: tuple[Tier, ...], quantity: Fraction) -> Fraction:
    """Stand at zero and step to the next edge or to the quantity, whichever comes first, paying the tier one walks in."""
    due = Fraction(tiers[0].flat_price)
    at, index = Fraction(0), 0
    while at < quantity:
        tier = tiers[index]
        edge = quantity if tier.up_to is None else Fraction(tier.up_to)
        if edge < quantity:
            due += (edge - at) * Fraction(tier.unit_price)
            at, index = edge, index + 1
            due += Fraction(tiers[index].flat_price)
        else:
            due += (quantity - at) * Fraction(tier.unit_price)
            at = quantity
    return due


def _tier_of(tiers: tuple[Tier, ...], quantity: Fraction) -> Tier:
    closed_below = [t for t in tiers if t.up_to is not None and Fraction(t.up_to) < quantity]
    return tiers[len(closed_below)]


def _fill(pricing: Package, quantity: Fraction) -> Fraction:
    left = quantity - Fraction(pricing.free_units)
    size = Fraction(pricing.package_size)
    if left <= 0:
        return Fraction(0)
    return -((-left) // size) * Fraction(pricing.package_price)


def unit_by_unit(tiers: tuple[Tier, ...], quantity: int) -> Fraction:
    """Tiered, for whole quantities: every single unit looks up its own price, every tier it meets adds its flat price."""
    reached = {0}
    due = Fraction(0)
    for unit in range(1, quantity + 1):
        index = next(i for i, t in enumerate(tiers) if t.up_to is None or unit <= t.up_to)
        reached.add(index)
        due += Fraction(tiers[index].unit_price)
    return due + sum((Fraction(tiers[i].flat_price) for i in reached), Fraction(0))
