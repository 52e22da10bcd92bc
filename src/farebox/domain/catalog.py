"""What an account is charged for: metrics, price plans in immutable versions, charges with their prices, entitlements.

A plan is checked as a whole: ``check_plan`` reports every fault at once, each with the path of the field in the plan
document. Prices and quantities are exact decimals with bounds, so that no later multiplication can lose a digit.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Final, Literal, assert_never, get_args

from farebox.base.errors import InvariantError, Reason, Refused, refuse
from farebox.base.money import Asset, plain
from farebox.base.time import Interval

Aggregation = Literal["sum", "count", "max", "min", "last", "unique_count"]
ValueType = Literal["decimal", "integer"]
MetricStatus = Literal["active", "inactive"]
PricingModel = Literal["per_unit", "tiered", "volume", "package", "flat_fee"]
Timing = Literal["arrears"]
OnExceed = Literal["block", "allow"]

AGGREGATIONS: Final[tuple[Aggregation, ...]] = get_args(Aggregation)

CHARGES_MAX: Final = 100
TIERS_MAX: Final = 100
ENTITLEMENTS_MAX: Final = 200
NAME_CHARACTERS_MAX: Final = 200
CUSTOM_VALUE_CHARACTERS_MAX: Final = 1000
PERIOD_DAYS_MAX: Final = 3660

#: A price has at most 15 digits before the point and 18 after it (one wei of an 18-decimal token is the finest).
PRICE_DIGITS_MAX: Final = 15
PRICE_PLACES_MAX: Final = 18
#: A quantity has at most 40 digits before the point and 30 after it, as ``base.money.parse_decimal`` reads them.
QUANTITY_DIGITS_MAX: Final = 40
QUANTITY_PLACES_MAX: Final = 30

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}\Z", re.ASCII)
_ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class Metric:
    """What is counted. ``key`` is its identity for ever; ``property`` names what ``unique_count`` counts."""

    key: str
    name: str
    aggregation: Aggregation
    property: str | None = None
    value_type: ValueType = "decimal"
    description: str = ""
    status: MetricStatus = "active"


# ── prices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Tier:
    """A band of quantity. ``up_to`` is its last unit, inclusive; None means open. ``flat_price`` is due once it is reached."""

    up_to: Decimal | None
    unit_price: Decimal
    flat_price: Decimal = _ZERO


@dataclass(frozen=True, slots=True)
class PerUnit:
    """Every unit costs the same."""

    unit_price: Decimal
    model: ClassVar[PricingModel] = "per_unit"


@dataclass(frozen=True, slots=True)
class Tiered:
    """Each slice of the quantity costs what the tier it falls in says (graduated)."""

    tiers: tuple[Tier, ...]
    model: ClassVar[PricingModel] = "tiered"


@dataclass(frozen=True, slots=True)
class Volume:
    """All units cost what the one tier says that the whole quantity falls in."""

    tiers: tuple[Tier, ...]
    model: ClassVar[PricingModel] = "volume"


@dataclass(frozen=True, slots=True)
class Package:
    """Units are sold in packages; a started package counts whole. ``free_units`` come off first."""

    package_size: Decimal
    package_price: Decimal
    free_units: Decimal = _ZERO
    model: ClassVar[PricingModel] = "package"


@dataclass(frozen=True, slots=True)
class FlatFee:
    """A fixed amount a period, whatever was used."""

    amount: Decimal
    model: ClassVar[PricingModel] = "flat_fee"


Pricing = PerUnit | Tiered | Volume | Package | FlatFee


@dataclass(frozen=True, slots=True)
class Charge:
    """One line of a future invoice. ``metric_key`` is None for a flat fee and only for it; due after the period."""

    id: str
    metric_key: str | None
    pricing: Pricing
    description: str = ""
    timing: Timing = "arrears"


# ── entitlements ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class BooleanEntitlement:
    """A feature that a plan grants, or says that it does not."""

    feature_key: str
    granted: bool = True
    kind: ClassVar[Literal["boolean"]] = "boolean"


@dataclass(frozen=True, slots=True)
class LimitEntitlement:
    """So much of a metric in a billing period; ``limit`` None is unlimited. ``allow`` lets calls pass beyond it."""

    feature_key: str
    metric_key: str
    limit: Decimal | None
    on_exceed: OnExceed = "block"
    kind: ClassVar[Literal["limit"]] = "limit"


@dataclass(frozen=True, slots=True)
class CustomEntitlement:
    """A value the seller's own software reads, such as ``4h`` for a support promise."""

    feature_key: str
    value: str
    kind: ClassVar[Literal["custom"]] = "custom"


