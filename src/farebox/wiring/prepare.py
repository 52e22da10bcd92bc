"""What ``up`` does between the migrations and the first process: apply the shop, make the demo customer of a quick one.

Its own short process (``python -m farebox.wiring.prepare``): one JSON task on standard input, one JSON answer on
standard output. ``{"text": …}`` applies a farebox.yaml, ``{"quick": {"upstream_url", "price"}, "known_key"}`` one that is made here;
the answer is ``{"changes", "customer_key"}``, ``{"faults"}`` or ``{"unavailable"}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

from farebox.app.customers import Customers
from farebox.app.entitlements import Entitlements
from farebox.app.keys import ensure_root
from farebox.app.plans import Plans
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.subscriptions import Subscriptions
from farebox.base.errors import Refused, Unavailable
from farebox.base.ids import CustomerId
from farebox.base.money import Money
from farebox.config import Config
from farebox.domain.customer import Customer
from farebox.store.pool import Database
from farebox.wiring.environment import read_config
from farebox.wiring.logging import configure_logging
from farebox.wiring.shop import QUICK_PLAN, catalog_file, quick_shop_text

ACTOR: Final = "farebox up"
DEMO_CUSTOMER: Final = "demo"


async def prepare(config: Config, task: dict[str, Any]) -> dict[str, Any]:
    """Do the task. Applying the same shop again changes nothing."""
    async with await Database.open(config.database_url, name="prepare", size_max=2) as database:
        if config.master_key is not None:
            async with database.transaction() as tx:
                await ensure_root(tx, config.admin_key)
        quick = task.get("quick")
        text = (
            quick_shop_text(quick["upstream_url"], Money.parse(quick["price"])) if quick else task.get("text")
        )
        answer: dict[str, Any] = {"changes": []}
        if text is not None:
            applied = await catalog_file(config, database).apply(ACTOR, text)
            answer["changes"] = [
                *applied.lines(),
                *(f"note: {w.field}: {w.message}" for w in applied.warnings),
            ]
        if quick:
            answer["customer_key"] = await _demo_customer_key(database, task.get("known_key"))
        return answer


async def _demo_customer_key(database: Database, known_key: str | None) -> str:
    """The key of the customer ``demo``: the one of an earlier start, as long as this database knows the customer.

    Another price is another version of the plan, and a subscription keeps the version it began with: each gets a
    customer of its own (``demo-2``), so that a call is invoiced at the price that ``up`` prints.
    """
    customers = Customers(database, WallClock())
    business_date = BusinessDate(database, WallClock())
    version = (await Plans(database).get_plan(QUICK_PLAN)).plan.version
    customer_id = DEMO_CUSTOMER if version == 1 else f"{DEMO_CUSTOMER}-{version}"
    try:
        await customers.get(customer_id)
    except Refused:
        known_key = None
        subscriptions = Subscriptions(database, business_date, Entitlements(database, business_date))
        async with (
            database.transaction() as tx
        ):  # a customer without the plan could never call, at no later start either
            await customers.create(ACTOR, Customer(id=CustomerId(customer_id), name="Demo"), within=tx)
            await subscriptions.create(ACTOR, customer_id, QUICK_PLAN, within=tx)
    return known_key or (await customers.create_key(ACTOR, customer_id)).key


def main() -> None:
    try:
        config = read_config()
        configure_logging(config.log, "prepare")
        answer = asyncio.run(prepare(config, json.load(sys.stdin)))
    except Refused as refused:
        answer = {
            "faults": [{"code": r.code, "message": r.message, "field": r.field} for r in refused.reasons]
        }
    except Unavailable as away:
        answer = {"unavailable": away.what}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
