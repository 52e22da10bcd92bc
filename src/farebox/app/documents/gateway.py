"""The shapes of farebox.yaml that the gateway reads: upstreams, routes with their fares, payments, server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from farebox.app.documents.faults import Document, fault, not_available_yet
from farebox.app.documents.scalars import (
    DurationS,
    Id,
    Key,
    LongText,
    Name,
    Price,
    TimeoutS,
    duration_text,
)
from farebox.app.documents.surroundings import Surroundings
from farebox.base.errors import Reason
from farebox.base.money import Money, plain
from farebox.domain.access import (
    AccountFare,
    ExactFare,
    GatewayCatalog,
    Match,
    PassOffer,
    Rewrite,
    Route,
    ServerSettings,
    TokenAsset,
    Upstream,
)

ROUTES_MAX: Final = 5_000
UPSTREAMS_MAX: Final = 1_000
OFFERS_MAX: Final = 100
TIMEOUT_S_MAX: Final = 3_600.0

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}\Z", re.ASCII)
_HEADER_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]{0,4000}\Z")
_METHOD = re.compile(r"[A-Za-z]{1,20}\Z", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(:[0-9]{1,5})?\Z", re.ASCII)
_EVM_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}\Z", re.ASCII)
_NETWORK = re.compile(r"[-a-z0-9]{3,8}:[-_a-zA-Z0-9]{1,32}\Z", re.ASCII)
_PARAMETER = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_]{0,63})\}\Z", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%-]*\Z", re.ASCII)
_VARIABLE = re.compile(r"\{([^{}]*)\}")

VARIABLES: Final = frozenset({"customer", "plan", "pass", "payer", "route", "request_id"})
#: Headers a route may not set: they frame the message or name the hop, or they are Farebox's own.
_FRAMING: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def _url(value: Any) -> str:
    if not isinstance(value, str):
        raise fault("URL_MALFORMED", f"{value!r} is not a URL: write it like http://127.0.0.1:9000")
    try:
        parts = urlsplit(value)
        port_is_good = parts.port is None or parts.port > 0
    except ValueError:
        raise fault(
            "URL_MALFORMED", f"{value[:80]!r} is not a URL: write it like http://127.0.0.1:9000"
        ) from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not port_is_good
        or re.search(r"[\s\x00-\x1f\\]", value)
    ):
        raise fault(
            "URL_MALFORMED",
            f"{value[:80]!r} is not an http or https URL: write it like http://127.0.0.1:9000",
        )
    if parts.username or parts.password:
        raise fault(
            "URL_MALFORMED",
            "the URL holds a user name or password: set a header in rewrite.set_headers instead",
        )
    if parts.query or parts.fragment or "?" in value or "#" in value:
        raise fault("URL_MALFORMED", f"{value[:80]!r} has a query or fragment: leave it out")
    return value.rstrip("/")


WebUrl = Annotated[str, BeforeValidator(_url), WithJsonSchema({"type": "string", "format": "uri"})]


def _timeout(seconds: float) -> float:
    if not 0 < seconds <= TIMEOUT_S_MAX:
        raise fault("DURATION_MALFORMED", "the timeout must be above 0 and at most 1h")
    return seconds


def _path(path: str) -> str:
    if not path.startswith("/") or path.startswith("//"):
        raise fault("PATH_MALFORMED", f"{path[:80]!r} does not begin with one slash")
    return path


def _template(template: str) -> str:
    """A path template: plain segments, ``{name}`` for one segment, ``{*name}`` for the rest (last only)."""
    _path(template)
    segments, seen = template[1:].split("/"), set()
    for place, segment in enumerate(segments):
        parameter = _PARAMETER.match(segment)
        if parameter is None:
            if not _SEGMENT.match(segment) or segment in (".", ".."):
                raise fault(
                    "PATH_MALFORMED",
                    f"{segment[:80]!r} is not a path segment: write text, {{name}} or {{*rest}}",
                )
            if not segment and place < len(segments) - 1:
                raise fault("PATH_MALFORMED", "an empty segment never matches: calls with // are refused")
            continue
        if parameter[1] and place < len(segments) - 1:
            raise fault(
                "PATH_MALFORMED", f"{segment} takes the rest of the path: only the last segment may do that"
            )
        if parameter[2] in seen:
            raise fault("PATH_MALFORMED", f"{{{parameter[2]}}} appears twice: give each its own name")
        seen.add(parameter[2])
    return template


def _methods(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _method(value: str) -> str:
    if not _METHOD.match(value):
        raise fault("METHOD_MALFORMED", f"{value[:40]!r} is not a method such as GET")
    return value.upper()


def _host(value: str) -> str:
    if not _HOST.match(value):
        raise fault("HOST_MALFORMED", f"{value[:80]!r} is not a host name: write it like api.example.com")
    return value.lower()


def _header_names(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not _HEADER_NAME.match(name):
            raise fault("HEADER_MALFORMED", f"{name[:60]!r} is not a header name")
        if not _HEADER_VALUE.match(value):
            raise fault(
                "HEADER_MALFORMED", f"the value of {name} holds characters that a header cannot carry"
            )
    if len({name.lower() for name in headers}) < len(headers):
        raise fault("HEADER_MALFORMED", "a header is named twice in different spellings: write it once")
    return headers


def _settable(headers: dict[str, str]) -> dict[str, str]:
    for name, value in _header_names(headers).items():
        if name.lower() in _FRAMING or name.lower().startswith("farebox-"):
            raise fault("HEADER_RESERVED", f"{name} is set by Farebox itself: choose another name")
        for variable in _VARIABLE.findall(value):
            if variable not in VARIABLES:
                raise fault(
                    "VARIABLE_UNKNOWN",
                    f"{{{variable}}} is not known in {name}: use {', '.join(sorted(VARIABLES))}",
                )
    return headers


def _network(value: str) -> str:
    if not _NETWORK.match(value):
        raise fault("NETWORK_MALFORMED", f"{value[:60]!r} is not a CAIP-2 network such as eip155:8453")
    return value


Network = Annotated[str, AfterValidator(_network)]
HeaderText = Annotated[str, StringConstraints(strict=True)]


def address_fault(network: str, address: str) -> str | None:
    """What is wrong with an address on a network; None when nothing is, or when the network's form is not known here."""
    if network.startswith("eip155:") and not _EVM_ADDRESS.match(address):
        return f"{address[:60]!r} is not an address on {network}: write 0x and 40 hexadecimal digits"
    if network.startswith("eip155:") and int(address, 16) == 0:
        return f"the zero address on {network} belongs to nobody: money sent there is lost"
    return None


