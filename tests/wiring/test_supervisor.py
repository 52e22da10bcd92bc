"""The supervisor with real processes: what falls is started again on the same socket, what stops does so in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farebox.base.errors import Refused
from farebox.wiring.supervisor import ChildSpec, StartFailed, Supervisor, listening_sockets, reserved_socket

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
STAND_IN = "tests.wiring.stand_in"


class Postgres:
    """A stand-in for the embedded server: a process that can be killed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return "postgresql://stand.in/farebox"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        with self._log.open("a") as file:
            file.write("postgres ended\n")

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def until(condition: object, *, within_s: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)


async def call(port: int, path: str = "/") -> int:
    """One request on its own connection; the pid of the process that answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    return int(answer.rpartition(b"\r\n\r\n")[2])


@contextlib.asynccontextmanager
async def gateways(log: Path, count: int = 1) -> AsyncIterator[tuple[Supervisor, int]]:
    sockets = listening_sockets("127.0.0.1", 0, count, "--gateway-port")
    specs = [
        ChildSpec(
            f"gw{n}",
            "gateway",
            STAND_IN,
            ("serve", str(s.fileno()), str(log), f"gw{n}"),
            inherit=(s.fileno(),),
        )
        for n, s in enumerate(sockets)
    ]
    supervisor = Supervisor(specs, ENVIRONMENT)
    try:
        await supervisor.start()
        yield supervisor, sockets[0].getsockname()[1]
    finally:
        await supervisor.stop()
        for each in sockets:
            each.close()


async def test_a_killed_child_is_started_again_on_the_same_socket(tmp_path: Path):
    async with gateways(tmp_path / "log") as (supervisor, port):
        first = await call(port)
        os.kill(first, signal.SIGKILL)

        # No waiting: whoever connects while nobody accepts stands in the socket's queue.
        second = await call(port)

        assert second != first
        assert [(s.name, s.pid, s.restarts) for s in supervisor.states()] == [("gw0", second, 1)]


async def test_a_gateway_is_replaced_without_dropping_a_request(tmp_path: Path):
    async with gateways(tmp_path / "log", count=2) as (supervisor, port):
        before = {s.pid for s in supervisor.states()}
        answered: list[int] = []
        over = asyncio.Event()

        async def client(path: str) -> None:
            while not over.is_set():
                answered.append(await call(port, path))

        clients = [asyncio.create_task(client(p)) for p in ("/", "/", "/slow", "/slow")]
        await asyncio.sleep(0.2)
        await supervisor.replace_gateways()
        await asyncio.sleep(0.2)
        over.set()
        await asyncio.gather(*clients)  # a refused or broken connection would raise here

        after = {s.pid for s in supervisor.states()}
        assert before.isdisjoint(after)
        assert after <= set(answered)
        assert all(s.restarts == 0 for s in supervisor.states()), "a replacement is not a fall"


async def test_they_stop_in_order_and_a_call_in_flight_is_answered(tmp_path: Path):
    log = tmp_path / "log"
    [listener] = listening_sockets("127.0.0.1", 0, 1, "--gateway-port")
    fd = listener.fileno()
    specs = [
        ChildSpec("api", "api", STAND_IN, ("idle", str(log), "api")),
        ChildSpec("shipper", "shipper", STAND_IN, ("idle", str(log), "shipper")),
        ChildSpec("gw0", "gateway", STAND_IN, ("serve", str(fd), str(log), "gw0"), inherit=(fd,)),
    ]
    supervisor = Supervisor(specs, ENVIRONMENT, postgres=Postgres(log))
    await supervisor.start_postgres()
    await supervisor.start()
    pids = supervisor.pids()
    assert set(pids) == {"gateway", "shipper", "api", "postgres"}
    in_flight = asyncio.create_task(call(listener.getsockname()[1], "/slow"))
    await asyncio.sleep(0.2)

    await supervisor.stop()

    assert [await in_flight] == pids["gateway"]
    assert [line for line in lines(log) if "began" not in line] == [
        "gw0 drains",
        "gw0 ended",
        "shipper ended",
        "api ended",
        "postgres ended",
    ]
    assert supervisor.pids() == {}
    listener.close()


async def test_a_dead_database_is_started_again(tmp_path: Path):
    postgres = Postgres(tmp_path / "log")
    supervisor = Supervisor([], ENVIRONMENT, postgres=postgres)
    await supervisor.start_postgres()
    first = postgres.pid
    assert first is not None
    try:
        os.kill(first, signal.SIGKILL)
        await until(lambda: postgres.pid not in (None, first))
    finally:
        await supervisor.stop()


async def test_a_child_that_falls_at_the_start_is_named():
    supervisor = Supervisor([ChildSpec("api", "api", STAND_IN, ("fall",))], ENVIRONMENT)
    with pytest.raises(StartFailed, match=r"the api did not start \(exit code 3\)"):
        await supervisor.start()
    await supervisor.stop()


async def test_a_child_that_never_gets_ready_is_named():
    supervisor = Supervisor([ChildSpec("worker", "worker", STAND_IN, ("silent",))], ENVIRONMENT)
    with pytest.raises(StartFailed, match=r"not ready after 0\.5 s: worker"):
        await supervisor.start(timeout_s=0.5)
    supervisor.kill()
    await supervisor.stop()


async def test_a_child_that_keeps_falling_is_given_more_time_each_time(tmp_path: Path):
    log = tmp_path / "log"
    async with gateways(log) as (supervisor, _):
        for n in range(1, 4):
            await until(lambda n=n: supervisor.states()[0].ready and supervisor.states()[0].restarts == n - 1)
            pid = supervisor.states()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await until(lambda: supervisor.states()[0].ready and supervisor.states()[0].restarts == 3)
    assert sum("began" in line for line in lines(log)) == 4


async def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path):
    log = tmp_path / "log"
    program = (
        "import asyncio, os, sys\n"
        "from farebox.wiring.supervisor import *\n"
        f"log = {str(log)!r}\n"
        "async def main():\n"
        "    [s] = listening_sockets('127.0.0.1', 0, 1, 'x'); fd = s.fileno()\n"
        f"    specs = [ChildSpec('gw0', 'gateway', {STAND_IN!r}, ('serve', str(fd), log, 'gw0'), inherit=(fd,)),\n"
        f"             ChildSpec('api', 'api', {STAND_IN!r}, ('idle', log, 'api'))]\n"
        "    await Supervisor(specs, dict(os.environ)).start()\n"
        "    print('up', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert supervisor.stdout is not None
    assert any(line == "up\n" for line in supervisor.stdout)  # after its log lines
    pids = [int(line.split()[-1]) for line in lines(log) if "began" in line]
    assert len(pids) == 2

    supervisor.kill()
    supervisor.wait()

    await until(lambda: not any(_alive(pid) for pid in pids))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_taken_port_is_refused_although_it_could_be_shared():
    [holder] = listening_sockets("127.0.0.1", 0, 1, "--gateway-port")
    port = holder.getsockname()[1]
    with pytest.raises(
        Refused, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose another with --api-port"
    ):
        reserved_socket("127.0.0.1", port, "--api-port")
    holder.close()


def test_every_gateway_gets_a_queue_of_its_own_on_one_port():
    sockets = listening_sockets("127.0.0.1", 0, 3, "--gateway-port")
    assert len({s.getsockname() for s in sockets}) == 1
    assert all(s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for s in sockets)
    for each in sockets:
        each.close()
