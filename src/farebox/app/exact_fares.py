"""Exact fares: one call, paid on the spot by an x402 payment (DESIGN §4, flow ``authorization``).

A payment is reserved in the database before the upstream hears of the call, bound to exactly this request, and settled
when the upstream's answer begins well, before a byte of it is let out. Whoever comes with the same payment meanwhile or
later meets the reservation: the same request waits or gets the stored answer, another one gets nothing. Money that may
have moved is never asked for a second time: an outcome that nobody knows is a 503 or a 409, not a payable 402. Money that
was taken for an answer which the upstream then broke off is given back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal
from farebox.app.offers import Offer, offers_for
from farebox.app.ports.chain import (
    Chain,
    NotRefunded,
    Outcome,
    RefundOrder,
    Settled,
    SettlementOrder,
    SettleRefused,
    SettleUnknown,
)
from farebox.app.ports.clock import Clock
from farebox.app.proofs import BadProof, GoodProof, check
from farebox.base.errors import InvariantError, Reason, Refused, Unavailable
from farebox.base.ids import new_id
from farebox.domain.access import GatewayCatalog, Route
from farebox.domain.ledger import exact_fare_refunded, exact_fare_settled
from farebox.domain.payment import Event, State, after
from farebox.protocols.x402 import PaymentRequired, Resource, SettlementResponse, encode_header
from farebox.store import payments
from farebox.store.gather import Gatherer
from farebox.store.payments import KeptAnswer, Reservation, Reserved, StoredPayment, Verdict
from farebox.store.pool import Database

#: What the gateway may buffer of a paid upload; a larger one is refused with 413.
PAID_BODY_BYTES_MAX: Final = 1 << 20
#: Answers up to this size are kept for a replay by the same payment.
KEPT_ANSWER_BYTES_MAX: Final = 64 << 10
KEPT_ANSWER_TTL_S: Final = 600.0

IN_FLIGHT_RETRY_S: Final = 1.0
RELEASE_AGAIN_AFTER_S: Final = 0.5
CLOSE_TIMEOUT_S: Final = 5.0

_ROUTES_KNOWN_MAX: Final = 4096
_URL_CHARACTERS_MAX: Final = 1024
_DESCRIPTION_CHARACTERS_MAX: Final = 200
_REPEATABLE: Final = frozenset({"GET", "HEAD"})
#: Of one connection or one request, or set anew with each answer.
_NOT_KEPT: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"content-length",
        b"date",
        b"trailer",
        b"upgrade",
        b"payment-response",
        b"access-control-expose-headers",
        b"farebox-sandbox",
        b"farebox-request-id",
    }
)
log = structlog.get_logger(__name__)

_EXPOSED: Final = (b"Access-Control-Expose-Headers", b"PAYMENT-REQUIRED, PAYMENT-RESPONSE")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that reserves: ``process.id`` and ``process.epoch`` of its row."""

    process_id: str
    epoch: int


