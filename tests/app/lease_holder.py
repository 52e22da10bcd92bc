"""A process that holds leases, driven by lines on its standard input. Run as ``python lease_holder.py URL ID COUNTER CAPACITY LEASE_S LOG``.

``take``        one unit: answers ``taken``, or why not
``race N``      N clients take until the counter is exhausted; answers how many units were taken, and how often ``held`` was said
``bye``         gives everything back and ends

Each unit taken is one line in LOG, written before the answer, so that what a killed process took is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from decimal import Decimal

from farebox.app.leases import Leases
from farebox.domain.access import GrantLimit
from farebox.store import processes
from farebox.store.changes import Listener
from farebox.store.pool import Database


async def main(
    url: str, process_id: str, counter_id: str, capacity: str, lease_s: str, log_path: str
) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    database = await Database.open(url, size_max=3, name=process_id)
    async with database.transaction() as tx:
        await processes.register(tx, process_id, "gateway", "here", os.getpid())
    leases = Leases(database, process_id, lease_s=float(lease_s))
    holdings = (leases.holding(GrantLimit(counter_id, "calls", Decimal(capacity))),)

    async def hear(kind: str, changed: str) -> None:
        if kind == "lease":
            leases.wanted_elsewhere(changed)

    listener = Listener(url, hear, lambda: None)
    await listener.start()

    async def beat() -> None:
        while True:
            await leases.heartbeat()
            await asyncio.sleep(0.3)

    beating = asyncio.create_task(beat())
    held = 0

    async def take() -> str:
        not_taken = await leases.take_soon(holdings)
        if not_taken is not None:
            return not_taken.nothing.why
        os.write(log, f"{process_id}\n".encode())
        return "taken"

    async def client() -> None:
        nonlocal held
        while (answer := await take()) != "exhausted":
            held += answer == "held"
            await asyncio.sleep(0.001)

    def say(text: str) -> None:
        print(text, flush=True)

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    say("ready")
    while line := (await reader.readline()).decode().split():
        match line:
            case ["take"]:
                say(await take())
            case ["race", clients]:
                await asyncio.gather(*(client() for _ in range(int(clients))))
                say(f"done {held}")
            case _:
                break
    beating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beating
    await listener.close()
    await leases.close()
    await database.close()
    say("bye")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
