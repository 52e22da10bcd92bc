"""Several processes on the last calls of one limit: real processes, a real database, real signals."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.store import grants, limits
from farebox.store.pool import Database

COUNTER = "pass:pas_race:calls"


class Holder:
    """One process that holds leases (lease_holder.py)."""

    def __init__(self, url: str, name: str, capacity: int, lease_s: float, log: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable, str(Path(__file__).with_name("lease_holder.py")),
                url, name, COUNTER, str(capacity), str(lease_s), str(log),
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

    def start(self, *names: str, capacity: int, lease_s: float = 10) -> list[Holder]:
        started = [Holder(self._url, name, capacity, lease_s, self._log) for name in names]
        self.all += started
        for holder in started:
            assert holder.hear() == "ready"
        return started

    def taken(self, name: str = "") -> int:
        """Units that really were taken, as the log says."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return len([line for line in lines if line.startswith(name)])


@pytest.fixture
def holders(database_url: str, tmp_path: Path) -> Iterator[Holders]:
    made = Holders(database_url, tmp_path / "taken.log")
    yield made
    for holder in made.all:
        holder.process.kill()
        holder.process.wait()


async def a_pass(database: Database, calls: int) -> None:
    async with database.transaction() as tx:
        await grants.put(
            tx,
            AdmissionGrant(
                "grn_race", "pass", "pas_race", None, frozenset({"forecast"}), frozenset(),
                (GrantLimit(COUNTER, "calls", Decimal(calls)),), None, 1,
            ),
        )  # fmt: skip


async def spent(database: Database) -> int:
    async with database.connection() as tx:
        return int((await limits.counted(tx, [COUNTER]))[COUNTER].spent)


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
        stranded = sum((await limits.open_of(tx, "gw_killed")).values())
    assert stranded > 1
    assert holders.taken() == 200 - stranded + 1
    assert await spent(database) == 200