Entitlement = BooleanEntitlement | LimitEntitlement | CustomEntitlement
EntitlementKind = Literal["boolean", "limit", "custom"]


@dataclass(frozen=True, slots=True)
class PlanVersion:
    """One immutable version of a price plan. A change is a new version; subscriptions keep the one they began with."""

    plan_id: str
    version: int
    name: str
    currency: Asset
    interval: Interval
    charges: tuple[Charge, ...] = ()
    entitlements: tuple[Entitlement, ...] = ()


# ── checks: every fault at once, with its path ───────────────────────────────────────────────────────────────────────


def check_plan(plan: PlanVersion, known_metrics: Container[str] | None = None) -> None:
    """Raise ``Refused`` with every fault of ``plan_faults``, or return."""
    if faults := plan_faults(plan, known_metrics):
        raise Refused(*faults)


def plan_faults(plan: PlanVersion, known_metrics: Container[str] | None = None) -> list[Reason]:
    """Everything wrong with a plan, in document order; ``known_metrics`` None leaves the metrics' existence unchecked.

    Paths are those of ``plan_document``: ``charges[0].properties.tiers[1].up_to``, ``entitlements.api_calls.limit``.
    """
    return list(_plan_faults(plan, known_metrics))


def check_metric(metric: Metric) -> None:
    """Raise ``Refused`` with every fault of ``metric_faults``, or return."""
    if faults := metric_faults(metric):
        raise Refused(*faults)


def metric_faults(metric: Metric) -> list[Reason]:
    """Everything wrong with a metric's definition."""
    faults = [*_key_faults(metric.key, "key"), *_name_faults(metric.name, "name")]
    if metric.aggregation not in AGGREGATIONS:
        faults.append(
            Reason(
                "AGGREGATION_UNKNOWN", f"aggregation must be one of {', '.join(AGGREGATIONS)}", "aggregation"
            )
        )
    if metric.value_type not in get_args(ValueType):
        faults.append(Reason("VALUE_TYPE_UNKNOWN", "value_type must be decimal or integer", "value_type"))
    if metric.aggregation == "unique_count" and not metric.property:
        faults.append(
            Reason(
                "PROPERTY_REQUIRED",
                "unique_count needs the event property whose values it counts",
                "property",
            )
        )
    if metric.aggregation != "unique_count" and metric.property is not None:
        faults.append(
            Reason(
                "PROPERTY_UNUSED",
                f"{metric.aggregation} works on the event's value: remove property",
                "property",
            )
        )
    return faults


def _plan_faults(plan: PlanVersion, known_metrics: Container[str] | None) -> Iterator[Reason]:
    yield from _key_faults(plan.plan_id, "id")
    if plan.version < 1:
        yield Reason("VERSION_INVALID", "versions count from 1", "version")
    yield from _name_faults(plan.name, "name")
    yield from _interval_faults(plan.interval)
    if len(plan.charges) > CHARGES_MAX:
        yield Reason("CHARGES_TOO_MANY", f"a plan has at most {CHARGES_MAX} charges", "charges")
    yield from _repeated((c.id for c in plan.charges), "CHARGE_ID_DUPLICATE", "charges[{}].id")
    for i, charge in enumerate(plan.charges):
        yield from charge_faults(charge, f"charges[{i}]", known_metrics)
    if len(plan.entitlements) > ENTITLEMENTS_MAX:
        yield Reason(
            "ENTITLEMENTS_TOO_MANY", f"a plan has at most {ENTITLEMENTS_MAX} entitlements", "entitlements"
        )
    yield from _repeated((e.feature_key for e in plan.entitlements), "FEATURE_KEY_DUPLICATE", "entitlements")
    for entitlement in plan.entitlements:
        yield from _entitlement_faults(entitlement, known_metrics)


