"""A pass bought with an exact payment: once per (quote, buyer, nonce), money and pass in one transaction."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from eth_account import Account
from x402 import x402Client
from x402.http.utils import encode_payment_signature_header
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.schemas import PaymentRequired

from farebox.app.admission import Answer, Headers, Refusal
from farebox.app.pass_tokens import PassClaims
from farebox.app.ports.chain import SettleRefused, SettleUnknown
from farebox.store import sandbox
from tests.app.till import (
    CATALOG,
    ROUTE,
    SELLER,
    Buyer,
    Json,
    Process,
    UpstreamOf,
    a_call,
    a_process,
    has_header,
    read_header,
    rows,
    write_header,
)

SECRET = "an-unguessable-key-of-mine"


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Process]:
    async with a_process(database_url) as process:
        yield process


async def ask(
    shop: Process,
    method: str,
    path: str,
    body: Json | bytes | None = None,
    query: str = "",
    **headers: str | bytes,
) -> Answer | Refusal:
    sent: Headers = [(b"host", b"shop.test")]
    sent += [
        (k.replace("_", "-").encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers.items()
    ]
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return await shop.site.answer(method, path, query, sent, raw, "127.0.0.1")


async def quotes(shop: Process, query: str = "") -> list[Json]:
    answer = await ask(shop, "GET", "/.farebox/quotes", query=query)
    assert isinstance(answer, Answer)
    return list(json.loads(answer.body)["quotes"])


async def wish(shop: Process, buyer: Buyer) -> Json:
    return {"quote": (await quotes(shop))[0]["signed"], "buyer": buyer.address, "rail": "exact"}


async def post(shop: Process, body: Json | bytes, **headers: str | bytes) -> Answer | Refusal:
    return await ask(shop, "POST", "/.farebox/purchases", body, **headers)


async def paid(shop: Process, buyer: Buyer, body: Json, **headers: str | bytes) -> bytes:
    """The payment header for a purchase's challenge."""
    decision = await post(shop, body, **headers)
    assert isinstance(decision, Refusal), decision
    assert decision.reason.code == "payment_required"
    return write_header(buyer.signs(read_header(decision.answer_headers, b"PAYMENT-REQUIRED")))


def bought(answer: Answer | Refusal) -> Json:
    assert isinstance(answer, Answer), answer
    assert answer.status == 201
    return dict(json.loads(answer.body))


def code(decision: Answer | Refusal) -> str:
    assert isinstance(decision, Refusal), decision
    return decision.reason.code


async def test_quotes_name_what_is_for_sale_and_are_the_same_for_everybody(shop: Process):
    first, again = await quotes(shop), await quotes(shop, "route=forecast")

    assert first == again
    assert len(first) == 1
    quote = first[0]
    assert {
        k: quote[k] for k in ("route", "pass", "name", "price", "asset", "network", "duration_s", "limits")
    } == {
        "route": "forecast",
        "pass": "hour",
        "name": "One hour",
        "price": "0.25",
        "asset": "USDC",
        "network": "eip155:84532",
        "duration_s": 3600,
        "limits": {"calls": 500},
    }
    assert await quotes(shop, "route=elsewhere") == []


async def test_a_pass_is_bought_and_everything_about_it_is_written(shop: Process):
    buyer = Buyer()
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)

    answer = await post(shop, body, idempotency_key=SECRET, payment_signature=proof)

    sold = bought(answer)
    assert isinstance(answer, Answer)
    assert read_header(answer.headers, b"PAYMENT-RESPONSE")["success"] is True
    claims = shop.tokens.verify(sold["token"])
    assert isinstance(claims, PassClaims)
    assert (claims.pass_id, claims.route_id, claims.limits) == (sold["pass_id"], "forecast", {"calls": 500})
    assert await rows(shop.database, "SELECT status, holder, offer_id, purchase_id FROM pass") == [
        ("active", buyer.address, "hour", sold["purchase_id"])
    ]
    assert await rows(shop.database, "SELECT subject_kind, subject_id, routes FROM admission_grant") == [
        ("pass", sold["pass_id"], ["forecast"])
    ]
    assert await rows(shop.database, "SELECT id, capacity, spent, hard FROM limit_counter") == [
        (f"pass:{sold['pass_id']}:calls", 500, 0, True)
    ]
    assert await rows(
        shop.database, "SELECT kind, source, destination, asset, amount, reference FROM posting"
    ) == [
        (
            "pass_sale",
            "revenue/pass/forecast",
            f"wallet/eip155:84532/{SELLER}",
            "sandbox:usdc",
            250_000,
            sold["pass_id"],
        )
    ]
    assert await rows(shop.database, "SELECT fare, status FROM payment") == [("pass", "settled")]


