"""The front door: budget, credential, fare, limits, in that order, the same for every call (DESIGN §4).

A call with a known key or pass and open leases is decided without waiting: one scan of the headers, two look-ups, one
decrement a limit, one record in the spool. Everything else returns an awaitable. A free call is let in before all that.

When a call is billed. The spool's *admitted* record is written before the call is forwarded, *done* before the answer's
last bytes go out. ``finish`` is given the upstream's status, or 0 when there was no whole answer:

* ``charge_on: always``: billed, unless the upstream gave no answer at all (we said 502, 503 or 504). A client that hangs
  up after its call was forwarded does not call for free.
* ``charge_on: success``, and exact fares: billed when the status is below 400, and when the client hung up in the middle
  of an answer; an exact fare also when it was settled after the client had hung up.

What is not billed does not count against a limit either: its units go back to the lease they came from. Bytes that passed
stay spent, and a slot is free again however its call ended. What the upstream says a call costs in credits replaces the one
credit it was admitted with, where the call is billed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from farebox.app.admission import Admitted, Call, Decision, Headers, Refusal
from farebox.app.budgets import Budgets
from farebox.app.credentials import Kind, credential, is_admin_key, is_customer_key
from farebox.app.flows import CallMeter
from farebox.app.grants import GrantCache, Known, Name
from farebox.app.holdings import Holding, NotTaken
from farebox.app.leases import Leases
from farebox.app.pass_tokens import PassClaims
from farebox.app.ports.spool import CallSpool, Rider, SpoolFull
from farebox.app.refusals import (
    ADMIN_KEY_HERE,
    KEY_UNKNOWN,
    PASS_UNKNOWN,
    TOKEN_MALFORMED,
    no_subscription,
    not_sold_by_the_call,
    pass_over,
    spool_full,
    unavailable,
    used_up,
    without_credential,
)
from farebox.app.terms import Terms, TermsMaker, told
from farebox.base.errors import Reason, Refused, Unavailable

#: Refusals of a payment that cost us work and brought nothing.
_BAD_PAYMENTS: Final = frozenset(
    {"payment_invalid", "payment_malformed", "payment_used", "settlement_failed"}
)


class ExactDoor(Protocol):
    """What the door asks of exact fares (app/exact_fares.py)."""

    def payment_required(self, call: Call, error: str | None = None) -> Refusal: ...

    def needs_body(self, call: Call) -> bool: ...

    async def admit(self, call: Call, proof: bytes) -> Decision: ...


class TokenReader(Protocol):
    """What the door asks of pass tokens (app/pass_tokens.py)."""

    def verify(self, token: str) -> PassClaims | Reason: ...


#: Derives a customer's grant anew (app/entitlements.py): its period has ended.
RefreshAccount = Callable[[str], Awaitable[object]]


class FrontDoor:
    """Implements ``admission.Door``. ``business_now_s``: seconds since the epoch by the business date, for expiries."""

    def __init__(
        self,
        *,
        grants: GrantCache,
        leases: Leases,
        spool: CallSpool,
        exact: ExactDoor,
        tokens: TokenReader,
        budgets: Budgets,
        refresh_account: RefreshAccount,
        business_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._grants = grants
        self._leases = leases
        self._spool = spool
        self._exact = exact
        self._tokens = tokens
        self._budgets = budgets
        self._refresh_account = refresh_account
        self._business_now_s = business_now_s
        self._refreshing: dict[str, asyncio.Task[None]] = {}
        self._terms = TermsMaker(leases, spool)
        self._free: dict[str, Terms] = {}

    def needs_body(self, call: Call) -> bool:
        """Only a payment is bound to the body; a key or a pass streams."""
        if call.route.exact is None or _is_free(call):
            return False
        kind, _ = credential(call.headers)
        return kind is Kind.PAYMENT and self._exact.needs_body(call)

    def admit(self, call: Call) -> Decision | Awaitable[Decision]:
        if call.route.free is not None and _is_free(call):
            return self._for_free(call)
        kind, value = credential(call.headers)
        if kind is Kind.KEY:
            if not is_customer_key(value):
                return self._bad(call, ADMIN_KEY_HERE if is_admin_key(value) else KEY_UNKNOWN)
            name = hashlib.sha256(value).digest()
            known = self._grants.fresh(name)
            if known is None:
                # A key that was good before is no guess: whoever guesses beside its holder does not lock it out.
                guessed = not self._grants.remembers(name)
                empty = self._budgets.bad_credentials.empty(call.client_address) if guessed else None
                return empty or self._find(call, name)
            return self._with(call, known)
        if kind is Kind.PASS:
            claims = self._tokens.verify(value.decode("ascii"))
            if isinstance(claims, Reason):
                return self._bad(call, claims)
            known = self._grants.fresh(claims.pass_id)
            return self._find(call, claims.pass_id) if known is None else self._with(call, known)
        if kind is Kind.PAYMENT:
            if call.route.exact is None:
                return Refusal(not_sold_by_the_call(call.route))
            return self._budgets.bad_credentials.empty(call.client_address) or self._by_payment(call, value)
        if kind is Kind.MALFORMED:
            return self._bad(call, TOKEN_MALFORMED)
        if call.route.exact is not None:
            return self._budgets.unpaid.spend(call.client_address) or self._exact.payment_required(call)
        return Refusal(without_credential(call.route))

    def catalog_changed(self) -> None:
        """Routes are new objects: what was worked out for the old ones is dropped."""
        self._grants.forget_prepared()
        self._free.clear()

    def _for_free(self, call: Call) -> Admitted:
        """No grant, no limit, no record: nothing will ever be owed for it."""
        terms = self._free.get(call.route.id)
        if terms is None or terms.route is not call.route:
            terms = self._free[call.route.id] = self._terms.free(call.route)
        return Admitted("free", [], [], _nothing_owed, forward_lines=terms.told.lines(call.request_id))

    # ── account and pass ─────────────────────────────────────────────────────────────────────────────────────────

    def _with(self, call: Call, known: Known) -> Decision | Awaitable[Decision]:
        terms = known.prepared.get(call.route.id)
        if terms is None or terms.route is not call.route:
            terms = known.prepared[call.route.id] = self._terms.of(known, call.route)
        if terms.expires_s <= self._business_now_s():
            return self._ended_terms(call, known)
        if terms.refused is not None:
            return Refusal(terms.refused)
        return self._ride(call, terms)

    async def _find(self, call: Call, name: Name) -> Decision:
        try:
            known = await self._grants.find(name)
        except Unavailable as error:
            return unavailable(error)
        if known is None:
            return self._bad(call, KEY_UNKNOWN if isinstance(name, bytes) else PASS_UNKNOWN)
        return await _settled(self._with(call, known))

    def _ended_terms(self, call: Call, known: Known) -> Decision | Awaitable[Decision]:
        if known.customer_id is None:
            return Refusal(pass_over(call.route))
        return self._after_renewal(call, known, known.customer_id)

    async def _after_renewal(self, call: Call, known: Known, customer_id: str) -> Decision:
        """The period of the account's limits has ended: its grant is derived anew, then read and used."""
        try:
            await self._renewed(customer_id)
            renewed = await self._grants.read(known.name)
        except Unavailable as error:
            return unavailable(error)
        except Refused:  # the customer is gone
            return Refusal(no_subscription(call.route))
        if renewed is None:
            return self._bad(call, KEY_UNKNOWN)
        terms = self._terms.of(renewed, call.route)
        if terms.refused is not None:
            return Refusal(terms.refused)
        if terms.expires_s <= self._business_now_s():
            return Refusal(no_subscription(call.route))
        return await _settled(self._ride(call, terms))

    async def _renewed(self, customer_id: str) -> None:
        task = self._refreshing.get(customer_id)
        if task is None:
            task = asyncio.ensure_future(self._refresh(customer_id))
            self._refreshing[customer_id] = task
            task.add_done_callback(lambda _: self._refreshing.pop(customer_id, None))
        await asyncio.shield(task)

    async def _refresh(self, customer_id: str) -> None:
        await self._refresh_account(customer_id)

    # ── exact ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_payment(self, call: Call, proof: bytes) -> Decision:
        try:
            decision = await self._exact.admit(call, proof)
        except Unavailable as error:
            return unavailable(error)
        if isinstance(decision, Refusal):
            self._count_bad_payment(call, decision)
        if not isinstance(decision, Admitted):
            return decision
        payer = next((v for n, v in decision.forward_headers if n.lower() == b"farebox-payer"), b"").decode(
            "latin-1"
        )
        rider = Rider(
            fare="exact",
            route_id=call.route.id,
            metric_key=call.route.metric or "",
            payer=payer,
            billed_when_orphaned=False,  # the payment's own row says what became of it
        )
        try:
            number = self._spool.admitted(call.request_id, self._spool.stub(rider), ())
        except SpoolFull as error:
            decision.finish(0, 0, 0)
            return spool_full(error)
        heard = told(call.route, {"payer": payer, "route": call.route.id})
        decision.forward_headers, decision.forward_lines = [], heard.lines(call.request_id)
        finish = decision.finish
        settled = False

        def noted(status: int, bytes_up: int, bytes_down: int) -> None:
            left = status == 0 and decision.abandoned
            left_paid = left and (settled or bytes_down > 0)
            if left and not left_paid:
                # The upstream may have worked, and the payment was given back: whoever hangs up on calls that end like this
                # would pay for nothing.
                self._budgets.bad_credentials.spend(call.client_address)
            self._spool.done(number, status, bytes_up, bytes_down, 0 < status < 400 or left_paid)
            finish(status, bytes_up, bytes_down)

        decision.finish = noted
        if (settle := decision.before_release) is not None:

            async def judged(status: int, headers: Headers) -> Refusal | None:
                nonlocal settled
                refused = await settle(status, headers)
                if refused is not None:
                    self._count_bad_payment(call, refused)
                else:
                    settled = status < 400  # a worse answer gives the payment back
                return refused

            decision.before_release = judged
        return decision

    def _count_bad_payment(self, call: Call, refused: Refusal) -> None:
        if refused.reason.code in _BAD_PAYMENTS:
            self._budgets.bad_credentials.spend(call.client_address)

    # ── limits and the record ────────────────────────────────────────────────────────────────────────────────────

    def _ride(self, call: Call, terms: Terms) -> Decision | Awaitable[Decision]:
        if (not terms.amounts or self._there(terms.amounts)) and self._leases.take(terms.holdings):
            return self._admitted(call, terms)
        return self._ride_soon(call, terms)

    async def _ride_soon(self, call: Call, terms: Terms) -> Decision:
        try:
            for amount in terms.amounts:
                none_left = await self._leases.more_units(amount, 1)
                if none_left is not None:
                    return self._used_up(call, terms, none_left)
            not_taken = await self._leases.take_soon(terms.holdings)
        except Unavailable as error:
            return unavailable(error)
        return self._admitted(call, terms) if not_taken is None else self._used_up(call, terms, not_taken)

    def _there(self, amounts: Sequence[Holding]) -> bool:
        """Whether some bytes of each are left: a pass without any is over before a byte of the call is forwarded."""
        leases = self._leases
        for amount in amounts:
            if not leases.take_units(amount, 1):
                return False
            leases.put_back_units(amount, 1)
        return True

    def _admitted(self, call: Call, terms: Terms) -> Decision:
        holdings = terms.holdings
        lease_ids = [held.lease_id for held in holdings]
        try:
            number = self._spool.admitted(call.request_id, terms.stub, lease_ids)
        except SpoolFull as error:
            self._leases.put_back(holdings, lease_ids)
            return spool_full(error)
        ride = _Ride(self, terms, number, lease_ids)
        ride.admitted = admitted = Admitted(
            terms.fare,
            [],
            [],
            ride.finish,
            standing=terms.standing,
            forward_lines=terms.told.lines(call.request_id),
            answer_lines=terms.limit_lines(self._business_now_s()) if terms.shown else b"",
        )
        if terms.metered:
            meter = terms.meter(self._leases)
            ride.meter, admitted.meter = meter, meter
        return admitted

    def _used_up(self, call: Call, terms: Terms, not_taken: NotTaken) -> Refusal:
        until = None if terms.expires_s == math.inf else terms.expires_s
        return used_up(not_taken, call.route, until, self._business_now_s())

    def _ended(self, ride: _Ride, status: int, bytes_up: int, bytes_down: int) -> None:
        terms, number, abandoned = ride.terms, ride.number, ride.admitted.abandoned
        del ride.admitted  # the two hold each other: nobody should have to collect that
        served = bytes_down > 0  # bytes of an answer went out: then there was one, whatever the status says
        if terms.always:
            billed = status > 0 or served or abandoned
        else:
            billed = 0 < status < 400 or (status == 0 and abandoned and served)
        if ride.meter is None:
            self._spool.done(number, status, bytes_up, bytes_down, billed)
        else:
            used, credits = self._settled_meter(ride, ride.meter, billed)
            self._spool.done(number, status, bytes_up, bytes_down, billed, used, credits)
        if not billed and number:
            self._leases.put_back(terms.holdings, ride.lease_ids)
        elif terms.slots:
            self._leases.put_back(terms.slots)

    def _settled_meter(
        self, ride: _Ride, meter: CallMeter, billed: bool
    ) -> tuple[list[tuple[int, int]], int | None]:
        """Make the credits what the upstream said; what the spool notes of the leases: (lease id, used), and the credits."""
        meter.close()
        terms = ride.terms
        spent_from = [*terms.amounts]
        held, cost = terms.credits, meter.cost if billed else None
        if held is not None and cost is not None and cost != 1:
            if cost > 1:
                self._leases.overdraw(held, cost - 1)
            else:
                whence = ride.lease_ids[terms.holdings.index(held)]
                self._leases.put_back_units(held, 1 - cost, whence)
            spent_from.append(held)
        used = [(amount.lease_id, amount.used) for amount in spent_from if amount.lease_id]
        return used, cost if held is not None else None

    def _bad(self, call: Call, reason: Reason) -> Refusal:
        return self._budgets.bad_credentials.spend(call.client_address) or Refusal(reason)


class _Ride:
    """An admitted call under way."""

    __slots__ = ("_door", "admitted", "lease_ids", "meter", "number", "terms")

    admitted: Admitted

    def __init__(self, door: FrontDoor, terms: Terms, number: int, lease_ids: list[int]) -> None:
        self._door = door
        self.terms = terms
        self.number = number
        self.lease_ids = lease_ids
        self.meter: CallMeter | None = None

    def finish(self, status: int, bytes_up: int, bytes_down: int) -> None:
        self._door._ended(self, status, bytes_up, bytes_down)


async def _settled(decision: Decision | Awaitable[Decision]) -> Decision:
    return await decision if isinstance(decision, Awaitable) else decision


def _is_free(call: Call) -> bool:
    free = call.route.free
    return free is not None and (not free.methods or call.method in free.methods)


def _nothing_owed(status: int, bytes_up: int, bytes_down: int) -> None:
    """How a free call ends."""
