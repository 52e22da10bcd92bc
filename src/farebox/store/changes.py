"""Change notices: who writes says what changed, who caches hears of it once the writer has committed.

A notice is a hint, never the truth: it may be missed while the connection is down, so every reconnect is reported and
the listener's owner drops what it cached. A notice carries only a kind and an id.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Literal, LiteralString

import psycopg

from farebox.base.errors import Unavailable
from farebox.store.pool import Tx

Kind = Literal["catalog", "key", "grant", "clock", "lease"]
OnChange = Callable[[str, str], Awaitable[None] | None]
OnReconnect = Callable[[], Awaitable[None] | None]

CHANNEL: Final = "farebox_change"

#: A silent connection is asked for a sign of life this often; one that gives none for as long is dropped.
HEARTBEAT_S: Final = 10.0
RECONNECT_EVERY_S: Final = 0.25

_log = logging.getLogger(__name__)

# Delivered at commit, and not at all on rollback.
ANNOUNCE: LiteralString = "SELECT pg_notify('farebox_change', %(notice)s)"


async def announce(tx: Tx, kind: Kind, id: str) -> None:
    """Tell every process that ``id`` changed, when and only when this transaction commits."""
    await tx.execute(ANNOUNCE, {"notice": f"{kind}:{id}"})


class Listener:
    """One per process, on a direct connection (a transaction pooler does not carry LISTEN).

    ``on_change(kind, id)`` runs for each notice, in order. ``on_reconnect()`` runs each time the channel has been
    opened, the first time included: whatever was cached before may be stale. Both may be plain or async functions; an
    error in them is logged and does not end the listening.
    """

    def __init__(self, url: str, on_change: OnChange, on_reconnect: OnReconnect) -> None:
        self._url = url
        self._on_change = on_change
        self._on_reconnect = on_reconnect
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
            finally:
                self._heard.clear()
            await asyncio.sleep(RECONNECT_EVERY_S)

    async def _listen(self) -> None:
        connection = await psycopg.AsyncConnection.connect(
            self._url, autocommit=True, connect_timeout=5, application_name="farebox listener"
        )
        async with connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            await self._call(self._on_reconnect)
            self._heard.set()
            while True:
                async for notice in connection.notifies(timeout=HEARTBEAT_S):
                    kind, _, changed = notice.payload.partition(":")
                    await self._call(self._on_change, kind, changed)
                await asyncio.wait_for(connection.execute("SELECT 1"), HEARTBEAT_S)

    async def _call(self, listener: Callable[..., Awaitable[None] | None], *what: str) -> None:
        try:
            outcome = listener(*what)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception:  # noqa: BLE001 - the owner's fault must not stop later notices; it is logged in full
            _log.exception("a change notice was not taken in")
