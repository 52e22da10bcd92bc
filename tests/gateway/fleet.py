"""A gateway in front of several servers that serve the same thing, go down and come up."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from farebox.domain.access import GatewayCatalog, Match, Route, Upstream, UpstreamTls
from farebox.gateway.pools import UpstreamPool
from farebox.gateway.server import Gateway
from farebox.gateway.settings import GatewaySettings
from tests.gateway.kit import PATIENT, House, OpenDoor, RealUpstream, listening

#: Nothing in it waits for long, and a target that fails is out for a short while.
AGILE = replace(PATIENT, tick_s=0.02, ejection_s=0.2, ejection_s_max=0.4)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds and stays for others to see."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@dataclass
class Fleet(House):
    servers: list[RealUpstream] = field(default_factory=list)

    @property
    def catalog(self) -> GatewayCatalog:
        return self.gateway.layout.catalog

    @property
    def upstream_value(self) -> Upstream:
        return self.catalog.upstreams[0]

    def applies(self, **changes: Any) -> None:
        """The same catalog with another upstream."""
        upstream = replace(self.upstream_value, **changes)
        self.gateway.replace_catalog(
            replace(self.catalog, version=self.catalog.version + 1, upstreams=(upstream,))
        )

    def pool(self, server: RealUpstream) -> UpstreamPool:
        return next(p for p in self.gateway.pools.all() if f":{server.port}" in p.url)

    def healthy(self) -> list[bool]:
        return [self.pool(server).health.healthy for server in self.servers]

    def shares(self) -> list[int]:
        """How many calls each server has heard, probes left out."""
        return [sum(h.one("user-agent") != "farebox-health" for h in s.heard) for s in self.servers]


async def comes_up(server: RealUpstream) -> None:
    """Again, on the port it had."""
    server._server = await asyncio.start_server(server._talk, "127.0.0.1", server.port, limit=1 << 20)


@contextlib.asynccontextmanager
async def open_fleet(
    count: int,
    settings: GatewaySettings = AGILE,
    paths: tuple[str, ...] = (),
    tls: ssl.SSLContext | None = None,
    proof: UpstreamTls | None = None,
    **upstream: Any,
) -> AsyncIterator[Fleet]:
    """``upstream``: fields of the Upstream; ``paths``: base paths of the servers' URLs; ``tls``: what the servers speak,
    ``proof``: what is asked of them."""
    servers = [RealUpstream() for _ in range(count)]
    for server in servers:
        server._server = await asyncio.start_server(server._talk, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
        server.port = server._server.sockets[0].getsockname()[1]
    scheme = "https" if tls else "http"
    urls = [
        f"{scheme}://127.0.0.1:{server.port}{path}"
        for server, path in zip(servers, paths or [""] * count, strict=True)
    ]
    where = {"url": urls[0]} if count == 1 else {"targets": tuple(urls)}
    door = OpenDoor()
    catalog = GatewayCatalog(
        1,
        (Upstream("up0", **{"timeout_s": 5.0, "tls": proof, **where, **upstream}),),
        (Route("all", Match("/{*rest}"), "up0"),),
    )
    gateway = Gateway(door, None, catalog, settings)
    sock = listening()
    await gateway.serve(sock)
    try:
        yield Fleet(gateway, door, servers[0], sock.getsockname()[1], servers)
    finally:
        await gateway.drain(0.5)
        for server in servers:
            await server.stop()
