"""An exact fare, paid by the unmodified PyPI ``x402`` client over HTTP, and every way to cheat with one."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from eth_account import Account
from x402 import x402Client
from x402.http.clients.httpx import x402HttpxClient
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client

from tests.journeys.house import House, Upstream

Json = dict[str, Any]


def paying(account: Any) -> x402Client:
    """The published client exactly as its documentation sets it up: no spend controls touched, no asset configured."""
    client = x402Client()
    register_exact_evm_client(client, EthAccountSigner(account))
    return client


async def challenge(http: httpx.AsyncClient, url: str) -> Json:
    """The 402 a stranger meets."""
    answer = await http.get(url)
    assert answer.status_code == 402, answer.text
    return read_header(answer.headers["payment-required"])


def read_header(value: str) -> Json:
    return json.loads(base64.b64decode(value))  # type: ignore[no-any-return]


def write_header(value: Any) -> str:
    return base64.b64encode(json.dumps(value, ensure_ascii=False).encode()).decode()


async def signed(http: httpx.AsyncClient, url: str, account: Any) -> Json:
    """A payment for the url, signed by the published client's own code."""
    from x402.schemas import PaymentRequired

    required = PaymentRequired.model_validate(await challenge(http, url))
    payload = await paying(account).create_payment_payload(required)
    return payload.model_dump(by_alias=True, exclude_none=True)  # type: ignore[no-any-return]


async def test_the_published_client_pays_unmodified(house: House, upstream: Upstream):
    account = Account.create()

    async with x402HttpxClient(paying(account), timeout=30) as buyer:
        answer = await buyer.get(f"{house.gateway_url}/weather/paris")

    assert answer.status_code == 200
    receipt = read_header(answer.headers["payment-response"])
    assert receipt["success"] is True
    assert receipt["payer"].lower() == account.address.lower()
    assert receipt["transaction"].startswith("0x")
    assert len(upstream.calls()) == 1
    payment = house.get("/v1/payments")["data"][0]
    assert payment["status"] == "settled"
    assert payment["transaction_hash"] == receipt["transaction"]
    assert house.rows("SELECT sum(amount) FROM posting WHERE kind = 'exact_fare'") == [(1000,)]


async def test_one_payment_sent_a_hundred_times_at_once_is_served_once(house: House, upstream: Upstream):
    account = Account.create()
    url = f"{house.gateway_url}/weather/rome"
    async with httpx.AsyncClient(timeout=60) as http:
        payload = await signed(http, url, account)

        def spelled(n: int) -> str:
            """The same payment in upper- and lower-case nonce and payer."""
            variant: Json = json.loads(json.dumps(payload))
            authorization = variant["payload"]["authorization"]
            if n % 2:
                authorization["nonce"] = "0x" + authorization["nonce"][2:].upper()
            if n % 3 == 0:
                authorization["from"] = authorization["from"].lower()
            elif n % 3 == 1:
                authorization["from"] = "0x" + authorization["from"][2:].upper()
            return write_header(variant)

        async def send(n: int) -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as own_connection:
                return await own_connection.get(url, headers={"PAYMENT-SIGNATURE": spelled(n)})

        answers = await asyncio.gather(*(send(n) for n in range(100)))

        statuses = [a.status_code for a in answers]
        assert statuses.count(200) >= 1
        assert set(statuses) <= {200, 409, 503}, "no answer to the same request may be a payable 402"
        assert all("payment-required" not in a.headers for a in answers)
        assert [a.json() for a in answers if a.status_code == 200] == [
            {"path": "/weather/rome"}
        ] * statuses.count(200)
        assert len(upstream.calls()) == 1
        assert house.rows("SELECT status FROM payment WHERE payer_address = %s", account.address.lower()) == [
            ("settled",)
        ]
        assert house.rows(
            "SELECT count(*) FROM sandbox_transfer WHERE payer = %s", account.address.lower()
        ) == [(1,)]

        elsewhere = await http.get(
            f"{house.gateway_url}/weather/oslo", headers={"PAYMENT-SIGNATURE": write_header(payload)}
        )
        assert elsewhere.status_code == 402
        assert elsewhere.json()["code"] == "payment_used"
        assert len(upstream.calls()) == 1


