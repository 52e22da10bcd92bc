"""What the benchmarks of a whole house share: `farebox up --sandbox` as an operator runs it, its control API, its rows."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

METRIC = "api_calls"
#: The end of every shop: what its calls are metered and billed by. Nobody comes near the limit.
PLAN = """
metrics:
  - {key: api_calls, name: "API calls", aggregation: sum}
plans:
  - id: bench
    name: Bench
    currency: USD
    billing_period: monthly
    charges: [{metric_key: api_calls, pricing_model: per_unit, properties: {unit_price: "0.0001"}}]
    entitlements: {api_calls: {type: limit, metric_key: api_calls, limit: 1000000000, on_exceed: block}}
"""

#: Requests to the control API at once while a house is furnished.
_WRITERS = 8


@dataclass(frozen=True)
class House:
    """A running ``farebox up``. ``ready`` is its ready file."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def gateway_port(self) -> int:
        return int(self.ready["gateway_url"].rpartition(":")[2])

    @property
    def gateway_pids(self) -> list[int]:
        return list(self.ready["pids"]["gateway"])

    def pin_gateways(self, core: int) -> None:
        """The gateways on a core of their own; the rest of the house stays where it was started."""
        for pid in self.gateway_pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), {core})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the control API; its answer."""
        return self.post_all([(path, body)])[0]

    def post_all(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Many, over a few connections; the answers stand in the order of the requests."""
        shares = [list(range(n, len(requests), _WRITERS)) for n in range(min(_WRITERS, len(requests)))]
        answers: list[dict[str, Any]] = [{}] * len(requests)

        def write(share: list[int]) -> None:
            connection = http.client.HTTPConnection(urlsplit(self.ready["api_url"]).netloc, timeout=60)
            for index in share:
                path, body = requests[index]
                headers = {
                    "Authorization": f"Bearer {self.ready['admin_key']}",
                    "Content-Type": "application/json",
                }
                while True:
                    connection.request("POST", path, json.dumps(body), headers)
                    answer = connection.getresponse()
                    content = answer.read()
                    if answer.status != 429:
                        break
                    time.sleep(float(answer.headers.get("Retry-After", "1")))
                if answer.status >= 300:
                    raise SystemExit(f"POST {path}: {answer.status} {content[:300]!r}")
                answers[index] = json.loads(content)

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, shares))
        return answers

    def customers(self, count: int) -> list[str]:
        """The ids of new customers, each with the plan."""
        ids = [f"bench-{number}" for number in range(count)]
        since = "2026-01-01T00:00:00Z"
        self.post_all(
            [("/v1/customers", {"id": each, "name": each, "email": f"{each}@example.com"}) for each in ids]
        )
        self.post_all(
            [
                ("/v1/subscriptions", {"customer_id": each, "plan_id": "bench", "start_date": since})
                for each in ids
            ]
        )
        return ids

    def keys(self, count: int, customers_max: int = 100) -> list[str]:
        """API keys of new customers."""
        ids = self.customers(min(customers_max, count))
        paths = [f"/v1/customers/{ids[number % len(ids)]}/keys" for number in range(count)]
        return [answer["key"] for answer in self.post_all([(path, {}) for path in paths])]

    def settled_rows(self, metric_key: str) -> int:
        """The number of metered events once it has stood still for three seconds."""
        with psycopg.connect(self.ready["database_url"], autocommit=True) as connection:
            last, since = -1, time.monotonic()
            while True:
                row = connection.execute(
                    "SELECT count(*) FROM usage_event WHERE metric_key = %s", (metric_key,)
                ).fetchone()
                assert row
                if row[0] != last:
                    last, since = int(row[0]), time.monotonic()
                    _show(f"  shipped {last} rows")
                elif time.monotonic() - since > 3:
                    _show("")
                    return last
                time.sleep(0.25)


def a_house(
    directory: Path, shop: str, core: int | None, *, options: Sequence[str] = (), **settings: str
) -> House:
    """Start one in ``directory`` (on ``core``, if one is named) and wait until it answers. ``settings`` are FAREBOX_* variables."""
    file, ready = directory / "farebox.yaml", directory / "ready.json"
    file.write_text(shop)
    command = ["taskset", "-c", str(core)] if core is not None else []
    command += [str(Path(sys.executable).with_name("farebox")), "up", "--sandbox", "-f", str(file)]
    command += ["--data", str(directory / "data"), "--ready-file", str(ready), *options]
    command += ["--gateway-port", "0", "--api-port", "0", "--ops-port", "0"]
    with (directory / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, **settings})
    deadline = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"farebox up did not start:\n{(directory / 'up.log').read_text()[-2000:]}")
        time.sleep(0.05)
    return House(process, json.loads(ready.read_text()))


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.1)


def _show(text: str) -> None:
    if sys.stdout.isatty():
        print(text.ljust(40), end="\r", flush=True)
