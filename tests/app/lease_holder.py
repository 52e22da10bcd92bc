"""A process that holds leases, driven by lines on its standard input. Run as
``python lease_holder.py URL ID KIND CAPACITY WINDOW_S LEASE_S LOG SPOOL UPSTREAM`` (WINDOW_S 0, SPOOL and UPSTREAM ``-``: none).

``take``            one unit: answers ``taken``, or why not
``race N``          N clients take until there is no more; answers how many units were taken, and how often ``held`` was said
``race N SECONDS``  N clients take for so long, whatever they are told
``bye``             gives everything back and ends

Units: a call; a credit; a call in the window; a slot that is held while the UPSTREAM (host:port) serves a call; bytes, in
pieces. Each taking is one line in LOG (id, units, earliest and latest time it can have happened), written before the
answer, so that what a killed process took is known. With a SPOOL directory each call is spooled as a gateway does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from decimal import Decimal
from pathlib import Path

from farebox.app.leases import Leases
from farebox.app.ports.spool import Rider
from farebox.domain.access import GrantLimit
from farebox.domain.limits import BYTE_KINDS, LimitKind
from farebox.gateway.spool import Spool
from farebox.store import processes
from farebox.store.changes import Listener
from farebox.store.pool import Database

PIECE = 1_777
RIDER = Rider("pass", "forecast", "api_calls", grant_id="grn_race", pass_id="pas_race", metered=True)


async def main(
    url: str,
    process_id: str,
    kind: LimitKind,
    capacity: str,
    window_s: str,
    lease_s: str,
    log_path: str,
    spool_directory: str,
    upstream: str,
) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    database = await Database.open(url, size_max=3, name=process_id)
    async with database.transaction() as tx:
        await processes.register(tx, process_id, "gateway", "here", os.getpid())
    leases = Leases(database, process_id, lease_s=float(lease_s))
    spool = (
        None
        if spool_directory == "-"
        else Spool(Path(spool_directory), process_id, leases=leases.open_leases)
    )
    limit = GrantLimit(f"pass:pas_race:{kind}", kind, Decimal(capacity), window_s=int(window_s) or None)
    held = leases.holding(limit)
    holdings = (held,)

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
    refused = 0

    def note(units: int, since_s: float) -> None:
        os.write(log, f"{process_id} {units} {since_s} {time.time()}\n".encode())

    async def take() -> str:
        while True:
            since_s = time.time()  # of a taking without waiting, so that its moment is known
            if leases.take(holdings):
                break
            not_taken = await leases.take_soon(holdings)
            if not_taken is not None:
                return not_taken.nothing.why
            leases.put_back(holdings, [held.lease_id])
        if spool is not None:
            number = spool.admitted(
                f"req_{process_id}_{time.monotonic_ns()}", spool.stub(RIDER), [held.lease_id]
            )
        note(1, since_s)
        if kind == "concurrency":
            await call(upstream)
            leases.put_back(holdings)
        if spool is not None:
            spool.done(number, 200, 0, 0, True)
        return "taken"

    async def transfer() -> str:
        """One call that passes some pieces."""
        number = (
            0
            if spool is None
            else spool.admitted(f"req_{process_id}_{time.monotonic_ns()}", spool.stub(RIDER), [])
        )
        why = "taken"
        for _ in range(10):
            taken = leases.take_units(held, PIECE)
            if taken:
                note(taken, time.time())
            elif (not_taken := await leases.more_units(held, PIECE)) is not None:
                why = not_taken.nothing.why
                break
            await asyncio.sleep(0)
        if spool is not None:
            spool.done(number, 200, 0, 0, True, [(held.lease_id, held.used)] if held.lease_id else [])
        return why

    one = transfer if kind in BYTE_KINDS else take

    async def client(until_s: float) -> None:
        nonlocal refused
        while (answer := await one()) != "exhausted" or time.monotonic() < until_s:
            if until_s and time.monotonic() >= until_s:
                break
            refused += answer == "held"
            await asyncio.sleep(0.001 if spool is None else 0.02)

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
                say(await one())
            case ["race", clients]:
                await asyncio.gather(*(client(0.0) for _ in range(int(clients))))
                say(f"done {refused}")
            case ["race", clients, seconds]:
                until_s = time.monotonic() + float(seconds)
                await asyncio.gather(*(client(until_s) for _ in range(int(clients))))
                say(f"done {refused}")
            case _:
                break
    beating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beating
    await listener.close()
    await leases.close()
    if spool is not None:
        spool.close()
    await database.close()
    say("bye")


async def call(upstream: str) -> None:
    host, _, port = upstream.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await reader.read()
    writer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))  # type: ignore[arg-type]
