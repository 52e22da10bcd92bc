"""What follows from a grant for one route, worked out once: may it pass, what does each call spend, what is the upstream told.

Terms live as long as the grant they were made from (``Known.prepared``); every call under them shares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from farebox.app.admission import Standing
from farebox.app.flows import CallMeter, Lanes, Way
from farebox.app.grants import Known
from farebox.app.holdings import Holding
from farebox.app.leases import Leases
from farebox.app.ports.spool import CallSpool, Rider
from farebox.app.refusals import (
    no_subscription,
    not_in_plan,
    not_sold_to_accounts,
    other_route,
    pass_revoked,
    window_left_s,
)
from farebox.base.errors import Reason
from farebox.domain.access import AdmissionGrant, FareKind, GrantLimit, Route
from farebox.domain.limits import BYTE_KINDS, CALL_KINDS


@dataclass(frozen=True, slots=True)
class Told:
    """Ours, then the route's ``set_headers`` with their variables filled in; those with {request_id} wait for the call."""

    fixed: bytes  # lines, up to the value of Farebox-Request-Id
    per_call: tuple[tuple[bytes, str], ...]  # name, template

    def lines(self, request_id: str) -> bytes:
        """Header lines for one call, ready to be sent."""
        lines = self.fixed + request_id.encode()
        for name, template in self.per_call:
            lines += b"\r\n" + name + b": " + _value(template.replace("{request_id}", request_id))
        return lines


NOTHING_TOLD: Final = Told(b"Farebox-Request-Id: ", ())


@dataclass(frozen=True, slots=True)
class Terms:
    """``refused`` None: may pass, within its limits. ``expires_s``: seconds since the epoch by the business date.

    A call takes one unit of each of ``holdings``; ``slots`` are those of them that it holds only as long as it lasts.
    ``shown`` are the limits that clients are told of, ``amounts`` those of bytes, which only the transfer spends.
    """

    route: Route
    fare: FareKind
    refused: Reason | None
    standing: Standing | None = None
    holdings: tuple[Holding, ...] = ()
    slots: tuple[Holding, ...] = ()
    amounts: tuple[Holding, ...] = ()
    credits: Holding | None = None
    upload: Way | None = None
    download: Way | None = None
    shown: tuple[_Shown, ...] = ()
    metered: bool = False  # each call has a meter
    always: bool = True  # charge_on
    stub: bytes = b""
    told: Told = NOTHING_TOLD  # what the upstream hears of these terms
    expires_s: float = math.inf

    def meter(self, leases: Leases) -> CallMeter:
        """For one call of metered terms."""
        return CallMeter(leases, self.upload, self.download)

    def limit_lines(self, business_now_s: float) -> bytes:
        """RateLimit of the tightest limit, by the share that is left; a pass also says what is left of each.

        Slots are no part of RateLimit: who calls one by one would be told each time to wait.
        """
        tightest: _Shown | None = None
        least = 0
        left_of: list[bytes] = []
        for shown in self.shown:
            left = shown.held.remaining
            if left is None:
                continue
            if self.fare == "pass":
                left_of.append(b"%b=%d" % (shown.name, left))
            if shown.counts and (tightest is None or left * tightest.limit < least * shown.limit):
                tightest, least = shown, left
        lines = b""
        if tightest is not None:
            if tightest.window_s is not None:
                reset_s = window_left_s(tightest.window_s)
            else:
                reset_s = max(0.0, self.expires_s - business_now_s) if self.expires_s != math.inf else 0.0
            lines = b"RateLimit-Limit: %d\r\nRateLimit-Remaining: %d\r\nRateLimit-Reset: %d" % (
                tightest.limit,
                least,
                reset_s,
            )
        if left_of:
            said = b"Farebox-Pass-Remaining: " + b";".join(left_of)
            lines = lines + b"\r\n" + said if lines else said
        return lines


@dataclass(frozen=True, slots=True)
class _Shown:
    """A limit that clients are told of. ``counts``: it may be the one of the RateLimit headers."""

    held: Holding
    name: bytes
    limit: int
    window_s: int | None
    counts: bool


