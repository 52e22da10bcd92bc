"""What only a sandbox can do: give an address money."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from farebox.app.joining import joined
from farebox.app.ports.chain import Chain
from farebox.base.errors import refuse
from farebox.base.money import EXACT, Money
from farebox.domain.access import TokenAsset
from farebox.protocols.evm import checksum_address, parse_address
from farebox.store import sandbox
from farebox.store.pool import Database, Tx

#: One helping, in whole tokens.
FAUCET_AMOUNT_MAX: Final = Decimal(1_000_000_000)


@dataclass(frozen=True, slots=True)
class Funded:
    """What an address holds after a helping, in whole units of ``token``."""

    address: str
    token: TokenAsset
    balance: int


class Faucet:
    """``chains``: those of the sandbox only; an address never seen before holds 100 USDC already."""

    def __init__(self, database: Database, chains: Sequence[Chain]) -> None:
        self._database = database
        self._tokens = {t.symbol: t for chain in chains if chain.sandbox for t in chain.tokens}

    async def fund(
        self, address: str, amount: str | Decimal, asset: str = "USDC", within: Tx | None = None
    ) -> Funded:
        """Give ``amount`` (major units: ``"5"``, ``"0.25"``) of ``asset`` to ``address``.

        ``Refused`` ``ADDRESS_MALFORMED``, ``ASSET_UNKNOWN``, ``AMOUNT_INVALID``, ``SANDBOX_ONLY``.
        """
        if not self._tokens:
            raise refuse("SANDBOX_ONLY", "only a sandbox has a faucet")
        token = self._tokens.get(asset.upper().removeprefix("SANDBOX:"))
        if token is None:
            raise refuse(
                "ASSET_UNKNOWN", f"the sandbox has {', '.join(self._tokens)}; not {asset[:20]!r}", "asset"
            )
        account = (checksum_address(parse_address(address)).lower(), token.address.lower())
        units = _units(amount, token)
        async with joined(self._database, within) as tx:
            await sandbox.open_accounts(tx, [account])
            balance = await sandbox.fund(tx, account, units)
        return Funded(address, token, balance)


def _units(amount: str | Decimal, token: TokenAsset) -> int:
    if isinstance(amount, str):
        return _checked(Money.parse(f"{amount} {token.symbol}").units, token)
    if not amount.is_finite():
        raise refuse("AMOUNT_INVALID", "the amount must be a number", "amount")
    units = EXACT.multiply(amount, Decimal(10) ** token.decimals)
    if units != units.to_integral_value():
        raise refuse("AMOUNT_INVALID", f"{token.symbol} has {token.decimals} decimals", "amount")
    return _checked(int(units), token)


def _checked(units: int, token: TokenAsset) -> int:
    if not 0 < units <= FAUCET_AMOUNT_MAX * 10**token.decimals:
        raise refuse(
            "AMOUNT_INVALID", f"the amount must be above 0 and at most {FAUCET_AMOUNT_MAX:,}", "amount"
        )
    return units
