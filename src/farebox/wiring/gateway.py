"""One gateway process: ``python -m farebox.wiring.gateway --fd N --name gw0 --spool DIR [--authorize-fd N]``.

Started by the supervisor with a listening socket inherited by number. It needs the database to begin (and waits for it);
once it serves, known keys and passes go on through an outage. SIGTERM: stop accepting, let calls end, give the leases
back, close the spool, say goodbye.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from farebox.app.budgets import BudgetedPages, Budgets
from farebox.app.door import FrontDoor
from farebox.app.edge_keys import EdgeKeys
from farebox.app.entitlements import Entitlements
from farebox.app.exact_fares import ExactFares, Owner
from farebox.app.grants import GrantCache
from farebox.app.leases import Leases
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.purchases import Purchases
from farebox.app.quotes import Quotes
from farebox.app.site import Site
from farebox.base.errors import Refused, Unavailable, refuse
from farebox.base.ids import new_id
from farebox.config import Config, missing
from farebox.domain.access import GatewayCatalog
from farebox.gateway.authorize import Authorizer
from farebox.gateway.server import Gateway
from farebox.gateway.settings import GatewaySettings
from farebox.gateway.spool import Spool
from farebox.store import gateway_catalog, installation, processes
from farebox.store.changes import Listener
from farebox.store.pool import Database
from farebox.wiring.chains import chains_of
from farebox.wiring.descriptors import make_room
from farebox.wiring.environment import read_config
from farebox.wiring.following import Following
from farebox.wiring.logging import configure_logging
from farebox.wiring.readiness import say_ready

if TYPE_CHECKING:
    from farebox.wiring.gateway_metrics import GatewayMetrics

CONNECTIONS_MAX: Final = 4
HEARTBEAT_S: Final = 1.0
PREMISES_TIMEOUT_S: Final = 5.0
#: The longest body when the configuration says none.
_NO_LIMIT: Final = 1 << 62

log = structlog.get_logger(__name__)


class Premises:
    """What this process knows of the house: the catalog it serves and the date of the business."""

    def __init__(self, database: Database, public_url: str | None) -> None:
        """``public_url`` is what buyers see where the catalog does not say it."""
        self._database = database
        self._public_url = public_url
        self.catalog = GatewayCatalog(version=0)
        self._business_date: datetime | None = None
        self._on_catalog: Callable[[GatewayCatalog], None] = lambda catalog: None

    def business_now_s(self) -> float:
        """Seconds since the epoch, by the test clock of a sandbox where it is set."""
        return self._business_date.timestamp() if self._business_date else time.time()

    def on_catalog(self, follow: Callable[[GatewayCatalog], None]) -> None:
        """``follow`` is told of every newer catalog; it raises ``Refused`` for one that cannot be served."""
        self._on_catalog = follow

    async def read(self, mode: str) -> None:
        """Everything anew. ``Refused`` when the database belongs to the other mode."""
        await self.read_date(mode)
        await self.read_catalog()

    async def read_date(self, mode: str) -> None:
        async with self._database.connection(within_s=PREMISES_TIMEOUT_S) as tx:
            found = await installation.get(tx)
        if found.mode != mode:
            raise refuse(
                "MODE_MISMATCH",
                f"the database is {found.mode}, this process was started as {mode}",
                "FAREBOX_MODE",
            )
        self._business_date = found.business_date

    async def read_catalog(self) -> None:
        """Follow the latest catalog, if it is newer than the one served."""
        async with self._database.connection(within_s=PREMISES_TIMEOUT_S) as tx:
            latest = self._with_public_url(await gateway_catalog.latest(tx))
        if latest.version <= self.catalog.version:
            return
        before, self.catalog = self.catalog, latest
        try:
            self._on_catalog(latest)
        except Refused as refused:
            self.catalog = before
            log.error("catalog_refused", version=latest.version, why=str(refused))
        else:
            log.info("catalog_followed", version=latest.version, routes=len(latest.routes))

    def _with_public_url(self, catalog: GatewayCatalog) -> GatewayCatalog:
        server = catalog.server
        return replace(catalog, server=replace(server, public_url=server.public_url or self._public_url))


def gateway_settings(config: Config) -> GatewaySettings:
    """The gateway's limits, as configured."""
    limits = config.gateway
    return GatewaySettings(
        sandbox=config.mode == "sandbox",
        request_line_bytes_max=limits.target_bytes_max,
        head_bytes_max=limits.header_bytes_max,
        header_count_max=limits.header_count_max,
        body_bytes_max=limits.body_bytes_max or _NO_LIMIT,
        paid_body_bytes_max=limits.paid_body_bytes_max,
        buffered_bytes_max=limits.buffered_bytes_max,
        buffered_bytes_per_client_max=limits.buffered_bytes_per_client_max,
        paid_body_timeout_s=limits.paid_body_timeout_s,
        connections_max=limits.connections_max,
        head_timeout_s=limits.header_timeout_s,
        idle_timeout_s=limits.idle_timeout_s,
        body_stall_timeout_s=limits.body_timeout_s,
        write_stall_timeout_s=limits.body_timeout_s,
        connect_timeout_s=limits.upstream_connect_timeout_s,
        upstream_stall_timeout_s=limits.body_timeout_s,
        upstream_connections_max=limits.upstream_connections_max,
        upstream_idle_timeout_s=limits.upstream_idle_timeout_s,
        attempts_max=limits.upstream_attempts_max,
        tunnel_idle_timeout_s=limits.tunnel_idle_timeout_s,
    )


