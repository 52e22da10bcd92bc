"""From a configuration to a running house: database, migrations, shop, processes, ops port; and down again in order.

``House`` serves ``farebox up`` (every role, embedded database by default) and the single roles of production (no
embedded database, no migrations of their own accord).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import structlog

from farebox.base.errors import Reason, Refused, Unavailable
from farebox.base.secrets import Secret
from farebox.config import Config, missing
from farebox.store import migrate
from farebox.wiring.data_directory import DataDirectory, Running, write_private
from farebox.wiring.environment import child_environment, misspelt_variables
from farebox.wiring.ops import Checks, Metrics, OpsServer
from farebox.wiring.supervisor import (
    ChildSpec,
    EmbeddedServer,
    Supervisor,
    listening_sockets,
    reserved_socket,
)

Role = Literal["gateway", "api", "worker"]
ALL_ROLES: Final[frozenset[Role]] = frozenset(("gateway", "api", "worker"))

#: How long the processes together may take to answer.
START_TIMEOUT_S: Final = 60.0
#: The shipper gets this long to bring the last calls into the database before it is killed; what is left is shipped next time.
SHIP_TIMEOUT_S: Final = 20.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class QuickShop:
    """``up --sandbox URL --price``: one route to one upstream, no file."""

    upstream_url: str
    price: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start. ``shop`` None leaves the catalog as the database has it.

    ``embedded``: may start a database of its own and bring it up to date; a single role of production may not.
    """

    roles: frozenset[Role]
    shop: Path | QuickShop | None = None
    ready_file: Path | None = None
    embedded: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """What answers where. ``customer_key`` is the demo key of a quick shop; ``changes`` what applying the shop changed."""

    running: Running
    pids: dict[str, list[int] | int]
    changes: tuple[str, ...] = ()
    customer_key: str | None = None

    def ready_document(self) -> dict[str, Any]:
        """The ready file. Keys of roles that do not run here are left out."""
        document = {
            "gateway_url": self.running.gateway_url,
            "authorize_url": self.running.authorize_url,
            "api_url": self.running.api_url,
            "admin_key": self.running.admin_key,
            "database_url": self.running.database_url,
            "ops_url": self.running.ops_url,
            "pids": self.pids,
        }
        return {key: value for key, value in document.items() if value is not None}


