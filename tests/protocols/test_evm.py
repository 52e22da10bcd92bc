"""EVM signatures, held against eth-account's own implementation and published vectors."""

from __future__ import annotations

import contextlib
import secrets

import pytest
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from farebox.base.errors import Refused
from farebox.protocols import evm
from farebox.protocols.evm import TransferAuthorization

USDC = "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
WORDS = st.integers(0, 2**256 - 1)
ADDRESSES = st.binary(min_size=20, max_size=20)
KEYS = st.integers(1, evm.ORDER - 1).map(lambda n: n.to_bytes(32, "big"))


def oracle(
    key: bytes, transfer: TransferAuthorization, name: str, version: str, chain: int, contract: bytes
) -> bytes:
    fields = {
        "from": "address",
        "to": "address",
        "value": "uint256",
        "validAfter": "uint256",
        "validBefore": "uint256",
        "nonce": "bytes32",
    }
    message = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "TransferWithAuthorization": [{"name": n, "type": t} for n, t in fields.items()],
        },
        "primaryType": "TransferWithAuthorization",
        "domain": {
            "name": name,
            "version": version,
            "chainId": chain,
            "verifyingContract": evm.checksum_address(contract),
        },
        "message": {
            "from": evm.checksum_address(transfer.payer),
            "to": evm.checksum_address(transfer.recipient),
            "value": transfer.value,
            "validAfter": transfer.valid_after,
            "validBefore": transfer.valid_before,
            "nonce": transfer.nonce,
        },
    }
    return bytes(Account.sign_typed_data(key, full_message=message).signature)


@given(
    KEYS, ADDRESSES, WORDS, WORDS, WORDS, st.binary(min_size=32, max_size=32),
    st.sampled_from(["USDC", "USD Coin", "USD₮0", ""]), st.sampled_from(["1", "2", ""]), st.integers(1, 2**63), ADDRESSES,
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_digest_signature_and_recovery_agree_with_eth_account(
    key: bytes,
    to: bytes,
    value: int,
    after: int,
    before: int,
    nonce: bytes,
    name: str,
    version: str,
    chain: int,
    contract: bytes,
):
    transfer = TransferAuthorization(evm.address_of(key), to, value, after, before, nonce)
    digest = evm.transfer_digest(evm.domain_separator(name, version, chain, contract), transfer)
    expected = oracle(key, transfer, name, version, chain, contract)

    assert evm.sign(key, digest) == expected
    assert evm.recover(digest, expected) == transfer.payer
    assert evm.recover(digest, expected[:64] + bytes((expected[64] - 27,))) == transfer.payer


def test_addresses_are_spelled_as_eip_55_says():
    for spelled in (
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
        "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
        "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
    ):
        assert evm.checksum_address(evm.parse_address(spelled)) == spelled
        assert evm.parse_address("0x" + spelled[2:].upper()) == evm.parse_address(spelled.lower())


def test_keccak_is_not_sha3():
    assert evm.keccak(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "036CbD53842c5426634e7929541eC2318f3dCF7e",
        USDC + "0",
        USDC[:-1],
        "0X" + USDC[2:],
        USDC + "\n",
        "0x" + "g" * 40,
    ],
)
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(Refused):
        evm.parse_address(text)


@pytest.mark.parametrize(
    "network", ["eip155:", "eip155:-1", "eip155:1x", "eip155:²", "base", "solana:1", "eip155:" + "1" * 30]
)
def test_what_is_no_evm_network_is_refused(network: str):
    with pytest.raises(Refused):
        evm.chain_id(network)


def test_the_malleable_twin_of_a_signature_is_refused():
    key, digest = secrets.token_bytes(32), secrets.token_bytes(32)
    good = evm.sign(key, digest)
    twin = (
        good[:32]
        + (evm.ORDER - int.from_bytes(good[32:64], "big")).to_bytes(32, "big")
        + bytes((55 - good[64],))
    )
    assert evm.recover(digest, good) == evm.address_of(key)
    with pytest.raises(Refused):
        evm.recover(digest, twin)


@given(st.binary(max_size=70), st.binary(min_size=32, max_size=32))
@settings(deadline=None)
def test_no_signature_raises_anything_but_a_refusal(signature: bytes, digest: bytes):
    with contextlib.suppress(Refused):
        evm.recover(digest, signature)


@given(st.binary(min_size=64, max_size=64), st.integers(0, 255))
@settings(deadline=None)
def test_no_signature_of_the_right_length_does_either(points: bytes, v: int):
    with contextlib.suppress(Refused):
        assert len(evm.recover(b"\x01" * 32, points + bytes((v,)))) == 20


def test_numbers_beyond_256_bits_are_refused():
    transfer = TransferAuthorization(b"a" * 20, b"b" * 20, 2**256, 0, 0, b"c" * 32)
    with pytest.raises(Refused):
        evm.transfer_digest(b"d" * 32, transfer)


@pytest.mark.parametrize("key", [bytes(32), evm.ORDER.to_bytes(32, "big"), b"short"])
def test_what_is_no_private_key_is_refused(key: bytes):
    with pytest.raises(Refused):
        evm.address_of(key)
