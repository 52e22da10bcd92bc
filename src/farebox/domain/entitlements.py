"""What a customer may use: the entitlements of all running plans, put together.

Limits add up, a boolean is granted when any plan grants it, custom values stand side by side with the plan they come
from. Nothing here knows a price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Final

from farebox.base.errors import refuse
from farebox.base.money import EXACT
from farebox.domain.catalog import (
    BooleanEntitlement,
    CustomEntitlement,
    Entitlement,
    EntitlementKind,
    LimitEntitlement,
    OnExceed,
    PlanVersion,
)

_ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class SourcedValue:
    """A custom value and the plan that gives it."""

    plan_id: str
    value: str


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature over all plans. ``limit`` None with kind ``limit`` is unlimited; ``metric_key`` is what it limits."""

    feature_key: str
    kind: EntitlementKind
    granted: bool
    source_plans: tuple[str, ...]
    limit: Decimal | None = None
    metric_key: str | None = None
    on_exceed: OnExceed = "block"
    values: tuple[SourcedValue, ...] = ()


@dataclass(frozen=True, slots=True)
class EntitlementView:
    """A feature as it stands now. ``exceeded`` means nothing remains: under ``block`` the next unit is refused.

    ``value`` is set when all plans agree on a custom value; ``values`` always lists them with their plans.
    """

    feature_key: str
    type: EntitlementKind
    granted: bool
    limit: Decimal | None
    current_usage: Decimal | None
    remaining: Decimal | None
    exceeded: bool
    value: str | None
    source_plans: tuple[str, ...]
    values: tuple[SourcedValue, ...] = ()


def resolve(plans: Iterable[PlanVersion]) -> tuple[Feature, ...]:
    """The features of all running plans, one plan per active subscription (two of the same plan count twice), by key.

    Raises ``Refused`` (``ENTITLEMENT_CONFLICT``) when plans give one feature different types, or limit it by different
    metrics: such limits do not add up. Plan versions never change, so this can only happen when a subscription does.
    """
    sources: dict[str, list[tuple[str, Entitlement]]] = {}
    for plan in plans:
        for entitlement in plan.entitlements:
            sources.setdefault(entitlement.feature_key, []).append((plan.plan_id, entitlement))
    return tuple(_combined(key, sources[key]) for key in sorted(sources))


def view(feature: Feature, current_usage: Decimal = _ZERO) -> EntitlementView:
    """What a customer is told; ``current_usage`` is this billing period's and matters to limits only."""
    limited = feature.kind == "limit"
    remaining = _remaining(feature.limit, current_usage) if limited else None
    agreed = {v.value for v in feature.values}
    return EntitlementView(
        feature_key=feature.feature_key,
        type=feature.kind,
        granted=feature.granted,
        limit=feature.limit,
        current_usage=current_usage if limited else None,
        remaining=remaining,
        exceeded=remaining is not None and remaining == 0,
        value=agreed.pop() if len(agreed) == 1 else None,
        source_plans=feature.source_plans,
        values=feature.values,
    )


def absent(feature_key: str) -> EntitlementView:
    """A feature that no running plan speaks of: not granted."""
    return EntitlementView(feature_key, "boolean", False, None, None, None, False, None, ())


def _combined(key: str, sources: Sequence[tuple[str, Entitlement]]) -> Feature:
    plans = tuple(dict.fromkeys(plan_id for plan_id, _ in sources))
    booleans = [e for _, e in sources if isinstance(e, BooleanEntitlement)]
    limits = [e for _, e in sources if isinstance(e, LimitEntitlement)]
    customs = [SourcedValue(plan_id, e.value) for plan_id, e in sources if isinstance(e, CustomEntitlement)]
    if len(booleans) == len(sources):
        return Feature(key, "boolean", any(e.granted for e in booleans), plans)
    if len(limits) == len(sources) and len({e.metric_key for e in limits}) == 1:
        return Feature(key, "limit", True, plans, _sum(limits), limits[0].metric_key, _softest(limits))
    if len(customs) == len(sources):
        return Feature(key, "custom", True, plans, values=tuple(dict.fromkeys(customs)))
    raise refuse(
        "ENTITLEMENT_CONFLICT",
        f"the plans {', '.join(plans)} mean different things by {key!r}: give it one type and one metric in all of them",
        f"entitlements.{key}",
    )


def _sum(limits: Sequence[LimitEntitlement]) -> Decimal | None:
    total = _ZERO
    with localcontext(EXACT):
        for entitlement in limits:
            if entitlement.limit is None:
                return None
            total += entitlement.limit
    return total


def _softest(limits: Sequence[LimitEntitlement]) -> OnExceed:
    """A plan that lets usage pass its limit is not made hard by another one the customer also pays for."""
    return "allow" if any(e.on_exceed == "allow" for e in limits) else "block"


def _remaining(limit: Decimal | None, used: Decimal) -> Decimal | None:
    if limit is None:
        return None
    with localcontext(EXACT):
        return max(limit - used, _ZERO)
