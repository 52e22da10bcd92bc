"""What a gateway remembers of keys and passes, and when it must not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import LiteralString

import pytest

from farebox.app.admission import Admitted
from farebox.app.entitlements import Entitlements
from farebox.app.grants import DEAF_TTL_S, LOOK_AGAIN_S, GrantCache
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.base.errors import Unavailable
from farebox.base.secrets import key_hash
from farebox.store import grants
from farebox.store.pool import Database
from tests.app.gate import a_call, a_customer, a_gate, put_grant
from tests.wire import a_wire


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_what_is_known_is_used_for_its_time_and_then_read_again(database: Database) -> None:
    time = Time()
    cache = GrantCache(database, ttl_s=60, clock=time)
    name = key_hash(await a_customer(database))
    assert cache.fresh(name) is None
    first = await cache.find(name)

    time.now += 47
    assert cache.fresh(name) is first
    time.now += 20
    assert cache.fresh(name) is None
    assert (await cache.find(name)) is not first


async def test_a_value_is_read_ahead_in_the_background_before_its_time_is_over(database: Database) -> None:
    time = Time()
    cache = GrantCache(database, ttl_s=60, clock=time)
    name = key_hash(await a_customer(database))
    first = await cache.find(name)

    time.now += 50
    assert cache.fresh(name) is first
    while cache.fresh(name) is first:
        await asyncio.sleep(0.005)
    time.now += 40
    assert cache.fresh(name) is not None


async def test_a_change_is_forgotten_at_once_by_key_customer_or_grant(database: Database) -> None:
    cache = GrantCache(database)
    name = key_hash(await a_customer(database))

    for changed in ("acme", "ck_acme", "grn_acme"):
        await cache.find(name)
        cache.invalidate("someone_else")
        assert cache.fresh(name) is not None
        cache.invalidate(changed)
        assert cache.fresh(name) is None
    assert len(cache) == 0


async def test_a_value_that_was_revoked_while_it_was_read_is_read_again(
    database: Database, database_url: str
) -> None:
    """The answer was on its way when the key was revoked: whoever waits for it must not get in with it."""
    name = key_hash(await a_customer(database))
    async with a_wire(database_url) as wire, await Database.open(wire.url, name="far") as far:
        await far.ping()
        cache = GrantCache(far, patience_s=60)
        wire.hold()
        reading = asyncio.create_task(cache.find(name))
        async with database.connection() as tx:
            while not await (await tx.execute(ANSWERED)).fetchone():
                await asyncio.sleep(0.01)
            await tx.execute("UPDATE customer_key SET revoked_at = now()")
        cache.invalidate("ck_acme")
        wire.release()

        assert await reading is None
        assert cache.fresh(name) is None


#: The far side's question has been answered; the answer is in the wire.
ANSWERED: LiteralString = """
    SELECT 1 FROM pg_stat_activity
     WHERE application_name = 'farebox far' AND state = 'idle' AND query LIKE '%customer_key k%'"""


async def test_changes_of_others_do_not_keep_a_value_from_being_remembered(
    database: Database, database_url: str
) -> None:
    name = key_hash(await a_customer(database))
    async with a_wire(database_url) as wire, await Database.open(wire.url, name="far") as far:
        await far.ping()
        cache = GrantCache(far, patience_s=60)
        wire.hold()
        reading = asyncio.create_task(cache.find(name))
        async with database.connection() as tx:
            while not await (await tx.execute(ANSWERED)).fetchone():
                await asyncio.sleep(0.01)
        cache.invalidate("somebody_else")
        wire.release()

        assert await reading is not None
        assert cache.fresh(name) is not None


async def test_while_no_notices_are_heard_nothing_is_used_for_long_without_looking(
    database: Database,
) -> None:
    time = Time()
    cache = GrantCache(database, ttl_s=60, clock=time)
    cache.listening()
    name = key_hash(await a_customer(database))
    await cache.find(name)

    cache.deaf()
    assert cache.fresh(name) is None, "a notice may have been missed"
    await cache.find(name)
    assert cache.fresh(name) is not None
    time.now += DEAF_TTL_S
    assert cache.fresh(name) is None

    cache.listening()
    assert cache.fresh(name) is None
    await cache.find(name)
    time.now += 40
    assert cache.fresh(name) is not None


async def test_in_an_outage_a_value_is_as_old_as_the_last_moment_at_which_nothing_was_missed(
    database_url: str,
) -> None:
    time = Time()
    database = await Database.open(database_url, name="test")
    cache = GrantCache(database, ttl_s=60, stale_s_max=10, clock=time)
    early, late = key_hash(await a_customer(database)), key_hash(await a_customer(database, "late"))
    await cache.find(early)  # before anything is heard
    time.now += 1
    cache.listening()
    await cache.find(late)
    time.now += 50
    cache.confirmed(time.now)
    await database.close()
    cache.deaf()

    time.now += 9
    assert await cache.find(late) is not None
    with pytest.raises(Unavailable):
        await cache.find(early)
    time.now += 2
    assert cache.fresh(late) is None
    with pytest.raises(Unavailable):
        await cache.find(late)


async def test_in_an_outage_only_the_first_call_waits_for_the_database(database_url: str) -> None:
    time = Time()
    database = await Database.open(database_url, name="test")
    cache = GrantCache(database, stale_s_max=900, clock=time)
    name = key_hash(await a_customer(database))
    known = await cache.find(name)
    await database.close()
    cache.deaf()

    assert await cache.find(name) is known
    for _ in range(20):
        time.now += LOOK_AGAIN_S + 0.1
        before = known.fresh_until
        assert cache.fresh(name) is known
        while known.fresh_until == before:  # the look ahead fails, and the value goes on
            await asyncio.sleep(0)


async def test_many_who_ask_at_once_share_one_read(database: Database) -> None:
    cache = GrantCache(database)
    name = key_hash(await a_customer(database))

    found = await asyncio.gather(*(cache.find(name) for _ in range(50)))

    assert len({id(known) for known in found}) == 1


async def test_an_unknown_key_is_not_asked_about_again_for_a_while(database: Database) -> None:
    time = Time()
    cache = GrantCache(database, clock=time)
    assert await cache.find(b"?" * 32) is None
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO customer (id, name) VALUES ('late', 'late')")
        await tx.execute("INSERT INTO customer_key VALUES ('ck_late', 'late', %s, 'xxxx')", (b"?" * 32,))

    assert await cache.find(b"?" * 32) is None
    time.now += 6
    assert await cache.find(b"?" * 32) is not None


async def test_only_so_many_are_remembered(database: Database) -> None:
    cache = GrantCache(database, entries_max=2)
    names = [key_hash(await a_customer(database, f"c{n}")) for n in range(3)]

    for name in names:
        await cache.find(name)

    assert len(cache) == 2
    assert cache.fresh(names[0]) is None
    assert cache.fresh(names[2]) is not None


async def test_in_an_outage_what_was_known_serves_for_a_quarter_of_an_hour_and_strangers_wait(
    database_url: str,
) -> None:
    time = Time()
    database = await Database.open(database_url, name="test")
    cache = GrantCache(database, ttl_s=60, stale_s_max=900, clock=time)
    name, unseen = key_hash(await a_customer(database)), key_hash(await a_customer(database, "unseen"))
    known = await cache.find(name)
    await database.close()

    cache.flush()  # the listener came back just before the database went
    time.now += 890
    assert await cache.find(name) is known
    assert cache.fresh(name) is known  # and the next calls do not wait for the database
    with pytest.raises(Unavailable):
        await cache.find(unseen)
    time.now += 20
    with pytest.raises(Unavailable):
        await cache.find(name)


async def test_a_known_revocation_is_not_served_in_an_outage(database_url: str) -> None:
    database = await Database.open(database_url, name="test")
    cache = GrantCache(database)
    name = key_hash(await a_customer(database))
    await cache.find(name)
    cache.invalidate("ck_acme")
    await database.close()

    with pytest.raises(Unavailable):
        await cache.find(name)


async def test_a_changed_grant_reaches_another_process_by_itself(
    database_url: str, database: Database, tmp_path: Path
) -> None:
    key = await a_customer(database, features=["weather_api"])
    async with a_gate(database_url, tmp_path / "spool", listen=True) as gate:
        await gate.lets_in(a_call(X_API_Key=key))
        async with database.transaction() as tx:
            await grants.revoke(tx, "customer", "acme")

        while isinstance(await gate.admits(a_call(X_API_Key=key)), Admitted):
            await asyncio.sleep(0.01)


async def test_putting_the_same_grant_again_changes_nothing_and_a_new_one_keeps_what_was_spent(
    database: Database,
) -> None:
    async with database.transaction() as tx:
        await a_customer_row(tx)
        first = await put_grant(tx, limit=10)
        again = await put_grant(tx, limit=10)
        await tx.execute("UPDATE limit_counter SET spent = 7")
        raised = await put_grant(tx, limit=20)
        [row] = await (await tx.execute("SELECT capacity, spent FROM limit_counter")).fetchall()

    assert (first.version, again.version, raised.version) == (1, 1, 2)
    assert raised.id == first.id
    assert row == (20, 7)


async def a_customer_row(tx: object) -> None:
    await tx.execute("INSERT INTO customer (id, name) VALUES ('acme', 'Acme')")  # type: ignore[attr-defined]


async def test_renewals_at_once_do_not_wait_for_each_others_connections(database_url: str) -> None:
    """The first of a month on a process that has just begun: every renewal has to ask for the date, too."""
    async with await Database.open(database_url, name="small", size_max=1, checkout_timeout_s=2.0) as small:
        await a_customer(small)
        entitlements = Entitlements(small, BusinessDate(small, WallClock()))

        await entitlements.renew("acme")

        async with small.connection() as tx:
            grant = await grants.by_subject(tx, "customer", "acme")
        assert grant is not None
        assert grant.revoked_at is not None  # it had no subscription
