"""Versions of the gateway catalog: one row each, appended, never changed. The latest one is what gateways serve.

Upstreams, routes, assets and server settings are read as one, so a new version is one row and a bad file is none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import LiteralString

from psycopg.types.json import Jsonb

from farebox.base.errors import InvariantError
from farebox.domain.access import GatewayCatalog, catalog_document, catalog_from_document
from farebox.store import changes
from farebox.store.pool import Tx

_LATEST: LiteralString = """
    SELECT version, document
      FROM gateway_catalog
     ORDER BY version DESC
     LIMIT 1"""


async def latest(tx: Tx) -> GatewayCatalog:
    """The newest version; ``GatewayCatalog(version=0)`` when nothing was applied yet."""
    row = await (await tx.execute(_LATEST)).fetchone()
    return GatewayCatalog(version=0) if row is None else catalog_from_document(row[0], row[1])


# Two applications at once would each compare with the same predecessor and the second would undo the first unseen.
_LOCK: LiteralString = "SELECT pg_advisory_xact_lock(hashtextextended('farebox gateway catalog', 0))"


async def lock(tx: Tx) -> None:
    """Keep other applications of a catalog out until the transaction ends."""
    await tx.execute(_LOCK)


_APPEND: LiteralString = """
    INSERT INTO gateway_catalog (document, digest, applied_by)
    VALUES (%(document)s, %(digest)s, %(applied_by)s)
    RETURNING version"""


async def append(tx: Tx, catalog: GatewayCatalog, applied_by: str) -> GatewayCatalog:
    """Store a new version (``catalog.version`` is not read) and announce it (kind ``catalog``, id: the version).

    Returns the catalog with the version it got.
    """
    document = catalog_document(catalog)
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    cursor = await tx.execute(
        _APPEND,
        {
            "document": Jsonb(document),
            "digest": hashlib.sha256(canonical).digest(),
            "applied_by": applied_by,
        },
    )
    row = await cursor.fetchone()
    if row is None:
        raise InvariantError("an inserted gateway catalog returned no version")
    await changes.announce(tx, "catalog", str(row[0]))
    return replace(catalog, version=row[0])
