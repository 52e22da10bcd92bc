"""402 payments as people read them; the money path writes them (store/payments)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class ListedPayment:
    """A payment without its secrets. ``amount`` in the asset's minor units; ``book_asset`` its name in the book."""

    id: str
    status: str
    flow: str
    fare: str
    network: str
    scheme: str
    asset: str
    book_asset: str
    amount: int
    payer_address: str
    recipient_address: str
    route_id: str
    resource_path: str
    transaction_hash: str | None
    failure: str | None
    created_at: datetime
    settled_at: datetime | None


# Unique index payment_id_unique.
GET: LiteralString = """
    SELECT id, status, flow, fare, network, scheme, asset, book_asset, amount, payer_address, recipient_address,
           route_id, resource_path, transaction_hash, failure, created_at, settled_at
      FROM payment
     WHERE id = %(id)s"""


async def get(tx: Tx, payment_id: str) -> ListedPayment | None:
    """The payment with this id."""
    row = await (await tx.execute(GET, {"id": payment_id})).fetchone()
    return None if row is None else _payment(row)


# payment_id_unique backwards (ids sort by time of making); one payer's by payment_payer.
LIST: LiteralString = """
    SELECT id, status, flow, fare, network, scheme, asset, book_asset, amount, payer_address, recipient_address,
           route_id, resource_path, transaction_hash, failure, created_at, settled_at
      FROM payment
     WHERE (%(before)s::text IS NULL OR id < %(before)s)
       AND (%(payer)s::text IS NULL OR payer_address IN (%(payer)s, lower(%(payer)s)))
       AND (%(status)s::text IS NULL OR status = %(status)s)
     ORDER BY id DESC
     LIMIT %(rows)s"""


async def list_before(
    tx: Tx, before: str | None, rows: int, payer: str | None = None, status: str | None = None
) -> list[ListedPayment]:
    """Payments, newest first."""
    values = {"before": before, "rows": rows, "payer": payer, "status": status}
    return [_payment(row) for row in await (await tx.execute(LIST, values)).fetchall()]


def _payment(row: tuple[Any, ...]) -> ListedPayment:
    return ListedPayment(*(*row[:8], int(row[8]), *row[9:]))
