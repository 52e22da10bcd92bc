"""What the gateway sells and where it stands: upstreams, routes, fares, and the admission grants that open them.

A ``GatewayCatalog`` is one immutable version of everything a gateway process needs to know from ``farebox.yaml``.
It is stored as one JSON document and read back without any validation library: the document was checked when it was
applied (app/documents.py), and a gateway process must stay light.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from farebox.base.money import Asset, Money
from farebox.domain.limits import NO_LIMITS, LimitKind, PassLimits, limits_from_document

Flow = Literal["authorization", "upfront", "deferred"]
FareKind = Literal["account", "pass", "exact", "free"]
OnExceed = Literal["block", "allow", "grace"]
Balance = Literal["round_robin", "least_requests", "random"]


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How the targets of an upstream are asked whether they are well. ``statuses`` empty: any from 200 to 399 is a yes."""

    path: str
    interval_s: float = 10.0
    timeout_s: float = 2.0
    healthy_after: int = 2  # good answers in a row
    unhealthy_after: int = 3  # bad ones
    statuses: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """How an https upstream proves itself, and we to it. There is no way to ask for no proof.

    ``ca``: a file of PEM certificates, or "system" for those of the machine (also meant by neither ``ca`` nor ``pins``).
    ``pins``: SHA-256 of a public key (SPKI, DER); one of them has to be the leaf's. Without ``ca`` the key is the whole proof.
    """

    ca: str | None = None
    server_name: str | None = (
        None  # asked for (SNI) and looked for in the certificate; None: the host of the URL
    )
    pins: tuple[bytes, ...] = ()
    certificate: str | None = None  # PEM files that we show
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where admitted calls go: to ``url``, or shared among several ``targets`` (then ``url`` is empty).

    ``timeout_s`` bounds the wait for the first byte of the answer, ``total_timeout_s`` the whole exchange. What is None is
    as the gateway's settings say; connections and waiting calls are counted per target and process.
    """

    id: str
    url: str = ""
    timeout_s: float = 30.0
    health: HealthCheck | None = None
    targets: tuple[str, ...] = ()
    balance: Balance = "round_robin"
    tls: UpstreamTls | None = None
    connections_max: int | None = None
    waiting_max: int | None = None
    connect_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    total_timeout_s: float | None = None

    @property
    def target_urls(self) -> tuple[str, ...]:
        return self.targets or (self.url,)


ConditionMode = Literal["exact", "prefix", "contains", "not", "exists", "absent"]


@dataclass(frozen=True, slots=True)
class Condition:
    """What a call says under a name of its headers or its query. Values are compared as they are, upper and lower case.

    ``exact``, ``prefix`` and ``contains``: it is said, and each of its values is so. ``not``: it is not said, or no value is
    ``value``. ``exists``, ``absent``: ``value`` is empty. How two readers may differ: gateway/conditions.py.
    """

    name: str
    mode: ConditionMode
    value: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """Which calls a route takes. ``path`` is a template: ``/weather/{city}``, ``/{*rest}``. Empty tuples mean any.

    ``hosts``: names with or without a port, ``*.example.com`` for all names below one. ``headers`` and ``query`` must all
    hold; names of headers are lower case.
    """

    path: str
    methods: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    headers: tuple[Condition, ...] = ()
    query: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerRewrite:
    """What changes on the way back to the client: of answers of the upstream, never of our own."""

    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What changes on the way to the upstream, and back.

    Values of ``set_headers`` may name {customer} {plan} {pass} {payer} {route} {request_id}; ``set_path`` and the values of
    ``set_query`` the parameters of the route's path. ``set_path`` stands alone; else the prefix is stripped, then the other
    one added. ``host``: the Host that the upstream is told, its own or the client's.
    """

    strip_prefix: str = ""
    set_headers: tuple[tuple[str, str], ...] = ()
    add_prefix: str = ""
    set_path: str = ""
    remove_headers: tuple[str, ...] = ()
    set_query: tuple[tuple[str, str], ...] = ()
    remove_query: tuple[str, ...] = ()
    host: Literal["upstream", "original"] = "upstream"
    answer: AnswerRewrite = AnswerRewrite()


@dataclass(frozen=True, slots=True)
class ExactFare:
    """One call, paid on the spot. ``pay_to`` maps a CAIP-2 network to the seller's address on it."""

    price: Money
    pay_to: tuple[tuple[str, str], ...]
    flow: Flow = "authorization"
    schemes: tuple[str, ...] = ("exact",)


