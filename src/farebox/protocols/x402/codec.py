"""Header values: standard base64 with padding over raw UTF-8 JSON, capped before anything is decoded."""

from __future__ import annotations

import binascii
from typing import Any, Final

from farebox.base.errors import refuse
from farebox.protocols import strict_json

#: Longer payment headers are refused unread.
HEADER_CHARACTERS_MAX: Final = 10_000

#: The code of every complaint about the form of a payment.
MALFORMED: Final = "payment_malformed"


def encode_header(message: dict[str, Any]) -> bytes:
    """The header value of a wire message."""
    return binascii.b2a_base64(strict_json.dumps(message).encode(), newline=False)


def decode_header(value: bytes | str, characters_max: int = HEADER_CHARACTERS_MAX) -> dict[str, Any]:
    """The JSON object in a header value. Raises ``Refused`` ``payment_malformed``, and nothing else."""
    if len(value) > characters_max:
        raise refuse(
            MALFORMED, f"the payment header has {len(value)} characters; at most {characters_max} are read"
        )
    try:
        text = binascii.a2b_base64(value, strict_mode=True)
    except ValueError:  # binascii.Error is one; so is a str that is not ASCII
        raise refuse(
            MALFORMED, "the payment header is not base64 (standard alphabet, with padding)"
        ) from None
    message = strict_json.loads(text, MALFORMED)
    if not isinstance(message, dict):
        raise refuse(MALFORMED, "the payment header does not hold a JSON object")
    return message
