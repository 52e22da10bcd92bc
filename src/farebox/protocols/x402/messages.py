"""The messages of x402 version 2, as frozen values. ``from_wire`` is strict and raises ``Refused`` ``payment_malformed``.

Source: the x402 v2 specification (core and transports/http); amounts, times and nonces are strings on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from farebox.base.errors import Refused, refuse
from farebox.protocols.evm import TransferAuthorization, checksum_address, parse_address, parse_bytes32
from farebox.protocols.strict_json import Fields
from farebox.protocols.x402.codec import MALFORMED

VERSION: Final = 2
_TIMEOUT_S_MAX: Final = 1_000_000_000
_OFFERS_MAX: Final = 32
_NETWORK: Final = re.compile(r"[-a-z0-9]{3,8}:[-_a-zA-Z0-9]{1,32}\Z", re.ASCII)
_HEX: Final = re.compile(r"0x(?:[0-9a-fA-F]{2}){1,2048}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Resource:
    """What is paid for, for people and logs. Nothing in it is signed and nothing here believes it."""

    url: str
    description: str | None = None
    mime_type: str | None = None

    def to_wire(self) -> dict[str, Any]:
        return _without_none({"url": self.url, "description": self.description, "mimeType": self.mime_type})

    @classmethod
    def from_wire(cls, fields: Fields) -> Resource:
        return cls(
            fields.text("url", 4096),
            fields.optional_text("description", 4096),
            fields.optional_text("mimeType", 256),
        )


@dataclass(frozen=True, slots=True)
class PaymentRequirements:
    """One way to pay: ``amount`` whole units of ``asset`` on ``network`` (CAIP-2) to ``pay_to``."""

    scheme: str
    network: str
    amount: int
    asset: str
    pay_to: str
    max_timeout_s: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "network": self.network,
            "amount": str(self.amount),
            "asset": self.asset,
            "payTo": self.pay_to,
            "maxTimeoutSeconds": self.max_timeout_s,
            "extra": dict(self.extra),
        }

    @classmethod
    def from_wire(cls, fields: Fields) -> PaymentRequirements:
        network = fields.text("network", 64)
        if not _NETWORK.match(network):
            fields.wrong("network", "is not a CAIP-2 network such as eip155:84532")
        return cls(
            scheme=fields.text("scheme", 64),
            network=network,
            amount=fields.whole_text("amount"),
            asset=fields.text("asset", 128),
            pay_to=fields.text("payTo", 128),
            max_timeout_s=fields.whole("maxTimeoutSeconds", 0, _TIMEOUT_S_MAX),
            extra=fields.mapping("extra"),
        )

    def difference(self, other: PaymentRequirements) -> str | None:
        """The first wire field in which two differ, or None. Addresses are compared without regard to case."""
        for name, ours, theirs in (
            ("scheme", self.scheme, other.scheme),
            ("network", self.network, other.network),
            ("asset", self.asset.lower(), other.asset.lower()),
            ("payTo", self.pay_to.lower(), other.pay_to.lower()),
            ("amount", self.amount, other.amount),
            ("maxTimeoutSeconds", self.max_timeout_s, other.max_timeout_s),
            ("extra", self.extra, other.extra),
        ):
            if ours != theirs:
                return name
        return None


@dataclass(frozen=True, slots=True)
class PaymentRequired:
    """The challenge of a 402."""

    resource: Resource | None
    accepts: tuple[PaymentRequirements, ...]
    error: str | None = None
    extensions: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return _without_none(
            {
                "x402Version": VERSION,
                "error": self.error,
                "resource": self.resource and self.resource.to_wire(),
                "accepts": [offer.to_wire() for offer in self.accepts],
                "extensions": dict(self.extensions) or None,
            }
        )

    @classmethod
    def from_wire(cls, message: object) -> PaymentRequired:
        fields = _versioned(message)
        return cls(
            resource=None
            if fields.raw("resource") is None
            else Resource.from_wire(fields.fields("resource")),
            accepts=tuple(
                PaymentRequirements.from_wire(Fields(offer, MALFORMED, f"accepts[{n}]"))
                for n, offer in enumerate(fields.array("accepts", _OFFERS_MAX))
            ),
            error=fields.optional_text("error", 1024),
            extensions=fields.mapping("extensions"),
        )


@dataclass(frozen=True, slots=True)
class ExactEvmPayload:
    """The scheme-specific part of an ``exact`` payment on EVM by EIP-3009."""

    authorization: TransferAuthorization
    signature: bytes

    def to_wire(self) -> dict[str, Any]:
        a = self.authorization
        return {
            "authorization": {
                "from": checksum_address(a.payer),
                "to": checksum_address(a.recipient),
                "value": str(a.value),
                "validAfter": str(a.valid_after),
                "validBefore": str(a.valid_before),
                "nonce": "0x" + a.nonce.hex(),
            },
            "signature": "0x" + self.signature.hex(),
        }

    @classmethod
    def from_wire(cls, fields: Fields) -> ExactEvmPayload:
        a = fields.fields("authorization")
        signature = fields.text("signature", 4098)
        if not _HEX.match(signature):
            fields.wrong("signature", "is not 0x and hexadecimal digits")
        return cls(
            TransferAuthorization(
                payer=_address(a, "from"),
                recipient=_address(a, "to"),
                value=a.whole_text("value"),
                valid_after=a.whole_text("validAfter"),
                valid_before=a.whole_text("validBefore"),
                nonce=_bytes32(a, "nonce"),
            ),
            bytes.fromhex(signature[2:]),
        )


@dataclass(frozen=True, slots=True)
class PaymentPayload:
    """What a payer sends. ``payload`` is read by the scheme (``exact_evm``): which one is known from ``accepted``."""

    accepted: PaymentRequirements
    payload: Mapping[str, Any]
    resource: Resource | None = None
    extensions: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return _without_none(
            {
                "x402Version": VERSION,
                "resource": self.resource and self.resource.to_wire(),
                "accepted": self.accepted.to_wire(),
                "payload": dict(self.payload),
                "extensions": dict(self.extensions) or None,
            }
        )

    @classmethod
    def from_wire(cls, message: object) -> PaymentPayload:
        fields = _versioned(message)
        return cls(
            accepted=PaymentRequirements.from_wire(fields.fields("accepted")),
            payload=_present(fields, "payload"),
            resource=None
            if fields.raw("resource") is None
            else Resource.from_wire(fields.fields("resource")),
            extensions=fields.mapping("extensions"),
        )

    def exact_evm(self) -> ExactEvmPayload:
        """The payload as an EIP-3009 transfer."""
        return ExactEvmPayload.from_wire(Fields(self.payload, MALFORMED, "payload"))


@dataclass(frozen=True, slots=True)
class SettlementResponse:
    """The receipt. ``transaction`` is empty when none was made."""

    success: bool
    network: str
    transaction: str = ""
    payer: str | None = None
    amount: int | None = None
    error_reason: str | None = None
    error_message: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return _without_none(
            {
                "success": self.success,
                "errorReason": self.error_reason,
                "errorMessage": self.error_message,
                "payer": self.payer,
                "transaction": self.transaction,
                "network": self.network,
                "amount": None if self.amount is None else str(self.amount),
                "extra": dict(self.extra) or None,
            }
        )

    @classmethod
    def from_wire(cls, message: object) -> SettlementResponse:
        fields = Fields(message, MALFORMED)
        return cls(
            success=fields.flag("success"),
            network=fields.text("network", 64),
            transaction="" if fields.raw("transaction") == "" else fields.text("transaction", 512),
            payer=fields.optional_text("payer", 128),
            amount=None if fields.raw("amount") is None else fields.whole_text("amount"),
            error_reason=fields.optional_text("errorReason", 256),
            error_message=fields.optional_text("errorMessage", 1024),
            extra=fields.mapping("extra"),
        )


def _versioned(message: object) -> Fields:
    fields = Fields(message, MALFORMED)
    version = fields.raw("x402Version")
    if type(version) is not int or version != VERSION:
        raise refuse(MALFORMED, f"x402Version must be {VERSION}", "x402Version")
    return fields


def _present(fields: Fields, key: str) -> dict[str, Any]:
    if fields.raw(key) is None:
        fields.wrong(key, "is missing")
    return fields.mapping(key)


def _address(fields: Fields, key: str) -> bytes:
    try:
        return parse_address(fields.text(key, 64))
    except Refused as exc:
        fields.wrong(key, exc.reason.message)


def _bytes32(fields: Fields, key: str) -> bytes:
    try:
        return parse_bytes32(fields.text(key, 80))
    except Refused as exc:
        fields.wrong(key, exc.reason.message)


def _without_none(wire: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in wire.items() if value is not None}
