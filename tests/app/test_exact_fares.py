"""An exact fare: reserved, served, settled once, and every way it can end otherwise. Real database, several processes."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from eth_account import Account
from x402 import x402Client
from x402.http.utils import decode_payment_response_header, encode_payment_signature_header
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.schemas import PaymentRequired

from farebox.app.admission import Admitted, Answer, Refusal
from farebox.base.money import Money
from farebox.domain.access import ExactFare
from farebox.protocols.evm import ORDER
from farebox.store import payments, processes, sandbox
from tests.app.till import (
    ROUTE,
    SELLER,
    Buyer,
    Json,
    Process,
    UpstreamOf,
    a_call,
    a_process,
    challenge,
    has_header,
    read_header,
    rows,
    write_header,
)


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Process]:
    async with a_process(database_url) as process:
        yield process


def refused(decision: object) -> Refusal:
    assert isinstance(decision, Refusal), decision
    return decision


def code(decision: object) -> str:
    return refused(decision).reason.code


async def test_a_stranger_pays_and_is_served(shop: Process):
    buyer, upstream, call = Buyer(), UpstreamOf(), a_call()

    answer = await upstream.serve(await shop.fares.admit(call, buyer.pays(shop, call)))

    assert isinstance(answer, Answer)
    receipt = read_header(answer.headers, b"PAYMENT-RESPONSE")
    assert receipt["success"] is True
    assert receipt["payer"] == buyer.address.lower()
    assert receipt["transaction"].startswith("0x5a4db0")
    assert len(receipt["transaction"]) == 66
    assert (b"Cache-Control", b"private") in answer.headers
    stored = await rows(
        shop.database, "SELECT status, transaction_hash, payer_address, book_asset, amount FROM payment"
    )
    assert stored == [("settled", receipt["transaction"], buyer.address.lower(), "sandbox:usdc", 1000)]
    assert await rows(shop.database, "SELECT kind, source, destination, asset, amount FROM posting") == [
        ("exact_fare", "revenue/exact/forecast", f"wallet/eip155:84532/{SELLER}", "sandbox:usdc", 1000)
    ]
    balances = dict(await rows(shop.database, "SELECT address, balance FROM sandbox_account"))
    assert balances[buyer.address.lower()] == sandbox.FIRST_BALANCE - 1000
    assert balances[SELLER] == sandbox.FIRST_BALANCE + 1000


async def test_the_challenge_is_what_the_published_client_expects(shop: Process):
    refusal = shop.fares.payment_required(a_call(query="units=metric"))

    assert refusal.reason.code == "payment_required"
    required = PaymentRequired.model_validate(read_header(refusal.answer_headers, b"PAYMENT-REQUIRED"))
    offer = required.accepts[0]
    assert required.resource is not None
    assert required.resource.url == "http://shop.test/weather/rome?units=metric"
    assert (offer.scheme, offer.network, offer.amount) == ("exact", "eip155:84532", "1000")
    assert offer.extra == {"name": "USDC", "version": "2", "sandbox": True}
    assert (b"Cache-Control", b"no-store") in refusal.answer_headers
    assert len(next(v for k, v in refusal.answer_headers if k == b"PAYMENT-REQUIRED")) < 1500


async def test_the_published_client_pays_with_no_configuration(shop: Process):
    client = x402Client()
    account = Account.create()
    register_exact_evm_client(client, EthAccountSigner(account))
    call, upstream = a_call(), UpstreamOf()

    payload = await client.create_payment_payload(PaymentRequired.model_validate(challenge(shop, call)))
    header = encode_payment_signature_header(payload)
    answer = await upstream.serve(await shop.fares.admit(call, header.encode()))

    assert isinstance(answer, Answer), answer
    receipt = next(v for k, v in answer.headers if k == b"PAYMENT-RESPONSE")
    settled = decode_payment_response_header(receipt.decode())
    assert settled.success
    assert settled.payer == account.address.lower()


def spelled(payment: Json, n: int) -> bytes:
    """The same payment, its nonce and addresses in another case, its keys in another order."""
    variant: Json = json.loads(json.dumps(payment))
    authorization = variant["payload"]["authorization"]
    if n % 2:
        authorization["nonce"] = "0x" + authorization["nonce"][2:].upper()
    if n % 3 == 0:
        authorization["from"] = authorization["from"].lower()
    elif n % 3 == 1:
        authorization["from"] = "0x" + authorization["from"][2:].upper()
        variant["accepted"] = variant["accepted"] | {"asset": variant["accepted"]["asset"].lower()}
    if n % 5 == 0:
        variant = dict(reversed(variant.items()))
    return write_header(variant)


async def test_one_payment_a_hundred_times_at_once_over_three_processes_is_served_once(database_url: str):
    buyer, upstream = Buyer(), UpstreamOf()
    async with (
        a_process(database_url) as one,
        a_process(database_url) as two,
        a_process(database_url) as three,
    ):
        payment = buyer.signs(challenge(one, a_call()))

        async def send(n: int) -> Answer | Refusal:
            return await upstream.serve(
                await (one, two, three)[n % 3].fares.admit(a_call(), spelled(payment, n))
            )

        answers = await asyncio.gather(*(send(n) for n in range(100)))

        assert upstream.calls == 1
        served = [a for a in answers if isinstance(a, Answer)]
        assert len(served) >= 1
        assert {a.body for a in served} == {upstream.body}
        for refusal in (a for a in answers if isinstance(a, Refusal)):
            assert refusal.reason.code == "payment_in_flight"
            assert refusal.retry_after_s
            assert not has_header(refusal.answer_headers, b"PAYMENT-REQUIRED")
        assert await rows(one.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]
        assert await rows(one.database, "SELECT count(*), sum(amount) FROM posting") == [(1, 1000)]

        for process in (one, two, three):
            again = await upstream.serve(await process.fares.admit(a_call(), write_header(payment)))
            assert isinstance(again, Answer)
            assert again.body == upstream.body
            assert sum(k == b"PAYMENT-RESPONSE" for k, _ in again.headers) == 1
        assert upstream.calls == 1


@pytest.mark.parametrize(
    "other",
    [
        a_call("/weather/oslo"),
        a_call(query="units=metric"),
        a_call(method="HEAD"),
        a_call(method="POST"),
        a_call(body=b"something"),
    ],
    ids=["path", "query", "method", "post", "body"],
)
async def test_a_payment_spent_on_one_request_buys_nothing_elsewhere(shop: Process, other: Any):
    buyer, upstream = Buyer(), UpstreamOf()
    proof = buyer.pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))

    decision = refused(await shop.fares.admit(other, proof))

    assert decision.reason.code == "payment_used"
    assert has_header(decision.answer_headers, b"PAYMENT-REQUIRED"), "another request may be paid anew"
    assert upstream.calls == 1


async def test_a_bad_answer_costs_nothing_and_the_payment_may_be_used_again(shop: Process):
    buyer, failing, working = Buyer(), UpstreamOf(status=500), UpstreamOf()
    proof = buyer.pays(shop, a_call(method="POST", body=b"x"))

    first = await failing.serve(await shop.fares.admit(a_call(method="POST", body=b"x"), proof))
    assert isinstance(first, Answer)
    assert not has_header(first.headers, b"PAYMENT-RESPONSE")
    assert await rows(shop.database, "SELECT status FROM payment") == [("released",)]
    assert await rows(shop.database, "SELECT count(*) FROM posting") == [(0,)]

    elsewhere = await shop.fares.admit(a_call("/weather/oslo"), proof)
    assert code(elsewhere) == "payment_used"

    second = await working.serve(await shop.fares.admit(a_call(method="POST", body=b"x"), proof))
    assert isinstance(second, Answer)
    assert has_header(second.headers, b"PAYMENT-RESPONSE")
    assert await rows(shop.database, "SELECT status FROM payment") == [("settled",)]


async def test_a_call_that_fails_before_any_head_gives_the_payment_back(shop: Process):
    buyer, upstream = Buyer(), UpstreamOf()
    proof = buyer.pays(shop, a_call(method="POST"))
    decision = await shop.fares.admit(a_call(method="POST"), proof)
    assert isinstance(decision, Admitted)

    decision.finish(502, 0, 0)
    while (status := await rows(shop.database, "SELECT status FROM payment")) == [("reserved",)]:
        await asyncio.sleep(0.01)

    assert status == [("released",)]
    # The row is free a moment before the process lets go of the payment as well.
    while isinstance(again := await shop.fares.admit(a_call(method="POST"), proof), Refusal):
        assert again.reason.code == "payment_in_flight"
        await asyncio.sleep(0.01)
    assert isinstance(await upstream.serve(again), Answer)


async def test_a_nonce_signed_anew_for_a_new_price_is_written_down_as_what_it_pays(database_url: str):
    dearer = dataclasses.replace(ROUTE, exact=ExactFare(Money.parse("0.002 USDC"), ()))
    async with a_process(database_url) as shop:
        buyer, nonce = Buyer(), "0x" + "7a" * 32
        failing = UpstreamOf(status=500)
        await failing.serve(
            await shop.fares.admit(a_call(), buyer.pays(shop, a_call(), nonce=nonce)),
        )

        call = a_call(route=dearer)
        answer = await UpstreamOf().serve(await shop.fares.admit(call, buyer.pays(shop, call, nonce=nonce)))

        assert isinstance(answer, Answer)
        assert await rows(shop.database, "SELECT amount FROM payment") == [(2000,)]
        assert await rows(shop.database, "SELECT amount FROM posting") == [(2000,)]
        assert await rows(shop.database, "SELECT amount FROM sandbox_transfer") == [(2000,)]


async def test_a_second_sender_is_told_to_wait_while_the_first_is_served(database_url: str):
    async with a_process(database_url) as one, a_process(database_url) as two:
        gate = asyncio.Event()
        buyer, upstream = Buyer(), UpstreamOf(arrived=gate.wait())
        proof = buyer.pays(one, a_call())
        first = asyncio.create_task(upstream.serve(await one.fares.admit(a_call(), proof)))

        assert code(await one.fares.admit(a_call(), proof)) == "payment_in_flight"
        assert code(await two.fares.admit(a_call(), proof)) == "payment_in_flight"
        assert code(await two.fares.admit(a_call("/weather/oslo"), proof)) == "payment_used"

        gate.set()
        assert isinstance(await first, Answer)
        assert isinstance(await two.fares.admit(a_call(), proof), Answer)


async def kill(process: Process) -> None:
    """What its host's supervisor writes when it finds a process dead. Its memory simply stops being asked."""
    await rows(
        process.database,
        "UPDATE process SET stopped_at = now() WHERE id = %s RETURNING id",
        process.owner.process_id,
    )


