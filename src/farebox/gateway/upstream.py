"""Keep-alive connections to one target, and how an answer is read from them. Knows nothing of clients, routes or fares.

A ``Caller`` asks the pool for a connection, sends its request on it and is called back with what comes: the same pool
serves the proxy and any other outbound HTTP/1.1 of the house.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

from farebox.base.errors import refuse
from farebox.gateway.bodies import Body, ChunkedBody, EndlessBody, LengthBody
from farebox.gateway.fields import FieldBook, answer_fields
from farebox.gateway.heads import HEAD_END, AnswerHead, read_answer_head
from farebox.gateway.problems import Fault
from farebox.gateway.settings import GatewaySettings

NEVER: Final = float("inf")
_INTERIM_ANSWERS_MAX: Final = 16
_HEAD_KEPT_BYTES_MAX: Final = 1024


class Ticker:
    """The time, to the tick: monotonic seconds, moved by whoever owns the loop's timer. Deadlines are compared with it."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0


class Caller(Protocol):
    """Whoever has a request for an upstream."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A connection is yours: send on it."""

    def not_connected(self, code: str, detail: str) -> None:
        """There will be none."""

    def interim(self, head: AnswerHead) -> None:
        """A 1xx other than 100 and 101."""

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        """The head, with as much of the body as came with it."""

    def answered_more(self, payload: bytes, ended: bool) -> None:
        """More of the body."""

    def failed(self, code: str, detail: str, unheard: bool) -> None:
        """No (more) answer. ``unheard``: a reused connection was closed before a byte of the answer, which is what a
        keep-alive connection does that the upstream gave up in the meantime."""

    def upstream_full(self) -> None:
        """Stop sending for now."""

    def upstream_drained(self) -> None:
        """Go on sending."""


