"""Buying a pass from a gateway: choose a quote, ask for it, read what was bought."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from urllib.parse import quote as escaped

import httpx

from farebox.base.errors import FareboxError
from farebox.base.money import parse_decimal
from farebox.base.time import parse_instant
from farebox.protocols import strict_json
from farebox.protocols.strict_json import Fields


class PassNotSold(FareboxError):
    """The gateway sold nothing; the message is its own."""


@dataclass(frozen=True, slots=True)
class BoughtPass:
    """A pass and the key to ask for it again (``nonce``, the purchase's Idempotency-Key: keep it as secret as the token)."""

    pass_id: str
    purchase_id: str
    route: str
    token: str
    expires_at: datetime
    nonce: str

    @property
    def headers(self) -> dict[str, str]:
        """What to send with each call."""
        return {"Authorization": f"Bearer {self.token}"}


@dataclass(frozen=True, slots=True)
class ListedQuote:
    """A pass on sale. ``signed`` is what is bought with."""

    offer: str
    name: str
    price: Decimal
    asset: str
    signed: str


def quotes_url(gateway_url: str, route: str | None) -> str:
    return f"{gateway_url.rstrip('/')}/.farebox/quotes" + (
        f"?route={escaped(route, safe='')}" if route else ""
    )


def choose(listed: httpx.Response, offer: str | None) -> ListedQuote:
    """The quote of an offer, or the cheapest."""
    if listed.status_code != 200:
        raise PassNotSold(_complaint(listed))
    rows = Fields(strict_json.loads(listed.content)).array("quotes", 10_000)
    quotes = [_listed(Fields(row, path=f"quotes[{n}]")) for n, row in enumerate(rows)]
    fitting = [q for q in quotes if offer in (None, q.offer)]
    if not fitting:
        names = ", ".join(sorted({q.offer for q in quotes})) or "none"
        raise PassNotSold(
            f"no pass {offer!r} is sold there; these are: {names}" if offer else "no pass is sold there"
        )
    return min(fitting, key=lambda q: q.price)


def purchase(
    client: httpx.Client | httpx.AsyncClient,
    gateway_url: str,
    quote: ListedQuote,
    buyer: str,
    nonce: str | None,
) -> httpx.Request:
    """The request that buys; it is met with a 402 first, which the paying client pays."""
    return client.build_request(
        "POST",
        f"{gateway_url.rstrip('/')}/.farebox/purchases",
        json={"quote": quote.signed, "buyer": buyer, "rail": "exact"},
        headers={"Idempotency-Key": nonce or secrets.token_urlsafe(24)},
    )


def bought(answer: httpx.Response) -> BoughtPass:
    """What was bought. ``PassNotSold`` with the gateway's reason."""
    if answer.status_code not in (200, 201):
        raise PassNotSold(_complaint(answer))
    fields = Fields(strict_json.loads(answer.content))
    return BoughtPass(
        pass_id=fields.text("pass_id"),
        purchase_id=fields.text("purchase_id"),
        route=fields.text("route"),
        token=fields.text("token", 4096),
        expires_at=parse_instant(fields.text("expires_at")),
        nonce=answer.request.headers["idempotency-key"],
    )


def _listed(row: Fields) -> ListedQuote:
    return ListedQuote(
        row.text("pass"),
        row.text("name"),
        parse_decimal(row.text("price")),
        row.text("asset"),
        row.text("signed", 4096),
    )


def _complaint(answer: httpx.Response) -> str:
    try:
        said = answer.json().get("detail")
    except (ValueError, AttributeError):
        said = None
    return f"{answer.status_code}: {said or answer.reason_phrase}"
