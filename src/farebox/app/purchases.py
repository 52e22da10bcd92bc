"""Buying a pass with an exact payment.

A purchase is keyed by (quote, buyer, nonce), the nonce being the request's Idempotency-Key: asking again gives the same
answer, so an answer that was lost is had by sending the same request. Who cannot send an Idempotency-Key buys too; the
payment is then the nonce. The money, the pass, its admission grant and its counters are written in one transaction.

Who may see the token again: whoever knows an Idempotency-Key of at least ``NONCE_SECRET_CHARACTERS_MIN`` characters, at
any time; with a shorter key, or with the payment alone, for ``RECOVERY_S`` after the purchase. Quotes and payers are
public, so a short key could be guessed, and a payment can be read from a chain.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from farebox.app import passes as pass_writing
from farebox.app.admission import Answer, Headers, Refusal
from farebox.app.exact_fares import Owner, receipt_headers
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.chain import Settled, SettlementOrder, SettleRefused, SettleUnknown
from farebox.app.ports.clock import BusinessClock, Clock
from farebox.app.proofs import BadProof, GoodProof, check
from farebox.app.quotes import Quote, Quotes
from farebox.base.errors import InvariantError, Reason, Refused, Unavailable, refuse
from farebox.base.ids import new_id
from farebox.base.time import to_rfc3339
from farebox.domain.access import GatewayCatalog
from farebox.domain.ledger import pass_sold
from farebox.domain.limits import limits_document
from farebox.domain.passes import Pass
from farebox.protocols import strict_json
from farebox.protocols.strict_json import Fields
from farebox.protocols.x402 import PaymentRequired, Resource, SettlementResponse, encode_header
from farebox.store import passes, payments, purchases
from farebox.store.payments import Reservation, Reserved, StoredPayment
from farebox.store.pool import Database, Tx
from farebox.store.purchases import Purchase

RECOVERY_S: Final = 600
NONCE_SECRET_CHARACTERS_MIN: Final = 16
NONCE_CHARACTERS_MAX: Final = 255
BUYER_CHARACTERS_MAX: Final = 128

#: A nonce made from the payment; no Idempotency-Key may begin like it, for anybody could make one.
_FROM_PAYMENT: Final = "payment:"
_FIELDS: Final = frozenset({"quote", "buyer", "rail"})
_CODE: Final = "purchase_malformed"
PURCHASES_PATH: Final = "/.farebox/purchases"


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a request asks for. ``nonce`` None: no Idempotency-Key was sent. ``url`` is the request's own."""

    quote: Quote
    buyer: str
    nonce: str | None
    proof: bytes | None
    url: str


