"""The paying clients against the real admission (in process, on a real database), and against sellers that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import httpx
import pytest

from farebox.app.admission import Headers, Refusal
from farebox.client import (
    AsyncPayingClient,
    OutcomeUnknown,
    PayingClient,
    PaymentDeclined,
    Wallet,
    receipt_of,
)
from farebox.client import paying as paying_module
from farebox.client.passes import PassNotSold
from farebox.gateway.problems import problem
from tests.app.till import Process, UpstreamOf, a_call, a_process, rows


class InProcessGateway(httpx.AsyncBaseTransport):
    """Carries a request to the admission and its answer back. ``lose`` drops that many paid answers on the way."""

    def __init__(self, shop: Process, upstream: UpstreamOf, lose: int = 0) -> None:
        self.shop, self.upstream, self.lose = shop, upstream, lose
        self.proofs: list[bytes] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = urlsplit(str(request.url))
        headers: Headers = [(k.lower(), v) for k, v in request.headers.raw]
        if self.shop.site.owns(url.path):
            said = await self.shop.site.answer(
                request.method, url.path, url.query, headers, request.content, "127.0.0.1"
            )
        else:
            call = a_call(url.path, request.method, url.query, request.content or None)
            proof = request.headers.get("payment-signature")
            if proof is None:
                said = self.shop.fares.payment_required(call)
            else:
                said = await self.upstream.serve(await self.shop.fares.admit(call, proof.encode()))
        if proof_sent := request.headers.get("payment-signature"):
            self.proofs.append(proof_sent.encode())
            if self.lose:
                self.lose -= 1
                raise httpx.ReadError("the connection broke")
        if isinstance(said, Refusal):
            status, fields, body = problem(said, "req_1")
            return httpx.Response(status, headers=fields, content=body)
        return httpx.Response(said.status, headers=said.headers, content=said.body)


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Process]:
    async with a_process(database_url) as process:
        yield process


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits a second between two sends in a test."""
    monkeypatch.setattr(paying_module, "_retry_after_s", lambda response: 0.01)
    monkeypatch.setattr(paying_module, "_WAIT_S", 0.01)


async def test_a_call_is_paid_for_and_receipted(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf())
    async with AsyncPayingClient(Wallet.new(), "0.001 USDC", transport=gateway) as http:
        answer = await http.get("http://shop.test/weather/rome")

    assert answer.json() == {"weather": "fine"}
    receipt = receipt_of(answer)
    assert receipt is not None
    assert str(receipt.price) == "0.001 USDC"
    assert receipt.transaction.startswith("0x5a4db0")
    assert len(gateway.proofs) == 1


async def test_a_call_that_costs_too_much_is_not_paid_for(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf())
    async with AsyncPayingClient(Wallet.new(), "0.0009 USDC", transport=gateway) as http:
        with pytest.raises(PaymentDeclined):
            await http.get("http://shop.test/weather/rome")
    assert gateway.proofs == []


async def test_a_lost_answer_is_fetched_with_the_same_payment(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf(), lose=2)
    async with AsyncPayingClient(Wallet.new(), transport=gateway) as http:
        answer = await http.get("http://shop.test/weather/rome")

    assert answer.status_code == 200
    assert receipt_of(answer) is not None
    assert len(set(gateway.proofs)) == 1
    assert gateway.upstream.calls == 1
    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_who_gave_up_and_asks_again_goes_on_with_the_same_payment(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf(), lose=paying_module.SENDS_MAX)
    async with AsyncPayingClient(Wallet.new(), transport=gateway) as http:
        with pytest.raises(OutcomeUnknown):
            await http.get("http://shop.test/weather/rome")
        answer = await http.get("http://shop.test/weather/rome")

    assert answer.status_code == 200
    assert len(set(gateway.proofs)) == 1
    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


async def test_two_calls_are_two_payments(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf())
    async with AsyncPayingClient(Wallet.new(), transport=gateway) as http:
        answers = await asyncio.gather(*(http.get("http://shop.test/weather/rome") for _ in range(5)))
    assert [a.status_code for a in answers] == [200] * 5
    assert len(set(gateway.proofs)) == 5
    assert gateway.upstream.calls == 5


