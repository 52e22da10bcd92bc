"""The gateway of one process: what its connections share, and how it begins, changes its catalog and ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final, Protocol

import structlog

from farebox.app.admission import LIMIT_NAMES, Answer, Call, Door, Headers, Refusal
from farebox.base.errors import refuse
from farebox.domain.access import FareKind, GatewayCatalog
from farebox.gateway.connection import ClientConnection
from farebox.gateway.counters import Counters
from farebox.gateway.exchange import Exchange
from farebox.gateway.fields import answer_fields, request_fields
from farebox.gateway.forwarding import TrustedProxies
from farebox.gateway.held_bodies import HeldBodies
from farebox.gateway.pools import Destination, Pools, Ticker
from farebox.gateway.routing import RouteTable
from farebox.gateway.settings import GatewaySettings

log = structlog.get_logger(__name__)

#: Turns of the loop in a row that found nobody to accept: then the accept queue is empty. A turn may accept no more than one.
_QUIET_TURNS: Final = 8
#: However many still come: a supervisor that holds the socket as well keeps them for the next process.
_ACCEPT_TURNS_MAX: Final = 10_000
#: How often running calls are held against the business date: the bound within which an ended pass ends its calls.
_STANDING_EVERY_S: Final = 1.0
_ID_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"


class Site(Protocol):
    """Our own pages on the public port: quotes, purchases, keys, discovery."""

    def owns(self, path: str) -> bool: ...

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal: ...


@dataclass(frozen=True, slots=True)
class CallReport:
    """How one call ended, for whoever shows or logs calls. ``fare`` None: it was refused with ``code``."""

    request_id: str
    client_address: str
    call: Call | None  # None when the request did not get as far as a route
    fare: FareKind | None
    status: int  # 0: no answer
    code: str | None
    bytes_up: int
    bytes_down: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Routes and where they lead, of one catalog: swapped as one."""

    catalog: GatewayCatalog
    table: RouteTable
    destinations: dict[str, Destination]


