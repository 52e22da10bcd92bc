"""Questions to the database that are asked together, and within a time.

After a restart thousands of callers ask at once for their grants and slices. One by one that is a round trip each; here
whatever arrives while one question is under way shares the next one (``store/gather.py``). A database that says nothing
keeps nobody: a question under way is given up after ``ANSWER_S``, and whoever waits behind it hears so at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, Generic, TypeVar

from farebox.base.errors import Unavailable
from farebox.store.gather import Comparable, Gatherer
from farebox.store.pool import Database, Tx

Item = TypeVar("Item")
Verdict = TypeVar("Verdict")

#: The database has this long to answer a question that somebody waits for.
ANSWER_S: Final = 2.0
#: Questions that share one statement.
ROWS_MAX: Final = 128
#: A database that said nothing is not asked again for this long.
SILENT_FOR_S: Final = 0.25


class Questions(Generic[Item, Verdict]):
    """``await questions.put(item)``: the verdict that ``ask(tx, items)`` gives it, or ``Unavailable`` within twice ``answer_s``.

    ``ask`` gets an autocommit connection and at most ``ROWS_MAX`` items in the order of their keys. ``alone``: held while
    the database is asked, where not everything may be said at the same time.
    """

    def __init__(
        self,
        database: Database,
        ask: Callable[[Tx, Sequence[Item]], Awaitable[Sequence[Verdict]]],
        key: Callable[[Item], Comparable],
        *,
        name: str,
        answer_s: float = ANSWER_S,
        askers: int = 1,
        alone: asyncio.Lock | None = None,
    ) -> None:
        self._database = database
        self._ask = ask
        self._answer_s = answer_s
        self._alone: AbstractAsyncContextManager[object] = nullcontext() if alone is None else alone
        self._silent_until = 0.0
        self._gatherer: Gatherer[Item, Verdict] = Gatherer(
            self._asked, key, rows_max=ROWS_MAX, waiting_max=1_000_000, writers=askers, name=name
        )

    async def put(self, item: Item) -> Verdict:
        return await self._gatherer.put(item)

    async def _asked(self, items: Sequence[Item]) -> Sequence[Verdict]:
        async with self._alone:
            if time.monotonic() < self._silent_until:
                raise Unavailable("the database does not answer", SILENT_FOR_S)
            try:
                async with self._database.connection(within_s=self._answer_s) as tx:
                    return await self._ask(tx, items)
            except Unavailable:
                self._silent_until = time.monotonic() + SILENT_FOR_S
                raise
