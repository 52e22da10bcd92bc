"""A spool whose lock file was lost: settled once its process is silent for long, and nothing of it is billed twice."""

from __future__ import annotations

from pathlib import Path

from farebox.gateway.shipper import Shipper
from farebox.gateway.spool import lock_path
from farebox.store import limits
from farebox.store.pool import Database
from tests.app.gate import a_customer
from tests.gateway.test_spool_shipping import a_spool, billed, rows, serve


async def test_a_spool_without_a_lock_file_is_settled_when_its_process_is_silent_for_long(
    database: Database, tmp_path: Path
) -> None:
    await a_customer(database, limit=100)
    spool, shipper = await a_spool(database, tmp_path), Shipper(database, tmp_path)
    async with database.transaction() as tx:
        got = await limits.take(tx, "quota:acme:api_calls", "gw_x", wanted=5, needed=0, used=0, ttl_s=60)
    assert isinstance(got, limits.Slice)
    serve(spool, "req_1", leases=(got.lease_id,))
    spool.close()
    lock_path(tmp_path, "gw_x").unlink()

    await shipper.ship()
    await shipper.ship()
    assert await billed(database) == ["req_1"]
    assert await rows(database, "SELECT settled_at FROM process") == [(None,)], "it may still live"

    async with database.connection() as tx:
        await tx.execute("UPDATE process SET heartbeat_at = now() - interval '1 hour'")
    await shipper.ship()
    await shipper.ship()

    assert await rows(database, "SELECT settled_at IS NOT NULL FROM process") == [(True,)]
    assert await billed(database) == ["req_1"]
    assert await rows(database, "SELECT spent FROM limit_counter") == [(got.granted,)], "not known: spent"
    assert [path.name for path in tmp_path.iterdir()] == []
