"""Pass tokens: the signed receipt of a pass, checked without a database. The pass row stays the authority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from farebox.app.ports.clock import Clock
from farebox.base.errors import Reason, Refused
from farebox.domain.limits import limits_document
from farebox.domain.passes import Pass
from farebox.protocols.passes import PASS_TYP, Keyring, read_typ

#: Verified tokens remembered by a process: enough for every live token of a busy gateway (about 1 KiB each).
TOKENS_KNOWN_MAX: Final = 20_000
_EXPIRY_S_MAX: Final = 253_402_300_799  # the last second of year 9999


@dataclass(frozen=True, slots=True)
class PassClaims:
    """What a good token says. ``limits`` is what was promised (``{"calls": 1000}``), not what is left."""

    pass_id: str
    route_id: str
    expires_at: datetime
    limits: Mapping[str, Any]


class PassTokens:
    """``seed``: 32 bytes, ``derive_key(master, "tokens/<mode>")``. ``older_seeds`` still verify (rotation with overlap).

    Expiry in a token is real time: a sandbox's test clock moves what the pass row says, never a signature.
    """

    def __init__(self, seed: bytes, mode: str, clock: Clock, older_seeds: Sequence[bytes] = ()) -> None:
        self._keys = Keyring(seed, older_seeds)
        self._audience = f"farebox/{mode}"
        self._clock = clock
        self._known: dict[str, tuple[PassClaims, float]] = {}

    def sign(self, pass_: Pass) -> str:
        """The token of a pass. The same pass always gives the same token."""
        return self._keys.sign(
            PASS_TYP,
            {
                "aud": self._audience,
                "jti": pass_.id,
                "iat": int(pass_.starts_at.timestamp()),
                "exp": int(pass_.expires_at.timestamp()),
                "route": pass_.route_id,
                "limits": limits_document(pass_.limits),
            },
        )

    def verify(self, token: str) -> PassClaims | Reason:
        """The claims of a token of ours, or why not: ``credential_unknown`` (not ours, forged) or ``pass_ended`` (expired). Cached."""
        known = self._known.get(token)
        if known is None:
            try:
                known = self._read(token)
            except Refused as refused:
                return Reason("credential_unknown", f"This pass token is not good: {refused.reason.message}.")
            if len(self._known) >= TOKENS_KNOWN_MAX:
                del self._known[next(iter(self._known))]  # the one known longest
            self._known[token] = known
        claims, expires_s = known
        if self._clock.now().timestamp() >= expires_s:
            self._known.pop(token, None)
            return Reason("pass_ended", "This pass has expired; buy another one from /.farebox/quotes.")
        return claims

    def jwks(self) -> dict[str, Any]:
        """The public keys as a JWK Set (RFC 7517)."""
        return {"keys": self._keys.jwks()}

    def _read(self, token: str) -> tuple[PassClaims, float]:
        claims = self._keys.verify(token, PASS_TYP, self._audience)
        expires_s = claims.whole("exp", 0, _EXPIRY_S_MAX)
        read = PassClaims(
            claims.text("jti"),
            claims.text("route"),
            datetime.fromtimestamp(expires_s, UTC),
            claims.mapping("limits"),
        )
        return read, float(expires_s)


def is_pass_token(bearer: str) -> bool:
    """Whether a Bearer value is a JWS with our ``typ`` (a foreign Bearer belongs to the upstream). Reads the header only."""
    return bearer.startswith("ey") and read_typ(bearer) == PASS_TYP