class TermsMaker:
    """Makes terms; keeps nothing."""

    def __init__(self, leases: Leases, spool: CallSpool) -> None:
        self._leases = leases
        self._spool = spool
        self._lanes = Lanes(leases)

    def of(self, known: Known, route: Route) -> Terms:
        """The terms of a known key or pass on a route."""
        if known.customer_id is not None:
            return self._of_account(known, route)
        assert known.grant is not None, "a pass is known by its grant"
        return self._of_pass(known.grant, known.expires_s, route)

    def free(self, route: Route) -> Terms:
        """The terms of whoever calls a free route."""
        return Terms(route, "free", None, told=told(route, {"route": route.id}))

    def _of_account(self, known: Known, route: Route) -> Terms:
        grant = known.grant
        if route.account is None:
            return Terms(route, "account", not_sold_to_accounts(route))
        if grant is None or grant.revoked_at is not None:
            return Terms(route, "account", no_subscription(route))
        feature = route.account.required_feature
        if (feature is not None and feature not in grant.features) or (
            grant.routes is not None and route.id not in grant.routes
        ):
            return Terms(route, "account", not_in_plan(route, feature), expires_s=known.expires_s)
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
        # A billing period that turns ends the limits of an account, not its running calls.
        standing = Standing(grant.subject_id, math.inf, known.key_id)
        return self._made(route, rider, limits, standing, known.expires_s, names)

    def _of_pass(self, grant: AdmissionGrant, expires_s: float, route: Route) -> Terms:
        if grant.revoked_at is not None:
            return Terms(route, "pass", pass_revoked(route))
        if grant.routes is not None and route.id not in grant.routes:
            return Terms(route, "pass", other_route(route))
        rider = Rider(
            fare="pass",
            route_id=route.id,
            metric_key=route.metric or "",
            grant_id=grant.id,
            pass_id=grant.subject_id,
            billed_when_orphaned=route.charge_on == "always",
            metered=any(limit.kind == "credits" or limit.kind in BYTE_KINDS for limit in grant.limits),
        )
        names = {"pass": grant.subject_id, "plan": grant.plan or "", "route": route.id}
        holds_slot = any(limit.kind == "concurrency" for limit in grant.limits)
        standing = Standing(grant.subject_id, expires_s, holds_slot=holds_slot)
        return self._made(route, rider, grant.limits, standing, expires_s, names)

    def _made(
        self,
        route: Route,
        rider: Rider,
        limits: Sequence[GrantLimit],
        standing: Standing,
        expires_s: float,
        names: dict[str, str],
    ) -> Terms:
        held = {limit.kind: self._leases.holding(limit) for limit in limits if limit.kind not in CALL_KINDS}
        by_call = [(limit, self._leases.holding(limit)) for limit in limits if limit.kind in CALL_KINDS]
        upload = self._lanes.way(held.get("upload_bytes"), held.get("upload_rate"))
        download = self._lanes.way(held.get("download_bytes"), held.get("download_rate"))
        credits = next((holding for limit, holding in by_call if limit.kind == "credits"), None)
        amounts = tuple(holding for kind, holding in held.items() if kind in BYTE_KINDS)
        return Terms(
            route,
            rider.fare,
            None,
            standing,
            holdings=tuple(holding for _, holding in by_call),
            slots=tuple(holding for limit, holding in by_call if limit.kind == "concurrency"),
            amounts=amounts,
            credits=credits,
            upload=upload,
            download=download,
            shown=tuple(
                _Shown(
                    holding,
                    limit.kind.encode(),
                    int(limit.limit),
                    limit.window_s,
                    limit.kind != "concurrency",
                )
                for limit, holding in [*by_call, *((n, held[n.kind]) for n in limits if n.kind in BYTE_KINDS)]
                if limit.limit is not None
            ),
            metered=not (upload is None and download is None and credits is None),
            always=route.charge_on == "always",
            stub=self._spool.stub(rider),
            told=told(route, names),
            expires_s=expires_s,
        )


# ── headers towards the upstream ─────────────────────────────────────────────────────────────────────────────────────

#: Variable of ``set_headers`` → the header that says the same.
_IDENTITY: Final = {
    "customer": b"Farebox-Customer",
    "plan": b"Farebox-Plan",
    "pass": b"Farebox-Pass",
    "payer": b"Farebox-Payer",
    "route": b"Farebox-Route",
}


def told(route: Route, names: dict[str, str]) -> Told:
    """What the upstream hears of every call under one grant (or by one payer) on a route; ``names`` by variable."""
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
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in fixed)
    return Told(lines + b"Farebox-Request-Id: ", tuple(per_call))


def _value(text: str) -> bytes:
    """A header value: control characters cannot stand in one, whatever an operator named a plan."""
    return "".join(c if c.isprintable() else "?" for c in text).encode()
