"""The shipped configurations of nginx, Caddy and Envoy, run as they are: paid calls pass, nothing passes unpaid or forged."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from eth_account import Account
from x402.http.clients.httpx import x402AsyncTransport

from tests.edges.edge import API, CERTIFICATE, FAST, SECRET, Edge, Heard, python_with_grpc
from tests.journeys.test_exact_fare import paying

_names = itertools.count(1)


def a_customer(edge: Edge) -> tuple[str, str]:
    """(customer, key) of a company with a running subscription."""
    name = f"{edge.name}-{next(_names)}"
    return name, edge.house.account_key(name)


def a_pass(edge: Edge, calls: int) -> str:
    return str(
        edge.house.post("/v1/passes", {"route": "paid", "limits": {"calls": calls}, "duration": "1h"})[
            "token"
        ]
    )


def arrived(edge: Edge, mark: str) -> list[Heard]:
    """What reached the API with a mark in its target."""
    return [heard for heard in edge.upstream.heard() if mark in heard.target]


def events(edge: Edge, customer: str, count: int) -> int:
    """The metered events of a customer, once at least ``count`` are shipped."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [(found,)] = edge.house.rows("SELECT count(*) FROM usage_event WHERE customer_id = %s", customer)
        if found >= count:
            return int(found)
        time.sleep(0.1)
    return int(found)


def metered_nothing_more(edge: Edge, customer: str, count: int) -> bool:
    """Whether exactly ``count`` calls are metered, a later call of somebody else's being metered already."""
    other, key = a_customer(edge)
    assert edge.curl("/paid/last", "-H", f"X-API-Key: {key}").status == 200
    assert edge.curl("/paid/last", "-H", f"X-API-Key: {key}", host=API).status == 200
    assert events(edge, other, 2) == 2
    return events(edge, customer, count) == count


# ── who pays passes ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", [FAST, API])
@pytest.mark.parametrize("http", ["1.1", "2"])
def test_an_unpaid_call_shows_the_402_with_its_price(edge: Edge, host: str, http: str):
    said = edge.curl("/paid/unpaid", host=host, http=http)

    assert (said.status, said.version) == (402, http)
    assert said.headers["payment-required"]
    assert said.code == "payment_required"
    assert arrived(edge, "/paid/unpaid") == []


@pytest.mark.parametrize("host", [FAST, API])
def test_a_keyed_call_passes_says_who_calls_and_is_metered_once(edge: Edge, host: str):
    customer, key = a_customer(edge)
    mark = f"/paid/keyed-{edge.name}-{host}"

    for n in range(5):
        said = edge.curl(
            f"{mark}/{n}?day=1", "-H", f"X-API-Key: {key}", "-X", "POST", "--data", "x" * 100, host=host
        )
        assert (said.status, said.version, said.body) == (200, "2", f"POST {mark}/{n}?day=1")
        assert said.headers["farebox-request-id"].startswith("req_")
        assert "farebox-credits" not in said.headers

    heard = arrived(edge, mark)
    assert len(heard) == 5
    for each in heard:
        assert each.body == 100
        assert each.one("farebox-customer") == customer
        assert each.one("farebox-route") == "paid"
        assert each.one("x-plan") == each.one("farebox-plan") != ""
        assert each.one("farebox-request-id") is not None
        assert each.all("x-api-key") == each.all("farebox-edge-secret") == []
        assert each.one("x-forwarded-for") == "127.0.0.1" or host == API
    assert events(edge, customer, 5) == 5
    assert metered_nothing_more(edge, customer, 5)


def test_an_answer_of_the_api_is_the_clients_whatever_it_says(edge: Edge):
    _, key = a_customer(edge)

    said = edge.curl("/paid/401", "-H", f"X-API-Key: {key}")

    assert (said.status, said.body) == (401, "GET /paid/401")