class Purchases:
    """``quotes`` says what is for sale and how it can be paid."""

    def __init__(
        self,
        database: Database,
        quotes: Quotes,
        tokens: PassTokens,
        clock: Clock,
        business: BusinessClock,
        owner: Owner,
        catalog: Callable[[], GatewayCatalog],
    ) -> None:
        self._database = database
        self._quotes = quotes
        self._tokens = tokens
        self._clock = clock
        self._business = business
        self._owner = owner
        self._catalog = catalog

    def quotes(self, route_id: str | None) -> list[dict[str, Any]]:
        """Every pass for sale, or those of one route."""
        return self._quotes.list(route_id)

    async def buy(self, body: bytes, nonce: bytes | None, proof: bytes | None, host: str) -> Answer | Refusal:
        """``POST /.farebox/purchases``: 402 with the challenge, or 201 once paid. ``nonce`` is the Idempotency-Key header, ``proof``
        PAYMENT-SIGNATURE, both as received."""
        try:
            wish = self._wish(body, nonce, proof, host)
            return await self._buy(wish)
        except Refused as refused:
            return Refusal(refused.reason)
        except Unavailable as away:
            return Refusal(
                Reason(
                    "unavailable",
                    "Passes cannot be sold at the moment. Send the same request again in a moment.",
                ),
                retry_after_s=away.retry_after_s,
            )

    async def show(self, purchase_id: str, nonce: bytes | None) -> Answer | Refusal:
        """``GET /.farebox/purchases/{id}`` with the Idempotency-Key it was made with; anybody else sees a 404."""
        try:
            async with self._database.connection() as tx:
                found = await purchases.get(tx, purchase_id) if purchase_id.isascii() else None
            if found is None or nonce is None or not hmac.compare_digest(found.nonce.encode(), nonce):
                return _unknown_purchase()
            if found.nonce.startswith(_FROM_PAYMENT):
                return _unknown_purchase()
            return await self._answer(found, [])
        except Unavailable as away:
            return Refusal(
                Reason("unavailable", "Purchases cannot be read at the moment."),
                retry_after_s=away.retry_after_s,
            )

    # ── a purchase ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _buy(self, wish: _Wish) -> Answer | Refusal:
        if (
            wish.nonce is not None
            and (earlier := await self._find(wish, wish.nonce))
            and earlier.status == "paid"
        ):
            return await self._answer(earlier, await self._receipt(earlier))
        if wish.proof is None:
            return _expired() if self._quotes.expired(wish.quote) else self._required(wish)
        checked = check(wish.proof, (wish.quote.offer,), self._clock.now().timestamp())
        key = checked.payment_key
        nonce = wish.nonce if wish.nonce is not None else f"{_FROM_PAYMENT}{'' if key is None else key.hex()}"
        if (
            key is not None
            and wish.nonce is None
            and (earlier := await self._find(wish, nonce))
            and earlier.status == "paid"
        ):
            return await self._answer(earlier, await self._receipt(earlier))
        match checked:
            case BadProof(reason):
                return self._challenge(wish, reason, str(reason.facts["reason"]))
            case GoodProof() if self._quotes.expired(wish.quote):
                return _expired()
            case GoodProof():
                return await self._pay(wish, nonce, checked)

    async def _pay(self, wish: _Wish, nonce: str, proof: GoodProof) -> Answer | Refusal:
        async with self._database.transaction() as tx:
            reserved = (await payments.reserve(tx, [self._reservation(wish, nonce, proof)]))[0]
            if isinstance(reserved, StoredPayment) and (refusal := self._met(wish, nonce, reserved)):
                return refusal
            purchase = await purchases.begin(
                tx, new_id("pur"), wish.quote.id, wish.buyer, nonce, "exact", wish.quote.claims
            )
            ours = purchase.payment_key in (None, proof.payment_key) or await self._came_to_nothing(
                tx, purchase
            )
            if purchase.status == "pending" and ours:
                await purchases.pay_with(tx, purchase.id, proof.payment_key)
            elif purchase.payment_key != proof.payment_key:
                # Another payment buys, or has bought, this already: one purchase is never paid for twice.
                await payments.release(tx, [(proof.payment_key, self._owner.process_id, self._owner.epoch)])
        if purchase.status == "paid":
            return await self._answer(purchase, await self._receipt(purchase))
        if not ours:
            return _in_flight()
        return await self._settle(wish, purchase, proof, reserved)

    async def _settle(
        self, wish: _Wish, purchase: Purchase, proof: GoodProof, reserved: Reserved | StoredPayment
    ) -> Answer | Refusal:
        bought = _pass(purchase, wish, await self._business.now())

        async def hand_over(tx: Tx) -> None:
            if await purchases.hand_over(tx, purchase.id):
                await pass_writing.write(tx, bought)
                await purchases.paid(tx, purchase.id, bought.id)

        outcome = await proof.offer.chain.settle(self._order(proof, wish.quote, reserved, bought, hand_over))
        match outcome:
            case Settled():
                async with self._database.transaction() as tx:
                    await hand_over(tx)  # only where a process died between a settlement and its recording
                    sold = await purchases.get(tx, purchase.id)
                if sold is None:
                    raise InvariantError(f"purchase {purchase.id} is gone")
                return await self._answer(sold, await self._receipt(sold))
            case SettleRefused("reservation_lost"):
                return _in_flight()
            case SettleRefused(code, message):
                return self._not_settled(wish, proof, code, message)
            case SettleUnknown(retry_after_s):
                return Refusal(
                    Reason(
                        "settlement_unknown",
                        "It is not known yet whether this payment was settled. Send the same request with the same payment"
                        " again; do not sign a new one.",
                    ),
                    retry_after_s=retry_after_s,
                )

    def _met(self, wish: _Wish, nonce: str, met: StoredPayment) -> Refusal | None:
        """A payment that was brought before; None: for this very purchase, which goes on with it."""
        if met.fare != "pass" or met.request_digest != _purchase_digest(wish, nonce):
            return self._challenge(
                wish,
                Reason(
                    "payment_used",
                    "This payment was made for something else; sign a new one for this purchase.",
                ),
                "invalid_exact_evm_nonce_already_used",
            )
        if met.status == "failed":
            return self._challenge(
                wish,
                Reason(
                    "payment_invalid",
                    "This payment could not be settled; sign a new one.",
                    None,
                    {"reason": met.failure},
                ),
                met.failure or "transaction_failed",
            )
        return None if met.status in ("reserved", "settled") else _in_flight()

    async def _came_to_nothing(self, tx: Tx, purchase: Purchase) -> bool:
        """Whether the payment that a pending purchase waits for took nothing, so that another may take its place."""
        key = purchase.payment_key
        earlier = None if key is None else (await payments.find(tx, [key], self._owner.process_id)).get(key)
        if earlier is None or earlier.status in ("failed", "released"):
            return True
        if earlier.status == "reserved" and (earlier.expired or not earlier.owner_lives):
            # Whoever still holds it can no longer settle it: its reservation ends here, and this purchase is locked.
            held = [(earlier.payment_key, earlier.owner, earlier.owner_epoch)]
            return await payments.release(tx, held) == 1
        return False

    # ── what is written ──────────────────────────────────────────────────────────────────────────────────────────

    def _reservation(self, wish: _Wish, nonce: str, proof: GoodProof) -> Reservation:
        offer = proof.offer
        return Reservation(
            payment_key=proof.payment_key,
            payment_id=new_id("pay"),
            flow="authorization",
            fare="pass",
            network=offer.requirements.network,
            scheme=offer.requirements.scheme,
            asset=offer.token.address,
            book_asset=offer.chain.book_asset(offer.token).code,
            amount=offer.requirements.amount,
            payer=proof.payer,
            recipient=offer.requirements.pay_to.lower(),
            route_id=wish.quote.route_id,
            resource_path=PURCHASES_PATH,
            request_digest=_purchase_digest(wish, nonce),
            owner=self._owner.process_id,
            owner_epoch=self._owner.epoch,
            valid_before=proof.valid_before,
        )

    def _order(
        self,
        proof: GoodProof,
        quote: Quote,
        reserved: Reserved | StoredPayment,
        bought: Pass,
        hand_over: Callable[[Tx], Awaitable[None]],
    ) -> SettlementOrder:
        # A reservation of this same purchase goes on whoever made it: no upstream is involved, so nothing runs twice.
        owner, epoch = (
            (reserved.owner, reserved.owner_epoch)
            if isinstance(reserved, StoredPayment)
            else (self._owner.process_id, self._owner.epoch)
        )
        offer = proof.offer
        recipient = "0x" + offer.recipient.hex()
        return SettlementOrder(
            payment_key=proof.payment_key,
            payment_id=reserved.payment_id,
            owner=owner,
            owner_epoch=epoch,
            token=offer.token,
            payer=proof.payer,
            recipient=recipient,
            amount=offer.requirements.amount,
            postings=pass_sold(
                reserved.payment_id,
                quote.route_id,
                offer.requirements.network,
                recipient,
                offer.chain.book_asset(offer.token).code,
                offer.requirements.amount,
                bought.id,
            ),
            authorization=proof.payment.authorization,
            signature=proof.payment.signature,
            together_with=hand_over,
        )

    async def _find(self, wish: _Wish, nonce: str) -> Purchase | None:
        async with self._database.connection() as tx:
            return await purchases.find(tx, wish.quote.id, wish.buyer, nonce)

    # ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────

    def _wish(self, body: bytes, nonce: bytes | None, proof: bytes | None, host: str) -> _Wish:
        fields = Fields(strict_json.loads(body, _CODE), _CODE)
        fields.only(_FIELDS)
        if fields.text("rail") != "exact":
            fields.wrong("rail", 'must be "exact": passes are sold here for an exact payment only')
        buyer = fields.text("buyer", BUYER_CHARACTERS_MAX)
        if not buyer.isprintable():
            fields.wrong("buyer", "must be a printable name or address")
        return _Wish(
            quote=self._quotes.read(fields.text("quote", 4096)),
            buyer=buyer,
            nonce=None if nonce is None else _nonce(nonce),
            proof=proof,
            url=(self._catalog().server.public_url or f"http://{host}").rstrip("/") + PURCHASES_PATH,
        )

    # ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────

    def _required(self, wish: _Wish) -> Refusal:
        price = f"{wish.quote.claims['price']} {wish.quote.claims['asset']}"
        return self._challenge(
            wish,
            Reason(
                "payment_required",
                f"This pass costs {price}. Sign the offer in PAYMENT-REQUIRED (x402 version 2) and send the same request with"
                " PAYMENT-SIGNATURE.",
                None,
                {"price": price},
            ),
            "PAYMENT-SIGNATURE header is required",
        )

    def _challenge(self, wish: _Wish, reason: Reason, error: str) -> Refusal:
        offer = wish.quote.offer
        required = PaymentRequired(Resource(wish.url, wish.quote.name), (offer.requirements,), error)
        headers: Headers = [
            (b"PAYMENT-REQUIRED", encode_header(required.to_wire())),
            (b"Cache-Control", b"no-store"),
            (b"Access-Control-Expose-Headers", b"PAYMENT-REQUIRED, PAYMENT-RESPONSE"),
        ]
        return Refusal(reason, headers)

    def _not_settled(self, wish: _Wish, proof: GoodProof, code: str, message: str) -> Refusal:
        refusal = self._challenge(
            wish,
            Reason(
                "settlement_failed", f"The payment could not be settled: {message}", None, {"reason": code}
            ),
            code,
        )
        failed = SettlementResponse(
            False, proof.offer.requirements.network, "", proof.payer, error_reason=code, error_message=message
        )
        refusal.answer_headers.append((b"PAYMENT-RESPONSE", encode_header(failed.to_wire())))
        return refusal

    async def _answer(self, purchase: Purchase, receipt: Headers) -> Answer:
        """The purchase as its buyer sees it; 201 once it is paid, 202 before."""
        async with self._database.connection() as tx:
            bought = await passes.get(tx, purchase.pass_id) if purchase.pass_id else None
        document: dict[str, Any] = {
            "purchase_id": purchase.id,
            "status": purchase.status,
            "quote_id": purchase.quote_id,
            "buyer": purchase.buyer,
        }
        if bought is not None:
            document |= {
                "pass_id": bought.id,
                "route": bought.route_id,
                "limits": limits_document(bought.limits),
                "expires_at": to_rfc3339(bought.expires_at),
                "token": self._tokens.sign(bought) if self._may_see_token(purchase) else None,
            }
        headers: Headers = [(b"Content-Type", b"application/json"), (b"Cache-Control", b"no-store"), *receipt]
        return Answer(202 if bought is None else 201, headers, strict_json.dumps(document).encode())

    def _may_see_token(self, purchase: Purchase) -> bool:
        secret = (
            not purchase.nonce.startswith(_FROM_PAYMENT)
            and len(purchase.nonce) >= NONCE_SECRET_CHARACTERS_MIN
        )
        return secret or (
            purchase.paid_at is not None
            and self._clock.now() < purchase.paid_at + timedelta(seconds=RECOVERY_S)
        )

    async def _receipt(self, purchase: Purchase) -> Headers:
        key = purchase.payment_key
        async with self._database.connection() as tx:
            paid = None if key is None else (await payments.find(tx, [key])).get(key)
        if paid is None or paid.transaction_hash is None:
            return []
        return receipt_headers(
            SettlementResponse(True, paid.network, paid.transaction_hash, paid.payer, paid.amount)
        )