class UpstreamDocument(Document):
    """Where admitted calls go."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "targets": "several targets of one upstream are",
        "balance": "balancing is",
    }

    url: WebUrl
    timeout: Annotated[TimeoutS, AfterValidator(_timeout)] = 30.0
    health: Annotated[str, AfterValidator(_path)] | None = None

    def value(self, upstream_id: str) -> Upstream:
        return Upstream(upstream_id, self.url, self.timeout, self.health)


class MatchDocument(Document):
    """Which calls a route takes. Empty lists mean any."""

    path: Annotated[str, StringConstraints(strict=True, max_length=2000), AfterValidator(_template)]
    methods: Annotated[tuple[Annotated[str, AfterValidator(_method)], ...], BeforeValidator(_methods)] = ()
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_methods)] = ()
    headers: Annotated[dict[str, HeaderText], AfterValidator(_header_names)] = Field(default_factory=dict)

    def value(self) -> Match:
        headers = tuple((name.lower(), value) for name, value in self.headers.items())
        return Match(self.path, self.methods, self.hosts, headers)


class RewriteDocument(Document):
    """What changes on the way to the upstream."""

    strip_prefix: Annotated[str, AfterValidator(lambda p: p and _path(p))] = ""
    set_headers: Annotated[dict[str, HeaderText], AfterValidator(_settable)] = Field(default_factory=dict)

    def value(self) -> Rewrite:
        return Rewrite(self.strip_prefix.rstrip("/"), tuple(self.set_headers.items()))


def _flow(value: Any) -> Any:
    if value in ("upfront", "deferred"):
        raise not_available_yet(f"the flow {value!r} is")
    return value


def _scheme(value: Any) -> Any:
    if value == "upto":
        raise not_available_yet("the scheme 'upto' is")
    return value


def _some_scheme(schemes: tuple[str, ...]) -> tuple[str, ...]:
    if not schemes:
        raise fault("FIELD_MALFORMED", "no scheme is named: write [exact], or leave schemes out")
    return schemes


Flow = Annotated[Literal["authorization"], BeforeValidator(_flow)]
Scheme = Annotated[Literal["exact"], BeforeValidator(_scheme)]


class ExactFareDocument(Document):
    """One call, paid on the spot."""

    price: Price
    pay_to: dict[Network, str] = Field(default_factory=dict)
    flow: Flow | None = None
    schemes: Annotated[tuple[Scheme, ...], AfterValidator(_some_scheme)] = ("exact",)


class PassLimitsDocument(Document):
    """What a pass holds."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "download_bytes": "byte limits are",
        "upload_bytes": "byte limits are",
        "upload_rate": "rates are",
        "download_rate": "rates are",
        "credits": "credits are",
        "concurrency": "concurrency limits are",
        "requests": "windows are",
    }

    calls: Annotated[int, Field(strict=True, ge=1, le=10**12)] | None = None


