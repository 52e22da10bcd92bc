"""Gateways that are renewed and restarted under load, and clients and upstreams that hold on to connections."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.journeys.house import SHOP, House, Tally, Upstream, farebox_up, load

HALF_OPEN = 300
STALLED = 60
RSS_GROWTH_BYTES_MAX = 48 * 1024 * 1024


def until(condition: Callable[[], Any], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


class ShortCalls:
    """One connection a call; whatever is not a whole answer counts as broken."""

    def __init__(self, house: House, key: str) -> None:
        host, port = house.gateway_url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._request = (
            f"GET /w HTTP/1.1\r\nHost: shop\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n".encode()
        )
        self.answered = 0
        self.broken: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(3)]

    def __enter__(self) -> ShortCalls:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                answer = self.once()
                if answer.startswith(b"HTTP/1.1 200 "):
                    self.answered += 1
                else:
                    self.broken.append(repr(answer[:60]))
            except OSError as error:
                self.broken.append(repr(error))

    def once(self) -> bytes:
        with socket.create_connection(self._address, timeout=60) as client:
            client.sendall(self._request)
            answer = b""
            while data := client.recv(65536):
                answer += data
            return answer


def test_gateways_renewed_and_restarted_under_load_reset_no_connection(tmp_path: Path, upstream: Upstream):
    with farebox_up(tmp_path / "house", upstream, gateways=2) as house:
        key = house.account_key()
        kept, over = Tally(), threading.Event()

        def keep_alive() -> None:
            """Clients that stay: they are told `Connection: close` by a gateway that ends, and come again."""
            while not over.is_set():
                asyncio.run(load(house.gateway_url, key, 6, 1.0, kept))

        staying = threading.Thread(target=keep_alive)
        with ShortCalls(house, key) as short:
            staying.start()
            until(lambda: short.answered > 50 and len(kept.answered) > 50)

            before = house.gateway_pids
            house.process.send_signal(signal.SIGHUP)
            until(lambda: not any(alive(pid) for pid in before))
            for _ in range(2):
                one = gateways_of(house)[0]
                os.kill(one, signal.SIGTERM)
                until(lambda one=one: not alive(one))  # type: ignore[misc]
                until(lambda: len(gateways_of(house)) == 2)
            answered = short.answered
            until(lambda answered=answered: short.answered > answered + 50)  # type: ignore[misc]
            over.set()
            staying.join(60)

        assert short.broken == []
        assert kept.broken == 0
        assert kept.refused == {}


def gateways_of(house: House) -> list[int]:
    """The gateway processes that the supervisor runs now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
            if (
                parent == house.process.pid
                and b"farebox.wiring.gateway" in (process / "cmdline").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture
def stalled() -> Iterator[socket.socket]:
    """An upstream that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as made:
        yield made


def test_half_open_connections_and_a_stalled_upstream_cost_a_connection_each_and_not_the_gateway(
    tmp_path: Path, upstream: Upstream, stalled: socket.socket
):
    port = stalled.getsockname()[1]
    shop = SHOP.replace(
        "routes:\n",
        f'  stalled: {{{{url: "http://127.0.0.1:{port}"}}}}\nroutes:\n'
        '  - {{id: stuck, match: {{path: "/stuck"}}, upstream: stalled, metric: api_calls, fares: {{account: {{}}}}}}\n',
        1,
    )
    with farebox_up(tmp_path / "house", upstream, shop=shop, FAREBOX_UPSTREAM_CONNECTIONS_MAX="20") as house:
        key = house.account_key()
        host, number = house.gateway_url.removeprefix("http://").split(":")
        address = (host, int(number))
        short = ShortCalls(house, key)
        for _ in range(20):
            assert short.once().startswith(b"HTTP/1.1 200 ")
        [gateway] = house.gateway_pids
        before = rss_bytes(gateway)

        held = [socket.create_connection(address, timeout=60) for _ in range(HALF_OPEN + STALLED)]
        for client in held[:HALF_OPEN]:
            client.sendall(b"GET /w HTTP/1.1\r\nHost: shop\r\nX-API-K")
        for client in held[HALF_OPEN:]:
            client.sendall(f"GET /stuck HTTP/1.1\r\nHost: shop\r\nX-API-Key: {key}\r\n\r\n".encode())

        for _ in range(300):
            assert short.once().startswith(b"HTTP/1.1 200 ")
        assert rss_bytes(gateway) - before < RSS_GROWTH_BYTES_MAX
        assert house.gateway_pids == gateways_of(house), "it is the same process"
        for client in held:
            client.close()


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
