"""Secrets that do not show themselves, and the keys derived from the one master key.

One key per purpose and per mode: the purpose string carries the mode (``tokens/sandbox``), so that what a sandbox
signed is worthless in live mode. Derivation is HMAC-SHA256 under the master key, domain separated by a fixed label.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from typing import Final

_LABEL: Final = b"farebox/derived-key/1\x00"

#: ``fbx_sk_`` opens the control API, ``fbx_ck_`` the gateway for one customer.
ADMIN_KEY_PREFIX: Final = "fbx_sk_"
CUSTOMER_KEY_PREFIX: Final = "fbx_ck_"


class Secret:
    """A text whose ``repr`` and ``str`` are ``***``. Only ``reveal`` gives it out; equality takes constant time."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret is not pickled")


def derive_key(master: Secret, purpose: str) -> bytes:
    """32 bytes for one purpose, such as ``tokens/sandbox``. The same master and purpose give the same key, always."""
    return hmac.new(master.reveal().encode(), _LABEL + purpose.encode(), hashlib.sha256).digest()


def admin_key(master: Secret) -> str:
    """The first admin key, ``fbx_sk_…``: derived, so that it is known to whoever holds the master key."""
    return ADMIN_KEY_PREFIX + _base32(derive_key(master, "admin-key")[:20])


def new_admin_key() -> str:
    """A fresh control API key: 160 random bits."""
    return ADMIN_KEY_PREFIX + _base32(os.urandom(20))


def new_customer_key() -> str:
    """A fresh gateway key of a customer: 160 random bits."""
    return CUSTOMER_KEY_PREFIX + _base32(os.urandom(20))


def key_hash(key: str) -> bytes:
    """What the database keeps of a key: SHA-256. The keys have 160 random bits, so no salt and no slow hash is needed."""
    return hashlib.sha256(key.encode()).digest()


def new_master_key() -> str:
    """A fresh master key: 256 random bits in base64."""
    return base64.b64encode(os.urandom(32)).decode()


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().lower()
