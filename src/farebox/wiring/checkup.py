"""What can be found wrong with an installation, and what to do about it: the checks of ``farebox doctor`` and of ``/ready``.

Every check looks and changes nothing. The only thing that acts is ``write_off``, when it is asked to.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg

from farebox.base.errors import FareboxError, refuse
from farebox.config import Config
from farebox.store import installation, limits, migrate, processes, stranded
from farebox.store.pool import Database
from farebox.wiring.environment import misspelt_variables

DATABASE_TIMEOUT_S: Final = 2
#: Tokens, quotes and payment windows compare clocks of several machines.
CLOCK_DIFFERENCE_S_MAX: Final = 2.0
DISK_FREE_SHARE_MIN: Final = 0.05
SPOOL_SHARE_MAX: Final = 0.8
#: A gateway beats once a second; longer silence is worth a look. It proves nothing: a free lock on its own host does.
SILENT_S: Final = 30.0
#: A living gateway's calls are in the database within a second or two.
BEHIND_S_MAX: Final = 60.0
NOTICE_TIMEOUT_S: Final = 3.0
#: A host that was heard from so recently may still serve: nothing of it is written off.
WRITE_OFF_AFTER_S: Final = 60.0
#: What a process held of these kinds died with it: calls under way and shares of a rate.
_ENDS_WITH_THE_PROCESS: Final = frozenset(("concurrency", "upload_rate", "download_rate"))


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``remedy`` empty: all is well. ``details`` are rows for a table."""

    check: str
    said: str
    remedy: str = ""
    details: Sequence[dict[str, Any]] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.remedy


async def database_answers(url: str) -> str:
    """``ok``, or what is wrong with the way to the database."""
    try:
        async with asyncio.timeout(DATABASE_TIMEOUT_S):
            connection = await psycopg.AsyncConnection.connect(
                url, autocommit=True, application_name="farebox ops"
            )
            async with connection:
                await connection.execute("SELECT 1")
    except (psycopg.Error, TimeoutError) as error:
        return f"unreachable: {' '.join(str(error).split()) or 'no answer in time'}"[:200]
    return "ok"


async def migrations_fit(direct_url: str, mode: migrate.Mode) -> str:
    """``ok``, or what the database lacks."""
    try:
        await asyncio.to_thread(migrate.check, direct_url, mode)
    except FareboxError as error:
        return str(error)[:300]
    return "ok"


async def examine(config: Config, spool_directory: Path) -> list[Finding]:
    """Every check; those that need the database are left out while it does not answer."""
    findings = [_variables(), _keys(config), _disk(spool_directory), _spool_size(config, spool_directory)]
    said = await database_answers(config.database_url)
    if said != "ok":
        return [
            Finding("database", said, "start PostgreSQL, or correct FAREBOX_DATABASE_URL"),
            *findings,
        ]
    findings.insert(0, Finding("database", "ok"))
    said = await migrations_fit(config.database_direct_url, config.mode)
    findings.insert(1, Finding("migrations", said, "" if said == "ok" else "run `farebox migrate`"))
    if said != "ok":
        return findings
    async with await Database.open(config.database_url, size_max=1, name="doctor") as database:
        findings.append(await _clocks(database))
        findings.append(await _notices(config))
        findings += await _processes(database, spool_directory)
        findings.append(await _jobs(database))
    return findings


# ── this machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _variables() -> Finding:
    names = misspelt_variables()
    if not names:
        return Finding("variables", "ok")
    return Finding(
        "variables",
        f"these mean nothing to Farebox: {', '.join(names)}",
        "correct their names (docs/configuration.md lists all), or unset them",
    )


def _keys(config: Config) -> Finding:
    if config.master_key is None and {"QUOTES", "TOKENS"} - config.own_keys.keys():
        return Finding(
            "keys",
            "neither FAREBOX_MASTER_KEY nor every FAREBOX_KEY_… is set here",
            "set FAREBOX_MASTER_KEY, the same on every machine",
        )
    return Finding("keys", "ok")


def _disk(spool_directory: Path) -> Finding:
    place = spool_directory
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    said = f"{usage.free // 1_000_000} MB free of {usage.total // 1_000_000} MB at {place}"
    if usage.free < usage.total * DISK_FREE_SHARE_MIN:
        return Finding("disk", said, "make room: without it calls cannot be recorded and are refused")
    return Finding("disk", said)


