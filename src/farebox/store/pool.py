"""The way to PostgreSQL: a pool of autocommit connections, and one place that says whose fault a driver error is.

``Database`` hands out connections (``Tx``) to use cases. Aggregate modules take a ``Tx`` as their first argument and
never commit. A lost, refused or overloaded database is the world's fault and becomes ``Unavailable`` here, so nobody
else has to know the driver's errors; a statement's own fault (a constraint, a syntax error) passes through untouched.

After an outage the pool is back within half a second: it probes by itself instead of backing off, it notices at checkout
that the server hung up on an idle connection, and while it knows the database is away it refuses quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Self
from weakref import WeakKeyDictionary

import psycopg
import psycopg_pool
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from farebox.base.errors import Unavailable

Tx = psycopg.AsyncConnection[TupleRow]

#: Statements over many rows are planned for the tables as they are now. A plan that was kept from when they were small
#: walks through the whole of them for each row, until the next ANALYZE.
PLANNED_ANEW: Final = False

#: How often an absent database is tried again, and how long a caller waits for one that is known to be away.
PROBE_EVERY_S: Final = 0.25
AWAY_WAIT_S: Final = 0.5
#: The last part of an answer's time, left to a loop that was busy: what has arrived by then is read before it is judged.
GRACE_S: Final = 0.25

_log = logging.getLogger(__name__)
# The pool library warns of every failed attempt, a dozen a second in an outage. We say once when it begins and ends.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


class Database:
    """A pool on one database. Made by ``await Database.open(url)``, ended by ``await database.close()``."""

    def __init__(
        self,
        url: str,
        *,
        size_min: int,
        size_max: int,
        name: str,
        statement_timeout_s: float,
        checkout_timeout_s: float,
        transaction_pooler: bool,
    ) -> None:
        self.url = url
        self.name = name
        self._checkout_timeout_s = checkout_timeout_s
        self._transaction_pooler = transaction_pooler
        self._statement_timeout_s = statement_timeout_s
        self._away = False
        self._closing = False
        self._probe: asyncio.Task[None] | None = None
        self._generation = 0
        self._made_in: WeakKeyDictionary[Tx, int] = WeakKeyDictionary()
        self._pool: psycopg_pool.AsyncConnectionPool[Tx] = psycopg_pool.AsyncConnectionPool(
            url,
            min_size=size_min,
            max_size=size_max,
            open=False,
            name=name,
            timeout=checkout_timeout_s,
            # The pool's own back-off doubles from 1 s: after 20 s of outage it would sleep ten more. It gives up
            # at once instead, and _probing() tries again at a steady pace.
            reconnect_timeout=0.0,
            reconnect_failed=self._went_away,
            configure=self._configure,
            kwargs=self._connect_arguments(),
        )

    @classmethod
    async def open(
        cls,
        url: str,
        size_min: int = 1,
        size_max: int = 8,
        name: str = "api",
        *,
        statement_timeout_s: float = 30.0,
        checkout_timeout_s: float = 5.0,
        open_timeout_s: float = 10.0,
        transaction_pooler: bool = False,
    ) -> Self:
        """Connect, or raise ``Unavailable`` with the server's own words after ``open_timeout_s``.

        ``transaction_pooler``: pgbouncer or the like stands between. Then nothing may be prepared on a connection, and
        the statement timeout has to be set on the role, as session settings do not stay with us.
        """
        database = cls(
            url,
            size_min=size_min,
            size_max=size_max,
            name=name,
            statement_timeout_s=statement_timeout_s,
            checkout_timeout_s=checkout_timeout_s,
            transaction_pooler=transaction_pooler,
        )
        await database._first_connection(open_timeout_s)
        await database._pool.open()
        return database

    async def close(self) -> None:
        """Return when every connection is closed; statements under way have five seconds to end."""
        self._closing = True
        if self._probe is not None:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
        await self._pool.close(timeout=5.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def away(self) -> bool:
        """Whether the last attempt to connect failed."""
        return self._away

    def distrust(self) -> None:
        """The way to the server was seen broken: connections opened before now may lead nowhere and are not used again.

        Those in use go on: what waits for an answer on them has its own bound.
        """
        self._generation += 1

    @asynccontextmanager
    async def connection(self, *, within_s: float | None = None) -> AsyncIterator[Tx]:
        """A connection in autocommit: each statement is its own transaction. For reads and single statements.

        ``within_s``: the whole block, or ``Unavailable``. A server that says nothing for as long is hung up on.
        """
        asked_at = time.monotonic()
        connection = await self._checkout(within_s)
        try:
            if within_s is None:
                yield connection
            else:
                with answering(connection, within_s - (time.monotonic() - asked_at)):
                    yield connection
        except psycopg.Error as error:
            raise self._whose_fault(error, connection) from error
        finally:
            await self._pool.putconn(connection)

    @asynccontextmanager
    async def transaction(self, *, pipelined: bool = False) -> AsyncIterator[Tx]:
        """One transaction: committed when the block ends, rolled back when it raises.

        ``Unavailable`` from the commit itself leaves the outcome unknown: that is what idempotency keys are for.

        ``pipelined``: statements go out together, and the server is waited for only where a result is looked at and at the
        end, where the errors of the others appear. No COPY then.
        """
        connection = await self._checkout()
        try:
            async with (
                connection.pipeline() if pipelined else contextlib.nullcontext(),
                connection.transaction(),
            ):
                yield connection
        except psycopg.Error as error:
            raise self._whose_fault(error, connection) from error
        finally:
            await self._pool.putconn(connection)

    async def ping(self) -> None:
        """Return when the database answers; ``Unavailable`` when it does not."""
        async with self.connection() as tx:
            await tx.execute("SELECT 1")

    # ── connections ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _checkout(self, within_s: float | None = None) -> Tx:
        timeout_s = self._checkout_timeout_s if within_s is None else min(within_s, self._checkout_timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                # In slices: whoever queued before the outage was known hears of it too.
                connection = await self._pool.getconn(timeout=max(0.001, min(left_s, AWAY_WAIT_S)))
            except psycopg_pool.PoolTimeout as error:
                if self._away:
                    raise Unavailable("the database is away") from error
                if left_s > AWAY_WAIT_S:
                    continue
                raise Unavailable(f"no database connection was free within {timeout_s:g} s") from error
            except psycopg_pool.PoolClosed as error:
                raise Unavailable("the connections to the database are closed") from error
            if self._made_in.get(connection) != self._generation:
                await connection.close()
                await self._pool.putconn(connection)
                continue
            if not _has_unread_words(connection):
                return connection
            # Either a notice, or the server's goodbye. The pool's own check would sleep a second for each dead
            # connection it meets; this drops all of them at the first.
            try:
                await connection.execute("")
            except psycopg.Error:
                await self._pool.putconn(connection)
                await self._pool.check()
            except BaseException:
                await self._pool.putconn(connection)
                raise
            else:
                return connection

    def _connect_arguments(self) -> dict[str, object]:
        arguments: dict[str, object] = {
            "autocommit": True,
            "application_name": f"farebox {self.name}",
            "connect_timeout": 5,
            # A server that vanished without a word (a pulled cable) is given up after ten seconds.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        }
        if self._transaction_pooler:
            arguments["prepare_threshold"] = None
        else:
            given = conninfo_to_dict(self.url).get("options") or ""
            timeout_ms = int(self._statement_timeout_s * 1000)
            arguments["options"] = f"-c TimeZone=UTC -c statement_timeout={timeout_ms} {given}".strip()
        return arguments

    async def _configure(self, connection: Tx) -> None:
        self._made_in[connection] = self._generation
        if self._transaction_pooler:
            await connection.execute("SET TimeZone = 'UTC'")  # one of the settings that poolers do carry over

    async def _first_connection(self, open_timeout_s: float) -> None:
        deadline = time.monotonic() + open_timeout_s
        while True:
            try:
                await self._knock()
            except psycopg.OperationalError as error:
                if time.monotonic() + PROBE_EVERY_S > deadline:
                    raise Unavailable(f"cannot reach the database: {_one_line(error)}") from error
                await asyncio.sleep(PROBE_EVERY_S)
            else:
                return

    async def _knock(self) -> None:
        """Connect once, outside the pool."""
        connection = await psycopg.AsyncConnection.connect(self.url, **self._connect_arguments())  # type: ignore[arg-type]
        await connection.close()

    async def _went_away(self, _pool: object) -> None:
        if not self._away:
            self._away = True
            _log.warning("the database is away (%s)", self.name)
        if not self._closing and (self._probe is None or self._probe.done()):
            self._probe = asyncio.create_task(self._probing(), name=f"database {self.name} probe")

    async def _probing(self) -> None:
        """Knock until somebody opens; then let the pool, which may have given up all it had, grow again."""
        while self._away:
            await asyncio.sleep(PROBE_EVERY_S)
            with contextlib.suppress(psycopg.Error, OSError):
                await self._knock()
                self._away = False
                _log.info("the database is back (%s)", self.name)
                await self._pool.check()

    def _whose_fault(self, error: psycopg.Error, connection: Tx) -> Exception:
        """The world's (the server is gone, going, full, read-only, or gave up on a statement) or the statement's own."""
        if (
            isinstance(error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction)
            or connection.closed
        ):
            return Unavailable(f"the database did not answer: {_one_line(error)}")
        return error


@contextmanager
def answering(connection: Tx, within_s: float) -> Iterator[None]:
    """In this block the server answers within ``within_s``, or it is hung up on and the block raises the driver's
    ``OperationalError``. No goodbye is waited for: a connection whose packets are dropped on the way never says one."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def judge() -> None:
        timers.append(loop.call_later(GRACE_S, hang_up, connection))

    timers.append(loop.call_later(max(0.0, within_s - GRACE_S), judge))
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def hang_up(connection: Tx) -> None:
    """Shut the socket down on our side: whatever waits on the connection fails at once, as if the server had closed it."""
    if connection.closed:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _has_unread_words(connection: Tx) -> bool:
    """Whether bytes (or the end) wait on an idle connection's socket: one poll(2), no round trip."""
    if connection.closed:
        return True
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
