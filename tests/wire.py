"""A wire to PostgreSQL that a test can cut: a TCP proxy on loopback.

``hush()``  what is connected falls silent, as when a firewall forgets it: no byte passes, nobody is told.
``hold()``  answers wait in the wire until ``release()``; questions pass.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import quote, urlsplit, urlunsplit

from psycopg.conninfo import conninfo_to_dict


class Wire:
    """Made by ``a_wire(url)``; ``url`` is the way through it. ``alter`` changes what clients send."""

    def __init__(self, target: str, alter: Callable[[bytes], bytes] = lambda sent: sent) -> None:
        self._target = {name: str(value) for name, value in conninfo_to_dict(target).items()}
        self._alter = alter
        self._given = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._passing: asyncio.Event = self._fresh()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        parts = urlsplit(self._given)
        user = f"{quote(self._target['user'])}:{quote(self._target.get('password', ''))}"
        self.url = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{port}", query=""))

    def hush(self) -> None:
        """What is connected now never hears another byte; new connections pass."""
        self._passing.clear()
        self._passing = self._fresh()

    def hold(self) -> None:
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _fresh(self) -> asyncio.Event:
        passing = asyncio.Event()
        passing.set()
        return passing

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._target["host"], self._target.get("port", "5432")
        if host.startswith("/"):
            back, forth = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            back, forth = await asyncio.open_connection(host, int(port))
        passing = self._passing
        for work in (
            self._carry(reader, forth, passing, None, self._alter),
            self._carry(back, writer, passing, self._flowing, lambda answer: answer),
        ):
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        passing: asyncio.Event,
        flowing: asyncio.Event | None,
        alter: Callable[[bytes], bytes],
    ) -> None:
        try:
            while data := await reader.read(65536):
                if flowing is not None:
                    await flowing.wait()
                await passing.wait()
                writer.write(alter(data))
                await writer.drain()
            await passing.wait()
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                writer.close()


@asynccontextmanager
async def a_wire(url: str, alter: Callable[[bytes], bytes] = lambda sent: sent) -> AsyncIterator[Wire]:
    wire = Wire(url, alter)
    await wire.open()
    try:
        yield wire
    finally:
        await wire.close()
