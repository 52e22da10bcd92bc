"""The front door: budget, credential, fare, limits, in that order, the same for every call (DESIGN §4).

A call with a known key or pass and open leases is decided without waiting: one scan of the headers, two look-ups, one
decrement a limit, one record in the spool. Everything else returns an awaitable.

When a call is billed. The spool's *admitted* record is written before the call is forwarded, *done* before the answer's
last bytes go out. ``finish`` is given the upstream's status, or 0 when there was no whole answer:

* ``charge_on: always``: billed, unless the upstream gave no answer at all (we said 502, 503 or 504). A client that hangs
  up after its call was forwarded does not call for free.
* ``charge_on: success``, and exact fares: billed when the status is below 400, and when the client hung up in the middle
  of an answer; an exact fare also when it was settled after the client had hung up.

What is not billed does not count against a limit either: its units go back to the lease they came from.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, TypedDict

import structlog

from farebox.app.admission import Admitted, Call, Decision, Headers, Refusal
from farebox.app.budgets import Budgets, rate_limit_headers
from farebox.app.credentials import Kind, credential, is_admin_key, is_customer_key
from farebox.app.grants import GrantCache, Known
from farebox.app.leases import Holding, Leases, NotTaken
from farebox.app.pass_tokens import PassClaims
from farebox.app.ports.spool import CallSpool, Rider, SpoolFull
from farebox.base.errors import Reason, Refused, Unavailable
from farebox.domain.access import AdmissionGrant, FareKind, Route

#: Refusals of a payment that cost us work and brought nothing.
_BAD_PAYMENTS: Final = frozenset(
    {"payment_invalid", "payment_malformed", "payment_used", "settlement_failed"}
)

log = structlog.get_logger(__name__)


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


@dataclass(frozen=True, slots=True)
class _Terms:
    """What follows from a grant for one route, worked out once. ``refused`` None: may pass, within ``holdings``."""

    route: Route
    fare: FareKind
    refused: Reason | None
    holdings: tuple[Holding, ...] = ()
    stub: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    headers_per_call: tuple[tuple[bytes, str], ...] = ()  # name, template with {request_id}
    expires_s: float = math.inf

    @property
    def always(self) -> bool:
        return self.route.charge_on == "always"


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

    def needs_body(self, call: Call) -> bool:
        """Only a payment is bound to the body; a key or a pass streams."""
        if call.route.exact is None:
            return False
        kind, _ = credential(call.headers)
        return kind is Kind.PAYMENT and self._exact.needs_body(call)

    def admit(self, call: Call) -> Decision | Awaitable[Decision]:
        kind, value = credential(call.headers)
        if kind is Kind.KEY:
            if not is_customer_key(value):
                return self._bad(call, _admin_key_here if is_admin_key(value) else _key_unknown)
            name = hashlib.sha256(value).digest()
            known = self._grants.fresh(name)
            if known is None:
                # A key that was good before is no guess: whoever guesses beside its holder does not lock it out.
                guessed = not self._grants.remembers(name)
                empty = self._budgets.bad_credentials.empty(call.client_address) if guessed else None
                return empty or self._find_key(call, name)
            return self._by_account(call, known)
        if kind is Kind.PASS:
            return self._by_pass(call, value)
        if kind is Kind.PAYMENT:
            if call.route.exact is None:
                return Refusal(_not_sold(call.route))
            return self._budgets.bad_credentials.empty(call.client_address) or self._by_payment(call, value)
        if call.route.exact is not None:
            return self._budgets.unpaid.spend(call.client_address) or self._exact.payment_required(call)
        return Refusal(
            _nothing_sold(call.route) if not _sells(call.route) else _credential_missing(call.route)
        )

    def catalog_changed(self) -> None:
        """Routes are new objects: what was worked out for the old ones is dropped."""
        self._grants.forget_prepared()

    # ── account ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _by_account(self, call: Call, known: Known) -> Decision | Awaitable[Decision]:
        terms = known.prepared.get(call.route.id)
        if terms is None or terms.route is not call.route:
            terms = known.prepared[call.route.id] = self._account_terms(known, call.route)
        if terms.expires_s <= self._business_now_s():
            return self._after_renewal(call, known)
        if terms.refused is not None:
            return Refusal(terms.refused)
        return self._ride(call, terms)

    async def _find_key(self, call: Call, name: bytes) -> Decision:
        try:
            known = await self._grants.find(name)
        except Unavailable as error:
            return _unavailable(error)
        if known is None:
            return self._bad(call, _key_unknown)
        return await _settled(self._by_account(call, known))

    async def _after_renewal(self, call: Call, known: Known) -> Decision:
        """The period of the account's limits has ended: its grant is derived anew, then read and used."""
        assert known.customer_id is not None
        try:
            await self._renewed(known.customer_id)
            renewed = await self._grants.read(known.name)
        except Unavailable as error:
            return _unavailable(error)
        except Refused:  # the customer is gone
            return Refusal(_no_subscription(call.route))
        if renewed is None:
            return self._bad(call, _key_unknown)
        terms = self._account_terms(renewed, call.route)
        if terms.refused is not None:
            return Refusal(terms.refused)
        if terms.expires_s <= self._business_now_s():
            return Refusal(_no_subscription(call.route))
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

    def _account_terms(self, known: Known, route: Route) -> _Terms:
        grant = known.grant
        if route.account is None:
            return _Terms(route, "account", _not_sold_to_accounts(route))
        if grant is None or grant.revoked_at is not None:
            return _Terms(route, "account", _no_subscription(route))
        feature = route.account.required_feature
        if (feature is not None and feature not in grant.features) or (
            grant.routes is not None and route.id not in grant.routes
        ):
            return _Terms(route, "account", _not_in_plan(route, feature), expires_s=known.expires_s)
        limits = [
            limit for limit in grant.limits if limit.metric_key is None or limit.metric_key == route.metric
        ]
        rider = Rider(
            fare="account",
            route_id=route.id,
            metric_key=route.metric or "",
            customer_id=grant.subject_id,
            grant_id=grant.id,
            billed_when_orphaned=route.charge_on == "always",
        )
        names = {"customer": grant.subject_id, "plan": grant.plan or "", "route": route.id}
        return _Terms(
            route,
            "account",
            None,
            holdings=tuple(self._leases.holding(limit) for limit in limits),
            stub=self._spool.stub(rider),
            **_headers(route, names),
            expires_s=known.expires_s,
        )

    # ── pass ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _by_pass(self, call: Call, token: bytes) -> Decision | Awaitable[Decision]:
        claims = self._tokens.verify(token.decode("ascii"))
        if isinstance(claims, Reason):
            return self._bad(call, claims)
        known = self._grants.fresh(claims.pass_id)
        if known is None:
            return self._find_pass(call, claims.pass_id)
        return self._with_pass(call, known)

    async def _find_pass(self, call: Call, pass_id: str) -> Decision:
        try:
            known = await self._grants.find(pass_id)
        except Unavailable as error:
            return _unavailable(error)
        if known is None:
            return self._bad(call, _pass_unknown)
        return await _settled(self._with_pass(call, known))

    def _with_pass(self, call: Call, known: Known) -> Decision | Awaitable[Decision]:
        terms = known.prepared.get(call.route.id)
        if terms is None or terms.route is not call.route:
            assert known.grant is not None, "a pass is known by its grant"
            terms = known.prepared[call.route.id] = self._pass_terms(known.grant, known.expires_s, call.route)
        if terms.refused is not None:
            return Refusal(terms.refused)
        if terms.expires_s <= self._business_now_s():
            return Refusal(_pass_over(call.route))
        return self._ride(call, terms)

    def _pass_terms(self, grant: AdmissionGrant, expires_s: float, route: Route) -> _Terms:
        if grant.revoked_at is not None:
            return _Terms(route, "pass", _pass_revoked(route))
        if grant.routes is not None and route.id not in grant.routes:
            return _Terms(route, "pass", _other_route(route))
        rider = Rider(
            fare="pass",
            route_id=route.id,
            metric_key=route.metric or "",
            grant_id=grant.id,
            pass_id=grant.subject_id,
            billed_when_orphaned=route.charge_on == "always",
        )
        names = {"pass": grant.subject_id, "plan": grant.plan or "", "route": route.id}
        return _Terms(
            route,
            "pass",
            None,
            holdings=tuple(self._leases.holding(limit) for limit in grant.limits),
            stub=self._spool.stub(rider),
            **_headers(route, names),
            expires_s=expires_s,
        )

    # ── exact ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _by_payment(self, call: Call, proof: bytes) -> Decision:
        try:
            decision = await self._exact.admit(call, proof)
        except Unavailable as error:
            return _unavailable(error)
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
            return _spool_full(error)
        fixed = _headers(call.route, {"payer": payer, "route": call.route.id})
        decision.forward_headers = _forward(call, fixed["headers"], fixed["headers_per_call"])
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

    def _ride(self, call: Call, terms: _Terms) -> Decision | Awaitable[Decision]:
        if self._leases.take(terms.holdings):
            return self._admitted(call, terms)
        return self._ride_soon(call, terms)

    async def _ride_soon(self, call: Call, terms: _Terms) -> Decision:
        try:
            not_taken = await self._leases.take_soon(terms.holdings)
        except Unavailable as error:
            return _unavailable(error)
        return self._admitted(call, terms) if not_taken is None else self._used_up(call, terms, not_taken)

    def _admitted(self, call: Call, terms: _Terms) -> Decision:
        holdings = terms.holdings
        try:
            number = self._spool.admitted(call.request_id, terms.stub, [held.lease_id for held in holdings])
        except SpoolFull as error:
            self._leases.put_back(holdings)
            return _spool_full(error)
        ride = _Ride(self, terms, number)
        ride.admitted = admitted = Admitted(
            fare=terms.fare,
            forward_headers=_forward(call, terms.headers, terms.headers_per_call),
            answer_headers=self._limit_headers(terms) if holdings else [],
            finish=ride.finish,
        )
        return admitted

    def _limit_headers(self, terms: _Terms) -> Headers:
        """RateLimit of the tightest limit; a pass also says what is left of it."""
        tightest: Holding | None = None
        least: int | None = None
        for held in terms.holdings:
            remaining = held.remaining
            if remaining is not None and (least is None or remaining < least):
                tightest, least = held, remaining
        if tightest is None or least is None or tightest.capacity is None:
            return []
        reset_s = terms.expires_s - self._business_now_s() if terms.expires_s != math.inf else 0.0
        headers = [
            (b"RateLimit-Limit", b"%d" % int(tightest.capacity)),
            (b"RateLimit-Remaining", b"%d" % least),
            (b"RateLimit-Reset", b"%d" % max(0.0, reset_s)),
        ]
        if terms.fare == "pass":
            headers.append((b"Farebox-Pass-Remaining", b"calls=%d" % least))
        return headers

    def _used_up(self, call: Call, terms: _Terms, not_taken: NotTaken) -> Refusal:
        nothing, held = not_taken.nothing, not_taken.holding
        if nothing.why == "held":
            return Refusal(
                Reason(
                    "unavailable",
                    "the last calls of this limit are held by another gateway process and will be used or given back; try again",
                ),
                retry_after_s=1.0,
            )
        if nothing.why in ("revoked", "unknown"):
            return Refusal(
                _pass_revoked(call.route) if terms.fare == "pass" else _no_subscription(call.route)
            )
        capacity = nothing.capacity if nothing.capacity is not None else held.capacity
        reset_s = self._until(nothing.period_end, terms)
        headers = rate_limit_headers(int(capacity or 0), 0, reset_s)
        if terms.fare == "pass":
            headers.append((b"Farebox-Pass-Remaining", b"calls=0"))
            reason = Reason(
                "pass_exhausted",
                f"this pass has no calls left of {capacity}; buy another one",
                None,
                {"quotes": f"/.farebox/quotes?route={call.route.id}"},
            )
            return Refusal(reason, headers)
        reason = Reason(
            "quota_exceeded",
            f"the plan's limit of {capacity} for this period is used up; it starts anew with the next period",
            None,
            {"limit": str(capacity)},
        )
        return Refusal(reason, headers, retry_after_s=max(1.0, reset_s))

    def _until(self, end: datetime | None, terms: _Terms) -> float:
        end_s = end.timestamp() if end is not None else terms.expires_s
        return 0.0 if end_s == math.inf else max(0.0, end_s - self._business_now_s())

    def _ended(self, ride: _Ride, status: int, bytes_up: int, bytes_down: int) -> None:
        terms, number, abandoned = ride.terms, ride.number, ride.admitted.abandoned
        del ride.admitted  # the two hold each other: nobody should have to collect that
        served = bytes_down > 0  # bytes of an answer went out: then there was one, whatever the status says
        if terms.always:
            billed = status > 0 or served or abandoned
        else:
            billed = 0 < status < 400 or (status == 0 and abandoned and served)
        self._spool.done(number, status, bytes_up, bytes_down, billed)
        if not billed and number:
            self._leases.put_back(terms.holdings)

    def _bad(self, call: Call, reason: Reason) -> Refusal:
        return self._budgets.bad_credentials.spend(call.client_address) or Refusal(reason)


