"""A use case is one transaction. Where a caller has one open already, the use case joins it and the caller commits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from farebox.store.pool import Database, Tx


@asynccontextmanager
async def joined(database: Database, within: Tx | None) -> AsyncIterator[Tx]:
    """``within`` itself, or a new transaction that is committed when the block ends."""
    if within is not None:
        yield within
        return
    async with database.transaction() as tx:
        yield tx
