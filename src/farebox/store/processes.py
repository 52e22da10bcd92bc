"""The lives of processes: each start is a row of its own, with an epoch that orders it among all others."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, LiteralString

from farebox.store.pool import Tx

_REGISTER: LiteralString = """
    INSERT INTO process (id, kind, host, pid) VALUES (%(id)s, %(kind)s, %(host)s, %(pid)s) RETURNING epoch"""


async def register(tx: Tx, process_id: str, kind: str, host: str, pid: int) -> int:
    """Announce a new life of a process; returns its epoch."""
    row = await (
        await tx.execute(_REGISTER, {"id": process_id, "kind": kind, "host": host, "pid": pid})
    ).fetchone()
    assert row is not None, "INSERT … RETURNING gives a row"
    return int(row[0])


#: A process whose heartbeats were further apart has lost the database meanwhile (they come once a second).
GAP_S: Final = 5.0

_HEARTBEAT: LiteralString = """
    UPDATE process
       SET heartbeat_at = now(),
           unbroken_since = CASE WHEN heartbeat_at < now() - make_interval(secs => %(gap_s)s) THEN now()
                                 ELSE unbroken_since END
     WHERE id = %(id)s"""


async def heartbeat(tx: Tx, process_id: str) -> None:
    """Say that a process lives."""
    await tx.execute(_HEARTBEAT, {"id": process_id, "gap_s": GAP_S})


_BURY: LiteralString = "UPDATE process SET stopped_at = now() WHERE id = %(id)s AND stopped_at IS NULL"


async def bury(tx: Tx, process_id: str) -> None:
    """Say that a process has ended: its own goodbye, or the finding of its host. The first one counts."""
    await tx.execute(_BURY, {"id": process_id})


_SETTLE: LiteralString = """
    UPDATE process SET settled_at = now(), stopped_at = coalesce(stopped_at, now())
     WHERE id = %(id)s AND settled_at IS NULL"""


async def settle(tx: Tx, process_id: str) -> bool:
    """Mark a dead process's spool as shipped and its leases as given back. False: it was settled before."""
    return (await tx.execute(_SETTLE, {"id": process_id})).rowcount == 1


_IS_SETTLED: LiteralString = "SELECT settled_at IS NOT NULL FROM process WHERE id = %(id)s"


async def is_settled(tx: Tx, process_id: str) -> bool:
    """Whether nothing of this process may be shipped any more."""
    row = await (await tx.execute(_IS_SETTLED, {"id": process_id})).fetchone()
    return bool(row and row[0])


_SHIPPED_TO: LiteralString = """
    UPDATE process p SET shipped_to = said.until
      FROM unnest(%(ids)s::text[], %(until)s::timestamptz[]) AS said (id, until)
     WHERE p.id = said.id AND (p.shipped_to IS NULL OR p.shipped_to < said.until)"""


async def shipped_to(tx: Tx, until: Mapping[str, datetime]) -> None:
    """Say up to which instant each process's calls are in the database; closing a period waits for it."""
    await tx.execute(_SHIPPED_TO, {"ids": list(until), "until": list(until.values())})


_SILENT: LiteralString = (
    "SELECT extract(epoch FROM now() - heartbeat_at)::float8 FROM process WHERE id = %(id)s"
)


async def silent_s(tx: Tx, process_id: str) -> float | None:
    """Seconds since a process's last heartbeat; None: it never registered, so it never served."""
    row = await (await tx.execute(_SILENT, {"id": process_id})).fetchone()
    return None if row is None else float(row[0])