async def test_asking_again_gives_the_same_answer_and_takes_nothing(shop: Process):
    buyer = Buyer()
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)
    first = bought(await post(shop, body, idempotency_key=SECRET, payment_signature=proof))

    another = write_header(
        buyer.signs(read_header((await _challenge(shop, body)).answer_headers, b"PAYMENT-REQUIRED"))
    )
    for headers in ({}, {"payment_signature": proof}, {"payment_signature": another}):
        again = await post(shop, body, idempotency_key=SECRET, **headers)
        assert bought(again) == first
        assert isinstance(again, Answer)
        assert read_header(again.headers, b"PAYMENT-RESPONSE")["success"] is True

    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]
    assert await rows(shop.database, "SELECT count(*) FROM pass") == [(1,)]


async def test_one_purchase_sent_thirty_times_at_once_over_two_processes_sells_one_pass(database_url: str):
    async with a_process(database_url) as one, a_process(database_url) as two:
        buyer = Buyer()
        body = await wish(one, buyer)
        proof = await paid(one, buyer, body, idempotency_key=SECRET)

        answers = await asyncio.gather(
            *(
                post((one, two)[n % 2], body, idempotency_key=SECRET, payment_signature=proof)
                for n in range(30)
            )
        )

        sold = [bought(a) for a in answers if isinstance(a, Answer)]
        assert len(sold) >= 1
        assert len({s["token"] for s in sold}) == 1
        assert {code(a) for a in answers if isinstance(a, Refusal)} <= {"payment_in_flight", "unavailable"}
        assert await rows(one.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]
        assert await rows(one.database, "SELECT count(*), sum(amount) FROM posting") == [(1, 250_000)]
        assert await rows(one.database, "SELECT count(*) FROM limit_counter") == [(1,)]


async def test_one_purchase_paid_with_ten_payments_at_once_takes_one(database_url: str):
    async with a_process(database_url) as one, a_process(database_url) as two:
        buyer = Buyer()
        body = await wish(one, buyer)
        proofs = [await paid(one, buyer, body, idempotency_key=SECRET) for _ in range(10)]

        answers = await asyncio.gather(
            *(
                post((one, two)[n % 2], body, idempotency_key=SECRET, payment_signature=p)
                for n, p in enumerate(proofs)
            )
        )

        assert len({bought(a)["pass_id"] for a in answers if isinstance(a, Answer)}) == 1
        assert {code(a) for a in answers if isinstance(a, Refusal)} <= {"payment_in_flight", "unavailable"}
        assert await rows(one.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]
        assert (
            sum(
                n
                for s, n in await rows(one.database, "SELECT status, count(*) FROM payment GROUP BY 1")
                if s == "settled"
            )
            == 1
        )


async def test_a_client_without_an_idempotency_key_buys_too(shop: Process):
    account, client = Account.create(), x402Client()
    register_exact_evm_client(client, EthAccountSigner(account))
    body = {"quote": (await quotes(shop))[0]["signed"], "buyer": account.address, "rail": "exact"}
    required = read_header((await _challenge(shop, body)).answer_headers, b"PAYMENT-REQUIRED")
    payload = await client.create_payment_payload(PaymentRequired.model_validate(required))
    header = encode_payment_signature_header(payload)

    first = bought(await post(shop, body, payment_signature=header))
    assert bought(await post(shop, body, payment_signature=header)) == first
    assert await rows(shop.database, "SELECT count(*) FROM pass") == [(1,)]


async def test_a_purchase_is_shown_only_to_who_knows_its_key(shop: Process):
    buyer = Buyer()
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)
    sold = bought(await post(shop, body, idempotency_key=SECRET, payment_signature=proof))
    path = f"/.farebox/purchases/{sold['purchase_id']}"

    assert bought(await ask(shop, "GET", path, idempotency_key=SECRET)) == sold
    assert code(await ask(shop, "GET", path)) == "purchase_unknown"
    assert code(await ask(shop, "GET", path, idempotency_key="another-key-of-someone")) == "purchase_unknown"
    assert code(await ask(shop, "GET", path + "x", idempotency_key=SECRET)) == "purchase_unknown"
    stranger = await post(shop, body, idempotency_key="a-different-unguessable-key")
    assert code(stranger) == "payment_required"