def charge_faults(charge: Charge, path: str, known_metrics: Container[str] | None = None) -> Iterator[Reason]:
    """Everything wrong with one charge; ``path`` is where it stands in its document."""
    yield from _key_faults(charge.id, f"{path}.id")
    yield from _text_faults(charge.description, f"{path}.description")
    if charge.timing not in get_args(Timing):
        yield Reason(
            "TIMING_UNKNOWN", "charges are due after the period: timing must be arrears", f"{path}.timing"
        )
    flat = isinstance(charge.pricing, FlatFee)
    if flat and charge.metric_key is not None:
        yield Reason(
            "METRIC_UNUSED", "a flat fee does not depend on usage: leave metric_key out", f"{path}.metric_key"
        )
    if not flat and charge.metric_key is None:
        yield Reason("METRIC_REQUIRED", f"{charge.pricing.model} needs a metric_key", f"{path}.metric_key")
    if not flat and charge.metric_key is not None:
        yield from _metric_key_faults(charge.metric_key, f"{path}.metric_key", known_metrics)
    yield from _pricing_faults(charge.pricing, f"{path}.properties")


def _pricing_faults(pricing: Pricing, path: str) -> Iterator[Reason]:
    match pricing:
        case PerUnit():
            yield from _price_faults(pricing.unit_price, f"{path}.unit_price")
        case Tiered() | Volume():
            yield from _tier_faults(pricing.tiers, f"{path}.tiers")
        case Package():
            yield from _quantity_faults(pricing.package_size, f"{path}.package_size")
            if pricing.package_size == 0:
                yield Reason(
                    "PACKAGE_SIZE_INVALID", "a package holds more than nothing", f"{path}.package_size"
                )
            yield from _price_faults(pricing.package_price, f"{path}.package_price")
            yield from _quantity_faults(pricing.free_units, f"{path}.free_units")
        case FlatFee():
            yield from _price_faults(pricing.amount, f"{path}.amount")
        case _:
            assert_never(pricing)


def _tier_faults(tiers: tuple[Tier, ...], path: str) -> Iterator[Reason]:
    if not tiers:
        yield Reason("TIERS_EMPTY", "at least one tier is needed", path)
    if len(tiers) > TIERS_MAX:
        yield Reason("TIERS_TOO_MANY", f"a charge has at most {TIERS_MAX} tiers", path)
    lower = _ZERO
    for i, tier in enumerate(tiers):
        at, last = f"{path}[{i}]", i == len(tiers) - 1
        if tier.up_to is None and not last:
            yield Reason(
                "TIER_OPEN_EARLY", "only the last tier is open: give this one an up_to", f"{at}.up_to"
            )
        if tier.up_to is not None:
            if last:
                yield Reason(
                    "TIER_LAST_CLOSED", "the last tier must be open: its up_to is null", f"{at}.up_to"
                )
            bound_faults = list(_quantity_faults(tier.up_to, f"{at}.up_to"))
            yield from bound_faults
            if not bound_faults and tier.up_to <= lower:
                yield Reason("TIERS_NOT_ASCENDING", f"up_to must be above {plain(lower)}", f"{at}.up_to")
            if not bound_faults:
                lower = max(lower, tier.up_to)
        yield from _price_faults(tier.unit_price, f"{at}.unit_price")
        yield from _price_faults(tier.flat_price, f"{at}.flat_price")


def _entitlement_faults(entitlement: Entitlement, known_metrics: Container[str] | None) -> Iterator[Reason]:
    path = f"entitlements.{entitlement.feature_key}"
    yield from _key_faults(entitlement.feature_key, path)
    match entitlement:
        case BooleanEntitlement():
            pass
        case LimitEntitlement():
            yield from _metric_key_faults(entitlement.metric_key, f"{path}.metric_key", known_metrics)
            if entitlement.limit is not None:
                yield from _quantity_faults(entitlement.limit, f"{path}.limit")
            if entitlement.on_exceed not in get_args(OnExceed):
                yield Reason("ON_EXCEED_UNKNOWN", "on_exceed must be block or allow", f"{path}.on_exceed")
        case CustomEntitlement():
            if len(entitlement.value) > CUSTOM_VALUE_CHARACTERS_MAX:
                yield Reason(
                    "VALUE_TOO_LONG", f"at most {CUSTOM_VALUE_CHARACTERS_MAX} characters", f"{path}.value"
                )
        case _:
            assert_never(entitlement)


def _interval_faults(interval: Interval) -> Iterator[Reason]:
    if interval.unit == "day" and interval.count > PERIOD_DAYS_MAX:
        yield Reason(
            "PERIOD_TOO_LONG", f"a billing period has at most {PERIOD_DAYS_MAX} days", "billing_period"
        )
    if interval.unit != "day" and interval not in PERIOD_NAMES.values():
        names = ", ".join(PERIOD_NAMES)
        yield Reason(
            "PERIOD_UNKNOWN", f'billing_period must be one of {names} or {{"days": n}}', "billing_period"
        )


