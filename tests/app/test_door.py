"""The front door: who is let in, who is told what, and what is written down about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farebox.app import credentials
from farebox.app.admission import Admitted, Refusal
from farebox.base.errors import Reason
from farebox.base.money import Money
from farebox.base.secrets import new_admin_key, new_customer_key
from farebox.domain.access import AccountFare, Match, PassOffer, Route
from farebox.domain.limits import PassLimits
from farebox.gateway.spool_records import decode_rider
from farebox.store import grants, limits
from tests.app.gate import ACCOUNT, EVERYTHING, Gate, a_call, a_customer, a_gate, header, put_grant, sell_pass


@pytest.fixture
async def gate(database_url: str, tmp_path: Path) -> AsyncIterator[Gate]:
    async with a_gate(database_url, tmp_path / "spool") as opened:
        yield opened


async def test_a_key_opens_the_gate_and_the_second_call_does_not_wait(gate: Gate) -> None:
    key = await a_customer(gate.database, limit=100)

    await gate.lets_in(a_call(X_API_Key=key))
    second = gate.door.admit(a_call(Authorization=f"Bearer {key}"))

    assert isinstance(second, Admitted)
    assert second.fare == "account"


async def test_every_admitted_call_stands_in_the_spool_before_it_is_forwarded_and_again_when_it_ends(
    gate: Gate,
) -> None:
    key = await a_customer(gate.database, limit=100)

    call = a_call(X_API_Key=key)
    admitted = await gate.lets_in(call)
    before = gate.records()
    admitted.finish(200, 10, 20)

    [record] = [r for r in before if r in gate.admitted()]
    assert record.request_id == call.request_id
    rider = decode_rider(record.stub)
    assert (rider.fare, rider.customer_id, rider.metric_key, rider.route_id) == (
        "account",
        "acme",
        "api_calls",
        "forecast",
    )
    [done] = gate.done()
    assert (done.number, done.status, done.bytes_up, done.bytes_down, done.billed) == (
        record.number,
        200,
        10,
        20,
        True,
    )


async def test_what_the_upstream_is_told_names_the_caller_and_fills_the_routes_own_headers(
    gate: Gate,
) -> None:
    key = await a_customer(gate.database)

    call = a_call(EVERYTHING, X_API_Key=key)
    admitted = await gate.lets_in(call)

    assert dict(admitted.told_upstream()) == {
        b"Farebox-Request-Id": call.request_id.encode(),
        b"Farebox-Customer": b"acme",
        b"Farebox-Plan": b"starter",
        b"Farebox-Route": b"all",
        b"X-Plan": b"starter",
        b"X-Trace": f"acme/{call.request_id}".encode(),
    }


async def test_a_quota_is_hard_and_the_headers_count_down_to_it(gate: Gate) -> None:
    key = await a_customer(gate.database, limit=3, expires_at=datetime.now(UTC) + timedelta(hours=1))

    left = [
        header((await gate.lets_in(a_call(X_API_Key=key))).told_client(), b"RateLimit-Remaining")
        for _ in range(3)
    ]
    refused = await gate.refuses(a_call(X_API_Key=key))

    assert left == [b"2", b"1", b"0"]
    assert refused.reason.code == "quota_exceeded"
    assert header(refused.answer_headers, b"RateLimit-Limit") == b"3"
    assert refused.retry_after_s is not None
    assert 3000 < refused.retry_after_s <= 3600


async def test_a_call_the_upstream_did_not_answer_costs_nothing_and_is_not_counted(gate: Gate) -> None:
    key = await a_customer(gate.database, limit=1)

    (await gate.lets_in(a_call(X_API_Key=key))).finish(0, 5, 0)
    (await gate.lets_in(a_call(X_API_Key=key))).finish(200, 5, 0)

    assert [d.billed for d in gate.done()] == [False, True]
    assert (await gate.refuses(a_call(X_API_Key=key))).reason.code == "quota_exceeded"


async def test_hanging_up_does_not_make_a_call_free(gate: Gate) -> None:
    key = await a_customer(gate.database, limit=10)
    early, late = await gate.lets_in(a_call(X_API_Key=key)), await gate.lets_in(a_call(X_API_Key=key))

    early.abandoned = True
    early.finish(0, 5, 0)
    late.finish(0, 5, 4096)

    assert [d.billed for d in gate.done()] == [True, True]


@pytest.mark.parametrize(
    ("status", "billed"), [(200, True), (302, True), (404, False), (503, False), (0, False)]
)
async def test_a_route_that_charges_for_success_charges_for_nothing_else(
    gate: Gate, status: int, billed: bool
) -> None:
    key = await a_customer(gate.database, limit=1)
    route = replace(ACCOUNT, charge_on="success")

    (await gate.lets_in(a_call(route, X_API_Key=key))).finish(status, 0, 0)

    assert gate.done()[0].billed is billed
    again = await gate.admits(a_call(route, X_API_Key=key))
    assert isinstance(again, Refusal) is billed


async def test_a_route_without_the_feature_is_not_covered(gate: Gate) -> None:
    key = await a_customer(gate.database, features=["other"])

    refused = await gate.refuses(a_call(EVERYTHING, X_API_Key=key))

    assert refused.reason.code == "not_covered"
    assert refused.reason.facts == {"feature": "weather_api"}


async def test_a_customer_without_subscription_is_not_covered(gate: Gate) -> None:
    never = await a_customer(gate.database, with_grant=False)
    ended = await a_customer(gate.database, "former")
    async with gate.database.transaction() as tx:
        await grants.revoke(tx, "customer", "former")

    assert (await gate.refuses(a_call(X_API_Key=never))).reason.code == "not_covered"
    assert (await gate.refuses(a_call(X_API_Key=ended))).reason.code == "not_covered"


async def test_an_unknown_key_is_refused(gate: Gate) -> None:
    for key in (new_customer_key(), "fbx_ck_short", new_admin_key(), "fbx_ck_" + "a" * 4000):
        assert (await gate.refuses(a_call(X_API_Key=key))).reason.code == "credential_unknown"


async def test_a_revoked_key_is_refused(gate: Gate) -> None:
    key = await a_customer(gate.database)
    async with gate.database.transaction() as tx:
        await tx.execute("UPDATE customer_key SET revoked_at = now()")

    assert (await gate.refuses(a_call(X_API_Key=key))).reason.code == "credential_unknown"


async def test_guessing_keys_is_answered_five_times_a_minute_and_good_keys_still_work(gate: Gate) -> None:
    key = await a_customer(gate.database)
    await gate.lets_in(a_call(X_API_Key=key))

    codes = [(await gate.refuses(a_call(X_API_Key=new_customer_key()))).reason.code for _ in range(7)]
    limited = await gate.refuses(a_call(X_API_Key=new_customer_key()))

    assert codes == ["credential_unknown"] * 5 + ["budget_exceeded"] * 2
    assert header(limited.answer_headers, b"RateLimit-Remaining") == b"0"
    assert limited.retry_after_s is not None
    await gate.lets_in(a_call(X_API_Key=key))
    assert (
        await gate.refuses(a_call(address="192.0.2.8", X_API_Key=new_customer_key()))
    ).reason.code == "credential_unknown"


async def test_a_key_that_was_good_before_is_not_locked_out_by_a_neighbour_who_guesses(gate: Gate) -> None:
    key = await a_customer(gate.database)
    await gate.lets_in(a_call(X_API_Key=key))
    for _ in range(6):
        await gate.refuses(a_call(X_API_Key=new_customer_key()))

    gate.grants.flush()  # as after a minute without a call, or when the listener has reconnected

    await gate.lets_in(a_call(X_API_Key=key))


async def test_a_stranger_is_told_the_price_within_a_budget(gate: Gate) -> None:
    codes = [(await gate.refuses(a_call(EVERYTHING))).reason.code for _ in range(6)]

    assert codes == ["payment_required"] * 5 + ["budget_exceeded"]


async def test_a_stranger_on_a_route_without_exact_fare_is_told_what_it_takes(gate: Gate) -> None:
    offer = PassOffer("hour", "One hour", Money.parse("0.25 USDC"), 3600, PassLimits(10))
    route = Route("r", Match("/"), "weather", account=AccountFare(), passes=(offer,))

    refused = await gate.refuses(a_call(route))

    assert refused.reason.code == "credential_missing"
    assert "fbx_ck_" in refused.reason.message
    assert "pass" in refused.reason.message
    assert (await gate.refuses(a_call(Route("r", Match("/"), "weather")))).reason.code == "not_for_sale"


@pytest.mark.parametrize(
    "authorization", ["Bearer ey.foreign.jwt", "Bearer sk-live-123", "Basic dXNlcjpwdw==", "Bearer "]
)
async def test_a_foreign_authorization_is_the_upstreams_and_opens_nothing_here(
    gate: Gate, authorization: str
) -> None:
    key = await a_customer(gate.database)

    await gate.lets_in(a_call(Authorization=authorization, X_API_Key=key))

    assert (await gate.refuses(a_call(Authorization=authorization))).reason.code == "credential_missing"


async def test_a_pass_opens_its_route_until_its_calls_are_gone(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2)

    first = await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    second = await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    third = await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))

    assert first.fare == "pass"
    assert header(first.told_client(), b"Farebox-Pass-Remaining") == b"calls=1"
    assert header(first.told_upstream(), b"Farebox-Pass") == b"pas_1"
    assert header(second.told_client(), b"Farebox-Pass-Remaining") == b"calls=0"
    assert third.reason.code == "pass_exhausted"
    assert third.reason.facts["quotes"] == "/.farebox/quotes?route=all"


async def test_a_pass_without_a_limit_counts_nothing(gate: Gate) -> None:
    token = await sell_pass(gate, calls=None)

    admitted = await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))

    assert admitted.told_client() == []


async def test_a_pass_opens_no_other_route(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2, route=EVERYTHING)

    assert (await gate.refuses(a_call(ACCOUNT, Authorization=f"Bearer {token}"))).reason.code == "not_covered"


async def test_a_pass_that_was_taken_back_is_over(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2)
    await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    async with gate.database.transaction() as tx:
        await grants.revoke(tx, "pass", "pas_1")
    gate.grants.invalidate("pas_1")

    assert (
        await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    ).reason.code == "pass_ended"


async def test_a_pass_ends_with_the_date_of_the_business(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2)
    await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))

    gate.clock_s = (datetime.now(UTC) + timedelta(days=800)).timestamp()

    assert (
        await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    ).reason.code == "pass_ended"


async def test_a_good_token_of_a_pass_that_does_not_exist_opens_nothing(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2)
    async with gate.database.transaction() as tx:
        await tx.execute("DELETE FROM limit_counter")
        await tx.execute("DELETE FROM admission_grant")

    assert (
        await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    ).reason.code == "pass_unknown"


async def test_a_forged_token_is_refused_and_counted_as_a_bad_credential(gate: Gate) -> None:
    token = await sell_pass(gate, calls=2)
    forged = token[:-8] + "AAAAAAAA"

    codes = [
        (await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {forged}"))).reason.code
        for _ in range(6)
    ]

    assert codes == ["credential_unknown"] * 5 + ["budget_exceeded"]


@pytest.mark.parametrize("tail", [".x", ".x.y.z", ".\u00ff.x"])
async def test_a_broken_token_does_not_make_good_ones_look_foreign(gate: Gate, tail: str) -> None:
    """Every token begins alike, so what is remembered of its beginning must not come from a stranger's ending."""
    token = await sell_pass(gate, calls=2)
    credentials._token_heads.clear()
    head = token.partition(".")[0]

    for _ in range(2):
        broken = await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {head}{tail}"))
        assert broken.reason.code == "payment_required"  # not ours: the upstream's, and so a stranger's call
        assert (await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))).fare == "pass"


