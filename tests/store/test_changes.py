"""Change notices: heard after the commit, never after a rollback, and a lost connection is not hidden."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import pytest

from farebox.base.errors import Unavailable
from farebox.store.changes import Listener, announce
from farebox.store.pool import Database
from tests.wire import a_wire


class Ear:
    """What a process heard."""

    def __init__(self, url: str) -> None:
        self.heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.connects: asyncio.Queue[None] = asyncio.Queue()
        self.losses: asyncio.Queue[None] = asyncio.Queue()
        self.confirmed: asyncio.Queue[float] = asyncio.Queue()
        self.listener = Listener(
            url,
            self._changed,
            self._connected,
            on_lost=lambda: self.losses.put_nowait(None),
            on_confirmed=self.confirmed.put_nowait,
        )

    def _changed(self, kind: str, changed: str) -> None:
        self.heard.put_nowait((kind, changed))
        if changed == "poison":
            raise RuntimeError("this listener cannot stand it")

    async def _connected(self) -> None:
        self.connects.put_nowait(None)

    async def next(self) -> tuple[str, str]:
        return await asyncio.wait_for(self.heard.get(), 30)


@pytest.fixture
async def ear(database_url: str) -> AsyncIterator[Ear]:
    ear = Ear(database_url)
    await ear.listener.start()
    yield ear
    await ear.listener.close()


async def test_a_change_is_heard_once_it_is_committed(database: Database, ear: Ear) -> None:
    async with database.transaction() as tx:
        await announce(tx, "grant", "customer:acme")
        await announce(tx, "key", "ck_1")
        assert ear.heard.empty()

    assert [await ear.next(), await ear.next()] == [("grant", "customer:acme"), ("key", "ck_1")]


async def test_a_change_that_was_rolled_back_is_not_heard(database: Database, ear: Ear) -> None:
    async with database.transaction() as tx:
        await announce(tx, "catalog", "1")
        await tx.execute("ROLLBACK; BEGIN")
        await announce(tx, "catalog", "2")

    assert await ear.next() == ("catalog", "2")


async def test_a_listener_that_fails_on_one_notice_hears_the_next(database: Database, ear: Ear) -> None:
    async with database.connection() as tx:
        await announce(tx, "grant", "poison")
        await announce(tx, "grant", "bread")

    assert [await ear.next(), await ear.next()] == [("grant", "poison"), ("grant", "bread")]


async def test_every_opening_of_the_channel_is_reported(database: Database, ear: Ear) -> None:
    await asyncio.wait_for(ear.connects.get(), 30)

    async with database.connection() as tx:
        await tx.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'farebox listener'"
        )
    await asyncio.wait_for(ear.connects.get(), 30)
    async with database.connection() as tx:
        await announce(tx, "clock", "now")

    assert await ear.next() == ("clock", "now")


async def test_a_listener_without_a_database_says_so_and_leaves_nothing_running() -> None:
    ear = Ear("postgresql://nobody:x@127.0.0.1:1/none")

    with pytest.raises(Unavailable):
        await ear.listener.start(timeout_s=0.1)

    assert not ear.listener.connected


async def test_a_connection_that_falls_silent_is_given_up_and_opened_again(
    database: Database, database_url: str
) -> None:
    """A firewall that forgets a connection tells nobody: no reset ever comes."""
    async with a_wire(database_url) as wire:
        ear = Ear(wire.url)
        await ear.listener.start()
        await asyncio.wait_for(ear.connects.get(), 30)

        wire.hush()
        async with database.connection() as tx:
            await announce(tx, "key", "ck_missed")
        await asyncio.wait_for(ear.losses.get(), 30)
        await asyncio.wait_for(ear.connects.get(), 30)
        async with database.connection() as tx:
            await announce(tx, "key", "ck_heard")

        assert await ear.next() == ("key", "ck_heard")
        await ear.listener.close()


async def test_what_was_committed_before_a_moment_is_heard_before_that_moment_is_confirmed(
    database: Database, ear: Ear
) -> None:
    for number in range(50):
        async with database.connection() as tx:
            await announce(tx, "grant", str(number))
        committed_at = time.monotonic()
        if number % 25 == 0:
            while await asyncio.wait_for(ear.confirmed.get(), 30) < committed_at:
                pass
            assert ear.heard.qsize() == number + 1


async def test_a_session_that_is_not_the_one_that_listens_is_found_out(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a transaction pooler: LISTEN is answered, and nobody listens."""

    def swallow(sent: bytes) -> bytes:
        return sent.replace(b"LISTEN farebox_change", b"SELECT 'nobody hears'")

    async with a_wire(database_url, swallow) as wire:
        ear = Ear(wire.url)
        with caplog.at_level(logging.ERROR):
            await ear.listener.start()
            await asyncio.wait_for(ear.losses.get(), 30)
        await ear.listener.close()

    assert "FAREBOX_DATABASE_DIRECT_URL" in caplog.text