class UpstreamConnection(asyncio.Protocol):
    """One connection: idle in the pool, or lent to one caller until its answer has ended."""

    __slots__ = (
        "_body", "_body_of_head", "_caller", "_head", "_inbox", "_interims", "_last", "_paused", "_pool", "_raw_head", "_reads_head", "_stall_s",
        "_transport", "deadline", "idle_since", "request_ended", "reused",
    )  # fmt: skip

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._caller: Caller | None = None
        self._body: Body | None = None
        self._reads_head = True
        self._body_of_head = True  # False for an answer to HEAD
        self._inbox = b""
        self._raw_head = b""  # the last head, and what it was read as
        self._head: AnswerHead | None = None
        self._interims = 0
        self._last = False  # the upstream will close after this answer
        self._paused = False
        self._stall_s = pool.settings.upstream_stall_timeout_s
        self.deadline = NEVER
        self.idle_since = 0.0
        self.reused = False
        self.request_ended = False

    # For the caller

    def send(
        self, caller: Caller, data: bytes, ended: bool, first_byte_timeout_s: float, is_head: bool
    ) -> None:
        """Send a request's head and as much of its body as is there; ``ended`` says that this is all of it."""
        self._caller = caller
        self._body_of_head = not is_head
        self.request_ended = ended
        self.deadline = self._pool.ticker.now + first_byte_timeout_s if ended else NEVER
        self._stall_s = max(first_byte_timeout_s, self._pool.settings.upstream_stall_timeout_s)
        assert self._transport is not None
        self._transport.write(data)

    def send_more(self, data: bytes, ended: bool, first_byte_timeout_s: float) -> None:
        """More of the request's body."""
        if self._transport is None:
            return
        if data:
            self._transport.write(data)
        if ended:
            self.request_ended = True
            self.deadline = self._pool.ticker.now + first_byte_timeout_s

    def pause(self) -> None:
        """Read no further for now; no deadline runs meanwhile."""
        self.deadline = NEVER
        if not self._paused and self.usable:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._caller is not None:
            self.deadline = self._pool.ticker.now + self._stall_s
        if self._paused and self.usable:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()

    def drop(self) -> None:
        """The caller wants no more of this; the connection cannot be used again."""
        self._caller = None
        if self._transport is not None:
            self._transport.abort()

    # For the pool

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def expire(self) -> None:
        """The deadline passed: no first byte, or no further one."""
        caller, self._caller = self._caller, None
        if self._transport is not None:
            self._transport.abort()
        if caller is not None:
            caller.failed("upstream_timeout", "The upstream did not answer in time.", False)

    # From the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(self._pool.settings.write_buffer_bytes)

    def data_received(self, data: bytes) -> None:
        caller = self._caller
        if caller is None:
            # Bytes that nobody asked for: an answer that went past its end, or worse. Never give them to the next caller.
            if self._transport is not None:
                self._transport.abort()
            return
        try:
            if self._reads_head:
                self._read_head(caller, data)
            else:
                body = self._body
                assert body is not None
                payload, ended, rest = body.feed(data)
                if ended:
                    self._give_back(bool(rest))
                else:
                    self.deadline = self._pool.ticker.now + self._stall_s
                caller.answered_more(payload, ended)
        except Fault as fault:
            self._fail(f"The upstream's answer is malformed: {fault.detail}")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)
        caller, self._caller = self._caller, None
        if caller is None:
            return
        if exc is None and isinstance(self._body, EndlessBody):
            caller.answered_more(b"", True)
            return
        unheard = self.reused and self._reads_head and not self._inbox and not self._interims
        caller.failed(
            "upstream_failed", "The upstream closed the connection before its answer was complete.", unheard
        )

    def pause_writing(self) -> None:
        self.deadline = self._pool.ticker.now + self._stall_s
        if self._caller is not None:
            self._caller.upstream_full()

    def resume_writing(self) -> None:
        if not self.request_ended:
            self.deadline = NEVER
        if self._caller is not None:
            self._caller.upstream_drained()

    def _read_head(self, caller: Caller, data: bytes) -> None:
        while True:
            if self._inbox:
                data = self._inbox + data
                self._inbox = b""
            end = data.find(HEAD_END)
            if end < 0:
                if len(data) > self._pool.settings.upstream_head_bytes_max:
                    raise Fault("upstream_malformed", "its head is too long")
                self._inbox = data
                return
            raw = data[:end]
            if raw == self._raw_head and self._head is not None and self._head.current:
                head = self._head  # the same bytes as last time mean the same
            else:
                head = read_answer_head(raw, self._pool.book)
                if end <= _HEAD_KEPT_BYTES_MAX:
                    self._raw_head, self._head = raw, head
            if head.status >= 200:
                break
            self._interims += 1
            if head.status == 101 or self._interims > _INTERIM_ANSWERS_MAX:
                raise Fault("upstream_malformed", "an interim answer that was not asked for")
            if head.status != 100:
                caller.interim(head)
            data = data[end + 4 :]
            if not data:
                return

        rest = data[end + 4 :]
        status = head.status
        self._reads_head = False
        if not self._body_of_head or status == 204 or status == 304 or head.content_length == 0:
            payload, ended = b"", True
        elif head.content_length > 0:
            if len(rest) == head.content_length:
                payload, ended, rest = rest, True, b""
            else:
                self._body = LengthBody(head.content_length)
                payload, ended, rest = self._body.feed(rest)
        else:
            self._body = ChunkedBody() if head.chunked else EndlessBody()
            payload, ended, rest = self._body.feed(rest)
        if ended:
            self._give_back(bool(rest) or not head.keep_alive)
        else:
            self._last = not head.keep_alive
            self.deadline = self._pool.ticker.now + self._stall_s
        caller.answered(head, payload, ended)

    def _give_back(self, spent: bool) -> None:
        """The answer has ended: back into the pool before the caller goes on, so that its next call finds it there."""
        self._caller = None
        self._body = None
        self._reads_head = True
        self._interims = 0
        self.deadline = NEVER
        if (
            spent
            or self._last
            or not self.request_ended
            or self._transport is None
            or self._transport.is_closing()
        ):
            if self._transport is not None:
                self._transport.abort()
            return
        self.reused = True
        self._pool.give_back(self)

    def _fail(self, detail: str) -> None:
        caller, self._caller = self._caller, None
        if self._transport is not None:
            self._transport.abort()
        if caller is not None:
            caller.failed("upstream_malformed", detail, False)


