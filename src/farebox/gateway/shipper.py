"""The shipper: carries what the gateway processes of this host have spooled into the usage events, exactly once.

One process a node. It joins *admitted* and *done*, copies the events in batches, and commits each batch together with how
far the file was read; a file is deleted after that, so being killed in between ships nothing twice. Whatever goes wrong
with the database, the answer is the same: forget what was thought, ask it how far the file is, and read on from there.

A process is dead when its lock is free. Then its calls without an ending are orphans (billed where the route charges
always, as they may have been answered; otherwise only reported), what its leases did not spend goes back to the
counters, and the process is settled: all in one transaction. Calls and credits are known to the unit; bytes too, but
for a grant with a call under way at the death: how far it came is not known, and counts as all that was leased. Slots
and shares of rates are free: whoever held them is dead. Where files are missing, what was leased counts as spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import structlog

from farebox.app.ports.spool import Rider
from farebox.base.errors import InvariantError, Unavailable
from farebox.domain.limits import BYTE_KINDS, RATE_KINDS
from farebox.gateway.spool import boot_id, file_name, lock_path, try_lock
from farebox.gateway.spool_records import (
    MAGIC,
    AdmittedRecord,
    CountedRecord,
    DoneRecord,
    LeasesRecord,
    Record,
    StubRecord,
    decode,
    decode_rider,
)
from farebox.store import limits, processes, spool
from farebox.store.limits import OpenLease
from farebox.store.pool import Database

READ_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_ROWS_MAX: Final = 10_000
#: A record is stamped a moment before it is written: what is claimed as shipped stays this far behind.
CLAIM_MARGIN_S: Final = 1.0
BACK_OFF_S: Final = (0.2, 0.5, 1.0, 2.0)
_STUBS_KEPT_MAX: Final = 20_000
#: A living process beats once a second; one without a lock file is taken for dead after this long.
LOCKLESS_DEAD_AFTER_S: Final = 120.0
#: What the first bytes of every version's files have in common.
_MAGIC_OF_ALL: Final = b"FBXSPL"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Counts:
    """What a shipper has done since it began."""

    events: int = 0
    orphans_billed: int = 0
    orphans_dropped: int = 0
    damaged_files: int = 0
    processes_settled: int = 0


class Shipper:
    """Ships the spool of one directory."""

    def __init__(
        self,
        database: Database,
        directory: Path,
        *,
        batch_rows_max: int = BATCH_ROWS_MAX,
        read_bytes_max: int = READ_BYTES_MAX,
    ) -> None:
        self._database = database
        self._directory = directory
        self._batch_rows_max = batch_rows_max
        self._read_bytes_max = read_bytes_max
        self._sources: dict[str, _Source] = {}
        self._lock = -1
        self._stubs: dict[bytes, _Prepared] = {}
        self._boot = boot_id()
        self._second, self._second_text = -1, ""
        self.counts = Counts()

    def lock(self) -> bool:
        """Become the one shipper of the directory. False: another one is at work."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "shipper.lock"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        fd = try_lock(path)
        if fd is None:
            return False
        self._lock = fd
        return True

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def run(self, stop: asyncio.Event, every_s: float = 0.2) -> None:
        """Ship until told to stop; then empty what is there and return. A lost database is waited for."""
        failures = 0
        while not stop.is_set():
            try:
                await self.ship()
                failures = 0
                pause_s = every_s
            except Unavailable as error:
                pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
                if failures == 0:
                    log.warning("shipping_waits", what=error.what)
                failures += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)
        try:
            await self.ship()
        except Unavailable as error:
            log.warning("spool_kept", what=error.what, directory=str(self._directory))

    async def ship(self) -> None:
        """One round over all processes: everything that is written by now. Raises ``Unavailable``; nothing is lost by it."""
        began_us = time.time_ns() // 1000
        names = self._process_ids()
        for gone in self._sources.keys() - names:
            del self._sources[gone]
        claims: dict[str, datetime] = {}
        for process_id in sorted(names):
            source = self._sources.get(process_id)
            if source is None:
                source = self._sources[process_id] = _Source(self, process_id)
            try:
                if await source.ship():
                    del self._sources[process_id]
                else:
                    claims[process_id] = source.claim(began_us)
            except BaseException:
                # What the database has of it is not known: read it again from the beginning.
                self._sources.pop(process_id, None)
                raise
        if claims:
            async with self._database.connection() as tx:
                await processes.shipped_to(tx, claims)

    def _process_ids(self) -> set[str]:
        found: set[str] = set()
        for name in os.listdir(self._directory):
            if name.endswith(".spool"):
                found.add(name.removesuffix(".spool").rpartition(".")[0])
            elif name.endswith(".lock") and name != "shipper.lock":
                found.add(name.removesuffix(".lock"))
        return found

    def _time_text(self, microseconds: int) -> str:
        """An instant as COPY wants it. The calls of one second share the most of it."""
        second, rest = divmod(microseconds, 1_000_000)
        if second != self._second:
            self._second, self._second_text = (
                second,
                _instant(second * 1_000_000).strftime("%Y-%m-%dT%H:%M:%S"),
            )
        return f"{self._second_text}.{rest:06d}+00:00"

    def _prepared(self, stub: bytes) -> _Prepared:
        known = self._stubs.get(stub)
        if known is None:
            if len(self._stubs) >= _STUBS_KEPT_MAX:
                self._stubs.clear()
            known = self._stubs[stub] = _prepare(decode_rider(stub))
        return known