async def test_a_key_that_could_be_guessed_gives_the_token_for_a_while_only(
    shop: Process, monkeypatch: pytest.MonkeyPatch
):
    buyer = Buyer()
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key="1")
    first = bought(await post(shop, body, idempotency_key="1", payment_signature=proof))
    assert first["token"]
    assert bought(await post(shop, body, idempotency_key="1")) == first

    later = datetime.now(UTC) + timedelta(minutes=20)
    monkeypatch.setattr(shop.purchases._clock, "now", lambda: later, raising=False)

    assert bought(await post(shop, body, idempotency_key="1")) == first | {"token": None}


async def test_a_payment_made_for_something_else_buys_no_pass(shop: Process):
    buyer, upstream = Buyer(), UpstreamOf()
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)
    bought(await post(shop, body, idempotency_key=SECRET, payment_signature=proof))

    second = await post(shop, body, idempotency_key=SECRET + "2", payment_signature=proof)
    assert code(second) == "payment_used"
    dear = dataclasses.replace(ROUTE, exact=dataclasses.replace(ROUTE.exact, price=ROUTE.passes[0].price))  # type: ignore[type-var]
    call = await upstream.serve(await shop.fares.admit(a_call(route=dear), proof))
    assert code(call) == "payment_used"
    assert upstream.calls == 0
    assert await rows(shop.database, "SELECT count(*) FROM purchase") == [(1,)]


async def test_who_cannot_pay_gets_no_pass_and_may_try_again_with_another_payment(shop: Process):
    buyer = Buyer()
    account = (buyer.address.lower(), shop.chain.tokens[0].address.lower())
    async with shop.database.connection() as tx:
        await sandbox.open_accounts(tx, [account])
        await tx.execute("UPDATE sandbox_account SET balance = 0")
    body = await wish(shop, buyer)
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)

    failed = await post(shop, body, idempotency_key=SECRET, payment_signature=proof)
    assert code(failed) == "settlement_failed"
    assert isinstance(failed, Refusal)
    assert read_header(failed.answer_headers, b"PAYMENT-RESPONSE")["success"] is False
    assert await rows(shop.database, "SELECT count(*) FROM pass") == [(0,)]
    assert await rows(shop.database, "SELECT count(*) FROM posting") == [(0,)]

    async with shop.database.connection() as tx:
        await sandbox.fund(tx, account, 250_000)
    assert code(await post(shop, body, idempotency_key=SECRET, payment_signature=proof)) == "payment_invalid"
    fresh = await paid(shop, buyer, body, idempotency_key=SECRET)
    bought(await post(shop, body, idempotency_key=SECRET, payment_signature=fresh))