class ExactFares:
    """Admits calls by payment. ``close()`` waits for what still writes.

    Reason codes, and the status an edge gives them: ``payment_required``, ``payment_invalid``, ``payment_used``,
    ``settlement_failed`` 402; ``payment_malformed`` 400; ``payment_in_flight``, ``outcome_unknown``, ``answer_gone`` 409;
    ``settlement_unknown``, ``unavailable`` 503.
    """

    def __init__(
        self,
        database: Database,
        chains: Sequence[Chain],
        clock: Clock,
        owner: Owner,
        catalog: Callable[[], GatewayCatalog],
    ) -> None:
        self._database = database
        self._chains = tuple(chains)
        self._clock = clock
        self._owner = owner
        self._catalog = catalog
        self._offers_by_route: dict[int, tuple[Route, tuple[Offer, ...]]] = {}
        self._held: dict[
            bytes, bytes
        ] = {}  # payment key → request digest, while a call of this process has it
        self._background: set[asyncio.Task[None]] = set()
        self._reservations: Gatherer[Reservation, Verdict] = Gatherer(
            self._write_reservations, key=lambda r: r.payment_key, name="reservations"
        )
        self._releases: Gatherer[bytes, None] = Gatherer(self._write_releases, key=bytes, name="releases")
        self._answers: Gatherer[KeptAnswer, None] = Gatherer(
            self._write_answers, key=lambda a: a.payment_key, name="kept answers"
        )

    # ── the challenge ────────────────────────────────────────────────────────────────────────────────────────────

    def payment_required(self, call: Call, error: str | None = None) -> Refusal:
        """The 402 a stranger meets: code ``payment_required``, header PAYMENT-REQUIRED. Synchronous, no I/O.

        ``error`` is said on the wire in the challenge (an x402 error reason).
        """
        offers = self._offers(call.route)
        if not offers:
            return _not_payable()
        return self._challenge(
            call,
            offers,
            Reason(
                "payment_required",
                f"This call costs {_price(call.route)}. Sign one of the offers in PAYMENT-REQUIRED (x402 version 2) and send"
                " the same request with PAYMENT-SIGNATURE; `farebox pay URL` does both.",
                None,
                {"price": _price(call.route)},
            ),
            error or "PAYMENT-SIGNATURE header is required",
        )

    def needs_body(self, call: Call) -> bool:
        """Whether the body must be buffered (to ``PAID_BODY_BYTES_MAX``) so that the payment can be bound to its digest."""
        return (
            call.header(b"content-length") not in (None, b"0")
            or call.header(b"transfer-encoding") is not None
        )

    # ── the payment ──────────────────────────────────────────────────────────────────────────────────────────────

    async def admit(self, call: Call, proof: bytes) -> Decision:
        """Decide a call that carries a payment (the value of PAYMENT-SIGNATURE, as received)."""
        offers = self._offers(call.route)
        if not offers:
            return _not_payable()
        try:
            checked = check(proof, offers, self._clock.now().timestamp())
        except Refused as refused:
            return Refusal(refused.reason)
        digest = request_digest(call)
        try:
            match checked:
                case GoodProof():
                    return await self._reserve(call, checked, digest)
                case BadProof(reason, key):
                    # What was good once may be paid and answered already: then its expiry, or a new price, is no reason.
                    earlier = None if key is None else await self._find(key)
                    return (
                        self._invalid(call, reason)
                        if earlier is None
                        else await self._met_late(call, earlier, digest, reason)
                    )
        except Unavailable as away:
            return _unavailable(away)

    async def close(self) -> None:
        """Stop taking payments; return when what was begun is written, or after ``CLOSE_TIMEOUT_S``."""
        await self._reservations.close()
        if self._background:
            await asyncio.wait(list(self._background), timeout=CLOSE_TIMEOUT_S)
        for task in list(self._background):
            task.cancel()
        await self._releases.close()
        await self._answers.close()

    async def _reserve(self, call: Call, proof: GoodProof, digest: bytes) -> Decision:
        key = proof.payment_key
        if key in self._held:
            return _in_flight() if self._held[key] == digest else self._used(call)
        self._held[key] = digest
        # The write outlives a caller that hangs up: its verdict must not be lost, or the payment would look in use for ever.
        writing = asyncio.ensure_future(self._reservations.put(self._reservation(call, proof, digest)))
        try:
            verdict = await asyncio.shield(writing)
        except asyncio.CancelledError:
            self._in_background(self._abandon(key, writing))
            raise
        except Unavailable:
            # It may have been written. The upstream has heard nothing, so it is given back as soon as that can be said.
            self._in_background(self._give_back(key))
            raise
        if isinstance(verdict, Reserved):
            return self._admitted(call, proof, verdict.payment_id)
        del self._held[key]
        return await self._met(call, proof, digest, verdict)

    async def _met(self, call: Call, proof: GoodProof, digest: bytes, met: StoredPayment) -> Decision:
        """A good payment that somebody brought before."""
        if not _same_request(met, digest):
            return self._used(call)
        if State(met.status) is not State.RESERVED:
            return await self._met_ended(call, met)
        if self._alive(met):
            return _in_flight()
        async with self._database.connection() as tx:
            if call.method not in _REPEATABLE:
                await payments.mark_unknown(tx, met)
                return _outcome_unknown()
            if proof.payment_key in self._held:
                return _in_flight()
            self._held[proof.payment_key] = digest
            try:
                ours = await payments.take_over(tx, met, self._owner.process_id, self._owner.epoch)
            except BaseException:
                del self._held[proof.payment_key]
                raise
        if not ours:
            del self._held[proof.payment_key]
            return _in_flight()
        return self._admitted(call, proof, met.payment_id)

    async def _met_late(self, call: Call, met: StoredPayment, digest: bytes, reason: Reason) -> Decision:
        """A payment that could no longer be taken, but was brought before."""
        if not _same_request(met, digest):
            return self._used(call)
        match State(met.status):
            case State.RELEASED | State.FAILED:
                return self._invalid(call, reason)
            case State.RESERVED if self._alive(met):
                return _in_flight()
            case State.RESERVED:
                return await self._met_lost(call, met, reason)
            case _:
                return await self._met_ended(call, met)

    async def _met_lost(self, call: Call, met: StoredPayment, reason: Reason) -> Refusal:
        """Nobody may be asked to pay anew while a process that is only asleep could still settle what it holds."""
        async with self._database.connection() as tx:
            if call.method not in _REPEATABLE:
                await payments.mark_unknown(tx, met)
                return _outcome_unknown()
            released = await payments.release(tx, [(met.payment_key, met.owner, met.owner_epoch)])
        return self._invalid(call, reason) if released else _in_flight()

    async def _met_ended(self, call: Call, met: StoredPayment) -> Decision:
        match State(met.status):
            case State.SETTLED:
                return await self._met_settled(call, met)
            case State.FAILED:
                code = met.failure or "transaction_failed"
                return self._invalid(
                    call,
                    Reason(
                        "payment_invalid",
                        "This payment could not be settled; sign a new one.",
                        None,
                        {"reason": code},
                    ),
                )
            case State.UNKNOWN:
                return _outcome_unknown()
            case State.REFUNDED:
                return _given_back(met, self._receipt_of(met))
            case _:  # released while we looked
                return _in_flight()

    async def _met_settled(self, call: Call, met: StoredPayment) -> Decision:
        receipt = self._receipt_of(met)
        if met.answer_body is not None and met.answer_head is not None and met.answer_status is not None:
            return Answer(met.answer_status, [*_read_head(met.answer_head), *receipt], met.answer_body)
        if met.answer_status is None and met.recent and self._alive(met):
            return _in_flight()  # its answer is still on the way
        if met.answer_body is None and call.method in _REPEATABLE and not met.rerun:
            async with self._database.connection() as tx:
                if await payments.claim_rerun(tx, met.payment_key):
                    return self._admitted_again(met, receipt)
        return _answer_gone(met, receipt)

    def _alive(self, met: StoredPayment) -> bool:
        if met.owner == self._owner.process_id:
            return met.owner_epoch == self._owner.epoch and met.payment_key in self._held
        return met.owner_lives

    # ── admitted ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _admitted(self, call: Call, proof: GoodProof, payment_id: str) -> Admitted:
        serving = _Serving(self, call, proof, payment_id)
        return Admitted(
            fare="exact",
            forward_headers=[(b"Farebox-Payer", proof.payer.encode())],
            answer_headers=serving.answer_headers,
            finish=serving.finish,
            before_release=serving.before_release,
            keep_answer_bytes_max=KEPT_ANSWER_BYTES_MAX,
            keep_answer=serving.keep_answer,
            broken=serving.broken,
        )

    def _admitted_again(self, met: StoredPayment, receipt: Headers) -> Admitted:
        """The one re-run of a payment that was settled while its answer was lost or too large to keep.

        It stays owed when the upstream fails: the buyer has paid for an answer and had none."""

        async def keep(status: int, headers: Headers, body: bytes) -> None:
            if status < 400:
                await self._keep_answer(met.payment_key, status, headers, body)

        broke = False

        def broken() -> None:
            nonlocal broke
            broke = True

        def finish(status: int, bytes_up: int, bytes_down: int) -> None:
            unanswered = status == 0 and bytes_down == 0 and not admitted.abandoned
            if status >= 400 or unanswered or broke:
                self._in_background(self._owe_rerun(met.payment_key))

        admitted = Admitted(
            fare="exact",
            forward_headers=[(b"Farebox-Payer", met.payer.encode())],
            answer_headers=receipt,
            finish=finish,
            keep_answer_bytes_max=KEPT_ANSWER_BYTES_MAX,
            keep_answer=keep,
            broken=broken,
        )
        return admitted

    async def _refund(self, chain: Chain, order: RefundOrder) -> None:
        """Give the money back, until it is known how that went: the payment's row stays settled until then, and whoever
        brings the payment meanwhile meets it in flight. What cannot be given back leaves the one re-run instead."""
        while True:
            try:
                outcome = await chain.refund(order)
            except Unavailable:
                await asyncio.sleep(RELEASE_AGAIN_AFTER_S)
                continue
            break
        if isinstance(outcome, NotRefunded):
            log.error("refund_not_made", payment_id=order.payment_id, why=outcome.why)
            await self._keep_answer(order.payment_key, 0, [], None)
            return
        log.warning("payment_refunded", payment_id=order.payment_id, transaction=outcome.transaction_hash)
        self._let_go(order.payment_key)

    async def _owe_rerun(self, key: bytes) -> None:
        while True:
            try:
                async with self._database.connection() as tx:
                    await payments.owe_rerun(tx, key)
            except Unavailable:
                await asyncio.sleep(RELEASE_AGAIN_AFTER_S)
            else:
                return

    def _let_go(self, key: bytes) -> None:
        self._held.pop(key, None)

    async def _release(self, key: bytes) -> bool:
        """Give a reservation back; False when the database does not answer."""
        try:
            await self._releases.put(key)
        except Unavailable:
            return False
        return True

    async def _give_back(self, key: bytes) -> None:
        """Release until it is done: meanwhile the payment is in flight, which is the truth for whoever brings it."""
        while True:
            if await self._release(key):
                break
            await asyncio.sleep(RELEASE_AGAIN_AFTER_S)
        self._let_go(key)

    async def _abandon(self, key: bytes, writing: asyncio.Future[Verdict]) -> None:
        try:
            verdict = await writing
        except Unavailable:
            await self._give_back(key)
            return
        if isinstance(verdict, Reserved):
            await self._give_back(key)
        else:
            self._let_go(key)

    async def _keep_answer(self, key: bytes, status: int, headers: Headers, body: bytes | None) -> None:
        head = None if body is None else _write_head(headers)
        try:
            await self._answers.put(KeptAnswer(key, status, head, body, KEPT_ANSWER_TTL_S))
        except Unavailable:
            pass  # the one re-run stands in for an answer that could not be kept
        finally:
            self._let_go(key)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reservation(self, call: Call, proof: GoodProof, digest: bytes) -> Reservation:
        offer = proof.offer
        return Reservation(
            payment_key=proof.payment_key,
            payment_id=new_id("pay"),
            flow="authorization",
            fare="exact",
            network=offer.requirements.network,
            scheme=offer.requirements.scheme,
            asset=offer.token.address,
            book_asset=offer.chain.book_asset(offer.token).code,
            amount=offer.requirements.amount,
            payer=proof.payer,
            recipient=offer.requirements.pay_to.lower(),
            route_id=call.route.id,
            resource_path=call.path,
            request_digest=digest,
            owner=self._owner.process_id,
            owner_epoch=self._owner.epoch,
            valid_before=proof.valid_before,
        )

    def _order(self, call: Call, proof: GoodProof, payment_id: str) -> SettlementOrder:
        offer = proof.offer
        recipient = "0x" + offer.recipient.hex()
        return SettlementOrder(
            payment_key=proof.payment_key,
            payment_id=payment_id,
            owner=self._owner.process_id,
            owner_epoch=self._owner.epoch,
            token=offer.token,
            payer=proof.payer,
            recipient=recipient,
            amount=offer.requirements.amount,
            postings=exact_fare_settled(
                payment_id,
                call.route.id,
                offer.requirements.network,
                recipient,
                offer.chain.book_asset(offer.token).code,
                offer.requirements.amount,
            ),
            authorization=proof.payment.authorization,
            signature=proof.payment.signature,
        )

    def _refund_order(self, call: Call, proof: GoodProof, payment_id: str) -> RefundOrder:
        """The settlement of ``_order``, turned round."""
        settled = self._order(call, proof, payment_id)
        return RefundOrder(
            payment_key=settled.payment_key,
            payment_id=payment_id,
            token=settled.token,
            payer=settled.payer,
            recipient=settled.recipient,
            amount=settled.amount,
            postings=exact_fare_refunded(
                payment_id,
                call.route.id,
                proof.offer.requirements.network,
                settled.recipient,
                proof.offer.chain.book_asset(proof.offer.token).code,
                settled.amount,
            ),
            reason="upstream_broke",
        )

    async def _write_reservations(self, wanted: Sequence[Reservation]) -> list[Verdict]:
        async with self._database.connection() as tx:
            return await payments.reserve(tx, wanted)

    async def _write_releases(self, keys: Sequence[bytes]) -> list[None]:
        async with self._database.connection() as tx:
            await payments.release(tx, [(key, self._owner.process_id, self._owner.epoch) for key in keys])
        return [None] * len(keys)

    async def _write_answers(self, answers: Sequence[KeptAnswer]) -> list[None]:
        async with self._database.connection() as tx:
            await payments.keep_answers(tx, answers)
        return [None] * len(answers)

    async def _find(self, key: bytes) -> StoredPayment | None:
        async with self._database.connection() as tx:
            return (await payments.find(tx, [key], self._owner.process_id)).get(key)

    # ── words ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _offers(self, route: Route) -> tuple[Offer, ...]:
        known = self._offers_by_route.get(id(route))
        if known is not None and known[0] is route:
            return known[1]
        offers = offers_for(route.exact.price, route.exact.pay_to, self._chains) if route.exact else ()
        if len(self._offers_by_route) >= _ROUTES_KNOWN_MAX:  # old catalogs' routes
            self._offers_by_route.clear()
        self._offers_by_route[id(route)] = (route, offers)
        return offers

    def _challenge(self, call: Call, offers: Sequence[Offer], reason: Reason, error: str) -> Refusal:
        base = self._catalog().server.public_url or f"http://{call.host}"
        url = base.rstrip("/") + call.path + (f"?{call.query}" if call.query else "")
        required = PaymentRequired(
            resource=Resource(
                url[:_URL_CHARACTERS_MAX], call.route.description[:_DESCRIPTION_CHARACTERS_MAX] or None
            ),
            accepts=tuple(o.requirements for o in offers),
            error=error,
        )
        headers: Headers = [
            (b"PAYMENT-REQUIRED", encode_header(required.to_wire())),
            (b"Cache-Control", b"no-store"),
            _EXPOSED,
        ]
        return Refusal(reason, headers)

    def _invalid(self, call: Call, reason: Reason) -> Refusal:
        return self._challenge(call, self._offers(call.route), reason, str(reason.facts["reason"]))

    def _used(self, call: Call) -> Refusal:
        return self._challenge(
            call,
            self._offers(call.route),
            Reason(
                "payment_used",
                "This payment was made for another request and buys nothing here; sign a new one for this request.",
                None,
                {"reason": "invalid_exact_evm_nonce_already_used"},
            ),
            "invalid_exact_evm_nonce_already_used",
        )

    def _receipt_of(self, met: StoredPayment) -> Headers:
        return receipt_headers(
            SettlementResponse(True, met.network, met.transaction_hash or "", met.payer, met.amount)
        )