class _Ride:
    """An admitted call under way."""

    __slots__ = ("_door", "admitted", "number", "terms")

    admitted: Admitted

    def __init__(self, door: FrontDoor, terms: _Terms, number: int) -> None:
        self._door = door
        self.terms = terms
        self.number = number

    def finish(self, status: int, bytes_up: int, bytes_down: int) -> None:
        self._door._ended(self, status, bytes_up, bytes_down)


async def _settled(decision: Decision | Awaitable[Decision]) -> Decision:
    return await decision if isinstance(decision, Awaitable) else decision


# ── headers towards the upstream ─────────────────────────────────────────────────────────────────────────────────────

#: Variable of ``set_headers`` → the header that says the same.
_IDENTITY: Final = {
    "customer": b"Farebox-Customer",
    "plan": b"Farebox-Plan",
    "pass": b"Farebox-Pass",
    "payer": b"Farebox-Payer",
    "route": b"Farebox-Route",
}


class _FixedHeaders(TypedDict):
    """``headers`` and ``headers_per_call`` of ``_Terms``."""

    headers: tuple[tuple[bytes, bytes], ...]
    headers_per_call: tuple[tuple[bytes, str], ...]


def _headers(route: Route, names: dict[str, str]) -> _FixedHeaders:
    """Ours, then the route's ``set_headers`` with their variables filled in; those with {request_id} wait for the call."""
    fixed = [(_IDENTITY[name], _value(text)) for name, text in names.items() if text]
    per_call: list[tuple[bytes, str]] = []
    for name, template in route.rewrite.set_headers:
        text = template
        for variable in _IDENTITY:
            text = text.replace("{" + variable + "}", names.get(variable, ""))
        if "{request_id}" in text:
            per_call.append((name.encode("ascii"), text))
        else:
            fixed.append((name.encode("ascii"), _value(text)))
    return {"headers": tuple(fixed), "headers_per_call": tuple(per_call)}


