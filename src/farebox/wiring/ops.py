"""The operator's port: health, readiness and metrics of everything a supervisor runs, summed over its processes.

    GET /healthz, /health   the supervisor lives                              200 {"status": "ok"}
    GET /ready              everything works                                  200 or 503 {"status", "checks": {name: "ok" | what is wrong}}
    GET /metrics            Prometheus text, summed over all processes

A loopback listener by default; it holds no secrets but says how busy the house is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from farebox import __version__
from farebox.store import migrate
from farebox.wiring.checkup import database_answers, migrations_fit
from farebox.wiring.supervisor import ChildState

REQUEST_BYTES_MAX: Final = 8192
REQUEST_TIMEOUT_S: Final = 5.0
#: A burst of probes asks the database once.
CHECK_KEPT_S: Final = 1.0

log = structlog.get_logger()

Answer = tuple[int, str, bytes]
States = Callable[[], list[ChildState]]


class Metrics:
    """The processes' counters, which they write to files of one directory (prometheus_client's multiprocess mode)."""

    def __init__(self, directory: Path, states: States) -> None:
        self._directory = directory
        self._registry = CollectorRegistry()
        MultiProcessCollector(self._registry, path=str(directory))  # type: ignore[no-untyped-call]
        self._registry.register(_Processes(states))

    @staticmethod
    def prepare(directory: Path) -> None:
        """An empty directory: what an earlier life counted is history."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)

    def bury(self, pid: int) -> None:
        """Drop the gauges of a dead process; what it counted stays counted."""
        with contextlib.suppress(OSError):
            mark_process_dead(pid, str(self._directory))  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Processes(Collector):
    """The supervisor's own knowledge: who is up, who had to be restarted."""

    def __init__(self, states: States) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("farebox_info", "The running version.", labels=["version"])
        info.add_metric([__version__], 1)
        ready = GaugeMetricFamily(
            "farebox_process_ready", "1 while the process is ready.", labels=["process", "kind"]
        )
        restarts = CounterMetricFamily(
            "farebox_process_restarts",
            "Times the process fell and was started again.",
            labels=["process", "kind"],
        )
        for state in self._states():
            ready.add_metric([state.name, state.kind], float(state.ready))
            restarts.add_metric([state.name, state.kind], state.restarts)
        yield info
        yield ready
        yield restarts


class Checks:
    """Whether everything works, in words. The database is asked at most once a second."""

    def __init__(self, database_url: str, direct_url: str, mode: migrate.Mode, states: States) -> None:
        self._database_url = database_url
        self._direct_url = direct_url
        self._mode = mode
        self._states = states
        self._migrated = False
        self._asking = asyncio.Lock()
        self._answer: tuple[float, dict[str, str]] = (float("-inf"), {})

    async def __call__(self) -> dict[str, str]:
        """``{"database": "ok", "migrations": "ok", "gateway": "ok", …}``; anything but "ok" says what is wrong."""
        async with self._asking:
            asked_at, outside = self._answer
            if time.monotonic() - asked_at > CHECK_KEPT_S:
                outside = {"database": await database_answers(self._database_url)}
                outside["migrations"] = (
                    await self._migrations() if outside["database"] == "ok" else "not known"
                )
                self._answer = (time.monotonic(), outside)
        return {**outside, **self._children()}

    async def _migrations(self) -> str:
        if self._migrated:  # a database does not lose migrations
            return "ok"
        said = await migrations_fit(self._direct_url, self._mode)
        self._migrated = said == "ok"
        return said

    def _children(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for state in self._states():
            waiting = [s.name for s in self._states() if s.kind == state.kind and not s.ready]
            found[state.kind] = f"not ready: {', '.join(waiting)}" if waiting else "ok"
        return found


class OpsServer:
    """A very small HTTP/1.1 server: GET and HEAD, one request a connection, everything bounded."""

    def __init__(
        self, checks: Callable[[], Awaitable[Mapping[str, str]]], metrics: Callable[[], bytes]
    ) -> None:
        self._checks = checks
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._draining = False

    async def serve(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._talk, sock=listener, limit=REQUEST_BYTES_MAX)

    def drain(self) -> None:
        """From now on ``/ready`` says no, so that a load balancer looks elsewhere; the rest goes on."""
        self._draining = True

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, content_type, body = await self._answer(head)
                writer.write(_response(status, content_type, body, with_body=not head.startswith(b"HEAD ")))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            pass  # a prober that went away or talks nonsense
        finally:
            writer.close()

    async def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _json(405, {"status": "only GET and HEAD are answered here"})
        match path:
            case b"/healthz" | b"/health":
                return _json(200, {"status": "ok"})
            case b"/ready":
                checks = dict(await self._checks())
                if self._draining:
                    checks["supervisor"] = "stopping"
                good = all(v == "ok" for v in checks.values())
                return _json(
                    200 if good else 503, {"status": "ready" if good else "not ready", "checks": checks}
                )
            case b"/metrics":
                return 200, CONTENT_TYPE_LATEST, self._metrics()
            case _:
                return _json(404, {"status": "not found", "try": ["/healthz", "/ready", "/metrics"]})


def _json(status: int, document: Mapping[str, object]) -> Answer:
    return status, "application/json", json.dumps(document).encode()


_PHRASES: Final = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


def _response(status: int, content_type: str, body: bytes, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