class UpstreamPool:
    """The connections to one target (``http://host:port``), at most ``upstream_connections_max`` of them."""

    def __init__(
        self, url: str, settings: GatewaySettings, ticker: Ticker, book: FieldBook | None = None
    ) -> None:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise refuse("UPSTREAM_URL_MALFORMED", f"{url!r} is not http(s)://host[:port][/path]", "url")
        self.url = url
        self.settings = settings
        self.ticker = ticker
        self.book = book or answer_fields()
        self.host_line = b"Host: " + parts.netloc.encode("idna" if not parts.netloc.isascii() else "ascii")
        self.base_path = parts.path.rstrip("/").encode("ascii")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[UpstreamConnection] = []
        self._all: set[UpstreamConnection] = set()
        self._waiting: deque[tuple[float, Caller]] = deque()  # since when
        self._connecting: set[asyncio.Task[None]] = set()
        self._retired = False

    @property
    def connections(self) -> int:
        return len(self._all)

    def take(self) -> UpstreamConnection | None:
        """An idle connection, the one used last first; None when one must be waited for (``wait``)."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def wait(self, caller: Caller) -> None:
        """Call ``connected`` (or ``not_connected``) as soon as a fresh or returned connection is there."""
        if len(self._waiting) >= self.settings.upstream_waiting_max:
            caller.not_connected("upstream_busy", "Too many calls wait for this upstream.")
            return
        self._waiting.append((self.ticker.now, caller))
        self._connect_for_those_who_wait()

    def leave(self, caller: Caller) -> None:
        """The caller no longer waits."""
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not caller)

    def give_back(self, connection: UpstreamConnection) -> None:
        if self._waiting:
            self._waiting.popleft()[1].connected(connection)
        elif self._retired:
            connection.drop()
        else:
            connection.idle_since = self.ticker.now
            self._idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._connect_for_those_who_wait()

    def tick(self) -> None:
        """Close what was idle for too long and fail what waited for too long."""
        now = self.ticker.now
        for connection in [c for c in self._all if c.deadline < now]:
            connection.expire()
        oldest = now - self.settings.upstream_idle_timeout_s
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).drop()
        while self._waiting and self._waiting[0][0] < now - self.settings.upstream_waiting_timeout_s:
            self._refuse_one("upstream_busy", "All connections to this upstream stayed busy.")

    def retire(self) -> None:
        """No new calls will come: close idle connections now and lent ones when they return."""
        self._retired = True
        while self._idle:
            self._idle.pop().drop()

    def close(self) -> None:
        """Close everything at once."""
        self.retire()
        for task in self._connecting:
            task.cancel()
        for connection in list(self._all):
            connection.expire()

    def _connect_for_those_who_wait(self) -> None:
        while (
            len(self._connecting) < len(self._waiting)
            and len(self._all) + len(self._connecting) < self.settings.upstream_connections_max
        ):
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if not task.cancelled():
            self._connect_for_those_who_wait()

    async def _connect(self) -> None:
        connection = UpstreamConnection(self)
        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                await asyncio.get_running_loop().create_connection(
                    lambda: connection,
                    self._host,
                    self._port,
                    ssl=self._ssl,
                    server_hostname=self._host if self._ssl else None,
                )
        except TimeoutError:
            self._refuse_one("upstream_timeout", "The upstream did not take the connection in time.")
        except (OSError, ssl.SSLError):
            self._refuse_one("upstream_unreachable", "The upstream cannot be reached.")
        else:
            self._all.add(connection)
            if connection.usable:
                self.give_back(connection)

    def _refuse_one(self, code: str, detail: str) -> None:
        if self._waiting:
            self._waiting.popleft()[1].not_connected(code, detail)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a route's calls go, and how long they wait for the first byte of an answer."""

    pool: UpstreamPool
    timeout_s: float