async def test_after_its_process_died_a_read_runs_again(database_url: str):
    async with a_process(database_url) as dead, a_process(database_url) as alive:
        buyer, upstream = Buyer(), UpstreamOf()
        proof = buyer.pays(dead, a_call())
        assert isinstance(await dead.fares.admit(a_call(), proof), Admitted)
        await kill(dead)

        decisions = await asyncio.gather(*(alive.fares.admit(a_call(), proof) for _ in range(10)))
        answers = [await upstream.serve(d) for d in decisions]

        assert upstream.calls == 1
        assert sum(isinstance(a, Answer) for a in answers) == 1
        assert {code(a) for a in answers if isinstance(a, Refusal)} == {"payment_in_flight"}
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_a_process_that_was_only_asleep_cannot_settle_what_another_has_taken_over(database_url: str):
    async with a_process(database_url) as asleep, a_process(database_url) as alive:
        upstream, proof = UpstreamOf(), Buyer().pays(asleep, a_call())
        late = await asleep.fares.admit(a_call(), proof)
        assert isinstance(late, Admitted)
        assert late.before_release is not None
        await kill(asleep)
        taken_over = await alive.fares.admit(a_call(), proof)

        assert code(await late.before_release(200, [])) == "payment_in_flight"

        assert isinstance(await upstream.serve(taken_over), Answer)
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_after_its_process_died_a_write_is_never_repeated_nor_settled(database_url: str):
    async with a_process(database_url) as dead, a_process(database_url) as alive:
        buyer, call = Buyer(), a_call(method="POST", body=b"order")
        proof = buyer.pays(dead, call)
        assert isinstance(await dead.fares.admit(call, proof), Admitted)
        await kill(dead)

        for _ in range(2):
            decision = refused(await alive.fares.admit(call, proof))
            assert decision.reason.code == "outcome_unknown"
            assert not has_header(decision.answer_headers, b"PAYMENT-REQUIRED")

        assert await rows(alive.database, "SELECT status FROM payment") == [("unknown",)]
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(0,)]


