"""The spool: an append-only local file per process that says which calls were admitted and how they ended.

A record is one ``write``: what the process has written survives its SIGKILL. What a file holds, each record framed as
``length u32 · crc32 u32 · type u8 · payload`` (little endian, the checksum covers type and payload)::

    ADMITTED  number u64, microseconds u64, request id, lease ids, stub        before the call is forwarded
    DONE      number u64, status u16, bytes up u64, bytes down u64, flags u8, credits i32, (lease id u64, used i64) …
                                              before the answer's last bytes go out
    CARRIED   as ADMITTED                     calls still open when the file was begun
    LEASES    (lease id u64, used i64) …      what was used of each open lease when the file was begun
    STUB      id u32, stub                    only where detail is dropped
    COUNTED   microseconds u64, stub id u32, lease ids

Every file stands for itself: it begins with what is open, so that older files can be deleted once they are shipped.
The owner holds a lock (flock) on ``<process id>.lock`` for as long as it lives; when the lock is free the owner is dead,
and the shipper may close its books. A pid is not asked: pids are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from farebox.app.ports.spool import Rider, SpoolFull
from farebox.base.errors import InvariantError
from farebox.domain.access import FareKind

MAGIC: Final = b"FBXSPL2\n"
RECORD_BYTES_MAX: Final = 65_536
LEASES_PER_RECORD: Final = 1_000
#: Where detail is dropped the spool may grow to this many times its limit before it refuses after all.
COUNTED_SHARE: Final = 2

ADMITTED, DONE, CARRIED, LEASES, STUB, COUNTED = 1, 2, 3, 4, 5, 6

_FRAME = struct.Struct("<IIB")
_OPENING = struct.Struct("<QQB")
_DONE = struct.Struct("<QHQQBi")
_LEASE = struct.Struct("<Qq")
_COUNTED = struct.Struct("<QIB")
#: Flags of a done record, and of a rider.
_BILLED, _CREDITS_SAID = 1, 2
_BILLED_WHEN_ORPHANED, _METERED = 1, 2
#: The checksum begins with the type.
_SEEDS = {kind: zlib.crc32(bytes((kind,))) for kind in range(ADMITTED, COUNTED + 1)}
_LEASE_IDS = [struct.Struct(f"<{n}Q") for n in range(256)]


# ── records as values ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class AdmittedRecord:
    """A call let through. ``carried``: noted before, repeated because it was still open when the file was begun."""

    number: int
    at_us: int
    request_id: str
    lease_ids: tuple[int, ...]
    stub: bytes
    carried: bool = False


@dataclass(frozen=True, slots=True)
class DoneRecord:
    number: int
    status: int
    bytes_up: int
    bytes_down: int
    billed: bool
    used: tuple[tuple[int, int], ...] = ()
    credits: int | None = None


@dataclass(frozen=True, slots=True)
class LeasesRecord:
    """Lease id → units used (in flight included) at this point of the file."""

    used: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StubRecord:
    stub_id: int
    stub: bytes


@dataclass(frozen=True, slots=True)
class CountedRecord:
    """A call billed as it stands, without id or details."""

    at_us: int
    stub_id: int
    lease_ids: tuple[int, ...]


Record = AdmittedRecord | DoneRecord | LeasesRecord | StubRecord | CountedRecord


def encode(record: Record) -> bytes:
    """One framed record."""
    match record:
        case AdmittedRecord():
            payload = _opening(record.number, record.at_us, record.request_id, record.lease_ids, record.stub)
            return _framed(CARRIED if record.carried else ADMITTED, payload)
        case DoneRecord():
            return _framed(DONE, _ending(record))
        case LeasesRecord():
            return _framed(LEASES, b"".join(_LEASE.pack(*pair) for pair in record.used))
        case StubRecord():
            return _framed(STUB, record.stub_id.to_bytes(4, "little") + record.stub)
        case CountedRecord():
            return _framed(COUNTED, _counted(record.at_us, record.stub_id, record.lease_ids))


@dataclass(frozen=True, slots=True)
class Read:
    """The records of a stretch of a file, each with the offset behind it; ``end`` is behind the last whole one.

    ``damaged``: what stands at ``end`` is no record; otherwise the stretch ends there or within a record.
    """

    records: list[tuple[Record, int]]
    end: int
    damaged: bool


def decode(data: bytes, offset: int = 0, *, base: int = 0) -> Read:
    """Read the whole records of ``data[offset:]``. ``base`` is where ``data`` begins in the file."""
    records: list[tuple[Record, int]] = []
    size, frame = len(data), _FRAME.size
    while offset + frame <= size:
        length, checksum, kind = _FRAME.unpack_from(data, offset)
        if length > RECORD_BYTES_MAX or not ADMITTED <= kind <= COUNTED:
            return Read(records, base + offset, True)
        end = offset + frame + length
        if end > size:
            break
        if zlib.crc32(data[offset + 8 : end]) != checksum:
            return Read(records, base + offset, True)
        try:
            record = _decoded(kind, data[offset + frame : end])
        except (struct.error, UnicodeDecodeError, IndexError):
            return Read(records, base + offset, True)
        offset = end
        records.append((record, base + offset))
    return Read(records, base + offset, False)


def _decoded(kind: int, payload: bytes) -> Record:
    if kind == DONE:
        number, status, up, down, flags, credits = _DONE.unpack_from(payload)
        return DoneRecord(
            number,
            status,
            up,
            down,
            bool(flags & _BILLED),
            tuple(_LEASE.iter_unpack(payload[_DONE.size :])),
            credits if flags & _CREDITS_SAID else None,
        )
    if kind in (ADMITTED, CARRIED):
        number, at_us, id_length = _OPENING.unpack_from(payload)
        at = _OPENING.size + id_length
        request_id = payload[_OPENING.size : at].decode("ascii")
        leases = _LEASE_IDS[payload[at]]
        lease_ids = leases.unpack_from(payload, at + 1)
        return AdmittedRecord(
            number, at_us, request_id, lease_ids, payload[at + 1 + leases.size :], kind == CARRIED
        )
    if kind == LEASES:
        return LeasesRecord(tuple(_LEASE.iter_unpack(payload)))
    if kind == STUB:
        return StubRecord(struct.unpack_from("<I", payload)[0], payload[4:])
    at_us, stub_id, count = _COUNTED.unpack_from(payload)
    leases = _LEASE_IDS[count]
    if len(payload) != _COUNTED.size + leases.size:
        raise struct.error("a counted record of a wrong length")
    return CountedRecord(at_us, stub_id, leases.unpack_from(payload, _COUNTED.size))


def _framed(kind: int, payload: bytes) -> bytes:
    if len(payload) > RECORD_BYTES_MAX:
        raise InvariantError(f"a spool record of {len(payload)} bytes is too large")
    return _FRAME.pack(len(payload), zlib.crc32(payload, _SEEDS[kind]), kind) + payload


def _opening(number: int, at_us: int, request_id: str, lease_ids: Sequence[int], stub: bytes) -> bytes:
    name = request_id.encode("ascii")
    count = len(lease_ids)
    return b"".join(
        (
            _OPENING.pack(number, at_us, len(name)),
            name,
            bytes((count,)),
            _LEASE_IDS[count].pack(*lease_ids),
            stub,
        )
    )


def _ending(record: DoneRecord) -> bytes:
    flags = _BILLED * record.billed | _CREDITS_SAID * (record.credits is not None)
    known = _DONE.pack(
        record.number, record.status, record.bytes_up, record.bytes_down, flags, record.credits or 0
    )
    return known + b"".join(_LEASE.pack(*pair) for pair in record.used) if record.used else known


def _counted(at_us: int, stub_id: int, lease_ids: Sequence[int]) -> bytes:
    count = len(lease_ids)
    return _COUNTED.pack(at_us, stub_id, count) + _LEASE_IDS[count].pack(*lease_ids)


def encode_rider(rider: Rider) -> bytes:
    """One flag byte, then each text as ``length u16 · UTF-8``."""
    texts = (
        rider.fare,
        rider.route_id,
        rider.metric_key,
        rider.value,
        rider.customer_id,
        rider.grant_id,
        rider.pass_id,
        rider.payer,
    )
    encoded = [text.encode() for text in texts]
    if sum(map(len, encoded)) > RECORD_BYTES_MAX // 2:
        raise InvariantError("a rider's names are too long for a spool record")
    flags = _BILLED_WHEN_ORPHANED * rider.billed_when_orphaned | _METERED * rider.metered
    return bytes((flags,)) + b"".join(len(e).to_bytes(2, "little") + e for e in encoded)


def decode_rider(stub: bytes) -> Rider:
    """The inverse of ``encode_rider``; ``ValueError`` when it is none."""
    texts: list[str] = []
    at = 1
    while at < len(stub):
        length = int.from_bytes(stub[at : at + 2], "little")
        at += 2 + length
        if at > len(stub):
            raise ValueError("a rider ends too early")
        texts.append(stub[at - length : at].decode())
    if len(texts) != 8:
        raise ValueError(f"a rider has {len(texts)} texts instead of 8")
    fare, route_id, metric_key, value, customer_id, grant_id, pass_id, payer = texts
    return Rider(
        cast(FareKind, fare),
        route_id,
        metric_key,
        value,
        customer_id,
        grant_id,
        pass_id,
        payer,
        bool(stub[0] & _BILLED_WHEN_ORPHANED),
        bool(stub[0] & _METERED),
    )


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
        if self.counting and stub[0] == _BILLED_WHEN_ORPHANED:
            self._count(at_us, stub, lease_ids)
            self._rotate_if_large()
            return 0
        number = self._number + 1
        payload = _opening(number, at_us, request_id, lease_ids, stub)
        self._write(_framed(ADMITTED, payload))
        self._number = number
        self._open[number] = payload
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
        if used or credits is not None:
            ending = _ending(DoneRecord(number, status, bytes_up, bytes_down, billed, tuple(used), credits))
        else:
            ending = _DONE.pack(number, status, bytes_up, bytes_down, billed, 0)
        record = _framed(DONE, ending)
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
        self._write(_framed(COUNTED, _counted(at_us, stub_id, lease_ids)))

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
        parts.extend(_framed(CARRIED, payload) for payload in self._open.values())
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
