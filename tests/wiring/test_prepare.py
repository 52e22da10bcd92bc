"""What ``up URL --price`` makes before anything runs: a shop, a customer on its plan, a key."""

from __future__ import annotations

import pytest

from farebox.app.plans import Plans
from farebox.base.errors import Refused
from farebox.base.secrets import key_hash
from farebox.config import Config
from farebox.store import customers, grants, subscriptions
from farebox.store.pool import Database
from farebox.wiring.prepare import _demo_customer_key, prepare
from farebox.wiring.shop import QUICK_PLAN


@pytest.fixture
def config(database_url: str) -> Config:
    return Config.parse(
        {
            "FAREBOX_MODE": "sandbox",
            "FAREBOX_DATABASE_URL": database_url,
            "FAREBOX_MASTER_KEY": "a master key for the tests, longer than thirty-two",
        }
    )


async def key_for(config: Config, price: str, known_key: str | None = None) -> str:
    quick = {"upstream_url": "http://127.0.0.1:3000", "price": price}
    return str((await prepare(config, {"quick": quick, "known_key": known_key}))["customer_key"])


async def test_the_same_price_again_keeps_the_key_and_another_price_is_what_the_new_key_pays(
    config: Config, database: Database
):
    first = await key_for(config, "0.001 USDC")
    again = await key_for(config, "0.001 USDC", first)
    dearer = await key_for(config, "0.002 USDC", again)
    kept = await key_for(config, "0.002 USDC", dearer)

    assert first == again != dearer == kept
    versions = []
    async with database.connection() as tx:
        for key in (first, dearer):
            owner = await grants.by_customer_key(tx, key_hash(key))
            assert owner is not None
            versions += [s.plan_version for s in await subscriptions.of_customer(tx, owner.customer_id)]
    assert versions == [1, 2]


async def test_a_customer_is_made_with_its_subscription_or_not_at_all(config: Config, database: Database):
    plan = f"{{id: {QUICK_PLAN}, name: Pay per call, currency: USD, billing_period: monthly}}"
    await prepare(config, {"text": f"plans: [{plan}]"})
    await Plans(database).deprecate("test", QUICK_PLAN, 1)

    with pytest.raises(Refused, match=QUICK_PLAN):
        await _demo_customer_key(database, None)

    async with database.connection() as tx:
        assert await customers.list_after(tx, "", 9) == []
