"""The worker: chores in bounded rounds, jobs under leases, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal

import pytest

from farebox.base.errors import Unavailable
from farebox.domain.catalog import LimitEntitlement
from farebox.store import jobs
from farebox.store.jobs import Job
from farebox.store.pool import Database
from farebox.worker.chores import PARTITION_DAYS_AHEAD, Chores
from farebox.worker.jobs import JobRunner
from farebox.worker.loops import Chore, Loops
from tests.app.office import Office, at, period

NOVEMBER = period("2026-11-01", "2026-12-01")


@pytest.fixture
async def office(database: Database) -> AsyncIterator[Office]:
    opened = Office(database)
    await opened.opened(entitlements=(LimitEntitlement("api_calls", "api_calls", Decimal(100)),))
    yield opened
    await opened.close()


@pytest.fixture
def chores(office: Office) -> Chores:
    return Chores(office.database, office.clock, office.date, office.entitlements, office.subscriptions)


async def until(condition: object) -> None:
    for _ in range(500):
        if await condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to that")


# ── loops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failing_chore_is_tried_again_and_holds_up_no_other():
    tried, done = [], []

    async def fails() -> int:
        tried.append(1)
        raise Unavailable("the database is away") if len(tried) % 2 else ValueError("a bug")

    async def works() -> int:
        done.append(1)
        return 1 if len(done) < 50 else 0

    loops = Loops([Chore("fails", 0.0, 1, fails), Chore("works", 10.0, 1, works)])
    running = asyncio.create_task(loops.run())
    while len(tried) < 2 or len(done) < 50:
        await asyncio.sleep(0.01)
    loops.stop()
    await asyncio.wait_for(running, 5)

    assert len(done) == 50


async def test_stopping_waits_for_the_round_under_way():
    begun, go, ended = asyncio.Event(), asyncio.Event(), []

    async def slow() -> int:
        begun.set()
        await go.wait()
        ended.append(1)
        return 1

    loops = Loops([Chore("slow", 0.0, 1, slow)])
    running = asyncio.create_task(loops.run())
    await begun.wait()
    loops.stop()
    await asyncio.sleep(0.05)
    assert not running.done()
    go.set()
    await asyncio.wait_for(running, 5)

    assert ended == [1]


async def test_a_woken_chore_does_not_wait_for_its_pause():
    rounds = []

    async def count() -> int:
        rounds.append(1)
        return 0

    loops = Loops([Chore("patient", 3600.0, 1, count)])
    running = asyncio.create_task(loops.run())
    while len(rounds) < 1:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    await loops.wake()
    while len(rounds) < 2:
        await asyncio.sleep(0.01)
    loops.stop()
    await asyncio.wait_for(running, 5)


# ── chores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_usage_is_folded_by_several_workers_once(office: Office, chores: Chores):
    for _ in range(30):
        await office.used("1", "2026-11-20")

    folded = await asyncio.gather(*(chores.fold_usage() for _ in range(5)))
    await chores.fold_usage()

    assert sum(folded) <= 30
    summary = await office.metering.summary("acme", "api_calls", NOVEMBER)
    assert (summary.value, summary.lag_s) == (30, 0)


async def test_partitions_are_made_ahead_of_both_clocks(office: Office, chores: Chores):
    far = at("2031-05-05")
    office.date.instant = far
    await office.used("1")

    assert await chores.make_partitions() == 0
    assert await chores.make_partitions() == 0

    made = {
        row[0]
        for row in await office.rows(
            "SELECT relname FROM pg_class WHERE relname LIKE 'usage_event_2031%%' AND relkind = 'r'"
        )
    }
    assert made == {f"usage_event_{far + timedelta(days=n):%Y%m%d}" for n in range(PARTITION_DAYS_AHEAD + 1)}
    await office.used("1", "2031-05-05T00:30")
    assert (
        await office.metering.compute("acme", "api_calls", period("2031-05-01", "2031-06-01"))
    ).events == 2


async def test_quotas_turn_over_with_the_period_and_ends_are_kept(office: Office, chores: Chores):
    await office.customer("beta")
    await office.subscribed("beta", end=at("2026-12-10"))
    assert await chores.turn_grants_over() == 0

    office.today_is("2026-12-01")
    assert await chores.turn_grants_over() == 2
    office.today_is("2026-12-10")
    assert await chores.end_subscriptions() == 1
    assert await chores.turn_grants_over() == 0

    ended = await office.rows("SELECT subject_id FROM admission_grant WHERE revoked_at IS NOT NULL")
    assert ended == [("beta",)]


async def test_old_answers_are_forgotten_and_young_ones_kept(office: Office, chores: Chores):
    await office.rows(
        """INSERT INTO idempotent_answer (actor, key, request_digest, status, body, created_at)
           VALUES ('a', 'old', '', 200, '', now() - interval '8 days'), ('a', 'young', '', 200, '', now()) RETURNING key"""
    )

    assert await chores.forget_answers() == 1
    assert await chores.forget_paid_answers() == 0
    assert await office.rows("SELECT key FROM idempotent_answer") == [("young",)]


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_jobs_run_once_among_several_workers_and_failures_come_back(office: Office):
    ran: list[str] = []

    async def handler(job: Job) -> None:
        ran.append(job.key)
        if job.key == "bad":
            raise ValueError("not today")

    async with office.database.transaction() as tx:
        for key in ("bad", *map(str, range(20))):
            await jobs.enqueue(tx, "greet", key)
        await jobs.enqueue(tx, "unknown", "left alone")
    workers = [JobRunner(office.database, f"w{n}", {"greet": handler}) for n in range(3)]

    while any(await asyncio.gather(*(worker.run_due() for worker in workers))):
        pass

    assert sorted(ran) == sorted(("bad", *map(str, range(20))))
    left = await office.rows("SELECT kind, key, status, attempts, last_error FROM job ORDER BY kind")
    assert left == [
        ("greet", "bad", "queued", 1, "ValueError: not today"),
        ("unknown", "left alone", "queued", 0, None),
    ]


async def test_a_job_that_is_interrupted_is_given_back(office: Office):
    begun = asyncio.Event()

    async def endless(_: Job) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with office.database.transaction() as tx:
        await jobs.enqueue(tx, "endless", "1")
    running = asyncio.create_task(JobRunner(office.database, "w", {"endless": endless}).run_due())
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert await office.rows("SELECT status, attempts FROM job") == [("queued", 0)]


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_process_folds_hears_the_clock_and_ends_on_sigterm(office: Office, database_url: str):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    environment |= {
        "FAREBOX_DATABASE_URL": database_url,
        "FAREBOX_MODE": "sandbox",
        "FAREBOX_MASTER_KEY": "a master key for the tests of the worker",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "farebox.wiring.worker", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        await office.used("7", "2026-11-20")

        async def folded() -> bool:
            return (await office.metering.summary("acme", "api_calls", NOVEMBER)).value == 7

        await until(folded)
        process.send_signal(signal.SIGTERM)
        _, output = await asyncio.wait_for(process.communicate(), 20)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output.decode()
    assert b"worker_stopped" in output


async def test_the_process_refuses_a_database_of_the_other_mode(database_url: str):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    environment |= {
        "FAREBOX_DATABASE_URL": database_url,
        "FAREBOX_MODE": "live",
        "FAREBOX_MASTER_KEY": "a master key for the tests of the worker",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "farebox.wiring.worker", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, output = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 1
    assert b"the database is sandbox, this process was started as live" in output
