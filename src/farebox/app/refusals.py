"""What the door says to a call that it does not let in, and what to do about it."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any, Final

import structlog

from farebox.app.admission import Headers, Refusal
from farebox.app.budgets import rate_limit_headers
from farebox.app.holdings import NotTaken
from farebox.app.ports.spool import SpoolFull
from farebox.base.errors import Reason, Unavailable
from farebox.domain.access import Route
from farebox.domain.limits import LimitKind

log = structlog.get_logger(__name__)

KEY_UNKNOWN: Final = Reason(
    "credential_unknown", "this API key is not known here, or it was revoked; ask the seller for a new one"
)
ADMIN_KEY_HERE: Final = Reason(
    "credential_unknown",
    "this key opens the control API, not the gateway; use a customer's key (fbx_ck_…), and rotate this one if it left your house",
)
PASS_UNKNOWN: Final = Reason("pass_unknown", "this pass is not known here; buy another one")
TOKEN_MALFORMED: Final = Reason(
    "credential_malformed",
    "the header or cookie apicharge holds no pass token of this gateway, or there is more than one: send the token that came"
    " with the pass, once",
)


def pass_over(route: Route) -> Reason:
    return Reason("pass_ended", "this pass is over; buy another one", None, _quotes(route))


def pass_revoked(route: Route) -> Reason:
    return Reason("pass_ended", "this pass was taken back by the seller", None, _quotes(route))


def other_route(route: Route) -> Reason:
    return Reason("not_covered", f"this pass does not cover the route {route.id}")


def not_sold_by_the_call(route: Route) -> Reason:
    return Reason(
        "not_covered",
        f"the route {route.id} is not paid by the call: leave the payment out and use a key or a pass",
    )


def not_sold_to_accounts(route: Route) -> Reason:
    return Reason("not_covered", f"the route {route.id} is not sold to accounts: pay the call or use a pass")


def no_subscription(route: Route) -> Reason:
    return Reason("not_covered", f"this account has no active subscription that covers the route {route.id}")


def not_in_plan(route: Route, feature: str | None) -> Reason:
    return Reason(
        "not_covered",
        f"the account's plan does not include {feature or route.id}, which the route {route.id} asks for",
        None,
        {"feature": feature} if feature else {},
    )


def without_credential(route: Route) -> Reason:
    """For a route that is not paid by the call."""
    ways = [
        *(["an API key (Authorization: Bearer fbx_ck_… or X-API-Key)"] if route.account else []),
        *(["a pass (Authorization: Bearer <token>; see /.farebox/quotes)"] if route.passes else []),
    ]
    if ways:
        return Reason("credential_missing", f"this call needs {' or '.join(ways)}")
    if route.free is not None:
        return Reason(
            "not_for_sale", f"the route {route.id} sells only {', '.join(route.free.methods)}, for free"
        )
    return Reason("not_for_sale", f"the route {route.id} has no fare yet")


def unavailable(error: Unavailable) -> Refusal:
    log.warning("admission_unavailable", what=error.what)
    return Refusal(
        Reason("unavailable", "this cannot be decided right now; try again in a moment"),
        retry_after_s=error.retry_after_s,
    )


def spool_full(error: SpoolFull) -> Refusal:
    log.error("spool_full", what=str(error))
    return Refusal(
        Reason("unavailable", "calls cannot be recorded right now; try again in a moment"), retry_after_s=5.0
    )


def used_up(not_taken: NotTaken, route: Route, until: float | None, business_now_s: float) -> Refusal:
    """Of a limit nothing is left, or not now. ``until``: when the grant ends, seconds since the epoch; None: it does not."""
    nothing, held = not_taken.nothing, not_taken.holding
    if nothing.why == "held" and held.kind != "concurrency":
        return Refusal(
            Reason(
                "unavailable",
                "the last calls of this limit are held by another gateway process and will be used or given back; try again",
            ),
            retry_after_s=1.0,
        )
    if nothing.why in ("revoked", "unknown"):
        return Refusal(no_subscription(route) if held.kind == "quota" else pass_revoked(route))
    limit = int(nothing.capacity if nothing.capacity is not None else held.capacity or 0)
    left_s = _left_s(nothing.period_end, until, business_now_s)
    kind = held.kind
    if kind == "quota":
        return Refusal(
            _quota_exceeded(limit), rate_limit_headers(limit, 0, left_s), retry_after_s=max(1.0, left_s)
        )
    if kind == "requests":
        wait_s = not_taken.retry_after_s or window_left_s(held.window_s or 1)
        return Refusal(_window_exceeded(limit, held.window_s or 1), _headers(kind, limit, wait_s), wait_s)
    if kind == "concurrency":
        wait_s = not_taken.retry_after_s or 1.0
        return Refusal(_concurrency_exceeded(limit), _headers(kind, limit, wait_s), wait_s)
    return Refusal(_pass_exhausted(kind, limit, route), _headers(kind, limit, left_s))


def window_left_s(window_s: int) -> float:
    """Until the window that counts requests ends; by this machine's clock, for people."""
    return window_s - time.time() % window_s


def _headers(kind: LimitKind, limit: int, reset_s: float) -> Headers:
    return [
        *rate_limit_headers(limit, 0, reset_s),
        (b"Farebox-Pass-Remaining", b"%b=0" % kind.encode()),
    ]


def _pass_exhausted(kind: LimitKind, limit: int, route: Route) -> Reason:
    what = kind.replace("_", " ") if kind.endswith("_bytes") else kind
    return Reason(
        "pass_exhausted",
        f"this pass has no {what} left of {limit}; buy another one",
        None,
        {"limit": kind, "of": limit, **_quotes(route)},
    )


def _quota_exceeded(limit: int) -> Reason:
    return Reason(
        "quota_exceeded",
        f"the plan's limit of {limit} for this period is used up; it starts anew with the next period",
        None,
        {"limit": str(limit)},
    )


def _window_exceeded(limit: int, window_s: int) -> Reason:
    return Reason(
        "window_exceeded",
        f"this pass allows {limit} calls in {window_s} s, and these are made; wait for the next window",
        None,
        {"limit": "requests", "of": limit, "window_s": window_s},
    )


def _concurrency_exceeded(limit: int) -> Reason:
    return Reason(
        "concurrency_exceeded",
        f"this pass allows {limit} calls at the same time, and so many are under way; wait until one has ended",
        None,
        {"limit": "concurrency", "of": limit},
    )


def _left_s(period_end: datetime | None, until: float | None, business_now_s: float) -> float:
    end_s = until if period_end is None else period_end.timestamp()
    return 0.0 if end_s is None else max(0.0, end_s - business_now_s)


def _quotes(route: Route) -> dict[str, Any]:
    return {"quotes": f"/.farebox/quotes?route={route.id}"}
