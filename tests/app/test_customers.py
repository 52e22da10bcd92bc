"""Customers, their keys, plans and subscriptions; and what these say to the gateways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from farebox.base.errors import Reason, Refused
from farebox.base.ids import CustomerId
from farebox.base.secrets import key_hash
from farebox.base.time import Interval
from farebox.domain.catalog import (
    BooleanEntitlement,
    Charge,
    CustomEntitlement,
    FlatFee,
    LimitEntitlement,
    PerUnit,
)
from farebox.domain.customer import Customer
from farebox.store import changes, grants
from farebox.store.pool import Database
from tests.app.office import Office, at


@pytest.fixture
async def office(database: Database) -> AsyncIterator[Office]:
    opened = Office(database)
    yield opened
    await opened.close()


async def refusal(coroutine: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await coroutine  # type: ignore[misc]
    return caught.value.reason


async def grant_of(office: Office, customer_id: str = "acme") -> object:
    async with office.database.connection() as tx:
        return await grants.by_subject(tx, "customer", customer_id)


# ── customers ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_customer_is_created_once_changed_and_listed(office: Office):
    await office.customer("acme", email="a@acme.example", metadata={"tier": "gold"})
    assert (await refusal(office.customer("acme"))).code == "CUSTOMER_ID_DUPLICATE"

    patched = await office.customers.patch("test", "acme", {"name": "Acme GmbH", "email": None})
    await office.customer("beta")

    assert (patched.name, patched.email, patched.metadata) == ("Acme GmbH", None, {"tier": "gold"})
    page = await office.customers.list(limit=1)
    rest = await office.customers.list(limit=1, cursor=page.next_cursor)
    assert [c.id for c in page.data + rest.data] == ["acme", "beta"]
    assert rest.next_cursor is None


async def test_faults_of_a_customer_are_named_with_their_fields(office: Office):
    await office.customer()

    assert (await refusal(office.customers.patch("test", "acme", {"id": "b"}))).field == "id"
    assert (
        await refusal(office.customers.patch("test", "acme", {"timezone": "Mars/Base"}))
    ).field == "timezone"
    assert (
        await refusal(office.customers.patch("test", "nobody", {"name": "x"}))
    ).code == "CUSTOMER_NOT_FOUND"
    assert (await refusal(office.customers.create("test", Customer(CustomerId("a b"), "x")))).field == "id"


async def test_erasing_removes_personal_data_and_keeps_the_books(office: Office):
    await office.opened()
    key = await office.customers.create_key("test", "acme")
    await office.used("10")
    assert (await refusal(office.customers.erase("test", "acme"))).code == "CUSTOMER_HAS_SUBSCRIPTIONS"
    issued = await office.billing.issue("test", "acme", at("2026-11-21"))
    await office.rows("UPDATE subscription SET status = 'ended', end_at = '2026-11-21Z' RETURNING id")

    erased = await office.customers.erase("test", "acme")

    assert (erased.name, erased.email, dict(erased.metadata)) == ("erased", None, {})
    assert erased.erased_at is not None
    assert await office.customers.erase("test", "acme") == erased
    assert (await office.billing.get(issued.invoice.id)).invoice == issued.invoice
    async with office.database.connection() as tx:
        assert await grants.by_customer_key(tx, key_hash(key.key)) is None
    assert (await refusal(office.customers.create_key("test", "acme"))).code == "CUSTOMER_ERASED"
    assert (await refusal(office.used())).code == "CUSTOMER_UNKNOWN"
    assert (await refusal(office.customer("acme"))).code == "CUSTOMER_ID_DUPLICATE"


async def test_a_gateway_key_is_shown_once_and_ends_when_revoked(office: Office, database_url: str):
    heard: list[tuple[str, str]] = []
    listener = changes.Listener(database_url, lambda kind, id: heard.append((kind, id)), lambda: None)
    await listener.start()
    await office.opened()
    made = await office.customers.create_key("test", "acme")
    async with office.database.connection() as tx:
        owner = await grants.by_customer_key(tx, key_hash(made.key))

    await office.customers.revoke_key("test", "acme", made.key_id)
    await office.customers.revoke_key("test", "acme", made.key_id)

    assert made.key.startswith("fbx_ck_")
    assert len(made.key) == 7 + 32
    assert made.key not in str(await office.rows("SELECT * FROM customer_key"))
    assert owner is not None
    assert (owner.customer_id, owner.grant and owner.grant.plan) == ("acme", "starter")
    async with office.database.connection() as tx:
        assert await grants.by_customer_key(tx, key_hash(made.key)) is None
    for _ in range(100):
        if ("key", made.key_id) in heard:
            break
        await asyncio.sleep(0.02)
    assert {("grant", "acme"), ("key", made.key_id)} <= set(heard)
    await listener.close()
    [listed] = (await office.customers.list_keys("acme")).data
    assert (listed.hint, listed.revoked_at is not None) == (made.key[-4:], True)
    assert (
        await refusal(office.customers.revoke_key("test", "acme", "ck_none"))
    ).code == "CUSTOMER_KEY_NOT_FOUND"


# ── metrics and plans ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_plan_again_is_the_same_version_and_another_one_the_next(office: Office):
    await office.metric()

    versions = [await office.plan() for _ in range(3)]
    changed = await office.plan(charges=(Charge("base", None, FlatFee(Decimal(50))),))
    back = await office.plan()

    assert (versions, changed, back) == ([1, 1, 1], 2, 3)
    page = await office.plans.list_versions("starter", limit=2)
    rest = await office.plans.list_versions("starter", limit=2, cursor=page.next_cursor)
    assert [s.plan.version for s in page.data + rest.data] == [3, 2, 1]
    assert [s.plan.version for s in (await office.plans.list_plans()).data] == [3]
    assert (await office.plans.get_plan("starter", 2)).plan.charges[0].pricing == FlatFee(Decimal(50))


async def test_twenty_writers_of_one_plan_make_consecutive_versions(office: Office):
    await office.metric()
    made = await asyncio.gather(
        *(office.plan(charges=(Charge("base", None, FlatFee(Decimal(n))),)) for n in range(20))
    )
    assert sorted(made) == list(range(1, 21))


async def test_every_fault_of_a_plan_is_told_at_once(office: Office):
    await office.metric("peak", "max")

    with pytest.raises(Refused) as caught:
        await office.plan(
            charges=(
                Charge("a", "nothing", PerUnit(Decimal("0.01"))),
                Charge("b", None, FlatFee(Decimal(-1))),
            ),
            entitlements=(LimitEntitlement("peak", "peak", Decimal(5)),),
        )

    assert [(r.code, r.field) for r in caught.value.reasons] == [
        ("METRIC_UNKNOWN", "charges[0].metric_key"),
        ("DECIMAL_NEGATIVE", "charges[1].properties.amount"),
        ("LIMIT_METRIC_UNSUPPORTED", "entitlements.peak.metric_key"),
    ]
    assert (await refusal(office.plans.get_plan("starter"))).code == "PLAN_NOT_FOUND"


async def test_a_deprecated_version_takes_no_new_subscription_and_keeps_the_running_one(office: Office):
    await office.opened()
    await office.plans.deprecate("test", "starter", 1)
    await office.customer("beta")

    assert (await refusal(office.subscribed("beta"))).code == "PLAN_DEPRECATED"
    assert (await refusal(office.subscribed("beta", plan_version_number=1))).code == "PLAN_DEPRECATED"
    assert (await refusal(office.subscribed("beta", plan_version_number=9))).code == "PLAN_NOT_FOUND"
    assert (await refusal(office.subscribed("beta", "nothing"))).code == "PLAN_NOT_FOUND"
    again = await office.plans.put_plan("test", (await office.plans.get_plan("starter")).plan)
    assert (again.stored.plan.version, again.outcome) == (2, "changed")
    assert (await office.subscribed("beta")).subscription.plan_version == 2
    [running] = (await office.subscriptions.list("acme")).data
    assert running.subscription.plan_version == 1


async def test_a_metric_may_be_renamed_but_not_counted_differently(office: Office):
    await office.metric("m")
    assert (await refusal(office.metric("m"))).code == "METRIC_KEY_DUPLICATE"
    stored = await office.plans.get_metric("m")

    same = await office.plans.put_metric("test", stored.metric)
    renamed = await office.plans.patch_metric("test", "m", name="Calls")
    import dataclasses

    reason = await refusal(
        office.plans.put_metric("test", dataclasses.replace(stored.metric, aggregation="max"))
    )

    assert (same.outcome, renamed.metric.name, reason.code, reason.field) == (
        "unchanged",
        "Calls",
        "METRIC_FIXED",
        "aggregation",
    )


# ── subscriptions and what they grant ────────────────────────────────────────────────────────────────────────────────

LIMITED = (
    LimitEntitlement("api_calls", "api_calls", Decimal(300_000)),
    BooleanEntitlement("sso"),
    CustomEntitlement("sla", "4h"),
)


async def test_limits_add_up_over_plans_and_show_what_remains(office: Office):
    await office.opened(entitlements=LIMITED)
    await office.plan(
        "more",
        (),
        (LimitEntitlement("api_calls", "api_calls", Decimal(300_000)), CustomEntitlement("sla", "1h")),
    )
    await office.subscribed(plan_id="more", start="2026-11-10")
    await office.used("47293")

    checked = await office.entitlements.check("acme", "api_calls")
    features = {e.feature_key: e for e in (await office.entitlements.list("acme")).entitlements}

    assert (checked.limit, checked.current_usage, checked.remaining) == (600_000, 47_293, 552_707)
    assert checked.source_plans == ("starter", "more")
    assert features["sso"].granted
    assert [(v.plan_id, v.value) for v in features["sla"].values] == [("starter", "4h"), ("more", "1h")]
    assert not (await office.entitlements.check("acme", "unheard_of")).granted
    assert (await refusal(office.entitlements.check("nobody", "sso"))).code == "CUSTOMER_NOT_FOUND"


async def test_what_gateways_hold_and_have_not_used_is_not_counted_as_used(office: Office):
    await office.opened(entitlements=LIMITED)
    await office.rows(
        "INSERT INTO process (id, kind, host, pid) VALUES ('gw_1', 'gateway', 'h', 1) RETURNING id"
    )
    await office.rows(
        """WITH spent AS (UPDATE limit_counter SET spent = spent + 100 RETURNING id)
           INSERT INTO lease (counter_id, process_id, granted, used, expires_at)
           SELECT id, 'gw_1', 100, 30, now() + interval '1 minute' FROM spent RETURNING id"""
    )

    checked = await office.entitlements.check("acme", "api_calls")

    assert (checked.current_usage, checked.remaining) == (30, 299_970)


async def test_the_grant_is_written_with_the_subscription(office: Office):
    await office.opened(entitlements=LIMITED)

    grant = await grant_of(office)

    assert grant is not None
    assert grant.features == {"api_calls", "sso", "sla"}  # type: ignore[attr-defined]
    assert [(limit.limit, limit.on_exceed) for limit in grant.limits] == [(300_000, "block")]  # type: ignore[attr-defined]
    assert grant.expires_at == at("2026-12-01")  # type: ignore[attr-defined]
    assert await office.rows("SELECT spent FROM limit_counter") == [(0,)]


async def test_a_refused_subscription_leaves_no_trace(office: Office):
    await office.opened(entitlements=LIMITED)
    before = await grant_of(office)
    await office.plan("odd", (), (BooleanEntitlement("api_calls"),))

    assert (await refusal(office.subscribed(plan_id="odd"))).code == "ENTITLEMENT_CONFLICT"

    assert await grant_of(office) == before
    assert len((await office.subscriptions.list("acme")).data) == 1


async def test_plans_that_will_not_go_together_are_refused_when_the_second_is_taken(office: Office):
    await office.opened(entitlements=LIMITED)
    await office.plan("odd", (), (BooleanEntitlement("api_calls"),))
    await office.customer("beta")
    await office.subscribed("beta", end=at("2026-12-01"))

    reason = await refusal(office.subscribed(plan_id="odd", start="2027-01-01"))
    await office.subscribed("beta", "odd", start="2026-12-01")  # begins where the other one ends

    assert reason.code == "ENTITLEMENT_CONFLICT"
    assert len((await office.subscriptions.list("acme")).data) == 1


async def test_a_customer_whose_grant_cannot_be_renewed_holds_up_no_other(office: Office):
    await office.opened(entitlements=LIMITED)
    await office.plan("odd", (), (BooleanEntitlement("api_calls"),))
    for customer_id in ("beta", "gamma"):
        await office.customer(customer_id)
        await office.subscribed(customer_id, end=at("2026-12-10"))
    clash = await office.subscribed("beta", "odd", start="2026-12-10")
    await office.rows(
        "UPDATE subscription SET start_at = '2026-11-30' WHERE id = %s RETURNING id", clash.subscription.id
    )

    office.today_is("2026-12-01")
    assert await office.entitlements.refresh_due() == 2
    assert (await refusal(office.entitlements.list("beta"))).code == "ENTITLEMENT_CONFLICT"
    expiries = await office.rows(
        "SELECT expires_at FROM admission_grant WHERE subject_id IN ('acme', 'gamma')"
    )
    assert all(expires_at > office.date.instant for (expires_at,) in expiries)

    await office.plan("odder", (), (CustomEntitlement("api_calls", "4h"),))
    await office.rows(
        "UPDATE subscription SET plan_id = 'odder', end_at = NULL WHERE customer_id = 'beta' AND plan_id = 'starter' RETURNING id"
    )
    office.today_is("2026-12-10")
    assert await office.subscriptions.end_due() == 1
    assert (await grant_of(office, "gamma")).revoked_at is not None  # type: ignore[attr-defined]


async def test_what_was_used_in_an_earlier_life_is_not_counted_in_the_next(office: Office):
    await office.opened(entitlements=LIMITED)
    await office.customer("beta")
    await office.subscribed("beta", end=at("2026-12-01"))
    await office.used("1000", customer_id="beta")
    await office.subscribed("beta", start="2027-01-01")
    office.today_is("2026-12-05")
    await office.subscriptions.end_due()

    office.today_is("2027-01-01")
    seen = await office.entitlements.check("beta", "api_calls")

    assert (seen.granted, seen.current_usage) == (True, 0)


async def test_a_new_period_begins_with_a_fresh_counter(office: Office):
    await office.opened(entitlements=LIMITED, interval=Interval(1, "month"))
    await office.used("1000")
    office.today_is("2026-12-03")
    await office.used("7", "2026-12-02")

    first = await office.entitlements.check("acme", "api_calls")
    await office.used("5", "2026-12-03")
    await office.used("100", "2026-11-30")

    assert (first.current_usage, (await office.entitlements.check("acme", "api_calls")).current_usage) == (
        7,
        12,
    )
    spent = await office.rows("SELECT spent FROM limit_counter ORDER BY period_start")
    assert spent == [(1100,), (12,)]


async def test_subscriptions_begin_and_end_with_their_dates(office: Office):
    await office.metric()
    await office.plan(entitlements=LIMITED)
    await office.customer()
    made = await office.subscribed(start="2026-12-01", end=at("2026-12-20"))
    assert await grant_of(office) is None

    office.today_is("2026-12-05")
    assert await office.entitlements.refresh_due() == 1
    assert await office.entitlements.refresh_due() == 0
    running = await grant_of(office)
    office.today_is("2026-12-20")
    assert await office.subscriptions.end_due() == 1
    ended = await grant_of(office)

    assert running.revoked_at is None  # type: ignore[union-attr, attr-defined]
    assert running.expires_at == at("2026-12-20")  # type: ignore[union-attr, attr-defined]
    assert ended.revoked_at is not None  # type: ignore[union-attr, attr-defined]
    assert (await office.subscriptions.get(made.subscription.id)).subscription.status == "ended"
    assert await office.entitlements.refresh_due() == 0


async def test_dates_of_a_subscription_are_bounded(office: Office):
    await office.opened()

    assert (await refusal(office.subscribed(end=at("2026-11-01")))).code == "SUBSCRIPTION_ENDS_EARLY"
    assert (await refusal(office.subscribed(start="1999-01-01"))).code == "START_OUT_OF_RANGE"
    assert (await refusal(office.subscriptions.get("sub_none"))).code == "SUBSCRIPTION_NOT_FOUND"
