"""The data directory of one installation on one machine: who runs here, its sandbox keys, what is running.

.farebox/
├── lock            held by the supervisor that runs here; its pid inside
├── running.json    where it answers and with which key (0600); means nothing once the lock is free
├── master.key      sandbox only: made at the first start (0600)
├── demo.key        sandbox only: the key of the customer that `up URL --price` makes (0600)
├── database/       the embedded PostgreSQL
├── spool/          what gateways have metered and the shipper has not delivered yet
└── metrics/        the processes' counters, emptied at each start
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farebox.base.errors import refuse
from farebox.base.secrets import Secret, new_master_key


@dataclass(frozen=True, slots=True)
class Running:
    """What a running supervisor tells the commands of this machine. Holds secrets: never print it whole."""

    pid: int
    mode: str
    gateway_url: str | None
    api_url: str | None
    ops_url: str
    admin_key: str | None = dataclasses.field(repr=False)
    database_url: str = dataclasses.field(repr=False)
    authorize_url: str | None = None


class DataDirectory:
    """Paths and small files. Nothing is made before ``take``."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    @property
    def database(self) -> Path:
        return self.path / "database"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def demo_key(self) -> Path:
        return self.path / "demo.key"

    @property
    def master_key(self) -> Path:
        return self.path / "master.key"

    def take(self) -> None:
        """Make the directory and hold it until this process ends. Refused while another supervisor holds it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise refuse(
                "DATA_DIRECTORY_UNUSABLE",
                f"cannot use {self.path} as data directory: {error.strerror}; choose another with --data",
            ) from None
        if not _locked(lock):
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise refuse(
                "ALREADY_RUNNING",
                f"Farebox already runs in {self.path} (process {holder}): stop it first, or give this one a directory with --data",
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock
        with contextlib.suppress(FileNotFoundError):
            self._state.unlink()

    def release(self) -> None:
        """Forget what ran and let go. Nothing when somebody else holds the directory."""
        if self._lock is None:
            return
        with contextlib.suppress(FileNotFoundError):
            self._state.unlink()
        os.close(self._lock)
        self._lock = None

    def sandbox_master_key(self) -> Secret:
        """The sandbox's own master key, made at the first start: its keys stay the same over restarts."""
        if not self.master_key.exists():
            write_private(self.master_key, new_master_key() + "\n")
        return Secret(self.master_key.read_text().strip())

    def known_demo_key(self) -> str | None:
        """The demo customer's key of an earlier start; it is shown by the database only once."""
        try:
            return self.demo_key.read_text().strip() or None
        except FileNotFoundError:
            return None

    def announce(self, running: Running) -> None:
        """Let the commands of this machine find us."""
        write_private(self._state, json.dumps(dataclasses.asdict(running)))

    def running(self) -> Running | None:
        """What runs here now; None when nothing does, whatever an earlier life left lying about."""
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._read_state()
        else:
            return None
        finally:
            os.close(lock)

    @property
    def _state(self) -> Path:
        return self.path / "running.json"

    def _read_state(self) -> Running | None:
        try:
            found: dict[str, Any] = json.loads(self._state.read_text())
            return Running(**found)
        except (OSError, ValueError, TypeError):  # still starting, or of another version
            return None


def _locked(lock: int) -> bool:
    """Try for a second: a command that looks who runs here holds the lock for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def write_private(path: Path, text: str) -> None:
    """The whole file or the old one, readable by us alone, never half of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
