"""HTTP clients that pay a 402 and send the same request again.

One payment a request, whatever happens: while nobody knows what became of it (a broken connection, 503, 409 in flight)
the *same* payment is sent again, and a new one is never signed. A client that gives up remembers the payment, so that
asking for the same thing again continues it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final

import httpx

from farebox.base.errors import FareboxError, Refused
from farebox.base.money import Money
from farebox.client import passes
from farebox.client.passes import BoughtPass
from farebox.client.purse import KNOWN_ASSETS, KnownAsset, PaymentDeclined, Purse, SignedPayment
from farebox.client.wallet import Wallet
from farebox.protocols import strict_json
from farebox.protocols.x402 import PaymentRequired, SettlementResponse, decode_header

#: The same payment is sent this often at most, and for this long.
SENDS_MAX: Final = 6
WAIT_S_MAX: Final = 30.0
_WAIT_S: Final = 1.0
#: Challenges may be longer than payments: they carry descriptions.
_CHALLENGE_CHARACTERS_MAX: Final = 64_000
_UNFINISHED_MAX: Final = 1000
_RECEIPT: Final = "farebox.receipt"


class OutcomeUnknown(FareboxError):
    """Nobody could be asked whether the payment was taken. Ask for the same thing again with the same client, before
    ``payment.valid_until_s``: the same payment is sent again. Do not pay anew."""

    def __init__(self, what: str, payment: SignedPayment) -> None:
        super().__init__(what)
        self.payment = payment


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was paid for an answer. ``transaction`` as the seller names it."""

    price: Money
    payer: str
    network: str
    transaction: str


def receipt_of(response: httpx.Response) -> Receipt | None:
    """The receipt of an answer that was paid for; None for one that was free."""
    receipt = response.extensions.get(_RECEIPT)
    return receipt if isinstance(receipt, Receipt) else None


class PayingClient(httpx.Client):
    """An ``httpx.Client`` that pays. ``max_price`` bounds each payment; ``PaymentDeclined`` when a call costs more, or can be
    paid in nothing that is known. Every other argument is httpx's."""

    def __init__(
        self,
        wallet: Wallet,
        max_price: str = "0.10 USDC",
        *,
        assets: tuple[KnownAsset, ...] = KNOWN_ASSETS,
        transport: httpx.BaseTransport | None = None,
        **options: Any,
    ) -> None:
        self.purse = Purse(wallet, max_price, assets)
        super().__init__(
            transport=_PayingTransport(self.purse, transport or httpx.HTTPTransport()), **options
        )

    def buy_pass(
        self, gateway_url: str, route: str | None = None, offer: str | None = None, nonce: str | None = None
    ) -> BoughtPass:
        """Buy a pass: the offer of that name, or the cheapest for the route. ``nonce`` continues an earlier purchase."""
        listed = self.get(passes.quotes_url(gateway_url, route))
        quote = passes.choose(listed, offer)
        return passes.bought(
            self.send(passes.purchase(self, gateway_url, quote, self.purse.wallet.address, nonce))
        )


class AsyncPayingClient(httpx.AsyncClient):
    """``PayingClient`` for asyncio."""

    def __init__(
        self,
        wallet: Wallet,
        max_price: str = "0.10 USDC",
        *,
        assets: tuple[KnownAsset, ...] = KNOWN_ASSETS,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Any,
    ) -> None:
        self.purse = Purse(wallet, max_price, assets)
        super().__init__(
            transport=_AsyncPayingTransport(self.purse, transport or httpx.AsyncHTTPTransport()), **options
        )

    async def buy_pass(
        self, gateway_url: str, route: str | None = None, offer: str | None = None, nonce: str | None = None
    ) -> BoughtPass:
        """As ``PayingClient.buy_pass``."""
        listed = await self.get(passes.quotes_url(gateway_url, route))
        quote = passes.choose(listed, offer)
        request = passes.purchase(self, gateway_url, quote, self.purse.wallet.address, nonce)
        return passes.bought(await self.send(request))


# ── the order of things, without I/O ─────────────────────────────────────────────────────────────────────────────────

#: Asks its driver to send a request, or to wait some seconds; gets the response, or the transport's error thrown in.
_Steps = Generator[httpx.Request | float, httpx.Response | None, httpx.Response]


