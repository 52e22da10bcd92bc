"""What a live installation has not: a test clock, free money, the sandbox's header, a seller made up for it."""

from __future__ import annotations

import httpx

from farebox.config import Config
from farebox.store.pool import Database
from farebox.wiring.api import api_process, connections_max
from tests.api.conftest import MASTER_KEY, SHOP


async def test_a_live_installation_is_no_sandbox(live_database_url: str):
    config = Config.parse(
        {
            "FAREBOX_MODE": "live",
            "FAREBOX_DATABASE_URL": live_database_url,
            "FAREBOX_MASTER_KEY": MASTER_KEY,
        }
    )
    database = await Database.open(live_database_url, size_max=connections_max(config), name="api")
    async with (
        database,
        api_process(config, database) as process,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=process.app),
            base_url="http://api",
            headers={"Authorization": f"Bearer {config.admin_key}"},
        ) as http,
    ):
        clock = await http.post("/v1/test-clock", json={"now": "2031-01-01T00:00:00Z"})
        faucet = await http.post("/v1/sandbox/faucet", json={"address": "0x" + "11" * 20, "amount": 1})
        shop = await http.post("/v1/catalog/apply", json=SHOP)
        served = await http.get("/v1/catalog")
    assert (clock.status_code, clock.json()["error"]["code"]) == (403, "TEST_CLOCK_LIVE")
    assert (faucet.status_code, faucet.json()["error"]["code"]) == (403, "SANDBOX_ONLY")
    assert "farebox-sandbox" not in clock.headers
    assert shop.status_code == 422
    faults = {f["field"]: f["code"] for f in shop.json()["error"].get("faults", [shop.json()["error"]])}
    assert faults["routes[0].fares.exact.pay_to"] == "PAY_TO_MISSING"
    assert served.json()["version"] == 0