def _pass(purchase: Purchase, wish: _Wish, now: datetime) -> Pass:
    """The pass a purchase buys. Its id follows from the purchase's, so however often it is handed over it is one pass."""
    return Pass(
        id="pas_" + purchase.id.removeprefix("pur_"),
        route_id=wish.quote.route_id,
        offer_id=wish.quote.pass_offer_id,
        name=wish.quote.name,
        holder=wish.buyer,
        status="active",
        limits=wish.quote.limits,
        starts_at=now,
        expires_at=now + timedelta(seconds=wish.quote.duration_s),
        purchase_id=purchase.id,
    )


def _purchase_digest(wish: _Wish, nonce: str) -> bytes:
    """What a payment for a purchase is bound to."""
    digest = hashlib.sha256(b"farebox purchase")
    for part in (wish.quote.id, wish.buyer, nonce):
        data = part.encode()
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.digest()


def _nonce(header: bytes) -> str:
    text = header.decode("latin-1")
    if not 1 <= len(text) <= NONCE_CHARACTERS_MAX or not text.isascii() or not text.isprintable():
        raise refuse(
            _CODE,
            f"an Idempotency-Key has 1 to {NONCE_CHARACTERS_MAX} printable ASCII characters",
            "Idempotency-Key",
        )
    if text.startswith(_FROM_PAYMENT):
        raise refuse(_CODE, f"an Idempotency-Key may not begin with {_FROM_PAYMENT!r}", "Idempotency-Key")
    return text


def _in_flight() -> Refusal:
    return Refusal(
        Reason(
            "payment_in_flight",
            "This purchase is being paid for right now. Send the same request again in a moment; do not sign a new payment.",
        ),
        retry_after_s=1.0,
    )


def _expired() -> Refusal:
    return Refusal(
        Reason("quote_expired", "This quote has expired; ask /.farebox/quotes for a new one.", "quote")
    )


def _unknown_purchase() -> Refusal:
    return Refusal(
        Reason("purchase_unknown", "There is no such purchase, or it was not made with this Idempotency-Key.")
    )
