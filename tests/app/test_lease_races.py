"""Several processes on the last units of one limit: real processes, a real database, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.domain.limits import BYTE_KINDS, LimitKind
from farebox.gateway.shipper import Shipper
from farebox.store import grants, limits
from farebox.store.pool import Database

COUNTER = "pass:pas_race:calls"


class Holder:
    """One process that holds leases (lease_holder.py)."""

    def __init__(
        self,
        url: str,
        name: str,
        kind: str,
        capacity: int,
        window_s: int,
        lease_s: float,
        log: Path,
        *where: str,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable, str(Path(__file__).with_name("lease_holder.py")),
                url, name, kind, str(capacity), str(window_s), str(lease_s), str(log), *where,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()


class Holders:
    def __init__(self, url: str, log: Path) -> None:
        self._url = url
        self._log = log
        self.all: list[Holder] = []

    def start(
        self,
        *names: str,
        capacity: int,
        kind: str = "calls",
        window_s: int = 0,
        lease_s: float = 10,
        spool: str = "-",
        upstream: str = "-",
    ) -> list[Holder]:
        started = [
            Holder(self._url, name, kind, capacity, window_s, lease_s, self._log, spool, upstream)
            for name in names
        ]
        self.all += started
        for holder in started:
            assert holder.hear() == "ready"
        return started

    def taken(self, name: str = "") -> int:
        """Units that really were taken, as the log says."""
        return sum(int(units) for who, units, _, _ in self.log() if who.startswith(name))

    def log(self) -> list[list[str]]:
        """Who, how many units, and between which two instants."""
        lines = self._log.read_text().split("\n")[:-1] if self._log.exists() else []
        return [line.split() for line in lines]


@pytest.fixture
def holders(database_url: str, tmp_path: Path) -> Iterator[Holders]:
    made = Holders(database_url, tmp_path / "taken.log")
    yield made
    for holder in made.all:
        holder.process.kill()
        holder.process.wait()


async def a_pass(
    database: Database, calls: int, kind: LimitKind = "calls", window_s: int | None = None
) -> None:
    async with database.transaction() as tx:
        await grants.put(
            tx,
            AdmissionGrant(
                "grn_race", "pass", "pas_race", None, frozenset({"forecast"}), frozenset(),
                (GrantLimit(f"pass:pas_race:{kind}", kind, Decimal(calls), window_s=window_s),), None, 1,
            ),
        )  # fmt: skip


async def spent(database: Database, counter_id: str = COUNTER) -> int:
    async with database.connection() as tx:
        return int((await limits.counted(tx, [counter_id]))[counter_id].spent)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def shipping(database: Database, spool: Path) -> AsyncIterator[None]:
    """As the host's shipper does all the time; once more at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(Shipper(database, spool).run(stop, 0.05))
    try:
        yield
    finally:
        stop.set()
        await task


def all_of(started: list[Holder], line: str) -> list[str]:
    """Said to all before the first one is listened to."""
    for holder in started:
        holder.say(line)
    return [holder.hear() for holder in started]


async def test_sixty_clients_in_three_processes_take_exactly_the_last_500(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 500)
    started = holders.start("gw_a", "gw_b", "gw_c", capacity=500)

    for holder in started:
        holder.say("race 20")
    answers = await asyncio.to_thread(lambda: [holder.hear() for holder in started])

    assert all(answer.startswith("done") for answer in answers)
    assert holders.taken() == 500
    assert await spent(database) == 500


async def test_slices_that_lie_idle_elsewhere_come_back_before_anyone_is_told_it_is_over(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 200)
    idle, busy = holders.start("gw_idle", "gw_busy", capacity=200)
    assert idle.ask("take") == "taken"  # and it now holds a slice that it does not use

    assert (await asyncio.to_thread(busy.ask, "race 5")) == "done 0"

    assert holders.taken("gw_idle") == 1
    assert holders.taken("gw_busy") == 199


async def test_a_process_stopped_past_its_lease_goes_on_with_what_is_still_its_own(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 200)
    stopped, other = holders.start("gw_stopped", "gw_other", capacity=200, lease_s=2.5)
    assert stopped.ask("take") == "taken"
    stopped.process.send_signal(signal.SIGSTOP)

    # While the lease lives the other one is asked to come again; when it has expired, its slice counts as spent.
    await asyncio.to_thread(other.ask, "race 5")
    before = holders.taken()
    assert before < 200
    stopped.process.send_signal(signal.SIGCONT)
    await asyncio.to_thread(stopped.ask, "race 5")

    assert holders.taken() == 200
    assert await spent(database) == 200


async def test_a_process_stopped_past_its_lease_does_not_spend_what_was_given_back_in_its_name(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 200)
    stopped, other = holders.start("gw_stopped", "gw_other", capacity=200, lease_s=2.5)
    assert stopped.ask("take") == "taken"
    stopped.process.send_signal(signal.SIGSTOP)
    async with database.transaction() as tx:  # as the shipper does for a process that it found dead
        held = await limits.open_of(tx, "gw_stopped")
        assert await limits.give_back(tx, "gw_stopped", dict.fromkeys(held, 1)) == 1
    await asyncio.to_thread(other.ask, "race 5")
    assert holders.taken() == 200
    await asyncio.sleep(2.5)

    stopped.process.send_signal(signal.SIGCONT)

    assert stopped.ask("take") == "exhausted"
    assert holders.taken() == 200
    assert await spent(database) == 200


