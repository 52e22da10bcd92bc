"""Forward-auth: nginx that asks Farebox before each call, against the same nginx that does not, with the rows counted.

    .venv/bin/python bench/authorize.py [--seconds 4] [--rounds 3] [--connections 32] [--least 0]

`farebox up --sandbox` with one gateway process and its forward-auth listener; an nginx with `auth_request` in front of the
upstream, pinned to the first core, and one with `proxy_pass` alone on the same core. The gateway, PostgreSQL, the shipper, the
upstream and wrk share the second. Every answer that wrk counted must be one metered event.

Needs nginx and wrk (Debian packages of these names); exits 2 and says so when they are missing. Exit 1: below --least,
or the rows do not agree.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

from anchors import BODY, PROXY, UPSTREAM, cpu_us, free_ports, missing_tools, nginx, serves, wait_for, wrk
from houses import METRIC, PLAN, a_house

SHOP = """
upstreams:
  anchor: {{url: "http://127.0.0.1:{port}"}}
routes:
  - {{id: weather, match: {{path: "/weather/{{city}}"}}, upstream: anchor, metric: api_calls, forward_auth: true, fares: {{account: {{}}}}}}
"""
#: The part of deploy/nginx/farebox.conf that asks, without TLS.
ASKS = """
    upstream target {{ server 127.0.0.1:{target}; keepalive 256; keepalive_requests 100000000; }}
    upstream authorize {{ server 127.0.0.1:{authorize}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            auth_request /farebox-authorize;
            auth_request_set $farebox_request_id $upstream_http_farebox_request_id;
            auth_request_set $farebox_customer $upstream_http_farebox_customer;
            proxy_pass http://target;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $host;
            proxy_set_header Farebox-Request-Id $farebox_request_id;
            proxy_set_header Farebox-Customer $farebox_customer;
            proxy_set_header X-API-Key "";
            add_header Farebox-Request-Id $farebox_request_id;
        }}
        location = /farebox-authorize {{
            internal;
            proxy_pass http://authorize/.farebox/authorize?edge=nginx;
            proxy_pass_request_body off;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Content-Length "";
            proxy_set_header Farebox-Edge-Secret {secret};
            proxy_set_header X-Forwarded-Method $request_method;
            proxy_set_header X-Forwarded-Uri $request_uri;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
        }}
    }}
"""
PATH = "/weather/paris"


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=int, default=4)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--least", type=float, default=0.0)
    chosen = options.parse_args()
    if missing := missing_tools("nginx", "wrk", "taskset"):
        print(missing, file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))
    edge_core, load_core = cores[0], cores[-1]
    print(
        f"cores: {len(cores)} (nginx on {edge_core}, the rest on {load_core}); {chosen.connections} connections"
    )
    upstream, plain, asking = free_ports(3)
    secret = secrets.token_urlsafe(32)
    rates: dict[str, list[float]] = {"nginx": [], "with farebox": []}
    answers = 1
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        directory = Path(folder)
        house = a_house(
            directory,
            SHOP.format(port=upstream) + PLAN,
            load_core,
            options=("--gateways", "1"),
            FAREBOX_AUTHORIZE_PORT="0",
            FAREBOX_EDGE_SECRET=secret,
        )
        processes = [house.process]
        try:
            authorize = int(house.ready["authorize_url"].rpartition(":")[2])
            answer = UPSTREAM.format(port=upstream, body=BODY.replace("\n", "\\n"))
            asks = ASKS.format(port=asking, target=upstream, authorize=authorize, secret=secret)
            processes += [
                nginx(directory, "upstream", answer, load_core),
                nginx(directory, "plain", PROXY.format(port=plain, target=upstream), edge_core),
                nginx(directory, "asking", asks, edge_core),
            ]
            headers = {"X-API-Key": house.keys(1)[0]}
            for port in (plain, asking):
                wait_for(port)
                serves(port, PATH, headers)
            [gateway] = house.gateway_pids
            for _ in range(chosen.rounds):
                for name, port in (("nginx", plain), ("with farebox", asking)):
                    spent = cpu_us(gateway)
                    run = wrk(port, PATH, chosen.seconds, chosen.connections, load_core, headers)
                    cost = (cpu_us(gateway) - spent) / run.answers
                    rates[name].append(run.rate)
                    answers += run.answers if port == asking else 0
                    print(
                        f"  {name:13} {run.rate:9.0f} requests/s   {cost:5.1f} us of CPU of the gateway each   {run.latency}"
                    )
            rows = house.settled_rows(METRIC)
        finally:
            for process in reversed(processes):
                process.send_signal(signal.SIGTERM)
                process.wait(60)
    best = max(rates["with farebox"]) / max(rates["nginx"])
    in_flight = rows - answers
    print(f"answers {answers}; metered rows in PostgreSQL {rows} ({in_flight} in flight when wrk hung up)")
    print(
        f"ratio asking / not asking: best {best:.2f}, median {median(rates['with farebox']) / median(rates['nginx']):.2f}"
    )
    return 0 if 0 <= in_flight <= chosen.rounds * chosen.connections and best >= chosen.least else 1


if __name__ == "__main__":
    sys.exit(main())
