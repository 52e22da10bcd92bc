"""Brings a database to the shape this version expects, and says what it is for: live or sandbox.

Migrations are the files ``migrations/NNNN_verb_noun.sql``, applied in the order of their numbers, forward only, each in
its own transaction together with the record of its checksum. A name with ``_pre_`` (``0007_pre_add_column.sql``) expands:
it suits the old code and the new, and runs before the new code starts. One with ``_post_`` contracts, and runs when the
old code is gone. Two processes may migrate at once: an advisory lock lets one do the work.

Synchronous on purpose: it runs before anything else does, from the command line or the supervisor.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Final, Literal, LiteralString

import psycopg
from psycopg.rows import TupleRow

from farebox.base.errors import InvariantError, Unavailable, refuse

Mode = Literal["live", "sandbox"]
Phase = Literal["pre", "post"]
Connection = psycopg.Connection[TupleRow]

#: Any number will do, as long as every version of Farebox uses the same one.
LOCK_KEY: Final = 0x0FA6EB0C
LOCK_WAIT_S_MAX: Final = 300

#: Daily partitions of usage that a migration leaves behind it; from then on the worker makes them ahead of time.
PARTITION_DAYS_BACK: Final = 2
PARTITION_DAYS_AHEAD: Final = 14

_NAME = re.compile(r"(?P<number>[0-9]{4})_((?P<phase>pre|post)_)?[a-z0-9]+(_[a-z0-9]+)+\.sql\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. ``phase`` None means it suits no running old code: it is applied with the ``pre`` ones."""

    name: str
    phase: Phase | None
    checksum: str
    sql: str

    @classmethod
    def read(cls, name: str, content: bytes) -> Migration:
        """From a file's name and bytes; ``InvariantError`` for a name that breaks the rule."""
        found = _NAME.match(name)
        if found is None:
            raise InvariantError(
                f"{name}: a migration is called NNNN_verb_noun.sql, NNNN_pre_… or NNNN_post_…"
            )
        phase: Phase | None = (
            "pre" if found["phase"] == "pre" else "post" if found["phase"] == "post" else None
        )
        return cls(name, phase, hashlib.sha256(content).hexdigest(), content.decode())

    @property
    def number(self) -> int:
        return int(self.name[:4])


@dataclass(frozen=True, slots=True)
class Report:
    """What a database was found to be. ``applied`` is what this call did; ``pending`` what is left to do."""

    mode: str | None
    applied: tuple[str, ...]
    pending: tuple[str, ...]
    partitions_made: int = 0


def migrate(
    url: str, mode: Mode, phase: Phase | None = None, *, migrations: Sequence[Migration] | None = None
) -> Report:
    """Apply what is missing and stamp the mode at the first start. Running it again changes nothing.

    ``phase="pre"`` stops before the first ``_post_`` file; ``"post"`` and None apply everything. Raises ``Refused``
    when the database is of the other mode, when an applied file has been edited or when the files are out of order;
    ``Unavailable`` when the database is away or somebody else has been migrating for five minutes. A migration that
    fails leaves those before it applied and nothing of its own.
    """
    files = shipped() if migrations is None else list(migrations)
    with _connected(url) as connection, _alone(connection):
        connection.execute(CREATE_RECORD)
        applied = _applied(connection)
        _refuse_edited_files(files, applied)
        found_mode = _mode(connection)
        _refuse_other_mode(found_mode, mode)
        pending = [m for m in files if m.name not in applied]
        _refuse_disorder(pending, applied)
        now = _due(pending, phase)
        for migration in now:
            _apply(connection, migration, mode)
        made = _ensure_partitions(connection)
        done = tuple(m.name for m in now)
        return Report(_mode(connection), done, tuple(m.name for m in pending if m.name not in done), made)


def check(url: str, mode: Mode, *, migrations: Sequence[Migration] | None = None) -> Report:
    """Look without touching; every role does so before it starts.

    Raises ``Refused`` with the remedy when the database was never migrated, is of the other mode, lacks a migration that
    this version needs, or had an applied file edited. Pending ``_post_`` files are reported, not refused; files that
    only a newer version knows are ignored (its ``_pre_`` migrations suit this version too).
    """
    files = shipped() if migrations is None else list(migrations)
    with _connected(url) as connection:
        row = connection.execute(RECORD_EXISTS).fetchone()
        if row is None or row[0] is None:
            raise refuse("DATABASE_NOT_MIGRATED", "the database is empty: run `farebox migrate` first")
        applied = _applied(connection)
        _refuse_edited_files(files, applied)
        found_mode = _mode(connection)
        _refuse_other_mode(found_mode, mode)
        pending = [m for m in files if m.name not in applied]
        needed = [m.name for m in pending if m.phase != "post"]
        if needed:
            raise refuse(
                "DATABASE_BEHIND",
                f"the database lacks {', '.join(needed)}: run `farebox migrate`",
                pending=needed,
            )
        return Report(found_mode, (), tuple(m.name for m in pending))