async def test_a_pass_is_bought_in_one_call_and_a_lost_answer_is_had_again(shop: Process):
    gateway = InProcessGateway(shop, UpstreamOf(), lose=1)
    async with AsyncPayingClient(Wallet.new(), "1 USDC", transport=gateway) as http:
        bought = await http.buy_pass("http://shop.test", "forecast")
        again = await http.buy_pass("http://shop.test", "forecast", nonce=bought.nonce)
        with pytest.raises(PassNotSold, match="hour"):
            await http.buy_pass("http://shop.test", offer="year")
        with pytest.raises(PassNotSold):
            await http.buy_pass("http://shop.test", "nowhere")

    assert again == bought
    assert bought.headers == {"Authorization": f"Bearer {bought.token}"}
    assert await rows(shop.database, "SELECT count(*) FROM pass") == [(1,)]
    assert await rows(shop.database, "SELECT count(*) FROM sandbox_transfer") == [(1,)]


# ── sellers that fail, for the client that waits ─────────────────────────────────────────────────────────────────────


def scripted(
    shop: Process, *paid_answers: httpx.Response | Exception
) -> tuple[httpx.MockTransport, list[str]]:
    """A seller whose challenge is ours and whose answers to a payment are these, one after the other."""
    challenge = shop.fares.payment_required(a_call()).answer_headers
    remaining, proofs = list(paid_answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        if (proof := request.headers.get("payment-signature")) is None:
            return httpx.Response(402, headers=challenge)
        proofs.append(proof)
        said = remaining.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    return httpx.MockTransport(answer), proofs


@pytest.mark.parametrize(
    "unknown",
    [
        lambda: httpx.Response(503, json={"code": "settlement_unknown"}),
        lambda: httpx.Response(409, json={"code": "payment_in_flight"}),
        lambda: httpx.ConnectError("refused"),
        lambda: httpx.ReadTimeout("slow"),
    ],
    ids=["503", "409", "connect", "timeout"],
)
async def test_an_unknown_outcome_is_met_with_the_same_payment(
    shop: Process, unknown: Callable[[], httpx.Response | Exception]
):
    transport, proofs = scripted(shop, unknown(), unknown(), httpx.Response(200, text="fine"))
    with PayingClient(Wallet.new(), transport=transport) as http:
        assert http.get("http://shop.test/weather/rome").text == "fine"
    assert len(proofs) == 3
    assert len(set(proofs)) == 1


async def test_a_seller_that_never_knows_ends_in_an_error_that_names_the_payment(shop: Process):
    transport, proofs = scripted(shop, *(httpx.Response(503) for _ in range(paying_module.SENDS_MAX)))
    with PayingClient(Wallet.new(), transport=transport) as http, pytest.raises(OutcomeUnknown) as unknown:
        http.get("http://shop.test/weather/rome")
    assert {unknown.value.payment.header.decode()} == set(proofs)


@pytest.mark.parametrize(
    "final",
    [
        httpx.Response(402, json={"code": "payment_invalid"}),
        httpx.Response(409, json={"code": "outcome_unknown"}),
        httpx.Response(400, json={"code": "payment_malformed"}),
        httpx.Response(500),
    ],
    ids=lambda r: str(r.status_code),
)
async def test_a_refusal_is_given_back_and_not_paid_again(shop: Process, final: httpx.Response):
    transport, proofs = scripted(shop, final)
    with PayingClient(Wallet.new(), transport=transport) as http:
        assert http.get("http://shop.test/weather/rome").status_code == final.status_code
    assert len(proofs) == 1


@pytest.mark.parametrize("header", ["", "!!!", "e30=", json.dumps({})])
async def test_a_challenge_that_cannot_be_read_is_declined(header: str):
    seller = httpx.MockTransport(lambda request: httpx.Response(402, headers={"PAYMENT-REQUIRED": header}))
    with PayingClient(Wallet.new(), transport=seller) as http, pytest.raises(PaymentDeclined):
        http.get("http://shop.test/")


async def test_a_402_of_another_kind_is_given_back():
    seller = httpx.MockTransport(lambda request: httpx.Response(402, text="pay elsewhere"))
    with PayingClient(Wallet.new(), transport=seller) as http:
        assert http.get("http://shop.test/").text == "pay elsewhere"


async def test_a_free_answer_has_no_receipt():
    seller = httpx.MockTransport(lambda request: httpx.Response(200, text="free"))
    with PayingClient(Wallet.new(), transport=seller) as http:
        assert receipt_of(http.get("http://shop.test/")) is None
