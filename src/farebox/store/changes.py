"""Change notices: who writes says what changed, who caches hears of it once the writer has committed.

A notice is a hint, never the truth: it may be missed while the connection is down. So whoever listens is told of every
opening of the channel (drop what was cached), of its loss, and while it is open once a second up to which moment nothing
was missed. A connection that was cut without a word is found out within ``SILENCE_S_MAX``. A notice carries only a kind
and an id.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal, LiteralString

import psycopg

from farebox.base.errors import Unavailable
from farebox.store.pool import Tx, answering

Kind = Literal["catalog", "key", "grant", "clock", "lease"]
OnChange = Callable[[str, str], Awaitable[None] | None]
OnReconnect = Callable[[], Awaitable[None] | None]

CHANNEL: Final = "farebox_change"

#: The server is asked this often whether it still listens for us, and has this long to answer.
ASK_EVERY_S: Final = 1.0
ANSWER_S: Final = 2.0
#: A channel that carries nothing any more is given up after this long at most, without a word from anybody.
SILENCE_S_MAX: Final = ASK_EVERY_S + ANSWER_S
RECONNECT_EVERY_S: Final = 0.25
CONNECT_TIMEOUT_S: Final = 2

_log = logging.getLogger(__name__)

# Delivered at commit, and not at all on rollback.
ANNOUNCE: LiteralString = "SELECT pg_notify('farebox_change', %(notice)s)"


async def announce(tx: Tx, kind: Kind, id: str) -> None:
    """Tell every process that ``id`` changed, when and only when this transaction commits."""
    await tx.execute(ANNOUNCE, {"notice": f"{kind}:{id}"})


# Answered by the session that listens; behind a transaction pooler it is soon another one's answer. What was committed
# before the question is delivered before the answer: the server sends notices before it says that it is ready again.
_STILL_LISTENING: LiteralString = "SELECT 1 FROM pg_listening_channels() AS c WHERE c = 'farebox_change'"


class _NotListening(Exception):
    """The session that answers is not the one that listens."""


class Listener:
    """One per process, on a direct connection (a transaction pooler does not carry LISTEN).

    ``on_change(kind, id)`` runs for each notice, in order. ``on_reconnect()`` runs each time the channel has been
    opened, the first time included: whatever was cached before may be stale. Both may be plain or async functions; an
    error in them is logged and does not end the listening. Later notices wait for an async one: where they must not,
    give a plain one.

    ``on_lost()`` runs when a channel that was open is lost; ``on_confirmed(as_of)`` about once a second while it is
    open: every change committed before ``as_of`` (``time.monotonic``) has been given to ``on_change``.
    """

    def __init__(
        self,
        url: str,
        on_change: OnChange,
        on_reconnect: OnReconnect,
        *,
        on_lost: Callable[[], None] = lambda: None,
        on_confirmed: Callable[[float], None] = lambda as_of: None,
    ) -> None:
        self._url = url
        self._on_change = on_change
        self._on_reconnect = on_reconnect
        self._on_lost = on_lost
        self._on_confirmed = on_confirmed
        self._heard = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float = 10.0) -> None:
        """Return when the channel is open; ``Unavailable`` after ``timeout_s`` (and then nothing is left running)."""
        self._task = asyncio.create_task(self._listen_forever(), name="change listener")
        try:
            await asyncio.wait_for(self._heard.wait(), timeout_s)
        except TimeoutError as error:
            await self.close()
            raise Unavailable("cannot listen for changes: the database is away") from error

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def connected(self) -> bool:
        """Whether notices are being heard now."""
        return self._heard.is_set()

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except (psycopg.Error, OSError, TimeoutError) as error:
                _log.warning("the change listener lost its connection: %s", " ".join(str(error).split()))
            except _NotListening:
                _log.error(
                    "what answers is not the session that listens: a transaction pooler stands between; "
                    "set FAREBOX_DATABASE_DIRECT_URL to the server itself"
                )
            if self._heard.is_set():
                self._heard.clear()
                self._on_lost()
            await asyncio.sleep(RECONNECT_EVERY_S)

    async def _listen(self) -> None:
        connection = await psycopg.AsyncConnection.connect(
            self._url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name="farebox listener",
        )
        try:
            with answering(connection, ANSWER_S):
                await connection.execute(f"LISTEN {CHANNEL}")
            listening_since = time.monotonic()
            await self._call(self._on_reconnect)
            self._on_confirmed(listening_since)
            self._heard.set()
            while True:
                async for notice in connection.notifies(timeout=ASK_EVERY_S):
                    await self._hear(notice)
                await self._ask(connection)
        finally:
            await connection.close()  # at once: no goodbye is waited for

    async def _ask(self, connection: Tx) -> None:
        asked_at = time.monotonic()
        with answering(connection, ANSWER_S):
            answer = await (await connection.execute(_STILL_LISTENING)).fetchone()
        if answer is None:
            raise _NotListening
        # What came with the answer is kept by the driver until somebody looks.
        async for notice in connection.notifies(timeout=0):
            await self._hear(notice)
        self._on_confirmed(asked_at)

    async def _hear(self, notice: psycopg.Notify) -> None:
        kind, _, changed = notice.payload.partition(":")
        await self._call(self._on_change, kind, changed)

    async def _call(self, listener: Callable[..., Awaitable[None] | None], *what: str) -> None:
        try:
            outcome = listener(*what)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception:  # noqa: BLE001 - the owner's fault must not stop later notices; it is logged in full
            _log.exception("a change notice was not taken in")