def _authorization(change: Callable[[Json], None]) -> Callable[[Json], str]:
    def tamper(payload: Json) -> str:
        change(payload["payload"]["authorization"])
        return write_header(payload)

    return tamper


def _accepted(**fields: Any) -> Callable[[Json], str]:
    def tamper(payload: Json) -> str:
        payload["accepted"].update(fields)
        return write_header(payload)

    return tamper


def _forged(payload: Json) -> str:
    signature = payload["payload"]["signature"]
    payload["payload"]["signature"] = signature[:-6] + ("000000" if signature[-6:-2] != "0000" else "111111")
    return write_header(payload)


def _duplicated(payload: Json) -> str:
    text = json.dumps(payload)
    return base64.b64encode(('{"x402Version": 2,' + text[1:]).encode()).decode()


BAD_PAYMENTS: dict[str, Callable[[Json], str]] = {
    "a forged signature": _forged,
    "a wrong amount": _authorization(lambda a: a.update(value="999")),
    "a wrong recipient": _authorization(lambda a: a.update(to="0x" + "11" * 20)),
    "an expired window": _authorization(lambda a: a.update(validBefore=str(int(time.time()) - 1))),
    "a window that has not begun": _authorization(lambda a: a.update(validAfter=str(int(time.time()) + 600))),
    "an unknown asset": _accepted(asset="0x" + "22" * 20),
    "a smaller accepted amount": _accepted(amount="1"),
    "an unknown network": _accepted(network="eip155:1"),
    "a negative amount": _authorization(lambda a: a.update(value="-1000")),
    "a float amount": _authorization(lambda a: a.update(value=1000.0)),
    "a number instead of a string": _authorization(lambda a: a.update(value=1000)),
    "a leading zero": _authorization(lambda a: a.update(value="01000")),
    "a short nonce": _authorization(lambda a: a.update(nonce="0x1234")),
    "a 20,000-character header": lambda p: write_header(p) + "A" * 20_000,
    "bad base64": lambda p: "!!!" + write_header(p),
    "not JSON": lambda p: base64.b64encode(b"hello").decode(),
    "a JSON list": lambda p: write_header([p]),
    "duplicate keys": _duplicated,
    "deep nesting": lambda p: base64.b64encode(b"[" * 3000 + b"]" * 3000).decode(),
    "NaN": lambda p: base64.b64encode(json.dumps(p).replace('"1000"', "NaN").encode()).decode(),
}


async def test_every_bad_payment_is_refused_and_the_upstream_never_hears_of_it(
    house: House, upstream: Upstream
):
    account = Account.create()
    url = f"{house.gateway_url}/weather/paris"
    async with httpx.AsyncClient(timeout=30) as http:
        for name, tamper in BAD_PAYMENTS.items():
            header = tamper(await signed(http, url, account))

            answer = await http.get(url, headers={"PAYMENT-SIGNATURE": header})

            assert answer.status_code in (400, 402, 431), f"{name}: {answer.status_code} {answer.text}"
            problem = answer.json()
            assert problem["code"], name
            assert len(problem["detail"]) > 10, name
            assert problem["status"] == answer.status_code, name
    assert upstream.calls() == []
    assert house.rows("SELECT count(*) FROM sandbox_transfer") == [(0,)]


async def test_a_failing_upstream_costs_nothing(house: House, upstream: Upstream):
    account = Account.create()
    async with httpx.AsyncClient(timeout=30) as http:
        url = f"{house.gateway_url}/fail/today"
        answer = await http.get(
            url, headers={"PAYMENT-SIGNATURE": write_header(await signed(http, url, account))}
        )
    assert answer.status_code == 500
    assert house.rows("SELECT count(*) FROM sandbox_transfer") == [(0,)]
    assert house.rows("SELECT status FROM payment") == [("released",)]


@pytest.mark.parametrize("path", ["/a/../b", "/a//b", "/a%2fb", "/a%5cb", "/a%00b", "/./a"])
async def test_a_path_that_could_be_read_two_ways_is_refused(house: House, upstream: Upstream, path: str):
    host, port = house.gateway_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    head = await reader.read(65536)
    writer.close()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert upstream.calls() == []