def test_the_clients_own_credential_for_the_api_goes_on(edge: Edge):
    _, key = a_customer(edge)
    mark = f"/paid/foreign-{edge.name}"

    assert edge.curl(mark, "-H", f"X-API-Key: {key}", "-H", "Authorization: Basic dTpw").status == 200
    assert edge.curl(mark, "-H", f"Authorization: Bearer {key}", "-H", "X-API-Key: theirs").status == 200

    first, second = arrived(edge, mark)
    assert (first.one("authorization"), first.all("x-api-key")) == ("Basic dTpw", [])
    assert (second.one("x-api-key"), second.all("authorization")) == ("theirs", [])


def test_a_pass_ends_at_exactly_its_number(edge: Edge):
    token, mark = a_pass(edge, 7), f"/paid/pass-{edge.name}"

    said = [edge.curl(f"{mark}/{n}", "-H", f"Authorization: Bearer {token}") for n in range(9)]

    assert [s.status for s in said] == [200] * 7 + [402] * 2
    assert [int(s.headers["ratelimit-limit"]) for s in said[:7]] == [7] * 7
    assert said[8].code == "pass_exhausted"
    assert "quotes" in json.loads(said[8].body)
    assert len(arrived(edge, mark)) == 7
    assert all(h.one("farebox-pass") and not h.all("authorization") for h in arrived(edge, mark))


def test_a_pass_with_limits_that_only_the_gateway_keeps_is_served_by_the_gateway(edge: Edge):
    limits = {"calls": 5, "concurrency": 2, "download_bytes": 1000}
    made = edge.house.post("/v1/passes", {"route": "paid", "limits": limits, "duration": "1h"})
    mark = f"/paid/slots-{edge.name}"

    said = [edge.curl(mark, "-H", f"Authorization: Bearer {made['token']}").status for _ in range(6)]

    if edge.name == "envoy":
        assert said == [421] * 6
        assert arrived(edge, mark) == []
    else:
        assert said == [200] * 5 + [402]
        assert len(arrived(edge, mark)) == 5


def test_a_hundred_clients_at_once_get_no_call_more_than_a_pass_has(edge: Edge):
    token, mark = a_pass(edge, 40), f"/paid/race-{edge.name}"

    async def race() -> list[int]:
        async with httpx.AsyncClient(
            transport=edge.transport(), headers={"Authorization": f"Bearer {token}"}, timeout=60
        ) as http:

            async def client(number: int) -> int:
                while True:
                    status = (await http.get(f"https://{FAST}{mark}/{number}")).status_code
                    if status != 503:  # the last calls are held by the other process for a moment
                        return status
                    await asyncio.sleep(0.1)

            return list(await asyncio.gather(*(client(n) for n in range(100))))

    statuses = asyncio.run(race())

    assert statuses.count(200) == len(arrived(edge, mark)) == 40
    assert statuses.count(402) == 60


async def test_a_payment_is_taken_by_the_gateway_and_its_answer_is_bought(edge: Edge):
    mark = f"/paid/bought-{edge.name}"
    paid = x402AsyncTransport(paying(Account.create()), edge.transport())
    async with httpx.AsyncClient(transport=paid, timeout=60) as buyer:
        answer = await buyer.post(f"https://{FAST}{mark}", content=b"x" * 1000)

    assert (answer.status_code, answer.text) == (200, f"POST {mark}")
    assert answer.headers["payment-response"]
    [heard] = arrived(edge, mark)
    assert heard.body == 1000
    assert heard.all("payment-signature") == heard.all("x-payment") == []
    assert heard.one("farebox-payer")


def test_a_free_call_needs_nothing(edge: Edge):
    assert edge.curl(f"/free/{edge.name}").body == f"GET /free/{edge.name}"


def test_what_is_not_for_edges_is_served_by_the_gateway_or_said_to_be(edge: Edge):
    _, key = a_customer(edge)

    said = edge.curl("/whole/x", "-H", f"X-API-Key: {key}")
    quotes = edge.curl("/.farebox/quotes?route=paid")

    if edge.name == "envoy":  # it cannot hand over after a no: docs/edges.md
        assert (said.status, said.code) == (421, "hand_over")
    else:
        assert (said.status, said.body) == (200, "GET /whole/x")
    assert json.loads(quotes.body)["quotes"][0]["pass"] == "seven"