def _spool_size(config: Config, spool_directory: Path) -> Finding:
    size = sum(path.stat().st_size for path in _spool_files(spool_directory))
    said = f"{size} of {config.spool.bytes_max} bytes in {spool_directory}"
    if size >= config.spool.bytes_max * SPOOL_SHARE_MAX:
        return Finding(
            "spool",
            said,
            "it is nearly full: see that the database answers and that the shipper runs; beyond the limit calls are "
            + ("refused" if config.spool.on_full == "refuse" else "counted without detail"),
        )
    return Finding("spool", said)


def _spool_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.spool")) if directory.is_dir() else []


# ── the database ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def _clocks(database: Database) -> Finding:
    async with database.connection() as tx:
        before = time.time()
        theirs = await stranded.now_s(tx)
        after = time.time()
        moved_to = (await installation.get(tx)).business_date
    apart_s = max(theirs - after, before - theirs, 0.0)
    said = f"this machine and the database are {apart_s:.1f} s apart"
    if moved_to is not None:
        said += f"; the test clock stands at {moved_to.isoformat()}"
    if apart_s > CLOCK_DIFFERENCE_S_MAX:
        return Finding(
            "clocks", said, "let a time service (chrony, systemd-timesyncd) set the clocks of both"
        )
    return Finding("clocks", said)


async def _notices(config: Config) -> Finding:
    """One session listens, another speaks: behind a transaction pooler nothing arrives."""
    channel = f"farebox_doctor_{secrets.token_hex(4)}"
    listener = await psycopg.AsyncConnection.connect(config.database_direct_url, autocommit=True)
    speaker = await psycopg.AsyncConnection.connect(config.database_url, autocommit=True)
    async with listener, speaker:
        await listener.execute(f"LISTEN {channel}".encode())
        await speaker.execute(f"NOTIFY {channel}".encode())
        async for _ in listener.notifies(timeout=NOTICE_TIMEOUT_S, stop_after=1):
            return Finding("change notices", "ok")
    return Finding(
        "change notices",
        "a notice did not arrive: a transaction pooler stands between, and revocations would be noticed late",
        "set FAREBOX_DATABASE_DIRECT_URL to the server itself, on every machine",
    )


async def _processes(database: Database, spool_directory: Path) -> list[Finding]:
    async with database.connection() as tx:
        lives = await stranded.unsettled(tx)
        known_here = _processes_of(spool_directory)
        here = socket.gethostname()
        silent = [life for life in lives if life.silent_s > SILENT_S or life.stopped]
        lost = [life for life in silent if life.host != here or life.id not in known_here]
        waiting = [life for life in silent if life not in lost]
        leases = await stranded.open_leases(tx, [life.id for life in lost])
        leftovers = [name for name in known_here if await processes.is_settled(tx, name)]
    return [
        _shipping([life for life in lives if life not in silent]),
        _waiting(waiting, leftovers, spool_directory),
        _lost(lost, leases),
    ]


def _processes_of(spool_directory: Path) -> set[str]:
    """Whose spool lies here."""
    names = {path.name.removesuffix(".spool").rpartition(".")[0] for path in _spool_files(spool_directory)}
    locks = spool_directory.glob("*.lock") if spool_directory.is_dir() else ()
    return names | {path.name.removesuffix(".lock") for path in locks if path.name != "shipper.lock"}


def _shipping(living: Sequence[stranded.ProcessLife]) -> Finding:
    rows = [
        {
            "process": life.id,
            "host": life.host,
            "pid": life.pid,
            "behind_s": None if life.behind_s is None else round(life.behind_s, 1),
        }
        for life in living
    ]
    late = [life.id for life in living if life.behind_s is not None and life.behind_s > BEHIND_S_MAX]
    said = f"{len(living)} gateway processes live"
    if late:
        return Finding(
            "shipping",
            f"{said}; the calls of {', '.join(late)} are not in the database yet",
            "see the shipper's log on their host; until then periods are closed without these calls, or late",
            rows,
        )
    return Finding("shipping", said, details=rows)


