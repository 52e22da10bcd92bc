"""What the gateway sells and where it stands: upstreams, routes, fares, and the admission grants that open them.

A ``GatewayCatalog`` is one immutable version of everything a gateway process needs to know from ``farebox.yaml``.
It is stored as one JSON document and read back without any validation library: the document was checked when it was
applied (app/documents.py), and a gateway process must stay light.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from farebox.base.money import Asset, Money
from farebox.domain.limits import LimitKind

Flow = Literal["authorization", "upfront", "deferred"]
FareKind = Literal["account", "pass", "exact", "free"]
OnExceed = Literal["block", "allow", "grace"]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where admitted calls go. ``timeout_s`` bounds the wait for the first byte of the answer."""

    id: str
    url: str
    timeout_s: float = 30.0
    health: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """Which calls a route takes. ``path`` is a template: ``/weather/{city}``, ``/{*rest}``. Empty tuples mean any."""

    path: str
    methods: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What changes on the way to the upstream. Values may name {customer} {plan} {pass} {payer} {route} {request_id}."""

    strip_prefix: str = ""
    set_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ExactFare:
    """One call, paid on the spot. ``pay_to`` maps a CAIP-2 network to the seller's address on it."""

    price: Money
    pay_to: tuple[tuple[str, str], ...]
    flow: Flow = "authorization"
    schemes: tuple[str, ...] = ("exact",)


@dataclass(frozen=True, slots=True)
class PassOffer:
    """A pass on sale: what it costs, how long it lasts, how many calls it holds (None: not limited)."""

    id: str
    name: str
    price: Money
    duration_s: int
    calls: int | None


@dataclass(frozen=True, slots=True)
class AccountFare:
    """Calls by API key. ``required_feature`` None means any active subscription."""

    required_feature: str | None = None


@dataclass(frozen=True, slots=True)
class FreeFare:
    """Calls that cost nothing and need no credential. ``methods`` empty: every method."""

    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """One thing on sale. A route without any fare refuses every call (403); a free one says so (``free``)."""

    id: str
    match: Match
    upstream: str
    rewrite: Rewrite = Rewrite()
    metric: str | None = None
    charge_on: Literal["always", "success"] = "always"
    exact: ExactFare | None = None
    passes: tuple[PassOffer, ...] = ()
    account: AccountFare | None = None
    free: FreeFare | None = None
    description: str = ""


@dataclass(frozen=True, slots=True)
class TokenAsset:
    """A token payments are taken in. ``name`` and ``version`` are its EIP-712 domain; ``asset`` its name in the book."""

    network: str
    address: str
    symbol: str
    decimals: int
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the public face says of itself."""

    public_url: str | None = None
    trusted_proxies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayCatalog:
    """One version of all that the gateway reads. ``version`` 0 is the empty catalog of a fresh database."""

    version: int
    upstreams: tuple[Upstream, ...] = ()
    routes: tuple[Route, ...] = ()
    assets: tuple[TokenAsset, ...] = ()
    server: ServerSettings = ServerSettings()

    def upstream(self, upstream_id: str) -> Upstream:
        return next(u for u in self.upstreams if u.id == upstream_id)

    def route(self, route_id: str) -> Route | None:
        return next((r for r in self.routes if r.id == route_id), None)


@dataclass(frozen=True, slots=True)
class GrantLimit:
    """A counter that an admitted call spends from. ``metric_key`` None (a pass's calls) means every call counts one.

    ``limit``: calls, bytes, credits, slots, calls a window, or bytes a second, as ``kind`` says (domain/limits.py).
    """

    counter_id: str
    kind: LimitKind
    limit: Decimal | None
    feature_key: str | None = None
    metric_key: str | None = None
    on_exceed: OnExceed = "block"
    window_s: int | None = None  # of requests and rates


@dataclass(frozen=True, slots=True)
class AdmissionGrant:
    """Who may pass, where, until when, and within which limits. Written by billing, purchases and operators."""

    id: str
    subject_kind: Literal["customer", "pass"]
    subject_id: str
    plan: str | None
    routes: frozenset[str] | None
    features: frozenset[str]
    limits: tuple[GrantLimit, ...]
    expires_at: datetime | None
    version: int
    revoked_at: datetime | None = None


def catalog_document(catalog: GatewayCatalog) -> dict[str, Any]:
    """The catalog as plain JSON values; amounts as strings of minor units. ``catalog_from_document`` reads it back."""
    document = dataclasses.asdict(catalog)
    document.pop("version")
    return _plain(document)  # type: ignore[no-any-return]


def catalog_from_document(version: int, document: dict[str, Any]) -> GatewayCatalog:
    """The inverse of ``catalog_document``."""
    return GatewayCatalog(
        version=version,
        upstreams=tuple(Upstream(**u) for u in document.get("upstreams", ())),
        routes=tuple(_route(r) for r in document.get("routes", ())),
        assets=tuple(TokenAsset(**a) for a in document.get("assets", ())),
        server=_server(document.get("server", {})),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _pairs(rows: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for a, b in rows)


def _money(document: dict[str, Any]) -> Money:
    return Money(int(document["units"]), Asset(**document["asset"]))


def _route(document: dict[str, Any]) -> Route:
    match, rewrite = document["match"], document["rewrite"]
    exact, account = document["exact"], document["account"]
    return Route(
        id=document["id"],
        match=Match(match["path"], tuple(match["methods"]), tuple(match["hosts"]), _pairs(match["headers"])),
        upstream=document["upstream"],
        rewrite=Rewrite(rewrite["strip_prefix"], _pairs(rewrite["set_headers"])),
        metric=document["metric"],
        charge_on=document["charge_on"],
        exact=exact
        and ExactFare(
            _money(exact["price"]), _pairs(exact["pay_to"]), exact["flow"], tuple(exact["schemes"])
        ),
        passes=tuple(PassOffer(**{**p, "price": _money(p["price"])}) for p in document["passes"]),
        account=account and AccountFare(**account),
        free=document["free"] and FreeFare(tuple(document["free"]["methods"])),
        description=document["description"],
    )


def _server(document: dict[str, Any]) -> ServerSettings:
    return ServerSettings(document.get("public_url"), tuple(document.get("trusted_proxies", ())))
