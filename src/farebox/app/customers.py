"""Customers: who pays by account, and the keys they call the gateway with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from farebox.app.joining import joined
from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.app.ports.clock import Clock
from farebox.base.errors import InvariantError, Reason, Refused, refuse
from farebox.base.ids import new_id
from farebox.base.secrets import key_hash, new_customer_key
from farebox.domain.customer import Customer, check_customer, erase
from farebox.store import audit, changes, customers, grants, subscriptions
from farebox.store.customers import CustomerKey
from farebox.store.pool import Database, Tx

__all__ = ["Customer", "CustomerKey", "Customers", "NewCustomerKey"]

#: What ``patch`` may change.
PATCHABLE: Final = frozenset(
    {"name", "email", "currency", "timezone", "billing", "payment_method", "metadata"}
)


@dataclass(frozen=True, slots=True)
class NewCustomerKey:
    """The only moment at which the secret ``fbx_ck_…`` is seen."""

    key_id: str
    key: str
    record: CustomerKey


class Customers:
    """Writes down who pays."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def create(self, actor: str, customer: Customer, within: Tx | None = None) -> Customer:
        """A new customer under an id of the caller's choice.

        Refuses ``CUSTOMER_ID_DUPLICATE`` (also the id of an erased one) and the faults of ``check_customer``.
        """
        check_customer(customer)
        async with joined(self._database, within) as tx:
            stored = await customers.add(tx, customer)
            if stored is None:
                raise refuse("CUSTOMER_ID_DUPLICATE", f"a customer {customer.id} exists already", "id")
            await audit.add(tx, actor, "customer.create", customer.id)
        return stored

    async def get(self, customer_id: str) -> Customer:
        """Refuses ``CUSTOMER_NOT_FOUND``. An erased customer is still found, without personal data."""
        async with self._database.connection() as tx:
            customer = await customers.get(tx, customer_id)
        if customer is None:
            raise not_found("customer_id")
        return customer

    async def list(self, limit: int = 50, cursor: str | None = None) -> Page[Customer]:
        """By id."""
        async with self._database.connection() as tx:
            rows = await customers.list_after(tx, decode_cursor(cursor) or "", rows_wanted(limit))
        return page_of(rows, limit, lambda customer: customer.id)

    async def patch(
        self, actor: str, customer_id: str, changes: Mapping[str, Any], within: Tx | None = None
    ) -> Customer:
        """Change the named fields (``PATCHABLE``) and no others; a value replaces the old one whole.

        A new timezone moves no boundary of running subscriptions. The currency stands once there are subscriptions.
        Refuses ``CUSTOMER_NOT_FOUND``, ``CUSTOMER_ERASED``, ``FIELD_UNKNOWN``, ``CURRENCY_FIXED`` and what
        ``check_customer`` refuses.
        """
        if unknown := sorted(set(changes) - PATCHABLE):
            raise Refused(*(Reason("FIELD_UNKNOWN", f"{name} cannot be changed", name) for name in unknown))
        async with joined(self._database, within) as tx:
            before = await locked(tx, customer_id)
            after = dataclasses.replace(before, **changes)
            check_customer(after)
            if after.currency != before.currency and await subscriptions.of_customer(tx, customer_id):
                raise refuse(
                    "CURRENCY_FIXED",
                    "a customer with subscriptions keeps the currency of the book",
                    "currency",
                )
            stored = await customers.update(tx, after)
            if stored is None:
                raise InvariantError(f"customer {customer_id} vanished under its lock")
            await audit.add(tx, actor, "customer.patch", customer_id, {"fields": sorted(changes)})
        return stored

    async def erase(self, actor: str, customer_id: str, within: Tx | None = None) -> Customer:
        """Remove the personal data and keep the books: invoices, postings and usage name only the id.

        Ends every key and the admission grant. Refuses ``CUSTOMER_NOT_FOUND`` and ``CUSTOMER_HAS_SUBSCRIPTIONS``
        (running ones must end first). Erasing twice is once.
        """
        async with joined(self._database, within) as tx:
            before = await customers.lock(tx, customer_id)
            if before is None:
                raise not_found("customer_id")
            if before.erased_at is not None:
                return before
            if running := [
                s.id for s in await subscriptions.of_customer(tx, customer_id) if s.status != "ended"
            ]:
                raise refuse(
                    "CUSTOMER_HAS_SUBSCRIPTIONS",
                    "end the subscriptions of this customer first",
                    "customer_id",
                    subscriptions=running,
                )
            stored = await customers.update(tx, erase(before, self._clock.now()))
            if stored is None:
                raise InvariantError(f"customer {customer_id} vanished under its lock")
            for key_id in await customers.revoke_all_keys(tx, customer_id):
                await changes.announce(tx, "key", key_id)
            await grants.revoke(tx, "customer", customer_id)
            await audit.add(tx, actor, "customer.erase", customer_id)
        return stored

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def create_key(self, actor: str, customer_id: str, within: Tx | None = None) -> NewCustomerKey:
        """A new gateway key. Refuses ``CUSTOMER_NOT_FOUND`` and ``CUSTOMER_ERASED``."""
        secret = new_customer_key()
        async with joined(self._database, within) as tx:
            await locked(tx, customer_id)
            record = await customers.add_key(tx, new_id("ck"), customer_id, key_hash(secret), secret[-4:])
            await audit.add(tx, actor, "customer_key.create", customer_id, {"key_id": record.id})
        return NewCustomerKey(record.id, secret, record)

    async def list_keys(
        self, customer_id: str, limit: int = 50, cursor: str | None = None
    ) -> Page[CustomerKey]:
        """A customer's keys without their secrets, oldest first. Refuses ``CUSTOMER_NOT_FOUND``."""
        await self.get(customer_id)
        async with self._database.connection() as tx:
            rows = await customers.keys(tx, customer_id, decode_cursor(cursor) or "", rows_wanted(limit))
        return page_of(rows, limit, lambda key: key.id)

    async def revoke_key(self, actor: str, customer_id: str, key_id: str, within: Tx | None = None) -> None:
        """End a key now, in every process. Revoking twice is once. Refuses ``CUSTOMER_KEY_NOT_FOUND``."""
        async with joined(self._database, within) as tx:
            if not await customers.revoke_key(tx, customer_id, key_id):
                raise refuse("CUSTOMER_KEY_NOT_FOUND", "this customer has no such key", "key_id")
            await audit.add(tx, actor, "customer_key.revoke", customer_id, {"key_id": key_id})
            await changes.announce(tx, "key", key_id)


async def locked(tx: Tx, customer_id: str, field: str = "customer_id") -> Customer:
    """The living customer, held until the transaction ends; refuses ``CUSTOMER_NOT_FOUND`` and ``CUSTOMER_ERASED``."""
    customer = await customers.lock(tx, customer_id)
    if customer is None:
        raise not_found(field)
    if customer.erased_at is not None:
        raise refuse("CUSTOMER_ERASED", "this customer was erased", field)
    return customer


def not_found(field: str) -> Refused:
    """There is no such customer."""
    return refuse("CUSTOMER_NOT_FOUND", "there is no customer with this id", field)
