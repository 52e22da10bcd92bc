"""The sandbox's chain: transfers are rows, settled with the payment's status and its postings in one transaction.

On the wire it is Base Sepolia and its USDC, so that clients which pay only what they know pay it with no configuration.
The signatures it takes are valid on that testnet too: they are never forwarded and never stored.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Final

from farebox.app.ports.chain import (
    NotRefunded,
    Outcome,
    Refunded,
    RefundOrder,
    Settled,
    SettlementOrder,
    SettleRefused,
    SettleUnknown,
)
from farebox.base.errors import InvariantError, Unavailable
from farebox.base.money import Asset
from farebox.domain.access import TokenAsset
from farebox.protocols.evm import ORDER, address_of, checksum_address
from farebox.store import sandbox
from farebox.store.gather import Gatherer
from farebox.store.pool import Database
from farebox.store.sandbox import Account, Made, NotMade, Transfer, TransferBack

SANDBOX_NETWORK: Final = "eip155:84532"
SANDBOX_USDC: Final = TokenAsset(
    network=SANDBOX_NETWORK,
    address="0x036CbD53842c5426634e7929541eC2318f3dCF7e",
    symbol="USDC",
    decimals=6,
    name="USDC",
    version="2",
)

#: Every sandbox transaction hash starts with it: no explorer will ever know one, and a reader sees why.
HASH_PREFIX: Final = "0x5a4db05a4db05a4d"

ATTEMPTS_MAX: Final = 3
ATTEMPT_AGAIN_AFTER_S: Final = 0.3
_OPENED_ADDRESSES_MAX: Final = 100_000


def seller_address(seed: bytes) -> str:
    """The sandbox's own receiving address, made from a derived key (``derive_key(master, "seller/sandbox")``)."""
    return checksum_address(address_of((int.from_bytes(seed, "big") % (ORDER - 1) + 1).to_bytes(32, "big")))


def transaction_hash(payment_key: bytes) -> str:
    """The hash of a payment's transfer: known beforehand, so that settling again names the same one."""
    return (
        HASH_PREFIX + hashlib.sha256(b"sandbox transfer" + payment_key).hexdigest()[: 66 - len(HASH_PREFIX)]
    )


class SandboxChain:
    """The port ``Chain`` on the sandbox's ledger. ``recipient`` is paid when a route names nobody."""

    def __init__(self, database: Database, recipient: str) -> None:
        self._database = database
        self._recipient = recipient
        self._opened: set[Account] = set()
        self._transfers: Gatherer[Transfer, Made | NotMade] = Gatherer(
            self._make, key=lambda t: t.payment_key, name="sandbox settlements"
        )

    @property
    def network(self) -> str:
        return SANDBOX_NETWORK

    @property
    def sandbox(self) -> bool:
        return True

    @property
    def tokens(self) -> tuple[TokenAsset, ...]:
        return (SANDBOX_USDC,)

    @property
    def default_recipient(self) -> str | None:
        return self._recipient

    def book_asset(self, token: TokenAsset) -> Asset:
        return Asset(f"sandbox:{token.symbol.lower()}", token.decimals)

    async def settle(self, order: SettlementOrder) -> Outcome:
        """Make the transfer, or say why not. A database that does not answer is asked again a little later, with the
        same order: the payment's row knows whether the first attempt was committed."""
        transfer = _transfer(order)
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                verdict = await self._settle(order, transfer)
            except Unavailable:
                if attempt < ATTEMPTS_MAX:
                    await asyncio.sleep(ATTEMPT_AGAIN_AFTER_S)
                continue
            return _outcome(verdict, order)
        return SettleUnknown()

    async def refund(self, order: RefundOrder) -> Refunded | NotRefunded:
        back = TransferBack(
            payment_key=order.payment_key,
            transfer_key=hashlib.sha256(b"sandbox refund" + order.payment_key).digest(),
            asset=order.token.address.lower(),
            payer=order.payer,
            recipient=order.recipient,
            amount=order.amount,
            transaction_hash=transaction_hash(b"refund" + order.payment_key),
            postings=order.postings,
            reason=order.reason,
        )
        async with self._database.transaction() as tx:
            verdict = await sandbox.give_back(tx, back)
        match verdict:
            case Made(hash_):
                return Refunded(hash_)
            case NotMade(why):
                return NotRefunded(why)

    async def close(self) -> None:
        """Return when every settlement asked for has its outcome."""
        await self._transfers.close()

    async def _settle(self, order: SettlementOrder, transfer: Transfer) -> Made | NotMade:
        if order.together_with is None:
            return await self._transfers.put(transfer)
        await self._open_accounts([transfer])
        async with self._database.transaction() as tx:
            verdict = (await sandbox.make(tx, [transfer]))[transfer.payment_key]
            if isinstance(verdict, Made) and verdict.now:
                await order.together_with(tx)
        return verdict

    async def _make(self, transfers: Sequence[Transfer]) -> list[Made | NotMade]:
        await self._open_accounts(transfers)
        async with self._database.transaction() as tx:
            verdicts = await sandbox.make(tx, transfers)
        return [verdicts[t.payment_key] for t in transfers]

    async def _open_accounts(self, transfers: Sequence[Transfer]) -> None:
        accounts = {(t.payer, t.asset) for t in transfers} | {(t.recipient, t.asset) for t in transfers}
        if unseen := accounts - self._opened:
            async with self._database.connection() as tx:
                await sandbox.open_accounts(tx, unseen)
            if len(self._opened) > _OPENED_ADDRESSES_MAX:
                self._opened.clear()
            self._opened |= unseen


def _transfer(order: SettlementOrder) -> Transfer:
    return Transfer(
        payment_key=order.payment_key,
        owner=order.owner,
        owner_epoch=order.owner_epoch,
        asset=order.token.address.lower(),
        payer=order.payer,
        recipient=order.recipient,
        amount=order.amount,
        transaction_hash=transaction_hash(order.payment_key),
        postings=order.postings,
    )


def _outcome(verdict: Made | NotMade, order: SettlementOrder) -> Outcome:
    match verdict:
        case Made(hash_):
            return Settled(hash_)
        case NotMade("insufficient_funds"):
            return SettleRefused(
                "insufficient_funds",
                f"{order.payer} does not hold {order.amount} units of {order.token.symbol} in the sandbox;"
                " POST /v1/sandbox/faucet gives it some",
            )
        case NotMade("reserved" | "released" | "unknown"):
            return SettleRefused(
                "reservation_lost", "the payment is no longer held by the process that served it"
            )
        case NotMade(status):
            raise InvariantError(f"payment {order.payment_id} was to be settled but is {status}")
