"""Jobs: queued with their reason, done by one worker at a time, never lost, given up in the open."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from farebox.store import jobs
from farebox.store.pool import Database, Tx

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


async def claimed(database: Database, owner: str = "w1", **options: float) -> list[jobs.Job]:
    async with database.transaction() as tx:
        return await jobs.claim(tx, ["mail"], owner, **options)  # type: ignore[arg-type]


async def queue(database: Database, *keys: str) -> None:
    async with database.transaction() as tx:
        for key in keys:
            assert await jobs.enqueue(tx, "mail", key, {"to": key})


async def count(tx: Tx) -> int:
    row = await (await tx.execute("SELECT count(*) FROM job")).fetchone()
    assert row is not None
    return int(row[0])


async def lapse(database: Database) -> None:
    """Time passes: every lease ends."""
    async with database.connection() as tx:
        await tx.execute(
            "UPDATE job SET run_at = now() - interval '1 s', lease_until = now() - interval '1 s' WHERE status = 'running'"
        )


async def test_a_job_lives_and_dies_with_its_reason(database: Database) -> None:
    async def roll_back() -> None:
        async with database.transaction() as tx:
            await jobs.enqueue(tx, "mail", "a")
            raise ValueError

    with pytest.raises(ValueError):
        await roll_back()

    assert await claimed(database) == []


async def test_the_same_kind_and_key_is_queued_once_and_disturbs_nobody(database: Database) -> None:
    async with database.transaction() as tx:
        assert await jobs.enqueue(tx, "mail", "a", {"n": 1})
        assert not await jobs.enqueue(tx, "mail", "a", {"n": 2})
        assert await jobs.enqueue(tx, "webhook", "a")
        assert await count(tx) == 2

    assert [job.payload for job in await claimed(database)] == [{"n": 1}]


async def test_a_job_for_later_is_not_due_now(database: Database) -> None:
    async with database.transaction() as tx:
        await jobs.enqueue(tx, "mail", "later", run_at=datetime.now(UTC) + timedelta(hours=1))
        await jobs.enqueue(tx, "mail", "overdue", run_at=LONG_AGO)

    assert [job.key for job in await claimed(database)] == ["overdue"]


async def test_two_workers_never_hold_the_same_job(database: Database) -> None:
    await queue(database, *(f"m{n}" for n in range(200)))

    async def worker(owner: str) -> list[int]:
        mine: list[int] = []
        while batch := await claimed(database, owner, rows_max=7):
            mine += [job.id for job in batch]
        return mine

    shares = await asyncio.gather(*(worker(f"w{n}") for n in range(4)))

    together = [job for share in shares for job in share]
    assert len(together) == len(set(together)) == 200


async def test_a_claim_does_not_wait_for_a_worker_that_is_still_claiming(database: Database) -> None:
    await queue(database, "a", "b")

    async with database.transaction() as slow:
        first = await jobs.claim(slow, ["mail"], "slow", rows_max=1)
        second = await claimed(database, "quick")

    assert [job.key for job in first] == ["a"]
    assert [job.key for job in second] == ["b"]


async def test_a_job_of_a_dead_worker_is_taken_over_and_the_dead_one_can_do_nothing(
    database: Database,
) -> None:
    await queue(database, "a")
    [before] = await claimed(database, "sleeper")
    assert await claimed(database, "heir") == []
    await lapse(database)

    [after] = await claimed(database, "heir")

    assert (after.id, after.attempt) == (before.id, 2)
    async with database.connection() as tx:
        assert not await jobs.complete(tx, before)
        assert not await jobs.fail(tx, before, "too late")
        assert not await jobs.release(tx, before)
        assert await jobs.renew(tx, [before], "sleeper") == set()
        assert await jobs.complete(tx, after)
        assert await count(tx) == 0


async def test_a_worker_that_lost_its_lease_to_itself_cannot_answer_twice(database: Database) -> None:
    await queue(database, "a")
    [first] = await claimed(database, "w1")
    await lapse(database)
    [second] = await claimed(database, "w1")

    async with database.connection() as tx:
        assert not await jobs.complete(tx, first)
        assert await jobs.complete(tx, second)


async def test_a_renewed_lease_does_not_lapse(database: Database) -> None:
    await queue(database, "a", "b")
    [a, _] = await claimed(database, "w1", lease_s=0.0)

    async with database.transaction() as tx:
        assert await jobs.renew(tx, [a], "w1") == {a.id}

    assert [job.key for job in await claimed(database, "w2")] == ["b"]


async def test_a_failed_job_comes_back_later_and_is_buried_at_last(database: Database) -> None:
    await queue(database, "a")
    for attempt in range(1, 4):
        [job] = await claimed(database)
        assert job.attempt == attempt
        async with database.transaction() as tx:
            assert await jobs.fail(tx, job, f"attempt {attempt} failed", attempts_max=3, delay_s=0)

    assert await claimed(database) == []
    async with database.transaction() as tx:
        [letter] = await jobs.dead_letters(tx)
        assert (letter.key, letter.attempts, letter.error) == ("a", 3, "attempt 3 failed")
        assert await jobs.revive(tx, letter.id)
        assert not await jobs.revive(tx, letter.id)
    [job] = await claimed(database)
    assert job.attempt == 1


async def test_a_failed_job_is_not_due_before_its_back_off(database: Database) -> None:
    await queue(database, "a")
    [job] = await claimed(database)
    async with database.transaction() as tx:
        await jobs.fail(tx, job, "no route to host", delay_s=60)

    assert await claimed(database) == []
    async with database.connection() as tx:
        row = await (
            await tx.execute("SELECT run_at - now() BETWEEN interval '30 s' AND interval '80 s' FROM job")
        ).fetchone()
    assert row == (True,)


async def test_a_job_that_kills_its_workers_is_buried(database: Database) -> None:
    await queue(database, "poison")
    for _ in range(3):
        assert len(await claimed(database, attempts_max=3)) == 1
        await lapse(database)

    assert await claimed(database, attempts_max=3) == []
    async with database.connection() as tx:
        [letter] = await jobs.dead_letters(tx)
    assert letter.error == "its workers died on it"


async def test_a_recurring_job_is_due_again_when_it_asked_to_be(database: Database) -> None:
    await queue(database, "nightly")
    [job] = await claimed(database)
    async with database.transaction() as tx:
        assert await jobs.again(tx, job, LONG_AGO)

    [next_time] = await claimed(database)
    assert (next_time.id, next_time.attempt) == (job.id, 1)


async def test_a_stopping_worker_gives_back_what_it_did_not_begin(database: Database) -> None:
    await queue(database, "a")
    [job] = await claimed(database, "stopping")
    async with database.transaction() as tx:
        assert await jobs.release(tx, job)

    [taken] = await claimed(database, "other")
    assert taken.attempt == 1


async def test_an_effect_and_its_completion_are_one(database: Database) -> None:
    """The worker slept through its lease: its effect is rolled back, the heir's stands."""
    await queue(database, "welcome")
    [sleeper] = await claimed(database, "sleeper")
    await lapse(database)
    [heir] = await claimed(database, "heir")

    async def work(job: jobs.Job) -> bool:
        async with database.transaction() as tx:
            await tx.execute(
                "INSERT INTO audit_entry (actor, action, subject) VALUES (%s, 'sent', 'welcome')",
                (job.owner,),
            )
            done = await jobs.complete(tx, job)
            if not done:
                await tx.execute("ROLLBACK; BEGIN")
            return done

    assert [await work(heir), await work(sleeper)] == [True, False]
    async with database.connection() as tx:
        assert await (await tx.execute("SELECT actor FROM audit_entry")).fetchall() == [("heir",)]


async def test_the_backlog_is_told_by_kind(database: Database) -> None:
    await queue(database, "a", "b")
    await claimed(database, rows_max=1)

    async with database.connection() as tx:
        [mail] = await jobs.backlog(tx)

    assert (mail.kind, mail.queued, mail.running, mail.dead) == ("mail", 1, 1, 0)
    assert mail.late_s >= 0


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(1, 1), (2, 2), (5, 16), (12, 2048), (13, 3600), (1000, 3600)]
)
def test_back_off_doubles_up_to_an_hour(attempt: int, seconds: int) -> None:
    assert jobs.backoff_s(attempt) == seconds
