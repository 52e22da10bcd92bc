"""The shapes of farebox.yaml that say how a route is paid for: exact fares, passes with their limits, accounts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from farebox.app.documents.faults import Document, fault, not_available_yet
from farebox.app.documents.routing import Methods
from farebox.app.documents.scalars import (
    DurationS,
    Id,
    Key,
    Name,
    Price,
    SizeBytes,
    duration_text,
    size_text,
)
from farebox.app.documents.surroundings import Surroundings
from farebox.base.money import Money, plain
from farebox.domain.access import AccountFare, ExactFare, FreeFare, PassOffer
from farebox.domain.limits import LimitKind, PassLimits, Rate, RequestWindow
from farebox.domain.passes import LIMIT_MAX, RATE_WINDOW_S_MAX, REQUEST_WINDOW_S_MAX

OFFERS_MAX: Final = 100
#: The window of a rate that names none.
RATE_WINDOW_S: Final = Rate(1).window_s

_EVM_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}\Z", re.ASCII)
_NETWORK = re.compile(r"[-a-z0-9]{3,8}:[-_a-zA-Z0-9]{1,32}\Z", re.ASCII)


def _network(value: str) -> str:
    if not _NETWORK.match(value):
        raise fault("NETWORK_MALFORMED", f"{value[:60]!r} is not a CAIP-2 network such as eip155:8453")
    return value


Network = Annotated[str, AfterValidator(_network)]


def address_fault(network: str, address: str) -> str | None:
    """What is wrong with an address on a network; None when nothing is, or when the network's form is not known here."""
    if network.startswith("eip155:") and not _EVM_ADDRESS.match(address):
        return f"{address[:60]!r} is not an address on {network}: write 0x and 40 hexadecimal digits"
    if network.startswith("eip155:") and int(address, 16) == 0:
        return f"the zero address on {network} belongs to nobody: money sent there is lost"
    return None


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


def _count(kind: LimitKind) -> Any:
    return Field(strict=True, ge=1, le=LIMIT_MAX[kind])


def _window(window_s_max: int) -> AfterValidator:
    def check(window_s: int) -> int:
        if window_s > window_s_max:
            raise fault("DURATION_MALFORMED", f"a window lasts at most {duration_text(window_s_max)} here")
        return window_s

    return AfterValidator(check)


class RateDocument(Document):
    """Bytes a second, kept over each window. ``100kB/s`` is the same with a window of a minute."""

    bytes_per_second: Annotated[SizeBytes, Field(le=LIMIT_MAX["upload_rate"])]
    window: Annotated[DurationS, _window(RATE_WINDOW_S_MAX)] = RATE_WINDOW_S

    def value(self) -> Rate:
        return Rate(self.bytes_per_second, self.window)


