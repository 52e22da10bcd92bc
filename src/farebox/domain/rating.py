"""From quantity to money: the one pure function that preview, calculate, invoice and quote share.

Exact decimals up to the line, one rounding there (half up, to the currency's minor unit), and a total that is the sum
of the rounded lines. Each line explains itself: the share of every tier and the arithmetic in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any, Final, assert_never

from farebox.base.errors import Reason, Refused
from farebox.base.money import EXACT, Asset, Money, plain
from farebox.domain.catalog import (
    QUANTITY_DIGITS_MAX,
    QUANTITY_PLACES_MAX,
    Charge,
    FlatFee,
    Package,
    PerUnit,
    PricingModel,
    Tier,
    Tiered,
    Volume,
    decimal_faults,
)

_ZERO: Final = Decimal(0)
_ONE: Final = Decimal(1)


@dataclass(frozen=True, slots=True)
class TierShare:
    """What one tier contributed. ``tier`` counts from 1; ``amount`` is ``quantity × unit_price + flat_price``, exact."""

    tier: int
    up_to: Decimal | None
    quantity: Decimal
    unit_price: Decimal
    flat_price: Decimal
    amount: Decimal


@dataclass(frozen=True, slots=True)
class RatedLine:
    """One charge, priced. ``exact_amount`` is in major units before the one rounding, ``amount`` after it."""

    charge_id: str
    description: str
    pricing_model: PricingModel
    metric_key: str | None
    quantity: Decimal
    exact_amount: Decimal
    amount: Money
    tier_breakdown: tuple[TierShare, ...] = ()
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rating:
    """Lines in the order of the charges, and their sum."""

    lines: tuple[RatedLine, ...]
    total: Money


@dataclass(frozen=True, slots=True)
class _Priced:
    """What a pricing model makes of a quantity, before rounding."""

    amount: Decimal
    steps: tuple[str, ...]
    shares: tuple[TierShare, ...] = ()


def rate(currency: Asset, charges: Iterable[Charge], quantities: Mapping[str, Decimal]) -> Rating:
    """Price every charge. A metric without a quantity counts as zero; quantities that no charge asks for cost nothing.

    Raises ``Refused`` with every quantity that is negative or out of bounds (``usage.<metric_key>``).
    """
    charges = tuple(charges)
    used = {c.metric_key: quantities.get(c.metric_key, _ZERO) for c in charges if c.metric_key is not None}
    if faults := [fault for key, quantity in used.items() for fault in _quantity_faults(key, quantity)]:
        raise Refused(*faults)
    lines = tuple(_line(currency, c, _ZERO if c.metric_key is None else used[c.metric_key]) for c in charges)
    return Rating(lines, sum((line.amount for line in lines), Money(0, currency)))


def _line(currency: Asset, charge: Charge, quantity: Decimal) -> RatedLine:
    with localcontext(EXACT):
        priced = _price(charge, quantity)
        amount = Money.rounded(priced.amount, currency)
        return RatedLine(
            charge_id=charge.id,
            description=charge.description or charge.metric_key or charge.id,
            pricing_model=charge.pricing.model,
            metric_key=charge.metric_key,
            quantity=_ONE if isinstance(charge.pricing, FlatFee) else quantity,
            exact_amount=priced.amount,
            amount=amount,
            tier_breakdown=priced.shares,
            steps=(*priced.steps, *_rounding_step(priced.amount, amount)),
        )


# ── the pricing models ───────────────────────────────────────────────────────────────────────────────────────────────


def _price(charge: Charge, quantity: Decimal) -> _Priced:
    match charge.pricing:
        case PerUnit() as pricing:
            return _per_unit(pricing, quantity)
        case Tiered() as pricing:
            return _tiered(pricing, quantity)
        case Volume() as pricing:
            return _volume(pricing, quantity)
        case Package() as pricing:
            return _package(pricing, quantity)
        case FlatFee() as pricing:
            return _flat_fee(pricing)
        case pricing:
            assert_never(pricing)


def _per_unit(pricing: PerUnit, quantity: Decimal) -> _Priced:
    amount = quantity * pricing.unit_price
    return _Priced(amount, (_product(quantity, pricing.unit_price, amount),))


def _tiered(pricing: Tiered, quantity: Decimal) -> _Priced:
    """Price each slice of the quantity in the tier where it falls; a tier's flat price is due once it is reached.

    The first tier is reached even by nothing, so its flat price is due at zero usage.
    """
    shares = []
    lower = _ZERO
    for number, tier in enumerate(pricing.tiers, start=1):
        if number > 1 and quantity <= lower:
            break
        upper = quantity if tier.up_to is None else min(quantity, tier.up_to)
        shares.append(_share(number, tier, upper - lower))
        lower = upper if tier.up_to is None else tier.up_to
    amount = sum((s.amount for s in shares), _ZERO)
    return _Priced(amount, _tier_steps(shares, amount), tuple(shares))


def _volume(pricing: Volume, quantity: Decimal) -> _Priced:
    """Price the whole quantity in the one tier it falls in (upper bounds are inclusive)."""
    number, tier = next(
        (n, t) for n, t in enumerate(pricing.tiers, start=1) if t.up_to is None or quantity <= t.up_to
    )
    share = _share(number, tier, quantity)
    return _Priced(share.amount, (_volume_step(share), *_tier_steps([share], share.amount)), (share,))


def _package(pricing: Package, quantity: Decimal) -> _Priced:
    """Sell whole packages: what is left after the free units, divided by the size, rounded up."""
    billable = max(quantity - pricing.free_units, _ZERO)
    packages = _packages(billable, pricing.package_size)
    amount = packages * pricing.package_price
    steps = []
    if pricing.free_units:
        steps.append(
            f"{_grouped(quantity)} − {_grouped(pricing.free_units)} free = {_grouped(billable)} to pay for"
        )
    noun = "package" if packages == 1 else "packages"
    steps.append(
        f"{_grouped(billable)} in packages of {_grouped(pricing.package_size)} = {_grouped(packages)} {noun}"
    )
    steps.append(_product(packages, pricing.package_price, amount))
    return _Priced(amount, tuple(steps))


def _packages(quantity: Decimal, size: Decimal) -> Decimal:
    whole, rest = divmod(quantity, size)
    return whole + 1 if rest else whole


def _flat_fee(pricing: FlatFee) -> _Priced:
    return _Priced(pricing.amount, (f"fixed fee {_grouped(pricing.amount)}",))


def _share(number: int, tier: Tier, quantity: Decimal) -> TierShare:
    amount = quantity * tier.unit_price + tier.flat_price
    return TierShare(number, tier.up_to, quantity, tier.unit_price, tier.flat_price, amount)


def _quantity_faults(name: str, quantity: Decimal) -> list[Reason]:
    return list(decimal_faults(quantity, f"usage.{name}", QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX))


# ── the arithmetic in words ──────────────────────────────────────────────────────────────────────────────────────────


def _product(quantity: Decimal, price: Decimal, amount: Decimal) -> str:
    return f"{_grouped(quantity)} × {_grouped(price)} = {_grouped(amount)}"


def _tier_steps(shares: list[TierShare], amount: Decimal) -> tuple[str, ...]:
    """A step for each tier's units and each flat price, then their sum when there is more than one."""
    steps, parts = [], []
    for share in shares:
        units = share.quantity * share.unit_price
        steps.append(f"tier {share.tier}: {_product(share.quantity, share.unit_price, units)}")
        parts.append(units)
        if share.flat_price:
            steps.append(f"tier {share.tier}: flat price {_grouped(share.flat_price)}")
            parts.append(share.flat_price)
    if len(parts) > 1:
        steps.append(f"{' + '.join(map(_grouped, parts))} = {_grouped(amount)}")
    return tuple(steps)


