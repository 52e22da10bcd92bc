"""The account path end to end against nginx `proxy_pass`, as a ratio in one run, with the rows counted.

    .venv/bin/python bench/account.py [--seconds 3] [--rounds 3] [--connections 32] [--least 0.3]

`farebox up --sandbox` with one gateway process and its PostgreSQL, API, worker and shipper, as an operator runs it: each
call is admitted by API key, spends from a leased quota, is spooled and shipped into PostgreSQL. The gateway is pinned to
the first core, as nginx is; PostgreSQL, the shipper, the upstream and wrk share the second with everything else. At the end
every answer that wrk counted must be one metered event.

Needs nginx and wrk (Debian packages of these names); exits 2 and says so when they are missing. Exit 1: below --least,
or the rows do not agree.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from anchors import (
    BODY,
    PROXY,
    UPSTREAM,
    cpu_us,
    free_ports,
    missing_tools,
    nginx,
    only_child,
    serves,
    wait_for,
    wrk,
)

SHOP = """
upstreams:
  anchor: {{url: "http://127.0.0.1:{port}"}}
routes:
  - {{id: weather, match: {{path: "/weather/{{city}}"}}, upstream: anchor, metric: api_calls, fares: {{account: {{}}}}}}
metrics:
  - {{key: api_calls, name: "API calls", aggregation: sum}}
plans:
  - id: bench
    name: Bench
    currency: USD
    billing_period: monthly
    charges: [{{metric_key: api_calls, pricing_model: per_unit, properties: {{unit_price: "0.0001"}}}}]
    entitlements: {{api_calls: {{type: limit, metric_key: api_calls, limit: 1000000000, on_exceed: block}}}}
"""


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--least", type=float, default=0.3)
    chosen = options.parse_args()
    if missing := missing_tools("nginx", "wrk", "taskset"):
        print(missing, file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = cores[0], cores[-1]
    print(
        f"cores: {len(cores)} (server on {server_core}, the rest on {load_core}); {chosen.connections} connections, one API key"
    )

    upstream, proxied = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        directory = Path(folder)
        processes = [
            nginx(
                directory,
                "upstream",
                UPSTREAM.format(port=upstream, body=BODY.replace("\n", "\\n")),
                load_core,
            ),
            nginx(directory, "proxy", PROXY.format(port=proxied, target=upstream), server_core),
        ]
        try:
            up, ready = _farebox_up(directory, upstream, load_core)
            processes.append(up)
            gateway = int(ready["gateway_url"].rpartition(":")[2])
            for pid in ready["pids"]["gateway"]:
                for task in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(task), {server_core})
            key = _account_key(ready)
            headers = {"X-API-Key": key}
            wait_for(proxied)
            for port in (proxied, gateway):
                serves(port, "/weather/paris", headers)
            rates: dict[str, list[float]] = {"nginx": [], "farebox": []}
            costs: dict[str, list[float]] = {"nginx": [], "farebox": []}
            answers = 1
            for _ in range(chosen.rounds):
                for name, port, pid in (
                    ("nginx", proxied, only_child(processes[1].pid)),
                    ("farebox", gateway, ready["pids"]["gateway"][0]),
                ):
                    before = cpu_us(pid)
                    run = wrk(port, "/weather/paris", chosen.seconds, chosen.connections, load_core, headers)
                    cost = (cpu_us(pid) - before) / run.answers
                    rates[name].append(run.rate)
                    costs[name].append(cost)
                    answers += run.answers if name == "farebox" else 0
                    print(
                        f"  {name:8} {run.rate:9.0f} requests/s   {cost:6.1f} us of CPU each   {run.latency}   {run.answers} answers"
                    )
            gateway_mib = max(_rss_mib(pid) for pid in ready["pids"]["gateway"])
            rows = _settled_rows(ready["database_url"])
        finally:
            for process in reversed(processes):
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    best, middle = (
        max(rates["farebox"]) / max(rates["nginx"]),
        median(rates["farebox"]) / median(rates["nginx"]),
    )
    # A call whose answer wrk no longer waited for when its time was up is metered and not counted: at most one a connection.
    in_flight = rows - answers
    print(
        f"answers seen by wrk: {answers}; metered rows in PostgreSQL: {rows} ({in_flight} in flight when wrk hung up)"
    )
    print(f"gateway process: {gateway_mib:.0f} MiB resident")
    print(f"ratio farebox / nginx: best {best:.2f}, median {middle:.2f} (at least {chosen.least} wanted)")
    cheapest = min(costs["nginx"]) / min(costs["farebox"])
    print(f"the same by CPU spent on a request by the proxy's process: {cheapest:.2f}")
    agree = 0 <= in_flight <= chosen.rounds * chosen.connections
    return 0 if agree and best >= chosen.least else 1


def _farebox_up(directory: Path, upstream: int, core: int) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    shop, ready = directory / "farebox.yaml", directory / "ready.json"
    shop.write_text(SHOP.format(port=upstream))
    command = [
        "taskset",
        "-c",
        str(core),
        str(Path(sys.executable).with_name("farebox")),
        "up",
        "--sandbox",
        "-f",
        str(shop),
    ]
    command += ["--data", str(directory / "data"), "--gateways", "1", "--ready-file", str(ready)]
    command += ["--gateway-port", "0", "--api-port", "0", "--ops-port", "0"]
    with (directory / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"farebox up did not start:\n{(directory / 'up.log').read_text()[-2000:]}")
        time.sleep(0.05)
    return process, json.loads(ready.read_text())


def _account_key(ready: dict[str, Any]) -> str:
    def post(path: str, body: dict[str, Any]) -> dict[str, str]:
        request = urllib.request.Request(
            f"{ready['api_url']}{path}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {ready['admin_key']}", "Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request))  # type: ignore[no-any-return]

    post("/v1/customers", {"id": "bench", "name": "Bench", "email": "bench@example.com"})
    post(
        "/v1/subscriptions",
        {"customer_id": "bench", "plan_id": "bench", "start_date": "2026-01-01T00:00:00Z"},
    )
    return post("/v1/customers/bench/keys", {})["key"]


def _settled_rows(database_url: str) -> int:
    """The number of metered events once it has stood still for three seconds."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        last, since = -1, time.monotonic()
        while True:
            found = connection.execute(
                "SELECT count(*) FROM usage_event WHERE metric_key = 'api_calls'"
            ).fetchone()
            assert found
            if found[0] != last:
                last, since = found[0], time.monotonic()
                print(f"  shipped {last} rows", end="\r", flush=True)
            elif time.monotonic() - since > 3:
                return int(last)
            time.sleep(0.25)


def _rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
