"""Slices in one process: taking, growing, returning, and what happens when the database does not answer."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from farebox.app.holdings import FIRST_SLICE, Holding
from farebox.app.leases import Leases
from farebox.base.errors import Unavailable
from farebox.domain.access import AdmissionGrant, GrantLimit, OnExceed
from farebox.store import grants, limits, processes
from farebox.store.pool import Database


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def a_limit(
    database: Database, name: str, calls: int | None, on_exceed: OnExceed = "block"
) -> GrantLimit:
    limit = GrantLimit(
        f"pass:{name}:calls", "calls", None if calls is None else Decimal(calls), on_exceed=on_exceed
    )
    async with database.transaction() as tx:
        await grants.put(
            tx, AdmissionGrant(f"grn_{name}", "pass", name, None, None, frozenset(), (limit,), None, 1)
        )
    return limit


async def some_leases(database: Database, name: str = "gw_a", **settings: object) -> Leases:
    async with database.connection() as tx:
        await processes.register(tx, name, "gateway", "here", 1)
    return Leases(database, name, **settings)  # type: ignore[arg-type]


async def spent(database: Database, name: str) -> int:
    async with database.connection() as tx:
        return int((await limits.counted(tx, [f"pass:{name}:calls"]))[f"pass:{name}:calls"].spent)


async def used(database: Database, name: str) -> int:
    async with database.connection() as tx:
        return int((await limits.counted(tx, [f"pass:{name}:calls"]))[f"pass:{name}:calls"].used)


async def take(leases: Leases, *held: Holding) -> str:
    not_taken = await leases.take_soon(held)
    return "taken" if not_taken is None else not_taken.nothing.why


async def test_a_slice_is_spent_without_asking_and_the_rest_goes_back_at_the_end(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 1000))
    assert not leases.take([held])

    await take(leases, held)
    assert leases.take([held])
    assert await spent(database, "p") == FIRST_SLICE
    await leases.close()

    assert await spent(database, "p") == 2


async def test_all_limits_of_a_call_or_none(database: Database) -> None:
    leases = await some_leases(database)
    wide = leases.holding(await a_limit(database, "wide", 1000))
    narrow = leases.holding(await a_limit(database, "narrow", 2))

    answers = [await take(leases, wide, narrow) for _ in range(3)]
    await leases.close()

    assert answers == ["taken", "taken", "exhausted"]
    assert (await spent(database, "wide"), await spent(database, "narrow")) == (2, 2)


async def test_slices_grow_with_the_rate_and_shrink_to_one_near_the_end(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, lease_s=10, clock=time)
    held = leases.holding(await a_limit(database, "p", 3000))
    sizes: list[int] = []
    granted = 0
    while await take(leases, held) == "taken":
        time.now += 0.001
        while held.asking is not None:
            await asyncio.sleep(0)
        if held.granted != granted:
            sizes.append(held.granted - granted)
            granted = held.granted

    assert sizes[0] == FIRST_SLICE
    assert max(sizes) > 100
    assert sizes[-10:] == [1] * 10
    assert sum(sizes) == 3000


async def test_a_soft_limit_is_counted_and_may_be_passed(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 2, on_exceed="allow"))

    for _ in range(5):
        assert await take(leases, held) == "taken"
    await leases.close()

    assert await spent(database, "p") == 5


async def test_an_unlimited_counter_is_counted(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", None))

    for _ in range(5):
        assert await take(leases, held) == "taken"
    await leases.close()

    assert await spent(database, "p") == 5


async def test_a_revoked_pass_gives_no_slice_and_an_unknown_counter_neither(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 5))
    async with database.transaction() as tx:
        await grants.revoke(tx, "pass", "p")

    assert await take(leases, held) == "revoked"
    assert await take(leases, leases.holding(GrantLimit("nowhere", "calls", Decimal(1)))) == "unknown"


async def test_units_that_were_not_used_after_all_are_free_again(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 2))
    assert [await take(leases, held) for _ in range(3)] == ["taken", "taken", "exhausted"]

    leases.put_back([held])

    assert await take(leases, held) == "taken"
    await leases.close()
    assert await spent(database, "p") == 2


async def test_a_unit_taken_back_after_its_lease_was_returned_is_free_again_too(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    held = leases.holding(await a_limit(database, "p", 3))
    assert await take(leases, held) == "taken"
    time.now += 60
    await leases.heartbeat()
    assert leases.open_leases() == {}

    leases.put_back([held])
    answers = [await take(leases, held) for _ in range(4)]
    await leases.close()

    assert answers == ["taken", "taken", "taken", "exhausted"]
    assert await spent(database, "p") == 3


async def test_after_its_deadline_a_lease_is_asked_about_before_it_is_spent(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, lease_s=10, clock=time)
    held = leases.holding(await a_limit(database, "p", 1000))
    await take(leases, held)

    time.now += 9.5

    assert not leases.take([held])
    assert await take(leases, held) == "taken"
    assert leases.take([held])


async def test_heartbeats_say_what_was_used_keep_the_lease_and_return_it_when_idle(
    database: Database,
) -> None:
    time = Time()
    leases = await some_leases(database, lease_s=10, clock=time)
    held = leases.holding(await a_limit(database, "p", 1000))
    await take(leases, held)
    await take(leases, held)
    time.now += 5

    await leases.heartbeat()
    assert await used(database, "p") == 2
    time.now += 5
    assert leases.take([held])  # past the first deadline, kept by the heartbeat
    time.now += 31
    await leases.heartbeat()

    assert await spent(database, "p") == 3
    assert leases.open_leases() == {}


async def test_a_lease_closed_by_someone_else_is_noticed_at_the_heartbeat(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 1000))
    await take(leases, held)
    async with database.transaction() as tx:
        await limits.give_back(tx, "gw_a", dict.fromkeys(await limits.open_of(tx, "gw_a"), 1))

    await leases.heartbeat()

    assert not leases.take([held])
    assert await take(leases, held) == "taken"
    await leases.close()
    assert await spent(database, "p") == 2


async def test_another_process_may_not_give_back_what_is_not_its_own(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 1000))
    await take(leases, held)
    lease_ids = leases.open_leases()

    async with database.transaction() as tx:
        assert await limits.give_back(tx, "gw_b", dict.fromkeys(lease_ids, 0)) == 0
    assert await spent(database, "p") == FIRST_SLICE


async def test_in_an_outage_what_is_held_is_spent_and_then_the_world_is_blamed(database_url: str) -> None:
    database = await Database.open(database_url, name="test")
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "p", 1000))
    await take(leases, held)
    await database.close()

    for _ in range(FIRST_SLICE - 1):
        assert leases.take([held])
        await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await leases.take_soon([held])
    with pytest.raises(Unavailable):
        await leases.heartbeat()


async def test_the_last_units_held_elsewhere_are_waited_for_and_then_refused_for_now(
    database: Database,
) -> None:
    holder, asker = (
        await some_leases(database, "gw_a"),
        await some_leases(database, "gw_b", wait_for_others_s=0.2),
    )
    limit = await a_limit(database, "p", 10)
    mine, theirs = holder.holding(limit), asker.holding(limit)
    holder._known["pass:p:calls"].wanted = 10
    async with database.transaction() as tx:  # a large slice, taken when there was more
        await tx.execute("UPDATE limit_counter SET capacity = 1000")
    await take(holder, mine)
    async with database.transaction() as tx:
        await tx.execute("UPDATE limit_counter SET capacity = spent")

    assert await take(asker, theirs) == "held"
    holder.wanted_elsewhere("pass:p:calls")
    while holder.open_leases():
        await asyncio.sleep(0.01)
    assert await take(asker, theirs) == "taken"


async def test_two_processes_giving_back_the_same_counters_do_not_block_each_other(
    database: Database,
) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    many = [await a_limit(database, f"p{n}", 1000) for n in range(20)]
    for leases, order in ((one, many), (two, many[::-1])):
        for limit in order:
            await take(leases, leases.holding(limit))
            # The registry holds them weakly; an open lease keeps its holding alive.

    await asyncio.gather(one.close(), two.close())

    assert [await spent(database, f"p{n}") for n in range(20)] == [2] * 20
