"""What reaches an app behind ``Fare``, and what does not: a real gateway, an app in two processes that tells what it heard."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from typing import Any

import httpx
import pytest
from eth_account import Account
from x402.http.clients.httpx import x402HttpxClient

from tests.inapp.app_server import SECRET, App
from tests.journeys.test_exact_fare import paying, signed, write_header

_names = itertools.count(1)


def a_customer(app: App) -> tuple[str, str]:
    name = f"customer-{next(_names)}"
    return name, app.house.account_key(name)


def named(heard: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in heard["headers"] if key == name]


def events(app: App, customer: str, count: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [(found,)] = app.house.rows("SELECT count(*) FROM usage_event WHERE customer_id = %s", customer)
        if found >= count:
            break
        time.sleep(0.1)
    return int(found)


def test_the_app_hears_the_whole_call_and_who_makes_it(telling: App):
    customer, key = a_customer(telling)
    body = bytes(range(256)) * 4000

    said = httpx.post(
        f"{telling.url}/paid/a%20b%2Cc?x=1&y=%2F..%2F",
        content=body,
        headers={"X-API-Key": key, "Authorization": "Basic dTpw"},
    )

    heard = said.json()
    assert (heard["method"], heard["path"], heard["query"]) == ("POST", "/paid/a b,c", "x=1&y=%2F..%2F")
    assert (heard["size"], heard["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    admission = heard["admission"]
    assert (admission["customer"], admission["route"], admission["pass_id"]) == (customer, "paid", None)
    assert admission["request_id"] == said.headers["farebox-request-id"]
    assert heard["same_in_state"]
    assert named(heard, "farebox-customer") == [customer]
    assert named(heard, "x-plan") == named(heard, "farebox-plan") == [admission["plan"]]
    assert named(heard, "authorization") == ["Basic dTpw"]
    assert named(heard, "x-api-key") == named(heard, "x-farebox-upstream") == []
    assert "farebox-customer" not in said.headers  # what the app says in our name is not passed on


def test_a_pass_in_a_cookie_ends_here_and_the_other_cookies_go_on(telling: App):
    made = telling.house.post("/v1/passes", {"route": "paid", "limits": {"calls": 9}, "duration": "1h"})

    said = httpx.get(f"{telling.url}/paid/x", headers={"Cookie": f"a=b; apicharge={made['token']}; c=d"})
    alone = httpx.get(f"{telling.url}/paid/x", headers={"Cookie": f"apicharge={made['token']}"})

    assert said.json()["admission"]["pass_id"] == alone.json()["admission"]["pass_id"] == made["pass_id"]
    assert named(said.json(), "cookie") == ["a=b; c=d"]
    assert named(alone.json(), "cookie") == []


FORGED = {
    "Farebox-Customer": "mallory", "Farebox_Customer": "mallory", "Farebox-Plan": "platinum", "Farebox-Pass": "pass_1",
    "Farebox-Payer": "0x1", "Farebox-Route": "free", "Farebox-Request-Id": "req_mine", "Farebox-Edge-Secret": "mine",
    "X-Plan": "platinum", "X_Plan": "platinum", "X-Forwarded-Uri": "/free/x", "X-Forwarded-Method": "OPTIONS",
    "X-Forwarded-Host": "other.example.com", "X-Original-URL": "/free/x", "X-Rewrite-URL": "/free/x", "X-Real-IP": "203.0.113.1",
    "X-HTTP-Method-Override": "OPTIONS", "X-Farebox-Upstream": "guessed" * 6, "X_Farebox_Upstream": SECRET,
}  # fmt: skip


def test_no_header_of_a_client_opens_the_gate_or_names_somebody_else(telling: App):
    customer, key = a_customer(telling)

    with httpx.Client(base_url=telling.url, timeout=30) as client:
        one_by_one = {client.get("/paid/x", headers={n: v}).status_code for n, v in FORGED.items()}
        unpaid = client.get("/paid/x", headers=FORGED)
        paid = client.get("/paid/x", headers={**FORGED, "X-API-Key": key}).json()
        free = client.get("/free/x", headers=FORGED).json()

    assert one_by_one == {402}
    assert unpaid.status_code == 402
    assert paid["admission"]["customer"] == customer
    assert free["admission"]["customer"] is None
    assert (paid["admission"]["route"], free["admission"]["route"]) == ("paid", "free")
    for heard in (paid, free):
        ours = [
            (n, v) for n, v in heard["headers"] if n.replace("_", "-").startswith(("farebox", "x-farebox"))
        ]
        assert not {v for _, v in ours} & {"mallory", "platinum", "pass_1", "0x1", "req_mine", "mine", SECRET}
        assert not any(name.startswith(("x-farebox", "x_farebox")) for name, _ in heard["headers"])
    assert named(paid, "x-plan") == [paid["admission"]["plan"]]
    assert named(paid, "x_plan") == []


TRICKS = (
    "/free/../paid/t", "/free/..%2fpaid/t", "/free/%2e%2e/paid/t", "//paid/t", "/free//../paid/t", "/%70aid/t", "/paid%2ft",
    "/free/..;/paid/t", "/free\\..\\paid/t", "/./paid/t", "/paid/t/../../free/x", "/free/%2e%2e%2fpaid/t", "/free/x%00/t",
    "/free/caf\u00e9", "*", "http://127.0.0.1/paid/t", "/free/x#/../paid/t", "/PAID/t", "/paid;/t", "/free/%c0%ae%c0%ae/paid/t",
    "/%66ree/..%5cpaid", "/free/x%", "/fre%65/t",
)  # fmt: skip


@pytest.mark.parametrize("keyed", [False, True])
def test_no_spelling_of_a_path_leads_around_the_gate(telling: App, keyed: bool):
    _, key = a_customer(telling)
    credential = f"X-API-Key: {key}\r\n" if keyed else ""

    for trick in TRICKS:
        said = telling.raw(
            f"GET {trick} HTTP/1.1\r\nHost: x\r\n{credential}Connection: close\r\n\r\n".encode()
        )
        status = int(said[9:12])
        if trick == "http://127.0.0.1/paid/t":  # the server takes the path out of it: a plain call
            assert status == (200 if keyed else 402), trick
        elif trick == "/free/x#/../paid/t":
            assert (status, b'"path": "/free/x"' in said) == (200, True), trick  # the server cuts fragments
        else:
            assert status in (400, 404), (trick, said)


def test_a_call_with_two_hosts_or_none_is_refused(telling: App):
    _, key = a_customer(telling)

    for head in ("GET /paid/x HTTP/1.1\r\nHost: a\r\nHost: b", "GET /paid/x HTTP/1.0"):
        said = telling.raw(f"{head}\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n".encode())
        assert int(said[9:12]) == 400, said


def test_a_head_longer_than_the_gateway_takes_is_refused_by_name(telling: App):
    _, key = a_customer(telling)
    long = {f"X-Long-{n}": "x" * 4000 for n in range(12)}

    said = httpx.get(f"{telling.url}/paid/x", headers={"X-API-Key": key, **long})

    assert said.status_code in (400, 431)
    assert httpx.get(f"{telling.url}/paid/x", headers={"X-API-Key": key}).status_code == 200


# ── through the gateway ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_payment_at_the_app_is_served_once_and_settled_once(telling: App):
    account, url = Account.create(), f"{telling.url}/paid/once?day=1"
    async with httpx.AsyncClient(timeout=60) as http:
        payload = await signed(http, url, account)

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as own_connection:
                return await own_connection.get(url, headers={"PAYMENT-SIGNATURE": write_header(payload)})

        said = await asyncio.gather(*(send() for _ in range(20)))
        elsewhere = await http.get(
            f"{telling.url}/paid/other", headers={"PAYMENT-SIGNATURE": write_header(payload)}
        )

    assert {s.status_code for s in said} <= {200, 409, 503}
    served = [s.json() for s in said if s.status_code == 200]
    assert served
    assert {heard["admission"]["request_id"] for heard in served} == {served[0]["admission"]["request_id"]}
    assert served[0]["admission"]["payer"].lower() == account.address.lower()
    assert served[0]["query"] == "day=1"
    assert named(served[0], "payment-signature") == named(served[0], "x-farebox-upstream") == []
    assert named(served[0], "x-farebox-handed") == []
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (402, "payment_used")
    assert telling.house.rows(
        "SELECT count(*) FROM sandbox_transfer WHERE payer = %s", account.address.lower()
    ) == [(1,)]


async def test_a_call_that_the_app_fails_is_not_paid(telling: App):
    account = Account.create()

    async with x402HttpxClient(paying(account), timeout=60) as buyer:
        said = await buyer.get(f"{telling.url}/paid/fails")

    assert said.status_code == 500
    payer = account.address.lower()
    assert telling.house.rows("SELECT status FROM payment WHERE payer_address = %s", payer) == [("released",)]
    assert telling.house.rows("SELECT count(*) FROM sandbox_transfer WHERE payer = %s", payer) == [(0,)]


async def test_a_paid_upload_arrives_whole(telling: App):
    body = b"0123456789abcdef" * 8000

    async def pieces() -> Any:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    async with x402HttpxClient(paying(Account.create()), timeout=60) as buyer:
        said = await buyer.post(f"{telling.url}/paid/upload", content=body)
    _, key = a_customer(telling)
    async with httpx.AsyncClient(timeout=60) as client:
        chunked = await client.post(
            f"{telling.url}/whole/upload", content=pieces(), headers={"X-API-Key": key}
        )

    for answer in (said, chunked):
        assert answer.status_code == 200, answer.text
        assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_pass_whose_bytes_are_limited_is_kept_by_the_gateway(telling: App):
    limits = {"calls": 1000, "download_bytes": 100_000}
    made = telling.house.post("/v1/passes", {"route": "paid", "limits": limits, "duration": "1h"})
    headers = {"Authorization": f"Bearer {made['token']}"}

    said = httpx.get(f"{telling.url}/paid/bytes", headers=headers)

    assert said.status_code == 200
    assert said.json()["admission"]["pass_id"] == made["pass_id"]
    assert "download_bytes=" in said.headers["farebox-pass-remaining"]


def test_a_route_that_is_not_forward_auth_is_served_and_metered_once(telling: App):
    customer, key = a_customer(telling)

    said = [httpx.get(f"{telling.url}/whole/{n}", headers={"X-API-Key": key}) for n in range(3)]

    assert [s.json()["admission"]["route"] for s in said] == ["whole"] * 3
    assert {s.json()["admission"]["customer"] for s in said} == {customer}
    assert events(telling, customer, 3) == 3


def test_a_call_at_the_gateways_own_port_is_not_asked_about_twice(telling: App):
    customer, key = a_customer(telling)

    said = httpx.get(f"{telling.house.gateway_url}/paid/x", headers={"X-API-Key": key})

    assert said.json()["admission"]["customer"] == customer
    assert events(telling, customer, 1) == 1


def test_a_route_that_does_not_mark_its_calls_ends_in_a_clear_word_not_in_a_circle(telling: App):
    said = httpx.get(f"{telling.url}/unmarked/x")
    forged = httpx.get(f"{telling.url}/free/x", headers={"X-Farebox-Handed": "1"})

    assert (said.status_code, forged.status_code) == (508, 508)
    assert "X-Farebox-Upstream" in telling.log.read_text()


def test_an_answer_that_breaks_off_arrives_broken(telling: App):
    _, key = a_customer(telling)

    for path in ("/paid/breaks", "/whole/breaks"):
        said = telling.raw(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n".encode()
        )
        status, whole = int(said[9:12]), said.endswith(b"0\r\n\r\n")
        assert status == 502 or (status == 200 and not whole), (path, said)