async def test_nobody_is_asked_to_pay_anew_while_a_sleeping_process_could_still_settle(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    async with a_process(database_url) as asleep, a_process(database_url) as alive:
        proof = Buyer().pays(asleep, a_call())
        late = await asleep.fares.admit(a_call(), proof)
        assert isinstance(late, Admitted)
        assert late.before_release is not None
        await kill(asleep)
        monkeypatch.setattr(alive.fares, "_clock", _Later(time.time() + 300))

        decision = refused(await alive.fares.admit(a_call(), proof))
        assert has_header(decision.answer_headers, b"PAYMENT-REQUIRED")

        assert code(await late.before_release(200, [])) == "payment_in_flight"
        late.finish(409, 0, 0)
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(0,)]


async def test_a_write_whose_process_died_is_not_payable_again_once_its_payment_expired(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    async with a_process(database_url) as asleep, a_process(database_url) as alive:
        call = a_call(method="POST", body=b"order")
        proof = Buyer().pays(asleep, call)
        late = await asleep.fares.admit(call, proof)
        assert isinstance(late, Admitted)
        assert late.before_release is not None
        await kill(asleep)
        monkeypatch.setattr(alive.fares, "_clock", _Later(time.time() + 300))

        assert code(await alive.fares.admit(call, proof)) == "outcome_unknown"

        assert code(await late.before_release(200, [])) == "payment_in_flight"
        late.finish(409, 0, 0)
        assert await rows(alive.database, "SELECT count(*) FROM sandbox_transfer") == [(0,)]


async def test_a_process_that_fell_silent_counts_as_dead_to_whoever_was_listening(database_url: str):
    async with a_process(database_url) as silent, a_process(database_url) as alive:
        proof = Buyer().pays(silent, a_call())
        assert isinstance(await silent.fares.admit(a_call(), proof), Admitted)
        assert code(await alive.fares.admit(a_call(), proof)) == "payment_in_flight"
        await rows(
            silent.database,
            "UPDATE process SET heartbeat_at = CASE WHEN id = %s THEN now() ELSE now() - interval '1 hour' END RETURNING id",
            alive.fares._owner.process_id,
        )
        # It has only just come, or the database was away for all of them: the other one may be alive as well.
        assert code(await alive.fares.admit(a_call(), proof)) == "payment_in_flight"

        await rows(
            silent.database, "UPDATE process SET unbroken_since = now() - interval '1 minute' RETURNING id"
        )

        assert isinstance(await alive.fares.admit(a_call(), proof), Admitted)


async def test_after_an_outage_of_the_database_nobody_is_taken_for_dead_who_has_not_had_time_to_speak(
    database_url: str,
):
    async with a_process(database_url) as living, a_process(database_url) as asker:
        proof = Buyer().pays(living, a_call())
        assert isinstance(await living.fares.admit(a_call(), proof), Admitted)
        await rows(
            living.database,
            "UPDATE process SET unbroken_since = now() - interval '1 hour', heartbeat_at = now() - interval '1 minute' RETURNING id",
        )

        before = code(await asker.fares.admit(a_call(), proof))
        async with asker.database.connection() as tx:
            await processes.heartbeat(tx, asker.fares._owner.process_id)
        after = code(await asker.fares.admit(a_call(), proof))

        assert (before, after) == ("payment_in_flight", "payment_in_flight")


async def test_an_answer_too_large_to_keep_leaves_one_re_run(shop: Process):
    buyer, upstream = Buyer(), UpstreamOf(body=b"x" * 70_000)
    proof = buyer.pays(shop, a_call())
    assert isinstance(await upstream.serve(await shop.fares.admit(a_call(), proof)), Answer)
    await _until_ended(shop)

    again = await upstream.serve(await shop.fares.admit(a_call(), proof))
    assert isinstance(again, Answer)
    assert len(again.body) == 70_000
    third = refused(await shop.fares.admit(a_call(), proof))

    assert third.reason.code == "answer_gone"
    assert read_header(third.answer_headers, b"PAYMENT-RESPONSE")["success"] is True
    assert upstream.calls == 2
    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


@pytest.mark.parametrize("status", [0, 500])
async def test_a_re_run_that_the_upstream_fails_is_still_owed(shop: Process, status: int):
    upstream, proof = UpstreamOf(body=b"x" * 70_000), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))
    await _until_ended(shop)

    failed = await shop.fares.admit(a_call(), proof)
    assert isinstance(failed, Admitted)
    assert failed.keep_answer is not None
    if status:
        await failed.keep_answer(status, [], b"out of order")
    failed.finish(status, 0, 0)
    await _until_ended(shop)

    again = await upstream.serve(await shop.fares.admit(a_call(), proof))
    assert isinstance(again, Answer)
    assert len(again.body) == 70_000


