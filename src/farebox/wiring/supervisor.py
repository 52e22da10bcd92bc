"""The parent of every process: owns the listening sockets, starts the children, restarts what falls, stops in order.

    supervisor ─┬─ gateway × N   each on its own SO_REUSEPORT socket, inherited by number
                ├─ shipper       empties the gateways' spool into PostgreSQL
                ├─ api, worker
                └─ postgres      only the embedded one

The sockets live as long as the supervisor: a gateway that dies leaves its waiting connections in the kernel's queue, and
its successor takes them. No child outlives the supervisor: each asks the kernel to be killed with it.

Stop order: gateways drain, the shipper empties the spool, api and worker end, PostgreSQL last.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import structlog

from farebox.base.errors import FareboxError, refuse
from farebox.wiring.readiness import READY_FD_VARIABLE

ChildKind = Literal["gateway", "shipper", "api", "worker"]

#: Each line ends before the next is asked to.
STOP_ORDER: Final[tuple[tuple[ChildKind, ...], ...]] = (("gateway",), ("shipper",), ("api", "worker"))

LISTEN_BACKLOG: Final = 4096
#: A child that lived this long is restarted at once; one that falls sooner waits longer each time.
HEALTHY_LIFE_S: Final = 20.0
BACK_OFF_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
POSTGRES_LOOK_EVERY_S: Final = 0.5

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)  # loaded before any fork

log = structlog.get_logger()


class StartFailed(FareboxError):
    """A child ended, or was not ready in time, while everything was still starting."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep alive. ``module`` is run with ``arguments``; ``inherit`` are file descriptors it gets by number."""

    name: str
    kind: ChildKind
    module: str
    arguments: tuple[str, ...] = ()
    inherit: tuple[int, ...] = ()
    stop_timeout_s: float = 30.0


class EmbeddedServer(Protocol):
    """The embedded PostgreSQL as the supervisor sees it."""

    def start(self) -> str: ...

    def stop(self) -> None: ...

    @property
    def pid(self) -> int | None: ...


@dataclass(slots=True, eq=False)
class _Life:
    """One run of one child."""

    process: subprocess.Popen[bytes]
    began_at: float
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    expected_to_end: bool = False


@dataclass(slots=True, eq=False)
class _Child:
    spec: ChildSpec
    life: _Life | None = None
    restarts: int = 0
    falls_in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class ChildState:
    name: str
    kind: ChildKind
    pid: int | None
    ready: bool
    restarts: int


