"""The book and the payments, to read."""

from __future__ import annotations

from typing import Final

from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.base.errors import refuse
from farebox.store import audit, ledger, payment_list
from farebox.store.audit import AuditEntry
from farebox.store.ledger import Balance, StoredPosting
from farebox.store.payment_list import ListedPayment
from farebox.store.pool import Database

__all__ = ["AuditEntry", "Balance", "Books", "ListedPayment", "StoredPosting"]

_NEWEST: Final = 2**63 - 1


class Books:
    """Reads what was booked."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def postings(
        self,
        reference: str | None = None,
        account: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page[StoredPosting]:
        """Rows of the book, newest first: all, those of one payment, pass or invoice, or those of one account."""
        before = _number(cursor)
        async with self._database.connection() as tx:
            rows = await ledger.list_before(tx, before, rows_wanted(limit), reference, account)
        return page_of(rows, limit, lambda row: str(row.id))

    async def balances(self, limit: int = 50, cursor: str | None = None) -> Page[Balance]:
        """What every account comes to, by account and asset. Over all pages the sum of each asset is zero."""
        account, _, asset = (decode_cursor(cursor) or "").partition("\n")
        async with self._database.connection() as tx:
            rows = await ledger.balances_after(tx, account, asset, rows_wanted(limit))
        return page_of(rows, limit, lambda row: f"{row.account}\n{row.asset}")

    async def payments(
        self, limit: int = 50, cursor: str | None = None, payer: str | None = None, status: str | None = None
    ) -> Page[ListedPayment]:
        """402 payments, newest first; of one payer (any case of an EVM address), in one status, or all."""
        async with self._database.connection() as tx:
            rows = await payment_list.list_before(
                tx, decode_cursor(cursor), rows_wanted(limit), payer, status
            )
        return page_of(rows, limit, lambda row: row.id)

    async def payment(self, payment_id: str) -> ListedPayment:
        """One payment. Refuses ``PAYMENT_NOT_FOUND``."""
        async with self._database.connection() as tx:
            found = await payment_list.get(tx, payment_id)
        if found is None:
            raise refuse("PAYMENT_NOT_FOUND", "there is no payment with this id", "payment_id")
        return found

    async def audit(self, limit: int = 50, cursor: str | None = None) -> Page[AuditEntry]:
        """Who did what, newest first."""
        before = _number(cursor)
        async with self._database.connection() as tx:
            rows = await audit.newest(tx, before, rows_wanted(limit))
        return page_of(rows, limit, lambda row: str(row.id))


def _number(cursor: str | None) -> int:
    text = decode_cursor(cursor)
    if text is None:
        return _NEWEST
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor")
    return int(text)
