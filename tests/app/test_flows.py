"""Bytes and rates of a pass, call by call: exactly what was bought passes, and a rate is shared by all who use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farebox.app.admission import Admitted, Flow
from farebox.domain.limits import PassLimits, Rate, burst_bytes
from tests.app.gate import EVERYTHING, Gate, a_call, a_gate, sell_pass


@pytest.fixture
async def gate(database_url: str, tmp_path: Path) -> AsyncIterator[Gate]:
    async with a_gate(database_url, tmp_path / "spool") as opened:
        yield opened


async def opens(gate: Gate, **limits: object) -> Admitted:
    """The first call of a pass with these limits."""
    token = await sell_pass(gate, limits=PassLimits(**limits))  # type: ignore[arg-type]
    return await calls(gate, token)


async def calls(gate: Gate, token: str) -> Admitted:
    return await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))


def download(admitted: Admitted) -> Flow:
    assert admitted.meter is not None
    assert admitted.meter.download is not None
    return admitted.meter.download


async def transfer(flow: Flow, size: int, piece: int = 65_536) -> int:
    """As a gateway does: take what may pass, wait for more, until all has passed or nothing may any more."""
    passed = 0
    while passed < size:
        wanted = min(piece, size - passed)
        taken = flow.take(wanted)
        passed += taken
        if taken < wanted and not await flow.more():
            break
    return passed


async def test_exactly_the_bytes_of_a_pass_go_through_and_the_next_call_is_refused(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(download_bytes=1_000_000))
    first = await calls(gate, token)

    assert await transfer(download(first), 1_500_000) == 1_000_000
    assert await transfer(download(first), 1) == 0
    first.finish(200, 0, 1_000_000)

    refused = await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))
    assert refused.reason.code == "pass_exhausted"
    assert refused.reason.facts["limit"] == "download_bytes"
    [done] = gate.done()
    assert [used for _, used in done.used] == [1_000_000]


async def test_calls_at_the_same_time_share_the_last_bytes_and_no_more(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(download_bytes=777_777))
    ten = [await calls(gate, token) for _ in range(10)]

    passed = await asyncio.gather(*(transfer(download(one), 100_000, 7_001) for one in ten))

    assert sum(passed) == 777_777


async def test_two_processes_let_through_no_more_than_was_bought(database_url: str, tmp_path: Path) -> None:
    async with (
        a_gate(database_url, tmp_path / "one", "gw_one", listen=True) as gate,
        a_gate(database_url, tmp_path / "other", "gw_other", listen=True) as other,
    ):
        token = await sell_pass(gate, limits=PassLimits(upload_bytes=3_000_000))
        there = [await calls(gate, token), await calls(other, token)]
        flows = [one.meter.upload for one in there if one.meter is not None]
        assert len(flows) == 2

        async def beat() -> None:
            while True:
                await asyncio.gather(gate.leases.heartbeat(), other.leases.heartbeat())
                await asyncio.sleep(0.1)

        beating = asyncio.create_task(beat())
        passed = await asyncio.gather(*(transfer(flow, 2_500_000) for flow in flows if flow is not None))
        beating.cancel()

    assert sum(passed) == 3_000_000


async def test_uploads_and_downloads_are_limited_apart(gate: Gate) -> None:
    admitted = await opens(gate, upload_bytes=10, download_bytes=20)
    assert admitted.meter is not None
    assert admitted.meter.upload is not None

    assert await transfer(admitted.meter.upload, 100) == 10
    assert await transfer(download(admitted), 100) == 20


async def test_a_pass_without_such_limits_has_no_meter(gate: Gate) -> None:
    admitted = await opens(gate, calls=5, concurrency=2)
    assert admitted.meter is None


async def test_a_rate_paces_and_lets_everything_through(gate: Gate) -> None:
    rate, size = 400_000, 300_000
    began = time.monotonic()
    admitted = await opens(gate, download_rate=Rate(rate, 60))

    passed = await transfer(download(admitted), size)

    assert passed == size
    assert size <= rate * (time.monotonic() - began) + burst_bytes(rate, 60)


async def test_all_calls_of_a_pass_together_keep_its_rate_and_each_gets_its_part(gate: Gate) -> None:
    rate = 400_000
    token = await sell_pass(gate, limits=PassLimits(download_rate=Rate(rate, 60)))
    began = time.monotonic()
    flows = [download(await calls(gate, token)) for _ in range(3)]
    passed = [0, 0, 0]

    async def load(number: int) -> None:
        """A greedy client asks for all there is each time, a modest one for a little."""
        while sum(passed) < 450_000:
            passed[number] += flows[number].take((65_536, 65_536, 20_000)[number])
            assert await flows[number].more()

    await asyncio.gather(*(load(number) for number in range(3)))

    assert sum(passed) <= rate * (time.monotonic() - began) + burst_bytes(rate, 60)
    assert min(passed) > 450_000 / 3 / 3, passed


async def test_bytes_and_rate_hold_together(gate: Gate) -> None:
    admitted = await opens(gate, download_bytes=100_000, download_rate=Rate(500_000, 10))

    assert await transfer(download(admitted), 200_000) == 100_000


async def test_whoever_leaves_the_lane_leaves_his_part_to_the_others(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(download_rate=Rate(200_000, 60)))
    leaver, stayer = await calls(gate, token), await calls(gate, token)
    while download(leaver).take(65_536) == 65_536:
        pass
    waiting = asyncio.create_task(download(leaver).more())
    await asyncio.sleep(0)
    leaver.finish(0, 0, 65_536)

    assert await transfer(download(stayer), 50_000) == 50_000
    assert not await waiting
