"""The gateway's own pages: quotes, purchases, token keys."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs

from farebox.app.admission import Answer, Headers, Refusal
from farebox.app.pass_tokens import PassTokens
from farebox.app.purchases import PURCHASES_PATH, Purchases
from farebox.base.errors import Reason
from farebox.protocols import strict_json

#: What the gateway may buffer of a request to these pages.
SITE_BODY_BYTES_MAX: Final = 16_384

_OURS: Final = "/.farebox/"
_QUOTES: Final = "/.farebox/quotes"
_JWKS: Final = "/.well-known/jwks.json"


class Site:
    """Codes it refuses with: ``not_found``, ``method_not_allowed`` (with Allow), ``body_too_large``, ``purchase_malformed``,
    ``quote_malformed``, ``quote_unknown``, ``quote_expired``, ``purchase_unknown``, and those of ExactFares."""

    def __init__(self, purchases: Purchases, tokens: PassTokens) -> None:
        self._purchases = purchases
        self._tokens = tokens

    def owns(self, path: str) -> bool:
        """Everything below ``/.farebox/``, and ``/.well-known/jwks.json``."""
        return path.startswith(_OURS) or path == _JWKS

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal:
        """``headers`` in lower case as in ``Call``; ``query`` without the question mark; ``host`` is read from the headers."""
        if len(body) > SITE_BODY_BYTES_MAX:
            return Refusal(Reason("body_too_large", f"at most {SITE_BODY_BYTES_MAX} bytes are read here"))
        reading = method in ("GET", "HEAD")
        if path == _JWKS:
            return _json(self._tokens.jwks(), b"public, max-age=300") if reading else _only(b"GET, HEAD")
        if path == _QUOTES:
            return self._quotes(query) if reading else _only(b"GET, HEAD")
        if path == PURCHASES_PATH:
            if method != "POST":
                return _only(b"POST")
            return await self._purchases.buy(
                body,
                _header(headers, b"idempotency-key"),
                _header(headers, b"payment-signature"),
                (_header(headers, b"host") or b"").decode("latin-1"),
            )
        if path.startswith(PURCHASES_PATH + "/"):
            if not reading:
                return _only(b"GET, HEAD")
            return await self._purchases.show(
                path.removeprefix(PURCHASES_PATH + "/"), _header(headers, b"idempotency-key")
            )
        return Refusal(Reason("not_found", "There is no such page here."))

    def _quotes(self, query: str) -> Answer:
        asked = parse_qs(query, errors="replace") if len(query) <= 2048 else {}
        route = asked.get("route", [None])[0]
        return _json({"quotes": self._purchases.quotes(route)}, b"public, max-age=60")


def _json(document: dict[str, object], cache_control: bytes) -> Answer:
    return Answer(
        200,
        [(b"Content-Type", b"application/json"), (b"Cache-Control", cache_control)],
        strict_json.dumps(document).encode(),
    )


def _only(methods: bytes) -> Refusal:
    return Refusal(
        Reason("method_not_allowed", f"This page answers {methods.decode()} only."), [(b"Allow", methods)]
    )


def _header(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)