class Gateway:
    """An HTTP/1.1 reverse proxy that asks a ``Door`` before it forwards. One event loop, any number of sockets.

    ``log_refusals``/``log_calls`` write one structured line each (at info, at debug); ``on_call`` is told of every call.
    ``business_now_s``: seconds since the epoch by the business date, for what running calls stand on.
    """

    def __init__(
        self,
        door: Door,
        site: Site | None,
        catalog: GatewayCatalog,
        settings: GatewaySettings | None = None,
        *,
        on_call: Callable[[CallReport], None] | None = None,
        log_refusals: bool = False,
        log_calls: bool = False,
        business_now_s: Callable[[], float] = time.time,
    ) -> None:
        self.door = door
        self.site = site
        self.settings = settings or GatewaySettings()
        self.counters = Counters()
        self.draining = False
        self.ticker = Ticker()
        self.request_book = request_fields()
        self.answer_book = answer_fields()
        self.contested: set[bytes] = set()
        for name in LIMIT_NAMES:
            self.contest(name)
        self.date = formatdate(usegmt=True).encode()
        self.answer_lines = (
            b"Farebox-Sandbox: 1\r\n" if self.settings.sandbox else b""
        ) + b"Farebox-Request-Id: "
        self._on_call = on_call
        self._log_refusals = log_refusals
        self._log_calls = log_calls
        self._reports = on_call is not None or log_refusals or log_calls
        number = int.from_bytes(os.urandom(10))
        self._id_prefix = (
            "req_" + "".join(_ID_ALPHABET[number >> shift & 31] for shift in range(75, -1, -5)) + "_"
        )
        self._ids = itertools.count(1)
        self._connections: set[ClientConnection] = set()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.held_bodies = HeldBodies(self.settings)
        self.unattended: set[Exchange] = set()  # their clients left, their payments are still to be settled
        self.timed: set[Exchange] = set()  # they must be over at ``ends_at``
        self._business_now_s = business_now_s
        self._standing_looked_at = 0.0
        self.pools = Pools(self.settings, self.ticker, self.answer_book)
        self._timer: asyncio.TimerHandle | None = None
        self.layout = self._lay_out(catalog)
        self.trusted_proxies = TrustedProxies(catalog.server.trusted_proxies)

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self, sock: socket.socket) -> None:
        """Begin to accept on a listening (or bound) socket, and return. May be called for several sockets."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._tick()
        self._servers.append(
            await loop.create_server(lambda: ClientConnection(self), sock=sock, backlog=4096)
        )

    def replace_catalog(self, catalog: GatewayCatalog) -> None:
        """From the next request on, routes and upstreams are those of ``catalog``. Calls under way end as they began.

        Raises ``Refused`` for a catalog that cannot be served, and then keeps the present one.
        """
        trusted = TrustedProxies(catalog.server.trusted_proxies)
        self.layout = self._lay_out(catalog)
        self.trusted_proxies = trusted

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Serve what waits in the accept queue and what is under way, at most for ``timeout_s``; then close everything."""
        self.draining = True
        self.pools.stop_probes()
        await self._let_in()
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self._connections):
            connection.leave_when_idle()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while (self._connections or self._tasks or self.unattended) and loop.time() < end:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.02)
        for connection in list(self._connections):
            connection.abort()
        self.pools.close()
        await asyncio.sleep(0)
        if self._tasks:  # settlements that outlast the drain go on to their end
            await asyncio.wait(self._tasks, timeout=max(1.0, end - loop.time()))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _let_in(self) -> None:
        """Accept whoever waits in the accept queue. Counted in turns of the loop, each of which looks at the sockets: time may
        pass without a turn when the machine is busy."""
        quiet = 0
        for _ in range(_ACCEPT_TURNS_MAX):
            before = self.counters.connections_total
            await asyncio.sleep(0)
            quiet = quiet + 1 if self.counters.connections_total == before else 0
            if quiet == _QUIET_TURNS:
                return

    def cut(self, ids: Collection[str]) -> int:
        """End every running call that stands on one of these subjects (customers, passes) or keys; returns how many.

        One that has no answer yet gets a 401 ``credential_revoked``; a client that has part of one sees its connection close.
        """
        ended = 0
        for connection in list(self._connections):
            standing = connection.standing
            if standing is not None and (standing.subject_id in ids or standing.key_id in ids):
                connection.cut_call(
                    "credential_revoked", "What this call stood on was taken back while it ran."
                )
                ended += 1
        return ended

    def standing_ids(self) -> set[str]:
        """The subjects and keys that running calls stand on: whose end would concern this process now."""
        found: set[str] = set()
        for connection in self._connections:
            standing = connection.standing
            if standing is not None:
                found.add(standing.subject_id)
                if standing.key_id:
                    found.add(standing.key_id)
        return found

    def _lay_out(self, catalog: GatewayCatalog) -> Layout:
        site = self.site
        table = RouteTable(catalog, site.owns if site is not None else _owns_nothing)
        plan = self.pools.plan(catalog.upstreams)
        for route in catalog.routes:
            if route.upstream not in plan.destinations:
                raise refuse(
                    "UPSTREAM_UNKNOWN",
                    f"route {route.id}: there is no upstream {route.upstream!r}",
                    "upstream",
                )
        self.pools.follow(plan)
        return Layout(catalog, table, plan.destinations)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.ticker.now = now = loop.time()
        self.date = formatdate(usegmt=True).encode()
        self._timer = loop.call_later(self.settings.tick_s, self._tick)
        for connection in [c for c in self._connections if c.deadline < now]:
            connection.expire()
        self.pools.tick()
        if self.timed:
            for exchange in [e for e in self.timed if e.ends_at < now]:
                exchange.overdue()
        if now - self._standing_looked_at >= _STANDING_EVERY_S:
            self._standing_looked_at = now
            self._cut_expired()

    def _cut_expired(self) -> None:
        """End the calls whose pass or grant ended while they ran."""
        now_s = self._business_now_s()
        for connection in [c for c in self._connections if c.stands_until_s <= now_s]:
            connection.cut_call(
                "pass_ended", "What this call stood on ended while it ran; the rest was not sent."
            )

    # ── for its connections and exchanges ───────────────────────────────────────────────────────────────────────────

    def next_request_id(self) -> str:
        """Unique over processes and lives: 80 random bits a process, then a count."""
        return f"{self._id_prefix}{next(self._ids):x}"

    def connection_opened(self, connection: ClientConnection) -> bool:
        """False when there are too many already."""
        self._connections.add(connection)
        self.counters.connections_open += 1
        self.counters.connections_total += 1
        return len(self._connections) <= self.settings.connections_max

    def connection_closed(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)
        self.counters.connections_open -= 1

    @property
    def buffered_bytes(self) -> int:
        """Of request bodies held whole."""
        return self.held_bodies.bytes

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what must wait; it is never cancelled (a settlement has to know its end)."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def contest(self, name: bytes) -> None:
        """A name that decisions set on answers: from now on an upstream's line of that name gives way."""
        self.contested.add(name)
        self.answer_book.contest(name.lower())

    def call_ended(self, exchange: Exchange, status: int, code: str | None) -> None:
        """An admitted call is over, well or not."""
        if self.unattended:
            self.unattended.discard(exchange)
        if self.timed:
            self.timed.discard(exchange)
        if exchange.held_body is not None:
            exchange.held_body.give_back()
        duration_s = time.monotonic() - exchange.started
        call, fare = exchange.call, exchange.admitted.fare
        self.counters.call(call.route.id, fare, status, exchange.bytes_up, exchange.bytes_down, duration_s)
        if self._reports:
            self._report(
                CallReport(
                    call.request_id,
                    call.client_address,
                    call,
                    fare,
                    status,
                    code,
                    exchange.bytes_up,
                    exchange.bytes_down,
                    duration_s,
                )
            )

    def refused(self, connection: ClientConnection, refused: Refusal, status: int) -> None:
        """A request was answered with a problem instead of being served."""
        code = refused.reason.code
        self.counters.refusal(code)
        if self._reports:
            call = connection.call
            address = call.client_address if call is not None else connection.peer
            self._report(CallReport(connection.request_id, address, call, None, status, code, 0, 0, 0.0))

    def _report(self, report: CallReport) -> None:
        call = report.call
        if (self._log_refusals and report.code is not None) or self._log_calls:
            (log.info if report.code is not None else log.debug)(
                "call_refused"
                if report.fare is None
                else "call_failed"
                if report.code is not None
                else "call_served",
                request_id=report.request_id,
                client=report.client_address,
                method=call.method if call is not None else None,
                path=call.path if call is not None else None,
                client_request_id=_client_request_id(call),
                route=call.route.id if call is not None else None,
                fare=report.fare,
                status=report.status,
                code=report.code,
                bytes_up=report.bytes_up,
                bytes_down=report.bytes_down,
                ms=round(report.duration_s * 1000, 3),
            )
        if self._on_call is not None:
            try:
                self._on_call(report)
            except Exception:
                log.exception("on_call_failed", request_id=report.request_id)


def _client_request_id(call: Call | None) -> str | None:
    """What the client calls this request; noted, never used."""
    said = call.header(b"x-request-id") if call is not None else None
    return said[:128].decode("latin-1") if said is not None else None


def _owns_nothing(path: str) -> bool:
    return False
