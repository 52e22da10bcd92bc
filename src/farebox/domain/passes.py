"""A pass: what was bought or granted. Its token is only its receipt; this is the authority."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.domain.limits import PassLimits

PassStatus = Literal["active", "paused", "revoked"]


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


def limits_document(limits: PassLimits) -> dict[str, int]:
    """The limits as they stand in the token, the API and the database; what is not limited is left out."""
    return {} if limits.calls is None else {"calls": limits.calls}


def limits_from_document(document: dict[str, int]) -> PassLimits:
    """The inverse of ``limits_document``."""
    return PassLimits(document.get("calls"))


def grant_of(pass_: Pass, grant_id: str) -> AdmissionGrant:
    """What the gateway must know of a pass."""
    calls = pass_.limits.calls
    return AdmissionGrant(
        id=grant_id,
        subject_kind="pass",
        subject_id=pass_.id,
        plan=None,
        routes=frozenset({pass_.route_id}),
        features=frozenset(),
        limits=() if calls is None else (GrantLimit(calls_counter(pass_.id), "calls", Decimal(calls)),),
        expires_at=pass_.expires_at,
        version=1,
        revoked_at=pass_.revoked_at,
    )


def calls_counter(pass_id: str) -> str:
    """The counter that a pass's calls are spent from."""
    return f"pass:{pass_id}:calls"
