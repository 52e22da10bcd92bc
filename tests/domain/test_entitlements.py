"""What a customer may use is what all the plans give together; hard limits stop, soft ones tell."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import Refused
from farebox.base.money import Asset
from farebox.base.time import Interval
from farebox.domain.catalog import (
    BooleanEntitlement,
    CustomEntitlement,
    Entitlement,
    LimitEntitlement,
    OnExceed,
    PlanVersion,
)
from farebox.domain.entitlements import Feature, SourcedValue, absent, resolve, view

D = Decimal
AMOUNTS = st.decimals(0, 10**9, places=3)


def plan(plan_id: str, *entitlements: Entitlement) -> PlanVersion:
    return PlanVersion(
        plan_id, 1, plan_id, Asset.named("USD"), Interval(1, "month"), entitlements=entitlements
    )


def limit(
    plan_id: str, amount: str | None, on_exceed: OnExceed = "block", metric: str = "calls"
) -> PlanVersion:
    return plan(plan_id, LimitEntitlement("quota", metric, None if amount is None else D(amount), on_exceed))


def test_limits_add_up_over_all_running_plans() -> None:
    (feature,) = resolve([limit("team", "100"), limit("scale", "500"), limit("team", "100")])

    assert feature == Feature("quota", "limit", True, ("team", "scale"), D(700), "calls", "block")


def test_one_unlimited_plan_makes_the_whole_unlimited() -> None:
    (feature,) = resolve([limit("team", "100"), limit("big", None)])

    assert feature.limit is None
    assert view(feature, D(10**9)).remaining is None
    assert not view(feature, D(10**9)).exceeded


def test_a_soft_plan_is_not_made_hard_by_another() -> None:
    (feature,) = resolve([limit("team", "100"), limit("scale", "500", "allow")])

    assert feature.on_exceed == "allow"


@pytest.mark.parametrize(
    ("one", "two", "granted"), [(True, False, True), (False, False, False), (True, True, True)]
)
def test_a_feature_is_granted_when_any_plan_grants_it(one: bool, two: bool, granted: bool) -> None:
    (feature,) = resolve(
        [plan("a", BooleanEntitlement("sso", one)), plan("b", BooleanEntitlement("sso", two))]
    )

    assert view(feature).granted is granted
    assert view(feature).current_usage is None


def test_custom_values_stand_side_by_side_with_their_plans() -> None:
    (feature,) = resolve(
        [plan("a", CustomEntitlement("sla", "4h")), plan("b", CustomEntitlement("sla", "1h"))]
    )

    assert view(feature).value is None
    assert view(feature).values == (SourcedValue("a", "4h"), SourcedValue("b", "1h"))


def test_a_custom_value_that_all_plans_agree_on_is_the_value() -> None:
    (feature,) = resolve(
        [plan("a", CustomEntitlement("sla", "4h")), plan("b", CustomEntitlement("sla", "4h"))]
    )

    assert view(feature).value == "4h"
    assert view(feature).source_plans == ("a", "b")


@pytest.mark.parametrize(
    "other",
    [
        plan("b", BooleanEntitlement("quota")),
        plan("b", CustomEntitlement("quota", "x")),
        limit("b", "5", metric="bytes"),
    ],
)
def test_plans_that_mean_different_things_by_one_feature_are_refused(other: PlanVersion) -> None:
    with pytest.raises(Refused) as refused:
        resolve([limit("a", "5"), other])
    assert refused.value.reason.code == "ENTITLEMENT_CONFLICT"
    assert refused.value.reason.field == "entitlements.quota"


def test_no_plan_gives_nothing() -> None:
    assert resolve([]) == ()
    assert not absent("quota").granted


@pytest.mark.parametrize(
    ("used", "remaining", "exceeded"),
    [("0", "100", False), ("99.5", "0.5", False), ("100", "0", True), ("140", "0", True)],
)
def test_what_remains_ends_at_zero(used: str, remaining: str, exceeded: bool) -> None:
    (feature,) = resolve([limit("a", "100")])
    seen = view(feature, D(used))

    assert (seen.remaining, seen.exceeded, seen.current_usage) == (D(remaining), exceeded, D(used))


@given(st.permutations([limit("a", "1"), limit("b", "2.5"), limit("c", "3", "allow")]))
def test_the_order_of_subscriptions_does_not_change_what_they_give(plans: list[PlanVersion]) -> None:
    (feature,) = resolve(plans)

    assert (feature.limit, feature.on_exceed, set(feature.source_plans)) == (
        D("6.5"),
        "allow",
        {"a", "b", "c"},
    )
