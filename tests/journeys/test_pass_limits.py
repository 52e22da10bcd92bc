"""What a pass holds is what it gives: bytes to the byte, a rate over time, credits, slots and windows, through a real Farebox."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from farebox.domain.limits import burst_bytes
from tests.journeys.house import SHOP, House, Upstream, counting_upstream, farebox_up

FREE_SHOP = SHOP.replace("      account: {{}}\n", "      account: {{}}\n      free: {{methods: [OPTIONS]}}\n")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Upstream]]:
    """One house with two gateway processes for all tests here: each has a pass of its own."""
    directory: Path = tmp_path_factory.mktemp("limits")
    with (
        counting_upstream(directory) as upstream,
        farebox_up(directory / "house", upstream, gateways=2, shop=FREE_SHOP) as house,
    ):
        yield house, upstream


@pytest.fixture
def house(running: tuple[House, Upstream]) -> House:
    return running[0]


@pytest.fixture
def upstream(running: tuple[House, Upstream]) -> Upstream:
    return running[1]


def granted(house: House, **limits: Any) -> tuple[str, dict[str, str]]:
    """A pass, and what to send with each call."""
    made = house.post("/v1/passes", {"route": "forecast", "limits": limits, "duration": "1h"})
    return made["pass_id"], {"Authorization": f"Bearer {made['token']}"}


def spent(house: House, pass_id: str, kind: str, expected: int) -> int:
    """What the pass page says is spent, as soon as the gateways have said so (they do once a second)."""
    deadline = time.monotonic() + 30
    while True:
        found = int(house.get(f"/v1/passes/{pass_id}")["spent"][kind])
        if found == expected or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


async def received(house: House, path: str, headers: dict[str, str]) -> tuple[int, int, bool]:
    """Status, bytes that arrived, and whether the answer was whole."""
    got = 0
    async with (
        httpx.AsyncClient(base_url=house.gateway_url, timeout=60, headers=headers) as http,
        http.stream("GET", path) as answer,
    ):
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            async for piece in answer.aiter_raw():
                got += len(piece)
            return answer.status_code, got, True
        return answer.status_code, got, False


async def test_a_download_is_cut_at_exactly_the_last_byte_bought(house: House):
    pass_id, headers = granted(house, download_bytes=1_000_000)

    whole = await received(house, "/bytes/400000", headers)
    cut = await received(house, "/bytes/5000000", headers)
    after = httpx.get(f"{house.gateway_url}/bytes/1", headers=headers, timeout=60)

    assert whole == (200, 400_000, True)
    assert cut == (200, 600_000, False)
    assert (after.status_code, after.json()["code"]) == (402, "pass_exhausted")
    assert after.json()["limit"] == "download_bytes"
    assert after.json()["quotes"].startswith("/.farebox/quotes")
    assert spent(house, pass_id, "download_bytes", 1_000_000) == 1_000_000


async def test_an_upload_is_cut_at_the_last_byte_bought(house: House):
    pass_id, headers = granted(house, upload_bytes=100_000)
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=60, headers=headers) as http:
        assert (await http.post("/up", content=b"x" * 60_000)).status_code == 200
        with contextlib.suppress(httpx.TransportError):
            assert (await http.post("/up", content=b"x" * 60_000)).status_code == 402
        assert (await http.post("/up", content=b"x")).status_code == 402
    assert spent(house, pass_id, "upload_bytes", 100_000) == 100_000


async def test_a_rate_is_kept_by_all_processes_and_calls_together(house: House):
    rate, size = 50_000, 100_000
    _, headers = granted(house, download_rate={"bytes_per_second": rate, "window": "10s"})

    began = time.monotonic()
    got = await asyncio.gather(*(received(house, f"/bytes/{size // 4}", headers) for _ in range(4)))
    elapsed_s = time.monotonic() - began

    assert got == [(200, size // 4, True)] * 4
    # Each process may have had a burst of its own before they shared the rate.
    assert size <= rate * elapsed_s + 2 * burst_bytes(rate, 10)


async def test_the_upstream_says_in_head_or_trailer_what_a_call_costs(house: House):
    pass_id, headers = granted(house, credits=20)
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=60, headers=headers) as http:
        plain = await http.get("/weather")
        by_head = await http.get("/credits/-5")
        by_trailer = await http.get("/trailer/-7")
        free = await http.get("/credits/0")

        assert [plain.status_code, by_head.status_code, by_trailer.status_code, free.status_code] == [200] * 4
        assert by_head.text == by_trailer.text == "ok"
        assert "farebox-credits" not in by_head.headers
        assert spent(house, pass_id, "credits", 13) == 13

        assert (await http.get("/credits/+3")).status_code == 200
        assert spent(house, pass_id, "credits", 10) == 10
        assert (await http.get("/credits/-30")).status_code == 200, "one call may overdraw"
        assert spent(house, pass_id, "credits", 40) == 40
        refused = await http.get("/weather")
        assert (refused.status_code, refused.json()["limit"]) == (402, "credits")


async def test_only_so_many_calls_at_the_same_time(house: House, upstream: Upstream):
    _, headers = granted(house, concurrency=2)
    async with (
        httpx.AsyncClient(base_url=house.gateway_url, timeout=60, headers=headers) as http,
        httpx.AsyncClient(base_url=upstream.url, timeout=60) as behind,
    ):
        running = [asyncio.create_task(http.get("/hold/slots")) for _ in range(3)]
        done, held = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        [refused] = [task.result() for task in done]
        await behind.get("/release/slots")
        served = await asyncio.gather(*held)

        assert (refused.status_code, refused.json()["code"]) == (429, "concurrency_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [answer.status_code for answer in served] == [200, 200]
        assert (await http.get("/weather")).status_code == 200


async def test_only_so_many_calls_in_a_window(house: House):
    _, headers = granted(house, requests={"count": 20, "window": "31d"})
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=60, headers=headers) as http:

        async def call() -> httpx.Response:
            # While one process holds the last calls of the window, the other one says: again in a moment.
            while (answer := await http.get("/weather")).status_code == 503:
                await asyncio.sleep(float(answer.headers["retry-after"]))
            return answer

        answers = await asyncio.gather(*(call() for _ in range(40)))

    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 20
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(429, "window_exceeded")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


async def test_a_free_method_needs_nothing_and_a_pass_may_come_in_a_cookie(house: House):
    _, headers = granted(house, calls=3)
    token = headers["Authorization"].removeprefix("Bearer ")
    async with httpx.AsyncClient(base_url=house.gateway_url, timeout=60) as http:
        assert (await http.options("/weather")).status_code == 200
        assert (await http.get("/weather")).status_code == 402

        by_cookie = await http.get("/weather", headers={"Cookie": f"theme=dark; apicharge={token}"})
        by_header = await http.get("/weather", headers={"apicharge": token})
        twice = await http.get("/weather", headers={"Cookie": f"apicharge={token}; apicharge={token}"})

    assert by_cookie.headers["farebox-pass-remaining"] == "calls=2"
    assert by_header.status_code == 200
    assert (twice.status_code, twice.json()["code"]) == (401, "credential_malformed")
