"""How the worker spends its time: a few chores, each in a loop of its own, each round bounded.

A chore says whether there is more to do at once. What fails is logged and tried again later, a little later each time;
one chore's trouble does not hold up the others. Stopping waits for the round under way and begins no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from farebox.base.errors import Unavailable

PAUSE_AFTER_FAILURE_S_MAX: Final = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """``run`` does one bounded round and returns how many things it did, ``more`` (of that round) means: go on at once.

    ``every_s`` is the pause when there was less to do.
    """

    name: str
    every_s: float
    more: int
    run: Callable[[], Awaitable[int]]


class Loops:
    """Runs chores until told to stop."""

    def __init__(self, chores: Sequence[Chore]) -> None:
        self._chores = chores
        self._stop = asyncio.Event()
        self._bell = asyncio.Condition()
        self._rounds = 0

    async def run(self) -> None:
        """Return when ``stop`` was called and every round under way has ended."""
        async with asyncio.TaskGroup() as group:
            for chore in self._chores:
                group.create_task(self._keep_doing(chore), name=chore.name)

    def stop(self) -> None:
        """Begin no further round."""
        self._stop.set()

    async def wake(self) -> None:
        """Something happened that chores may have been waiting for (the clock was moved): look now."""
        async with self._bell:
            self._rounds += 1
            self._bell.notify_all()

    async def _keep_doing(self, chore: Chore) -> None:
        failures = 0
        while not self._stop.is_set():
            rounds = self._rounds
            try:
                done = await chore.run()
                failures = 0
            except Unavailable as error:
                failures += 1
                done = 0
                log.warning("chore_waits", chore=chore.name, what=error.what)
            except Exception:
                failures += 1
                done = 0
                log.exception("chore_failed", chore=chore.name, failures=failures)
            if failures == 0 and done >= chore.more:
                continue
            await self._pause(_pause_s(chore.every_s, failures), rounds)

    async def _pause(self, seconds: float, rounds: int) -> None:
        async def woken() -> None:
            async with self._bell:
                await self._bell.wait_for(lambda: self._rounds != rounds)

        waits = [asyncio.create_task(self._stop.wait()), asyncio.create_task(woken())]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wait


def _pause_s(every_s: float, failures: int) -> float:
    """The chore's own pace; after failures twice as long each time. Jittered, so that workers do not march in step."""
    pause = (
        every_s
        if failures == 0
        else min(max(every_s, 0.5) * 2 ** min(failures, 10), PAUSE_AFTER_FAILURE_S_MAX)
    )
    return pause * random.uniform(0.9, 1.1)
