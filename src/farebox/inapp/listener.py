"""Keep-alive connections to a gateway's forward-auth listener: one question at a time on each, all within a time."""

from __future__ import annotations

import asyncio
from typing import cast

from farebox.inapp.questions import HEAD_BYTES_MAX, HEAD_END, Said, read_head


class Away(Exception):
    """The listener was not reached, did not answer in time, or too many questions wait for it already."""


class Listener:
    """The connections of one event loop. ``timeout_s`` is for the whole question: waiting for a connection, making one,
    the answer. Of more than ``connections_max`` questions at once, ``waiting_max`` wait; the rest is turned away."""

    def __init__(
        self, host: str, port: int, *, timeout_s: float, connections_max: int, waiting_max: int
    ) -> None:
        self._host = host
        self._port = port
        self._timeout_s = timeout_s
        self._questions_max = connections_max + waiting_max
        self._free = asyncio.Semaphore(connections_max)
        self._idle: list[_Connection] = []
        self._questions = 0

    async def ask(self, question: bytes) -> Said:
        """The answer, or ``Away``. A question that an idle connection took to its grave is asked once more: the listener
        closes those without reading on, when it ends or when nobody asked for long."""
        if self._questions >= self._questions_max:
            raise Away(f"{self._questions} questions wait for the listener")
        self._questions += 1
        try:
            async with asyncio.timeout(self._timeout_s), self._free:
                kept = self._take_idle()
                if kept is not None:
                    try:
                        return await self._ask(kept, question)
                    except _Unanswered:
                        pass
                return await self._ask(await self._connect(), question)
        except TimeoutError:
            raise Away(f"no answer within {self._timeout_s:g} s") from None
        except (OSError, ValueError) as exc:
            raise Away(f"{type(exc).__name__}: {exc}") from None
        finally:
            self._questions -= 1

    def close(self) -> None:
        """Idle connections end; one that is asking ends with its answer."""
        self._questions_max = 0
        while self._idle:
            self._idle.pop().abort()

    async def _ask(self, connection: _Connection, question: bytes) -> Said:
        try:
            said = await connection.ask(question)
        except BaseException:
            connection.abort()  # whatever it still says belongs to this question
            raise
        if said.keeps_alive and self._questions_max:
            self._idle.append(connection)
        else:
            connection.abort()
        return said

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            _Connection, self._host, self._port
        )
        return connection


class _Unanswered(ConnectionError):
    """The connection ended before a byte of the answer."""


class _Connection(asyncio.Protocol):
    """One connection: a question out, an answer in."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Said] | None = None
        self._inbox = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, question: bytes) -> Said:
        if self._transport is None:
            raise _Unanswered("the connection ended")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(question)
        return await self._answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.abort()  # an answer that nobody asked for
            return
        self._inbox = data = self._inbox + data if self._inbox else data
        end = data.find(HEAD_END)
        if end < 0:
            if len(data) > HEAD_BYTES_MAX:
                self._fail(ValueError("an answer's head without end"))
            return
        try:
            said, length = read_head(data, end)
        except ValueError as exc:
            self._fail(ValueError(f"no answer of a forward-auth listener: {exc}"))
            return
        body = data[end + len(HEAD_END) :]
        if len(body) > length:
            self._fail(ValueError("more than one answer to a question"))
        elif len(body) == length:
            answer, self._answer, self._inbox = self._answer, None, b""
            if not answer.done():
                answer.set_result(said._replace(body=body) if body else said)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(ConnectionError("the listener broke off") if self._inbox else _Unanswered("no answer"))

    def _fail(self, exc: Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(exc)
        self.abort()