async def test_hanging_up_on_a_re_run_uses_it_up(shop: Process):
    upstream, proof = UpstreamOf(body=b"x" * 70_000), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))
    await _until_ended(shop)

    left = await shop.fares.admit(a_call(), proof)
    assert isinstance(left, Admitted)
    left.abandoned = True
    left.finish(0, 0, 0)
    await _until_ended(shop)

    assert code(await shop.fares.admit(a_call(), proof)) == "answer_gone"


async def test_a_lost_answer_to_a_write_leaves_a_receipt(shop: Process):
    call, upstream = a_call(method="POST"), UpstreamOf(body=b"x" * 70_000)
    proof = Buyer().pays(shop, call)
    await upstream.serve(await shop.fares.admit(call, proof))
    await _until_ended(shop)

    assert code(await shop.fares.admit(call, proof)) == "answer_gone"
    assert upstream.calls == 1


async def test_an_expired_payment_still_fetches_the_answer_it_paid_for(
    shop: Process, monkeypatch: pytest.MonkeyPatch
):
    upstream, proof = UpstreamOf(), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))

    later = time.time() + 300
    monkeypatch.setattr(shop.fares._clock, "now", lambda: _instant(later), raising=False)

    assert isinstance(await shop.fares.admit(a_call(), proof), Answer)
    fresh = Buyer().pays(shop, a_call())
    decision = refused(await shop.fares.admit(a_call(), fresh))
    assert decision.reason.facts["reason"] == "invalid_exact_evm_payload_authorization_valid_before"