async def test_a_killed_process_keeps_its_slice_from_being_sold_twice(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 200)
    killed, other = holders.start("gw_killed", "gw_other", capacity=200, lease_s=2.5)
    assert killed.ask("take") == "taken"
    killed.process.kill()
    killed.process.wait()

    await asyncio.to_thread(other.ask, "race 5")

    async with database.transaction() as tx:
        stranded = sum(lease.granted for lease in (await limits.open_of(tx, "gw_killed")).values())
    assert stranded > 1
    assert holders.taken() == 200 - stranded + 1
    assert await spent(database) == 200


@pytest.mark.parametrize(
    ("kind", "capacity"), [("calls", 1000), ("credits", 1000), ("download_bytes", 1_000_000)]
)
@pytest.mark.parametrize("spool_survives", [True, False])
async def test_a_hundred_clients_race_for_the_last_units_while_processes_stop_and_die(
    database: Database, holders: Holders, tmp_path: Path, kind: LimitKind, capacity: int, spool_survives: bool
) -> None:
    await a_pass(database, capacity, kind)
    spools = {name: tmp_path / "spool" / name for name in ("gw_one", "gw_two", "gw_stopped", "gw_killed")}
    started = [
        holders.start(name, capacity=capacity, kind=kind, lease_s=2.5, spool=str(spool))[0]
        for name, spool in spools.items()
    ]
    one, two, stopped, killed = started
    async with contextlib.AsyncExitStack() as shippers:
        for name, spool in spools.items():
            if spool_survives or name != "gw_killed":
                await shippers.enter_async_context(shipping(database, spool))
        for holder in started:
            holder.say("race 25")
        await until(lambda: holders.taken("gw_stopped") > 0 and holders.taken("gw_killed") > 0)
        stopped.process.send_signal(signal.SIGSTOP)
        killed.process.kill()
        killed.process.wait()
        if not spool_survives:
            for file in spools["gw_killed"].iterdir():
                file.unlink()
        # They end when the stopped one's lease has run out: it is past it then.
        assert [(await asyncio.to_thread(holder.hear))[:4] for holder in (one, two)] == ["done", "done"]
        stopped.process.send_signal(signal.SIGCONT)
        assert (await asyncio.to_thread(stopped.hear)).startswith("done")
        # What the dead one had not spent may have come back when the first ones were through.
        await until(lambda: not spool_survives or not any(spools["gw_killed"].glob("*.spool")))
        await asyncio.sleep(0.5)  # of being exhausted, which is remembered for as long
        assert all(
            answer.startswith("done")
            for answer in await asyncio.to_thread(all_of, [one, two, stopped], "race 25")
        )
        assert await asyncio.to_thread(all_of, [one, two, stopped], "bye") == ["bye"] * 3

    taken = holders.taken()
    assert taken <= capacity
    assert await spent(database, f"pass:pas_race:{kind}") == capacity
    if spool_survives and kind not in BYTE_KINDS:
        assert taken >= capacity - 1  # the killed one may have written its record, but not yet our log
        async with database.connection() as tx:
            [(billed,)] = await (await tx.execute("SELECT count(*) FROM usage_event")).fetchall()
        assert billed == capacity


async def test_never_more_slots_are_in_use_than_there_are(database: Database, holders: Holders) -> None:
    running = most = served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most, served
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        served += 1
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await a_pass(database, 6, "concurrency")
        started = holders.start(
            "gw_a",
            "gw_b",
            "gw_stopped",
            capacity=6,
            kind="concurrency",
            lease_s=2.5,
            upstream=f"127.0.0.1:{port}",
        )
        for holder in started:
            holder.say("race 8 6")
        await until(lambda: len({who for who, *_ in holders.log()}) == 3)
        started[2].process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4)
        started[2].process.send_signal(signal.SIGCONT)
        for holder in started:
            assert (await asyncio.to_thread(holder.hear)).startswith("done")
        assert await asyncio.to_thread(all_of, started, "bye") == ["bye"] * 3

    assert 1 < most <= 6
    assert served == holders.taken()
    assert await spent(database, "pass:pas_race:concurrency") == 0


async def test_in_no_window_of_the_database_more_calls_pass_than_it_counts(
    database: Database, holders: Holders
) -> None:
    await a_pass(database, 50, "requests", 2)
    started = holders.start("gw_a", "gw_b", "gw_stopped", capacity=50, kind="requests", window_s=2)
    for holder in started:
        holder.say("race 8 9")
    await until(lambda: holders.taken("gw_stopped") > 0)
    started[2].process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3)  # it holds a share of a window that ends meanwhile
    started[2].process.send_signal(signal.SIGCONT)
    for holder in started:
        assert (await asyncio.to_thread(holder.hear)).startswith("done")

    # This clock is the database's. A taking that may lie in either of two windows is counted in none.
    windows = Counter(
        float(since_s) // 2
        for _, _, since_s, to_s in holders.log()
        if float(since_s) // 2 == float(to_s) // 2
    )
    assert max(windows.values()) <= 50
    assert len(windows) >= 3
    assert sorted(windows.values())[-2] >= 45  # and a window is not wasted either
