"""The spool: an append-only local file per process that says which calls were admitted and how they ended.

What a file holds is in spool_records.py. A record is one ``write``: what the process has written survives its SIGKILL.
Every file stands for itself: it begins with what is open, so that older files can be deleted once they are shipped.
The owner holds a lock (flock) on ``<process id>.lock`` for as long as it lives; when the lock is free the owner is dead,
and the shipper may close its books. A pid is not asked: pids are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from farebox.app.ports.spool import Rider, SpoolFull
from farebox.gateway.spool_records import (
    BILLED_WHEN_ORPHANED,
    LEASES_PER_RECORD,
    MAGIC,
    RECORD_BYTES_MAX,
    LeasesRecord,
    StubRecord,
    admission,
    carried,
    count,
    encode,
    encode_rider,
    ending,
)

#: Where detail is dropped the spool may grow to this many times its limit before it refuses after all.
COUNTED_SHARE: Final = 2


# ── names, locks ─────────────────────────────────────────────────────────────────────────────────────────────────────


def lock_path(directory: Path, process_id: str) -> Path:
    return directory / f"{process_id}.lock"


def file_name(process_id: str, number: int) -> str:
    return f"{process_id}.{number:08d}.spool"


def boot_id() -> str:
    """This boot of the machine. Files of an earlier one may have lost their last moments with the power."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def try_lock(path: Path) -> int | None:
    """The descriptor of a lock that nobody held (close it to let go), or None."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


# ── the writer ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Spool:
    """The owner's side. Not thread-safe but for ``sync``, which belongs into a thread."""

    def __init__(
        self,
        directory: Path,
        process_id: str,
        *,
        file_bytes_max: int = 16_000_000,
        bytes_max: int = 4_000_000_000,
        on_full: Literal["refuse", "drop_detail"] = "refuse",
        leases: Callable[[], Mapping[int, int]] = dict,
        business_now_s: Callable[[], float] = time.time,
    ) -> None:
        """``business_now_s``: seconds since the epoch by the business date, for calls are billed in its periods."""
        self._directory = directory
        self._process_id = process_id
        self._file_bytes_max = file_bytes_max
        self._bytes_max = bytes_max
        self._on_full = on_full
        self._leases = leases
        self._business_now_s = business_now_s
        self._number = 0  # of the last admitted call
        self._file_number = 0
        self._open: dict[int, bytes] = {}  # number → payload of the admitted record
        self._unsaid: dict[int, bytes] = {}  # number → done record that the disk did not take yet
        self._stub_ids: dict[bytes, int] = {}
        self._fd = -1
        self._size = 0
        self._unsynced = False
        self._swapping = (
            threading.Lock()
        )  # sync() runs in a thread: a rotation may not close the file under it
        #: ``full``: no more calls; ``counting``: calls without detail. Found out by ``look_at_disk``.
        self.full = False
        self.counting = False
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._begin_file()

    # ── the calls ────────────────────────────────────────────────────────────────────────────────────────────────

    def stub(self, rider: Rider) -> bytes:
        return encode_rider(rider)

    def admitted(self, request_id: str, stub: bytes, lease_ids: Sequence[int]) -> int:
        if self.full:
            raise SpoolFull(f"the spool holds more than {self._bytes_max} bytes that are not shipped")
        at_us = int(self._business_now_s() * 1_000_000)
        # A call that is billed only when it succeeds keeps its records: without an ending it could not be judged. So does one
        # of limited bytes or credits: what was used of them would not be known.
        if self.counting and stub[0] == BILLED_WHEN_ORPHANED:
            self._count(at_us, stub, lease_ids)
            self._rotate_if_large()
            return 0
        number = self._number + 1
        record, payload = admission(number, at_us, request_id, lease_ids, stub)
        self._write(record)
        self._number = number
        self._open[number] = payload
        if self._size >= self._file_bytes_max:
            self._rotate_if_large()
        return number

    def done(
        self,
        number: int,
        status: int,
        bytes_up: int,
        bytes_down: int,
        billed: bool,
        used: Sequence[tuple[int, int]] = (),
        credits: int | None = None,
    ) -> None:
        """A full disk is no reason to fail here: the ending is kept and written when there is room again."""
        if number not in self._open:
            return
        record = ending(number, status, bytes_up, bytes_down, billed, used, credits)
        try:
            self._write(record)
        except SpoolFull:
            self._unsaid[number] = record
        else:
            del self._open[number]

    @property
    def calls_in_flight(self) -> int:
        return len(self._open)

    # ── housekeeping ─────────────────────────────────────────────────────────────────────────────────────────────

    def look_at_disk(self) -> int:
        """Once a second: how many bytes wait in the directory (of all processes), and what follows from it."""
        total = 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(".spool"):
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat().st_size
        over = total >= self._bytes_max
        self.counting = over and self._on_full == "drop_detail"
        self.full = total >= self._bytes_max * COUNTED_SHARE if self.counting else over
        if over and self._size > RECORD_BYTES_MAX:
            with contextlib.suppress(SpoolFull):
                self._begin_file()  # a file is only deleted once a newer one has begun
        with contextlib.suppress(SpoolFull):
            for number, record in list(self._unsaid.items()):
                self._write(record)
                del self._unsaid[number], self._open[number]
        return total

    def sync(self) -> None:
        """Push to the disk what was written: a power cut loses what came after. Blocks; call it in a thread."""
        with self._swapping:
            if self._fd < 0 or not self._unsynced:
                return
            self._unsynced = False
            fd = os.dup(self._fd)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go: from here on the shipper may close the books of this process."""
        if self._fd < 0:
            return
        self.sync()
        with self._swapping:
            os.close(self._fd)
            self._fd = -1
        os.close(self._lock)

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, record: bytes) -> None:
        try:
            written = os.write(self._fd, record)
        except OSError as error:
            raise SpoolFull(f"the spool cannot be written: {error.strerror}") from error
        if written != len(record):
            os.ftruncate(self._fd, self._size)  # half a record would hide all that follow it
            raise SpoolFull("the disk of the spool is full")
        self._size += written
        self._unsynced = True

    def _count(self, at_us: int, stub: bytes, lease_ids: Sequence[int]) -> None:
        stub_id = self._stub_ids.get(stub)
        if stub_id is None:
            stub_id = len(self._stub_ids) + 1
            self._write(encode(StubRecord(stub_id, stub)))
            self._stub_ids[stub] = stub_id
        self._write(count(at_us, stub_id, lease_ids))

    def _rotate_if_large(self) -> None:
        """After the record, not before: what the new file says was used of the leases includes this call."""
        if self._size >= self._file_bytes_max:
            with contextlib.suppress(SpoolFull):  # then the old file grows on
                self._begin_file()

    def _begin_file(self) -> None:
        """Begin the next file with all that is open; it gets its name when that stands in it."""
        path = self._directory / file_name(self._process_id, self._file_number + 1)
        draft = path.with_suffix(".draft")
        parts = [MAGIC]
        used = list(self._leases().items())
        for n in range(0, len(used), LEASES_PER_RECORD):
            parts.append(encode(LeasesRecord(tuple(used[n : n + LEASES_PER_RECORD]))))
        parts.extend(carried(payload) for payload in self._open.values())
        fd = -1
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            beginning = b"".join(parts)
            size = 0
            while size < len(beginning):
                size += os.write(fd, beginning[size:])
            os.rename(draft, path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)  # a full disk is met again and again
            raise SpoolFull(f"no new spool file can be begun: {error.strerror}") from error
        with self._swapping:
            before, self._fd = self._fd, fd
            self._unsynced = True
        if before >= 0:
            os.close(before)
        self._file_number += 1
        self._size = size
        self._stub_ids = {}

    def _locked(self) -> int:
        """A lock file that is locked before it can be seen: the shipper never finds it free while we live."""
        path = lock_path(self._directory, self._process_id)
        draft = path.with_suffix(".draft")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(
            fd, json.dumps({"process": self._process_id, "pid": os.getpid(), "boot": boot_id()}).encode()
        )
        os.rename(draft, path)
        return fd