async def test_a_payment_goes_before_a_pass_and_a_pass_before_a_key(gate: Gate) -> None:
    key, token = await a_customer(gate.database), await sell_pass(gate, calls=2)

    all_three = await gate.lets_in(
        a_call(EVERYTHING, X_API_Key=key, Authorization=f"Bearer {token}", Payment_Signature="good")
    )
    two = await gate.lets_in(a_call(EVERYTHING, X_API_Key=key, Authorization=f"Bearer {token}"))

    assert (all_three.fare, two.fare) == ("exact", "pass")


async def test_a_paid_call_is_spooled_with_its_payer(gate: Gate) -> None:
    admitted = await gate.lets_in(a_call(EVERYTHING, X_PAYMENT="good"))
    admitted.finish(200, 1, 2)

    rider = decode_rider(gate.admitted()[0].stub)
    assert (rider.fare, rider.payer, rider.billed_when_orphaned) == ("exact", "0xabc", False)
    assert gate.exact.finished == [(200, 1, 2)]
    assert gate.done()[0].billed
    assert header(admitted.told_upstream(), b"Farebox-Payer") == b"0xabc"
    assert header(admitted.told_upstream(), b"Farebox-Route") == b"all"


async def test_a_bad_payment_is_counted_and_only_a_payment_needs_the_body(gate: Gate) -> None:
    codes = [(await gate.refuses(a_call(EVERYTHING, Payment_Signature="bad"))).reason.code for _ in range(6)]
    assert codes == ["payment_invalid"] * 5 + ["budget_exceeded"]

    paid, keyed = a_call(EVERYTHING, Payment_Signature="bad"), a_call(EVERYTHING, X_API_Key="fbx_ck_x")
    paid.method = keyed.method = "POST"
    assert gate.door.needs_body(paid)
    assert not gate.door.needs_body(keyed)