class PassOfferDocument(Document):
    """A pass on sale."""

    not_yet: ClassVar[Mapping[str, str]] = {"splits": "splitting a payment is"}

    id: Id
    name: Name
    price: Price
    duration: DurationS
    limits: PassLimitsDocument = PassLimitsDocument()

    def value(self) -> PassOffer:
        return PassOffer(self.id, self.name, self.price, self.duration, self.limits.calls)


class AccountFareDocument(Document):
    """Calls by API key. No ``required_feature``: any active subscription will do."""

    required_feature: Key | None = None

    def value(self) -> AccountFare:
        return AccountFare(self.required_feature)


class FaresDocument(Document):
    """The ways a route is paid for."""

    exact: ExactFareDocument | None = None
    passes: Annotated[tuple[PassOfferDocument, ...], Field(max_length=OFFERS_MAX)] = ()
    account: AccountFareDocument | None = None


def _metric(value: Any) -> Any:
    if isinstance(value, dict):
        raise not_available_yet("taking a metric's value from a header, bytes or duration is")
    return value


class RouteDocument(Document):
    """One thing on sale."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "idempotent": "running a route again after a crash is",
        "limits": "limits of a route are",
    }

    id: Id
    match: MatchDocument
    upstream: Id
    rewrite: RewriteDocument = RewriteDocument()
    metric: Annotated[Key | None, BeforeValidator(_metric)] = None
    charge_on: Literal["always", "success"] = "always"
    fares: FaresDocument = FaresDocument()
    description: LongText = ""


class PaymentDefaultsDocument(Document):
    """What fares leave out."""

    network: Network | None = None
    pay_to: str | None = None
    flow: Flow | None = None


class AssetDocument(Document):
    """A token payments are taken in. ``name`` and ``version`` are its EIP-712 domain."""

    network: Network
    address: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]
    symbol: Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Z][A-Z0-9]{1,11}$")]
    decimals: Annotated[int, Field(strict=True, ge=0, le=30)] = 6
    name: Name | None = None
    version: Annotated[str, StringConstraints(strict=True, max_length=20)] = "2"

    def value(self) -> TokenAsset:
        return TokenAsset(
            self.network, self.address, self.symbol, self.decimals, self.name or self.symbol, self.version
        )


class PaymentsDocument(Document):
    """Where money may come from and go to."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "facilitators": "outside facilitators are",
        "networks": "settling on real networks is",
    }

    defaults: PaymentDefaultsDocument = PaymentDefaultsDocument()
    assets: Annotated[tuple[AssetDocument, ...], Field(max_length=100)] = ()


def _proxy(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value, strict=False))
    except ValueError:
        raise fault(
            "ADDRESS_MALFORMED", f"{value[:60]!r} is not a network address such as 10.0.0.0/8"
        ) from None


