"""Purchases of passes: one row per (quote, buyer, nonce), whatever happens on the way."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class Purchase:
    """``quote`` is what was signed; ``payment_key`` the payment it is, or is to be, paid with."""

    id: str
    quote_id: str
    buyer: str
    nonce: str
    rail: str
    status: str
    quote: dict[str, Any]
    payment_key: bytes | None
    pass_id: str | None
    paid_at: datetime | None


_BEGIN: LiteralString = """
    INSERT INTO purchase (id, quote_id, buyer, nonce, rail, status, quote)
    VALUES (%(id)s, %(quote_id)s, %(buyer)s, %(nonce)s, %(rail)s, 'pending', %(quote)s)
    ON CONFLICT ON CONSTRAINT purchase_once DO NOTHING"""

_LOCK: LiteralString = """
    SELECT id, quote_id, buyer, nonce, rail, status, quote, payment_key, pass_id, paid_at
      FROM purchase
     WHERE quote_id = %(quote_id)s AND buyer = %(buyer)s AND nonce = %(nonce)s
       FOR UPDATE"""


async def begin(
    tx: Tx,
    purchase_id: str,
    quote_id: str,
    buyer: str,
    nonce: str,
    rail: str,
    quote: dict[str, Any],
) -> Purchase:
    """Begin a purchase, or meet the one that was begun; either way its row is locked until the transaction ends."""
    await tx.execute(
        _BEGIN,
        {
            "id": purchase_id,
            "quote_id": quote_id,
            "buyer": buyer,
            "nonce": nonce,
            "rail": rail,
            "quote": Jsonb(quote),
        },
    )
    row = await (await tx.execute(_LOCK, {"quote_id": quote_id, "buyer": buyer, "nonce": nonce})).fetchone()
    assert row is not None, "inserted or met"
    return _purchase(row)


_FIND: LiteralString = """
    SELECT id, quote_id, buyer, nonce, rail, status, quote, payment_key, pass_id, paid_at
      FROM purchase
     WHERE quote_id = %(quote_id)s AND buyer = %(buyer)s AND nonce = %(nonce)s"""


async def find(tx: Tx, quote_id: str, buyer: str, nonce: str) -> Purchase | None:
    row = await (await tx.execute(_FIND, {"quote_id": quote_id, "buyer": buyer, "nonce": nonce})).fetchone()
    return None if row is None else _purchase(row)


_GET: LiteralString = """
    SELECT id, quote_id, buyer, nonce, rail, status, quote, payment_key, pass_id, paid_at
      FROM purchase
     WHERE id = %(id)s"""


async def get(tx: Tx, purchase_id: str) -> Purchase | None:
    row = await (await tx.execute(_GET, {"id": purchase_id})).fetchone()
    return None if row is None else _purchase(row)


_PAY_WITH: LiteralString = """
    UPDATE purchase SET payment_key = %(payment_key)s WHERE id = %(id)s AND status = 'pending'"""


async def pay_with(tx: Tx, purchase_id: str, payment_key: bytes) -> None:
    """Say which payment a pending purchase waits for; the one before came to nothing."""
    await tx.execute(_PAY_WITH, {"id": purchase_id, "payment_key": payment_key})


_HAND_OVER: LiteralString = "SELECT FROM purchase WHERE id = %(id)s AND status = 'pending' FOR UPDATE"


async def hand_over(tx: Tx, purchase_id: str) -> bool:
    """Lock a purchase whose pass is still to be written. False: it was handed over before."""
    return (await tx.execute(_HAND_OVER, {"id": purchase_id})).rowcount == 1


_PAID: LiteralString = """
    UPDATE purchase SET status = 'paid', pass_id = %(pass_id)s, paid_at = now() WHERE id = %(id)s AND status = 'pending'"""


async def paid(tx: Tx, purchase_id: str, pass_id: str) -> None:
    """Close a purchase with the pass it bought."""
    await tx.execute(_PAID, {"id": purchase_id, "pass_id": pass_id})


def _purchase(row: tuple[Any, ...]) -> Purchase:
    return Purchase(
        id=row[0],
        quote_id=row[1],
        buyer=row[2],
        nonce=row[3],
        rail=row[4],
        status=row[5],
        quote=row[6],
        payment_key=None if row[7] is None else bytes(row[7]),
        pass_id=row[8],
        paid_at=row[9],
    )
