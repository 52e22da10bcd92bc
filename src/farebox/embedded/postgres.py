"""One embedded PostgreSQL server, owned by this process: started, watched, stopped, and never left behind.

The server holds ``<data>/postgres`` (or, when we are root and the data directory lies where the server's unprivileged
user cannot go, a place that it can reach, named by a pointer file in ``<data>``). It is reached with a password through
a unix socket and on a loopback port; both stay the same over a restart. When this process dies, even by SIGKILL, the
kernel tells the server to shut down; when the server dies, starting it again finds the same data.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Final, Self
from urllib.parse import quote

import psycopg

from farebox.base.errors import Unavailable, refuse
from farebox.embedded.account import Account, blocking_directory, server_account
from farebox.embedded.binaries import programs_for, reachable_places

DATABASE: Final = "farebox"
USER: Final = "farebox"

#: Crash recovery after a power cut may read a lot of log; a server that is recovering says so and is waited for.
RECOVERY_S_MAX: Final = 300.0
#: After a SIGKILL of the server its sessions notice within seconds; until then the shared memory is still theirs. And
#: until the system has reaped it, its process id still looks alive. Never help by deleting postmaster.pid: it is what
#: keeps two servers off the same files.
LEFTOVERS_S_MAX: Final = 60.0
_PORT_TAKEN: Final = "could not create any TCP/IP sockets"
_LEFTOVERS: Final = ("pre-existing shared memory block", 'lock file "postmaster.pid" already exists')
STOP_S_MAX: Final = 30.0
LOG_BYTES_MAX: Final = 10_000_000
_PORTS: Final = (20_000, 32_000)
#: The kernel's bound on a socket's path, minus the longest file name in it.
_SOCKET_DIRECTORY_BYTES_MAX: Final = 107 - len("/.s.PGSQL.65535.lock")

_SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_permissions": "0777",  # the password decides, not the path
    "password_encryption": "scram-sha-256",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "jit": "off",  # statements here are short; compiling them costs more than running them
    "log_timezone": "UTC",
    "timezone": "UTC",
}


class EmbeddedPostgres:
    """The server of one data directory.

    ``settings`` are PostgreSQL's own, added to the defaults. ``start`` returns the URL of the database ``farebox``,
    whose owner is a superuser of this private server.
    """

    def __init__(self, data_dir: Path | str, *, settings: Mapping[str, str] | None = None) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._account: Account | None = None
        self._programs = Path()
        self._home = Path()
        self._socket_directory = Path()
        self._port = 0
        self._password = ""
        self._lock: IO[str] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start the server, making its cluster the first time, and return its URL when it answers.

        Raises ``Refused`` (``DATA_DIR_IN_USE``) when another process runs this data directory, ``Unavailable`` with the
        server's own last words or the name of the obstacle when it cannot start. Nothing stays running then.
        """
        if self.pid is not None and self._answers():
            return self.url
        self._stop_server()
        if self._lock is None:
            self._lock = self._take_lock()
        try:
            self._account = server_account()
            self._programs = programs_for(self._account)
            self._home = self._find_home(self._account)
            self._password = self._read_or_make_password()
            self._make_cluster_once()
            self._socket_directory = self._find_socket_directory(self._account)
            self._stop_leftover_server()
            self._launch_and_wait()
            self._make_database_once()
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Shut down cleanly: sessions are ended, everything is written. Returns when the server is gone."""
        self._stop_server()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def restart(self) -> str:
        """Stop if it runs, start again at the same URL."""
        self._stop_server()
        return self.start()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        if self._server is None or self._server.poll() is not None:
            return None
        return self._server.pid

    @property
    def url(self) -> str:
        """By the unix socket: the faster way, for processes on this machine."""
        return self._url(quote(str(self._socket_directory), safe=""), DATABASE)

    @property
    def tcp_url(self) -> str:
        """By the loopback port, for tools that know no sockets."""
        return self._url("127.0.0.1", DATABASE)

    @property
    def log_path(self) -> Path:
        """What the server says."""
        return self._home / "server.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _url(self, host: str, database: str) -> str:
        return f"postgresql://{USER}:{self._password}@{host}:{self._port}/{database}"

    # ── where ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_lock(self) -> IO[str]:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        path = self.data_dir / "postgres.lock"
        lock = open(path, "a+")  # noqa: SIM115 - held as long as the server may run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise refuse(
                "DATA_DIR_IN_USE",
                f"{self.data_dir} is in use by process {holder}: stop it, or choose another data directory with --data",
            ) from error
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def _find_home(self, account: Account) -> Path:
        """The directory that holds cluster, password and log: in the data directory, or where a pointer says."""
        pointer = self.data_dir / "postgres.json"
        if pointer.exists():
            home = Path(json.loads(pointer.read_text())["home"])
            if not home.is_dir():
                raise Unavailable(
                    f"{pointer} says that the database is in {home}, which is not there: restore it, "
                    f"or delete {pointer} to begin with an empty database"
                )
            return home
        home = self.data_dir / "postgres"
        if home.is_dir():
            blocked = blocking_directory(home, account)
            if blocked is not None:
                raise Unavailable(_closed(blocked, account))
            return home
        if blocking_directory(self.data_dir, account) is None:
            self._make_home(home, account)
            return home
        place = next(reachable_places(account), None)
        if place is None:
            blocked = blocking_directory(self.data_dir, account)
            raise Unavailable(_closed(blocked or self.data_dir, account))
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.data_dir.name).strip("-") or "data"
        home = place / f"{name[:40]}-{secrets.token_hex(4)}"
        _sweep(place)
        self._make_home(home, account)
        _write_at_once(pointer, json.dumps({"home": str(home)}), 0o644)
        return home

    def _make_home(self, home: Path, account: Account) -> None:
        """Ours, not the server's: as root we write here, and must not be led elsewhere by a link of the server's user."""
        home.mkdir(mode=0o700)
        if account.foreign:
            home.chmod(0o711)
        _write_at_once(home / "data_directory", str(self.data_dir), 0o644)

    def _make_servers_directory(self, directory: Path, account: Account) -> None:
        directory.mkdir(mode=0o700)
        if account.foreign:
            os.chown(directory, account.uid, account.gid)

    def _find_socket_directory(self, account: Account) -> Path:
        """In the home if its path is short enough for a socket and we may pass, else a short one beside the others."""
        wanted = self._home / "run"
        if len(os.fsencode(wanted)) > _SOCKET_DIRECTORY_BYTES_MAX:
            if self._socket_directory.is_dir() and self._socket_directory != Path():
                return self._socket_directory
            remembered = self._home / "socket_directory"
            if (
                remembered.exists()
                and (kept := Path(remembered.read_text())).is_dir()
                and kept.stat().st_uid == account.uid
            ):
                return kept
            wanted = Path(tempfile.mkdtemp(prefix="fbx-", dir="/tmp"))
            wanted.chmod(0o755)
            if account.foreign:
                os.chown(wanted, account.uid, account.gid)
            _write_at_once(remembered, str(wanted), 0o644)
        elif not wanted.is_dir():
            self._make_servers_directory(wanted, account)
            wanted.chmod(0o755)
        return wanted

    # ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────

    def _read_or_make_password(self) -> str:
        path = self._home / "password"
        if not path.exists():
            _write_at_once(path, secrets.token_urlsafe(24), 0o600)
        return path.read_text().strip()

    def _make_cluster_once(self) -> None:
        """initdb beside, then rename: a start that is killed half way leaves no half cluster."""
        if self._cluster.is_dir():
            return
        if self._port:
            raise Unavailable(f"{self._cluster} disappeared while its server was down: restore it")
        assert self._account is not None
        for unfinished in self._home.glob("cluster.new*"):
            shutil.rmtree(unfinished)
        fresh = self._home / f"cluster.new{os.getpid()}"
        self._make_servers_directory(fresh, self._account)
        password_for_initdb = self._home / "password.initdb"
        _write_at_once(password_for_initdb, self._password, 0o600, self._account)
        command = [
            str(self._programs / "initdb"),
            f"--pgdata={fresh}",
            f"--username={USER}",
            f"--pwfile={password_for_initdb}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            # PostgreSQL's own collation: the same order on every machine, whatever its C library.
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        if self._settings.get("fsync") == "off":
            command.append("--no-sync")
        outcome = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_account())  # type: ignore[call-overload]
        password_for_initdb.unlink()
        if outcome.returncode != 0:
            raise Unavailable(f"the embedded database could not be made: {_last_words(outcome.stderr)}")
        fresh.rename(self._cluster)

    @property
    def _cluster(self) -> Path:
        return self._home / "cluster"

    def _make_database_once(self) -> None:
        with psycopg.connect(
            self._url(quote(str(self._socket_directory), safe=""), "postgres"), autocommit=True
        ) as connection:
            exists = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if exists is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────

    def _launch_and_wait(self) -> None:
        """Launch until it answers. What a killed server left behind is waited out. So is a port that somebody took while
        the server was down, once the URL has been given to others; before that, another port does as well."""
        self._rotate_log()
        wait_until = time.monotonic() + LEFTOVERS_S_MAX
        others_know = self._port != 0
        self._port = self._port or self._remembered_port() or _free_port()
        while True:
            words = self._launch()
            if words is None:
                _write_at_once(self._home / "port", str(self._port), 0o644)
                return
            port_taken = _PORT_TAKEN in words
            if port_taken and not others_know:
                self._port = _free_port()
            if time.monotonic() > wait_until or not (port_taken or any(sign in words for sign in _LEFTOVERS)):
                if not others_know:
                    self._port = 0
                raise Unavailable(
                    f"the embedded database did not start: {_last_words(words)} (see {self.log_path})"
                )
            time.sleep(0.2)

    def _launch(self) -> str | None:
        """One try: None when the server answers, its words when it ended instead."""
        settings = {
            **self._settings,
            "port": str(self._port),
            "unix_socket_directories": str(self._socket_directory),
        }
        command = [str(self._programs / "postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with open(os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            said_before = log.tell()
            self._server = _keep(
                lambda: subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C in a terminal goes to us, who stop the server last, after everybody who needs it.
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                    **self._as_account(),  # type: ignore[call-overload]
                )
            )
        until = time.monotonic() + RECOVERY_S_MAX
        while True:
            if self._server.poll() is not None:
                with open(self.log_path, "rb") as log:
                    log.seek(said_before)
                    return log.read().decode(errors="replace")
            if self._answers():
                return None
            if time.monotonic() > until:
                raise Unavailable(
                    f"the embedded database did not answer within {RECOVERY_S_MAX:g} s (see {self.log_path})"
                )
            time.sleep(0.01)

    def _stop_server(self) -> None:
        if self._server is None:
            return
        # SIGINT ends the sessions; SIGTERM would wait for them. SIGQUIT leaves the rest to the recovery.
        for how, patience_s in ((signal.SIGINT, STOP_S_MAX), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
            if self._server.poll() is not None:
                break
            self._server.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(patience_s)
        self._server = None

    def _stop_leftover_server(self) -> None:
        """We hold the lock, so a server that still runs on this cluster has lost its owner. It is most likely shutting
        down already; one that was not told to is told now. A process that merely inherited the number is left alone."""
        pid = _server_on(self._cluster)
        if pid is None:
            return
        until = time.monotonic() + STOP_S_MAX
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
            while time.monotonic() < until:
                os.kill(pid, 0)
                time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, dbname="postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _as_account(self) -> dict[str, object]:
        assert self._account is not None
        arguments: dict[str, object] = {
            "cwd": "/",
            "umask": 0o077,
            "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": "/", "TZ": "UTC"},
        }
        if self._account.foreign:
            arguments |= {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}
        return arguments

    def _rotate_log(self) -> None:
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            self.log_path.rename(self.log_path.with_suffix(".log.1"))

    def _remembered_port(self) -> int | None:
        """The port of last time, if it is free: whoever wrote down the URL finds the database again."""
        path = self._home / "port"
        if not path.exists():
            return None
        port = int(path.read_text())
        return port if _port_is_free(port) else None


def _server_on(cluster: Path) -> int | None:
    """The process id of the server that runs on a cluster, whoever started it. Needs /proc; None without."""
    try:
        pid = int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(cluster) in command else None


def _sweep(place: Path) -> None:
    """Remove homes whose data directory was a temporary one and is gone. Any other that is gone may come back (a disk
    that is not mounted, say): those stay until an operator removes them."""
    temporary = Path(tempfile.gettempdir()).resolve()
    for note in place.glob("*/data_directory"):
        data = Path(note.read_text())
        if temporary in data.parents and not data.exists() and _server_on(note.parent / "cluster") is None:
            shutil.rmtree(note.parent, ignore_errors=True)


def _free_port() -> int:
    """Below the ports that the system gives to outgoing connections: one of those would take it during a restart."""
    for _ in range(100):
        port = random.randrange(*_PORTS)
        if _port_is_free(port):
            return port
    raise Unavailable(f"no free port from {_PORTS[0]} to {_PORTS[1]} on the loopback interface")


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _keep(launch: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Launch from a thread that lasts as long as the child. The kernel ties the child's life to the *thread* that
    started it, and our caller's may be one of a pool's, gone in a minute."""
    if not sys.platform.startswith("linux"):
        return launch()
    launched: queue.SimpleQueue[subprocess.Popen[bytes] | BaseException] = queue.SimpleQueue()

    def keep() -> None:
        try:
            child = launch()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            launched.put(error)
            return
        launched.put(child)
        with contextlib.suppress(ChildProcessError):
            os.waitid(
                os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
            )  # leaves the exit status to the owner's poll()

    threading.Thread(target=keep, name="embedded postgres keeper", daemon=True).start()
    outcome = launched.get()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _die_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes the server: ask for SIGINT (a clean shutdown) when we die. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    pr_set_pdeathsig = 1
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(pr_set_pdeathsig, signal.SIGINT)
        if os.getppid() != parent:  # we died before it asked
            os._exit(1)

    return ask


def _write_at_once(path: Path, text: str, mode: int, owner: Account | None = None) -> None:
    """The whole file or none of it, with its mode from the first byte on."""
    fresh = path.with_name(f"{path.name}.new{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    if owner is not None and owner.foreign:
        os.chown(fresh, owner.uid, owner.gid)
    fresh.rename(path)


def _closed(directory: Path, account: Account) -> str:
    return (
        f"the database server runs as the user {account.name}, who cannot enter {directory} "
        f"(mode {directory.stat().st_mode & 0o777:o}): choose another directory with --data, "
        "or run as an ordinary user, or set FAREBOX_DATABASE_URL"
    )


def _last_words(text: str) -> str:
    """The line that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if "FATAL:" in line or "error:" in line or "PANIC:" in line]
    return (fatal or lines or ["it said nothing"])[-1]
