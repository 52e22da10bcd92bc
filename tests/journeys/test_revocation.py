"""A revoked key and a revoked pass, in every process of a real house, while they are called as fast as may be.

The memory of a grant lasts ten minutes here, so that nothing but what is tested can have ended it in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from farebox.embedded import EmbeddedPostgres
from tests.database import SETTINGS, fresh_directory
from tests.journeys.house import House, Upstream, farebox_up
from tests.wire import Wire

CALLS_AFTER = 10_000 if os.environ.get("FAREBOX_CAMPAIGN") else 300


@pytest.fixture
def server() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of this test's own, to be stopped."""
    directory = fresh_directory()
    made = EmbeddedPostgres(directory, settings=SETTINGS)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def a_wire_beside(url: str) -> Iterator[Wire]:
    """A wire with a thread of its own: the test itself waits for processes."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    wire = Wire(url)
    asyncio.run_coroutine_threadsafe(wire.open(), loop).result(30)
    try:
        yield wire
    finally:
        asyncio.run_coroutine_threadsafe(wire.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


class Callers:
    """Threads that call with one credential each, a new connection a call, so that every process is met."""

    def __init__(self, house: House, **headers: dict[str, str]) -> None:
        self._address = house.gateway_url.removeprefix("http://")
        self._headers = headers
        self.calls = dict.fromkeys(headers, 0)
        self.last = {name: deque[int](maxlen=60) for name in headers}
        self.admitted = dict.fromkeys(headers, 0)
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(name,)) for name in headers for _ in range(2)
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _call(self, name: str) -> None:
        while not self._over.is_set():
            status = status_of(self._address, self._headers[name])
            self.calls[name] += 1
            self.admitted[name] += status == 200
            self.last[name].append(status)

    def until_refused(self, name: str) -> None:
        """Refused in every process, and then for good."""
        until(lambda: len(self.last[name]) == 60 and 200 not in self.last[name])
        admitted, calls = self.admitted[name], self.calls[name]
        until(lambda: self.calls[name] >= calls + CALLS_AFTER, within_s=3600)
        assert self.admitted[name] == admitted, "it was refused, and then let in again"


def status_of(address: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("GET", "/w", headers={**headers, "Connection": "close"})
        return connection.getresponse().status
    finally:
        connection.close()


def until(condition: Callable[[], Any], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def a_key_and_a_pass(house: House) -> tuple[dict[str, str], dict[str, str], str]:
    """Headers with the key, headers with the token, and the pass's id."""
    key = house.account_key()
    granted = a_pass(house)
    return {"X-API-Key": key}, {"Authorization": f"Bearer {granted['token']}"}, granted["pass_id"]


def a_pass(house: House) -> dict[str, Any]:
    return house.post("/v1/passes", {"route": "forecast", "limits": {"calls": 10_000_000}, "duration": "1h"})


def revoke(url: str, pass_id: str) -> None:
    """The customer's keys and the pass, in one transaction, as the control API does it."""
    with psycopg.connect(url) as connection:
        for (key_id,) in connection.execute(
            "UPDATE customer_key SET revoked_at = now() WHERE revoked_at IS NULL RETURNING id"
        ).fetchall():
            connection.execute("SELECT pg_notify('farebox_change', %s)", (f"key:{key_id}",))
        connection.execute(
            "UPDATE admission_grant SET revoked_at = now(), version = version + 1 WHERE subject_id = %s",
            (pass_id,),
        )
        connection.execute("SELECT pg_notify('farebox_change', %s)", (f"grant:{pass_id}",))


def end_listeners(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'farebox listener'"
        )


@pytest.mark.parametrize("listener", ["open", "closed", "silent"])
def test_a_key_and_a_pass_that_are_revoked_under_load_are_refused_in_every_process(
    tmp_path: Path, upstream: Upstream, empty_database_url: str, listener: str
):
    with (
        a_wire_beside(empty_database_url) as wire,
        farebox_up(
            tmp_path / "house",
            upstream,
            gateways=2,
            database_url=empty_database_url,
            FAREBOX_DATABASE_DIRECT_URL=wire.url,
            FAREBOX_GRANT_TTL_S="600",
        ) as house,
    ):
        key, token, pass_id = a_key_and_a_pass(house)
        with Callers(house, key=key, token=token) as callers:
            until(lambda: min(callers.admitted.values()) > 100)
            match listener:
                case "closed":
                    end_listeners(empty_database_url)
                case "silent":
                    wire.hush()
            revoke(empty_database_url, pass_id)

            callers.until_refused("key")
            callers.until_refused("token")


def test_while_postgresql_is_stopped_known_ones_serve_for_their_time_and_what_is_revoked_then_is_refused_after_it(
    tmp_path: Path, upstream: Upstream, server: EmbeddedPostgres
):
    with farebox_up(
        tmp_path / "house",
        upstream,
        gateways=2,
        database_url=server.url,
        FAREBOX_GRANT_TTL_S="600",
        FAREBOX_STALE_GRANT_S_MAX="12",
    ) as house:
        key, token, pass_id = a_key_and_a_pass(house)
        unseen = [{"Authorization": f"Bearer {a_pass(house)['token']}"} for _ in range(2)]
        address = house.gateway_url.removeprefix("http://")
        with Callers(house, key=key, token=token) as callers:
            until(lambda: min(callers.admitted.values()) > 100)

            frozen = stop_the_clock(server)
            assert status_of(address, key) == 200, "what is known serves on"
            assert status_of(address, unseen[0]) == 503, "what was never seen does not"
            until(lambda: set(callers.last["key"]) == {503} and set(callers.last["token"]) == {503})
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
            until(lambda: set(callers.last["key"]) == {200} and set(callers.last["token"]) == {200})

            server.stop()
            assert status_of(address, unseen[1]) == 503
            server.start()
            revoke(server.url, pass_id)  # at once: hardly anybody has noticed that it is back
            callers.until_refused("key")
            callers.until_refused("token")


def stop_the_clock(server: EmbeddedPostgres) -> list[int]:
    """SIGSTOP to the server and all its sessions: every connection stays open, and nobody answers."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)  # no new ones
    pids = [server.pid, *children_of(server.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def children_of(pid: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((process / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(process.name))
    return found