def shipped() -> list[Migration]:
    """The migrations of this version, in order."""
    folder = resources.files("farebox.store") / "migrations"
    files = [Migration.read(f.name, f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".sql")]
    files.sort(key=lambda m: m.name)
    for earlier, later in itertools.pairwise(files):
        if earlier.number == later.number:
            raise InvariantError(f"{earlier.name} and {later.name} have the same number")
    return files


def _due(pending: list[Migration], phase: Phase | None) -> list[Migration]:
    """Never past a skipped file: the order of the numbers is the order of the database."""
    if phase != "pre":
        return pending
    first_post = next((i for i, m in enumerate(pending) if m.phase == "post"), len(pending))
    return pending[:first_post]


def _refuse_edited_files(files: Sequence[Migration], applied: dict[str, str]) -> None:
    for migration in files:
        recorded = applied.get(migration.name)
        if recorded is not None and recorded != migration.checksum:
            raise refuse(
                "MIGRATION_EDITED",
                f"{migration.name} was edited after it had been applied to this database: "
                "restore the file and put the change into a new migration",
            )


def _refuse_disorder(pending: Sequence[Migration], applied: dict[str, str]) -> None:
    last = max(applied, default="")
    for migration in pending:
        if migration.name < last:
            raise refuse(
                "MIGRATION_OUT_OF_ORDER",
                f"{migration.name} comes before {last}, which is already applied: give it the next free number",
            )


def _refuse_other_mode(found: str | None, wanted: Mode) -> None:
    if found is None or found == wanted:
        return
    if found == "sandbox":
        remedy = "start with --sandbox, or give live mode a database (or --data directory) of its own"
    else:
        remedy = "start without --sandbox, or give the sandbox a database (or --data directory) of its own"
    raise refuse(
        "MODE_MISMATCH",
        f"this database was made for {found} mode and is asked for in {wanted} mode: {remedy}",
    )


RECORD_EXISTS: LiteralString = "SELECT to_regclass('schema_migration')"

CREATE_RECORD: LiteralString = """
    CREATE TABLE IF NOT EXISTS schema_migration (
        name       text PRIMARY KEY,
        checksum   text NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT now()
    )"""

APPLIED: LiteralString = "SELECT name, checksum FROM schema_migration"


def _applied(connection: Connection) -> dict[str, str]:
    return dict(connection.execute(APPLIED).fetchall())


RECORD: LiteralString = "INSERT INTO schema_migration (name, checksum) VALUES (%(name)s, %(checksum)s)"

# In the first migration's transaction: there is no moment at which a database has tables but no mode.
STAMP_MODE: LiteralString = "INSERT INTO installation (mode) VALUES (%(mode)s) ON CONFLICT DO NOTHING"


def _apply(connection: Connection, migration: Migration, mode: Mode) -> None:
    try:
        with connection.transaction():
            connection.execute(migration.sql.encode())  # bytes: a file of this package, not text from outside
            if _table_exists(connection, "installation"):
                connection.execute(STAMP_MODE, {"mode": mode})
            connection.execute(RECORD, {"name": migration.name, "checksum": migration.checksum})
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        raise refuse(
            "MIGRATION_FAILED", f"{migration.name} failed and was rolled back: {' '.join(str(error).split())}"
        ) from error


TABLE_EXISTS: LiteralString = "SELECT to_regclass(%(name)s) IS NOT NULL"


def _table_exists(connection: Connection, name: str) -> bool:
    row = connection.execute(TABLE_EXISTS, {"name": name}).fetchone()
    return bool(row and row[0])


MODE: LiteralString = "SELECT mode FROM installation"


def _mode(connection: Connection) -> str | None:
    if not _table_exists(connection, "installation"):
        return None
    row = connection.execute(MODE).fetchone()
    return None if row is None else str(row[0])


ENSURE_PARTITIONS: LiteralString = """
    SELECT ensure_usage_partitions(
        (now() AT TIME ZONE 'UTC')::date - %(back)s::integer, (now() AT TIME ZONE 'UTC')::date + %(ahead)s::integer)"""


def _ensure_partitions(connection: Connection) -> int:
    if not _table_exists(connection, "usage_event"):
        return 0
    days = {"back": PARTITION_DAYS_BACK, "ahead": PARTITION_DAYS_AHEAD}
    row = connection.execute(ENSURE_PARTITIONS, days).fetchone()
    return int(row[0]) if row else 0


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    try:
        with psycopg.connect(
            url, autocommit=True, connect_timeout=10, application_name="farebox migrate"
        ) as connection:
            yield connection
    except psycopg.OperationalError as error:
        raise Unavailable(f"cannot migrate: {' '.join(str(error).split())}") from error


LOCK: LiteralString = "SELECT pg_advisory_lock(%(key)s)"
UNLOCK: LiteralString = "SELECT pg_advisory_unlock(%(key)s)"


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Hold the lock of this database's migrations; whoever comes second waits, then finds nothing to do."""
    connection.execute(f"SET lock_timeout = {LOCK_WAIT_S_MAX * 1000}")
    connection.execute(LOCK, {"key": LOCK_KEY})
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute(UNLOCK, {"key": LOCK_KEY})
