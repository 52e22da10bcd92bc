"""The book's rows. Booking an entry twice books it once; nothing is ever changed (a trigger refuses)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from farebox.base.errors import InvariantError
from farebox.domain.ledger import Posting
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class StoredPosting:
    """A row of the book."""

    id: int
    posting: Posting
    booked_at: datetime


@dataclass(frozen=True, slots=True)
class Balance:
    """``balance`` in whole minor units of ``asset``: what came in less what went out."""

    account: str
    asset: str
    balance: int


POST: LiteralString = """
    INSERT INTO posting (entry, leg, kind, source, destination, asset, amount, reference)
    SELECT * FROM unnest(%(entry)s::text[], %(leg)s::smallint[], %(kind)s::text[], %(source)s::text[],
                         %(destination)s::text[], %(asset)s::text[], %(amount)s::numeric[], %(reference)s::text[])
     ORDER BY 1, 2
    ON CONFLICT ON CONSTRAINT posting_entry_once DO NOTHING"""

SAME: LiteralString = """
    SELECT entry, leg, kind, source, destination, asset, amount, reference
      FROM posting
     WHERE entry = ANY (%(entries)s)"""


async def post(tx: Tx, postings: Sequence[Posting]) -> int:
    """Book the rows; returns how many are new.

    An entry that is in the book already is left as it is. One that says something else now is an ``InvariantError``:
    the same fact cannot move two different amounts.
    """
    if not postings:
        return 0
    columns = zip(
        *(
            (p.entry, p.leg, p.kind, p.source, p.destination, p.asset, p.amount, p.reference)
            for p in postings
        ),
        strict=True,
    )
    names = ("entry", "leg", "kind", "source", "destination", "asset", "amount", "reference")
    new = (await tx.execute(POST, dict(zip(names, map(list, columns), strict=True)))).rowcount
    if new < len(postings):
        rows = await (await tx.execute(SAME, {"entries": sorted({p.entry for p in postings})})).fetchall()
        booked = {(row[0], row[1]): Posting(*(*row[:6], int(row[6]), row[7])) for row in rows}
        for posting in postings:
            if booked.get((posting.entry, posting.leg)) != posting:
                raise InvariantError(
                    f"{posting.entry} leg {posting.leg} is in the book and says something else"
                )
    return new


# Primary key, backwards; a reference or an account narrows it by posting_reference or by a filter.
LIST: LiteralString = """
    SELECT id, entry, leg, kind, source, destination, asset, amount, reference, booked_at
      FROM posting
     WHERE id < %(before)s
       AND (%(reference)s::text IS NULL OR reference = %(reference)s)
       AND (%(account)s::text IS NULL OR source = %(account)s OR destination = %(account)s)
     ORDER BY id DESC
     LIMIT %(rows)s"""


async def list_before(
    tx: Tx, before: int, rows: int, reference: str | None = None, account: str | None = None
) -> list[StoredPosting]:
    """Rows of the book, newest first."""
    values = {"before": before, "rows": rows, "reference": reference, "account": account}
    return [_stored(row) for row in await (await tx.execute(LIST, values)).fetchall()]


# The view reads the whole book.
BALANCES: LiteralString = """
    SELECT account, asset, balance
      FROM ledger_balance
     WHERE (account, asset) > (%(account)s, %(asset)s)
     ORDER BY account, asset
     LIMIT %(rows)s"""


async def balances_after(tx: Tx, account: str, asset: str, rows: int) -> list[Balance]:
    """Balances by account and asset."""
    cursor = await tx.execute(BALANCES, {"account": account, "asset": asset, "rows": rows})
    return [Balance(row[0], row[1], int(row[2])) for row in await cursor.fetchall()]


def _stored(row: tuple[Any, ...]) -> StoredPosting:
    return StoredPosting(
        row[0], Posting(row[1], row[2], row[3], row[4], row[5], row[6], int(row[7]), row[8]), row[9]
    )
