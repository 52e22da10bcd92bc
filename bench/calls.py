"""Calls by account and by pass, end to end against nginx `proxy_pass`, as ratios in one run, with the rows counted.

    .venv/bin/python bench/calls.py [--fares account,pass] [--tokens 10000] [--seconds 4] [--rounds 3] [--connections 32] [--least 0.3]

`farebox up --sandbox` with one gateway process and its PostgreSQL, API, worker and shipper, as an operator runs it. Each
call carries another one of the living keys (or passes), spends from that one's leased limit, is spooled and shipped into
PostgreSQL. The gateway is pinned to the first core, as nginx is; PostgreSQL, the shipper, the upstream and wrk share the
second with everything else; nginx is asked by the same script with the same headers. At the end every answer that wrk
counted must be one metered event. Beside it: what a call costs more than a direct one, one at a time.

Needs nginx and wrk (Debian packages of these names); exits 2 and says so when they are missing. Exit 1: below --least,
or the rows do not agree.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from anchors import (
    BODY,
    PROXY,
    UPSTREAM,
    Run,
    cpu_us,
    free_ports,
    missing_tools,
    nginx,
    only_child,
    serves,
    wait_for,
    wrk,
)
from houses import METRIC, PLAN, House, a_house, rss_mib

SHOP = """
upstreams:
  anchor: {{url: "http://127.0.0.1:{port}"}}
routes:
  - id: weather
    match: {{path: "/weather/{{city}}"}}
    upstream: anchor
    metric: api_calls
    fares:
      account: {{}}
      passes: [{{id: month, name: "A month", price: "100 USDC", duration: 30d, limits: {{calls: 1000000000}}}}]
"""
PATH = "/weather/paris"
#: Each request of wrk carries the next token; all requests are made before the clock runs.
SCRIPT = """
local requests, at = {{}}, 0
function init(args)
  for token in io.lines("{tokens}") do
    requests[#requests + 1] = wrk.format("GET", "{path}", {{["{name}"] = "{prefix}" .. token}})
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
"""
LATENCY_CALLS = 2000


@dataclass
class Measured:
    """The runs of one server."""

    runs: list[Run] = field(default_factory=list)
    costs_us: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [run.rate for run in self.runs]


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--fares", default="account,pass")
    options.add_argument("--tokens", type=int, default=10_000)
    options.add_argument("--seconds", type=int, default=4)
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
        f"cores: {len(cores)} (server on {server_core}, the rest on {load_core}); {chosen.connections} connections, {chosen.tokens} living tokens"
    )
    good = True
    upstream, proxied = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        directory = Path(folder)
        answer = UPSTREAM.format(port=upstream, body=BODY.replace("\n", "\\n"))
        proxy = PROXY.format(port=proxied, target=upstream)
        processes = [
            nginx(directory, "upstream", answer, load_core),
            nginx(directory, "proxy", proxy, server_core),
        ]
        try:
            house = a_house(
                directory,
                SHOP.format(port=upstream) + PLAN,
                load_core,
                options=("--gateways", "1"),
                FAREBOX_API_RATE_LIMIT_RPM="0",
            )
            processes.append(house.process)
            house.pin_gateways(server_core)
            wait_for(proxied)
            for fare in chosen.fares.split(","):
                tokens = _passes(house, chosen.tokens) if fare == "pass" else house.keys(chosen.tokens)
                good &= _measure(
                    fare, tokens, house, proxied, upstream, processes[1].pid, load_core, directory, chosen
                )
            print(f"gateway process: {max(rss_mib(pid) for pid in house.gateway_pids):.0f} MiB resident")
        finally:
            for process in reversed(processes):
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    return 0 if good else 1


def _measure(
    fare: str,
    tokens: list[str],
    house: House,
    proxied: int,
    upstream: int,
    proxy_pid: int,
    load_core: int,
    directory: Path,
    chosen: argparse.Namespace,
) -> bool:
    name, prefix = ("Authorization", "Bearer ") if fare == "pass" else ("X-API-Key", "")
    token_file, script = directory / f"{fare}.tokens", directory / f"{fare}.lua"
    token_file.write_text("\n".join(tokens) + "\n")
    script.write_text(SCRIPT.format(tokens=token_file, path=PATH, name=name, prefix=prefix))
    headers = {name: prefix + tokens[0]}
    before = house.settled_rows(METRIC)
    for port in (proxied, house.gateway_port):
        serves(port, PATH, headers)
    answers = 1
    # Every token is seen once and its first slices are taken before the clock runs: living tokens, not new ones.
    warm = wrk(house.gateway_port, PATH, max(8, chosen.tokens // 600), chosen.connections, load_core, script)
    answers += warm.answers
    runs = {"nginx": Measured(), "farebox": Measured()}
    for _ in range(chosen.rounds):
        for server, port, pid in (
            ("nginx", proxied, only_child(proxy_pid)),
            ("farebox", house.gateway_port, house.gateway_pids[0]),
        ):
            spent = cpu_us(pid)
            run = wrk(port, PATH, chosen.seconds, chosen.connections, load_core, script)
            cost = (cpu_us(pid) - spent) / run.answers
            runs[server].runs.append(run)
            runs[server].costs_us.append(cost)
            answers += run.answers if server == "farebox" else 0
            print(
                f"  {fare:7} {server:8} {run.rate:9.0f} requests/s   {cost:6.1f} us of CPU each   {run.latency}   {run.answers} answers"
            )
    direct = _latencies(upstream, {})
    through = _latencies(house.gateway_port, headers)
    answers += LATENCY_CALLS
    rows = house.settled_rows(METRIC) - before
    ours, anchor = runs["farebox"], runs["nginx"]
    best = max(ours.rates) / max(anchor.rates)
    # A call whose answer wrk no longer waited for when its time was up is metered and not counted: at most one a connection.
    in_flight = rows - answers
    print(
        f"{fare}: answers {answers}; metered rows in PostgreSQL {rows} ({in_flight} in flight when wrk hung up)"
    )
    print(
        f"{fare}: ratio farebox / nginx: best {best:.2f}, median {median(ours.rates) / median(anchor.rates):.2f} (at least {chosen.least} wanted); "
        f"by CPU of the proxy's process {min(anchor.costs_us) / min(ours.costs_us):.2f}"
    )
    print(
        f"{fare}: one call at a time: direct p50 {direct[0]:.0f} us p99 {direct[1]:.0f} us; through farebox p50 {through[0]:.0f} us p99 "
        f"{through[1]:.0f} us; added p50 {through[0] - direct[0]:.0f} us"
    )
    return 0 <= in_flight <= (chosen.rounds + 1) * chosen.connections and best >= chosen.least


def _passes(house: House, count: int) -> list[str]:
    """Tokens of passes with a million calls each."""
    body = {"route": "weather", "limits": {"calls": 1_000_000}, "duration": "30d"}
    return [answer["token"] for answer in house.post_all([("/v1/passes", body)] * count)]


def _latencies(port: int, headers: dict[str, str]) -> tuple[float, float]:
    """p50 and p99 in microseconds of calls one after the other on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    taken: list[float] = []
    for _ in range(LATENCY_CALLS):
        began = time.perf_counter()
        connection.request("GET", PATH, headers=headers)
        answer = connection.getresponse()
        answer.read()
        taken.append((time.perf_counter() - began) * 1e6)
        assert answer.status == 200
    connection.close()
    cuts = quantiles(taken, n=100)
    return cuts[49], cuts[98]


if __name__ == "__main__":
    sys.exit(main())
