"""A running Farebox for the journeys: the real command, real processes, a real upstream, loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

SHOP = """
upstreams:
  counting: {{url: "{upstream}"}}
routes:
  - id: forecast
    match: {{path: "/{{*rest}}"}}
    upstream: counting
    metric: api_calls
    fares:
      exact: {{price: "0.001 USDC"}}
      passes:
        - {{id: five, name: "Five hundred calls", price: "0.25 USDC", duration: 1h, limits: {{calls: 500}}}}
      account: {{}}
metrics:
  - {{key: api_calls, name: "API calls", aggregation: sum}}
plans:
  - id: starter
    name: Starter
    currency: USD
    billing_period: monthly
    charges:
      - {{metric_key: api_calls, pricing_model: per_unit, properties: {{unit_price: "0.01"}}}}
    entitlements:
      api_calls: {{type: limit, metric_key: api_calls, limit: 10000000, on_exceed: block}}
"""


@dataclass
class Upstream:
    """The API that is being sold."""

    url: str
    log: Path

    def calls(self) -> list[tuple[str, str, str]]:
        """What really arrived: (request id, method, path)."""
        if not self.log.exists():
            return []
        return [tuple(line.split(" ", 2)) for line in self.log.read_text().splitlines()]  # type: ignore[misc]


@contextlib.contextmanager
def counting_upstream(directory: Path) -> Iterator[Upstream]:
    log = directory / "upstream.log"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("counting_upstream.py")), str(log)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Upstream(f"http://127.0.0.1:{int(process.stdout.readline())}", log)
    finally:
        process.kill()
        process.wait()


@dataclass
class House:
    """``farebox up --sandbox`` as an operator runs it."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    output: Path
    _control: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._control = httpx.Client(
            base_url=self.api_url, headers={"Authorization": f"Bearer {self.ready['admin_key']}"}, timeout=30
        )

    @property
    def gateway_url(self) -> str:
        return str(self.ready["gateway_url"])

    @property
    def api_url(self) -> str:
        return str(self.ready["api_url"])

    @property
    def gateway_pids(self) -> list[int]:
        return list(self.ready["pids"]["gateway"])

    def post(self, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        answer = self._control.post(path, json=body, headers=headers)
        assert answer.status_code < 300, f"POST {path}: {answer.status_code} {answer.text}"
        return answer.json()  # type: ignore[no-any-return]

    def get(self, path: str, **query: str) -> dict[str, Any]:
        answer = self._control.get(path, params=query)
        assert answer.status_code == 200, f"GET {path}: {answer.status_code} {answer.text}"
        return answer.json()  # type: ignore[no-any-return]

    def account_key(self, customer: str = "acme", plan: str = "starter") -> str:
        """A company with a running subscription and a key to the gateway."""
        self.post(
            "/v1/customers", {"id": customer, "name": customer.title(), "email": f"{customer}@example.com"}
        )
        self.post(
            "/v1/subscriptions",
            {"customer_id": customer, "plan_id": plan, "start_date": "2026-01-01T00:00:00Z"},
        )
        return str(self.post(f"/v1/customers/{customer}/keys", {})["key"])

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.ready["database_url"]) as connection:
            return connection.execute(statement, values).fetchall()  # type: ignore[arg-type]

    def wait_until_shipped(self, timeout_s: float = 60.0) -> None:
        """Until the number of metered events stands still for two seconds."""
        deadline, last, since = time.monotonic() + timeout_s, -1, time.monotonic()
        while time.monotonic() < deadline:
            count = self.rows("SELECT count(*) FROM usage_event")[0][0]
            if count != last:
                last, since = count, time.monotonic()
            elif time.monotonic() - since > 2:
                return
            time.sleep(0.2)

    def stop(self) -> None:
        self._control.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(
                    f"farebox up did not stop within 40 s:\n{self.output.read_text()[-4000:]}"
                ) from None


@contextlib.contextmanager
def farebox_up(
    directory: Path,
    upstream: Upstream,
    gateways: int = 1,
    database_url: str | None = None,
    shop: str = SHOP,
    **settings: str,
) -> Iterator[House]:
    """``settings`` are further variables of the environment, such as ``FAREBOX_LEASE_S="4"``."""
    directory.mkdir(parents=True, exist_ok=True)
    shop_file = directory / "farebox.yaml"
    shop_file.write_text(shop.format(upstream=upstream.url))
    ready_file, output = directory / "ready.json", directory / "up.log"
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FAREBOX_", "T402_", "DATABASE_"))
    }
    environment.update(settings)
    if database_url:
        environment["FAREBOX_DATABASE_URL"] = database_url
    command = [
        str(Path(sys.executable).with_name("farebox")), "up", "--sandbox", "-f", str(shop_file), "--data", str(directory / "data"),
        "--gateways", str(gateways), "--gateway-port", "0", "--api-port", "0", "--ops-port", "0", "--ready-file", str(ready_file),
    ]  # fmt: skip
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        deadline = time.monotonic() + 60
        while not ready_file.exists():
            assert process.poll() is None, (
                f"farebox up ended with {process.returncode}:\n{output.read_text()[-4000:]}"
            )
            assert time.monotonic() < deadline, (
                f"farebox up is not ready after 60 s:\n{output.read_text()[-4000:]}"
            )
            time.sleep(0.05)
        house = House(process, json.loads(ready_file.read_text()), output)
        try:
            yield house
        finally:
            house.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass
class Tally:
    """What the clients of one load saw."""

    answered: list[str] = field(default_factory=list)  # request ids of complete 200 answers
    refused: dict[int, int] = field(default_factory=dict)  # status → count
    broken: int = 0  # connections that ended before an answer


async def load(
    url: str, key: str, connections: int, seconds: float, tally: Tally, pause_s: float = 0.0
) -> None:
    """Keep-alive clients calling as fast as they may; a broken connection is counted and opened again."""
    host, port = url.removeprefix("http://").split(":")
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        calls = 0
        while time.monotonic() < end:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.05)
                continue
            try:
                while time.monotonic() < end:
                    calls += 1
                    writer.write(
                        f"GET /w/{number}/{calls} HTTP/1.1\r\nHost: {host}:{port}\r\nX-API-Key: {key}\r\n\r\n".encode()
                    )
                    status, headers = await asyncio.wait_for(_answer(reader), 60)
                    if status == 200:
                        tally.answered.append(headers["farebox-request-id"])
                    else:
                        tally.refused[status] = tally.refused.get(status, 0) + 1
                        await asyncio.sleep(0.05)
                    if headers.get("connection") == "close":
                        break
                    if pause_s:
                        await asyncio.sleep(pause_s)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                tally.broken += 1
            finally:
                writer.close()

    await asyncio.gather(*(client(n) for n in range(connections)))


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:]) if k}
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    elif length := int(headers.get("content-length", "0")):
        await reader.readexactly(length)
    return int(head[0].split(" ")[1]), headers
