"""What open connections cost: memory of a gateway process with 10,000 of them, each of which has made a call and stays.

    .venv/bin/python bench/connections.py [--connections 10000] [--most-mib 150]

`farebox up --sandbox` with one gateway process. Every connection makes a metered call by API key, then idles; half of them
make another call at the end, which must still be answered, and every call must be one row. Exit 1: more memory than
--most-mib, or the rows do not agree. Needs a limit of open files above twice the connections (it raises its own as far as
it may).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import sys
import tempfile
from pathlib import Path

from houses import METRIC, PLAN, a_house, rss_mib

SHOP = """
upstreams:
  small: {{url: "http://127.0.0.1:{port}"}}
routes:
  - {{id: all, match: {{path: "/{{*rest}}"}}, upstream: small, metric: api_calls, fares: {{account: {{}}}}}}
"""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
#: Connections that are being opened at one time.
OPENING_MAX = 200


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--connections", type=int, default=10_000)
    options.add_argument("--most-mib", type=float, default=150)
    chosen = options.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < (needed := chosen.connections + 2_000):
        print(f"needs {needed} open files, {hard} are allowed", file=sys.stderr)
        return 2
    return asyncio.run(_run(chosen.connections, chosen.most_mib))


async def _run(connections: int, most_mib: float) -> int:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    upstream = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="farebox-bench-") as folder:
        house = await asyncio.to_thread(
            a_house,
            Path(folder),
            SHOP.format(port=port) + PLAN,
            None,
            options=("--gateways", "1"),
            FAREBOX_CONNECTIONS_MAX=str(connections + 100),
            FAREBOX_IDLE_TIMEOUT_S="600",
        )
        try:
            [key] = await asyncio.to_thread(house.keys, 1)
            request = f"GET /x HTTP/1.1\r\nHost: shop.test\r\nX-API-Key: {key}\r\n\r\n".encode()
            [pid] = house.gateway_pids
            empty = rss_mib(pid)
            gate, open_ones = asyncio.Semaphore(OPENING_MAX), []

            async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), head
                await reader.readexactly(2)

            async def come_and_stay() -> None:
                async with gate:
                    pair = await asyncio.open_connection("127.0.0.1", house.gateway_port)
                    await call(*pair)
                    open_ones.append(pair)

            await asyncio.gather(*(come_and_stay() for _ in range(connections)))
            full = rss_mib(pid)
            again = open_ones[::2]
            for start in range(0, len(again), OPENING_MAX):
                await asyncio.gather(*(call(*pair) for pair in again[start : start + OPENING_MAX]))
            for _, writer in open_ones:
                writer.close()
            rows = await asyncio.to_thread(house.settled_rows, METRIC)
        finally:
            house.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(house.process.wait, 60)
    calls = connections + len(again)
    print(
        f"{connections} connections: {full:.0f} MiB resident ({empty:.0f} MiB without any, {(full - empty) * 1024 / connections:.1f} KiB each)"
    )
    print(f"calls {calls}, metered rows {rows} (at most {most_mib:.0f} MiB wanted)")
    return 0 if full <= most_mib and rows == calls else 1


if __name__ == "__main__":
    sys.exit(main())