def _key_faults(key: str, path: str) -> Iterator[Reason]:
    if not _KEY.match(key):
        yield Reason(
            "KEY_MALFORMED",
            f"{key[:60]!r} must be 1 to 100 letters, digits or _ . : - and begin with a letter or digit",
            path,
        )


def _metric_key_faults(key: str, path: str, known_metrics: Container[str] | None) -> Iterator[Reason]:
    malformed = list(_key_faults(key, path))
    yield from malformed
    if not malformed and known_metrics is not None and key not in known_metrics:
        yield Reason("METRIC_UNKNOWN", f"there is no metric {key!r}: create it first", path)


def _name_faults(name: str, path: str) -> Iterator[Reason]:
    if not name.strip():
        yield Reason("NAME_EMPTY", "a name is needed", path)
    yield from _text_faults(name, path)


def _text_faults(text: str, path: str) -> Iterator[Reason]:
    if len(text) > NAME_CHARACTERS_MAX:
        yield Reason("NAME_TOO_LONG", f"at most {NAME_CHARACTERS_MAX} characters", path)
    if "\x00" in text:
        yield Reason("NAME_MALFORMED", "a NUL character cannot be stored", path)


def _price_faults(price: Decimal, path: str) -> Iterator[Reason]:
    yield from decimal_faults(price, path, PRICE_DIGITS_MAX, PRICE_PLACES_MAX)


def _quantity_faults(quantity: Decimal, path: str) -> Iterator[Reason]:
    yield from decimal_faults(quantity, path, QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX)


def decimal_faults(number: Decimal, path: str, digits_max: int, places_max: int) -> Iterator[Reason]:
    """Why a decimal may not be a price or a quantity: not finite, negative, too large or too fine."""
    if not number.is_finite():
        yield Reason("DECIMAL_NOT_FINITE", "a plain decimal number is needed", path)
        return
    if number < 0:
        yield Reason("DECIMAL_NEGATIVE", "must not be negative", path)
    if number and number.adjusted() >= digits_max:
        yield Reason("DECIMAL_TOO_LARGE", f"at most {digits_max} digits before the point", path)
    if places(number) > places_max:
        yield Reason("DECIMAL_TOO_FINE", f"at most {places_max} digits after the point", path)


def places(number: Decimal) -> int:
    """Digits needed after the point, trailing zeros not counted."""
    _, digits, exponent = number.as_tuple()
    if not isinstance(exponent, int):
        raise InvariantError(f"{number} is not finite")
    needed = -exponent
    for digit in reversed(digits):
        if needed <= 0 or digit:
            break
        needed -= 1
    return max(needed, 0) if number else 0


def _repeated(keys: Iterable[str], code: str, path: str) -> Iterator[Reason]:
    seen: set[str] = set()
    for i, key in enumerate(keys):
        if key in seen:
            yield Reason(code, f"{key!r} is there twice", path.format(i))
        seen.add(key)


# ── the plan document: plain JSON, prices as strings ─────────────────────────────────────────────────────────────────

PERIOD_NAMES: Final[dict[str, Interval]] = {
    "weekly": Interval(1, "week"),
    "monthly": Interval(1, "month"),
    "quarterly": Interval(3, "month"),
    "annual": Interval(1, "year"),
}


def plan_document(plan: PlanVersion) -> dict[str, Any]:
    """The plan as plain JSON values, decimals as strings; id and version stay outside (``plan_from_document``)."""
    return {
        "name": plan.name,
        "currency": plan.currency.code,
        "billing_period": interval_document(plan.interval),
        "charges": [charge_document(c) for c in plan.charges],
        "entitlements": {e.feature_key: _entitlement_document(e) for e in plan.entitlements},
    }


def plan_from_document(plan_id: str, version: int, document: dict[str, Any]) -> PlanVersion:
    """The inverse of ``plan_document``. It reads what was checked and stored; what people write comes through app/documents."""
    return PlanVersion(
        plan_id=plan_id,
        version=version,
        name=document["name"],
        currency=Asset.named(document["currency"]),
        interval=interval_from_document(document["billing_period"]),
        charges=tuple(charge_from_document(c) for c in document["charges"]),
        entitlements=tuple(_entitlement_from_document(k, e) for k, e in document["entitlements"].items()),
    )