class ServerDocument(Document):
    """What the public face says of itself."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "compatibility": "compatibility protocols are",
        "gateways": "choosing the number of gateways here (use --gateways) is",
    }

    public_url: WebUrl | None = None
    trusted_proxies: tuple[Annotated[str, AfterValidator(_proxy)], ...] = ()

    def value(self) -> ServerSettings:
        return ServerSettings(self.public_url, self.trusted_proxies)


# ── from documents to values ───────────────────────────────────────────────────────────────────────────────────────


class GatewayReader:
    """Turns the gateway's part of a document into a ``GatewayCatalog``, collecting what does not fit together.

    Routes that could not be read are None and keep their place, so that paths stay right; ``upstream_names`` holds
    those of unreadable upstreams too.
    """

    def __init__(
        self,
        upstreams: Mapping[str, UpstreamDocument],
        upstream_names: frozenset[str],
        routes: Sequence[RouteDocument | None],
        payments: PaymentsDocument,
        server: ServerDocument,
        surroundings: Surroundings,
    ) -> None:
        self._upstreams = upstreams
        self._upstream_names = upstream_names
        self._routes = routes
        self._payments = payments
        self._server = server
        self._surroundings = surroundings
        self._tokens = (
            *surroundings.tokens,
            *(a.value() for a in payments.assets if a.value() not in surroundings.tokens),
        )
        self.faults: list[Reason] = []

    def catalog(self, metric_keys: frozenset[str]) -> GatewayCatalog:
        """The catalog (version 0: not stored yet). What is wrong with it is in ``faults``."""
        self._check_payments()
        seen: set[str] = set()
        routes: list[Route] = []
        for place, document in enumerate(self._routes):
            at = f"routes[{place}]"
            if document is None:
                continue
            if document.id in seen:
                self._fault(
                    "ROUTE_DUPLICATE",
                    f"another route is called {document.id!r}: give each its own id",
                    f"{at}.id",
                )
            seen.add(document.id)
            if document.upstream not in self._upstream_names:
                known = ", ".join(sorted(self._upstream_names)) or "there is none"
                self._fault(
                    "UPSTREAM_UNKNOWN",
                    f"there is no upstream {document.upstream!r}: add it under upstreams, or use one of these: {known}",
                    f"{at}.upstream",
                )
            if document.metric is not None and document.metric not in metric_keys:
                self._fault(
                    "METRIC_UNKNOWN",
                    f"there is no metric {document.metric!r}: add it under metrics",
                    f"{at}.metric",
                )
            routes.append(self._route(document, at))
        return GatewayCatalog(
            version=0,
            upstreams=tuple(u.value(name) for name, u in self._upstreams.items()),
            routes=tuple(routes),
            assets=self._tokens,
            server=self._server.value(),
        )

    def _route(self, document: RouteDocument, at: str) -> Route:
        fares = document.fares
        exact = None
        if fares.exact is not None:
            exact = self._exact(fares.exact, f"{at}.fares.exact")
        offers: set[str] = set()
        for place, offer in enumerate(fares.passes):
            where = f"{at}.fares.passes[{place}]"
            if offer.id in offers:
                self._fault(
                    "PASS_DUPLICATE", f"another pass of this route is called {offer.id!r}", f"{where}.id"
                )
            offers.add(offer.id)
            recipients = dict(exact.pay_to) if exact else self._recipients({}, f"{where}.price")
            self._check_price(offer.price, recipients, f"{where}.price")
        return Route(
            id=document.id,
            match=document.match.value(),
            upstream=document.upstream,
            rewrite=document.rewrite.value(),
            metric=document.metric,
            charge_on=document.charge_on,
            exact=exact,
            passes=tuple(p.value() for p in fares.passes),
            account=fares.account.value() if fares.account else None,
            description=document.description,
        )

    def _exact(self, document: ExactFareDocument, at: str) -> ExactFare:
        recipients = self._recipients(document.pay_to, f"{at}.pay_to")
        self._check_price(document.price, recipients, f"{at}.price")
        flow = document.flow or self._payments.defaults.flow or "authorization"
        return ExactFare(document.price, tuple(sorted(recipients.items())), flow, document.schemes)

    def _recipients(self, named: Mapping[str, str], at: str) -> dict[str, str]:
        """Network → address: what the fare names, else the file's defaults, else what the installation fills in."""
        if named:
            for network, address in named.items():
                self._check_address(network, address, f"{at}.{network}")
            return dict(named)
        defaults = self._payments.defaults
        if defaults.network and defaults.pay_to:
            return {defaults.network: defaults.pay_to}
        if defaults.pay_to and len(self._surroundings.networks) == 1:
            return {next(iter(self._surroundings.networks)): defaults.pay_to}
        if self._surroundings.pay_to:
            for network in self._surroundings.pay_to:
                self._check_network(network, at)
            return dict(self._surroundings.pay_to)
        self._fault(
            "PAY_TO_MISSING",
            "nobody is named to receive the money: set pay_to here, payments.defaults, or FAREBOX_PAYMENT_NETWORK and FAREBOX_PAYMENT_PAY_TO",
            at,
        )
        return {}

    def _check_payments(self) -> None:
        defaults = self._payments.defaults
        if defaults.network is not None:
            self._check_network(defaults.network, "payments.defaults.network")
        if defaults.pay_to is not None:
            network = defaults.network or next(iter(self._surroundings.networks), None)
            if network is None:
                self._fault(
                    "NETWORK_MISSING",
                    "pay_to needs the network it is an address on",
                    "payments.defaults.network",
                )
            elif (wrong := address_fault(network, defaults.pay_to)) is not None:
                self._fault("ADDRESS_MALFORMED", wrong, "payments.defaults.pay_to")
        seen: set[tuple[str, str]] = {(t.network, t.symbol) for t in self._surroundings.tokens}
        for place, asset in enumerate(self._payments.assets):
            at = f"payments.assets[{place}]"
            if asset.value() in self._surroundings.tokens:
                continue
            self._check_network(asset.network, f"{at}.network")
            if (wrong := address_fault(asset.network, asset.address)) is not None:
                self._fault("ADDRESS_MALFORMED", wrong, f"{at}.address")
            if (asset.network, asset.symbol) in seen:
                self._fault(
                    "ASSET_DUPLICATE", f"{asset.symbol} on {asset.network} is there already", f"{at}.symbol"
                )
            seen.add((asset.network, asset.symbol))

    def _check_address(self, network: str, address: str, at: str) -> None:
        self._check_network(network, at)
        if (wrong := address_fault(network, address)) is not None:
            self._fault("ADDRESS_MALFORMED", wrong, at)

    def _check_network(self, network: str, at: str) -> None:
        networks = self._surroundings.networks
        if network in networks:
            return
        if networks:
            remedy = f"what is settled here is {', '.join(sorted(networks))}"
        else:
            remedy = "settling on real networks is not available yet, run with --sandbox or sell by account"
        self._fault("NETWORK_UNAVAILABLE", f"payments on {network} cannot be settled: {remedy}", at)

    def _check_price(self, price: Money, recipients: Mapping[str, str], at: str) -> None:
        if price.units <= 0:
            self._fault("PRICE_ZERO", "a price must be more than nothing", at)
        for network in recipients:
            token = next(
                (t for t in self._tokens if t.network == network and t.symbol == price.asset.code), None
            )
            if token is None:
                if network in self._surroundings.networks:
                    known = ", ".join(sorted({t.symbol for t in self._tokens if t.network == network}))
                    self._fault(
                        "ASSET_WITHOUT_TOKEN",
                        f"{price.asset.code} is not a token taken on {network}: use {known}, or add it under payments.assets",
                        at,
                    )
            elif token.decimals != price.asset.decimals:
                self._fault(
                    "ASSET_DECIMALS_DIFFER",
                    f"{price.asset.code} has {price.asset.decimals} decimals here and {token.decimals} on {network}",
                    at,
                )

    def _fault(self, code: str, message: str, at: str) -> None:
        self.faults.append(Reason(code, message, at))


