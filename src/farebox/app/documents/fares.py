"""The shapes of farebox.yaml that say how a route is paid for: exact fares, passes with their limits, accounts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from farebox.app.documents.faults import Document, fault, not_available_yet
from farebox.app.documents.scalars import DurationS, Id, Key, Name, Price, duration_text
from farebox.app.documents.surroundings import Surroundings
from farebox.base.money import Money, plain
from farebox.domain.access import AccountFare, ExactFare, PassOffer

OFFERS_MAX: Final = 100

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
    if offer.calls is not None:
        document["limits"] = {"calls": offer.calls}
    return document


def _price_text(price: Money) -> str:
    return f"{plain(price.major)} {price.asset.code}"