def test_a_revoked_key_opens_nothing_any_more(edge: Edge):
    customer, _ = a_customer(edge)
    made = edge.house.post(f"/v1/customers/{customer}/keys", {})
    headers = ("-H", f"X-API-Key: {made['key']}")
    assert edge.curl("/paid/before", *headers).status == 200

    revoked = httpx.delete(
        f"{edge.house.api_url}/v1/customers/{customer}/keys/{made['key_id']}",
        headers={"Authorization": f"Bearer {edge.house.ready['admin_key']}"},
    )
    assert revoked.status_code < 300

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        statuses = {edge.curl("/paid/after", *headers).status for _ in range(8)}
        if statuses == {401}:
            break
    assert statuses == {401}


# ── nobody passes unpaid ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", [FAST, API])
@pytest.mark.parametrize("http", ["1.1", "2"])
def test_no_spelling_of_a_path_gets_past_the_gate(edge: Edge, host: str, http: str):
    mark = f"spelt-{edge.name}-{http}-{host}"
    targets = [
        f"/free/..%2fpaid/{mark}", f"/free/../paid/{mark}", f"/free/%2e%2e/paid/{mark}", f"/free/.%2e/paid/{mark}", f"//paid/{mark}",
        f"/free//../paid/{mark}", f"/./paid/{mark}", f"/paid/./{mark}", f"/free/..;/paid/{mark}", f"/free/..%5cpaid/{mark}",
        f"/free/..\\paid/{mark}", f"/%2fpaid/{mark}", f"/free%2f..%2fpaid/{mark}", f"/paid%2f{mark}", f"/paid/{mark}/../../free/x",
        f"/paid/..%2ffree/{mark}", f"/free/%00/{mark}", f"/PAID/{mark}", f"/free/..%252fpaid/../{mark}",
    ]  # fmt: skip

    statuses = {target: edge.curl(target, host=host, http=http).status for target in targets}

    assert all(status in (400, 402, 404) for status in statuses.values()), statuses
    assert arrived(edge, mark) == []


FORGED = (
    "X-Original-URI: /free/x", "X-Original-URL: /free/x", "X-Original-Method: OPTIONS", "X-Rewrite-URL: /free/x",
    "X-Forwarded-Uri: /free/x", "X-Forwarded-Method: OPTIONS", "X-Forwarded-Host: other.example.com", "X-Forwarded-For: 203.0.113.1",
    "X-Forwarded-Prefix: /free", "X-Real-IP: 203.0.113.1", "Forwarded: for=203.0.113.1", "X-Plan: platinum", "X_Plan: platinum",
    "Farebox-Customer: mallory", "Farebox_Customer: mallory", "Farebox-Plan: platinum", "Farebox-Pass: pass_1", "Farebox-Route: free",
    "Farebox-Payer: 0x1", "Farebox-Request-Id: req_mine", "Farebox-Edge-Secret: mine", "Farebox-Refusal: req_mine",
    f"Farebox-Edge-Secret: {SECRET}",
)  # fmt: skip


@pytest.mark.parametrize("host", [FAST, API])
def test_no_header_of_a_client_opens_the_gate_or_names_somebody_else(edge: Edge, host: str):
    customer, key = a_customer(edge)
    mark = f"/paid/forged-{edge.name}-{host}"
    forged = [word for line in FORGED for word in ("-H", line)]

    unpaid = [edge.curl(f"{mark}/unpaid", "-H", line, host=host).status for line in FORGED]
    together = edge.curl(f"{mark}/unpaid", *forged, host=host)
    paid = edge.curl(f"{mark}/paid", *forged, "-H", f"X-API-Key: {key}", host=host)
    free = edge.curl(f"/free/forged-{edge.name}-{host}", *forged, host=host)

    assert set(unpaid) == {402}
    assert together.status == 402
    assert (paid.status, free.status) == (200, 200)
    assert arrived(edge, f"{mark}/unpaid") == []
    [heard] = arrived(edge, f"{mark}/paid")
    [stranger] = arrived(edge, f"/free/forged-{edge.name}-{host}")
    assert heard.one("farebox-customer") == customer
    assert heard.one("x-plan") == heard.one("farebox-plan")
    assert heard.one("farebox-route") == "paid"
    assert heard.one("farebox-request-id") == paid.headers["farebox-request-id"]
    names = ["mallory", "203.0.113.1", "req_mine", "0x1", "pass_1", SECRET, "other.example.com", "/free/x"]
    for each, words in ((heard, [*names, "platinum"]), (stranger, names)):
        said = json.dumps(each.headers)
        for word in words:
            assert word not in said, (word, each.headers)
    assert not any(name.startswith("farebox") and value == "" for name, value in stranger.headers)