class House:
    """One supervisor with everything it runs."""

    def __init__(self, config: Config, plan: Plan) -> None:
        refuse_unfit(config, plan)
        self._plan = plan
        self._data = DataDirectory(Path(config.data_directory))
        self._config = config
        self._sockets: list[socket.socket] = []
        self._supervisor: Supervisor | None = None
        self._ops: OpsServer | None = None
        self._is_ready = False

    async def start(self) -> Started:
        """Everything, or nothing: a failure stops what had been started. Raises ``Refused``, ``Unavailable``, ``StartFailed``."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> Started:
        self._data.take()
        self._forget_ready_file()  # of a life that was killed
        config = self._config
        if config.master_key is None and config.mode == "sandbox":
            config = replace(config, master_key=self._data.sandbox_master_key())

        gateway_sockets, authorize_sockets, api_socket, ops_socket = self._open_sockets(config)
        Metrics.prepare(self._data.metrics)
        spool = self._spool(config)

        postgres = self._embedded_server(config)
        supervisor = Supervisor(
            self._children(config, gateway_sockets, authorize_sockets, api_socket, spool),
            {},
            postgres=postgres,
            on_death=lambda pid: metrics.bury(pid),
        )
        metrics = Metrics(self._data.metrics, supervisor.states)
        self._supervisor = supervisor
        if postgres is not None:
            url = await supervisor.start_postgres()
            config = replace(config, database=replace(config.database, url=Secret(url)))

        prepared = await self._prepare_database(config)
        self._ops = OpsServer(
            Checks(config.database_url, config.database_direct_url, config.mode, supervisor.states),
            metrics.text,
        )
        await self._ops.serve(ops_socket)

        environment = child_environment(
            config, PROMETHEUS_MULTIPROC_DIR=str(self._data.metrics), FAREBOX_SPOOL_DIR=str(spool)
        )
        await supervisor.start(START_TIMEOUT_S, environment)

        running = Running(
            pid=os.getpid(),
            mode=config.mode,
            gateway_url=_url(gateway_sockets[0]) if gateway_sockets else None,
            api_url=_url(api_socket) if api_socket else None,
            ops_url=_url(ops_socket),
            admin_key=config.admin_key if config.master_key else None,
            database_url=config.database_url,
            authorize_url=_url(authorize_sockets[0]) if authorize_sockets else None,
        )
        started = Started(
            running, supervisor.pids(), tuple(prepared.get("changes", ())), prepared.get("customer_key")
        )
        self._data.announce(running)
        self._is_ready = True
        if self._plan.ready_file is not None:
            write_private(self._plan.ready_file, json.dumps(started.ready_document()) + "\n")
        log.info(
            "ready", mode=config.mode, gateway=running.gateway_url, api=running.api_url, ops=running.ops_url
        )
        return started

    async def stop(self) -> None:
        """In order: gateways drain, the spool is emptied, api and worker end, the embedded database last."""
        if self._ops is not None:
            self._ops.drain()
        if self._is_ready:
            self._forget_ready_file()
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._ops is not None:
            self._ops.close()
        for each in self._sockets:
            each.close()
        self._data.release()

    def kill(self) -> None:
        """Do not wait for calls in flight any longer."""
        if self._supervisor is not None:
            self._supervisor.kill()

    async def replace_gateways(self) -> None:
        """A fresh process in the place of each gateway, without dropping a request (SIGHUP). While they start: nothing."""
        if self._supervisor is not None and self._is_ready:
            await self._supervisor.replace_gateways()

    def _forget_ready_file(self) -> None:
        if self._plan.ready_file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._plan.ready_file.unlink()

    # ── the steps ────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_sockets(
        self, config: Config
    ) -> tuple[list[socket.socket], list[socket.socket], socket.socket | None, socket.socket]:
        """First of all, so that a taken port is said before anything has started."""
        gateways: list[socket.socket] = []
        authorize: list[socket.socket] = []
        api: socket.socket | None = None
        if "gateway" in self._plan.roles:
            gateways = listening_sockets(
                config.gateway.host, config.gateway.port, config.gateway.processes, "--gateway-port"
            )
            self._sockets += gateways
            if config.authorize.port is not None:
                authorize = listening_sockets(
                    config.authorize.host,
                    config.authorize.port,
                    config.gateway.processes,
                    "FAREBOX_AUTHORIZE_PORT",
                )
                self._sockets += authorize
        if "api" in self._plan.roles:
            api = reserved_socket(config.api.host, config.api.port, "--api-port")
            self._sockets.append(api)
        [ops] = listening_sockets(config.ops.host, config.ops.port, 1, "--ops-port")
        self._sockets.append(ops)
        return gateways, authorize, api, ops

    def _spool(self, config: Config) -> Path:
        directory = Path(config.spool.directory).absolute() if config.spool.directory else self._data.spool
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory

    def _embedded_server(self, config: Config) -> EmbeddedServer | None:
        if config.database.url is not None or not self._plan.embedded:
            return None
        from farebox.embedded import EmbeddedPostgres  # an extra: imported only where it is wanted

        return EmbeddedPostgres(self._data.database)

    async def _prepare_database(self, config: Config) -> dict[str, Any]:
        """Migrate and apply the shop (``up``), or only make sure that somebody did (a single role)."""
        if not self._plan.embedded:
            await asyncio.to_thread(migrate.check, config.database_direct_url, config.mode)
            return {}
        report = await asyncio.to_thread(migrate.migrate, config.database_direct_url, config.mode)
        if report.applied:
            log.info("migrated", applied=list(report.applied))
        return await _prepare(config, self._plan.shop, self._data)

    def _children(
        self,
        config: Config,
        gateways: list[socket.socket],
        authorize: list[socket.socket],
        api: socket.socket | None,
        spool: Path,
    ) -> list[ChildSpec]:
        specs: list[ChildSpec] = []
        if api is not None:
            host, port = api.getsockname()[:2]
            specs.append(ChildSpec("api", "api", "farebox.wiring.api", ("--host", host, "--port", str(port))))
        if "worker" in self._plan.roles:
            specs.append(ChildSpec("worker", "worker", "farebox.wiring.worker"))
        for number, each in enumerate(gateways):
            asked = authorize[number : number + 1]
            arguments = ["--fd", str(each.fileno()), "--name", f"gw{number}", "--spool", str(spool)]
            specs.append(
                ChildSpec(
                    f"gw{number}", "gateway", "farebox.wiring.gateway",
                    (*arguments, *(word for one in asked for word in ("--authorize-fd", str(one.fileno())))),
                    inherit=(each.fileno(), *(one.fileno() for one in asked)),
                    stop_timeout_s=config.gateway.drain_timeout_s + 5,
                )
            )  # fmt: skip
        if gateways:
            specs.append(
                ChildSpec(
                    "shipper",
                    "shipper",
                    "farebox.wiring.shipper",
                    ("--spool", str(spool)),
                    stop_timeout_s=SHIP_TIMEOUT_S,
                )
            )
        return specs


async def run(config: Config, plan: Plan, on_ready: Callable[[Started], None]) -> None:
    """Start, say so, and stay until SIGTERM or SIGINT; a second one does not wait for calls in flight. SIGHUP renews gateways."""
    for name in misspelt_variables():
        log.warning("this variable means nothing to Farebox: misspelt?", variable=name)
    house = House(config, plan)
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    renewals: set[asyncio.Task[None]] = set()

    def stop_or_hurry() -> None:
        if told_to_stop.is_set():
            house.kill()
        told_to_stop.set()

    def renew() -> None:
        task = loop.create_task(house.replace_gateways())
        renewals.add(task)
        task.add_done_callback(renewals.discard)

    _follow_signals({signal.SIGTERM: stop_or_hurry, signal.SIGINT: stop_or_hurry, signal.SIGHUP: renew})
    try:
        await _live(house, told_to_stop, on_ready)
    finally:
        # The end is decided: a signal that comes now must not become the exit code.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    log.info("stopped")


async def _live(house: House, told_to_stop: asyncio.Event, on_ready: Callable[[Started], None]) -> None:
    starting = asyncio.ensure_future(house.start())
    stopping = asyncio.ensure_future(told_to_stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return
    try:
        on_ready(starting.result())
        await stopping
    finally:
        stopping.cancel()
        if starting.exception() is None:
            await house.stop()


_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _follow_signals(follow: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Run these in the running loop. Not by the loop's own handlers: it takes those away when it closes, and from then to
    the exit a second signal would kill what has just stopped in order."""
    loop = asyncio.get_running_loop()

    def told(number: int, _: object) -> None:
        loop.call_soon_threadsafe(follow[signal.Signals(number)])

    for number in follow:
        signal.signal(number, told)