async def test_who_cannot_pay_gets_no_answer_and_the_others_do(shop: Process):
    poor, rich, upstream = Buyer(), [Buyer() for _ in range(5)], UpstreamOf()
    async with shop.database.connection() as tx:
        token = shop.chain.tokens[0].address.lower()
        await sandbox.open_accounts(tx, [(poor.address.lower(), token)])
        await tx.execute(
            "UPDATE sandbox_account SET balance = 1500 WHERE address = %s", (poor.address.lower(),)
        )

    proofs = [poor.pays(shop, a_call()), poor.pays(shop, a_call()), *(b.pays(shop, a_call()) for b in rich)]
    answers = await asyncio.gather(*(_buy(shop, upstream, p) for p in proofs))

    assert sum(isinstance(a, Answer) for a in answers) == 6
    failed = next(a for a in answers if isinstance(a, Refusal))
    assert failed.reason.code == "settlement_failed"
    receipt = read_header(failed.answer_headers, b"PAYMENT-RESPONSE")
    assert (receipt["success"], receipt["errorReason"], receipt["transaction"]) == (
        False,
        "insufficient_funds",
        "",
    )
    assert has_header(failed.answer_headers, b"PAYMENT-REQUIRED"), "nothing was taken: it may be paid anew"
    assert await rows(
        shop.database, "SELECT balance FROM sandbox_account WHERE address = %s", poor.address.lower()
    ) == [(500,)]
    assert sorted(await rows(shop.database, "SELECT status, count(*) FROM payment GROUP BY 1")) == [
        ("failed", 1),
        ("settled", 6),
    ]


async def test_many_payments_at_once_keep_every_balance_and_the_book(database_url: str):
    async with a_process(database_url) as one, a_process(database_url) as two:
        buyers, upstream = [Buyer() for _ in range(7)], UpstreamOf()
        proofs = [buyers[n % 7].pays(one, a_call()) for n in range(140)]

        answers = await asyncio.gather(*(_buy((one, two)[n % 2], upstream, p) for n, p in enumerate(proofs)))

        assert all(isinstance(a, Answer) for a in answers)
        assert await rows(one.database, "SELECT sum(balance) FROM sandbox_account") == [
            (8 * sandbox.FIRST_BALANCE,)
        ]
        assert await rows(one.database, "SELECT balance FROM sandbox_account WHERE address = %s", SELLER) == [
            (sandbox.FIRST_BALANCE + 140_000,)
        ]
        assert await rows(one.database, "SELECT sum(balance) FROM ledger_balance") == [(0,)]