def _rate(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    size, slash, second = value.partition("/")
    if not slash or second.strip() not in ("s", "second"):
        raise fault(
            "SIZE_MALFORMED",
            f"{value[:40]!r} is not a rate: write a size a second such as 100kB/s, or"
            " {bytes_per_second: 100000, window: 60s}",
        )
    return {"bytes_per_second": size.strip()}


_RateDocument = Annotated[RateDocument, BeforeValidator(_rate)]


class RequestWindowDocument(Document):
    """So many calls in each window; windows begin at whole multiples of their length since 1970."""

    count: Annotated[int, _count("requests")]
    window: Annotated[DurationS, _window(REQUEST_WINDOW_S_MAX)]

    def value(self) -> RequestWindow:
        return RequestWindow(self.count, self.window)


class PassLimitsDocument(Document):
    """What a pass holds. What is left out is not limited."""

    calls: Annotated[int, _count("calls")] | None = None
    upload_bytes: SizeBytes | None = None
    download_bytes: SizeBytes | None = None
    credits: Annotated[int, _count("credits")] | None = None
    concurrency: Annotated[int, _count("concurrency")] | None = None
    requests: RequestWindowDocument | None = None
    upload_rate: _RateDocument | None = None
    download_rate: _RateDocument | None = None

    def value(self) -> PassLimits:
        return PassLimits(
            calls=self.calls,
            upload_bytes=self.upload_bytes,
            download_bytes=self.download_bytes,
            credits=self.credits,
            concurrency=self.concurrency,
            requests=self.requests.value() if self.requests else None,
            upload_rate=self.upload_rate.value() if self.upload_rate else None,
            download_rate=self.download_rate.value() if self.download_rate else None,
        )


class PassOfferDocument(Document):
    """A pass on sale."""

    not_yet: ClassVar[Mapping[str, str]] = {"splits": "splitting a payment is"}

    id: Id
    name: Name
    price: Price
    duration: DurationS
    limits: PassLimitsDocument = PassLimitsDocument()

    def value(self) -> PassOffer:
        return PassOffer(self.id, self.name, self.price, self.duration, self.limits.value())


class AccountFareDocument(Document):
    """Calls by API key. No ``required_feature``: any active subscription will do."""

    required_feature: Key | None = None

    def value(self) -> AccountFare:
        return AccountFare(self.required_feature)


class FreeFareDocument(Document):
    """Calls that cost nothing and need no credential. No ``methods``: all of them."""

    methods: Methods = ()

    def value(self) -> FreeFare:
        return FreeFare(self.methods)


class FaresDocument(Document):
    """The ways a route is paid for."""

    exact: ExactFareDocument | None = None
    passes: Annotated[tuple[PassOfferDocument, ...], Field(max_length=OFFERS_MAX)] = ()
    account: AccountFareDocument | None = None
    free: FreeFareDocument | None = None

    @model_validator(mode="after")
    def _free_leaves_something_to_sell(self) -> Self:
        if self.free and not self.free.methods and (self.exact or self.passes or self.account):
            raise fault(
                "FARE_UNREACHABLE",
                "every call of this route is free: name the free methods, or take the other fares out",
            )
        return self


def exact_document(exact: ExactFare, surroundings: Surroundings) -> dict[str, Any]:
    document: dict[str, Any] = {"price": _price_text(exact.price)}
    if dict(exact.pay_to) != dict(surroundings.pay_to):
        document["pay_to"] = dict(exact.pay_to)
    if exact.flow != "authorization":
        document["flow"] = exact.flow
    if exact.schemes != ("exact",):
        document["schemes"] = list(exact.schemes)
    return document


def offer_document(offer: PassOffer) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": offer.id,
        "name": offer.name,
        "price": _price_text(offer.price),
        "duration": duration_text(offer.duration_s),
    }
    if limits := pass_limits_document(offer.limits):
        document["limits"] = limits
    return document


def pass_limits_document(limits: PassLimits) -> dict[str, Any]:
    """The inverse of ``PassLimitsDocument.value``; what is not limited is left out."""
    document: dict[str, Any] = {}
    for name in ("calls", "credits", "concurrency"):
        if (limit := getattr(limits, name)) is not None:
            document[name] = limit
    for name in ("upload_bytes", "download_bytes"):
        if (size := getattr(limits, name)) is not None:
            document[name] = size_text(size)
    if (requests := limits.requests) is not None:
        document["requests"] = {"count": requests.count, "window": duration_text(requests.window_s)}
    for name in ("upload_rate", "download_rate"):
        rate: Rate | None = getattr(limits, name)
        if rate is None:
            continue
        size = size_text(rate.bytes_per_second)
        if rate.window_s == RATE_WINDOW_S and isinstance(size, str):
            document[name] = f"{size}/s"
        else:
            document[name] = {"bytes_per_second": size, "window": duration_text(rate.window_s)}
    return document


def free_document(free: FreeFare) -> dict[str, Any]:
    return {"methods": list(free.methods)} if free.methods else {}


def _price_text(price: Money) -> str:
    return f"{plain(price.major)} {price.asset.code}"
