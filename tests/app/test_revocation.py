"""A revoked key or pass opens no gate once the revocation has been heard, however it races with the calls.

The short form runs each race a few hundred times; FAREBOX_CAMPAIGN=1 runs it 10,000 times.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest

from farebox.app.grants import GrantCache
from farebox.app.leases import Leases
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.base.secrets import key_hash, new_customer_key
from farebox.domain.passes import grant_of
from farebox.store import grants
from farebox.store.changes import Listener, announce
from farebox.store.pool import Database
from farebox.wiring.following import Following
from tests.app.gate import a_customer, put_grant
from tests.wire import Wire, a_wire

RACES = 10_000 if os.environ.get("FAREBOX_CAMPAIGN") else 200
RACES_AT_ONCE = 20


class Ears:
    """One process's memory of grants, kept right by a listener of its own."""

    def __init__(self, database: Database, url: str) -> None:
        self.cache = GrantCache(database, ttl_s=3600)
        self.heard_to = 0.0
        self.lost = asyncio.Event()
        self.listener = Listener(
            url, self._changed, self.cache.listening, on_lost=self._lost, on_confirmed=self._confirmed
        )

    def _changed(self, kind: str, changed_id: str) -> None:
        self.cache.invalidate(changed_id)

    def _confirmed(self, as_of: float) -> None:
        self.heard_to = as_of
        self.cache.confirmed(as_of)

    def _lost(self) -> None:
        self.lost.set()
        self.cache.deaf()

    async def hears_up_to_now(self) -> None:
        now = time.monotonic()
        async with asyncio.timeout(60):
            while self.heard_to < now:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def listening(database: Database, url: str) -> AsyncIterator[Ears]:
    ears = Ears(database, url)
    await ears.listener.start()
    try:
        yield ears
    finally:
        await ears.listener.close()


async def a_key(database: Database, number: int) -> tuple[bytes, str]:
    key = new_customer_key()
    async with database.connection() as tx:
        await tx.execute(
            "INSERT INTO customer_key (id, customer_id, key_hash, hint) VALUES (%s, 'acme', %s, 'xxxx')",
            (f"ck_{number}", key_hash(key)),
        )
    return key_hash(key), f"ck_{number}"


async def revoke_key(database: Database, key_id: str) -> None:
    async with database.transaction() as tx:
        await tx.execute("UPDATE customer_key SET revoked_at = now() WHERE id = %s", (key_id,))
        await announce(tx, "key", key_id)


async def race(cache: GrantCache, name: bytes | str, revoked: asyncio.Event) -> None:
    """Load it again and again, from memory and anew, until some loads after the revocation was committed."""
    after = 0
    while after < 3:
        after += revoked.is_set()
        if cache.fresh(name) is None:
            await cache.find(name)
        await asyncio.sleep(random.random() / 500)


async def test_a_key_that_is_loaded_while_it_is_revoked_is_not_known_afterwards(
    database: Database, database_url: str
) -> None:
    await a_customer(database)

    async def once(ears: Ears, number: int) -> bytes:
        name, key_id = await a_key(database, number)
        revoked = asyncio.Event()
        loads = [asyncio.create_task(race(ears.cache, name, revoked)) for _ in range(3)]
        await asyncio.sleep(random.random() / 100)
        await revoke_key(database, key_id)
        revoked.set()
        await asyncio.gather(*loads)
        return name

    async with listening(database, database_url) as ears:
        for first in range(0, RACES, RACES_AT_ONCE):
            names = await asyncio.gather(*(once(ears, first + n) for n in range(RACES_AT_ONCE)))
            await ears.hears_up_to_now()
            assert not [name for name in names if ears.cache.fresh(name) is not None]


async def test_a_pass_that_is_loaded_while_it_is_revoked_is_known_as_revoked_afterwards(
    database: Database, database_url: str
) -> None:
    async def once(ears: Ears, number: int) -> str:
        pass_id = f"pas_{number}"
        async with database.transaction() as tx:
            await grants.put(tx, grant_of(a_pass(pass_id), f"grn_{number}"))
        revoked = asyncio.Event()
        loads = [asyncio.create_task(race(ears.cache, pass_id, revoked)) for _ in range(3)]
        await asyncio.sleep(random.random() / 100)
        async with database.transaction() as tx:
            await grants.revoke(tx, "pass", pass_id)
        revoked.set()
        await asyncio.gather(*loads)
        return pass_id

    async with listening(database, database_url) as ears:
        for first in range(0, RACES, RACES_AT_ONCE):
            names = await asyncio.gather(*(once(ears, first + n) for n in range(RACES_AT_ONCE)))
            await ears.hears_up_to_now()
            for name in names:
                known = ears.cache.fresh(name)
                assert known is None or (known.grant is not None and known.grant.revoked_at is not None)


