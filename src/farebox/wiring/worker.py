"""The worker's process: ``python -m farebox.wiring.worker``. SIGTERM: the rounds under way end, then it does."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Final

import structlog
import uvloop

from farebox.app.entitlements import Entitlements
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.subscriptions import Subscriptions
from farebox.base.errors import Refused, Unavailable, refuse
from farebox.base.ids import new_id
from farebox.config import Config
from farebox.store import installation
from farebox.store.changes import Listener
from farebox.store.pool import Database
from farebox.wiring.environment import read_config
from farebox.wiring.logging import configure_logging
from farebox.wiring.readiness import say_ready
from farebox.worker.chores import Chores
from farebox.worker.jobs import Handler, JobRunner
from farebox.worker.loops import Loops

#: One connection a chore, and one to spare.
CONNECTIONS_MAX: Final = 6
STATEMENT_TIMEOUT_S: Final = 300.0

log = structlog.get_logger(__name__)


class WorkerProcess:
    """Everything the worker needs, built once."""

    def __init__(self, config: Config, database: Database, handlers: dict[str, Handler]) -> None:
        self._config = config
        self._database = database
        clock = WallClock()
        self._business = BusinessDate(database, clock)
        entitlements = Entitlements(database, self._business)
        subscriptions = Subscriptions(database, self._business, entitlements)
        chores = Chores(database, clock, self._business, entitlements, subscriptions).all()
        if handlers:
            chores = (*chores, JobRunner(database, new_id("wrk"), handlers).chore())
        self._loops = Loops(chores)
        self._listener = Listener(config.database_direct_url, self._on_change, self._on_reconnect)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop``."""
        async with self._database.connection() as tx:
            mode = (await installation.get(tx)).mode
        if mode != self._config.mode:
            raise refuse(
                "MODE_MISMATCH",
                f"the database is {mode}, this process was started as {self._config.mode}",
                "FAREBOX_MODE",
            )
        await self._listener.start()
        try:
            working = asyncio.create_task(self._loops.run(), name="chores")
            stopping = asyncio.create_task(stop.wait())
            say_ready()
            log.info("worker_ready")
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            self._loops.stop()
            await working
            log.info("worker_stopped")
        finally:
            await self._listener.close()

    async def _on_change(self, kind: str, _: str) -> None:
        if kind == "clock":
            self._business.forget()
            await self._loops.wake()

    async def _on_reconnect(self) -> None:
        self._business.forget()
        await self._loops.wake()


async def _run(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set():
        try:
            database = await Database.open(
                config.database_url,
                size_max=CONNECTIONS_MAX,
                name="worker",
                statement_timeout_s=STATEMENT_TIMEOUT_S,
                transaction_pooler=config.database.direct_url is not None,
            )
        except Unavailable as error:
            log.warning("waiting_for_database", what=error.what)
            await asyncio.sleep(0.5)
            continue
        async with database:
            await WorkerProcess(config, database, handlers={}).run(stop)
        return


def main() -> int:
    """Run until SIGTERM; the exit code."""
    try:
        config = read_config()
        configure_logging(config.log, "worker")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config))
    except (Refused, Unavailable) as error:
        print(f"worker: {error}", file=sys.stderr)  # noqa: T201 - before anything else can speak
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
