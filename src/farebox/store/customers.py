"""Customers and their gateway keys."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.base.ids import CustomerId
from farebox.domain.customer import Customer
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class CustomerKey:
    """A gateway key without its secret. ``hint`` is its last four characters."""

    id: str
    customer_id: str
    hint: str
    created_at: datetime
    revoked_at: datetime | None


ADD: LiteralString = """
    INSERT INTO customer (id, name, email, currency, timezone, billing, payment_method, metadata)
    VALUES (%(id)s, %(name)s, %(email)s, %(currency)s, %(timezone)s, %(billing)s, %(payment_method)s, %(metadata)s)
    ON CONFLICT (id) DO NOTHING
    RETURNING id, name, email, currency, timezone, billing, payment_method, metadata, created_at, updated_at, erased_at"""


async def add(tx: Tx, customer: Customer) -> Customer | None:
    """Store a new customer. None: the id is taken (an erased customer keeps its id)."""
    row = await (await tx.execute(ADD, _values(customer))).fetchone()
    return None if row is None else _customer(row)


# Primary key.
GET: LiteralString = """
    SELECT id, name, email, currency, timezone, billing, payment_method, metadata, created_at, updated_at, erased_at
      FROM customer
     WHERE id = %(id)s"""


async def get(tx: Tx, customer_id: str) -> Customer | None:
    """The customer with this id, erased ones included."""
    row = await (await tx.execute(GET, {"id": customer_id})).fetchone()
    return None if row is None else _customer(row)


# The first lock of everything that changes what a customer owes or may use (customer → invoice → counter).
LOCK: LiteralString = """
    SELECT id, name, email, currency, timezone, billing, payment_method, metadata, created_at, updated_at, erased_at
      FROM customer
     WHERE id = %(id)s
       FOR NO KEY UPDATE"""


async def lock(tx: Tx, customer_id: str) -> Customer | None:
    """The customer, held until the transaction ends. Events and other rows that refer to it are not kept waiting."""
    row = await (await tx.execute(LOCK, {"id": customer_id})).fetchone()
    return None if row is None else _customer(row)


# Primary key order.
LIST: LiteralString = """
    SELECT id, name, email, currency, timezone, billing, payment_method, metadata, created_at, updated_at, erased_at
      FROM customer
     WHERE id > %(after)s
     ORDER BY id
     LIMIT %(rows)s"""


async def list_after(tx: Tx, after: str, rows: int) -> list[Customer]:
    """Customers by id."""
    return [
        _customer(row) for row in await (await tx.execute(LIST, {"after": after, "rows": rows})).fetchall()
    ]


UPDATE: LiteralString = """
    UPDATE customer
       SET name = %(name)s, email = %(email)s, currency = %(currency)s, timezone = %(timezone)s, billing = %(billing)s,
           payment_method = %(payment_method)s, metadata = %(metadata)s, erased_at = %(erased_at)s, updated_at = now()
     WHERE id = %(id)s
    RETURNING id, name, email, currency, timezone, billing, payment_method, metadata, created_at, updated_at, erased_at"""


async def update(tx: Tx, customer: Customer) -> Customer | None:
    """Write all fields of a customer that ``lock`` holds."""
    row = await (await tx.execute(UPDATE, _values(customer))).fetchone()
    return None if row is None else _customer(row)


# Primary key, one probe an id: which of a batch's customers exist.
EXISTING: LiteralString = """
    SELECT id
      FROM customer
     WHERE id = ANY (%(ids)s) AND erased_at IS NULL"""


async def existing(tx: Tx, ids: list[str]) -> set[str]:
    """Those of the ids that are customers and not erased."""
    return {row[0] for row in await (await tx.execute(EXISTING, {"ids": ids})).fetchall()}


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

ADD_KEY: LiteralString = """
    INSERT INTO customer_key (id, customer_id, key_hash, hint)
    VALUES (%(id)s, %(customer_id)s, %(hash)s, %(hint)s)
    RETURNING id, customer_id, hint, created_at, revoked_at"""


async def add_key(tx: Tx, key_id: str, customer_id: str, key_hash: bytes, hint: str) -> CustomerKey:
    """Store a key by its hash."""
    row = await (
        await tx.execute(ADD_KEY, {"id": key_id, "customer_id": customer_id, "hash": key_hash, "hint": hint})
    ).fetchone()
    assert row is not None
    return CustomerKey(*row)


# Index customer_key_customer.
KEYS: LiteralString = """
    SELECT id, customer_id, hint, created_at, revoked_at
      FROM customer_key
     WHERE customer_id = %(customer_id)s AND id > %(after)s
     ORDER BY id
     LIMIT %(rows)s"""


async def keys(tx: Tx, customer_id: str, after: str, rows: int) -> list[CustomerKey]:
    """A customer's keys, oldest first, revoked ones included."""
    cursor = await tx.execute(KEYS, {"customer_id": customer_id, "after": after, "rows": rows})
    return [CustomerKey(*row) for row in await cursor.fetchall()]


REVOKE_KEY: LiteralString = """
    UPDATE customer_key
       SET revoked_at = coalesce(revoked_at, now())
     WHERE id = %(id)s AND customer_id = %(customer_id)s"""


async def revoke_key(tx: Tx, customer_id: str, key_id: str) -> bool:
    """End a key. False: this customer has no such key."""
    return (await tx.execute(REVOKE_KEY, {"id": key_id, "customer_id": customer_id})).rowcount == 1


REVOKE_ALL_KEYS: LiteralString = """
    UPDATE customer_key
       SET revoked_at = now()
     WHERE customer_id = %(customer_id)s AND revoked_at IS NULL
    RETURNING id"""


async def revoke_all_keys(tx: Tx, customer_id: str) -> list[str]:
    """End every living key of a customer; returns their ids."""
    cursor = await tx.execute(REVOKE_ALL_KEYS, {"customer_id": customer_id})
    return [row[0] for row in await cursor.fetchall()]


def _values(customer: Customer) -> dict[str, Any]:
    return {
        "id": customer.id,
        "name": customer.name,
        "email": customer.email,
        "currency": customer.currency,
        "timezone": customer.timezone,
        "billing": Jsonb(dict(customer.billing)),
        "payment_method": Jsonb(dict(customer.payment_method)),
        "metadata": Jsonb(dict(customer.metadata)),
        "erased_at": customer.erased_at,
    }


def _customer(row: tuple[Any, ...]) -> Customer:
    return Customer(
        id=CustomerId(row[0]),
        name=row[1],
        email=row[2],
        currency=row[3],
        timezone=row[4],
        billing=row[5],
        payment_method=row[6],
        metadata=row[7],
        created_at=row[8],
        updated_at=row[9],
        erased_at=row[10],
    )
