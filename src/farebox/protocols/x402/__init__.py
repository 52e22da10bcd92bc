"""x402: how a payment is asked for, offered and receipted over HTTP. Version 2 of the wire; sans-IO."""

from farebox.protocols.x402.codec import HEADER_CHARACTERS_MAX, decode_header, encode_header
from farebox.protocols.x402.messages import (
    ExactEvmPayload,
    PaymentPayload,
    PaymentRequired,
    PaymentRequirements,
    Resource,
    SettlementResponse,
)

__all__ = [
    "HEADER_CHARACTERS_MAX",
    "ExactEvmPayload",
    "PaymentPayload",
    "PaymentRequired",
    "PaymentRequirements",
    "Resource",
    "SettlementResponse",
    "decode_header",
    "encode_header",
]
