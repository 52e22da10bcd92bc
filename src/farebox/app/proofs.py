"""Whether a payment is good for what was offered. Everything that can be known without asking anybody."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from farebox.app.offers import Offer
from farebox.base.errors import Reason, Refused
from farebox.protocols.evm import TransferAuthorization, recover, transfer_digest
from farebox.protocols.x402 import ExactEvmPayload, PaymentPayload, PaymentRequirements, decode_header

#: An authorisation must outlive its settlement.
SETTLE_MARGIN_S: Final = 6

_LAST_INSTANT: Final = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class GoodProof:
    """Signed by ``payer`` (lower-case address) for exactly this offer, and within its window."""

    offer: Offer
    payment: ExactEvmPayload
    payment_key: bytes
    payer: str

    @property
    def valid_before(self) -> datetime:
        """Capped where calendars end: the number on the wire may have 78 digits."""
        seconds = self.payment.authorization.valid_before
        return datetime.fromtimestamp(seconds, UTC) if seconds < _LAST_INSTANT.timestamp() else _LAST_INSTANT


@dataclass(frozen=True, slots=True)
class BadProof:
    """Not good for this offer. ``payment_key`` is set when the signature itself is right: then the payment may be a used one."""

    reason: Reason
    payment_key: bytes | None = None


def check(proof: bytes, offers: Sequence[Offer], now_s: float) -> GoodProof | BadProof:
    """Read a PAYMENT-SIGNATURE value and hold it against the offers (``now_s``: unix time).

    Raises ``Refused`` ``payment_malformed`` for what cannot be read. Facts of a bad one carry the x402 ``reason``.
    """
    payload = PaymentPayload.from_wire(decode_header(proof))
    accepted = payload.accepted
    asset = accepted.asset.lower()
    offer = next(
        (
            o
            for o in offers
            if o.requirements.network == accepted.network and o.token.address.lower() == asset
        ),
        None,
    )
    if offer is None:
        return _bad_choice(accepted, offers)
    payment = payload.exact_evm()
    fault = _fault(payment.authorization, accepted, offer, now_s)
    try:
        signer = recover(transfer_digest(offer.domain, payment.authorization), payment.signature)
    except Refused as exc:
        return BadProof(fault or _invalid("invalid_exact_evm_payload_signature", exc.reason.message))
    if signer != payment.authorization.payer:
        return BadProof(
            fault
            or _invalid(
                "invalid_exact_evm_payload_signature", "the signature was not made by authorization.from"
            )
        )
    key = payment_key(accepted.network, offer.asset, payment.authorization)
    if fault is not None:
        return BadProof(fault, key)
    return GoodProof(offer, payment, key, "0x" + signer.hex())


def payment_key(network: str, asset: bytes, authorization: TransferAuthorization) -> bytes:
    """What makes a payment one: built from decoded bytes, so no spelling of the same payment is a second one."""
    return hashlib.sha256(
        b"\x00".join((b"eip3009", network.encode(), asset + authorization.payer + authorization.nonce))
    ).digest()


def _fault(
    authorization: TransferAuthorization, accepted: PaymentRequirements, offer: Offer, now_s: float
) -> Reason | None:
    wanted = offer.requirements
    if (field := accepted.difference(wanted)) is not None:
        return _invalid(
            "invalid_payment_requirements",
            f"accepted.{field} is not what is offered here; take one entry of accepts as it is",
            f"accepted.{field}",
        )
    if authorization.recipient != offer.recipient:
        return _invalid(
            "invalid_exact_evm_payload_recipient_mismatch",
            f"the authorization pays somebody else; it must pay {wanted.pay_to}",
            "payload.authorization.to",
        )
    if authorization.value != wanted.amount:
        return _invalid(
            "invalid_exact_evm_payload_authorization_value_mismatch",
            f"the authorization is over {authorization.value} units; it must be over {wanted.amount}",
            "payload.authorization.value",
        )
    if authorization.valid_after > now_s:
        return _invalid(
            "invalid_exact_evm_payload_authorization_valid_after",
            "the authorization is not valid yet",
            "payload.authorization.validAfter",
        )
    if authorization.valid_before < now_s + SETTLE_MARGIN_S:
        return _invalid(
            "invalid_exact_evm_payload_authorization_valid_before",
            f"the authorization has expired, or will within {SETTLE_MARGIN_S} s; sign a new one",
            "payload.authorization.validBefore",
        )
    return None


def _bad_choice(accepted: PaymentRequirements, offers: Sequence[Offer]) -> BadProof:
    networks = sorted({o.requirements.network for o in offers})
    if accepted.network not in networks:
        reason = _invalid(
            "invalid_network",
            f"{accepted.network} is not taken here; {', '.join(networks)} is",
            "accepted.network",
        )
    else:
        reason = _invalid("invalid_payment_requirements", "this asset is not taken here", "accepted.asset")
    return BadProof(reason)


def _invalid(wire_reason: str, message: str, field: str | None = None) -> Reason:
    return Reason("payment_invalid", message, field, {"reason": wire_reason})
