"""The shipper as a process: ``python ship.py URL DIR [die]``. With ``die`` it is killed right after its first commit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from farebox.gateway.shipper import Shipper
from farebox.store.pool import Database


class MortalDatabase(Database):
    """Kills its process when a transaction that delivered something has been committed."""

    def transaction(self):  # type: ignore[no-untyped-def]
        return _KillAfter(super().transaction())


class _KillAfter:
    def __init__(self, real) -> None:  # type: ignore[no-untyped-def]
        self._real = real

    async def __aenter__(self):  # type: ignore[no-untyped-def]
        return await self._real.__aenter__()

    async def __aexit__(self, *what):  # type: ignore[no-untyped-def]
        await self._real.__aexit__(*what)
        os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str, directory: str, die: bool) -> None:
    kind = MortalDatabase if die else Database
    async with await kind.open(url, name="shipper", size_max=2) as database:
        shipper = Shipper(database, Path(directory))
        assert shipper.lock()
        await shipper.ship()
        print(shipper.counts.events, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], "die" in sys.argv[3:]))