def _forward(
    call: Call, fixed: Sequence[tuple[bytes, bytes]], per_call: Sequence[tuple[bytes, str]]
) -> Headers:
    headers = [(b"Farebox-Request-Id", call.request_id.encode()), *fixed]
    for name, text in per_call:
        headers.append((name, _value(text.replace("{request_id}", call.request_id))))
    return headers


def _value(text: str) -> bytes:
    """A header value: control characters cannot stand in one, whatever an operator named a plan."""
    return "".join(c if c.isprintable() else "?" for c in text).encode()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_key_unknown = Reason(
    "credential_unknown", "this API key is not known here, or it was revoked; ask the seller for a new one"
)
_admin_key_here = Reason(
    "credential_unknown",
    "this key opens the control API, not the gateway; use a customer's key (fbx_ck_…), and rotate this one if it left your house",
)
_pass_unknown = Reason("pass_unknown", "this pass is not known here; buy another one")


def _pass_over(route: Route) -> Reason:
    return Reason(
        "pass_ended",
        "this pass is over; buy another one",
        None,
        {"quotes": f"/.farebox/quotes?route={route.id}"},
    )


def _pass_revoked(route: Route) -> Reason:
    return Reason(
        "pass_ended",
        "this pass was taken back by the seller",
        None,
        {"quotes": f"/.farebox/quotes?route={route.id}"},
    )


