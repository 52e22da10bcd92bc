"""A hundred clients race for the last thousand calls through four real gateway processes, of which some stop or die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.journeys.house import SHOP, House, Tally, Upstream, farebox_up, load

CALLS = 1000
LEASE_S = 4


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not condition():
            await asyncio.sleep(0.01)


def spool_of(data: Path, pid: int) -> list[Path]:
    """All that a process has written down, found by the lock that names its pid."""
    for lock in (data / "spool").glob("*.lock"):
        if lock.name != "shipper.lock" and json.loads(lock.read_text() or "{}").get("pid") == pid:
            return list(lock.parent.glob(f"{lock.name.removesuffix('.lock')}.*"))
    raise AssertionError(f"process {pid} has no spool below {data}")


def spent(house: House) -> int:
    return int(
        house.rows("SELECT coalesce(sum(spent), 0) FROM limit_counter WHERE feature_key = 'api_calls'")[0][0]
    )


@pytest.mark.parametrize("spool_survives", [True, False], ids=["its spool survives", "its spool is deleted"])
async def test_a_thousand_calls_are_a_thousand_whatever_happens_to_the_gateways(
    tmp_path: Path, upstream: Upstream, spool_survives: bool
) -> None:
    shop = SHOP.replace("limit: 10000000", f"limit: {CALLS}")
    with farebox_up(tmp_path, upstream, gateways=4, shop=shop, FAREBOX_LEASE_S=str(LEASE_S)) as house:
        key, tally = house.account_key(), Tally()
        stopped, killed = house.gateway_pids[:2]
        racing = asyncio.create_task(load(house.gateway_url, key, 100, 25, tally, pause_s=0.05))

        await until(lambda: len(tally.answered) > CALLS // 10)
        os.kill(stopped, signal.SIGSTOP)
        if not spool_survives:
            for file in spool_of(tmp_path / "data", killed):
                file.unlink()
        os.kill(killed, signal.SIGKILL)
        await asyncio.sleep(LEASE_S + 1)  # past its lease
        os.kill(stopped, signal.SIGCONT)
        await racing
        await asyncio.to_thread(house.wait_until_shipped)

        assert len(tally.answered) <= len(upstream.calls()) <= CALLS
        assert set(tally.refused) <= {429, 502, 503}
        assert await asyncio.to_thread(spent, house) == CALLS
        if spool_survives:
            billed = {row[0] for row in house.rows("SELECT properties->>'request_id' FROM usage_event")}
            assert len(billed) == CALLS
            assert set(tally.answered) <= billed
