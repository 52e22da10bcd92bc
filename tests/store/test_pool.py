"""Connections: what is committed, whose fault an error is, and what an outage looks like from inside."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator

import psycopg
import pytest

from farebox.base.errors import Unavailable
from farebox.embedded import EmbeddedPostgres
from farebox.store.pool import Database
from tests.database import SETTINGS, fresh_directory
from tests.wire import a_wire


async def customers(database: Database) -> int:
    async with database.connection() as tx:
        row = await (await tx.execute("SELECT count(*) FROM customer")).fetchone()
    assert row is not None
    return int(row[0])


ADD = "INSERT INTO customer (id, name) VALUES ('acme', 'Acme')"


async def test_a_transaction_is_committed_when_its_block_ends(database: Database) -> None:
    async with database.transaction() as tx:
        await tx.execute(ADD)
        assert await customers(database) == 0

    assert await customers(database) == 1


async def test_a_transaction_that_raises_leaves_nothing_behind(database: Database) -> None:
    async def change_of_mind() -> None:
        async with database.transaction() as tx:
            await tx.execute(ADD)
            raise ValueError

    with pytest.raises(ValueError):
        await change_of_mind()

    assert await customers(database) == 0


async def test_a_statement_outside_a_transaction_is_its_own(database: Database) -> None:
    async with database.connection() as tx:
        await tx.execute(ADD)
        assert await customers(database) == 1


async def test_a_pipelined_transaction_is_whole_or_not_at_all(database: Database) -> None:
    async def add_twice() -> None:
        async with database.transaction(pipelined=True) as tx:
            await tx.execute(ADD)
            await tx.execute(ADD)

    with pytest.raises(psycopg.errors.UniqueViolation) as violated:
        await add_twice()
    assert violated.value.diag.constraint_name == "customer_pkey"
    assert await customers(database) == 0

    async with database.transaction(pipelined=True) as tx:
        await tx.execute(ADD)
    assert await customers(database) == 1, "the connection is as good as before"


async def test_a_broken_constraint_is_the_statements_own_fault(database: Database) -> None:
    async with database.transaction() as tx:
        await tx.execute(ADD)

    with pytest.raises(psycopg.errors.UniqueViolation) as violated:
        async with database.transaction() as tx:
            await tx.execute(ADD)

    assert violated.value.diag.constraint_name == "customer_pkey"
    assert await customers(database) == 1


async def test_instants_come_back_in_utc(database: Database) -> None:
    async with database.connection() as tx:
        row = await (await tx.execute("SELECT timestamptz '2026-11-21 12:00+02'")).fetchone()

    assert row is not None
    assert row[0].isoformat() == "2026-11-21T10:00:00+00:00"


async def test_a_statement_that_takes_too_long_is_given_up(database_url: str) -> None:
    database = await Database.open(database_url, statement_timeout_s=0.05)

    with pytest.raises(Unavailable, match="statement timeout"):
        async with database.connection() as tx:
            await tx.execute("SELECT pg_sleep(60)")

    await database.close()


async def test_a_pool_that_is_all_taken_says_so(database_url: str) -> None:
    database = await Database.open(database_url, size_max=1, checkout_timeout_s=0.05)

    async with database.connection():
        with pytest.raises(Unavailable, match="no database connection was free"):
            await database.ping()
    await database.ping()

    await database.close()


async def test_behind_a_transaction_pooler_nothing_is_prepared(database_url: str) -> None:
    database = await Database.open(database_url, size_max=1, transaction_pooler=True)

    async with database.connection() as tx:
        for _ in range(10):
            await tx.execute("SELECT %s::int", (1,))
        prepared = await (await tx.execute("SELECT count(*) FROM pg_prepared_statements")).fetchone()

    assert prepared == (0,)
    await database.close()


async def test_options_of_the_url_are_kept(database_url: str) -> None:
    joint = "&" if "?" in database_url else "?"
    database = await Database.open(f"{database_url}{joint}options=-c%20lock_timeout%3D1234")

    async with database.connection() as tx:
        row = await (
            await tx.execute("SELECT current_setting('lock_timeout'), current_setting('TimeZone')")
        ).fetchone()

    assert row == ("1234ms", "UTC")
    await database.close()


async def test_an_absent_database_is_unavailable_at_once() -> None:
    with pytest.raises(Unavailable, match="cannot reach the database"):
        await Database.open("postgresql://nobody:x@127.0.0.1:1/none", open_timeout_s=0)


async def test_a_closed_database_hands_out_nothing(database_url: str) -> None:
    database = await Database.open(database_url)
    await database.close()

    with pytest.raises(Unavailable):
        await database.ping()


async def test_idle_connections_that_the_server_ended_are_never_handed_out(database: Database) -> None:
    async with database.connection(), database.connection(), database.connection():
        pass  # three now lie in the pool

    async with database.connection() as tx:
        await tx.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'farebox test'"
        )
        await asyncio.gather(*(database.ping() for _ in range(3)))


async def test_a_connection_that_is_lost_in_use_is_unavailable_and_replaced(database: Database) -> None:
    async def lose_it() -> None:
        async with database.transaction() as tx:
            await tx.execute(ADD)
            await tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(Unavailable):
        await lose_it()

    assert await customers(database) == 0


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server that the test may stop."""
    directory = fresh_directory()
    server = EmbeddedPostgres(directory, settings=SETTINGS)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


async def test_after_an_outage_the_pool_is_back_without_being_asked(own_server: EmbeddedPostgres) -> None:
    database = await Database.open(own_server.url, size_min=4)
    async with database.connection(), database.connection():
        pass

    own_server.stop()
    for _ in range(5):
        with pytest.raises(Unavailable):
            await database.ping()
    assert database.away
    await asyncio.sleep(2)  # the pool's own back-off would be asleep for seconds now
    own_server.start()

    async with asyncio.timeout(30):
        while database.away:  # nobody asks for a connection here
            await asyncio.sleep(0.05)
    await asyncio.gather(*(database.ping() for _ in range(20)))
    await database.close()


async def test_a_database_can_be_closed_during_an_outage(own_server: EmbeddedPostgres) -> None:
    database = await Database.open(own_server.url)
    own_server.stop()
    with pytest.raises(Unavailable):
        await database.ping()

    async with asyncio.timeout(30):
        await database.close()


async def test_a_server_that_does_not_answer_in_time_is_hung_up_on(database: Database) -> None:
    with pytest.raises(Unavailable):
        async with database.connection(within_s=0.5) as tx:
            await tx.execute("SELECT pg_sleep(600)")

    await database.ping()


async def test_a_connection_that_fell_silent_costs_one_question_and_the_rest_are_not_trusted(
    database_url: str,
) -> None:
    async with (
        a_wire(database_url) as wire,
        await Database.open(wire.url, size_min=3, name="test") as database,
    ):
        await database.ping()
        wire.hush()
        with pytest.raises(Unavailable):
            async with database.connection(within_s=0.5) as tx:
                await tx.execute("SELECT 1")

        database.distrust()

        async with database.connection(within_s=30) as tx:
            await tx.execute("SELECT 1")
