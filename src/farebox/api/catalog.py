"""The catalog as one document, and what the gateways serve of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from farebox.api.front import Caller
from farebox.api.resource import Admin, Answer, Reader, router
from farebox.app.catalog import Applied, CatalogFile
from farebox.app.documents.gateway import gateway_sections
from farebox.app.documents.routing import conditions_document
from farebox.app.documents.surroundings import Surroundings
from farebox.base.errors import refuse
from farebox.domain.access import ExactFare, GatewayCatalog, PassOffer, Route
from farebox.domain.limits import limits_document


class ChangeAnswer(Answer):
    """What became of one thing."""

    kind: str
    id: str
    what: str
    details: list[str]


class WarningAnswer(Answer):
    """A likely mistake that hinders nothing."""

    code: str
    message: str
    field: str | None


class AppliedAnswer(Answer):
    """What an application changed, or would change."""

    version: int | None
    changed: bool
    changes: list[ChangeAnswer]
    warnings: list[WarningAnswer]


class PriceAnswer(Answer):
    """Whole minor units of an asset."""

    amount: int
    currency: str


class ExactFareAnswer(Answer):
    """One call, paid on the spot."""

    price: PriceAnswer
    pay_to: dict[str, str]
    flow: str
    schemes: list[str]


class PassOfferAnswer(Answer):
    """A pass on sale."""

    id: str
    name: str
    price: PriceAnswer
    duration_s: int
    limits: dict[str, Any]


class AccountFareAnswer(Answer):
    """Calls by API key."""

    required_feature: str | None


class FreeFareAnswer(Answer):
    """Calls that cost nothing; no methods: all of them."""

    methods: list[str]


class FaresAnswer(Answer):
    """How a route is paid for."""

    exact: ExactFareAnswer | None
    passes: list[PassOfferAnswer]
    account: AccountFareAnswer | None
    free: FreeFareAnswer | None


class RouteAnswer(Answer):
    """One thing on sale."""

    id: str
    description: str
    match: dict[str, Any]
    upstream: str
    metric: str | None
    charge_on: str
    fares: FaresAnswer


class RoutesAnswer(Answer):
    """All routes, in the order in which ties are broken."""

    data: list[RouteAnswer]
    next_cursor: str | None = None


class CatalogAnswer(Answer):
    """The gateway's part of the catalog, in the shape of farebox.yaml."""

    version: int
    document: dict[str, Any]


def _applied(applied: Applied) -> AppliedAnswer:
    return AppliedAnswer(
        version=applied.version,
        changed=applied.changed,
        changes=[
            ChangeAnswer(kind=c.kind, id=c.id, what=c.what, details=list(c.details)) for c in applied.changes
        ],
        warnings=[WarningAnswer(code=w.code, message=w.message, field=w.field) for w in applied.warnings],
    )


def _exact(fare: ExactFare | None) -> ExactFareAnswer | None:
    if fare is None:
        return None
    price = PriceAnswer(amount=fare.price.units, currency=fare.price.asset.code)
    return ExactFareAnswer(price=price, pay_to=dict(fare.pay_to), flow=fare.flow, schemes=list(fare.schemes))


def _offer(offer: PassOffer) -> PassOfferAnswer:
    price = PriceAnswer(amount=offer.price.units, currency=offer.price.asset.code)
    return PassOfferAnswer(
        id=offer.id,
        name=offer.name,
        price=price,
        duration_s=offer.duration_s,
        limits=limits_document(offer.limits),
    )


def route_answer(route: Route) -> RouteAnswer:
    m = route.match
    account = AccountFareAnswer(required_feature=route.account.required_feature) if route.account else None
    return RouteAnswer(
        id=route.id,
        description=route.description,
        match={
            "path": m.path,
            "methods": list(m.methods),
            "hosts": list(m.hosts),
            "headers": conditions_document(m.headers),
            "query": conditions_document(m.query),
        },
        upstream=route.upstream,
        metric=route.metric,
        charge_on=route.charge_on,
        fares=FaresAnswer(
            exact=_exact(route.exact),
            passes=[_offer(o) for o in route.passes],
            account=account,
            free=FreeFareAnswer(methods=list(route.free.methods)) if route.free else None,
        ),
    )


def catalog(file: CatalogFile) -> APIRouter:
    """``/v1/catalog`` and ``/v1/routes``. Applying takes the text of a farebox.yaml (``application/yaml``) or its JSON."""
    api = router("catalog")

    @api.get("/catalog")
    async def get_catalog(caller: Reader) -> CatalogAnswer:
        """What the gateways serve."""
        served: GatewayCatalog = await file.read()
        return CatalogAnswer(version=served.version, document=gateway_sections(served, Surroundings("live")))

    @api.get(
        "/catalog/export", response_class=Response, responses={200: {"content": {"application/yaml": {}}}}
    )
    async def export_catalog(caller: Reader) -> Response:
        """A farebox.yaml that applies back to the same catalog."""
        return Response(await file.export(), media_type="application/yaml")

    @api.put("/catalog/apply", openapi_extra=_DOCUMENT_BODY)
    async def put_catalog(caller: Admin) -> AppliedAnswer:
        """As `POST`: applying is idempotent by itself."""
        return await _apply(caller)

    @api.post("/catalog/apply", openapi_extra=_DOCUMENT_BODY)
    async def apply_catalog(caller: Admin) -> AppliedAnswer:
        """Make the catalog what the document says: all of it or nothing."""
        return await _apply(caller)

    async def _apply(caller: Caller) -> AppliedAnswer:
        if isinstance(caller.body, str):
            return _applied(await file.apply(caller.actor, caller.body, within=caller.within))
        return _applied(await file.apply_values(caller.actor, _document(caller.body), within=caller.within))

    @api.post("/catalog/diff", openapi_extra=_DOCUMENT_BODY)
    async def diff_catalog(caller: Admin) -> AppliedAnswer:
        """What applying the document would change or refuse."""
        if isinstance(caller.body, str):
            return _applied(await file.diff(caller.body))
        return _applied(await file.diff_values(_document(caller.body)))

    @api.get("/routes")
    async def list_routes(caller: Reader) -> RoutesAnswer:
        """What is on sale."""
        return RoutesAnswer(data=[route_answer(r) for r in (await file.read()).routes])

    return api


_DOCUMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/yaml": {"schema": {"type": "string"}},
            "application/json": {"schema": {"type": "object"}},
        },
    }
}


def _document(values: Any) -> Any:
    if not isinstance(values, dict):
        raise refuse(
            "BODY_MALFORMED",
            "send the text of a farebox.yaml as application/yaml, or its values as a JSON object",
        )
    return {name: value for name, value in values.items() if name != "idempotency_key"}