class Supervisor:
    """Keeps children alive between ``start`` and ``stop``. Lives in the main thread of one event loop."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        environment: Mapping[str, str],
        *,
        postgres: EmbeddedServer | None = None,
        output: int | None = None,
        on_death: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """``environment`` is the children's whole environment; ``output`` the file descriptor their output goes to
        (None: our standard error). ``on_death`` is told each pid that ended, to bury its metrics."""
        self._children = [_Child(spec) for spec in specs]
        self._environment = dict(environment)
        self._postgres = postgres
        self._output = output
        self._on_death = on_death
        self._stopping = False
        self._starting = True
        self._start_failure: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # One thread for the whole life: the server dies with the thread that started it.
        self._postgres_thread = ThreadPoolExecutor(1, thread_name_prefix="postgres")

    # ── what others ask ──────────────────────────────────────────────────────────────────────────────────────────

    def states(self) -> list[ChildState]:
        return [
            ChildState(
                name=c.spec.name,
                kind=c.spec.kind,
                pid=c.life.process.pid if c.life and not c.life.ended.is_set() else None,
                ready=bool(c.life and c.life.ready.is_set() and not c.life.ended.is_set()),
                restarts=c.restarts,
            )
            for c in self._children
        ]

    def pids(self) -> dict[str, list[int] | int]:
        """``{"gateway": [...], "api": [...], …, "postgres": n}`` of the processes alive now."""
        found: dict[str, list[int] | int] = {}
        for state in self.states():
            if state.pid is not None:
                found.setdefault(state.kind, []).append(state.pid)  # type: ignore[union-attr]
        if self._postgres is not None and self._postgres.pid is not None:
            found["postgres"] = self._postgres.pid
        return found

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start_postgres(self) -> str:
        """Start the embedded server and watch over it; its URL."""
        assert self._postgres is not None
        url = await asyncio.get_running_loop().run_in_executor(self._postgres_thread, self._postgres.start)
        self._watch(self._keep_postgres(self._postgres), "postgres")
        return url

    async def start(self, timeout_s: float = 60.0, environment: Mapping[str, str] | None = None) -> None:
        """Start every child and return when all are ready. ``StartFailed`` names the first that is not."""
        if environment is not None:
            self._environment = dict(environment)
        loop = asyncio.get_running_loop()
        self._start_failure = loop.create_future()
        for child in self._children:
            self._begin(child)
        all_ready = asyncio.ensure_future(asyncio.gather(*(self._until_ready(c) for c in self._children)))
        try:
            await asyncio.wait(
                (all_ready, self._start_failure), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._start_failure.done():
                raise StartFailed(self._start_failure.result())
            if not all_ready.done():
                late = ", ".join(s.name for s in self.states() if not s.ready)
                raise StartFailed(f"not ready after {timeout_s:g} s: {late}")
            all_ready.result()
        finally:
            all_ready.cancel()
            await asyncio.gather(all_ready, return_exceptions=True)
            self._starting = False

    async def _until_ready(self, child: _Child) -> None:
        assert child.life is not None
        await child.life.ready.wait()

    def _begin(self, child: _Child) -> _Life:
        read_end, write_end = os.pipe()
        try:
            life = _Life(self._spawn(child.spec, write_end), time.monotonic())
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        child.life = life
        self._watch(self._listen_for_ready(read_end, life), f"{child.spec.name} ready")
        self._watch(self._wait_for_end(child, life), child.spec.name)
        log.debug("child started", child=child.spec.name, pid=life.process.pid)
        return life

    def _spawn(self, spec: ChildSpec, ready_fd: int) -> subprocess.Popen[bytes]:
        output = 2 if self._output is None else self._output
        parent = os.getpid()

        def die_with_the_supervisor() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died between the fork and the line above
                os._exit(1)

        return subprocess.Popen(
            # -P: a file named like a library in the working directory must not be imported.
            (sys.executable, "-P", "-m", spec.module, *spec.arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**self._environment, READY_FD_VARIABLE: str(ready_fd)},
            pass_fds=(*spec.inherit, ready_fd),
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone: it stops the rest in order
            preexec_fn=die_with_the_supervisor,  # one system call, the library is loaded before
        )

    async def _listen_for_ready(self, read_end: int, life: _Life) -> None:
        loop = asyncio.get_running_loop()
        said: asyncio.Future[None] = loop.create_future()
        os.set_blocking(read_end, False)
        loop.add_reader(read_end, _settle, said)
        try:
            await said
            if os.read(read_end, 64):
                life.ready.set()
        finally:
            loop.remove_reader(read_end)
            os.close(read_end)

    # ── falls ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait_for_end(self, child: _Child, life: _Life) -> None:
        code = await _ended(life.process)
        life.ended.set()
        self._on_death(life.process.pid)
        if life.expected_to_end or self._stopping:
            return
        if self._starting:
            assert self._start_failure is not None
            if not self._start_failure.done():
                self._start_failure.set_result(f"the {child.spec.kind} did not start ({_how(code)})")
            return
        lived_s = time.monotonic() - life.began_at
        child.falls_in_a_row = 1 if lived_s > HEALTHY_LIFE_S else child.falls_in_a_row + 1
        child.restarts += 1
        wait_s = BACK_OFF_S[min(child.falls_in_a_row, len(BACK_OFF_S)) - 1]
        log.warning(
            "child ended, starting it again",
            child=child.spec.name,
            pid=life.process.pid,
            how=_how(code),
            wait_s=wait_s,
        )
        await asyncio.sleep(wait_s)
        if not self._stopping:
            self._begin(child)

    async def replace_gateways(self) -> None:
        """Put a fresh process in the place of each gateway, one after the other, without dropping a request.

        The new one accepts on the same socket before the old one is asked to drain.
        """
        for child in self._children:
            old = child.life
            if child.spec.kind != "gateway" or old is None or old.ended.is_set():
                continue
            old.expected_to_end = True
            new = self._begin(child)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_first(new.ready, new.ended), 60)
            if not new.ready.is_set():
                log.error("the new gateway is not ready, the old one stays", child=child.spec.name)
                new.expected_to_end = True
                _signal(new, signal.SIGKILL)
                old.expected_to_end = False
                child.life = old
                return
            await self._end(old, child.spec.stop_timeout_s)
            log.info("gateway replaced", child=child.spec.name, pid=new.process.pid)

    async def _keep_postgres(self, postgres: EmbeddedServer) -> None:
        while not self._stopping:
            await asyncio.sleep(POSTGRES_LOOK_EVERY_S)
            if self._stopping or postgres.pid is not None:
                continue
            log.warning("the embedded database ended, starting it again")
            try:
                await asyncio.get_running_loop().run_in_executor(self._postgres_thread, postgres.start)
                log.info("the embedded database is back", pid=postgres.pid)
            except FareboxError as error:
                log.error("the embedded database does not start", error=str(error))
                await asyncio.sleep(2)

    # ── stop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stop(self) -> None:
        """End everything in order. Safe to call at any time, also half way through a start."""
        self._stopping = True
        for kinds in STOP_ORDER:
            lives = [
                (c.life, c.spec.stop_timeout_s)
                for c in self._children
                if c.spec.kind in kinds and c.life is not None and not c.life.ended.is_set()
            ]
            if lives:
                log.info("stopping", children=list(kinds))
                await asyncio.gather(*(self._end(life, timeout_s) for life, timeout_s in lives))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._postgres is not None:
            log.info("stopping", children=["postgres"])
            # Queued behind a restart under way: the thread does one thing at a time.
            await asyncio.get_running_loop().run_in_executor(self._postgres_thread, self._postgres.stop)
        self._postgres_thread.shutdown()

    def kill(self) -> None:
        """The second Ctrl-C: nobody waits any longer."""
        for child in self._children:
            if child.life is not None:
                _signal(child.life, signal.SIGKILL)

    async def _end(self, life: _Life, timeout_s: float) -> None:
        life.expected_to_end = True
        _signal(life, signal.SIGTERM)
        try:
            await asyncio.wait_for(life.ended.wait(), timeout_s)
        except TimeoutError:
            log.error("did not stop in time, killed", pid=life.process.pid, timeout_s=timeout_s)
            _signal(life, signal.SIGKILL)
            await life.ended.wait()

    def _watch(self, work: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(work)
        if isinstance(task, asyncio.Task):
            task.set_name(name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


# ── sockets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def listening_sockets(host: str, port: int, count: int, option: str) -> list[socket.socket]:
    """``count`` sockets on one port, each with a queue of its own. Port 0 picks a free one, the same for all.

    Refused when somebody listens there already; ``option`` is what the message tells the operator to change.
    """
    first = reserved_socket(host, port, option)
    sockets = [first]
    try:
        for _ in range(count - 1):
            sockets.append(_bound(first.family, first.getsockname()))
        for each in sockets:
            each.listen(LISTEN_BACKLOG)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def reserved_socket(host: str, port: int, option: str) -> socket.socket:
    """A bound socket that does not listen: it keeps the port for a child that binds it again with SO_REUSEPORT."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if port:
            # SO_REUSEPORT would let a second Farebox of the same user share the port in silence.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        return _bound(family, address)
    except OSError as error:
        raise refuse(
            "PORT_UNAVAILABLE",
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with {option}",
        ) from None


def _bound(family: int, address: object) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)  # type: ignore[arg-type]
    except BaseException:
        made.close()
        raise
    return made


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code, without a thread and without polling: a pidfd becomes readable when the process ends."""
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return process.wait()
    over: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, _settle, over)
    try:
        await over
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(e.wait()) for e in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _signal(life: _Life, number: signal.Signals) -> None:
    if life.process.returncode is None:  # Popen knows whether the pid is still ours
        life.process.send_signal(number)


def _how(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
