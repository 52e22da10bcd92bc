"""Gathered writes, on a real table: what waits together is written together, and each caller gets its own verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from farebox.base.errors import InvariantError, Unavailable
from farebox.store.gather import Gatherer
from farebox.store.pool import Database

RESERVE = """
    INSERT INTO sandbox_transfer (payment_key, transaction_hash, asset, payer, recipient, amount)
    SELECT key, encode(key, 'hex'), 'usdc', 'payer', 'seller', 1 FROM unnest(%(keys)s::bytea[]) AS new (key)
    ON CONFLICT DO NOTHING
    RETURNING payment_key"""


class Till:
    """Takes payment keys; the verdict is whether the key was new."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.batches: list[int] = []
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def write(self, keys: Sequence[bytes]) -> list[bool]:
        await self.may_write.wait()
        self.batches.append(len(keys))
        assert list(keys) == sorted(keys)
        async with self.database.transaction() as tx:
            cursor = await tx.execute(RESERVE, {"keys": list(keys)})
            new = {bytes(row[0]) for row in await cursor.fetchall()}
        return [key in new and not new.discard(key) for key in keys]  # type: ignore[func-returns-value]

    def gatherer(self, **limits: int) -> Gatherer[bytes, bool]:
        return Gatherer(self.write, lambda key: key, **limits)


def key(n: int) -> bytes:
    return n.to_bytes(4, "big")


async def test_each_caller_gets_the_verdict_on_its_own_item(database: Database) -> None:
    till = Till(database)
    gatherer = till.gatherer()

    verdicts = await asyncio.gather(*(gatherer.put(key(n % 100)) for n in range(300)))

    assert sum(verdicts) == 100
    async with database.connection() as tx:
        assert await (await tx.execute("SELECT count(*) FROM sandbox_transfer")).fetchone() == (100,)


async def test_what_arrives_during_a_write_shares_the_next_up_to_the_bound(database: Database) -> None:
    till = Till(database)
    gatherer = till.gatherer(rows_max=64)
    till.may_write.clear()
    first = asyncio.create_task(gatherer.put(key(1000)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    rest = [asyncio.create_task(gatherer.put(key(n))) for n in range(100)]
    await asyncio.sleep(0)
    assert gatherer.waiting == 100
    till.may_write.set()
    await asyncio.gather(first, *rest)

    assert till.batches == [1, 64, 36]


async def test_two_processes_that_write_the_same_keys_neither_deadlock_nor_agree(database: Database) -> None:
    one, other = Till(database).gatherer(rows_max=50), Till(database).gatherer(rows_max=50)

    verdicts = await asyncio.gather(
        *(one.put(key(n)) for n in range(1000)), *(other.put(key(n)) for n in reversed(range(1000)))
    )

    assert sum(verdicts) == 1000


async def test_several_writers_of_one_process_lose_nothing(database: Database) -> None:
    gatherer = Till(database).gatherer(rows_max=10, writers=3)

    async def caller(first: int) -> int:
        return sum([await gatherer.put(key(n)) for n in range(first, first + 20)])

    assert sum(await asyncio.gather(*(caller(n * 20) for n in range(40)))) == 800


async def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    calls = 0

    async def write(items: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        if calls == 1:
            raise Unavailable("the database went away")
        return list(items)

    gatherer = Gatherer(write, lambda n: n, rows_max=3)
    outcomes = await asyncio.gather(*(gatherer.put(n) for n in range(5)), return_exceptions=True)

    assert [type(o) for o in outcomes[:3]] == [Unavailable] * 3
    assert outcomes[3:] == [3, 4]


async def test_a_write_that_forgets_a_verdict_is_our_fault() -> None:
    async def write(items: Sequence[int]) -> list[int]:
        return []

    with pytest.raises(InvariantError):
        await Gatherer(write, lambda n: n).put(1)


async def test_too_many_waiting_are_refused_at_once() -> None:
    go = asyncio.Event()

    async def write(items: Sequence[int]) -> list[int]:
        await go.wait()
        return list(items)

    gatherer = Gatherer(write, lambda n: n, rows_max=1, waiting_max=2)
    waiting = []
    for n in range(3):  # one under way, two waiting
        waiting.append(asyncio.create_task(gatherer.put(n)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with pytest.raises(Unavailable):
        await gatherer.put(3)
    go.set()
    assert await asyncio.gather(*waiting) == [0, 1, 2]


async def test_a_caller_that_gives_up_in_the_queue_is_not_written() -> None:
    written: list[int] = []
    go = asyncio.Event()

    async def write(items: Sequence[int]) -> list[int]:
        written.extend(items)
        await go.wait()
        return list(items)

    gatherer = Gatherer(write, lambda n: n, rows_max=1)
    calls = [asyncio.create_task(gatherer.put(n)) for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls[1].cancel()
    go.set()
    await asyncio.gather(*calls, return_exceptions=True)

    assert written == [0, 2]


async def test_closing_writes_what_waits_and_takes_nothing_more(database: Database) -> None:
    gatherer = Till(database).gatherer(rows_max=8)
    calls = [asyncio.create_task(gatherer.put(key(n))) for n in range(50)]
    await asyncio.sleep(0)

    await gatherer.close()

    assert all(call.done() for call in calls)
    assert sum(call.result() for call in calls) == 50
    with pytest.raises(Unavailable):
        await gatherer.put(key(51))
