"""What a buyer agrees to pay. Decides on an offer and signs it; sends nothing.

An offer names its own token, domain and amount, and all of it may be a lie. So only tokens known beforehand are signed
for, with the domain known beforehand, up to a price said beforehand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from farebox.base.errors import FareboxError, Refused
from farebox.base.money import Asset, Money
from farebox.client.wallet import Wallet
from farebox.protocols.evm import (
    TransferAuthorization,
    chain_id,
    domain_separator,
    parse_address,
    transfer_digest,
)
from farebox.protocols.x402 import (
    ExactEvmPayload,
    PaymentPayload,
    PaymentRequired,
    PaymentRequirements,
    encode_header,
)

#: However long a seller asks for: a payment that is not used by then is void.
TIMEOUT_S_MAX: Final = 600


class PaymentDeclined(FareboxError):
    """Nothing was signed. The message says why, offer by offer."""


@dataclass(frozen=True, slots=True)
class KnownAsset:
    """A token a buyer trusts: its address and EIP-712 domain come from here, never from an offer."""

    network: str
    address: str
    symbol: str
    decimals: int
    name: str
    version: str


KNOWN_ASSETS: Final = (
    KnownAsset("eip155:8453", "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", "USDC", 6, "USD Coin", "2"),
    KnownAsset("eip155:84532", "0x036CbD53842c5426634e7929541eC2318f3dCF7e", "USDC", 6, "USDC", "2"),
)


@dataclass(frozen=True, slots=True)
class SignedPayment:
    """A payment ready to be sent, any number of times: it can move its money once. ``valid_until_s`` is unix time."""

    header: bytes
    offer: PaymentRequirements
    price: Money
    valid_until_s: int


class Purse:
    """``max_price`` bounds each payment (``"0.10 USDC"``); ``assets`` are all that is ever paid with."""

    def __init__(
        self,
        wallet: Wallet,
        max_price: str = "0.10 USDC",
        assets: Sequence[KnownAsset] = KNOWN_ASSETS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.wallet = wallet
        self.max_price = Money.parse(max_price)
        self._assets = {(a.network, a.address.lower()): a for a in assets}
        self._clock = clock

    def pay(self, required: PaymentRequired, max_price: Money | None = None) -> SignedPayment:
        """Sign the first offer that may be paid. ``PaymentDeclined`` when there is none."""
        declined = []
        for offer in required.accepts:
            reason = self._objection(offer, max_price or self.max_price)
            if reason is None:
                return self._sign(offer, required)
            declined.append(f"{offer.scheme} on {offer.network}: {reason}")
        raise PaymentDeclined("; ".join(declined) or "the 402 offers no way to pay")

    def price(self, offer: PaymentRequirements) -> Money:
        """What an offer costs, in a known token."""
        asset = self._assets[offer.network, offer.asset.lower()]
        return Money(offer.amount, Asset(asset.symbol, asset.decimals))

    def _objection(self, offer: PaymentRequirements, max_price: Money) -> str | None:
        asset = self._assets.get((offer.network, offer.asset.lower()))
        if offer.scheme != "exact" or offer.extra.get("assetTransferMethod", "eip3009") != "eip3009":
            return "only the scheme exact by EIP-3009 is signed"
        if asset is None:
            return f"the token {offer.asset} is not one this purse pays with"
        if (offer.extra.get("name"), offer.extra.get("version")) != (asset.name, asset.version):
            return "the token's domain is not what it is known to be"
        if offer.extra.get("paymentFlow", "authorization") not in ("authorization", "upfront"):
            return "its payment flow is not known"
        if asset.symbol != max_price.asset.code:
            return f"the price limit is in {max_price.asset.code}"
        price = self.price(offer)
        if max_price < price:
            return f"it costs {price}, and at most {max_price} may be paid"
        try:
            parse_address(offer.pay_to)
        except Refused:
            return "payTo is not an address"
        return None

    def _sign(self, offer: PaymentRequirements, required: PaymentRequired) -> SignedPayment:
        asset = self._assets[offer.network, offer.asset.lower()]
        valid_until_s = int(self._clock()) + min(max(offer.max_timeout_s, 1), TIMEOUT_S_MAX)
        transfer = TransferAuthorization(
            payer=parse_address(self.wallet.address),
            recipient=parse_address(offer.pay_to),
            value=offer.amount,
            valid_after=0,
            valid_before=valid_until_s,
            nonce=os.urandom(32),
        )
        domain = domain_separator(
            asset.name, asset.version, chain_id(asset.network), parse_address(asset.address)
        )
        signature = self.wallet.sign(transfer_digest(domain, transfer))
        payload = PaymentPayload(
            offer, ExactEvmPayload(transfer, signature).to_wire(), required.resource, required.extensions
        )
        return SignedPayment(encode_header(payload.to_wire()), offer, self.price(offer), valid_until_s)