def test_odd_requests_get_nothing(edge: Edge):
    mark = f"odd-{edge.name}"
    head = f"Host: {FAST}\r\nConnection: close\r\n"
    for request in (
        f"GET https://{FAST}/free/../paid/{mark} HTTP/1.1\r\n{head}\r\n",
        f"GET /paid/{mark} HTTP/1.1\r\nHost: {FAST}\r\nHost: other\r\nConnection: close\r\n\r\n",
        f"GET /paid/{mark} HTTP/1.0\r\n\r\n",
        f"GET /free/x{mark}#/../paid/{mark} HTTP/1.1\r\n{head}\r\n",
        f"GET /paid/{mark}\x00 HTTP/1.1\r\n{head}\r\n",
        f"GET /paid/{mark}\tx HTTP/1.1\r\n{head}\r\n",
        f"GET  /paid/{mark} HTTP/1.1\r\n{head}\r\n",
        f"POST /free/y HTTP/1.1\r\nHost: {FAST}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /paid/{mark} HTTP/1.1\r\n{head}\r\n",
    ):  # fmt: skip
        edge.raw(request.encode("latin-1"))

    assert [h for h in arrived(edge, mark) if h.target.startswith("/paid")] == []


# ── as a proxy ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", [FAST, API])
def test_a_stream_arrives_as_it_is_written_over_http2(edge: Edge, host: str, tmp_path: Path):
    _, key = a_customer(edge)
    with subprocess.Popen(
        edge.command(
            f"/paid/{edge.name}-{host}/stream",
            "-H",
            f"X-API-Key: {key}",
            "-D",
            str(tmp_path / "head"),
            host=host,
        ),
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        first = client.stdout.read(9)
        assert client.poll() is None  # the upstream says the rest only after this
        assert (
            edge.curl(f"/paid/{edge.name}-{host}/release", "-H", f"X-API-Key: {key}", host=host).status == 200
        )
        rest = client.stdout.read()
        client.wait(60)

    assert (first, rest) == (b"data: 1\n\n", b"data: 2\n\n")
    assert (tmp_path / "head").read_text().startswith("HTTP/2 200")


def test_grpc_passes_with_a_key_and_is_refused_in_its_own_words(edge: Edge):
    if edge.name == "caddy":
        return  # docs/edges.md: not configured there
    customer, key = a_customer(edge)
    before = len(edge.grpc_upstream.heard())

    client = [
        sys.executable,
        str(Path(__file__).with_name("grpc_client.py")),
        str(edge.port),
        str(CERTIFICATE),
        key,
    ]
    done = subprocess.run(
        client, env=python_with_grpc(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr + edge.output()
    outcome = json.loads(done.stdout)

    assert outcome == {
        "unpaid": "UNAUTHENTICATED",
        "guessed": "UNAUTHENTICATED",
        "get": "rain in paris",
        "watch": ["0 in rome", "1 in rome", "2 in rome"],
    }
    heard = edge.grpc_upstream.heard()[before:]
    assert [h.method for h in heard] == ["Get", "Watch"]
    assert {h.one("farebox-customer") for h in heard} == {customer}
    assert not any(h.all("x-plan") or h.all("x-api-key") for h in heard)
    assert events(edge, customer, 2) == 2
