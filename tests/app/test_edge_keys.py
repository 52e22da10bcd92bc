"""Who may ask at the forward-auth listener: keys of scope ``gateway``, remembered, and forgotten when they are revoked."""

from __future__ import annotations

from datetime import timedelta

import pytest

from farebox.app.edge_keys import EdgeKeys
from farebox.app.keys import ApiKeys
from farebox.app.ports.clock import WallClock
from farebox.base.errors import Unavailable
from farebox.base.secrets import key_hash
from farebox.store.pool import Database


async def test_a_key_of_scope_gateway_is_looked_up_once(database: Database) -> None:
    made = await ApiKeys(database, WallClock()).create("test", "app", ("gateway",))
    keys = EdgeKeys(database, WallClock())
    digest = key_hash(made.key)

    assert not keys.fresh(digest)
    assert await keys.find(digest)
    assert keys.fresh(digest)


@pytest.mark.parametrize("scopes", [("billing:read",), ("events:write", "entitlements:read")])
async def test_another_scope_or_no_key_at_all_may_not_ask(
    database: Database, scopes: tuple[str, ...]
) -> None:
    made = await ApiKeys(database, WallClock()).create("test", "app", scopes)
    keys = EdgeKeys(database, WallClock())

    assert not await keys.find(key_hash(made.key))
    assert not await keys.find(key_hash("fbx_sk_" + "x" * 32))


async def test_a_revoked_key_is_refused_once_the_notice_is_heard(database: Database) -> None:
    desk, keys = ApiKeys(database, WallClock()), EdgeKeys(database, WallClock())
    made = await desk.create("test", "app", ("gateway",))
    digest = key_hash(made.key)
    assert await keys.find(digest)

    await desk.revoke("test", made.key_id)
    keys.invalidate(made.key_id)

    assert not keys.fresh(digest)
    assert not await keys.find(digest)


async def test_a_key_ends_when_it_expires(database: Database) -> None:
    clock = WallClock()
    made = await ApiKeys(database, clock).create(
        "test", "app", ("gateway",), clock.now() + timedelta(hours=1)
    )

    class Later(WallClock):
        def now(self):  # type: ignore[no-untyped-def]
            return super().now() + timedelta(hours=2)

    assert await EdgeKeys(database, clock).find(key_hash(made.key))
    assert not await EdgeKeys(database, Later()).find(key_hash(made.key))


async def test_in_an_outage_a_known_key_goes_on_for_so_long_and_an_unknown_one_does_not(
    database_url: str,
) -> None:
    now = [1000.0]
    async with await Database.open(database_url, size_min=1, size_max=1, name="test") as database:
        made = await ApiKeys(database, WallClock()).create("test", "app", ("gateway",))
        keys = EdgeKeys(database, WallClock(), ttl_s=60, stale_s_max=900, monotonic=lambda: now[0])
        digest = key_hash(made.key)
        assert await keys.find(digest)

        class Away:
            def connection(self, **within: float) -> object:
                raise Unavailable("the database is away")

        keys._database = Away()  # type: ignore[assignment]
        keys.deaf()
        assert not keys.fresh(digest)
        now[0] += 899
        assert await keys.find(digest)
        with pytest.raises(Unavailable):
            await keys.find(key_hash("fbx_sk_" + "x" * 32))
        now[0] += 2
        with pytest.raises(Unavailable):
            await keys.find(digest)