async def test_a_client_that_hangs_up_while_the_money_moves_gets_its_answer_later(shop: Process):
    upstream, proof = UpstreamOf(), Buyer().pays(shop, a_call())
    decision = await shop.fares.admit(a_call(), proof)
    assert isinstance(decision, Admitted)
    assert decision.before_release is not None
    releasing = asyncio.ensure_future(decision.before_release(200, []))
    await asyncio.sleep(0)
    releasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await releasing
    decision.finish(0, 0, 0)
    await _until_ended(shop)

    assert await rows(shop.database, "SELECT status FROM payment") == [("settled",)]
    assert isinstance(await upstream.serve(await shop.fares.admit(a_call(), proof)), Answer)
    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_a_client_that_hangs_up_while_it_is_reserved_leaves_nothing_behind(shop: Process):
    call, proof = a_call(method="POST"), Buyer().pays(shop, a_call(method="POST"))
    asking = asyncio.ensure_future(shop.fares.admit(call, proof))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await _until_ended(shop)

    assert isinstance(await shop.fares.admit(call, proof), Admitted)


async def test_while_the_database_is_away_nothing_is_payable_and_nothing_is_forwarded(shop: Process):
    proof = Buyer().pays(shop, a_call())
    await shop.database.close()

    decision = refused(await shop.fares.admit(a_call(), proof))

    assert decision.reason.code == "unavailable"
    assert decision.retry_after_s
    assert not has_header(decision.answer_headers, b"PAYMENT-REQUIRED")


def _authorization(**fields: Any) -> Callable[[Json], bytes]:
    def tamper(payment: Json) -> bytes:
        payment["payload"]["authorization"].update(fields)
        return write_header(payment)

    return tamper


def _accepted(**fields: Any) -> Callable[[Json], bytes]:
    def tamper(payment: Json) -> bytes:
        payment["accepted"].update(fields)
        return write_header(payment)

    return tamper


def _forged(payment: Json) -> bytes:
    signature = payment["payload"]["signature"]
    payment["payload"]["signature"] = signature[:10] + ("0" if signature[10] != "0" else "1") + signature[11:]
    return write_header(payment)


