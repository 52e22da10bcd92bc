"""Passes: what was bought or granted. What is left of one lives in its counters (store/limits)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.domain.limits import limits_document, limits_from_document
from farebox.domain.passes import Pass
from farebox.store.pool import Tx

_ADD: LiteralString = """
    INSERT INTO pass (id, route_id, offer_id, name, holder, status, limits, starts_at, expires_at, purchase_id)
    VALUES (%(id)s, %(route_id)s, %(offer_id)s, %(name)s, %(holder)s, %(status)s, %(limits)s, %(starts_at)s, %(expires_at)s,
            %(purchase_id)s)"""


async def add(tx: Tx, pass_: Pass) -> None:
    """Write a new pass."""
    await tx.execute(
        _ADD,
        {
            "id": pass_.id,
            "route_id": pass_.route_id,
            "offer_id": pass_.offer_id,
            "name": pass_.name,
            "holder": pass_.holder,
            "status": pass_.status,
            "limits": Jsonb(limits_document(pass_.limits)),
            "starts_at": pass_.starts_at,
            "expires_at": pass_.expires_at,
            "purchase_id": pass_.purchase_id,
        },
    )


_GET: LiteralString = """
    SELECT id, route_id, offer_id, name, holder, status, limits, starts_at, expires_at, purchase_id, revoked_at
      FROM pass
     WHERE id = %(id)s"""


async def get(tx: Tx, pass_id: str) -> Pass | None:
    row = await (await tx.execute(_GET, {"id": pass_id})).fetchone()
    return None if row is None else _pass(row)


_LIST: LiteralString = """
    SELECT id, route_id, offer_id, name, holder, status, limits, starts_at, expires_at, purchase_id, revoked_at
      FROM pass
     WHERE (%(before)s::text IS NULL OR id < %(before)s) AND (%(route_id)s::text IS NULL OR route_id = %(route_id)s)
     ORDER BY id DESC
     LIMIT %(limit)s"""


async def list_latest(tx: Tx, limit: int, before: str | None, route_id: str | None) -> list[Pass]:
    """Latest first (ids sort by time of making), older than ``before``."""
    cursor = await tx.execute(_LIST, {"limit": limit, "before": before, "route_id": route_id})
    return [_pass(row) for row in await cursor.fetchall()]


_REVOKE: LiteralString = """
    UPDATE pass SET status = 'revoked', revoked_at = %(at)s WHERE id = %(id)s AND status <> 'revoked'"""


async def revoke(tx: Tx, pass_id: str, at: datetime) -> bool:
    """End a pass for good. False: there is none, or it was revoked before."""
    return (await tx.execute(_REVOKE, {"id": pass_id, "at": at})).rowcount == 1


def _pass(row: tuple[Any, ...]) -> Pass:
    return Pass(
        id=row[0],
        route_id=row[1],
        offer_id=row[2],
        name=row[3],
        holder=row[4],
        status=row[5],
        limits=limits_from_document(row[6]),
        starts_at=row[7],
        expires_at=row[8],
        purchase_id=row[9],
        revoked_at=row[10],
    )