async def test_a_purchase_whose_process_died_is_completed_by_whoever_is_asked(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    async with a_process(database_url) as dead, a_process(database_url) as alive:
        buyer = Buyer()
        body = await wish(dead, buyer)
        proof = await paid(dead, buyer, body, idempotency_key=SECRET)

        async def dies(order: Any) -> Any:
            raise asyncio.CancelledError

        monkeypatch.setattr(dead.chain, "settle", dies)
        with pytest.raises(asyncio.CancelledError):
            await post(dead, body, idempotency_key=SECRET, payment_signature=proof)
        assert await rows(alive.database, "SELECT status FROM payment") == [("reserved",)]

        sold = bought(await post(alive, body, idempotency_key=SECRET, payment_signature=proof))

        assert isinstance(alive.tokens.verify(sold["token"]), PassClaims)
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_a_purchase_left_unsettled_is_paid_by_the_next_payment_once_the_first_is_over(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    """An x402 client signs anew each time: the first payment may never come back, and its process lives on."""
    async with a_process(database_url) as shop:
        buyer = Buyer()
        body = await wish(shop, buyer)
        first = await paid(shop, buyer, body, idempotency_key=SECRET)
        settle, orders = shop.chain.settle, []

        async def does_not_answer(order: Any) -> Any:
            orders.append(order)
            return SettleUnknown()

        monkeypatch.setattr(shop.chain, "settle", does_not_answer)
        unknown = await post(shop, body, idempotency_key=SECRET, payment_signature=first)
        assert code(unknown) == "settlement_unknown"
        monkeypatch.setattr(shop.chain, "settle", settle)
        second = await paid(shop, buyer, body, idempotency_key=SECRET)
        waits = await post(shop, body, idempotency_key=SECRET, payment_signature=second)
        assert code(waits) == "payment_in_flight"

        await rows(
            shop.database, "UPDATE payment SET valid_before = now() - interval '1 second' RETURNING id"
        )
        third = await paid(shop, buyer, body, idempotency_key=SECRET)
        bought(await post(shop, body, idempotency_key=SECRET, payment_signature=third))

        late = await settle(orders[0])
        assert isinstance(late, SettleRefused)
        assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]
        assert await rows(shop.database, "SELECT count(*) FROM pass") == [(1,)]


async def test_an_expired_or_foreign_quote_sells_nothing(shop: Process, monkeypatch: pytest.MonkeyPatch):
    buyer = Buyer()
    body = await wish(shop, buyer)
    assert code(await post(shop, body | {"quote": body["quote"][:-2] + "AA"})) == "quote_malformed"
    assert code(await post(shop, body | {"quote": "a.b.c"})) == "quote_malformed"
    proof = await paid(shop, buyer, body, idempotency_key=SECRET)

    later = datetime.now(UTC) + timedelta(hours=2)
    monkeypatch.setattr(shop.purchases._clock, "now", lambda: later, raising=False)
    monkeypatch.setattr(shop.purchases._quotes._clock, "now", lambda: later, raising=False)

    assert code(await post(shop, body, idempotency_key=SECRET)) == "quote_expired"
    assert code(await post(shop, body, idempotency_key=SECRET, payment_signature=proof)) in (
        "quote_expired",
        "payment_invalid",
    )


async def test_a_quote_for_a_route_that_is_gone_sells_nothing(database_url: str):
    current = [CATALOG]
    async with a_process(database_url) as shop:
        body = await wish(shop, Buyer())
        shop.purchases._quotes._catalog = lambda: current[0]
        current[0] = dataclasses.replace(CATALOG, routes=())
        assert code(await post(shop, body)) == "quote_unknown"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"quote":"x","quote":"y","buyer":"b","rail":"exact"}',
        {"buyer": "b", "rail": "exact"},
        {"quote": 1, "buyer": "b", "rail": "exact"},
        {"quote": "x", "rail": "exact"},
        {"quote": "x", "buyer": "b", "rail": "card"},
        {"quote": "x", "buyer": "b\n", "rail": "exact"},
        {"quote": "x", "buyer": "b" * 200, "rail": "exact"},
        {"quote": "x", "buyer": "b", "rail": "exact", "surprise": 1},
    ],
    ids=str,
)
async def test_a_malformed_purchase_names_what_is_wrong(shop: Process, body: Any):
    assert code(await post(shop, body)) == "purchase_malformed"


@pytest.mark.parametrize("key", ["", "payment:00", "x" * 256, "é"])
async def test_an_unusable_idempotency_key_is_refused(shop: Process, key: str):
    body = await wish(shop, Buyer())
    assert code(await post(shop, body, idempotency_key=key)) == "purchase_malformed"


async def test_a_bad_payment_for_a_pass_is_refused_with_its_reason(shop: Process):
    buyer = Buyer()
    body = await wish(shop, buyer)
    challenge = read_header((await _challenge(shop, body)).answer_headers, b"PAYMENT-REQUIRED")
    cheap = write_header(buyer.signs(challenge, value="1"))
    decision = await post(shop, body, idempotency_key=SECRET, payment_signature=cheap)
    assert code(decision) == "payment_invalid"
    assert isinstance(decision, Refusal)
    assert has_header(decision.answer_headers, b"PAYMENT-REQUIRED")
    assert code(await post(shop, body, payment_signature=b"!!!")) == "payment_malformed"
    assert await rows(shop.database, "SELECT count(*) FROM payment") == [(0,)]


async def test_the_pages_answer_their_methods_only(shop: Process):
    assert shop.site.owns("/.farebox/quotes")
    assert shop.site.owns("/.well-known/jwks.json")
    assert not shop.site.owns("/weather/rome")
    assert not shop.site.owns("/.well-known/other")
    assert code(await ask(shop, "POST", "/.farebox/quotes")) == "method_not_allowed"
    assert code(await ask(shop, "DELETE", "/.well-known/jwks.json")) == "method_not_allowed"
    assert code(await ask(shop, "GET", "/.farebox/purchases")) == "method_not_allowed"
    assert code(await ask(shop, "GET", "/.farebox/nothing")) == "not_found"
    assert code(await ask(shop, "POST", "/.farebox/purchases", b"x" * 20_000)) == "body_too_large"
    keys = await ask(shop, "GET", "/.well-known/jwks.json")
    assert isinstance(keys, Answer)
    assert json.loads(keys.body)["keys"][0]["crv"] == "Ed25519"


async def _challenge(shop: Process, body: Json) -> Refusal:
    decision = await post(shop, body)
    assert isinstance(decision, Refusal)
    return decision