@dataclass(frozen=True, slots=True)
class PassOffer:
    """A pass on sale: what it costs, how long it lasts, what it holds."""

    id: str
    name: str
    price: Money
    duration_s: int
    limits: PassLimits = NO_LIMITS


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
    """One thing on sale. A route without any fare refuses every call (403); a free one says so (``free``).

    ``timeout_s`` bounds the wait for the first byte of the answer (None: the upstream's own), ``total_timeout_s`` the whole
    exchange. ``forward_auth``: an edge may ask for admission here and forward by itself.
    """

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
    body_bytes_max: int | None = None
    timeout_s: float | None = None
    total_timeout_s: float | None = None
    forward_auth: bool = False


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
    """A counter that an admitted call spends from. ``metric_key`` None (a pass's) means every call counts.

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
        upstreams=tuple(_upstream(u) for u in document.get("upstreams", ())),
        routes=tuple(_route(r) for r in document.get("routes", ())),
        assets=tuple(TokenAsset(**a) for a in document.get("assets", ())),
        server=_server(document.get("server", {})),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


def _pairs(rows: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for a, b in rows)


def _money(document: dict[str, Any]) -> Money:
    return Money(int(document["units"]), Asset(**document["asset"]))


def _upstream(document: dict[str, Any]) -> Upstream:
    health, tls = document.get("health"), document.get("tls")
    if isinstance(health, str):  # as it was stored before health had more to say than its path
        health = {"path": health}
    return Upstream(
        **{
            **document,
            "health": health and HealthCheck(**{**health, "statuses": tuple(health.get("statuses", ()))}),
            "targets": tuple(document.get("targets", ())),
            "tls": tls and UpstreamTls(**{**tls, "pins": tuple(bytes.fromhex(p) for p in tls["pins"])}),
        }
    )


def _route(document: dict[str, Any]) -> Route:
    match = document["match"]
    exact, account = document["exact"], document["account"]
    return Route(
        id=document["id"],
        match=Match(
            match["path"],
            tuple(match["methods"]),
            tuple(match["hosts"]),
            _conditions(match["headers"]),
            _conditions(match.get("query", ())),
        ),
        upstream=document["upstream"],
        rewrite=_rewrite(document["rewrite"]),
        metric=document["metric"],
        charge_on=document["charge_on"],
        exact=exact
        and ExactFare(
            _money(exact["price"]), _pairs(exact["pay_to"]), exact["flow"], tuple(exact["schemes"])
        ),
        passes=tuple(_offer(p) for p in document["passes"]),
        account=account and AccountFare(**account),
        free=_free(document.get("free")),
        description=document["description"],
        body_bytes_max=document.get("body_bytes_max"),
        timeout_s=document.get("timeout_s"),
        total_timeout_s=document.get("total_timeout_s"),
        forward_auth=document.get("forward_auth", False),
    )


def _conditions(rows: Iterable[Any]) -> tuple[Condition, ...]:
    # Catalogs of the first release knew pairs only.
    return tuple(
        Condition(**row) if isinstance(row, dict) else Condition(row[0], "exact", row[1]) for row in rows
    )


def _rewrite(document: dict[str, Any]) -> Rewrite:
    answer = document.get("answer") or {}
    return Rewrite(
        document["strip_prefix"],
        _pairs(document["set_headers"]),
        add_prefix=document.get("add_prefix", ""),
        set_path=document.get("set_path", ""),
        remove_headers=tuple(document.get("remove_headers", ())),
        set_query=_pairs(document.get("set_query", [])),
        remove_query=tuple(document.get("remove_query", ())),
        host=document.get("host", "upstream"),
        answer=AnswerRewrite(_pairs(answer.get("set_headers", [])), tuple(answer.get("remove_headers", ()))),
    )


def _free(document: dict[str, Any] | None) -> FreeFare | None:
    return None if document is None else FreeFare(tuple(document["methods"]))


def _offer(document: dict[str, Any]) -> PassOffer:
    return PassOffer(
        document["id"],
        document["name"],
        _money(document["price"]),
        document["duration_s"],
        # Catalogs of the first release knew calls only.
        limits_from_document(document.get("limits") or {"calls": document.get("calls")}),
    )


def _server(document: dict[str, Any]) -> ServerSettings:
    return ServerSettings(document.get("public_url"), tuple(document.get("trusted_proxies", ())))
