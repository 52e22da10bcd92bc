"""The control API's process: ``python -m farebox.wiring.api --host 127.0.0.1 --port 8400``.

One process, one event loop: granian serves in the loop that also holds the pool and the change listener. SIGTERM: no new
connections, requests under way are answered, what was gathered is stored, then it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog
import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from farebox.api.application import UseCases, control_api
from farebox.api.front import FrontDesk, Observe
from farebox.app.billing import Billing
from farebox.app.books import Books
from farebox.app.customers import Customers
from farebox.app.entitlements import Entitlements
from farebox.app.event_log import EventLog
from farebox.app.idempotency import Idempotency
from farebox.app.keys import ApiKeys, ensure_root
from farebox.app.metering import Metering
from farebox.app.pass_tokens import PassTokens
from farebox.app.passes import Passes
from farebox.app.plans import Plans
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.sandbox import Faucet
from farebox.app.subscriptions import Subscriptions
from farebox.app.test_clock import TestClock
from farebox.base.errors import Refused, Unavailable, refuse
from farebox.config import Config
from farebox.store import installation
from farebox.store.changes import Listener
from farebox.store.pool import Database
from farebox.wiring.chains import chains_of
from farebox.wiring.environment import read_config
from farebox.wiring.logging import configure_logging
from farebox.wiring.readiness import say_ready
from farebox.wiring.shop import catalog_file

#: Fewer connections would let idempotent requests, which hold one and may need a second, wait for each other.
CONNECTIONS_MIN: Final = 5
#: Kept free for the second ask of requests that hold a connection already, and for those without a key.
CONNECTIONS_SPARE: Final = 3
HEADER_TIMEOUT_MS: Final = 15_000
HEAD_BYTES_MAX: Final = 64 * 1024
STOP_TIMEOUT_S: Final = 15.0

log = structlog.get_logger(__name__)


class ApiProcess:
    """Everything the control API needs, built once."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        clock = WallClock()
        self._business = business = BusinessDate(database, clock)
        self._keys = ApiKeys(database, clock)
        self._metering = Metering(database, clock, business)
        self._listener = Listener(
            config.database_direct_url, self._on_change, self._on_reconnect, on_lost=self._keys.forget
        )
        entitlements = Entitlements(database, business)
        chains = chains_of(config, database)
        tokens = PassTokens(config.keys.tokens, config.mode, clock)
        cases = UseCases(
            api_keys=self._keys,
            idempotency=Idempotency(database),
            plans=Plans(database),
            customers=Customers(database, clock),
            subscriptions=Subscriptions(database, business, entitlements),
            metering=self._metering,
            event_log=EventLog(database, business),
            billing=Billing(database, clock, business),
            entitlements=entitlements,
            passes=Passes(database, tokens, business),
            books=Books(database),
            catalog=catalog_file(config, database),
            test_clock=TestClock(database),
            faucet=Faucet(database, chains),
        )
        self.app: FrontDesk = control_api(
            cases,
            self._checks,
            rate_limit_rpm=config.api.rate_limit_rpm,
            concurrent_effects_max=connections_max(config) - CONNECTIONS_SPARE,
            is_sandbox=config.mode == "sandbox",
            observe=_observer(),
        )

    async def start(self) -> None:
        """Check that the database is this mode's, let the first admin key in, and hear of changes from now on."""
        async with self._database.transaction() as tx:
            found = await installation.get(tx)
            if found.mode != self._config.mode:
                raise refuse(
                    "MODE_MISMATCH",
                    f"the database is {found.mode}, this process was started as {self._config.mode}",
                    "FAREBOX_MODE",
                )
            if self._config.master_key is not None:
                await ensure_root(tx, self._config.admin_key)
        await self._listener.start()

    async def close(self) -> None:
        """Store what was gathered, then let go of everything."""
        await self._metering.close()
        await self._listener.close()

    def _on_change(self, kind: str, _: str) -> None:
        match kind:
            case "key":
                self._keys.forget()
            case "clock":
                self._business.forget()

    def _on_reconnect(self) -> None:
        self._keys.forget()
        self._business.forget()

    async def _checks(self) -> dict[str, str]:
        try:
            await self._database.ping()
        except Unavailable:
            return {"database": "does not answer"}
        return {"database": "ok", "changes": "ok" if self._listener.connected else "not heard"}


def _observer() -> Observe:
    """Counts for the supervisor's ops port; nothing when nobody collects them."""
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return lambda method, status, seconds: None
    from farebox.wiring.api_metrics import observe

    return observe


def connections_max(config: Config) -> int:
    """How many connections this process takes at most."""
    return max(CONNECTIONS_MIN, config.database.pool_size_max)


@asynccontextmanager
async def api_process(config: Config, database: Database) -> AsyncIterator[ApiProcess]:
    """A started process part; closed when the block ends."""
    process = ApiProcess(config, database)
    await process.start()
    try:
        yield process
    finally:
        await process.close()


def http_server(app: FrontDesk, host: str, port: int) -> Server:
    """granian, HTTP/1.1 only, in the running loop. The port is bound when it starts to serve."""
    return Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_TIMEOUT_MS, max_buffer_size=HEAD_BYTES_MAX),
        websockets=False,
        backlog=1024,
        log_enabled=False,
    )


async def _run(config: Config, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    database = await _open_database(config, stop)
    if database is None:
        return
    async with database, api_process(config, database) as process:
        # What was made up to here stays for life: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        server = http_server(process.app, host, port)
        serving = asyncio.create_task(server.serve(), name="api server")
        stopping = asyncio.create_task(stop.wait())
        await _until_listening(host, port, serving)
        say_ready()
        log.info("api_ready", host=host, port=port)
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if serving.done():
            serving.result()  # a server that ends by itself says why
            raise Unavailable("the HTTP server ended by itself")
        log.info("api_stopping")
        server.stop()  # type: ignore[no-untyped-call]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(serving, STOP_TIMEOUT_S)


async def _open_database(config: Config, stop: asyncio.Event) -> Database | None:
    """The database, waited for as long as it takes; None when told to stop before."""
    while not stop.is_set():
        try:
            return await Database.open(
                config.database_url,
                size_min=2,
                size_max=connections_max(config),
                name="api",
                transaction_pooler=config.database.direct_url is not None,
            )
        except Unavailable as error:
            log.warning("waiting_for_database", what=error.what)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
    return None


async def _until_listening(host: str, port: int, serving: asyncio.Task[None]) -> None:
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="farebox.wiring.api")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8400)
    given = parser.parse_args(arguments)
    try:
        config = read_config()
        configure_logging(config.log, "api")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config, given.host, given.port))
    except (Refused, Unavailable) as error:
        print(f"api: {error}", file=sys.stderr)  # noqa: T201 - before anything else can speak
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
