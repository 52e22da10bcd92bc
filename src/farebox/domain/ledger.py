"""The book: every payment, pass sale and invoice as amounts that move from one account to another.

A row has a source and a destination, so it cannot be out of balance, and neither can the book (decision 0003). An
account that money comes from goes down: revenue is negative, what we hold or are owed is positive. ``entry`` names the
fact (``payment:<id>``) and makes booking it twice the same as booking it once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from farebox.base.errors import InvariantError
from farebox.base.money import Money

Kind = Literal["exact_fare", "pass_sale", "invoice", "refund"]


@dataclass(frozen=True, slots=True)
class Posting:
    """``amount`` whole minor units of ``asset`` (its name in the book) move from ``source`` to ``destination``."""

    entry: str
    leg: int
    kind: Kind
    source: str
    destination: str
    asset: str
    amount: int
    reference: str

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise InvariantError(f"{self.entry} leg {self.leg} moves {self.amount}: turn it round instead")
        if self.source == self.destination:
            raise InvariantError(f"{self.entry} leg {self.leg} moves from {self.source} to itself")


# ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def wallet(network: str, address: str) -> str:
    """Our receiving address on a network. EVM addresses are one whatever the case of their letters."""
    return _path("wallet", network, address.lower() if network.startswith("eip155:") else address)


def exact_revenue(route_id: str) -> str:
    """What exact fares on a route have earned."""
    return _path("revenue", "exact", route_id)


def pass_revenue(route_id: str) -> str:
    """What passes for a route have earned."""
    return _path("revenue", "pass", route_id)


def account_revenue(customer_id: str) -> str:
    """What a customer's invoices have earned."""
    return _path("revenue", "account", customer_id)


def receivable(customer_id: str) -> str:
    """What a customer owes."""
    return _path("receivable", customer_id)


# ── entries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def exact_fare_settled(
    payment_id: str, route_id: str, network: str, pay_to: str, asset: str, amount: int
) -> tuple[Posting, ...]:
    """An exact fare has arrived in our wallet."""
    return _moves(
        f"payment:{payment_id}",
        "exact_fare",
        exact_revenue(route_id),
        wallet(network, pay_to),
        asset,
        amount,
        payment_id,
    )


def exact_fare_refunded(
    payment_id: str, route_id: str, network: str, pay_to: str, asset: str, amount: int
) -> tuple[Posting, ...]:
    """An exact fare went back from our wallet: the posting of ``exact_fare_settled``, turned round."""
    return _moves(
        f"refund:{payment_id}",
        "refund",
        wallet(network, pay_to),
        exact_revenue(route_id),
        asset,
        amount,
        payment_id,
    )


def pass_sold(
    payment_id: str, route_id: str, network: str, pay_to: str, asset: str, amount: int, pass_id: str
) -> tuple[Posting, ...]:
    """A pass was paid for; the entry is the payment's, the reference the pass."""
    return _moves(
        f"payment:{payment_id}",
        "pass_sale",
        pass_revenue(route_id),
        wallet(network, pay_to),
        asset,
        amount,
        pass_id,
    )


def invoice_issued(invoice_id: str, customer_id: str, total: Money) -> tuple[Posting, ...]:
    """A customer owes an invoice. One that gives back moves the other way; one over nothing moves nothing."""
    earned, owed = account_revenue(customer_id), receivable(customer_id)
    source, destination = (earned, owed) if total.units > 0 else (owed, earned)
    return _moves(
        f"invoice:{invoice_id}",
        "invoice",
        source,
        destination,
        total.asset.code,
        abs(total.units),
        invoice_id,
    )


def balances(postings: Iterable[Posting]) -> dict[tuple[str, str], int]:
    """What each (account, asset) comes to: what came in less what went out. The sum over an asset is always zero."""
    result: defaultdict[tuple[str, str], int] = defaultdict(int)
    for posting in postings:
        result[posting.source, posting.asset] -= posting.amount
        result[posting.destination, posting.asset] += posting.amount
    return dict(result)


def _moves(
    entry: str, kind: Kind, source: str, destination: str, asset: str, amount: int, reference: str
) -> tuple[Posting, ...]:
    if amount == 0:
        return ()
    return (Posting(entry, 1, kind, source, destination, asset, amount, reference),)


def _path(*names: str) -> str:
    if not all(names):
        raise InvariantError(f"an account needs every part of its name: {names}")
    return "/".join(names)
