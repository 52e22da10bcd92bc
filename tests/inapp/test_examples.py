"""The examples as they are shipped, each in front of a real gateway: what docs/inapp.md promises, they keep."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path

import httpx
import pytest
import websockets
from eth_account import Account
from x402.http.clients.httpx import x402HttpxClient

from tests.edges.edge import free_port
from tests.inapp.app_server import App, an_app
from tests.inapp.conftest import EXAMPLES
from tests.journeys.test_exact_fare import paying, read_header

_names = itertools.count(1)


def a_customer(app: App) -> tuple[str, str]:
    name = f"customer-{next(_names)}"
    return name, app.house.account_key(name)


def events(app: App, customer: str, count: int) -> int:
    """The metered events of a customer, once at least ``count`` are shipped."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [(found,)] = app.house.rows("SELECT count(*) FROM usage_event WHERE customer_id = %s", customer)
        if found >= count:
            break
        time.sleep(0.1)
    return int(found)


def test_who_does_not_pay_is_shown_the_price(example: App):
    said = httpx.get(f"{example.url}/weather/paris")

    assert said.status_code == 402
    assert said.headers["content-type"] == "application/problem+json"
    assert said.json()["code"] == "payment_required"
    [offer, *_] = read_header(said.headers["payment-required"])["accepts"]
    assert (offer["scheme"], offer["amount"]) == ("exact", "1000")
    assert said.headers["farebox-request-id"].startswith("req_")


def test_a_company_calls_with_its_key_and_each_call_is_metered_once(example: App):
    customer, key = a_customer(example)
    forged = {"Farebox-Customer": "mallory", "Farebox_Customer": "mallory", "Farebox-Payer": "0x1"}

    with httpx.Client(base_url=example.url, headers={"X-API-Key": key, **forged}) as client:
        said = [client.get(f"/weather/{city}") for city in ("paris", "rome", "new%20york")]

    assert [s.status_code for s in said] == [200] * 3
    assert [s.json()["city"] for s in said] == ["paris", "rome", "new york"]
    assert {(s.json()["customer"], s.json()["payer"]) for s in said} == {(customer, None)}
    assert len({s.headers["farebox-request-id"] for s in said}) == 3
    assert events(example, customer, 3) == 3


def test_a_bad_key_is_told_so(example: App):
    said = httpx.get(f"{example.url}/weather/paris", headers={"X-API-Key": "fbx_ck_" + "a" * 32})

    assert (said.status_code, said.json()["code"]) == (401, "credential_unknown")
    assert said.headers["www-authenticate"].startswith("Bearer")


async def test_the_published_x402_client_pays_for_a_call_at_the_app(example: App):
    account = Account.create()

    async with x402HttpxClient(paying(account), timeout=30) as buyer:
        said = await buyer.get(f"{example.url}/weather/oslo")

    assert said.status_code == 200, said.text
    assert said.json()["city"] == "oslo"
    assert said.json()["payer"].lower() == account.address.lower()
    receipt = read_header(said.headers["payment-response"])
    assert receipt["success"] is True
    assert example.house.rows(
        "SELECT status FROM payment WHERE payer_address = %s", account.address.lower()
    ) == [("settled",)]


async def test_a_pass_ends_at_exactly_its_number(example: App):
    limits = {"route": "weather", "limits": {"calls": 7}, "duration": "1h"}
    token = example.house.post("/v1/passes", limits)["token"]

    async with httpx.AsyncClient(
        base_url=example.url, headers={"Authorization": f"Bearer {token}"}, timeout=30
    ) as client:
        at_once = await asyncio.gather(*(client.get(f"/weather/{n}") for n in range(12)))
        after = [await client.get(f"/weather/{n}") for n in range(9)]

    served = [s for s in (*at_once, *after) if s.status_code == 200]
    assert len(served) == 7
    assert {s.headers["ratelimit-limit"] for s in served} == {"7"}
    assert all("farebox-pass-remaining" in s.headers for s in served)
    assert after[-1].status_code == 402
    assert after[-1].json()["code"] == "pass_exhausted"


async def test_a_websocket_is_accepted_with_a_key_and_refused_without(example: App):
    customer, key = a_customer(example)
    url = example.url.replace("http", "ws") + "/alerts"

    with pytest.raises(websockets.InvalidStatus) as refused:
        await websockets.connect(url).__aenter__()
    async with websockets.connect(url, additional_headers={"X-API-Key": key}) as socket:
        heard = json.loads(await socket.recv())

    assert refused.value.response.status_code in (401, 402, 403)
    assert heard == {"alert": "storm", "customer": customer}
    assert events(example, customer, 1) == 1


def test_what_no_route_takes_is_closed_and_the_gateways_own_pages_are_open(example: App):
    assert httpx.get(f"{example.url}/openapi.json").json()["code"] == "route_unknown"
    assert httpx.get(f"{example.url}/docs").status_code == 404
    assert httpx.get(f"{example.url}/schema").status_code == 404

    quotes = httpx.get(f"{example.url}/.farebox/quotes")

    assert quotes.status_code == 200
    assert [q["pass"] for q in quotes.json()["quotes"]] == ["hundred"]


def test_with_a_key_that_may_not_ask_nothing_is_served_and_the_log_says_why(example: App, tmp_path: Path):
    _, key = a_customer(example)
    wrong = example.house.post("/v1/api-keys", {"name": "meter", "scopes": ["events:write"]})["key"]
    place, log = EXAMPLES / "fastapi", tmp_path / "app.log"
    with an_app(place, free_port(), example.house, log, FARE_KEY=wrong) as app:
        said = [httpx.get(f"{app.url}/weather/paris", headers={"X-API-Key": key}) for _ in range(5)]

    assert [(s.status_code, s.headers["retry-after"]) for s in said] == [(503, "2")] * 5
    written = log.read_text()
    assert written.count("lacks the scope gateway") == 1
    assert wrong not in written
    assert "Traceback" not in written
    assert all(wrong not in s.text for s in said)


def test_while_the_listener_is_away_nothing_is_served_and_the_client_is_told_to_come_back(
    example: App, tmp_path: Path
):
    _, key = a_customer(example)
    place, log, nobody = EXAMPLES / "litestar", tmp_path / "app.log", f"http://127.0.0.1:{free_port()}"
    with an_app(
        place, free_port(), example.house, log, FARE_KEY="fbx_sk_x", FARE_AUTHORIZE_URL=nobody
    ) as app:
        said = [httpx.get(f"{app.url}/weather/paris", headers={"X-API-Key": key}) for _ in range(3)]

    assert [(s.status_code, s.headers["retry-after"]) for s in said] == [(503, "2")] * 3
    assert {s.json()["code"] for s in said} == {"unavailable"}
    assert log.read_text().count("the forward-auth listener is away") == 1
    assert "Traceback" not in log.read_text()


def test_the_document_shows_the_examples_as_they_are():
    page = (EXAMPLES.parent / "docs" / "inapp.md").read_text()

    for shown in ("fastapi/app.py", "litestar/app.py", "fastapi/farebox.yaml"):
        assert (EXAMPLES / shown).read_text() in page, shown
    shops = {(EXAMPLES / name / "farebox.yaml").read_text() for name in ("fastapi", "litestar")}
    assert len(shops) == 1