def _high_s(payment: Json) -> bytes:
    """The twin of the signature: as valid on the curve, refused everywhere else."""
    raw = bytes.fromhex(payment["payload"]["signature"][2:])
    twin = raw[:32] + (ORDER - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big") + bytes((55 - raw[64],))
    payment["payload"]["signature"] = "0x" + twin.hex()
    return write_header(payment)


BAD: dict[str, tuple[Callable[[Json], bytes], str]] = {
    "forged signature": (_forged, "payment_invalid"),
    "high s": (_high_s, "payment_invalid"),
    "wrong amount": (_authorization(value="999"), "payment_invalid"),
    "wrong recipient": (_authorization(to="0x" + "11" * 20), "payment_invalid"),
    "somebody else's address": (_authorization(**{"from": "0x" + "22" * 20}), "payment_invalid"),
    "expired": (_authorization(validBefore=str(int(time.time()) - 1)), "payment_invalid"),
    "about to expire": (_authorization(validBefore=str(int(time.time()) + 2)), "payment_invalid"),
    "not valid yet": (_authorization(validAfter=str(int(time.time()) + 600)), "payment_invalid"),
    "a time beyond every calendar": (_authorization(validBefore="9" * 78), "payment_invalid"),
    "unknown asset": (_accepted(asset="0x" + "33" * 20), "payment_invalid"),
    "unknown network": (_accepted(network="eip155:1"), "payment_invalid"),
    "another scheme": (_accepted(scheme="upto"), "payment_invalid"),
    "smaller accepted amount": (_accepted(amount="1"), "payment_invalid"),
    "another payTo": (_accepted(payTo="0x" + "44" * 20), "payment_invalid"),
    "another domain": (_accepted(extra={"name": "Fake", "version": "2"}), "payment_invalid"),
    "longer timeout": (_accepted(maxTimeoutSeconds=10_000), "payment_invalid"),
    "no network at all": (_accepted(network="base"), "payment_malformed"),
    "negative amount": (_authorization(value="-1000"), "payment_malformed"),
    "float amount": (_authorization(value=1000.0), "payment_malformed"),
    "decimal amount": (_authorization(value="1000.0"), "payment_malformed"),
    "number for a string": (_authorization(value=1000), "payment_malformed"),
    "leading zero": (_authorization(value="01000"), "payment_malformed"),
    "hexadecimal": (_authorization(value="0x3e8"), "payment_malformed"),
    "other digits": (_authorization(value="١٠٠٠"), "payment_malformed"),
    "79 digits": (_authorization(value="1" * 79), "payment_malformed"),
    "short nonce": (_authorization(nonce="0x1234"), "payment_malformed"),
    "short address": (_authorization(to="0x1234"), "payment_malformed"),
    "version 1": (lambda p: write_header(p | {"x402Version": 1}), "payment_malformed"),
    "true for a version": (lambda p: write_header(p | {"x402Version": True}), "payment_malformed"),
    "nothing accepted": (
        lambda p: write_header({k: v for k, v in p.items() if k != "accepted"}),
        "payment_malformed",
    ),
    "20,000 characters": (lambda p: write_header(p) + b"A" * 20_000, "payment_malformed"),
    "bad base64": (lambda p: b"!!!" + write_header(p), "payment_malformed"),
    "no padding": (lambda p: write_header(p).rstrip(b"=")[:-1], "payment_malformed"),
    "not JSON": (lambda p: b"aGVsbG8=", "payment_malformed"),
    "a list": (lambda p: write_header([p]), "payment_malformed"),
    "empty": (lambda p: b"", "payment_malformed"),
    "not UTF-8": (lambda p: b"//79", "payment_malformed"),
    "duplicate keys": (
        lambda p: write_header(p)[:0] + base64.b64encode(b'{"x402Version":2,' + json.dumps(p).encode()[1:]),
        "payment_malformed",
    ),
    "deep nesting": (
        lambda p: base64.b64encode(b"[" * 3000 + b"]" * 3000),
        "payment_malformed",
    ),
    "NaN": (
        lambda p: base64.b64encode(json.dumps(p).replace('"1000"', "NaN").encode()),
        "payment_malformed",
    ),
    "NUL in a string": (_accepted(network="eip155:8\x004532"), "payment_malformed"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_payment_is_refused_with_its_reason_and_leaves_no_trace(shop: Process, name: str):
    tamper, expected = BAD[name]
    call = a_call()
    header = tamper(Buyer().signs(challenge(shop, call)))

    decision = refused(await shop.fares.admit(call, header))

    assert decision.reason.code == expected
    assert len(decision.reason.message) > 10
    if expected == "payment_invalid":
        assert decision.reason.facts["reason"]
        assert (
            read_header(decision.answer_headers, b"PAYMENT-REQUIRED")["error"]
            == decision.reason.facts["reason"]
        )
    assert await rows(shop.database, "SELECT count(*) FROM payment") == [(0,)]


async def test_an_answer_that_was_kept_leaves_no_second_call_when_it_is_forgotten(shop: Process):
    upstream, proof = UpstreamOf(), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))
    async with shop.database.connection() as tx:
        await tx.execute("UPDATE payment SET replay_until = now() - interval '1 second'")
        assert code(await shop.fares.admit(a_call(), proof)) == "answer_gone"
        assert await payments.forget_answers(tx) == 1

    assert code(await shop.fares.admit(a_call(), proof)) == "answer_gone"
    assert upstream.calls == 1


async def test_a_payment_for_one_route_gives_no_re_run_on_another_of_the_same_path(shop: Process):
    """Headers may choose between routes of one path."""
    dear = dataclasses.replace(ROUTE, id="forecast-by-the-minute", exact=ExactFare(Money.parse("5 USDC"), ()))
    upstream, proof = UpstreamOf(body=b"x" * 70_000), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))
    await _until_ended(shop)

    assert code(await shop.fares.admit(a_call(route=dear), proof)) == "payment_used"


async def test_old_answers_are_forgotten(shop: Process):
    upstream, proof = UpstreamOf(), Buyer().pays(shop, a_call())
    await upstream.serve(await shop.fares.admit(a_call(), proof))
    async with shop.database.connection() as tx:
        assert await payments.forget_answers(tx) == 0
        await tx.execute("UPDATE payment SET replay_until = now() - interval '1 second'")
        assert await payments.forget_answers(tx) == 1
        assert await payments.forget_answers(tx) == 0


async def _buy(shop: Process, upstream: UpstreamOf, proof: bytes) -> Answer | Refusal:
    return await upstream.serve(await shop.fares.admit(a_call(), proof))


async def _until_ended(shop: Process) -> None:
    """Until what a call left to the background is written."""
    while shop.fares._background or shop.fares._held:
        await asyncio.sleep(0.01)


class _Later:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._seconds, UTC)


def _instant(seconds: float) -> Any:
    return datetime.fromtimestamp(seconds, UTC)