class GatewayProcess:
    """One life: everything built, then ``run`` until told to stop."""

    def __init__(
        self,
        config: Config,
        database: Database,
        process_id: str,
        epoch: int,
        leases: Leases,
        spool: Spool,
        premises: Premises,
    ) -> None:
        self._config = config
        self._database = database
        self._process_id = process_id
        self._leases = leases
        self._spool = spool
        admission = config.admission
        self._grants = GrantCache(
            database, ttl_s=admission.grant_ttl_s, stale_s_max=admission.stale_grant_s_max
        )
        self._premises = premises
        clock = WallClock()
        business = BusinessDate(database, clock)
        owner = Owner(process_id, epoch)
        self._chains = chains = chains_of(config, database)
        tokens = PassTokens(config.keys.tokens, config.mode, clock)
        budgets = Budgets.per_minute(admission.unpaid_rpm, admission.bad_credential_rpm, admission.quotes_rpm)
        self._exact = ExactFares(database, chains, clock, owner, lambda: premises.catalog)
        quotes = Quotes(config.keys.quotes, config.mode, chains, clock, lambda: premises.catalog)
        purchases = Purchases(database, quotes, tokens, clock, business, owner, lambda: premises.catalog)
        entitlements = Entitlements(database, business)

        a_door = partial(
            FrontDoor,
            grants=self._grants,
            leases=self._leases,
            spool=self._spool,
            exact=self._exact,
            tokens=tokens,
            refresh_account=entitlements.renew,
            business_now_s=premises.business_now_s,
        )
        self._door = a_door(budgets=budgets)
        self._first_door = a_door(budgets=budgets.looked_at())  # of an edge that hands over what it refuses
        self._edge_keys = EdgeKeys(
            database, clock, ttl_s=admission.grant_ttl_s, stale_s_max=admission.stale_grant_s_max
        )
        self._pages = BudgetedPages(Site(purchases, tokens), budgets)
        self._following = Following(database, config.mode, self._grants, leases, business, premises)
        self._gateway: Gateway | None = None
        self._heartbeat_failed = False

    async def run(
        self, listening: socket.socket, stop: asyncio.Event, asked: socket.socket | None = None
    ) -> None:
        """Serve until ``stop``; return when nothing of this process is left anywhere. ``asked``: forward-auth's socket."""
        await self._premises.read(self._config.mode)
        gateway = self._gateway = Gateway(
            self._door,
            self._pages,
            self._premises.catalog,
            gateway_settings(self._config),
            log_refusals=False,
            business_now_s=self._premises.business_now_s,
        )
        make_room(gateway.settings, [pool.settings for pool in gateway.pools.all()])
        self._premises.on_catalog(self._follow)
        following = self._following
        listener = Listener(
            self._config.database_direct_url,
            self._changed,
            self._listening,
            on_lost=self._deaf,
            on_confirmed=self._grants.confirmed,
        )
        await listener.start()
        chores = [
            asyncio.create_task(self._keep_alive(), name="heartbeat"),
            asyncio.create_task(following.run(gateway), name="following"),
        ]
        if self._config.spool.fsync_ms:
            chores.append(
                asyncio.create_task(self._sync(self._config.spool.fsync_ms / 1000), name="spool sync")
            )
        # What was made up to here stays for life: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        await gateway.serve(listening)
        authorizer = await self._authorizer(gateway, asked)
        say_ready()
        log.info("gateway_ready", process_id=self._process_id, catalog=self._premises.catalog.version)
        await stop.wait()
        log.info("gateway_stopping", calls_in_flight=self._spool.calls_in_flight)
        drained = [gateway.drain(self._config.gateway.drain_timeout_s)]
        if authorizer is not None:
            drained.append(authorizer.drain(self._config.gateway.drain_timeout_s))
        await asyncio.gather(*drained)
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        await listener.close()
        await self._leave()

    async def _authorizer(self, gateway: Gateway, asked: socket.socket | None) -> Authorizer | None:
        """The forward-auth listener, where it is wanted."""
        if asked is None:
            return None
        secret = self._config.authorize.secret
        if secret is None:
            raise Refused(missing("FAREBOX_EDGE_SECRET"))
        authorizer = Authorizer(gateway, secret.reveal(), self._edge_keys, self._first_door)
        await authorizer.serve(asked)
        return authorizer

    def _changed(self, kind: str, changed_id: str) -> None:
        if kind == "key":
            self._edge_keys.invalidate(changed_id)
        self._following.changed(kind, changed_id)

    def _listening(self) -> None:
        self._edge_keys.listening()
        self._following.listening()

    def _deaf(self) -> None:
        self._edge_keys.deaf()
        self._following.lost()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(5.0):
                await self._exact.close()
                for chain in self._chains:
                    await chain.close()
                await self._leases.close()
                async with self._database.connection() as tx:
                    await processes.bury(tx, self._process_id)
        except (Unavailable, TimeoutError) as error:
            # The shipper finds the lock free and gives back in our name what the spool says was not spent.
            log.warning("left_without_goodbye", why=str(error))
        self._spool.close()

    def _follow(self, catalog: GatewayCatalog) -> None:
        assert self._gateway is not None
        self._gateway.replace_catalog(catalog)
        self._door.catalog_changed()

    # ── chores ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_alive(self) -> None:
        metrics = _metrics()
        while True:
            try:
                self._take_stock(metrics)
            except Exception:
                # Such as no descriptor left under a flood of connections: that must not cost the heartbeat.
                log.exception("stock_not_taken")
            try:
                await self._leases.heartbeat()
                async with self._database.connection() as tx:
                    await processes.heartbeat(tx, self._process_id)
                self._heartbeat_failed = False
            except Unavailable as error:
                if not self._heartbeat_failed:
                    log.warning("heartbeat_failed", what=error.what)
                self._heartbeat_failed = True
            except Exception:
                # Without a heartbeat this process would be taken for dead while it serves: the next beat tries again.
                log.exception("heartbeat_broken")
            await asyncio.sleep(HEARTBEAT_S)

    def _take_stock(self, metrics: GatewayMetrics | None) -> None:
        spool_bytes = self._spool.look_at_disk()
        if metrics is not None and self._gateway is not None:
            metrics.flush(
                self._gateway.counters,
                spool_bytes,
                self._spool.calls_in_flight,
                len(self._grants),
                [pool.health for pool in self._gateway.pools.all()],
            )

    async def _sync(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await asyncio.to_thread(self._spool.sync)
            except OSError as error:
                log.error("spool_not_synced", why=error.strerror)
                await asyncio.sleep(1.0)


@asynccontextmanager
async def an_open_database(config: Config, name: str, stop: asyncio.Event) -> AsyncIterator[Database | None]:
    """The database, waited for as long as it takes; None when told to stop before."""
    while not stop.is_set():
        try:
            database = await Database.open(
                config.database_url,
                size_min=1,
                size_max=min(CONNECTIONS_MAX, config.database.pool_size_max),
                name=name,
                transaction_pooler=config.database.direct_url is not None,
            )
        except Unavailable as error:
            log.warning("waiting_for_database", what=error.what)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
            continue
        async with database:
            yield database
        return
    yield None


def stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _metrics() -> GatewayMetrics | None:
    """Counters for the supervisor's ops port; None when nobody collects them."""
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return None
    from farebox.wiring.gateway_metrics import GatewayMetrics

    return GatewayMetrics()


async def _main(config: Config, name: str, fd: int, authorize_fd: int | None, spool_directory: Path) -> None:
    stop = stop_on_signals()
    async with an_open_database(config, name, stop) as database:
        if database is None:
            return
        process_id = new_id("gw")
        leases = Leases(database, process_id, lease_s=max(3.0, config.admission.lease_s))
        premises = Premises(database, config.public_url)
        # The spool first: once it stands, the shipper settles this process, however early it dies.
        spool = Spool(
            spool_directory,
            process_id,
            file_bytes_max=config.spool.file_bytes_max,
            bytes_max=config.spool.bytes_max,
            on_full=config.spool.on_full,
            leases=leases.open_leases,
            business_now_s=premises.business_now_s,
        )
        async with database.transaction() as tx:
            epoch = await processes.register(tx, process_id, "gateway", socket.gethostname(), os.getpid())
        process = GatewayProcess(config, database, process_id, epoch, leases, spool, premises)
        with contextlib.ExitStack() as sockets:
            listening = sockets.enter_context(socket.socket(fileno=fd))
            asked = (
                sockets.enter_context(socket.socket(fileno=authorize_fd))
                if authorize_fd is not None
                else None
            )
            await process.run(listening, stop, asked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="farebox.wiring.gateway")
    parser.add_argument("--fd", type=int, required=True, help="number of the inherited listening socket")
    parser.add_argument(
        "--authorize-fd", type=int, help="number of the inherited socket of the forward-auth listener"
    )
    parser.add_argument("--name", default="gw0")
    parser.add_argument("--spool", type=Path, required=True, help="directory of the spool")
    given = parser.parse_args(arguments)
    try:
        config = read_config()
        configure_logging(config.log, given.name)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(config, given.name, given.fd, given.authorize_fd, given.spool))
    except Refused as refused:
        print(f"{given.name}: {refused}", file=sys.stderr)  # noqa: T201 - before anything else can speak
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
