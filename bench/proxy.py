"""The gateway's proxy core against nginx `proxy_pass`, as a ratio in one run.

    .venv/bin/python bench/proxy.py [--seconds 3] [--rounds 3] [--connections 32] [--least 0.5]

One process each, pinned to the first core; the upstream (an nginx that returns 88 fixed bytes) and wrk share the second.
Rounds alternate between the two, so that whatever else the machine does falls on both. The door admits everyone: this
measures the proxy alone; what admission and metering cost is another page of this folder.

Needs nginx and wrk (Debian packages of these names); exits 2 and says so when they are missing. Exit 1: below --least.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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

#: What an ordinary client sends beside Host.
HEADERS = {
    "User-Agent": "bench/1.0",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "Authorization": "Bearer something-of-the-upstreams-own",
}


async def gateway(port: int, target: int) -> None:
    """The process under test: a gateway whose door admits everyone."""
    from farebox.app.admission import Admitted, Call
    from farebox.domain.access import GatewayCatalog, Match, Route, Upstream
    from farebox.gateway.server import Gateway

    class OpenDoor:
        finished = 0

        def needs_body(self, call: Call) -> bool:
            return False

        def admit(self, call: Call) -> Admitted:
            return Admitted("free", [(b"Farebox-Request-Id", call.request_id.encode())], [], self.finish)

        def finish(self, status: int, bytes_up: int, bytes_down: int) -> None:
            self.finished += 1

    catalog = GatewayCatalog(
        1,
        (Upstream("target", f"http://127.0.0.1:{target}"),),
        (
            Route("weather", Match("/weather/{city}"), "target"),
            Route("rest", Match("/other/{*rest}"), "target"),
        ),
    )
    served = Gateway(OpenDoor(), None, catalog)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    await served.serve(sock)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    print(sum(served.counters.requests.values()), flush=True)
    await served.drain(1)


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--least", type=float, default=0.5)
    options.add_argument("--serve", nargs=2, type=int, metavar=("PORT", "TARGET"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        import uvloop

        uvloop.run(gateway(*chosen.serve))
        return 0

    if missing := missing_tools("nginx", "wrk", "taskset"):
        print(missing, file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = cores[0], cores[-1]
    print(
        f"cores: {len(cores)} (server on {server_core}, upstream and wrk on {load_core}); {chosen.connections} connections"
    )

    upstream, proxied, own = free_ports(3)
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
        served = subprocess.Popen(
            ["taskset", "-c", str(server_core), sys.executable, __file__, "--serve", str(own), str(upstream)],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(served)
        try:
            for port in (upstream, proxied, own):
                wait_for(port)
                serves(port, "/weather/paris", {})
            rates: dict[str, list[float]] = {"nginx": [], "farebox": []}
            costs: dict[str, list[float]] = {"nginx": [], "farebox": []}
            counted = 1
            for _ in range(chosen.rounds):
                for name, port, pid in (
                    ("nginx", proxied, only_child(processes[1].pid)),
                    ("farebox", own, served.pid),
                ):
                    before = cpu_us(pid)
                    run = wrk(port, "/weather/paris", chosen.seconds, chosen.connections, load_core, HEADERS)
                    cost = (cpu_us(pid) - before) / run.answers
                    rates[name].append(run.rate)
                    costs[name].append(cost)
                    counted += run.answers if name == "farebox" else 0
                    print(
                        f"  {name:8} {run.rate:9.0f} requests/s   {cost:6.1f} us of CPU each   {run.latency}   {run.answers} answers"
                    )
            served.send_signal(signal.SIGTERM)
            printed, _ = served.communicate(timeout=10)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(10)
    best = max(rates["farebox"]) / max(rates["nginx"])
    median = statistics.median(rates["farebox"]) / statistics.median(rates["nginx"])
    print(f"calls finished at the door: {printed.strip()}; whole answers seen by wrk: {counted}")
    print(f"ratio farebox / nginx: best {best:.2f}, median {median:.2f} (at least {chosen.least} wanted)")
    cheapest = min(costs["nginx"]) / min(costs["farebox"])
    print(f"the same by CPU spent on a request (says more on a busy machine): {cheapest:.2f}")
    return 0 if best >= chosen.least else 1


if __name__ == "__main__":
    sys.exit(main())
