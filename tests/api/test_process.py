"""The real process: granian on loopback, as the supervisor starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from farebox.base.secrets import Secret, admin_key
from tests.api.conftest import MASTER_KEY, SHOP


@dataclass
class Running:
    """One process and how to reach it."""

    process: asyncio.subprocess.Process
    url: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {admin_key(Secret(MASTER_KEY))}"}

    async def stop(self) -> tuple[int, str]:
        """Tell it to stop; (exit code, what it said)."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> tuple[int, str]:
        """Wait for its end; (exit code, what it said)."""
        assert self.process.stderr is not None
        said = (await asyncio.wait_for(self.process.stderr.read(), 60)).decode()
        return await self.process.wait(), said


@asynccontextmanager
async def an_api(database_url: str, **variables: str) -> AsyncIterator[Running]:
    with socket.socket() as reserved:  # as the supervisor does it: bound, never listening
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
        environment |= {
            "FAREBOX_MODE": "sandbox", "FAREBOX_DATABASE_URL": database_url, "FAREBOX_MASTER_KEY": MASTER_KEY, **variables,
        }  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "farebox.wiring.api", "--host", "127.0.0.1", "--port", str(port),
            env=environment, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield Running(process, f"http://127.0.0.1:{port}")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def answers(running: Running) -> None:
    """Return when it is ready."""
    async with httpx.AsyncClient(base_url=running.url) as http:
        for _ in range(1200):
            assert running.process.returncode is None, (await running.ended())[1]
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
    raise AssertionError("the API is not ready after a minute")


async def test_it_serves_and_stops_on_sigterm_with_requests_under_way_answered(database_url: str):
    async with an_api(database_url) as running:
        await answers(running)
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=30) as http:
            assert (await http.post("/v1/catalog/apply", json=SHOP)).status_code == 200
            assert (await http.post("/v1/customers", json={"id": "acme", "name": "Acme"})).status_code == 201
            with psycopg.connect(database_url) as holder:
                # The customer is held: the request waits in the middle of its transaction.
                holder.execute("SELECT 1 FROM customer WHERE id = 'acme' FOR UPDATE")
                waiting = asyncio.create_task(http.patch("/v1/customers/acme", json={"name": "Acme Ltd"}))
                await asyncio.sleep(0.5)
                running.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                assert running.process.returncode is None
            answer = await waiting
        assert (answer.status_code, answer.json()["name"]) == (200, "Acme Ltd")
        code, said = await running.ended()
        assert code == 0
        assert "Traceback" not in said
        assert "fbx_" not in said


async def test_no_key_and_no_secret_is_ever_logged(database_url: str):
    async with an_api(database_url, FAREBOX_LOG_LEVEL="debug") as running:
        await answers(running)
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=30) as http:
            await http.post("/v1/customers", json={"id": "acme", "name": "Acme"})
            key = (await http.post("/v1/customers/acme/keys", json={})).json()["key"]
            refused = await http.get(
                "/v1/metrics", headers={"Authorization": "Bearer fbx_sk_wrongwrongwrongwrong"}
            )
        _, said = await running.stop()
        assert refused.json()["error"]["request_id"] in said
        for secret in (key, running.headers["Authorization"].split()[1], MASTER_KEY, "wrongwrong"):
            assert secret not in said


async def test_a_new_key_or_a_moved_clock_is_heard_by_the_other_process(database_url: str):
    async with an_api(database_url) as one, an_api(database_url) as other:
        await answers(one)
        await answers(other)
        async with httpx.AsyncClient(headers=one.headers, timeout=30) as http:
            made = (
                await http.post(f"{one.url}/v1/api-keys", json={"name": "n", "scopes": ["billing:read"]})
            ).json()
            own = {"Authorization": f"Bearer {made['key']}"}
            assert (await http.get(f"{other.url}/v1/metrics", headers=own)).status_code == 200
            await http.delete(f"{one.url}/v1/api-keys/{made['key_id']}")
            statuses = set()
            for _ in range(100):
                statuses = {(await http.get(f"{other.url}/v1/metrics", headers=own)).status_code}
                if statuses == {401}:
                    break
                await asyncio.sleep(0.05)
            assert statuses == {401}


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"FAREBOX_MODE": "live"}, "live"),
        ({"FAREBOX_MASTER_KEY": "short"}, "FAREBOX_MASTER_KEY"),
        ({"FAREBOX_MODE": "maybe"}, "FAREBOX_MODE"),
    ],
)
async def test_what_does_not_fit_together_is_said_in_a_line(
    database_url: str, variables: dict[str, str], word: str
):
    async with an_api(database_url, **variables) as running:
        code, said = await running.ended()
        assert code == 1
        assert word in said
        assert "Traceback" not in said


async def test_what_was_answered_is_counted_for_the_operator(database_url: str, tmp_path: Path):
    async with an_api(database_url, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) as running:
        await answers(running)
        async with httpx.AsyncClient(base_url=running.url, headers=running.headers, timeout=30) as http:
            await http.get("/v1/metrics")
            await http.request("BREW", "/v1/metrics")
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]
        brewed = {"method": "other", "status": "405"}
        # An answer is counted once it has gone out: the client may be here a moment before.
        while registry.get_sample_value("farebox_api_requests_total", brewed) is None:
            await asyncio.sleep(0.02)
        assert registry.get_sample_value("farebox_api_requests_total", brewed) == 1
        assert (registry.get_sample_value("farebox_api_duration_seconds_count") or 0) >= 2
