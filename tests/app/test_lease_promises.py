"""What slices promise when processes, calls and the database get in each other's way at the worst moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from farebox.app.holdings import Holding
from farebox.app.leases import Leases
from farebox.base.errors import Unavailable
from farebox.domain.limits import LimitKind, PassLimits, RequestWindow
from farebox.store import limits
from farebox.store.pool import Database
from tests.app.gate import EVERYTHING, Gate, a_call, a_gate, sell_pass
from tests.app.test_lease_kinds import a_limit, spent, take, transfer
from tests.app.test_leases import Time, some_leases

LONG_S = 31 * 86_400


@pytest.fixture
async def two_gates(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Gate, Gate]]:
    async with (
        a_gate(database_url, tmp_path / "one", "gw_one", listen=True) as one,
        a_gate(database_url, tmp_path / "two", "gw_two", listen=True) as two,
    ):
        yield one, two


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


# ── held is not exhausted ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bought", "code"),
    [
        (PassLimits(calls=5), "pass_exhausted"),
        (PassLimits(credits=5), "pass_exhausted"),
        (PassLimits(requests=RequestWindow(5, LONG_S)), "window_exceeded"),
        (PassLimits(calls=5, concurrency=2, download_bytes=1000), "pass_exhausted"),
    ],
    ids=["calls", "credits", "window", "calls, slots and bytes"],
)
async def test_what_one_process_has_put_back_the_other_one_serves(
    two_gates: tuple[Gate, Gate], bought: PassLimits, code: str
) -> None:
    """As behind nginx: one process is asked and cannot let the call through, the other one then serves it."""
    asked, serving = two_gates
    token = await sell_pass(asked, limits=bought)
    for _ in range(5):
        (await asked.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))).finish(0, 0, 0)
        served = await serving.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
        if bought.download_bytes:
            assert served.meter is not None
            assert await transfer_through(served.meter.download) == 20
        served.finish(200, 0, 20)

    refused = await serving.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))

    assert refused.reason.code == code


async def transfer_through(flow: object, size: int = 20) -> int:
    passed = 0
    while passed < size:
        taken = flow.take(size - passed)  # type: ignore[attr-defined]
        passed += taken
        if not taken and not await flow.more():  # type: ignore[attr-defined]
            break
    return passed


async def test_bytes_that_another_process_holds_are_waited_for_in_the_middle_of_a_transfer(
    two_gates: tuple[Gate, Gate],
) -> None:
    one, two = two_gates
    token = await sell_pass(one, limits=PassLimits(download_bytes=1_000))
    holding = await one.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    downloading = await two.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    assert downloading.meter is not None

    assert await transfer_through(downloading.meter.download, 2_000) == 1_000
    holding.finish(200, 0, 0)


async def test_a_process_whose_units_are_all_in_flight_says_so_and_nobody_waits_for_them(
    database: Database,
) -> None:
    busy, asker = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, "calls", 3)
    mine, theirs = busy.holding(limit), asker.holding(limit)
    for _ in range(3):
        assert await take(busy, mine) == "taken"

    asking = asyncio.create_task(take(asker, theirs))
    await until(lambda: theirs.called_at > 0)
    busy.wanted_elsewhere(limit.counter_id)

    assert await asking == "exhausted"


# ── what comes back late ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["calls", "quota", "credits"])
async def test_a_call_that_fails_after_its_lease_went_back_is_not_lost_to_the_other_processes(
    database: Database, kind: LimitKind
) -> None:
    time = Time()
    one, two = await some_leases(database, "gw_a", clock=time), await some_leases(database, "gw_b")
    limit = await a_limit(database, kind, 1)
    mine, theirs = one.holding(limit), two.holding(limit)
    assert await take(one, mine) == "taken"
    lease_id = mine.lease_id
    time.now += 60
    await one.heartbeat()
    assert one.open_leases() == {}

    one.put_back([mine], [lease_id])
    await one.heartbeat()

    assert await spent(database, limit) == 0
    assert await take(two, theirs) == "taken"
    assert not one.take([mine])


@pytest.mark.parametrize("kind", ["calls", "quota", "credits"])
async def test_a_call_of_a_lease_that_was_closed_in_our_name_brings_nothing_back(
    database: Database, kind: LimitKind
) -> None:
    leases, other = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, kind, 3)
    held, theirs = leases.holding(limit), other.holding(limit)
    assert await take(leases, held) == "taken"
    lease_id = held.lease_id
    async with (
        database.transaction() as tx
    ):  # taken for dead; its spool says that nothing is owed for the call
        await limits.give_back(tx, "gw_a", dict.fromkeys(await limits.open_of(tx, "gw_a"), 0))
    held.said_at = held.deadline = 0.0
    await leases.heartbeat()

    leases.put_back([held], [lease_id])
    await leases.heartbeat()

    taken = [await take(other, theirs) for _ in range(4)]
    assert taken == ["taken"] * 3 + ["exhausted"]
    assert await take_all(leases, held) == 0


async def take_all(leases: Leases, held: Holding) -> int:
    taken = 0
    held.nothing_until = 0.0
    while await take(leases, held) == "taken":
        taken += 1
    return taken


async def test_a_slot_that_is_taken_while_others_ask_for_it_comes_back_in_the_end(database: Database) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "concurrency", 2)
    held = leases.holding(limit)
    assert await take(leases, held) == "taken"
    leases.put_back([held])

    leases.wanted_elsewhere(limit.counter_id)
    assert leases.take([held])  # before it has gone
    await leases.heartbeat()
    leases.put_back([held])
    await leases.close()

    assert await spent(database, limit) == 0


# ── a database that says nothing ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["calls", "credits", "concurrency"])
async def test_a_call_does_not_hang_on_a_question_that_is_not_answered(
    database: Database, kind: LimitKind
) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, kind, 100)
    held = leases.holding(limit)
    async with database.transaction() as tx:  # as long as this lasts nobody gets at the counter
        await tx.execute("SELECT FROM limit_counter FOR UPDATE")
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await leases.take_soon([held])

    async with asyncio.timeout(60):
        while True:
            try:
                assert await take(leases, held) == "taken"
                break
            except Unavailable:  # for a moment it is not asked again
                await asyncio.sleep(0.05)


async def test_a_transfer_waits_for_a_database_that_says_nothing_and_goes_on(database: Database) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "download_bytes", 1_000)
    held = leases.holding(limit)
    async with database.transaction() as tx:
        await tx.execute("SELECT FROM limit_counter FOR UPDATE")
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await leases.more_units(held, 10)

    await asyncio.sleep(0.3)
    assert await transfer(leases, held, 2_000) == 1_000


# ── many at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_counters_are_asked_for_in_few_questions(database: Database) -> None:
    leases, other = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    many = [await a_limit(database, "calls", 10, name=f"p{n}") for n in range(150)]
    mine, theirs = [[of.holding(limit) for limit in many] for of in (leases, other)]

    answers = await asyncio.gather(
        *(take(leases, held) for held in mine), *(take(other, held) for held in reversed(theirs))
    )

    assert answers == ["taken"] * 300
    assert [h.used for h in (*mine, *theirs)] == [1] * 300
    async with database.connection() as tx:
        [(statements,)] = await (
            await tx.execute("SELECT count(DISTINCT xmin::text) FROM lease WHERE closed_at IS NULL")
        ).fetchall()
    assert statements < 40
    await asyncio.gather(leases.close(), other.close())
    async with database.connection() as tx:
        [(total,)] = await (await tx.execute("SELECT sum(spent) FROM limit_counter")).fetchall()
    assert total == 300