def unknown_features(routes: Sequence[tuple[int, RouteDocument]], features: frozenset[str]) -> list[Reason]:
    """Account fares whose feature no plan grants: calls would be refused, which may be meant (a plan still to come)."""
    found: list[Reason] = []
    for place, route in routes:
        feature = route.fares.account.required_feature if route.fares.account else None
        if feature is not None and feature not in features:
            message = f"no plan grants {feature!r}: nobody can call {route.id} by account until one does"
            found.append(
                Reason("FEATURE_UNKNOWN", message, f"routes[{place}].fares.account.required_feature")
            )
    return found


def routes_without_fare(routes: Sequence[tuple[int, RouteDocument]]) -> list[Reason]:
    """Routes without any fare: every call of theirs is refused."""
    return [
        Reason(
            "ROUTE_WITHOUT_FARE",
            f"{route.id} has no fare: every call of it is refused",
            f"routes[{place}].fares",
        )
        for place, route in routes
        if route.fares.exact is None and route.fares.account is None and not route.fares.passes
    ]


# ── back from values to documents ──────────────────────────────────────────────────────────────────────────────────


def gateway_sections(catalog: GatewayCatalog, surroundings: Surroundings) -> dict[str, Any]:
    """The catalog as the sections of a farebox.yaml that read back to it. What the installation fills in is left out."""
    sections: dict[str, Any] = {}
    if catalog.upstreams:
        sections["upstreams"] = {u.id: _upstream_document(u) for u in catalog.upstreams}
    if catalog.routes:
        sections["routes"] = [_route_document(r, surroundings) for r in catalog.routes]
    assets = [
        {
            "network": t.network,
            "address": t.address,
            "symbol": t.symbol,
            "decimals": t.decimals,
            "name": t.name,
            "version": t.version,
        }
        for t in catalog.assets
        if t not in surroundings.tokens
    ]
    if assets:
        sections["payments"] = {"assets": assets}
    server = {
        **({"public_url": catalog.server.public_url} if catalog.server.public_url else {}),
        **(
            {"trusted_proxies": list(catalog.server.trusted_proxies)}
            if catalog.server.trusted_proxies
            else {}
        ),
    }
    if server:
        sections["server"] = server
    return sections


