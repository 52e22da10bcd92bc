"""Compact JWS, one algorithm, keys of our own only.

The header is exactly ``{"alg","kid","typ"}``. A kid belongs to one key and so to one algorithm; ``jwk``, ``jku``, ``x5u``,
``crit`` and every other header are refused, so a token can never say how it wants to be checked (RFC 8725).
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Sequence
from typing import Any, Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from farebox.base.errors import Refused, refuse
from farebox.protocols import strict_json
from farebox.protocols.strict_json import Fields

PASS_TYP: Final = "farebox-pass+jwt"  # noqa: S105  a media type
QUOTE_TYP: Final = "farebox-quote+jwt"

TOKEN_CHARACTERS_MAX: Final = 4096
_HEADERS: Final = frozenset({"alg", "kid", "typ"})
_CODE: Final = "token_invalid"


class Keyring:
    """One signing key and the older ones that still verify. A seed is 32 bytes."""

    def __init__(self, seed: bytes, older_seeds: Sequence[bytes] = ()) -> None:
        self._key = SigningKey(seed)
        self._kid = _kid(self._key.verify_key)
        keys = [self._key.verify_key, *(SigningKey(old).verify_key for old in older_seeds)]
        self._known = {_kid(key): key for key in keys}

    def sign(self, typ: str, claims: dict[str, Any]) -> str:
        """A token. Ed25519 is deterministic: the same claims give the same token."""
        header = {"alg": "EdDSA", "kid": self._kid, "typ": typ}
        signed = (
            _encode(strict_json.dumps(header).encode()) + "." + _encode(strict_json.dumps(claims).encode())
        )
        return signed + "." + _encode(self._key.sign(signed.encode()).signature)

    def verify(self, token: str, typ: str, audience: str) -> Fields:
        """The claims of a token of this type, for this audience, signed by a key of ours. Expiry is the caller's to check.

        Raises ``Refused`` ``token_invalid``, and nothing else.
        """
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise refuse(_CODE, f"a token has at most {TOKEN_CHARACTERS_MAX} characters")
        parts = token.split(".")
        if len(parts) != 3:
            raise refuse(_CODE, "a token has three parts")
        header = Fields(strict_json.loads(_decode(parts[0]), _CODE), _CODE)
        header.only(_HEADERS)
        if header.text("typ") != typ:
            raise refuse(_CODE, f"the token is not of the type {typ}")
        key = self._known.get(header.text("kid"))
        if key is None:
            raise refuse(_CODE, "the token is signed by a key that is not, or no longer, known here")
        if header.text("alg") != "EdDSA":
            raise refuse(_CODE, "the key of this token signs with EdDSA only")
        try:
            key.verify(f"{parts[0]}.{parts[1]}".encode(), _decode(parts[2]))
        except (BadSignatureError, ValueError, TypeError):
            raise refuse(_CODE, "the signature of the token is wrong") from None
        claims = Fields(strict_json.loads(_decode(parts[1]), _CODE), _CODE)
        if claims.text("aud") != audience:
            raise refuse(_CODE, "the token is meant for someone else")
        return claims

    def jwks(self) -> list[dict[str, str]]:
        """The public keys, the signing one first (RFC 8037 §2)."""
        return [
            {
                "kty": "OKP",
                "crv": "Ed25519",
                "alg": "EdDSA",
                "use": "sig",
                "kid": kid,
                "x": _encode(bytes(key)),
            }
            for kid, key in self._known.items()
        ]


def read_typ(token: str) -> str | None:
    """The ``typ`` a token claims to have, unverified: enough to know whose token it is. None: not a JWS."""
    head, dot, rest = token.partition(".")
    if not dot or rest.count(".") != 1 or len(head) > 512:
        return None
    try:
        header = strict_json.loads(_decode(head), _CODE)
    except Refused:
        return None
    typ = header.get("typ") if isinstance(header, dict) else None
    return typ if isinstance(typ, str) else None


def _kid(key: VerifyKey) -> str:
    """The start of the key's RFC 7638 thumbprint."""
    thumbprint = f'{{"crv":"Ed25519","kty":"OKP","x":"{_encode(bytes(key))}"}}'
    return _encode(hashlib.sha256(thumbprint.encode()).digest())[:16]


def _encode(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode().rstrip("=").translate(_TO_URL)


def _decode(text: str) -> bytes:
    """base64url without padding, one spelling only: a second one would be a second token with the same signature."""
    if not text.isascii() or "=" in text or "+" in text or "/" in text:
        raise refuse(_CODE, "a token is base64url without padding")
    try:
        data = binascii.a2b_base64(text.translate(_FROM_URL) + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError:
        raise refuse(_CODE, "a token is base64url without padding") from None
    if _encode(data) != text:
        raise refuse(_CODE, "a token is base64url without padding")
    return data


_TO_URL: Final = str.maketrans("+/", "-_")
_FROM_URL: Final = str.maketrans("-_", "+/")
