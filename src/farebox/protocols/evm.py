"""EVM signatures: addresses, EIP-712 digests of EIP-3009 transfers, recovery and signing on secp256k1.

The digest is packed by hand (10 µs) with the domain separator cached; recovery is libsecp256k1's (40 µs). Only plain
accounts are recovered here: a contract wallet's signature (EIP-1271) needs the chain and is refused as a bad signature.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from coincurve import PrivateKey, PublicKey
from Crypto.Hash import keccak as _keccak

from farebox.base.errors import Refused, refuse

#: secp256k1's group order. A signature with s above the half is the twin of another one and is refused (EIP-2).
ORDER: Final = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
_UINT256_MAX: Final = (1 << 256) - 1

_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}\Z", re.ASCII)
_BYTES32: Final = re.compile(r"0x[0-9a-fA-F]{64}\Z", re.ASCII)


def keccak(data: bytes) -> bytes:
    """Keccak-256 as Ethereum uses it (not SHA3-256)."""
    return _keccak.new(digest_bits=256, data=data).digest()


_DOMAIN_TYPE: Final = keccak(
    b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
_TRANSFER_TYPE: Final = keccak(
    b"TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)


@dataclass(frozen=True, slots=True)
class TransferAuthorization:
    """EIP-3009: ``payer`` lets anyone move ``value`` to ``recipient`` within (valid_after, valid_before). Addresses are 20 bytes."""

    payer: bytes
    recipient: bytes
    value: int
    valid_after: int
    valid_before: int
    nonce: bytes


def parse_address(text: str) -> bytes:
    """The 20 bytes of ``0x…`` in any case (the EIP-55 checksum is not asked for: clients send all three spellings)."""
    if not _ADDRESS.match(text):
        raise refuse(
            "ADDRESS_MALFORMED",
            f"{text[:60]!r} is not an address such as 0x036CbD53842c5426634e7929541eC2318f3dCF7e",
        )
    return bytes.fromhex(text[2:])


def parse_bytes32(text: str) -> bytes:
    """The 32 bytes of ``0x`` and 64 hexadecimal digits."""
    if not _BYTES32.match(text):
        raise refuse("BYTES32_MALFORMED", "a nonce is 0x and 64 hexadecimal digits")
    return bytes.fromhex(text[2:])


def checksum_address(address: bytes) -> str:
    """The EIP-55 spelling."""
    plain = address.hex()
    marks = keccak(plain.encode()).hex()
    return "0x" + "".join(c.upper() if int(m, 16) >= 8 else c for c, m in zip(plain, marks, strict=False))


def chain_id(network: str) -> int:
    """The number in a CAIP-2 ``eip155:<n>``."""
    namespace, _, reference = network.partition(":")
    if namespace != "eip155" or not reference.isascii() or not reference.isdecimal() or len(reference) > 20:
        raise refuse(
            "NETWORK_UNKNOWN", f"{network[:60]!r} is not an EVM network such as eip155:84532", "network"
        )
    return int(reference)


@lru_cache(maxsize=1024)
def domain_separator(name: str, version: str, chain: int, contract: bytes) -> bytes:
    """EIP-712 domain of a token contract. Called with tokens of our own catalog only, so the cache is small."""
    return keccak(
        _DOMAIN_TYPE
        + keccak(name.encode())
        + keccak(version.encode())
        + chain.to_bytes(32, "big")
        + bytes(12)
        + contract
    )


def transfer_digest(domain: bytes, transfer: TransferAuthorization) -> bytes:
    """What the payer signs: EIP-712 over ``TransferWithAuthorization``. Numbers beyond 256 bits are refused."""
    if max(transfer.value, transfer.valid_after, transfer.valid_before) > _UINT256_MAX:
        raise refuse("NUMBER_TOO_LARGE", "an amount or a time does not fit into 256 bits")
    message = keccak(
        _TRANSFER_TYPE
        + bytes(12)
        + transfer.payer
        + bytes(12)
        + transfer.recipient
        + transfer.value.to_bytes(32, "big")
        + transfer.valid_after.to_bytes(32, "big")
        + transfer.valid_before.to_bytes(32, "big")
        + transfer.nonce
    )
    return keccak(b"\x19\x01" + domain + message)


def recover(digest: bytes, signature: bytes) -> bytes:
    """The address that made a signature (r, s, v: 65 bytes; v is 27/28, 0/1 is taken too). Raises ``Refused``."""
    if len(signature) != 65:
        raise refuse("SIGNATURE_INVALID", "a signature of a plain account has 65 bytes")
    v = signature[64]
    parity = v - 27 if v >= 27 else v
    if parity not in (0, 1):
        raise refuse("SIGNATURE_INVALID", "the last byte of a signature is 27 or 28")
    if int.from_bytes(signature[32:64], "big") > ORDER // 2:
        raise refuse("SIGNATURE_INVALID", "the signature is the malleable twin of another one (high s)")
    try:
        point = PublicKey.from_signature_and_message(signature[:64] + bytes((parity,)), digest, hasher=None)
    except Exception:  # noqa: BLE001  the binding raises plain Exceptions for points off the curve
        raise refuse("SIGNATURE_INVALID", "no key can have made this signature") from None
    return keccak(point.format(compressed=False)[1:])[12:]


def sign(private_key: bytes, digest: bytes) -> bytes:
    """65 bytes r, s, v with v 27/28; deterministic (RFC 6979) and low-s."""
    made = PrivateKey(private_key).sign_recoverable(digest, hasher=None)
    return made[:64] + bytes((made[64] + 27,))


def address_of(private_key: bytes) -> bytes:
    """The account of a private key of 32 bytes."""
    if len(private_key) != 32 or not 0 < int.from_bytes(private_key, "big") < ORDER:
        raise refuse("PRIVATE_KEY_INVALID", "a private key is 32 bytes between 1 and the order of the curve")
    return keccak(PrivateKey(private_key).public_key.format(compressed=False)[1:])[12:]


__all__ = [
    "ORDER", "Refused", "TransferAuthorization", "address_of", "chain_id", "checksum_address", "domain_separator", "keccak",
    "parse_address", "parse_bytes32", "recover", "sign", "transfer_digest",
]  # fmt: skip