def _volume_step(share: TierShare) -> str:
    reach = "has no upper end" if share.up_to is None else f"reaches up to {_grouped(share.up_to)}"
    return f"{_grouped(share.quantity)} falls in tier {share.tier}, which {reach}"


def _rounding_step(exact: Decimal, amount: Money) -> list[str]:
    if exact == amount.major:
        return []
    return [f"{_grouped(exact)} rounded to {_grouped(amount.major)} {amount.asset.code}"]


def _grouped(number: Decimal) -> str:
    """``1374923.50`` as ``1,374,923.5``."""
    text = f"{number or _ZERO:,f}"  # a negative zero is a zero
    return text.rstrip("0").rstrip(".") if "." in text else text


# ── the line as plain JSON: what calculations store, invoices keep and the API answers ───────────────────────────────


def line_document(line: RatedLine) -> dict[str, Any]:
    """One line as plain JSON: ``amount`` in whole minor units, quantities and exact amounts as decimal strings."""
    return {
        "charge_id": line.charge_id,
        "description": line.description,
        "pricing_model": line.pricing_model,
        "metric_key": line.metric_key,
        "quantity": plain(line.quantity),
        "exact_amount": plain(line.exact_amount),
        "amount": line.amount.units,
        "tier_breakdown": [_share_document(s) for s in line.tier_breakdown],
        "steps": list(line.steps),
    }


def line_from_document(currency: Asset, document: Mapping[str, Any]) -> RatedLine:
    """The inverse of ``line_document``."""
    return RatedLine(
        charge_id=document["charge_id"],
        description=document["description"],
        pricing_model=document["pricing_model"],
        metric_key=document["metric_key"],
        quantity=Decimal(document["quantity"]),
        exact_amount=Decimal(document["exact_amount"]),
        amount=Money(document["amount"], currency),
        tier_breakdown=tuple(_share_from_document(s) for s in document["tier_breakdown"]),
        steps=tuple(document["steps"]),
    )


def _share_document(share: TierShare) -> dict[str, Any]:
    return {
        "tier": share.tier,
        "up_to": None if share.up_to is None else plain(share.up_to),
        "quantity": plain(share.quantity),
        "unit_price": plain(share.unit_price),
        "flat_price": plain(share.flat_price),
        "amount": plain(share.amount),
    }


def _share_from_document(document: Mapping[str, Any]) -> TierShare:
    up_to = document["up_to"]
    return TierShare(
        tier=document["tier"],
        up_to=None if up_to is None else Decimal(up_to),
        quantity=Decimal(document["quantity"]),
        unit_price=Decimal(document["unit_price"]),
        flat_price=Decimal(document["flat_price"]),
        amount=Decimal(document["amount"]),
    )
