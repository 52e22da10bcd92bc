"""The shapes of farebox.yaml that the gateway reads, put together: routes, payments, server."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from farebox.app.documents.fares import (
    ExactFareDocument,
    FaresDocument,
    Flow,
    Network,
    address_fault,
    exact_document,
    free_document,
    offer_document,
)
from farebox.app.documents.faults import Document, fault, not_available_yet
from farebox.app.documents.routing import (
    MatchDocument,
    RewriteDocument,
    match_document,
    rewrite_document,
    rewrite_faults,
)
from farebox.app.documents.scalars import (
    Id,
    Key,
    LongText,
    Name,
    SizeBytes,
    duration_text,
    size_text,
)
from farebox.app.documents.surroundings import Surroundings
from farebox.app.documents.upstreams import (
    Timeout,
    TotalTimeout,
    UpstreamDocument,
    WebUrl,
    upstream_document,
)
from farebox.base.errors import Reason
from farebox.base.money import Money
from farebox.domain.access import (
    ExactFare,
    FreeFare,
    GatewayCatalog,
    Match,
    Route,
    ServerSettings,
    TokenAsset,
)

ROUTES_MAX: Final = 5_000
UPSTREAMS_MAX: Final = 1_000


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
    body_bytes_max: SizeBytes | None = None
    timeout: Timeout | None = None
    total_timeout: TotalTimeout | None = None
    forward_auth: Annotated[bool, Field(strict=True)] = False


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
        match, rewrite = document.match.value(), document.rewrite.value()
        self.faults += rewrite_faults(match, rewrite, f"{at}.rewrite")
        self._check_free(document, match, at)
        self._check_timeouts(document, at)
        if document.forward_auth:
            self.faults += forward_auth_faults(document, at)
        return Route(
            id=document.id,
            match=match,
            upstream=document.upstream,
            rewrite=rewrite,
            metric=document.metric,
            charge_on=document.charge_on,
            exact=exact,
            passes=tuple(p.value() for p in fares.passes),
            account=fares.account.value() if fares.account else None,
            free=_with_head(fares.free.value()) if fares.free else None,
            description=document.description,
            body_bytes_max=document.body_bytes_max,
            timeout_s=document.timeout,
            total_timeout_s=document.total_timeout,
            forward_auth=document.forward_auth,
        )

    def _check_free(self, document: RouteDocument, match: Match, at: str) -> None:
        """That what is free is taken at all, and that what is sold is not given away."""
        free, fares = document.fares.free, document.fares
        if free is None:
            return
        taken = {*match.methods, *(("HEAD",) if "GET" in match.methods else ())}
        given = {*free.methods, *(("HEAD",) if "GET" in free.methods else ())}
        for place, method in enumerate(free.methods):
            if taken and method not in taken:
                message = f"the route does not take {method}: add it to match.methods, or leave it out here"
                self._fault("FREE_METHOD_UNKNOWN", message, f"{at}.fares.free.methods[{place}]")
        sold = fares.exact is not None or fares.account is not None or fares.passes
        if sold and taken and given and taken <= given:
            message = "every call of this route is free, so nobody would pay: name the free methods, or leave the other fares out"
            self._fault("FARE_UNREACHABLE", message, f"{at}.fares")

    def _check_timeouts(self, document: RouteDocument, at: str) -> None:
        first, total = document.timeout, document.total_timeout
        if first is not None and total is not None and total < first:
            message = f"the whole exchange ({duration_text(total)}) cannot be shorter than the wait for its first byte ({duration_text(first)})"
            self._fault("DURATION_MALFORMED", message, f"{at}.total_timeout")

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
        if route.fares == FaresDocument()
    ]


def forward_auth_faults(document: RouteDocument, at: str) -> Iterator[Reason]:
    """What nobody can keep who only says yes or no at the beginning of a call: the edge forwards it by itself."""
    code = "FORWARD_AUTH_CANNOT_KEEP"
    if document.charge_on == "success":
        message = "an edge does not tell how a call ended: write charge_on: always, or leave forward_auth out"
        yield Reason(code, message, f"{at}.charge_on")
    for place, offer in enumerate(document.fares.passes):
        for name in _NEEDS_THE_GATEWAY:
            if getattr(offer.limits, name) is not None:
                message = f"an edge keeps neither bytes, rates, credits nor concurrency: leave {name} out, or forward_auth"
                yield Reason(code, message, f"{at}.fares.passes[{place}].limits.{name}")


#: Limits that are kept while a call is under way, or by its end.
_NEEDS_THE_GATEWAY: Final = (
    "upload_bytes", "download_bytes", "upload_rate", "download_rate", "credits", "concurrency",
)  # fmt: skip


def left_to_the_edge(routes: Sequence[tuple[int, RouteDocument]]) -> list[Reason]:
    """What a forward-auth route asks for and only the gateway does: for calls that are handed over to it, at most."""
    found: list[Reason] = []
    for place, route in routes:
        if not route.forward_auth:
            continue
        asked = [
            name
            for name in ("body_bytes_max", "timeout", "total_timeout")
            if getattr(route, name) is not None
        ]
        asked += [
            f"rewrite.{name}" for name in rewrite_document(route.rewrite.value()) if name != "set_headers"
        ]
        if asked:
            message = f"an edge that asks here forwards by itself: say the same in its configuration as {', '.join(asked)} do here"
            found.append(Reason("FORWARD_AUTH_LEFT_TO_EDGE", message, f"routes[{place}].{asked[0]}"))
    return found


def _with_head(free: FreeFare) -> FreeFare:
    """Who may GET may ask for the head alone."""
    if "GET" in free.methods and "HEAD" not in free.methods:
        return FreeFare((*free.methods, "HEAD"))
    return free


# ── back from values to documents ──────────────────────────────────────────────────────────────────────────────────


def gateway_sections(catalog: GatewayCatalog, surroundings: Surroundings) -> dict[str, Any]:
    """The catalog as the sections of a farebox.yaml that read back to it. What the installation fills in is left out."""
    sections: dict[str, Any] = {}
    if catalog.upstreams:
        sections["upstreams"] = {u.id: upstream_document(u) for u in catalog.upstreams}
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


def _route_document(route: Route, surroundings: Surroundings) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": route.id,
        "match": match_document(route.match),
        "upstream": route.upstream,
    }
    if route.description:
        document["description"] = route.description
    if rewrite := rewrite_document(route.rewrite):
        document["rewrite"] = rewrite
    if route.metric:
        document["metric"] = route.metric
    if route.charge_on != "always":
        document["charge_on"] = route.charge_on
    if route.body_bytes_max is not None:
        document["body_bytes_max"] = size_text(route.body_bytes_max)
    if route.timeout_s is not None:
        document["timeout"] = duration_text(route.timeout_s)
    if route.total_timeout_s is not None:
        document["total_timeout"] = duration_text(route.total_timeout_s)
    if route.forward_auth:
        document["forward_auth"] = True
    fares: dict[str, Any] = {}
    if route.exact:
        fares["exact"] = exact_document(route.exact, surroundings)
    if route.passes:
        fares["passes"] = [offer_document(offer) for offer in route.passes]
    if route.account:
        fares["account"] = (
            {"required_feature": route.account.required_feature} if route.account.required_feature else {}
        )
    if route.free:
        fares["free"] = free_document(route.free)
    if fares:
        document["fares"] = fares
    return document
