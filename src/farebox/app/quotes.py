"""Quotes: what a pass costs, signed, so that no row is needed until somebody pays.

A quote is the same text for everybody for five minutes and good for about an hour: it can be cached, shown and bought
from any number of times. A signed price is kept even when the catalog changes meanwhile.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from farebox.app.offers import Offer, offers_for
from farebox.app.ports.chain import Chain
from farebox.app.ports.clock import Clock
from farebox.base.errors import Refused, refuse
from farebox.base.money import Money, plain
from farebox.base.time import to_rfc3339
from farebox.domain.access import GatewayCatalog, PassOffer, Route
from farebox.domain.limits import PassLimits, limits_document, limits_from_document
from farebox.protocols import strict_json
from farebox.protocols.passes import QUOTE_TYP, Keyring
from farebox.protocols.strict_json import Fields

QUOTE_LIFE_S: Final = 3600
#: Quotes are issued as if at the last such mark: the same offer then gives the same quote.
QUOTE_MARK_S: Final = 300
_CODE: Final = "quote_malformed"


@dataclass(frozen=True, slots=True)
class Quote:
    """A price promised by our signature until ``expires_at`` (real time). ``offer`` is how to pay it."""

    id: str
    route_id: str
    pass_offer_id: str
    name: str
    duration_s: int
    limits: PassLimits
    expires_at: datetime
    offer: Offer
    claims: dict[str, Any]


class Quotes:
    """``seed``: 32 bytes, ``derive_key(master, "quotes/<mode>")``."""

    def __init__(
        self,
        seed: bytes,
        mode: str,
        chains: Sequence[Chain],
        clock: Clock,
        catalog: Callable[[], GatewayCatalog],
        older_seeds: Sequence[bytes] = (),
    ) -> None:
        self._keys = Keyring(seed, older_seeds)
        self._audience = f"farebox/{mode}"
        self._chains = tuple(chains)
        self._clock = clock
        self._catalog = catalog

    def list(self, route_id: str | None = None) -> list[dict[str, Any]]:
        """What is for sale, as shown: every pass of every route (or of one), on every network where it can be paid."""
        return [
            self._shown(route, sold, offer)
            for route in self._catalog().routes
            if route_id in (None, route.id)
            for sold in route.passes
            for offer in offers_for(sold.price, route.exact.pay_to if route.exact else (), self._chains)
        ]

    def read(self, signed: str) -> Quote:
        """A quote of ours, expired or not. ``Refused`` ``quote_malformed`` (not ours), ``quote_unknown`` (no longer sold here)."""
        try:
            claims = self._keys.verify(signed, QUOTE_TYP, self._audience)
        except Refused as refused:
            raise refuse(
                _CODE, f"This is not a quote of this gateway: {refused.reason.message}.", "quote"
            ) from None
        return self._quote(claims)

    def expired(self, quote: Quote) -> bool:
        return self._clock.now() >= quote.expires_at

    def _shown(self, route: Route, sold: PassOffer, offer: Offer) -> dict[str, Any]:
        now = int(self._clock.now().timestamp())
        issued = now - now % QUOTE_MARK_S
        wanted = offer.requirements
        claims = {
            "aud": self._audience,
            "iat": issued,
            "exp": issued + QUOTE_LIFE_S,
            "route": route.id,
            "pass": sold.id,
            "name": sold.name,
            "price": plain(sold.price.major),
            "asset": sold.price.asset.code,
            "network": wanted.network,
            "amount": str(wanted.amount),
            "token": wanted.asset,
            "pay_to": wanted.pay_to,
            "duration_s": sold.duration_s,
            "limits": limits_document(sold.limits),
        }
        claims["jti"] = _quote_id(claims)
        return {
            "quote_id": claims["jti"],
            **{
                k: claims[k]
                for k in (
                    "route",
                    "pass",
                    "name",
                    "price",
                    "asset",
                    "network",
                    "amount",
                    "duration_s",
                    "limits",
                )
            },
            "expires_at": to_rfc3339(datetime.fromtimestamp(issued + QUOTE_LIFE_S, UTC)),
            "signed": self._keys.sign(QUOTE_TYP, claims),
        }

    def _quote(self, claims: Fields) -> Quote:
        route_id, network, token = claims.text("route"), claims.text("network"), claims.text("token")
        price = Money.parse(f"{claims.text('price')} {claims.text('asset')}")
        offer = next(
            (
                o
                for o in offers_for(price, ((network, claims.text("pay_to")),), self._chains)
                if o.requirements.network == network and o.token.address == token
            ),
            None,
        )
        if offer is None or self._catalog().route(route_id) is None:
            raise refuse(
                "quote_unknown",
                "What this quote offered is no longer sold here; ask for a new quote.",
                "quote",
            )
        return Quote(
            id=claims.text("jti"),
            route_id=route_id,
            pass_offer_id=claims.text("pass"),
            name=claims.text("name"),
            duration_s=claims.whole("duration_s", 1, 1 << 40),
            limits=limits_from_document(claims.mapping("limits")),
            expires_at=datetime.fromtimestamp(claims.whole("exp", 0, 1 << 37), UTC),
            offer=offer,
            claims=claims.all(),
        )


def _quote_id(claims: dict[str, Any]) -> str:
    digest = hashlib.sha256(strict_json.dumps(claims).encode()).digest()
    return "quo_" + base64.b32encode(digest[:15]).decode().lower()