async def test_a_payment_that_turns_out_unfunded_is_counted_as_a_bad_one(gate: Gate) -> None:
    """It has cost an answer of the upstream and brought nothing; a fresh nonce costs its sender nothing either."""
    gate.exact.settles = Refusal(Reason("settlement_failed", "no money"))
    for _ in range(5):
        admitted = await gate.lets_in(a_call(EVERYTHING, Payment_Signature="good"))
        assert admitted.before_release is not None
        refused = await admitted.before_release(200, [])
        assert refused is not None
        admitted.finish(402, 0, 0)

    limited = await gate.refuses(a_call(EVERYTHING, Payment_Signature="good"))

    assert limited.reason.code == "budget_exceeded"
    await gate.lets_in(a_call(EVERYTHING, address="192.0.2.8", Payment_Signature="good"))


async def test_hanging_up_before_the_answer_does_not_call_for_free_for_ever(gate: Gate) -> None:
    for _ in range(5):
        admitted = await gate.lets_in(a_call(EVERYTHING, Payment_Signature="good"))
        admitted.abandoned = True
        admitted.finish(0, 10, 0)

    limited = await gate.refuses(a_call(EVERYTHING, Payment_Signature="good"))

    assert limited.reason.code == "budget_exceeded"
    assert [done.billed for done in gate.done()] == [False] * 5


