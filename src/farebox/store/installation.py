"""The one row that says what this database is: its mode, and the sandbox's test clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, LiteralString

from farebox.base.errors import InvariantError
from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class Installation:
    """``business_date`` None: the wall clock."""

    mode: Literal["live", "sandbox"]
    business_date: datetime | None


GET: LiteralString = "SELECT mode, business_date FROM installation"


async def get(tx: Tx) -> Installation:
    """What this database is; ``InvariantError`` when the migrations did not say so."""
    row = await (await tx.execute(GET)).fetchone()
    if row is None:
        raise InvariantError("the installation row is missing: run `farebox migrate`")
    return Installation(row[0], row[1])


# Forward only, decided in the statement: of two movers the later one sees the earlier one's date.
MOVE_BUSINESS_DATE: LiteralString = """
    UPDATE installation
       SET business_date = %(to)s
     WHERE mode = 'sandbox' AND (business_date IS NULL OR business_date <= %(to)s)"""


async def move_business_date(tx: Tx, to: datetime) -> bool:
    """Set the test clock. False: not a sandbox, or it already stands later."""
    return (await tx.execute(MOVE_BUSINESS_DATE, {"to": to})).rowcount == 1
