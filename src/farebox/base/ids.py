"""Identifiers: a prefix that says what the thing is, then 26 characters that sort by time of making."""

from __future__ import annotations

import os
import time
from typing import NewType

CustomerId = NewType("CustomerId", str)
SubscriptionId = NewType("SubscriptionId", str)
InvoiceId = NewType("InvoiceId", str)
PassId = NewType("PassId", str)
PaymentId = NewType("PaymentId", str)
GrantId = NewType("GrantId", str)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32: no i, l, o, u
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]


def new_id(prefix: str) -> str:
    """A fresh id such as ``inv_06f3…``: 48 bits of milliseconds, 80 random bits (the ULID layout)."""
    return f"{prefix}_{sortable_token()}"


def sortable_token() -> str:
    """26 base-32 characters, later ones sort after earlier ones (to the millisecond)."""
    number = (int(time.time() * 1000) << 80) | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[(number >> shift) & 0x3FF] for shift in range(120, -1, -10)])