def interval_document(interval: Interval) -> str | dict[str, int]:
    """``"monthly"`` and its like, or ``{"days": 30}``."""
    for name, named in PERIOD_NAMES.items():
        if named == interval:
            return name
    if interval.unit != "day":
        raise InvariantError(f"no billing period is called {interval}")
    return {"days": interval.count}


def interval_from_document(document: str | dict[str, int]) -> Interval:
    """Read a billing period; ``Refused`` when it is neither a known name nor ``{"days": n}`` with n of at least 1."""
    if isinstance(document, str) and document in PERIOD_NAMES:
        return PERIOD_NAMES[document]
    if isinstance(document, dict) and set(document) == {"days"}:
        days = document["days"]
        if isinstance(days, int) and not isinstance(days, bool) and 1 <= days <= PERIOD_DAYS_MAX:
            return Interval(days, "day")
    names = ", ".join(PERIOD_NAMES)
    raise refuse(
        "PERIOD_UNKNOWN",
        f'billing_period must be one of {names} or {{"days": n}} with n from 1 to {PERIOD_DAYS_MAX}',
        "billing_period",
    )


def charge_document(charge: Charge) -> dict[str, Any]:
    """One charge as plain JSON values."""
    return {
        "id": charge.id,
        "metric_key": charge.metric_key,
        "pricing_model": charge.pricing.model,
        "properties": _properties(charge.pricing),
        "description": charge.description,
        "timing": charge.timing,
    }


def charge_from_document(document: dict[str, Any]) -> Charge:
    """The inverse of ``charge_document``."""
    return Charge(
        id=document["id"],
        metric_key=document["metric_key"],
        pricing=_pricing(document["pricing_model"], document["properties"]),
        description=document["description"],
        timing=document["timing"],
    )


def _properties(pricing: Pricing) -> dict[str, Any]:
    match pricing:
        case PerUnit():
            return {"unit_price": plain(pricing.unit_price)}
        case Tiered() | Volume():
            return {"tiers": [_tier_document(t) for t in pricing.tiers]}
        case Package():
            return {
                "package_size": plain(pricing.package_size),
                "package_price": plain(pricing.package_price),
                "free_units": plain(pricing.free_units),
            }
        case FlatFee():
            return {"amount": plain(pricing.amount)}
    assert_never(pricing)


def _pricing(model: PricingModel, properties: dict[str, Any]) -> Pricing:
    match model:
        case "per_unit":
            return PerUnit(Decimal(properties["unit_price"]))
        case "tiered":
            return Tiered(tuple(_tier(t) for t in properties["tiers"]))
        case "volume":
            return Volume(tuple(_tier(t) for t in properties["tiers"]))
        case "package":
            return Package(
                Decimal(properties["package_size"]),
                Decimal(properties["package_price"]),
                Decimal(properties["free_units"]),
            )
        case "flat_fee":
            return FlatFee(Decimal(properties["amount"]))
    raise InvariantError(f"a stored charge has the pricing model {model!r}")


def _tier_document(tier: Tier) -> dict[str, Any]:
    return {
        "up_to": None if tier.up_to is None else plain(tier.up_to),
        "unit_price": plain(tier.unit_price),
        "flat_price": plain(tier.flat_price),
    }


def _tier(document: dict[str, Any]) -> Tier:
    up_to = document["up_to"]
    return Tier(
        None if up_to is None else Decimal(up_to),
        Decimal(document["unit_price"]),
        Decimal(document["flat_price"]),
    )


def _entitlement_document(entitlement: Entitlement) -> dict[str, Any]:
    match entitlement:
        case BooleanEntitlement():
            return {"type": "boolean", "granted": entitlement.granted}
        case LimitEntitlement():
            return {
                "type": "limit",
                "metric_key": entitlement.metric_key,
                "limit": None if entitlement.limit is None else plain(entitlement.limit),
                "on_exceed": entitlement.on_exceed,
            }
        case CustomEntitlement():
            return {"type": "custom", "value": entitlement.value}
    assert_never(entitlement)


def _entitlement_from_document(feature_key: str, document: dict[str, Any]) -> Entitlement:
    match document["type"]:
        case "boolean":
            return BooleanEntitlement(feature_key, document["granted"])
        case "limit":
            limit = document["limit"]
            return LimitEntitlement(
                feature_key,
                document["metric_key"],
                None if limit is None else Decimal(limit),
                document["on_exceed"],
            )
        case "custom":
            return CustomEntitlement(feature_key, document["value"])
        case kind:
            raise InvariantError(f"a stored entitlement has the type {kind!r}")
