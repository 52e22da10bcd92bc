"""A pass: what was bought or granted. Its token is only its receipt; this is the authority."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal

from farebox.base.errors import Reason
from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.domain.limits import LimitKind, PassLimits

PassStatus = Literal["active", "paused", "revoked"]

#: The most of each limit that a pass may hold; the least is 1.
LIMIT_MAX: Final[dict[LimitKind, int]] = {
    "calls": 10**12,
    "upload_bytes": 10**15,
    "download_bytes": 10**15,
    "credits": 10**12,
    "concurrency": 100_000,
    "requests": 10**9,
    "upload_rate": 10**12,
    "download_rate": 10**12,
}
#: Seconds of the window that requests are counted in, and of the one a rate is kept over.
REQUEST_WINDOW_S_MAX: Final = 31 * 86_400
RATE_WINDOW_S_MAX: Final = 3_600


@dataclass(frozen=True, slots=True)
class Pass:
    """``[starts_at, expires_at)`` on one route. ``offer_id`` None: granted by the operator, not bought."""

    id: str
    route_id: str
    offer_id: str | None
    name: str
    holder: str | None
    status: PassStatus
    limits: PassLimits
    starts_at: datetime
    expires_at: datetime
    purchase_id: str | None = None
    revoked_at: datetime | None = None


def wrong_limit(limits: PassLimits) -> Reason | None:
    """What is out of bounds (code ``PASS_INVALID``, with its field and the bounds); None: nothing is."""
    for kind, limit, window_s in limits_of(limits):
        if not 1 <= limit <= LIMIT_MAX[kind]:
            return Reason(
                "PASS_INVALID", f"write from 1 to {LIMIT_MAX[kind]}, or leave {kind} out", f"limits.{kind}"
            )
        window_s_max = REQUEST_WINDOW_S_MAX if kind == "requests" else RATE_WINDOW_S_MAX
        if window_s is not None and not 1 <= window_s <= window_s_max:
            return Reason(
                "PASS_INVALID", f"a window lasts from 1 to {window_s_max} seconds", f"limits.{kind}.window"
            )
    return None


def grant_of(pass_: Pass, grant_id: str) -> AdmissionGrant:
    """What the gateway must know of a pass."""
    return AdmissionGrant(
        id=grant_id,
        subject_kind="pass",
        subject_id=pass_.id,
        plan=None,
        routes=frozenset({pass_.route_id}),
        features=frozenset(),
        limits=tuple(
            GrantLimit(counter_of(pass_.id, kind), kind, Decimal(limit), window_s=window_s)
            for kind, limit, window_s in limits_of(pass_.limits)
        ),
        expires_at=pass_.expires_at,
        version=1,
        revoked_at=pass_.revoked_at,
    )


def counter_of(pass_id: str, kind: LimitKind) -> str:
    """The counter that one limit of a pass is spent from."""
    return f"pass:{pass_id}:{kind}"


def limits_of(limits: PassLimits) -> Iterator[tuple[LimitKind, int, int | None]]:
    """Kind, limit (``GrantLimit`` says in which unit) and window in seconds of all that is limited."""
    if limits.calls is not None:
        yield "calls", limits.calls, None
    if limits.credits is not None:
        yield "credits", limits.credits, None
    if limits.requests is not None:
        yield "requests", limits.requests.count, limits.requests.window_s
    if limits.concurrency is not None:
        yield "concurrency", limits.concurrency, None
    if limits.upload_bytes is not None:
        yield "upload_bytes", limits.upload_bytes, None
    if limits.download_bytes is not None:
        yield "download_bytes", limits.download_bytes, None
    if limits.upload_rate is not None:
        yield "upload_rate", limits.upload_rate.bytes_per_second, limits.upload_rate.window_s
    if limits.download_rate is not None:
        yield "download_rate", limits.download_rate.bytes_per_second, limits.download_rate.window_s