def _other_route(route: Route) -> Reason:
    return Reason("not_covered", f"this pass does not cover the route {route.id}")


def _not_sold(route: Route) -> Reason:
    return Reason(
        "not_covered",
        f"the route {route.id} is not paid by the call: leave the payment out and use a key or a pass",
    )


def _not_sold_to_accounts(route: Route) -> Reason:
    return Reason("not_covered", f"the route {route.id} is not sold to accounts: pay the call or use a pass")


def _no_subscription(route: Route) -> Reason:
    return Reason("not_covered", f"this account has no active subscription that covers the route {route.id}")


def _not_in_plan(route: Route, feature: str | None) -> Reason:
    return Reason(
        "not_covered",
        f"the account's plan does not include {feature or route.id}, which the route {route.id} asks for",
        None,
        {"feature": feature} if feature else {},
    )


def _sells(route: Route) -> bool:
    return route.account is not None or route.exact is not None or bool(route.passes)


def _nothing_sold(route: Route) -> Reason:
    return Reason("not_for_sale", f"the route {route.id} has no fare yet")


def _credential_missing(route: Route) -> Reason:
    ways = [
        *(["an API key (Authorization: Bearer fbx_ck_… or X-API-Key)"] if route.account else []),
        *(["a pass (Authorization: Bearer <token>; see /.farebox/quotes)"] if route.passes else []),
    ]
    return Reason("credential_missing", f"this call needs {' or '.join(ways)}")


def _unavailable(error: Unavailable) -> Refusal:
    log.warning("admission_unavailable", what=error.what)
    return Refusal(
        Reason("unavailable", "this cannot be decided right now; try again in a moment"),
        retry_after_s=error.retry_after_s,
    )


def _spool_full(error: SpoolFull) -> Refusal:
    log.error("spool_full", what=str(error))
    return Refusal(
        Reason("unavailable", "calls cannot be recorded right now; try again in a moment"), retry_after_s=5.0
    )