@dataclass(slots=True)
class _Source:
    """The files of one process, and what is open in them as far as they were read."""

    shipper: Shipper
    process_id: str
    file: str = ""  # being read; empty: nothing read yet
    read_to: int = 0  # offset behind the last record read
    marked: int = 0  # how far the database has it
    delivered: dict[str, int] = field(default_factory=dict)  # as the database said at the beginning
    begun: bool = False
    open: dict[int, AdmittedRecord] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)  # lease id → units
    stubs: dict[int, bytes] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    damaged: bool = False

    async def ship(self) -> bool:
        """Read and deliver all that is there. True: the process is dead, settled and its files are gone."""
        if not self.begun and await self._begin():
            return True
        # In this order: once the lock is ours nothing is written any more, and all there is can be listed.
        lock = try_lock(lock_path(self.shipper._directory, self.process_id))
        try:
            files = self._files()
            if lock is not None:
                self._look_for_missing(files)
            for number, file in enumerate(files):
                if file < self.file:
                    raise InvariantError(f"spool file {file} appeared behind {self.file}")
                last = number == len(files) - 1
                await self._read(file, final=lock is not None or not last)
                if not last:
                    self._path(file).unlink()
            if lock is None:
                await self._lock_for_the_dead()
                return False
            await self._settle(files[-1] if files else None, lock)
            return True
        finally:
            if lock is not None:
                os.close(lock)

    def _look_for_missing(self, files: list[str]) -> None:
        """Who held a lease had a file, and the last one read stays until a later one is there: else somebody deleted it."""
        known = max(self.file, max(self.delivered, default=""))
        if files[-1:] < [known or file_name(self.process_id, 0)] and not self.damaged:
            self.damaged = True
            self.shipper.counts.damaged_files += 1
            log.error("spool_file_missing", process_id=self.process_id, file=known)

    def claim(self, began_us: int) -> datetime:
        """Every call of this process before this instant is in the database."""
        oldest = min((record.at_us for record in self.open.values()), default=began_us)
        return _instant(min(oldest, began_us)) - timedelta(seconds=CLAIM_MARGIN_S)

    async def _begin(self) -> bool:
        async with self.shipper._database.connection() as tx:
            if await processes.is_settled(tx, self.process_id):
                self._clear_away()
                return True
            self.delivered = await spool.delivered(tx, self.process_id)
        self.begun = True
        return False

    async def _lock_for_the_dead(self) -> None:
        """A spool whose lock file was lost has nobody to let it go. Once its process is silent for long enough it gets an
        empty one: the next round settles it, and what cannot be known of its leases counts as spent."""
        path = lock_path(self.shipper._directory, self.process_id)
        if path.exists():
            return
        async with self.shipper._database.connection() as tx:
            silent_s = await processes.silent_s(tx, self.process_id)
        if silent_s is None or silent_s > LOCKLESS_DEAD_AFTER_S:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            log.warning("spool_without_lock", process_id=self.process_id)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, file: str, *, final: bool) -> None:
        if file != self.file:
            self.file, self.read_to = file, len(MAGIC)
            self.marked = self.delivered.get(file, 0)
            self.used, self.stubs = {}, {}
        with self._path(file).open("rb") as content:
            beginning = content.read(len(MAGIC))
            size = os.fstat(content.fileno()).st_size
            if beginning != MAGIC:
                self._not_begun(beginning, size, final=final)
                return
            while self.read_to < size:
                content.seek(self.read_to)
                read = decode(content.read(self.shipper._read_bytes_max), base=self.read_to)
                for record, end in read.records:
                    self._take_in(record, end, fresh=end > self.marked)
                    if len(self.rows) >= self.shipper._batch_rows_max:
                        await self._deliver(end)
                if read.end == self.read_to or read.damaged:
                    self.read_to = read.end
                    self._torn(size, damaged=read.damaged, final=final)
                    break
                self.read_to = read.end
        await self._deliver(self.read_to)

    def _not_begun(self, beginning: bytes, size: int, *, final: bool) -> None:
        """A name without its contents: the power went before they reached the disk. All other files are shipped as ever."""
        if len(beginning) == len(MAGIC) and beginning.startswith(_MAGIC_OF_ALL):
            raise InvariantError(f"{self.file} is not a spool file of this version")
        if final:
            self.read_to = 0
            self._torn(size, damaged=True, final=True)

    def _torn(self, size: int, *, damaged: bool, final: bool) -> None:
        """What follows is no whole record. The owner may be writing it; at the end of a life it was never finished."""
        if not final:
            return
        if damaged:
            self.damaged = True
            self.shipper.counts.damaged_files += 1
            log.error(
                "spool_file_damaged", file=self.file, offset=self.read_to, bytes_lost=size - self.read_to
            )
        else:
            log.info("spool_record_unfinished", file=self.file, offset=self.read_to)

    def _take_in(self, record: Record, end: int, *, fresh: bool) -> None:
        match record:
            case AdmittedRecord():
                self.open[record.number] = record
                if not record.carried:
                    self._spend(record.lease_ids, 1)
            case DoneRecord():
                admitted = self.open.pop(record.number, None)
                if admitted is None:
                    log.error("spool_ending_without_call", file=self.file, offset=end)
                    return
                if not record.billed:
                    self._spend(admitted.lease_ids, -1)
                elif fresh:
                    credits = "" if record.credits is None else f',"credits":{record.credits}'
                    self._add(
                        admitted,
                        f'"status":{record.status},"bytes_up":{record.bytes_up},"bytes_down":{record.bytes_down}{credits}',
                    )
                if record.used:
                    self.used.update(record.used)
            case LeasesRecord():
                self.used.update(record.used)
            case StubRecord():
                self.stubs[record.stub_id] = record.stub
            case CountedRecord():
                self._spend(record.lease_ids, 1)
                if fresh:
                    self._add_counted(record, end)

    def _spend(self, lease_ids: tuple[int, ...], units: int) -> None:
        used = self.used
        for lease_id in lease_ids:
            used[lease_id] = used.get(lease_id, 0) + units

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _add(self, admitted: AdmittedRecord, details: str) -> None:
        prepared = self.shipper._prepared(admitted.stub)
        if not prepared.columns:
            return
        request_id = admitted.request_id
        name = request_id.removeprefix("req_")
        said = f'"{request_id}"'
        if not request_id.isidentifier():  # ours always are: nothing in them needs an escape
            name, said = _copied(name), _copied(json.dumps(request_id))
        at = self.shipper._time_text(admitted.at_us)
        self.rows.append(
            f'evt_{name}\t{prepared.columns}\t{at}\t{prepared.properties},"request_id":{said},{details}}}'
        )

    def _add_counted(self, record: CountedRecord, end: int) -> None:
        prepared = self.shipper._prepared(self.stubs[record.stub_id])
        if prepared.columns:
            number = self.file.removesuffix(".spool").rpartition(".")[2].lstrip("0")
            self.rows.append(
                f"evt_{self.process_id}_{number}_{end}\t{prepared.columns}\t{self.shipper._time_text(record.at_us)}\t"
                f'{prepared.properties},"detail":"dropped"}}'
            )

    async def _deliver(self, end: int) -> None:
        if not self.rows:
            return
        async with self.shipper._database.transaction() as tx:
            await spool.deliver(tx, self.process_id, self.file, self.marked, end, self.rows)
        self._delivered(end)

    def _delivered(self, end: int) -> None:
        self.shipper.counts.events += len(self.rows)
        self.rows.clear()
        self.marked = end

    # ── the end of a process ─────────────────────────────────────────────────────────────────────────────────────

    async def _settle(self, last_file: str | None, lock: int) -> None:
        billed = dropped = 0
        for admitted in self.open.values():
            if self.shipper._prepared(admitted.stub).billed_when_orphaned:
                self._add(admitted, '"status":0,"orphaned":true')
                billed += 1
            else:
                dropped += 1
                self._spend(admitted.lease_ids, -1)
            log.warning("call_orphaned", process_id=self.process_id, request_id=admitted.request_id)
        certain = not self.damaged and self._same_boot(lock)
        async with self.shipper._database.transaction() as tx:
            if await processes.settle(tx, self.process_id):
                held = await limits.open_of(tx, self.process_id)
                used = {lease_id: self._used_of(lease_id, lease, certain) for lease_id, lease in held.items()}
                await limits.give_back(tx, self.process_id, used)
            elif await processes.is_settled(tx, self.process_id):
                self.rows.clear()  # by a shipper that was killed right after it
            else:
                log.warning("process_unknown", process_id=self.process_id)
            if self.rows and last_file is not None:
                await spool.deliver(tx, self.process_id, last_file, self.marked, self.read_to, self.rows)
        self._delivered(self.read_to)
        counts = self.shipper.counts
        counts.orphans_billed += billed
        counts.orphans_dropped += dropped
        counts.processes_settled += 1
        self._clear_away()
        log.info(
            "process_settled", process_id=self.process_id, orphans_billed=billed, orphans_dropped=dropped
        )

    def _used_of(self, lease_id: int, lease: OpenLease, certain: bool) -> int:
        """Units used of an open lease. What cannot be known counts as spent."""
        if lease.kind == "concurrency" or lease.kind in RATE_KINDS:
            return 0
        if not certain or (lease.kind in BYTE_KINDS and lease.grant_id in self._grants_under_way()):
            return lease.granted
        used = max(0, self.used.get(lease_id, 0))
        return used if lease.kind == "credits" else min(lease.granted, used)

    def _grants_under_way(self) -> set[str]:
        return {self.shipper._prepared(admitted.stub).grant_id for admitted in self.open.values()}

    def _same_boot(self, lock: int) -> bool:
        """Whether the process lived in this boot: else the machine went down under it, and the last records may be lost."""
        try:
            return bool(json.loads(os.pread(lock, 4096, 0)).get("boot") == self.shipper._boot)
        except ValueError:
            return False

    def _clear_away(self) -> None:
        """The lock goes last: where there is one, there may be files."""
        for file in self._files():
            self._path(file).unlink(missing_ok=True)
        directory, process_id = self.shipper._directory, self.process_id
        (directory / f"{process_id}.draft").unlink(missing_ok=True)
        for draft in directory.glob(f"{process_id}.*.draft"):
            draft.unlink(missing_ok=True)
        lock_path(directory, process_id).unlink(missing_ok=True)

    def _files(self) -> list[str]:
        prefix = f"{self.process_id}."
        return sorted(
            name
            for name in os.listdir(self.shipper._directory)
            if name.startswith(prefix) and name.endswith(".spool")
        )

    def _path(self, file: str) -> Path:
        return self.shipper._directory / file


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A rider as COPY wants it. ``columns`` empty: the route has no metric, so there is no event."""

    columns: str
    properties: str
    billed_when_orphaned: bool
    grant_id: str


def _prepare(rider: Rider) -> _Prepared:
    properties = {"route": rider.route_id, "fare": rider.fare, "pass": rider.pass_id, "payer": rider.payer}
    text = json.dumps({name: value for name, value in properties.items() if value})
    customer = _copied(rider.customer_id) if rider.customer_id else r"\N"
    return _Prepared(
        columns=f"{customer}\t{_copied(rider.metric_key)}\t{_copied(rider.value)}"
        if rider.metric_key
        else "",
        properties=_copied(text[:-1]),
        billed_when_orphaned=rider.billed_when_orphaned,
        grant_id=rider.grant_id,
    )


_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _copied(text: str) -> str:
    """A value in COPY's text format."""
    return text.translate(_ESCAPES)


def _instant(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
