"""Gathered writes: whatever arrived while the last statement ran shares the next one.

A single row costs a round trip and a commit; sixty-four rows cost hardly more. So one hot write that many callers make at
once goes through a ``Gatherer``: each caller hands over one item and waits for the verdict on it, while one task writes
what has gathered. Under light load an item is written at once and alone. This is the one stated exception to "one use
case, one transaction": the transaction is the batch's, therefore the statement must give each item a verdict of its own
and never fail because of one of them (validate before; ``ON CONFLICT DO NOTHING``; conditions in ``WHERE``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from farebox.base.errors import InvariantError, Unavailable

Item = TypeVar("Item")
Verdict = TypeVar("Verdict")

ROWS_MAX: Final = 64
WAITING_MAX: Final = 10_000


class Comparable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


class Gatherer(Generic[Item, Verdict]):
    """``await gatherer.put(item)`` returns the verdict that ``write`` gave this item.

    ``write(items)`` runs one transaction and returns one verdict for each item, in the same order. It is called with at
    most ``rows_max`` items, sorted by ``key``: two processes that write overlapping rows then lock them in the same order
    and cannot deadlock. ``writers`` batches may be under way at once, each on a connection of its own.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Verdict]]],
        key: Callable[[Item], Comparable],
        *,
        rows_max: int = ROWS_MAX,
        waiting_max: int = WAITING_MAX,
        writers: int = 1,
        name: str = "gatherer",
    ) -> None:
        self._write = write
        self._key = key
        self._rows_max = rows_max
        self._waiting_max = waiting_max
        self._writers = writers
        self._name = name
        self._waiting: deque[tuple[Item, asyncio.Future[Verdict]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        # Counted by the tasks themselves: a task stays in the set for a moment after its last look at what waits.
        self._writing = 0
        self._closed = False

    async def put(self, item: Item) -> Verdict:
        """The verdict on this item, once its batch is committed.

        An error of the batch's write is raised to every caller in it: the outcome of the write is then as unknown as the
        error says. ``Unavailable`` at once when ``waiting_max`` items wait already, or after ``close``. A caller that is
        cancelled while it waits may or may not have been written.
        """
        if self._closed:
            raise Unavailable(f"{self._name} is closing")
        if len(self._waiting) >= self._waiting_max:
            raise Unavailable(f"{self._name}: {self._waiting_max} writes are waiting already")
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, verdict))
        if self._writing < self._writers:
            self._writing += 1
            task = asyncio.create_task(self._write_what_waits(), name=self._name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await verdict

    async def close(self) -> None:
        """Take nothing more; return when everything that waits has its verdict."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    @property
    def waiting(self) -> int:
        """Items not yet handed to a write."""
        return len(self._waiting)

    async def _write_what_waits(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._rows_max))]
                # A caller that gave up before its turn is not written at all.
                batch = [entry for entry in batch if not entry[1].done()]
                if batch:
                    await self._write_batch(batch)
        finally:
            self._writing -= 1

    async def _write_batch(self, batch: list[tuple[Item, asyncio.Future[Verdict]]]) -> None:
        if len(batch) > 1:
            batch.sort(key=lambda entry: self._key(entry[0]))
        try:
            verdicts = await self._write([entry[0] for entry in batch])
            if len(verdicts) != len(batch):
                raise InvariantError(f"{self._name}: {len(verdicts)} verdicts for {len(batch)} items")
        except Exception as error:  # noqa: BLE001 - belongs to the callers, each of whom gets it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        except BaseException:
            for _, future in batch:
                future.cancel()
            raise
        else:
            for (_, future), verdict in zip(batch, verdicts, strict=True):
                if not future.done():
                    future.set_result(verdict)
