"""A pass: bought with an exact fare or granted by the operator, raced for by many, never oversold."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
from eth_account import Account
from x402.http.clients.httpx import x402HttpxClient

from tests.journeys.house import House, Upstream, farebox_up
from tests.journeys.test_exact_fare import paying


async def test_a_pass_is_bought_with_an_exact_fare_and_used(house: House, upstream: Upstream):
    account = Account.create()
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=30) as http:
        quotes = (await http.get("/.farebox/quotes", params={"route": "forecast"})).json()["quotes"]
        assert [q["pass"] for q in quotes] == ["five"]
        body = {"quote": quotes[0]["signed"], "buyer": account.address, "rail": "exact"}

        async with x402HttpxClient(paying(account), timeout=30) as buyer:
            bought = await buyer.post(
                f"{house.gateway_url}/.farebox/purchases",
                json=body,
                headers={"Idempotency-Key": "first-purchase"},
            )
        assert bought.status_code == 201, bought.text
        token = bought.json()["token"]

        answer = await http.get("/weather/paris", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200
        assert "calls=" in answer.headers["farebox-pass-remaining"]

        again = await http.post(
            "/.farebox/purchases", json=body, headers={"Idempotency-Key": "first-purchase"}
        )
        assert again.status_code in (200, 201)
        assert again.json()["pass_id"] == bought.json()["pass_id"]

        jwks = (await http.get("/.well-known/jwks.json")).json()
        assert jwks["keys"][0]["kty"] == "OKP"
    assert house.rows("SELECT sum(amount) FROM posting WHERE kind = 'pass_sale'") == [(250_000,)]
    assert house.rows("SELECT count(*) FROM pass") == [(1,)]


async def race(house: House, token: str, clients: int, tally: dict[int, int], stop_at: float) -> None:
    """Clients on connections of their own, calling until the pass says it is used up."""

    async def client() -> None:
        async with httpx.AsyncClient(
            base_url=house.gateway_url, timeout=30, headers={"Authorization": f"Bearer {token}"}
        ) as http:
            used_up = 0
            while used_up < 3 and time.monotonic() < stop_at:
                try:
                    status = (await http.get("/race")).status_code
                except httpx.TransportError:
                    status = 0
                tally[status] = tally.get(status, 0) + 1
                used_up = used_up + 1 if status == 402 else 0
                if status != 200:
                    await asyncio.sleep(0.2)

    await asyncio.gather(*(client() for _ in range(clients)))


async def test_sixty_clients_race_for_the_last_five_hundred_calls(house: House, upstream: Upstream):
    token = house.post("/v1/passes", {"route": "forecast", "limits": {"calls": 500}, "duration": "1h"})[
        "token"
    ]
    tally: dict[int, int] = {}

    await race(house, token, 60, tally, time.monotonic() + 60)

    assert len(upstream.calls()) == 500, tally
    assert tally[200] == 500, tally


async def test_a_process_stopped_past_its_lease_never_oversells(tmp_path: Path, upstream: Upstream):
    lease_s = 4.0
    with farebox_up(tmp_path / "house", upstream, gateways=3, FAREBOX_LEASE_S=str(lease_s)) as house:
        token = house.post("/v1/passes", {"route": "forecast", "limits": {"calls": 500}, "duration": "1h"})[
            "token"
        ]
        tally: dict[int, int] = {}
        await race(house, token, 20, tally, time.monotonic() + 0.3)

        sleeper = house.gateway_pids[0]
        os.kill(sleeper, signal.SIGSTOP)
        try:
            await race(house, token, 40, tally, time.monotonic() + lease_s + 3)
        finally:
            os.kill(sleeper, signal.SIGCONT)
        await race(house, token, 60, tally, time.monotonic() + 20)

    assert len(upstream.calls()) <= 500, tally
    assert tally[200] <= 500, tally


async def test_a_revoked_pass_is_refused_everywhere_soon(house: House):
    granted = house.post("/v1/passes", {"route": "forecast", "limits": {"calls": 500}, "duration": "1h"})
    headers = {"Authorization": f"Bearer {granted['token']}"}
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=30) as http:
        assert (await http.get("/a", headers=headers)).status_code == 200
    house.post(f"/v1/passes/{granted['pass_id']}/revoke", {})

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        statuses = set()
        for _ in range(12):  # fresh connections reach every process
            async with httpx.AsyncClient(base_url=house.gateway_url, timeout=30) as http:
                statuses.add((await http.get("/a", headers=headers)).status_code)
        if statuses == {401}:
            return
    raise AssertionError(f"a revoked pass still opens the gate: {statuses}")
