"""The connections to the targets of upstreams: kept, lent, opened and closed; and where a route's calls go."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

import structlog

from farebox.base.errors import refuse
from farebox.domain.access import Upstream
from farebox.gateway.balancing import Balancer
from farebox.gateway.fields import FieldBook, answer_fields
from farebox.gateway.health import Prober, TargetHealth
from farebox.gateway.settings import GatewaySettings
from farebox.gateway.upstream import Caller, UpstreamConnection
from farebox.gateway.upstream_tls import TlsContexts, UpstreamTlsContext, system_context

log = structlog.get_logger(__name__)

#: A target that cannot be reached says why at most this often.
_SAYS_WHY_EVERY_S: Final = 10.0


class Ticker:
    """The time, to the tick: monotonic seconds, moved by whoever owns the loop's timer. Deadlines are compared with it."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0


class UpstreamPool:
    """The connections to one target (``http://host:port``), at most ``upstream_connections_max`` of them."""

    prober: Prober | None = None

    def __init__(
        self,
        url: str,
        settings: GatewaySettings,
        ticker: Ticker,
        book: FieldBook | None = None,
        *,
        upstream_id: str = "",
        tls: UpstreamTlsContext | None = None,
    ) -> None:
        """``settings`` with the upstream's own limits in them; https without ``tls`` trusts whom the machine trusts."""
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise refuse("UPSTREAM_URL_MALFORMED", f"{url!r} is not http(s)://host[:port][/path]", "url")
        self.url = url
        self.settings = settings
        self.ticker = ticker
        self.book = book or answer_fields()
        self.health = TargetHealth(upstream_id, url, settings)
        self.host_line = b"Host: " + parts.netloc.encode("idna" if not parts.netloc.isascii() else "ascii")
        self.base_path = parts.path.rstrip("/").encode("ascii")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = (tls or system_context()) if parts.scheme == "https" else None
        self._secured: dict[UpstreamConnection, ssl.SSLObject] = {}
        self._idle: list[UpstreamConnection] = []
        self._all: set[UpstreamConnection] = set()
        self._waiting: deque[tuple[float, Caller]] = deque()  # since when
        self._connecting: set[asyncio.Task[None]] = set()
        self._retired = False
        self._says_why_at = 0.0

    @property
    def connections(self) -> int:
        return len(self._all)

    @property
    def in_flight(self) -> int:
        """Calls it has now, and calls that wait for a connection to it."""
        return len(self._all) - len(self._idle) + len(self._waiting)

    @property
    def full(self) -> bool:
        """Whoever has no connection yet must wait until another call ends."""
        return len(self._all) + len(self._connecting) >= self.settings.upstream_connections_max

    @property
    def ended(self) -> bool:
        """Of a retired pool: nobody needs it any more."""
        return not (self._all or self._waiting or self._connecting)

    def take(self) -> UpstreamConnection | None:
        """An idle connection, the one used last first; None when one must be waited for (``wait``)."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def wait(self, caller: Caller) -> None:
        """Call ``connected`` (or ``not_connected``) as soon as a fresh or returned connection is there. First come, first
        served."""
        if len(self._waiting) >= self.settings.upstream_waiting_max:
            caller.not_connected("upstream_busy", "Too many calls wait for this upstream.")
            return
        self._waiting.append((self.ticker.now, caller))
        self._connect_for_those_who_wait()

    def leave(self, caller: Caller) -> None:
        """The caller no longer waits."""
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not caller)

    def give_back(self, connection: UpstreamConnection) -> None:
        if self._waiting:
            self._waiting.popleft()[1].connected(connection)
        elif self._retired:
            connection.drop()
        else:
            connection.idle_since = self.ticker.now
            self._idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._tls is not None:
            secured = self._secured.pop(connection, None)
            if secured is not None:
                self._tls.keep_session(secured)
        self._connect_for_those_who_wait()

    def strike(self, why: str) -> None:
        """A call had no (whole) answer, and that was the target's doing."""
        if not self._retired:
            self.health.strike(self.ticker.now, why)

    def heard(self) -> None:
        """An answer came from a target that was ``health.shaky``."""
        self.health.heard(self.ticker.now)

    def tick(self) -> None:
        """Close what was idle for too long and fail what waited for too long."""
        now = self.ticker.now
        for connection in [c for c in self._all if c.deadline < now]:
            connection.expire()
        oldest = now - self.settings.upstream_idle_timeout_s
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).drop()
        while self._waiting and self._waiting[0][0] < now - self.settings.upstream_waiting_timeout_s:
            self._refuse_one("upstream_busy", "All connections to this upstream stayed busy.")
        if self.health.shaky:
            self.health.tick(now)
        if self.prober is not None:
            self.prober.tick(now)

    def retire(self) -> None:
        """No new calls will come: close idle connections now and lent ones when they return."""
        self._retired = True
        if self.prober is not None:
            self.prober.stop()
            self.prober = None
        while self._idle:
            self._idle.pop().drop()

    def close(self) -> None:
        """Close everything at once."""
        self.retire()
        for task in self._connecting:
            task.cancel()
        for connection in list(self._all):
            connection.expire()

    def _connect_for_those_who_wait(self) -> None:
        while len(self._connecting) < len(self._waiting) and not self.full:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if not task.cancelled():
            self._connect_for_those_who_wait()

    async def _connect(self) -> None:
        connection = UpstreamConnection(self)
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                await self._open(connection)
        except TimeoutError:
            self._unreachable("it did not take the connection in time")
            self._refuse_one("upstream_timeout", "The upstream did not take the connection in time.")
        except (OSError, ValueError) as error:  # of TLS too; a name that cannot be one is a ValueError
            connection.drop()
            self._unreachable(str(error))
            self._refuse_one("upstream_unreachable", "The upstream cannot be reached.")
        else:
            if connection.usable:
                self._all.add(connection)
                self.give_back(connection)
            else:
                self._secured.pop(connection, None)
                self._unreachable("it closed the connection at once")
                self._refuse_one("upstream_unreachable", "The upstream cannot be reached.")

    async def _open(self, connection: UpstreamConnection) -> None:
        tls, name = self._tls, None
        if tls is not None:
            name = tls.server_name or self._host
            for secured in self._secured.values():
                tls.keep_session(secured)
                break
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: connection, self._host, self._port, ssl=tls, server_hostname=name
        )
        if tls is not None:
            secured = transport.get_extra_info("ssl_object")
            tls.check_pin(secured)
            self._secured[connection] = secured

    def _unreachable(self, why: str) -> None:
        self.strike(why)
        now = self.ticker.now
        if now >= self._says_why_at:
            self._says_why_at = now + _SAYS_WHY_EVERY_S
            log.warning("upstream_unreachable", upstream=self.health.upstream_id, target=self.url, why=why)

    def _refuse_one(self, code: str, detail: str) -> None:
        if self._waiting:
            self._waiting.popleft()[1].not_connected(code, detail)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a route's calls go, and how long they wait: for the first byte of an answer and for its end.

    ``pool`` is the only target's; with several, ``balancer`` is asked once a call.
    """

    pool: UpstreamPool
    timeout_s: float
    total_timeout_s: float | None = None
    balancer: Balancer[UpstreamPool] | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What has to be the same for a target to keep its connections and its health over a change of the catalog."""

    upstream_id: str
    url: str
    settings: GatewaySettings
    tls: UpstreamTlsContext | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The pools of a catalog that is not in force yet."""

    destinations: dict[str, Destination]
    pools: Mapping[_Kept, UpstreamPool]
    upstreams: Sequence[Upstream]


class Pools:
    """All pools of a gateway, over all of its catalogs."""

    def __init__(self, settings: GatewaySettings, ticker: Ticker, book: FieldBook) -> None:
        self._settings = settings
        self._ticker = ticker
        self._book = book
        self._contexts = TlsContexts()
        self._pools: dict[_Kept, UpstreamPool] = {}
        self._retired: list[UpstreamPool] = []
        self._probes = True

    def plan(self, upstreams: Sequence[Upstream]) -> Plan:
        """Where calls would go. Unchanged targets are those at work now. Raises ``Refused``; changes nothing."""
        destinations: dict[str, Destination] = {}
        pools: dict[_Kept, UpstreamPool] = {}
        for upstream in upstreams:
            targets = [self._target(upstream, url, pools) for url in upstream.target_urls]
            destinations[upstream.id] = Destination(
                targets[0],
                upstream.timeout_s,
                upstream.total_timeout_s,
                Balancer(targets, upstream.balance, self._ticker) if len(targets) > 1 else None,
            )
        return Plan(destinations, pools, upstreams)

    def follow(self, plan: Plan) -> None:
        """From now on these are the pools; what they leave out ends with its last call."""
        for kept, pool in self._pools.items():
            if kept not in plan.pools:
                pool.retire()
                self._retired.append(pool)
        self._pools = dict(plan.pools)
        self._contexts.keep_only([kept.tls for kept in self._pools if kept.tls is not None])
        checks = {upstream.id: upstream.health for upstream in plan.upstreams}
        for kept, pool in self._pools.items():
            check = checks[kept.upstream_id] if self._probes else None
            if pool.prober is not None and pool.prober.check != check:
                pool.prober.stop()
                pool.prober = None
                if check is None:
                    pool.health.no_longer_probed()
            if pool.prober is None and check is not None:
                pool.prober = Prober(pool, check)

    def tick(self) -> None:
        for pool in self._pools.values():
            pool.tick()
        if self._retired:
            for pool in self._retired:
                pool.tick()
            self._retired = [pool for pool in self._retired if not pool.ended]

    def stop_probes(self) -> None:
        """For good."""
        self._probes = False
        for pool in self._pools.values():
            if pool.prober is not None:
                pool.prober.stop()
                pool.prober = None

    def close(self) -> None:
        for pool in [*self._pools.values(), *self._retired]:
            pool.close()

    def all(self) -> list[UpstreamPool]:
        """Of the catalog in force."""
        return list(self._pools.values())

    def _target(self, upstream: Upstream, url: str, planned: dict[_Kept, UpstreamPool]) -> UpstreamPool:
        tls = self._contexts.of(upstream) if url.startswith("https:") else None
        kept = _Kept(upstream.id, url, _settings_of(upstream, self._settings), tls)
        pool = self._pools.get(kept) or planned.get(kept)
        if pool is None:
            pool = UpstreamPool(
                url, kept.settings, self._ticker, self._book, upstream_id=upstream.id, tls=tls
            )
        planned[kept] = pool
        return pool


def _settings_of(upstream: Upstream, settings: GatewaySettings) -> GatewaySettings:
    """The gateway's settings with what the upstream says otherwise."""
    said = {
        "upstream_connections_max": upstream.connections_max,
        "upstream_waiting_max": upstream.waiting_max,
        "connect_timeout_s": upstream.connect_timeout_s,
        "upstream_idle_timeout_s": upstream.idle_timeout_s,
    }
    own = {name: value for name, value in said.items() if value is not None}
    return replace(settings, **own) if own else settings  # type: ignore[arg-type]


def readdressed(data: bytes, before: UpstreamPool, to: UpstreamPool) -> bytes:
    """A request made for one target, as another gets it: its base path and, where it names the target, its Host."""
    if before.host_line == to.host_line and before.base_path == to.base_path:
        return data
    head, end, body = data.partition(b"\r\n\r\n")
    method, _, rest = head.partition(b" ")
    head = method + b" " + to.base_path + rest.removeprefix(before.base_path)
    head = (head + b"\r\n").replace(b"\r\n" + before.host_line + b"\r\n", b"\r\n" + to.host_line + b"\r\n", 1)
    return head[:-2] + end + body