@pytest.mark.parametrize("how", ["closed", "silent"])
async def test_a_key_revoked_while_nothing_is_heard_is_not_known_afterwards(
    database: Database, database_url: str, how: str
) -> None:
    await a_customer(database)
    name, key_id = await a_key(database, 1)
    async with a_wire(database_url) as wire, listening(database, wire.url) as ears:
        await ears.cache.find(name)
        assert ears.cache.fresh(name) is not None

        await cut(database, wire, how)
        await revoke_key(database, key_id)
        async with asyncio.timeout(60):
            await ears.lost.wait()

        assert ears.cache.fresh(name) is None
        assert await ears.cache.find(name) is None


async def cut(database: Database, wire: Wire, how: str) -> None:
    if how == "silent":
        wire.hush()
        return
    async with database.connection() as tx:
        await tx.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'farebox listener'"
        )


def a_pass(pass_id: str) -> Any:
    from datetime import UTC, datetime, timedelta

    from farebox.domain.limits import PassLimits
    from farebox.domain.passes import Pass

    now = datetime.now(UTC)
    return Pass(
        id=pass_id, route_id="all", offer_id=None, name="", holder=None, status="active", limits=PassLimits(5),
        starts_at=now, expires_at=now + timedelta(days=1),
    )  # fmt: skip


# ── calls under way ──────────────────────────────────────────────────────────────────────────────────────────────────


class Calls:
    """Calls under way of one gateway process, and which of them were cut."""

    def __init__(self, *ids: str) -> None:
        self.running = set(ids)
        self.cut_ids: list[str] = []
        self.looked = 0

    def standing_ids(self) -> set[str]:
        self.looked += 1
        return set(self.running)

    def cut(self, ids: Collection[str]) -> None:
        self.cut_ids += sorted(ids)
        self.running -= set(ids)


class NoPremises:
    async def read(self, mode: str) -> None:
        return


@asynccontextmanager
async def following(database: Database, url: str, calls: Calls) -> AsyncIterator[Following]:
    cache, leases = GrantCache(database), Leases(database, "gw_following")
    business = BusinessDate(database, WallClock())
    made = Following(database, "sandbox", cache, leases, business, NoPremises())
    listener = Listener(url, made.changed, made.listening, on_lost=made.lost, on_confirmed=cache.confirmed)
    await listener.start()
    chore = asyncio.create_task(made.run(calls))
    try:
        yield made
    finally:
        chore.cancel()
        await asyncio.gather(chore, return_exceptions=True)
        await listener.close()


async def until_cut(calls: Calls, count: int) -> None:
    async with asyncio.timeout(60):
        while len(calls.cut_ids) < count:
            await asyncio.sleep(0.01)


async def test_calls_under_way_are_cut_when_their_key_or_customer_is_revoked_and_not_when_a_limit_changes(
    database: Database, database_url: str
) -> None:
    await a_customer(database, "acme", limit=10)
    await a_customer(database, "beta", limit=10)
    await a_customer(database, "gamma", limit=10)
    calls = Calls("acme", "ck_acme", "beta", "ck_beta", "gamma", "ck_gamma")
    async with following(database, database_url, calls):
        async with database.transaction() as tx:
            await put_grant(tx, "gamma", limit=5)  # raised, lowered, renewed: the call goes on
        await revoke_key(database, "ck_acme")
        await until_cut(calls, 1)
        async with database.transaction() as tx:
            await grants.revoke(tx, "customer", "beta")
        await until_cut(calls, 2)

    assert calls.cut_ids == ["ck_acme", "beta"]


async def test_a_call_under_way_whose_key_was_revoked_while_nothing_was_heard_is_cut_as_well(
    database: Database, database_url: str
) -> None:
    await a_customer(database)
    calls = Calls("acme", "ck_acme")
    async with a_wire(database_url) as wire, following(database, wire.url, calls):
        wire.hush()
        await revoke_key(database, "ck_acme")
        await until_cut(calls, 1)

    assert calls.cut_ids == ["ck_acme"]