class _Serving:
    """One paid call between its reservation and its end. The payment stays held by this process until the row says how it ended."""

    __slots__ = (
        "_answer_pending",
        "_broken",
        "_call",
        "_fares",
        "_payment_id",
        "_proof",
        "_released",
        "_settling",
        "_state",
        "answer_headers",
    )

    def __init__(self, fares: ExactFares, call: Call, proof: GoodProof, payment_id: str) -> None:
        self._fares = fares
        self._call = call
        self._proof = proof
        self._payment_id = payment_id
        self._state = after(State.RESERVED, Event.VERIFIED)
        self._released = False
        self._settling: asyncio.Future[Outcome] | None = None
        self._answer_pending = True
        self._broken = False
        self.answer_headers: Headers = []

    async def before_release(self, status: int, headers: Headers) -> Refusal | None:
        """Settle a good answer, or give the payment back for a bad one."""
        self._move(Event.FORWARDED)
        if status >= 400:
            self._move(Event.HEAD_BAD)
            # Waited for, so that a buyer who tries again at once does not meet the old reservation.
            self._released = await self._fares._release(self._proof.payment_key)
            return None
        self._move(Event.HEAD_GOOD)
        self._settling = asyncio.ensure_future(self._settle())
        # Money in motion is not stopped by a client that hangs up.
        outcome = await asyncio.shield(self._settling)
        match outcome:
            case Settled(transaction_hash):
                self._move(Event.SETTLED)
                self.answer_headers.extend(self._receipt(transaction_hash))
                if not any(name.lower() == b"cache-control" for name, _ in headers):
                    self.answer_headers.append((b"Cache-Control", b"private"))
                return None
            case SettleRefused("reservation_lost"):
                self._move(Event.SETTLE_UNKNOWN)
                return _in_flight()
            case SettleRefused(code, message):
                self._move(Event.SETTLE_REFUSED)
                return self._not_settled(code, message)
            case SettleUnknown(retry_after_s):
                return Refusal(
                    Reason(
                        "settlement_unknown",
                        "It is not known yet whether this payment was settled. Send the same request with the same payment again;"
                        " do not sign a new one.",
                    ),
                    [(b"Cache-Control", b"no-store")],
                    retry_after_s,
                )

    async def keep_answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Keep a whole answer for a replay by the same payment."""
        if self._state is State.SETTLED:
            self._answer_pending = False
            await self._fares._keep_answer(self._proof.payment_key, status, headers, body)

    def broken(self) -> None:
        """The upstream broke off an answer that was paid for."""
        self._broken = True

    def finish(self, status: int, bytes_up: int, bytes_down: int) -> None:
        """The answer has gone out, or will not."""
        fares, key = self._fares, self._proof.payment_key
        match self._state:
            case State.VERIFIED | State.SERVING:  # no head ever came: nothing is taken
                fares._in_background(fares._give_back(key))
            case State.RELEASED if not self._released:
                fares._in_background(fares._give_back(key))
            case State.SETTLING:
                fares._in_background(self._settle_until_known())
            case State.SETTLED if self._broken and self._answer_pending:
                self._move(Event.REFUNDED)
                order = fares._refund_order(self._call, self._proof, self._payment_id)
                fares._in_background(fares._refund(self._proof.offer.chain, order))
            case State.SETTLED if self._answer_pending:
                # None was handed over: it was too large, or broke off. One re-run is left instead.
                fares._in_background(fares._keep_answer(key, status, [], None))
            case State.SETTLED:
                pass  # let go when the answer is kept
            case _:
                fares._let_go(key)

    async def _settle(self) -> Outcome:
        order = self._fares._order(self._call, self._proof, self._payment_id)
        return await self._proof.offer.chain.settle(order)

    async def _settle_until_known(self) -> None:
        """The client hung up while the money moved, or was told to come back: find out what became of it."""
        outcome = None if self._settling is None else await self._settling
        while outcome is None or isinstance(outcome, SettleUnknown):
            await asyncio.sleep(RELEASE_AGAIN_AFTER_S)
            outcome = await self._settle()
        await self._fares._keep_answer(self._proof.payment_key, 0, [], None)

    def _receipt(self, transaction_hash: str) -> Headers:
        wanted = self._proof.offer.requirements
        return receipt_headers(
            SettlementResponse(True, wanted.network, transaction_hash, self._proof.payer, wanted.amount)
        )

    def _not_settled(self, code: str, message: str) -> Refusal:
        wanted = self._proof.offer.requirements
        refusal = self._fares._challenge(
            self._call,
            self._fares._offers(self._call.route),
            Reason(
                "settlement_failed", f"The payment could not be settled: {message}", None, {"reason": code}
            ),
            code,
        )
        failed = SettlementResponse(
            False, wanted.network, "", self._proof.payer, error_reason=code, error_message=message
        )
        refusal.answer_headers.append((b"PAYMENT-RESPONSE", encode_header(failed.to_wire())))
        return refusal

    def _move(self, event: Event) -> None:
        self._state = after(self._state, event)


def request_digest(call: Call) -> bytes:
    """What a payment is bound to: route, method, host, path, query and the body's digest, each with its length.

    The route too, for headers may choose between routes of one path, and their prices differ."""
    digest = hashlib.sha256()
    for part in (call.route.id, call.method, call.host.lower(), call.path, call.query):
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(4, "big") + data)
    digest.update(hashlib.sha256(call.body or b"").digest())
    return digest.digest()


def receipt_headers(receipt: SettlementResponse) -> Headers:
    """PAYMENT-RESPONSE, readable from a browser."""
    return [(b"PAYMENT-RESPONSE", encode_header(receipt.to_wire())), _EXPOSED]


def _same_request(met: StoredPayment, digest: bytes) -> bool:
    return met.fare == "exact" and met.request_digest == digest


def _price(route: Route) -> str:
    if route.exact is None:
        raise InvariantError(f"route {route.id} has no exact fare")
    return str(route.exact.price)


def _in_flight() -> Refusal:
    return Refusal(
        Reason(
            "payment_in_flight",
            "This payment is being used by the same request right now. Send it again in a moment for its answer;"
            " do not sign a new one.",
        ),
        retry_after_s=IN_FLIGHT_RETRY_S,
    )


def _outcome_unknown() -> Refusal:
    return Refusal(
        Reason(
            "outcome_unknown",
            "The process that served this payment was lost, and what it asked of the upstream may have happened. The payment"
            " was not settled and will not be; ask the seller before paying again.",
        ),
        retry_after_s=60.0,
    )


def _answer_gone(met: StoredPayment, receipt: Headers) -> Refusal:
    return Refusal(
        Reason(
            "answer_gone",
            "This payment was settled and served, and its answer is no longer kept. PAYMENT-RESPONSE is its receipt;"
            " sign a new payment for a new call.",
            None,
            {"payment_id": met.payment_id, "transaction": met.transaction_hash},
        ),
        receipt,
    )


def _given_back(met: StoredPayment, receipt: Headers) -> Refusal:
    return Refusal(
        Reason(
            "answer_gone",
            "The answer this payment bought broke off at the upstream, and the payment was given back; sign a new payment"
            " for a new call.",
            None,
            {"payment_id": met.payment_id, "transaction": met.transaction_hash, "refunded": True},
        ),
        receipt,
    )


def _unavailable(away: Unavailable) -> Refusal:
    return Refusal(
        Reason(
            "unavailable", "Payments cannot be taken at the moment. Send the same payment again in a moment."
        ),
        [(b"Cache-Control", b"no-store")],
        away.retry_after_s,
    )


def _not_payable() -> Refusal:
    return Refusal(
        Reason(
            "unavailable",
            "This call cannot be paid for: no network is set up on which its price could be taken.",
        ),
        retry_after_s=60.0,
    )


def _write_head(headers: Headers) -> bytes:
    kept = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in headers if k.lower() not in _NOT_KEPT]
    return json.dumps(kept).encode()


def _read_head(head: bytes) -> Headers:
    return [(k.encode("latin-1"), v.encode("latin-1")) for k, v in json.loads(head)]
