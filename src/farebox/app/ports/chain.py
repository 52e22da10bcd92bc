"""The role of a network on which payers' authorised transfers are settled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from farebox.base.money import Asset
from farebox.domain.access import TokenAsset
from farebox.domain.ledger import Posting
from farebox.protocols.evm import TransferAuthorization
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class SettlementOrder:
    """One reserved payment to settle. ``payer`` and ``recipient`` are lower-case addresses, ``amount`` whole units of ``token``.

    ``postings`` are booked with the settlement. ``together_with`` runs inside the transaction that records it, and only
    when this order made it settled: what was bought and the money are one fact.
    """

    payment_key: bytes
    payment_id: str
    owner: str
    owner_epoch: int
    token: TokenAsset
    payer: str
    recipient: str
    amount: int
    postings: tuple[Posting, ...]
    authorization: TransferAuthorization
    signature: bytes = field(repr=False)
    together_with: Callable[[Tx], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The money has moved, the payment's row says so and the postings are written."""

    transaction_hash: str


@dataclass(frozen=True, slots=True)
class SettleRefused:
    """Nothing was taken. ``code`` is an x402 error reason (``insufficient_funds``), or ``reservation_lost`` when the payment is
    no longer this owner's to settle."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SettleUnknown:
    """Nobody knows yet whether the money moved: the same payment must be asked for again, never a new one."""

    retry_after_s: float = 1.0


@dataclass(frozen=True, slots=True)
class RefundOrder:
    """One settled payment to give back, whole, to its payer. ``postings`` are booked with it; ``reason`` is kept in its row."""

    payment_key: bytes
    payment_id: str
    token: TokenAsset
    payer: str
    recipient: str
    amount: int
    postings: tuple[Posting, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refunded:
    """The money has moved back, the payment's row says so and the postings are written."""

    transaction_hash: str


@dataclass(frozen=True, slots=True)
class NotRefunded:
    """Nothing moved, and asking again will not help: the payment is not settled (any more) or the recipient cannot pay."""

    why: str


Outcome = Settled | SettleRefused | SettleUnknown


class Chain(Protocol):
    """One network. Implementations: the sandbox's ledger (rails/sandbox); a real EVM chain comes with its own issue."""

    @property
    def network(self) -> str:
        """CAIP-2, such as ``eip155:84532``."""

    @property
    def sandbox(self) -> bool:
        """True when no real money moves: said on the wire in ``extra.sandbox``."""

    @property
    def tokens(self) -> tuple[TokenAsset, ...]:
        """The tokens taken on this network. Any other is refused."""

    @property
    def default_recipient(self) -> str | None:
        """Who is paid when a route names nobody (sandbox only)."""

    def book_asset(self, token: TokenAsset) -> Asset:
        """The asset a token is counted in, in the book."""

    async def settle(self, order: SettlementOrder) -> Outcome:
        """Move the money of a reserved payment. Safe to ask again with the same order; never raises ``Unavailable``."""

    async def refund(self, order: RefundOrder) -> Refunded | NotRefunded:
        """Move the money of a settled payment back. Safe to ask again with the same order. Raises ``Unavailable``."""

    async def close(self) -> None:
        """Return when every settlement asked for has its outcome."""