def _waiting(
    waiting: Sequence[stranded.ProcessLife], leftovers: Sequence[str], spool_directory: Path
) -> Finding:
    names = [*(life.id for life in waiting), *leftovers]
    if not names:
        return Finding("spool files", "ok")
    return Finding(
        "spool files",
        f"in {spool_directory} lie the spools of processes that ended: {', '.join(names)}",
        "start `farebox up` or `farebox gateway` with this directory: its shipper brings them into the database and clears them away",
    )


def _lost(lost: Sequence[stranded.ProcessLife], leases: Sequence[stranded.StrandedLease]) -> Finding:
    if not lost:
        return Finding("stranded", "ok")
    held_by: dict[str, list[stranded.StrandedLease]] = {}
    for lease in leases:
        held_by.setdefault(lease.process_id, []).append(lease)
    nothing: list[stranded.StrandedLease | None] = [None]
    rows: list[dict[str, Any]] = [
        {
            "process": life.id,
            "host": life.host,
            "silent_s": round(life.silent_s),
            "limit": lease.counter_id if lease else None,
            "of": lease.subject_id if lease else None,
            "units": int(lease.granted) if lease else 0,
            "unspent_units": int(lease.unspent) if lease else 0,
        }
        for life in lost
        for lease in (held_by.get(life.id) or nothing)
    ]
    return Finding(
        "stranded",
        f"{len(lost)} gateway processes are silent, and their spools are not on this machine; {len(leases)} slices of limits are theirs",
        "if a host lives, start its gateway role: its shipper settles them. If its spool is gone for good, count the slices "
        "as spent: farebox doctor --write-off PROCESS",
        rows,
    )


async def _jobs(database: Database) -> Finding:
    async with database.connection() as tx:
        dead = await stranded.dead_jobs(tx)
    if not dead:
        return Finding("jobs", "ok")
    said = ", ".join(f"{count} {kind}" for kind, count in dead.items())
    return Finding(
        "jobs", f"given up: {said}", "the worker's log says why; once that is mended, queue them again"
    )


# ── writing off ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def write_off(config: Config, process_id: str, spool_directory: Path) -> int:
    """Close the books of a process whose spool is gone: what it held of amounts counts as spent; its slots and shares of
    rates, which ended with it, are free. Returns how many slices were closed.

    ``Refused``: ``PROCESS_UNKNOWN``, ``PROCESS_SETTLED``, ``PROCESS_ALIVE`` (heard from a moment ago), ``SPOOL_HERE``.
    """
    async with (
        await Database.open(config.database_url, size_max=1, name="doctor") as database,
        database.transaction() as tx,
    ):
        found = await stranded.heard_from(tx, process_id)
        if found is None:
            raise refuse("PROCESS_UNKNOWN", f"there is no process {process_id[:60]!r}")
        host, settled, silent_s = found
        if settled:
            raise refuse("PROCESS_SETTLED", f"{process_id} is settled: there is nothing to write off")
        if silent_s < WRITE_OFF_AFTER_S:
            raise refuse(
                "PROCESS_ALIVE",
                f"{process_id} on {host} was heard from {silent_s:.0f} s ago: it may still serve",
            )
        if process_id in _processes_of(spool_directory):
            raise refuse(
                "SPOOL_HERE",
                f"the spool of {process_id} is here, in {spool_directory}: start its gateway role, whose shipper settles it "
                "exactly",
            )
        kinds = {lease.lease_id: lease.kind for lease in await stranded.open_leases(tx, [process_id])}
        held = await limits.open_of(tx, process_id)
        await limits.give_back(
            tx,
            process_id,
            {
                lease_id: 0 if kinds.get(lease_id) in _ENDS_WITH_THE_PROCESS else lease.granted
                for lease_id, lease in held.items()
            },
        )
        await processes.settle(tx, process_id)
    return len(held)


def spool_directory_of(config: Config) -> Path:
    """Where this machine's gateways spool: as configured, else below the data directory of ``up`` or of the gateway role."""
    if config.spool.directory:
        return Path(config.spool.directory).absolute()
    data = Path(config.data_directory).absolute()
    of_role = data / "gateway" / "spool"
    return of_role if of_role.is_dir() else data / "spool"
