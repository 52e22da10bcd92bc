"""Who did what, append-only. Written in the transaction of the deed; a database trigger refuses changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.store.pool import Tx


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """``actor`` an API key's id (or ``worker``, ``cli``), ``action`` such as ``invoice.issue``, ``subject`` an id."""

    id: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    at: datetime


ADD: LiteralString = """
    INSERT INTO audit_entry (actor, action, subject, detail)
    VALUES (%(actor)s, %(action)s, %(subject)s, %(detail)s)"""


async def add(tx: Tx, actor: str, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
    """Append an entry. ``detail`` never holds personal data or secrets: it cannot be erased."""
    await tx.execute(
        ADD, {"actor": actor, "action": action, "subject": subject, "detail": Jsonb(dict(detail or {}))}
    )


# Index audit_entry_subject (subject, id).
BY_SUBJECT: LiteralString = """
    SELECT id, actor, action, subject, detail, at
      FROM audit_entry
     WHERE subject = %(subject)s AND id > %(after)s
     ORDER BY id
     LIMIT %(rows)s"""


async def by_subject(tx: Tx, subject: str, after: int, rows: int) -> list[AuditEntry]:
    """What happened to a subject, oldest first."""
    cursor = await tx.execute(BY_SUBJECT, {"subject": subject, "after": after, "rows": rows})
    return [AuditEntry(*row) for row in await cursor.fetchall()]


# Primary key (id).
NEWEST: LiteralString = """
    SELECT id, actor, action, subject, detail, at
      FROM audit_entry
     WHERE id < %(before)s
     ORDER BY id DESC
     LIMIT %(rows)s"""


async def newest(tx: Tx, before: int, rows: int) -> list[AuditEntry]:
    """Everything that happened, newest first."""
    cursor = await tx.execute(NEWEST, {"before": before, "rows": rows})
    return [AuditEntry(*row) for row in await cursor.fetchall()]