async def test_whoever_hangs_up_on_a_call_that_is_settled_all_the_same_has_paid_for_it(gate: Gate) -> None:
    for _ in range(6):
        admitted = await gate.lets_in(a_call(EVERYTHING, Payment_Signature="good"))
        assert admitted.before_release is not None
        admitted.abandoned = True
        assert await admitted.before_release(200, []) is None
        admitted.finish(0, 10, 0)

    assert [done.billed for done in gate.done()] == [True] * 6


async def test_hanging_up_on_a_call_that_the_upstream_refuses_is_counted(gate: Gate) -> None:
    """Its payment is given back, and nobody was there to see why."""
    for _ in range(5):
        admitted = await gate.lets_in(a_call(EVERYTHING, Payment_Signature="good"))
        assert admitted.before_release is not None
        admitted.abandoned = True
        assert await admitted.before_release(500, []) is None
        admitted.finish(0, 10, 0)

    assert (await gate.refuses(a_call(EVERYTHING, Payment_Signature="good"))).reason.code == "budget_exceeded"
    assert [done.billed for done in gate.done()] == [False] * 5


async def test_a_payment_on_a_route_without_exact_fare_is_not_taken(gate: Gate) -> None:
    assert (await gate.refuses(a_call(ACCOUNT, Payment_Signature="good"))).reason.code == "not_covered"


async def test_an_account_whose_period_has_turned_gets_its_new_limits_at_the_next_call(gate: Gate) -> None:
    now = datetime.now(UTC)
    key = await a_customer(gate.database, limit=1, expires_at=now + timedelta(hours=1))
    await gate.lets_in(a_call(X_API_Key=key))
    gate.clock_s = (now + timedelta(hours=2)).timestamp()

    stale = await gate.refuses(a_call(X_API_Key=key))
    async with gate.database.transaction() as tx:
        await put_grant(tx, limit=5, expires_at=now + timedelta(hours=9))
    renewed = await gate.admits(a_call(X_API_Key=key))

    assert stale.reason.code == "not_covered"
    assert gate.refreshed == ["acme", "acme"]
    assert isinstance(renewed, Admitted)


async def test_when_the_spool_takes_nothing_no_call_is_forwarded_and_nothing_is_spent(gate: Gate) -> None:
    key = await a_customer(gate.database, limit=10)
    await gate.lets_in(a_call(X_API_Key=key))

    gate.spool.full = True
    refused = await gate.refuses(a_call(X_API_Key=key))
    gate.spool.full = False
    await gate.leases.close()

    assert refused.reason.code == "unavailable"
    async with gate.database.connection() as tx:
        assert (await limits.counted(tx, ["quota:acme:api_calls"]))["quota:acme:api_calls"].spent == 1


async def test_a_new_catalog_changes_the_terms_of_a_known_key(gate: Gate) -> None:
    key = await a_customer(gate.database)
    await gate.lets_in(a_call(X_API_Key=key))

    gate.door.catalog_changed()
    dearer = replace(ACCOUNT, account=AccountFare("gold"))

    assert (await gate.refuses(a_call(dearer, X_API_Key=key))).reason.code == "not_covered"
