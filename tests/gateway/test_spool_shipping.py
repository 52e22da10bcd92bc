"""From the spool into the usage events: each billed call once, whatever is killed in between."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from farebox.app.ports.spool import Rider, SpoolFull
from farebox.base.errors import InvariantError, Unavailable
from farebox.gateway.shipper import Shipper
from farebox.gateway.spool import Spool, file_name, lock_path
from farebox.store import limits, processes
from farebox.store.pool import Database

RIDER = Rider("account", "forecast", "api_calls", customer_id="acme")
SUCCESS = Rider("account", "forecast", "api_calls", customer_id="acme", billed_when_orphaned=False)


async def a_spool(database: Database, directory: Path, name: str = "gw_x", **settings: Any) -> Spool:
    async with database.connection() as tx:
        await processes.register(tx, name, "gateway", "here", 1)
    return Spool(directory, name, **settings)


def serve(
    spool: Spool,
    *request_ids: str,
    rider: Rider = RIDER,
    status: int = 200,
    billed: bool = True,
    leases: tuple[int, ...] = (),
) -> None:
    stub = spool.stub(rider)
    for request_id in request_ids:
        spool.done(spool.admitted(request_id, stub, leases), status, 10, 20, billed)


async def rows(database: Database, statement: str) -> list[tuple[Any, ...]]:
    async with database.connection() as tx:
        return await (await tx.execute(statement)).fetchall()  # type: ignore[arg-type]


async def billed(database: Database) -> list[str]:
    return [
        row[0] for row in await rows(database, "SELECT properties->>'request_id' FROM usage_event ORDER BY 1")
    ]


def run_shipper(url: str, directory: Path, *how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("ship.py")), url, str(directory), *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def test_an_event_says_all_that_is_known_of_its_call(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path)
    rider = Rider("pass", 'a"b\\c\td', "api_calls", "1", "", "grn_1", "pas_1", "")
    before = time.time()
    serve(spool, "req_abc_1", rider=rider, status=404)

    await Shipper(database, tmp_path).ship()

    [row] = await rows(
        database,
        "SELECT event_id, customer_id, metric_key, value, extract(epoch FROM timestamp), idempotency_key, properties FROM usage_event",
    )
    assert row[:4] == ("evt_abc_1", None, "api_calls", 1)
    assert before - 1 <= float(row[4]) <= time.time() + 1
    assert row[5] is None
    assert row[6] == {
        "route": "a\"b\\c\td", "fare": "pass", "pass": "pas_1", "request_id": "req_abc_1", "status": 404, "bytes_up": 10, "bytes_down": 20,
    }  # fmt: skip
    spool.close()


async def test_calls_are_shipped_when_they_end_and_only_what_is_billed(
    database: Database, tmp_path: Path
) -> None:
    spool, shipper = await a_spool(database, tmp_path), Shipper(database, tmp_path)
    stub = spool.stub(RIDER)
    long = spool.admitted("req_long", stub, ())
    serve(spool, "req_1")
    serve(spool, "req_failed", billed=False)
    serve(spool, "req_unmetered", rider=Rider("account", "free"))

    await shipper.ship()
    assert await billed(database) == ["req_1"]
    spool.done(long, 200, 1, 1, True)
    await shipper.ship()

    assert await billed(database) == ["req_1", "req_long"]
    assert await rows(database, "SELECT count(*), sum(row_count) FROM ingest_batch") == [(2, 2)]
    spool.close()


async def test_reading_again_and_again_ships_nothing_twice(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path, file_bytes_max=2_000)
    shipped: list[str] = []
    for round_ in range(6):
        names = [f"req_{round_}_{n}" for n in range(7)]
        serve(spool, *names)
        shipped += names
        await Shipper(
            database, tmp_path, batch_rows_max=3, read_bytes_max=70_000
        ).ship()  # a new one each time

    assert await billed(database) == sorted(shipped)
    assert len(list(tmp_path.glob("*.spool"))) == 1  # whatever is shipped and no longer written is gone
    spool.close()


async def test_a_call_open_over_many_files_is_shipped_once_after_they_are_gone(
    database: Database, tmp_path: Path
) -> None:
    spool, shipper = await a_spool(database, tmp_path, file_bytes_max=1_000), Shipper(database, tmp_path)
    long = spool.admitted("req_long", spool.stub(RIDER), ())
    for n in range(40):
        serve(spool, f"req_{n:02}")
        if n % 10 == 0:
            await shipper.ship()
    spool.done(long, 200, 1, 1, True)
    await Shipper(database, tmp_path).ship()

    assert await billed(database) == sorted(["req_long", *(f"req_{n:02}" for n in range(40))])
    spool.close()


async def test_a_shipper_killed_between_commit_and_deletion_ships_nothing_twice(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path, file_bytes_max=2_000)
    names = [f"req_{n:03}" for n in range(100)]
    serve(spool, *names)

    deaths = 0
    while (ended := run_shipper(database_url, tmp_path, "die")).returncode != 0:
        assert ended.returncode == -9, ended.stderr
        deaths += 1
        assert deaths < 100

    assert deaths > 3  # once a file
    assert await billed(database) == names
    spool.close()
    assert run_shipper(database_url, tmp_path, "die").returncode == -9  # while it settles the process
    assert run_shipper(database_url, tmp_path).returncode == 0
    assert await billed(database) == names
    assert await rows(database, "SELECT settled_at IS NOT NULL FROM process") == [(True,)]
    assert [p.name for p in tmp_path.iterdir()] == ["shipper.lock"]


async def test_orphans_of_a_dead_process_are_billed_where_the_route_charges_always(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path)
    spool.admitted("req_always", spool.stub(RIDER), ())
    spool.admitted("req_success", spool.stub(SUCCESS), ())
    spool.close()  # as the kernel does when a process dies

    shipper = Shipper(database, tmp_path)
    await shipper.ship()

    [(properties,)] = await rows(database, "SELECT properties FROM usage_event")
    assert properties == {
        "route": "forecast",
        "fare": "account",
        "request_id": "req_always",
        "status": 0,
        "orphaned": True,
    }
    assert (shipper.counts.orphans_billed, shipper.counts.orphans_dropped) == (1, 1)


async def a_lease(database: Database, process_id: str, units: int) -> int:
    async with database.transaction() as tx:
        await tx.execute(
            "INSERT INTO admission_grant (id, subject_kind, subject_id) VALUES ('grn_1', 'pass', 'pas_1')"
        )
        await tx.execute("INSERT INTO limit_counter (id, grant_id, capacity) VALUES ('c', 'grn_1', 1000)")
        taken = await limits.take(tx, "c", process_id, wanted=1, needed=units, used=0, ttl_s=60)
        assert isinstance(taken, limits.Slice)
        return taken.lease_id


async def test_what_a_dead_process_did_not_spend_of_its_leases_comes_back(
    database: Database, tmp_path: Path
) -> None:
    used = {}
    spool = await a_spool(database, tmp_path, file_bytes_max=1_500, leases=lambda: dict(used))
    lease = await a_lease(database, "gw_x", 100)
    for n in range(30):
        used[lease] = n + 1
        serve(spool, f"req_{n}", leases=(lease,))
    used[lease] += 1
    spool.admitted("req_orphan", spool.stub(RIDER), (lease,))
    used[lease] += 1
    serve(spool, "req_failed", leases=(lease,), billed=False)
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await rows(database, "SELECT spent FROM limit_counter") == [(31,)]
    assert await rows(database, "SELECT used, closed_at IS NOT NULL FROM lease") == [(31, True)]
    assert len(await billed(database)) == 31


async def a_slice(
    database: Database, kind: str, units: int, grant: str = "grn_k", process_id: str = "gw_x"
) -> int:
    """A lease of so many units of a counter ``kind`` that holds 1,000."""
    async with database.transaction() as tx:
        await tx.execute(
            "INSERT INTO admission_grant (id, subject_kind, subject_id) VALUES (%s, 'pass', %s) ON CONFLICT DO NOTHING",
            (grant, grant),
        )
        await tx.execute(
            "INSERT INTO limit_counter (id, grant_id, kind, capacity) VALUES (%s, %s, %s, 1000)",
            (f"{grant}:{kind}", grant, kind),
        )
        taken = await limits.take(tx, f"{grant}:{kind}", process_id, wanted=1, needed=units, used=0, ttl_s=60)
        assert isinstance(taken, limits.Slice)
        return taken.lease_id


async def spent(database: Database) -> dict[str, int]:
    return {
        row[0].partition(":")[2]: int(row[1])
        for row in await rows(database, "SELECT id, spent FROM limit_counter")
    }


METERED = Rider("pass", "forecast", "api_calls", grant_id="grn_k", pass_id="pas_k", metered=True)


async def test_credits_of_a_dead_process_are_known_to_the_unit(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path)
    lease, stub = await a_slice(database, "credits", 100), spool.stub(METERED)
    spool.done(spool.admitted("req_one", stub, (lease,)), 200, 0, 0, True)
    spool.done(spool.admitted("req_five", stub, (lease,)), 200, 0, 0, True, [(lease, 6)], 5)
    spool.done(spool.admitted("req_gain", stub, (lease,)), 200, 0, 0, True, [(lease, 3)], -3)
    spool.done(spool.admitted("req_failed", stub, (lease,)), 0, 0, 0, False)
    spool.admitted("req_orphan", stub, (lease,))
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {"credits": 4}
    assert await rows(
        database, "SELECT properties->'credits' FROM usage_event WHERE properties ? 'credits' ORDER BY 1"
    ) == [(-3,), (5,)]


async def test_credits_that_were_overdrawn_are_owed_after_the_death_too(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path)
    lease, stub = await a_slice(database, "credits", 1000), spool.stub(METERED)
    spool.done(spool.admitted("req_much", stub, (lease,)), 200, 0, 0, True, [(lease, 1007)], 1007)
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {"credits": 1007}


async def test_bytes_of_a_dead_process_are_known_when_no_transfer_was_under_way(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path)
    lease, stub = await a_slice(database, "download_bytes", 500), spool.stub(METERED)
    one, two = spool.admitted("req_1", stub, ()), spool.admitted("req_2", stub, ())
    spool.done(one, 200, 0, 120, True, [(lease, 150)])
    spool.done(two, 0, 0, 60, False, [(lease, 180)])  # what passed has passed, whatever became of the call
    spool.admitted("req_other", spool.stub(RIDER), ())
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {"download_bytes": 180}


async def test_a_transfer_cut_by_the_death_of_its_process_may_have_passed_all_that_was_leased(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path)
    await a_slice(database, "download_bytes", 500)
    other = await a_slice(database, "upload_bytes", 500, grant="grn_other")
    spool.admitted("req_1", spool.stub(METERED), ())
    spool.done(
        spool.admitted("req_2", spool.stub(Rider("pass", "r", grant_id="grn_other", metered=True)), ()),
        200, 10, 0, True, [(other, 10)],
    )  # fmt: skip
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {"download_bytes": 500, "upload_bytes": 10}


@pytest.mark.parametrize("kind", ["concurrency", "upload_rate", "download_rate"])
@pytest.mark.parametrize("whole", [True, False])
async def test_slots_and_shares_of_a_dead_process_are_free_at_once(
    database: Database, tmp_path: Path, kind: str, whole: bool
) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_slice(database, kind, 30)
    spool.admitted("req_1", spool.stub(METERED), (lease,))
    spool.close()
    if not whole:
        next(tmp_path.glob("*.spool")).unlink()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {kind: 0}


@pytest.mark.parametrize("kind", ["calls", "quota", "credits", "requests", "upload_bytes", "download_bytes"])
async def test_where_the_spool_was_deleted_all_that_was_leased_counts_as_spent(
    database: Database, tmp_path: Path, kind: str
) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_slice(database, kind, 30)
    serve(spool, "req_1", leases=(lease,))
    spool.close()
    next(tmp_path.glob("*.spool")).unlink()

    shipper = Shipper(database, tmp_path)
    await shipper.ship()

    assert await spent(database) == {kind: 30}
    assert shipper.counts.damaged_files == 1
    assert [p.name for p in tmp_path.iterdir()] == []


@pytest.mark.parametrize("again", [True, False], ids=["the same shipper", "another shipper"])
async def test_a_file_that_was_deleted_while_its_process_lived_is_missed(
    database: Database, tmp_path: Path, again: bool
) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_slice(database, "calls", 30)
    serve(spool, "req_1", leases=(lease,), rider=METERED)
    shipper = Shipper(database, tmp_path)
    await shipper.ship()
    next(tmp_path.glob("*.spool")).unlink()
    serve(spool, "req_2", leases=(lease,), rider=METERED)
    spool.close()

    await (shipper if again else Shipper(database, tmp_path)).ship()

    assert await spent(database) == {"calls": 30}


async def test_limited_bytes_and_credits_are_written_down_even_where_detail_is_dropped(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path, on_full="drop_detail")
    lease = await a_slice(database, "download_bytes", 500)
    spool.counting = True
    spool.done(spool.admitted("req_1", spool.stub(METERED), ()), 200, 0, 77, True, [(lease, 77)])
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await spent(database) == {"download_bytes": 77}
    assert await billed(database) == ["req_1"]


@pytest.mark.parametrize(("on_full", "times"), [("refuse", 1), ("drop_detail", 2)])
async def test_a_full_spool_takes_no_more_of_these_calls_and_still_ends_those_it_has(
    database: Database, tmp_path: Path, on_full: str, times: int
) -> None:
    spool = await a_spool(database, tmp_path, on_full=on_full, bytes_max=20_000)
    lease, stub = await a_slice(database, "download_bytes", 500), spool.stub(METERED)
    open_calls: list[int] = []
    while not spool.full:
        open_calls.append(spool.admitted(f"req_{len(open_calls)}", stub, ()))
        spool.look_at_disk()
    with pytest.raises(SpoolFull):
        spool.admitted("req_more", stub, ())
    for number in open_calls:
        spool.done(number, 200, 0, 1, True, [(lease, number)], 3)
    spool.close()

    size = sum(path.stat().st_size for path in tmp_path.glob("*.spool"))
    assert 20_000 * times <= size <= 20_000 * times * 2
    shipper = Shipper(database, tmp_path)
    await shipper.ship()
    assert shipper.counts.orphans_billed == 0
    assert await spent(database) == {"download_bytes": len(open_calls)}


async def test_a_process_that_lives_keeps_its_leases(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_lease(database, "gw_x", 100)
    serve(spool, "req_1", leases=(lease,))

    await Shipper(database, tmp_path).ship()

    assert await rows(database, "SELECT spent FROM limit_counter") == [(100,)]
    spool.close()


async def test_when_the_machine_went_down_what_was_leased_counts_as_spent(
    database: Database, tmp_path: Path
) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_lease(database, "gw_x", 100)
    serve(spool, "req_1", leases=(lease,))
    lock = lock_path(tmp_path, "gw_x")
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "boot": "an earlier one"}))
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await rows(database, "SELECT spent FROM limit_counter") == [(100,)]
    assert await billed(database) == ["req_1"]


async def test_a_damaged_end_costs_what_it_held_and_nothing_else(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path)
    lease = await a_lease(database, "gw_x", 100)
    serve(spool, "req_1", leases=(lease,))
    spool.close()
    with next(tmp_path.glob("*.spool")).open("ab") as file:
        file.write(bytes(100))

    shipper = Shipper(database, tmp_path)
    await shipper.ship()

    assert await billed(database) == ["req_1"]
    assert shipper.counts.damaged_files == 1
    assert await rows(database, "SELECT spent FROM limit_counter") == [(100,)]


@pytest.mark.parametrize("contents", [b"", b"FBX", bytes(4096)])
async def test_a_file_that_lost_its_beginning_with_the_power_keeps_nobody_else_waiting(
    database: Database, tmp_path: Path, contents: bytes
) -> None:
    first = await a_spool(database, tmp_path, "gw_a")
    lease = await a_lease(database, "gw_a", 100)
    serve(first, "req_1", leases=(lease,))
    first.close()
    (tmp_path / file_name("gw_a", 2)).write_bytes(contents)
    second = await a_spool(database, tmp_path, "gw_b")
    serve(second, "req_2")

    shipper = Shipper(database, tmp_path)
    await shipper.ship()

    assert await billed(database) == ["req_1", "req_2"]
    assert shipper.counts.damaged_files == 1
    assert await rows(database, "SELECT spent FROM limit_counter") == [(100,)]
    second.close()


async def test_a_file_of_another_version_is_not_thrown_away(database: Database, tmp_path: Path) -> None:
    spool = await a_spool(database, tmp_path)
    spool.close()
    other = tmp_path / file_name("gw_x", 2)
    other.write_bytes(b"FBXSPL9\n" + bytes(100))

    with pytest.raises(InvariantError):
        await Shipper(database, tmp_path).ship()

    assert other.exists()


async def test_a_record_still_being_written_is_waited_for(database: Database, tmp_path: Path) -> None:
    spool, shipper = await a_spool(database, tmp_path), Shipper(database, tmp_path)
    serve(spool, "req_1", "req_2")
    path = next(tmp_path.glob("*.spool"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])

    await shipper.ship()
    assert await billed(database) == ["req_1"]
    path.write_bytes(whole)
    await shipper.ship()

    assert await billed(database) == ["req_1", "req_2"]
    spool.close()


async def test_calls_without_detail_are_events_all_the_same(database: Database, tmp_path: Path) -> None:
    spool, shipper = await a_spool(database, tmp_path, on_full="drop_detail"), Shipper(database, tmp_path)
    spool.counting = True
    serve(spool, *(["req_x"] * 5))
    await shipper.ship()
    serve(spool, *(["req_x"] * 5))
    await Shipper(database, tmp_path).ship()

    assert await rows(database, "SELECT count(*), count(DISTINCT event_id), sum(value) FROM usage_event") == [
        (10, 10, 10)
    ]
    spool.close()


async def test_a_lost_database_loses_nothing(database_url: str, database: Database, tmp_path: Path) -> None:
    other = await Database.open(database_url, name="shipper")
    spool, shipper = await a_spool(database, tmp_path), Shipper(other, tmp_path)
    serve(spool, "req_1")
    await shipper.ship()
    async with (
        database.connection() as tx
    ):  # every connection of the shipper is cut, in the middle of a delivery
        await tx.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%shipper'"
        )
    serve(spool, "req_2")
    for _ in range(100):
        try:
            await shipper.ship()
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            break

    assert await billed(database) == ["req_1", "req_2"]
    spool.close()
    await other.close()


async def test_two_shippers_cannot_work_on_one_directory(database: Database, tmp_path: Path) -> None:
    one, two = Shipper(database, tmp_path), Shipper(database, tmp_path)

    assert one.lock()
    assert not two.lock()
    one.unlock()
    assert two.lock()
    two.unlock()


async def test_what_is_claimed_as_shipped_stops_at_the_oldest_call_under_way(
    database: Database, tmp_path: Path
) -> None:
    spool, shipper = await a_spool(database, tmp_path), Shipper(database, tmp_path)
    await shipper.ship()
    [(idle,)] = await rows(database, "SELECT shipped_to FROM process")
    number = spool.admitted("req_long", spool.stub(RIDER), ())
    await asyncio.sleep(0.05)
    await shipper.ship()
    [(during,)] = await rows(database, "SELECT shipped_to FROM process")
    await asyncio.sleep(0.05)
    await shipper.ship()
    [(still,)] = await rows(database, "SELECT shipped_to FROM process")
    spool.done(number, 200, 0, 0, True)
    await shipper.ship()
    [(after,)] = await rows(database, "SELECT shipped_to FROM process")

    assert idle <= during == still < after
    spool.close()


async def test_a_process_the_database_does_not_know_is_shipped_and_cleared_away(
    database: Database, tmp_path: Path
) -> None:
    spool = Spool(tmp_path, "gw_stranger")
    serve(spool, "req_1")
    spool.close()

    await Shipper(database, tmp_path).ship()

    assert await billed(database) == ["req_1"]
    assert list(tmp_path.iterdir()) == []
