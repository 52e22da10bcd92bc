"""What a price becomes on the wire: one offer a network on which the asset is taken and somebody is paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from farebox.app.ports.chain import Chain
from farebox.base.money import Money
from farebox.domain.access import TokenAsset
from farebox.protocols.evm import chain_id, domain_separator, parse_address
from farebox.protocols.x402 import PaymentRequirements

#: How long a payment stays good from its signing: longer than an upstream may take to begin its answer.
MAX_TIMEOUT_S: Final = 120


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to pay a price. ``domain`` is the token's EIP-712 domain separator; ``recipient`` and ``asset`` are 20 bytes."""

    chain: Chain
    token: TokenAsset
    requirements: PaymentRequirements
    recipient: bytes
    asset: bytes
    domain: bytes


def offers_for(price: Money, pay_to: Sequence[tuple[str, str]], chains: Sequence[Chain]) -> tuple[Offer, ...]:
    """Every way to pay ``price``, in the order of the chains. ``pay_to`` names the seller per network; a sandbox pays its
    own seller where nobody is named. Empty: the price cannot be paid here."""
    sellers = dict(pay_to)
    return tuple(
        _offer(chain, token, amount, seller)
        for chain in chains
        if (seller := sellers.get(chain.network) or chain.default_recipient)
        for token in chain.tokens
        if token.symbol == price.asset.code and (amount := _units(price, token)) is not None
    )


def _units(price: Money, token: TokenAsset) -> int | None:
    """The price in the token's own units; None when the token cannot express it."""
    shift = token.decimals - price.asset.decimals
    if shift >= 0:
        return int(price.units * 10**shift)
    whole, rest = divmod(price.units, 10**-shift)
    return int(whole) if rest == 0 else None


def _offer(chain: Chain, token: TokenAsset, amount: int, seller: str) -> Offer:
    extra: dict[str, object] = {"name": token.name, "version": token.version}
    if chain.sandbox:
        extra["sandbox"] = True
    asset = parse_address(token.address)
    return Offer(
        chain=chain,
        token=token,
        requirements=PaymentRequirements(
            scheme="exact",
            network=chain.network,
            amount=amount,
            asset=token.address,
            pay_to=seller,
            max_timeout_s=MAX_TIMEOUT_S,
            extra=extra,
        ),
        recipient=parse_address(seller),
        asset=asset,
        domain=domain_separator(token.name, token.version, chain_id(chain.network), asset),
    )
