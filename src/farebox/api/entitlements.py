"""Entitlements: what a customer may use. The single check is asked before every action, so it is a raw endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

import msgspec
from fastapi import APIRouter

from farebox.api.front import Caller, Hot, HotRequest, Reply
from farebox.api.resource import Answer, moment, needs, number_or_none, router
from farebox.app.entitlements import Entitlements, EntitlementView
from farebox.base.errors import Reason, Refused

_ENCODER: Final = msgspec.json.Encoder()
_SCOPES: Final = ("entitlements:read", "billing:read", "billing:write")

EntitlementReader = Annotated[Caller, needs(*_SCOPES)]


class EntitlementAnswer(Answer):
    """One feature. `exceeded`: nothing remains. `values` stands there when plans give different custom values."""

    feature_key: str
    type: str
    granted: bool
    limit: str | None
    current_usage: str | None
    remaining: str | None
    exceeded: bool
    value: str | None
    source_plans: list[str]
    values: list[dict[str, str]] | None = None


class EntitlementsAnswer(Answer):
    """All features of a customer."""

    customer_id: str
    resolved_at: str
    entitlements: list[EntitlementAnswer]


def entitlement_endpoints(entitlements: Entitlements) -> dict[tuple[str, str], Hot]:
    """The raw endpoint by (method, path)."""

    async def check_entitlement(request: HotRequest) -> Reply:
        request.caller.need(*_SCOPES)
        customer_id, feature_key = _asked(request.query)
        seen = await entitlements.check(customer_id, feature_key)
        return Reply(200, _ENCODER.encode(_document(seen)))

    return {("GET", "/v1/entitlements/check"): check_entitlement}


def _asked(query: bytes) -> tuple[str, str]:
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    faults = [
        Reason("FIELD_MISSING", f"{name} is missing: add it", name)
        for name in ("customer_id", "feature_key")
        if not given.get(name)
    ]
    faults += [
        Reason("FIELD_UNKNOWN", f"there is no parameter {name[:60]!r} here", name[:60])
        for name in given
        if name not in ("customer_id", "feature_key")
    ]
    if faults:
        raise Refused(*faults)
    return given["customer_id"], given["feature_key"]


def _document(seen: EntitlementView) -> dict[str, Any]:
    document: dict[str, Any] = {
        "feature_key": seen.feature_key,
        "type": seen.type,
        "granted": seen.granted,
        "limit": number_or_none(seen.limit),
        "current_usage": number_or_none(seen.current_usage),
        "remaining": number_or_none(seen.remaining),
        "exceeded": seen.exceeded,
        "value": seen.value,
        "source_plans": list(seen.source_plans),
    }
    if len(seen.values) > 1:
        document["values"] = [{"plan_id": v.plan_id, "value": v.value} for v in seen.values]
    return document


def entitlements(entitlements: Entitlements) -> APIRouter:
    """``GET /v1/entitlements``."""
    api = router("entitlements")

    @api.get("/entitlements", response_model_exclude_none=False)
    async def list_entitlements(caller: EntitlementReader, customer_id: str) -> EntitlementsAnswer:
        """Every feature of a customer, over all running subscriptions."""
        resolved = await entitlements.list(customer_id)
        return EntitlementsAnswer(
            customer_id=resolved.customer_id,
            resolved_at=moment(resolved.resolved_at),
            entitlements=[EntitlementAnswer(**_document(seen)) for seen in resolved.entitlements],
        )

    return api
