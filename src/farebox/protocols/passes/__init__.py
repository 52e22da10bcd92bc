"""Signed statements of ours: pass tokens and quotes, as compact JWS with Ed25519 (RFC 7515, RFC 8037)."""

from farebox.protocols.passes.jws import PASS_TYP, QUOTE_TYP, Keyring, read_typ

__all__ = ["PASS_TYP", "QUOTE_TYP", "Keyring", "read_typ"]