class _Payer:
    """Payments by request, so that an unfinished one is continued and not made twice."""

    def __init__(self, purse: Purse, clock: Callable[[], float] = time.time) -> None:
        self._purse = purse
        self._clock = clock
        self._unfinished: dict[bytes, SignedPayment] = {}

    def steps(self, request: httpx.Request) -> _Steps:
        identity = _identity(request)
        payment = self._unfinished.pop(identity, None)
        if payment is None or payment.valid_until_s <= self._clock():
            response = yield request
            assert response is not None
            challenge = response.headers.get("payment-required")
            if response.status_code != 402 or challenge is None or "payment-signature" in request.headers:
                return response
            payment = self._purse.pay(_challenge(challenge))
        try:
            return (yield from self._send(request, payment))
        except BaseException:  # gave up, or was cancelled: whoever asks again goes on with this payment
            if len(self._unfinished) >= _UNFINISHED_MAX:
                del self._unfinished[next(iter(self._unfinished))]
            self._unfinished[identity] = payment
            raise

    def _send(self, request: httpx.Request, payment: SignedPayment) -> _Steps:
        paid = _with_payment(request, payment)
        waited_s = 0.0
        for sends in range(1, SENDS_MAX + 1):
            wait_s = _WAIT_S
            try:
                response = yield paid
                assert response is not None
                if not _unknown(response):
                    return _receipted(response, payment)
                wait_s = _retry_after_s(response)
                what = f"the seller answers {response.status_code} {_code(response)}"
            except httpx.TransportError as broken:
                what = f"the connection broke ({type(broken).__name__})"
            waited_s += wait_s
            if sends == SENDS_MAX or waited_s > WAIT_S_MAX or self._clock() + wait_s >= payment.valid_until_s:
                break
            yield wait_s
        raise OutcomeUnknown(f"it is not known whether {payment.price} was taken: {what}", payment)


class _PayingTransport(httpx.BaseTransport):
    def __init__(self, purse: Purse, inner: httpx.BaseTransport) -> None:
        self._payer = _Payer(purse)
        self._inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()  # it may have to be sent again
        steps = self._payer.steps(request)
        step = next(steps)
        while True:
            try:
                if isinstance(step, float):
                    time.sleep(step)
                    step = steps.send(None)
                    continue
                try:
                    response = self._inner.handle_request(step)
                    if _is_ours_to_read(response):
                        response.read()
                except httpx.TransportError as broken:
                    step = steps.throw(broken)
                else:
                    step = steps.send(response)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]

    def close(self) -> None:
        self._inner.close()


class _AsyncPayingTransport(httpx.AsyncBaseTransport):
    def __init__(self, purse: Purse, inner: httpx.AsyncBaseTransport) -> None:
        self._payer = _Payer(purse)
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        steps = self._payer.steps(request)
        step = next(steps)
        while True:
            try:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    step = steps.send(None)
                    continue
                try:
                    response = await self._inner.handle_async_request(step)
                    if _is_ours_to_read(response):
                        await response.aread()
                except httpx.TransportError as broken:
                    step = steps.throw(broken)
                else:
                    step = steps.send(response)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        await self._inner.aclose()


# ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


def _identity(request: httpx.Request) -> bytes:
    digest = hashlib.sha256(f"{request.method} {request.url}\n".encode())
    digest.update(request.headers.get("idempotency-key", "").encode() + b"\n" + request.content)
    return digest.digest()


def _challenge(header: str) -> PaymentRequired:
    try:
        return PaymentRequired.from_wire(decode_header(header, _CHALLENGE_CHARACTERS_MAX))
    except Refused as refused:
        raise PaymentDeclined(f"the seller's challenge cannot be read: {refused}") from refused


def _with_payment(request: httpx.Request, payment: SignedPayment) -> httpx.Request:
    headers = request.headers.copy()
    headers["PAYMENT-SIGNATURE"] = payment.header.decode()
    return httpx.Request(
        request.method, request.url, headers=headers, content=request.content, extensions=request.extensions
    )


def _is_ours_to_read(response: httpx.Response) -> bool:
    """Refusals are read here (their connection is free again then); answers stay streams for the caller."""
    return response.status_code in (402, 409, 503)


def _unknown(response: httpx.Response) -> bool:
    """Whether the same payment has to be sent again to learn what became of it."""
    if response.status_code == 503:
        return True
    return response.status_code == 409 and _code(response) == "payment_in_flight"


def _code(response: httpx.Response) -> str:
    try:
        document = strict_json.loads(response.content[:65_536])
    except Refused:
        return ""
    code = document.get("code") if isinstance(document, dict) else None
    return code if isinstance(code, str) else ""


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return min(float(text), WAIT_S_MAX) if text.isascii() and text.isdecimal() else _WAIT_S


def _receipted(response: httpx.Response, payment: SignedPayment) -> httpx.Response:
    header = response.headers.get("payment-response")
    if header is None:
        return response
    try:
        settled = SettlementResponse.from_wire(decode_header(header))
    except Refused:
        return response
    if settled.success:
        response.extensions = {
            **response.extensions,
            _RECEIPT: Receipt(payment.price, settled.payer or "", settled.network, settled.transaction),
        }
    return response