def _upstream_document(upstream: Upstream) -> dict[str, Any]:
    document: dict[str, Any] = {"url": upstream.url, "timeout": duration_text(upstream.timeout_s)}
    if upstream.health:
        document["health"] = upstream.health
    return document


def _route_document(route: Route, surroundings: Surroundings) -> dict[str, Any]:
    match: dict[str, Any] = {"path": route.match.path}
    if route.match.methods:
        match["methods"] = list(route.match.methods)
    if route.match.hosts:
        match["hosts"] = list(route.match.hosts)
    if route.match.headers:
        match["headers"] = dict(route.match.headers)
    document: dict[str, Any] = {"id": route.id, "match": match, "upstream": route.upstream}
    if route.description:
        document["description"] = route.description
    rewrite: dict[str, Any] = {}
    if route.rewrite.strip_prefix:
        rewrite["strip_prefix"] = route.rewrite.strip_prefix
    if route.rewrite.set_headers:
        rewrite["set_headers"] = dict(route.rewrite.set_headers)
    if rewrite:
        document["rewrite"] = rewrite
    if route.metric:
        document["metric"] = route.metric
    if route.charge_on != "always":
        document["charge_on"] = route.charge_on
    fares: dict[str, Any] = {}
    if route.exact:
        fares["exact"] = _exact_document(route.exact, surroundings)
    if route.passes:
        fares["passes"] = [_offer_document(offer) for offer in route.passes]
    if route.account:
        fares["account"] = (
            {"required_feature": route.account.required_feature} if route.account.required_feature else {}
        )
    if fares:
        document["fares"] = fares
    return document


def _exact_document(exact: ExactFare, surroundings: Surroundings) -> dict[str, Any]:
    document: dict[str, Any] = {"price": _price_text(exact.price)}
    if dict(exact.pay_to) != dict(surroundings.pay_to):
        document["pay_to"] = dict(exact.pay_to)
    if exact.flow != "authorization":
        document["flow"] = exact.flow
    if exact.schemes != ("exact",):
        document["schemes"] = list(exact.schemes)
    return document


def _offer_document(offer: PassOffer) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": offer.id,
        "name": offer.name,
        "price": _price_text(offer.price),
        "duration": duration_text(offer.duration_s),
    }
    if offer.calls is not None:
        document["limits"] = {"calls": offer.calls}
    return document


def _price_text(price: Money) -> str:
    return f"{plain(price.major)} {price.asset.code}"
