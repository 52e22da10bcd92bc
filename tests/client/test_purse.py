"""A buyer's key and what it agrees to sign: known tokens, known domains, up to a price."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from farebox.base.errors import Refused
from farebox.client import PaymentDeclined, Purse, Wallet
from farebox.protocols.evm import chain_id, domain_separator, parse_address, recover, transfer_digest
from farebox.protocols.x402 import (
    PaymentPayload,
    PaymentRequired,
    PaymentRequirements,
    Resource,
    decode_header,
)

OFFER = PaymentRequirements(
    "exact", "eip155:84532", 1000, "0x036CbD53842c5426634e7929541eC2318f3dCF7e", "0x" + "5e" * 20, 120,
    {"name": "USDC", "version": "2", "sandbox": True},
)  # fmt: skip


def required(*offers: PaymentRequirements) -> PaymentRequired:
    return PaymentRequired(Resource("http://shop.test/"), offers)


def test_a_wallet_file_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path):
    file = tmp_path / "wallet.json"
    made = Wallet.load_or_create(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Wallet.load_or_create(file).address == made.address
    assert made._key.hex() not in repr(made)
    with pytest.raises(FileExistsError):
        Wallet.create(file)
    os.chmod(file, 0o640)
    with pytest.raises(Refused, match="chmod 600"):
        Wallet.load(file)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"private_key": "0x12"}', '{"private_key": "zz"}', '{"private_key": 1}']
)
def test_what_is_no_wallet_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "wallet.json"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(Refused):
        Wallet.load(file)


def test_a_wallet_is_the_account_of_its_key():
    account = Account.create()
    assert Wallet.from_key(account.key.hex()).address == account.address
    assert Wallet.from_key("0x" + account.key.hex().removeprefix("0x")).address == account.address


def test_what_is_signed_is_what_was_offered():
    wallet = Wallet.new()
    payment = Purse(wallet, "0.001 USDC", clock=lambda: 1_000_000.0).pay(required(OFFER))

    payload = PaymentPayload.from_wire(decode_header(payment.header))
    assert payload.accepted == OFFER
    exact = payload.exact_evm()
    a = exact.authorization
    assert (a.value, a.recipient, a.valid_after, a.valid_before) == (
        1000,
        parse_address(OFFER.pay_to),
        0,
        1_000_120,
    )
    domain = domain_separator("USDC", "2", chain_id(OFFER.network), parse_address(OFFER.asset))
    assert recover(transfer_digest(domain, a), exact.signature) == parse_address(wallet.address)
    assert str(payment.price) == "0.001 USDC"


def test_no_payment_is_like_another():
    purse = Purse(Wallet.new())
    assert purse.pay(required(OFFER)).header != purse.pay(required(OFFER)).header


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"amount": 1001}, "at most"),
        ({"asset": "0x" + "11" * 20}, "not one this purse pays with"),
        ({"network": "eip155:1"}, "not one this purse pays with"),
        ({"extra": {"name": "Other Coin", "version": "2"}}, "domain"),
        ({"extra": {"version": "2"}}, "domain"),
        ({"extra": {"name": "USDC", "version": "2", "assetTransferMethod": "permit2"}}, "EIP-3009"),
        ({"extra": {"name": "USDC", "version": "2", "paymentFlow": "escrow"}}, "flow"),
        ({"scheme": "upto"}, "exact"),
        ({"pay_to": "nobody"}, "payTo"),
    ],
    ids=str,
)
def test_an_offer_that_is_not_trusted_is_declined(change: dict[str, Any], why: str):
    purse = Purse(Wallet.new(), "0.001 USDC")
    with pytest.raises(PaymentDeclined, match=why):
        purse.pay(required(dataclasses.replace(OFFER, **change)))
    assert purse.pay(required(dataclasses.replace(OFFER, **change), OFFER)).offer == OFFER


def test_nothing_offered_is_nothing_signed():
    with pytest.raises(PaymentDeclined):
        Purse(Wallet.new()).pay(required())


def test_a_payment_is_never_good_for_longer_than_the_buyer_likes():
    payment = Purse(Wallet.new(), clock=lambda: 0.0).pay(
        required(dataclasses.replace(OFFER, max_timeout_s=10**9))
    )
    assert payment.valid_until_s == 600
