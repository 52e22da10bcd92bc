"""What spool files have delivered. The rows and the mark of how far the file was read commit together: exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString

from farebox.base.errors import InvariantError
from farebox.store.pool import Tx

_DELIVERED: LiteralString = (
    "SELECT file, max(end_offset) FROM spool_batch WHERE source = %(source)s GROUP BY file"
)


async def delivered(tx: Tx, source: str) -> dict[str, int]:
    """File name → the offset up to which its records are in the database."""
    cursor = await tx.execute(_DELIVERED, {"source": source})
    return {row[0]: row[1] for row in await cursor.fetchall()}


# One row a file, moved forward. It moves only from where the shipper believes it to be: two shippers of one file, or
# one that lost the answer of its commit, cannot deliver a record twice.
_MARK: LiteralString = """
    INSERT INTO spool_batch AS old (source, file, start_offset, end_offset, row_count)
    VALUES (%(source)s, %(file)s, 0, %(end)s, %(rows)s)
    ON CONFLICT (source, file, start_offset) DO UPDATE
       SET end_offset = excluded.end_offset, row_count = old.row_count + excluded.row_count, shipped_at = now()
     WHERE old.end_offset = %(start)s
    RETURNING end_offset"""

_BATCH: LiteralString = """
    INSERT INTO ingest_batch (source, row_count) VALUES ('spool:' || %(source)s::text, %(rows)s) RETURNING id"""

_COPY: LiteralString = """
    COPY usage_event (event_id, customer_id, metric_key, value, "timestamp", properties, batch_id) FROM STDIN"""


async def deliver(tx: Tx, source: str, file: str, start: int, end: int, rows: Sequence[str]) -> None:
    """Put the events of ``file[start:end]`` into the book. Call it in a transaction.

    ``rows`` are lines of COPY's text format without the batch id and the line end. Raises ``InvariantError`` when the
    file was delivered to another offset than ``start``: ask ``delivered`` again.
    """
    mark = {"source": source, "file": file, "start": start, "end": end, "rows": len(rows)}
    moved = await (await tx.execute(_MARK, mark)).fetchone()
    if moved is None:
        raise InvariantError(f"spool file {file} of {source} was delivered past {start} by someone else")
    if not rows:
        return
    batch = await (await tx.execute(_BATCH, mark)).fetchone()
    assert batch is not None, "INSERT … RETURNING gives a row"
    ending = f"\t{batch[0]}\n"
    async with tx.cursor().copy(_COPY) as copy:
        await copy.write(ending.join(rows) + ending)