def refuse_unfit(config: Config, plan: Plan) -> None:
    """What can be seen to be wrong before anything starts. Every fault at once."""
    faults: list[Reason] = []
    if config.database.url is None and not plan.embedded:
        faults.append(missing("FAREBOX_DATABASE_URL"))
    if config.mode == "live":
        if config.master_key is None:
            faults.append(missing("FAREBOX_MASTER_KEY"))
        if plan.embedded:  # `up` on its own: nobody else has configured payments
            network, pay_to = _payment_defaults(config, plan.shop)
            if network is None:
                faults.append(missing("FAREBOX_PAYMENT_NETWORK"))
            if pay_to is None:
                faults.append(missing("FAREBOX_PAYMENT_PAY_TO"))
    else:
        for name, host in (
            ("FAREBOX_GATEWAY_HOST", config.gateway.host),
            ("FAREBOX_AUTHORIZE_HOST", config.authorize.host),
            ("FAREBOX_API_HOST", config.api.host),
        ):
            if not _is_loopback(host):
                faults.append(
                    Reason(
                        "SANDBOX_NOT_PUBLIC",
                        f"is {host!r}: the sandbox gives money away and listens on loopback only",
                        name,
                    )
                )
        if config.master_key is None and not plan.embedded:
            faults.append(missing("FAREBOX_MASTER_KEY"))
    if faults:
        raise Refused(*faults)


def _payment_defaults(config: Config, shop: Path | QuickShop | None) -> tuple[str | None, str | None]:
    network, pay_to = config.payments.network, config.payments.pay_to
    if isinstance(shop, Path):
        from farebox.wiring.shop_file import payment_defaults

        in_file = payment_defaults(shop)
        network, pay_to = in_file[0] or network, in_file[1] or pay_to
    return network, pay_to


async def _prepare(config: Config, shop: Path | QuickShop | None, data: DataDirectory) -> dict[str, Any]:
    """Apply the shop in a process of its own: what checks documents is large, and the supervisor stays for years."""
    task: dict[str, Any] = {"known_key": data.known_demo_key()}
    if isinstance(shop, Path):
        from farebox.wiring.shop_file import read_text

        task["text"] = read_text(shop)
    elif shop is not None:
        task["quick"] = {"upstream_url": shop.upstream_url, "price": shop.price}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "farebox.wiring.prepare",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=child_environment(config), start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = await process.communicate(json.dumps(task).encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        raise Unavailable(f"the shop could not be prepared: exit code {process.returncode}") from None
    if "faults" in answer:
        raise Refused(*(Reason(f["code"], f["message"], f["field"]) for f in answer["faults"]))
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    if (key := answer.get("customer_key")) is not None:
        write_private(data.demo_key, key + "\n")
    return answer


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(bound: socket.socket) -> str:
    """Where a client on this machine reaches it: every address of the machine includes the loopback one."""
    host, port = bound.getsockname()[:2]
    match host:
        case "0.0.0.0":  # noqa: S104 - compared, not bound
            host = "127.0.0.1"
        case "::":
            host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
