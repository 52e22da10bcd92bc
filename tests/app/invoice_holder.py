"""A process that issues an invoice, says its number and never commits: for tests that kill it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from farebox.store.pool import Database

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.app.office import Office, at


async def main(url: str) -> None:
    async with await Database.open(url, name="holder") as database:
        office = Office(database, today="2026-12-02")
        async with database.transaction() as tx:
            view = await office.billing.issue("holder", "acme", at("2026-12-01"), within=tx)
            print(view.invoice.number, flush=True)
            await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
