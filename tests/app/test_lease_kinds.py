"""Leases of every kind of limit but calls: bytes, credits, slots, windows, rates. One or two processes, a real database."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from decimal import Decimal

import pytest

from farebox.app.holdings import FIRST_SLICE_BYTES, Holding
from farebox.app.leases import Leases
from farebox.domain.access import AdmissionGrant, GrantLimit
from farebox.domain.limits import LimitKind
from farebox.store import grants, limits
from farebox.store.pool import Database
from tests.app.test_leases import Time, some_leases

KINDS: tuple[LimitKind, ...] = (
    "quota", "calls", "credits", "requests", "concurrency", "upload_bytes", "download_bytes", "upload_rate", "download_rate",
)  # fmt: skip
WINDOW_S = 3600


async def a_limit(
    database: Database, kind: LimitKind, limit: int, window_s: int | None = None, name: str = "p"
) -> GrantLimit:
    of = GrantLimit(f"pass:{name}:{kind}", kind, Decimal(limit), window_s=window_s)
    async with database.transaction() as tx:
        grant = AdmissionGrant(f"grn_{name}", "pass", name, None, None, frozenset(), (of,), None, 1)
        await grants.put(tx, grant)
    return of


async def spent(database: Database, limit: GrantLimit) -> int:
    async with database.connection() as tx:
        return int((await limits.counted(tx, [limit.counter_id]))[limit.counter_id].spent)


async def transfer(leases: Leases, held: Holding, size: int, piece: int = 10_000) -> int:
    """As a transfer does it: what may pass now, then wait for more; cut where there is none."""
    passed = 0
    while passed < size:
        taken = leases.take_units(held, min(piece, size - passed))
        passed += taken
        if taken == 0 and await leases.more_units(held, min(piece, size - passed)) is not None:
            break
    return passed


async def take(leases: Leases, *held: Holding) -> str:
    not_taken = await leases.take_soon(held)
    return "taken" if not_taken is None else not_taken.nothing.why


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


# ── what holds for all of them ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_grant_says_of_a_limit_is_read_back_as_it_was(
    database: Database, kind: LimitKind
) -> None:
    limit = await a_limit(database, kind, 100, WINDOW_S if "r" in kind else None)

    async with database.connection() as tx:
        grant = await grants.by_subject(tx, "pass", "p")

    assert grant is not None
    assert grant.limits == (limit,)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_process_stopped_past_its_lease_spends_nothing_of_what_was_closed_in_its_name(
    database: Database, kind: LimitKind
) -> None:
    time = Time()
    leases = await some_leases(database, lease_s=10, clock=time)
    limit = await a_limit(database, kind, 1_000_000, WINDOW_S if kind == "requests" else 1)
    held = leases.holding(limit)
    by_units = kind.endswith(("bytes", "rate"))
    if by_units:
        await leases.more_units(held, 1)
        assert leases.take_units(held, 1) == 1
    else:
        assert await take(leases, held) == "taken"
    time.now += 10  # as after SIGSTOP and SIGCONT
    async with database.transaction() as tx:
        open_leases = await limits.open_of(tx, "gw_a")
        await limits.give_back(tx, "gw_a", {i: o.granted for i, o in open_leases.items()})
        await tx.execute("UPDATE limit_counter SET spent = capacity")

    assert leases.take_units(held, 1) == 0 if by_units else not leases.take([held])
    if kind.endswith("rate"):
        await leases.more_units(held, 1)
        assert held.share == 0
    elif by_units:
        not_taken = await leases.more_units(held, 1)
        assert not_taken is not None
        assert not_taken.nothing.why == "exhausted"
    else:
        assert await take(leases, held) == "exhausted"


async def test_the_slots_and_windows_of_a_call_are_taken_together_or_not_at_all(database: Database) -> None:
    leases = await some_leases(database)
    calls = leases.holding(await a_limit(database, "calls", 100, name="a"))
    slots = leases.holding(await a_limit(database, "concurrency", 5, name="b"))
    window = leases.holding(await a_limit(database, "requests", 3, WINDOW_S, name="c"))

    answers = [await take(leases, calls, slots, window) for _ in range(4)]

    assert answers == ["taken", "taken", "taken", "exhausted"]
    assert (calls.used, slots.used, window.used) == (3, 3, 3)


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("piece", [1, 997, 65_536, 2_000_000])
async def test_a_download_of_a_million_bytes_gets_exactly_a_million(database: Database, piece: int) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "download_bytes", 1_000_000)
    held = leases.holding(limit)

    assert await transfer(leases, held, 5_000_000, piece) == 1_000_000
    await leases.close()

    assert await spent(database, limit) == 1_000_000


async def test_two_processes_and_ten_transfers_share_the_last_bytes(database: Database) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, "download_bytes", 1_000_000)

    passed = await asyncio.gather(
        *(transfer(leases, leases.holding(limit), 300_000) for leases in (one, two) for _ in range(5))
    )

    assert sum(passed) <= 1_000_000
    await one.close()
    await two.close()
    rest = await some_leases(database, "gw_c")
    assert sum(passed) + await transfer(rest, rest.holding(limit), 1_000_000) == 1_000_000


async def test_bytes_are_asked_for_in_few_and_large_slices(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "download_bytes", 10_000_000_000))

    await leases.more_units(held, 1_000)

    assert held.granted >= FIRST_SLICE_BYTES


async def test_bytes_that_did_not_pass_are_free_again(database: Database) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "download_bytes", 1000)
    held = leases.holding(limit)
    assert await transfer(leases, held, 1000) == 1000

    leases.put_back_units(held, 400)

    assert await transfer(leases, held, 1000) == 400
    await leases.close()
    assert await spent(database, limit) == 1000


# ── credits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_costs_more_than_there_is_leaves_a_debt_and_the_next_one_is_refused(
    database: Database,
) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "credits", 3)
    held = leases.holding(limit)
    assert await take(leases, held) == "taken"

    leases.overdraw(held, 9)

    assert await take(leases, held) == "exhausted"
    await leases.heartbeat()
    assert await spent(database, limit) == 10
    await leases.heartbeat()
    await leases.close()
    assert await spent(database, limit) == 10


async def test_a_debt_of_a_call_that_outlived_its_lease_is_told_once(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    limit = await a_limit(database, "credits", 1000)
    held = leases.holding(limit)
    assert await take(leases, held) == "taken"
    time.now += 60
    await leases.heartbeat()
    assert leases.open_leases() == {}

    leases.overdraw(held, 4)
    await leases.heartbeat()
    await leases.heartbeat()
    assert await spent(database, limit) == 5
    assert await take(leases, held) == "taken"
    await leases.close()

    assert await spent(database, limit) == 6


async def test_credits_that_a_call_brings_never_lift_the_balance_above_what_was_bought(
    database: Database,
) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, "credits", 10)
    mine, theirs = one.holding(limit), two.holding(limit)
    assert [await take(two, theirs) for _ in range(4)] == ["taken"] * 4
    await two.close()
    assert await take(one, mine) == "taken"

    one.put_back_units(mine, 100)
    await one.heartbeat()

    taken = 0
    while await take(one, mine) == "taken":
        taken += 1
    assert taken == 10
    await one.close()
    assert await spent(database, limit) == 10


async def test_a_call_that_turned_out_free_costs_nothing_even_after_its_lease(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    limit = await a_limit(database, "credits", 10)
    held = leases.holding(limit)
    assert await take(leases, held) == "taken"
    time.now += 60
    await leases.heartbeat()
    assert await spent(database, limit) == 1

    leases.put_back_units(held, 1)
    await leases.heartbeat()

    assert await spent(database, limit) == 0


# ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_slot_is_used_again_when_its_call_has_ended(database: Database) -> None:
    leases = await some_leases(database)
    held = leases.holding(await a_limit(database, "concurrency", 2))

    assert [await take(leases, held) for _ in range(3)] == ["taken", "taken", "exhausted"]
    leases.put_back([held])

    assert [await take(leases, held) for _ in range(2)] == ["taken", "exhausted"]
    not_taken = await leases.take_soon([held])
    assert not_taken is not None
    assert not_taken.retry_after_s is not None


async def test_slots_that_lie_idle_go_back_while_others_of_the_lease_are_in_use(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    limit = await a_limit(database, "concurrency", 5)
    held = leases.holding(limit)
    for _ in range(5):
        assert await take(leases, held) == "taken"
    leases.put_back([held] * 3)
    time.now += 31

    await leases.heartbeat()
    await until(lambda: held.asking is None)

    assert await spent(database, limit) == 2
    leases.put_back([held] * 2)
    time.now += 31
    await leases.heartbeat()
    await until(lambda: held.asking is None)
    assert await spent(database, limit) == 0
    assert leases.open_leases() == {}


async def test_slots_wanted_elsewhere_are_shared_as_calls_end(database: Database) -> None:
    one = await some_leases(database, "gw_a")
    two = await some_leases(database, "gw_b", wait_for_others_s=0.1)
    limit = await a_limit(database, "concurrency", 4)
    mine, theirs = one.holding(limit), two.holding(limit)
    for _ in range(4):
        assert await take(one, mine) == "taken"
    assert await take(two, theirs) == "held"  # nobody has answered it that all are in use

    one.wanted_elsewhere(limit.counter_id)
    one.put_back([mine])
    await until(lambda: mine.asking is None)
    one.put_back([mine])
    await until(lambda: mine.asking is None)
    await one.heartbeat()
    await until(lambda: mine.asking is None)
    one.put_back([mine])

    assert await spent(database, limit) == 2
    assert [await take(one, mine) for _ in range(1)] == ["taken"]
    theirs.nothing_until = 0.0
    assert [await take(two, theirs) for _ in range(2)] == ["taken", "taken"]
    assert mine.used + theirs.used == 4


async def test_a_process_without_any_slot_gets_some_of_those_in_use_elsewhere(database: Database) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b", wait_for_others_s=0.1)
    limit = await a_limit(database, "concurrency", 4)
    mine, theirs = one.holding(limit), two.holding(limit)
    for _ in range(4):
        assert await take(one, mine) == "taken"
    assert await take(one, mine) == "exhausted"
    assert await take(two, theirs) == "held"

    one.wanted_elsewhere(limit.counter_id)
    for _ in range(2):
        one.put_back([mine])
        assert not one.take([mine])
        await until(lambda: mine.asking is None)
    theirs.nothing_until = 0.0

    assert await take(two, theirs) == "taken"
    assert await take(one, mine) == "exhausted"  # for a moment, so that the other one gets its part


async def test_calls_whose_lease_was_lost_bring_no_slot_back(database: Database) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "concurrency", 2)
    held = leases.holding(limit)
    assert [await take(leases, held) for _ in range(2)] == ["taken", "taken"]
    async with database.transaction() as tx:
        await limits.give_back(tx, "gw_a", dict.fromkeys(await limits.open_of(tx, "gw_a"), 0))
    await leases.heartbeat()

    leases.put_back([held] * 2)

    assert [await take(leases, held) for _ in range(3)] == ["taken", "taken", "exhausted"]


@pytest.mark.parametrize(("kind", "expected"), [("concurrency", 5), ("download_rate", 5), ("credits", 0)])
async def test_what_a_vanished_process_held_is_free_long_after_its_lease_but_never_an_amount(
    database: Database, kind: LimitKind, expected: int
) -> None:
    vanished = await some_leases(database, "gw_a")
    limit = await a_limit(database, kind, 5, 1)
    theirs = vanished.holding(limit)
    if kind == "download_rate":
        await vanished.more_units(theirs, 1)
    else:
        for _ in range(5):
            assert await take(vanished, theirs) == "taken"
    async with database.transaction() as tx:
        await tx.execute("UPDATE lease SET expires_at = now() - interval '20 seconds'")
    early = await some_leases(database, "gw_b", wait_for_others_s=0.0)
    late = await some_leases(database, "gw_c", wait_for_others_s=0.0, abandoned_margin_s=10)

    async def got(leases: Leases) -> int:
        held = leases.holding(limit)
        if kind == "download_rate":
            await leases.more_units(held, 1)
            return held.share
        return sum([await take(leases, held) == "taken" for _ in range(6)])

    assert await got(early) == 0
    assert await got(late) == expected


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def turn(database: Database, by_s: int = WINDOW_S) -> None:
    """As if the windows that are counted now had begun so much earlier."""
    async with database.transaction() as tx:
        for table in ("limit_counter", "lease"):
            await tx.execute(
                f"UPDATE {table} SET window_start = window_start - make_interval(secs => {by_s})"
            )  # type: ignore[arg-type]


async def test_a_window_counts_so_many_calls_and_says_when_it_ends(database: Database) -> None:
    leases = await some_leases(database)
    limit = await a_limit(database, "requests", 20, WINDOW_S)
    held = leases.holding(limit)

    taken = 0
    while (not_taken := await leases.take_soon([held])) is None:
        taken += 1

    assert taken == 20
    assert not_taken.nothing.why == "exhausted"
    assert not_taken.retry_after_s is not None
    assert 0 <= not_taken.retry_after_s <= WINDOW_S


async def test_a_window_that_is_over_starts_anew_and_its_leases_are_void(database: Database) -> None:
    time = Time()
    one, two = await some_leases(database, "gw_a", clock=time), await some_leases(database, "gw_b")
    limit = await a_limit(database, "requests", 20, WINDOW_S)
    mine, theirs = one.holding(limit), two.holding(limit)
    assert await take(one, mine) == "taken"
    assert await take(two, theirs) == "taken"
    old = mine.lease_id
    await turn(database)
    time.now += WINDOW_S

    assert not one.take([mine])
    assert await take(one, mine) == "taken"
    await two.heartbeat()  # told that its share lapsed
    assert theirs.left == 0
    one.put_back([mine], [old])  # of the window before
    one.put_back([mine])  # of who knows which
    await one.close()
    await two.close()

    assert await spent(database, limit) == 1


async def test_a_lease_never_outlives_its_window(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    held = leases.holding(await a_limit(database, "requests", 20, 5))

    assert await take(leases, held) == "taken"

    assert held.deadline < time.now + 5
    async with database.connection() as tx:
        [(inside,)] = await (
            await tx.execute(
                "SELECT l.expires_at <= c.window_start + interval '5 seconds' FROM lease l JOIN limit_counter c ON c.id = l.counter_id"
            )
        ).fetchall()
    assert inside


async def test_what_was_not_used_of_a_window_is_shared_within_it(database: Database) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, "requests", 10, WINDOW_S)
    assert await take(one, one.holding(limit)) == "taken"
    await one.close()

    assert [await take(two, two.holding(limit)) for _ in range(10)] == ["taken"] * 9 + ["exhausted"]


# ── rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_process_paces_by_the_whole_rate_and_two_by_half_of_it_each(database: Database) -> None:
    one, two = await some_leases(database, "gw_a"), await some_leases(database, "gw_b")
    limit = await a_limit(database, "download_rate", 50_000, 60)
    mine, theirs = one.holding(limit), two.holding(limit)
    assert await transfer(one, mine, 1_000, 500) == 1_000
    assert mine.share == 50_000

    asked = asyncio.create_task(two.more_units(theirs, 1))
    while not asked.done():
        one.take_units(mine, 1)
        one.wanted_elsewhere(limit.counter_id)
        await asyncio.sleep(0.01)
        if mine.share < 50_000:
            break
    await asked
    await two.more_units(theirs, 1)

    assert (mine.share, theirs.share) == (25_000, 25_000)
    assert await spent(database, limit) == 50_000


async def test_a_share_that_lies_idle_goes_to_whoever_transfers(database: Database) -> None:
    time = Time()
    one, two = await some_leases(database, "gw_a", clock=time), await some_leases(database, "gw_b")
    limit = await a_limit(database, "upload_rate", 1_000_000, 60)
    mine, theirs = one.holding(limit), two.holding(limit)
    await one.more_units(mine, 1)
    one.take_units(mine, 1)
    one._returns.cede(mine, 400_000)
    await until(lambda: mine.asking is None)
    await two.more_units(theirs, 1)
    assert (mine.share, theirs.share) == (600_000, 400_000)

    time.now += 2
    await one.heartbeat()
    two.take_units(theirs, 1)
    await two.heartbeat()
    await until(lambda: theirs.asking is None)

    assert (mine.share, theirs.share) == (0, 1_000_000)


async def test_what_passes_is_the_rate_and_one_burst(database: Database) -> None:
    time = Time()
    leases = await some_leases(database, clock=time)
    held = leases.holding(await a_limit(database, "download_rate", 100_000, 60))
    await leases.more_units(held, 1)

    passed = 0
    for _ in range(200):
        passed += leases.take_units(held, 65_536)
        time.now += 0.05
    assert passed == pytest.approx(1_000_000, rel=0.05)
    assert held.pace is not None
    assert math.isfinite(held.pace.wait_s(time.now))
