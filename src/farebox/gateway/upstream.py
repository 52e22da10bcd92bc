"""A keep-alive connection to one target, and how an answer is read from it. Knows nothing of clients, routes or fares.

A ``Caller`` asks the pool (pools.py) for a connection, sends its request on it and is called back with what comes: the same pool
serves the proxy and any other outbound HTTP/1.1 of the house.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from farebox.gateway.bodies import Body, ChunkedBody, EndlessBody, LengthBody
from farebox.gateway.heads import HEAD_END, AnswerHead, read_answer_head
from farebox.gateway.problems import Fault

if TYPE_CHECKING:
    from farebox.gateway.pools import UpstreamPool

NEVER: Final = float("inf")
_INTERIM_ANSWERS_MAX: Final = 16
_HEAD_KEPT_BYTES_MAX: Final = 1024


class Caller(Protocol):
    """Whoever has a request for an upstream."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A connection is yours: send on it."""

    def not_connected(self, code: str, detail: str) -> None:
        """There will be none."""

    def interim(self, head: AnswerHead) -> None:
        """A 1xx other than 100 and 101."""

    def switches(self, head: AnswerHead) -> bool:
        """Whether this 101 is an answer to what was asked. If so it comes as ``answered``, never with an end, and the
        connection is to be taken over (``hand_over``) or dropped."""

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        """The head, with as much of the body as came with it."""

    def answered_more(self, payload: bytes, ended: bool) -> None:
        """More of the body."""

    def trailed(self, lines: Sequence[bytes]) -> None:
        """The trailers of a chunked answer, when it has some: told right before its end."""

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

    def leave(self) -> None:
        """The caller wants no more of this; what was written still goes out, for as long as it moves."""
        self._caller = None
        self.deadline = self._pool.ticker.now + self._stall_s
        if self._transport is not None:
            self._transport.close()

    def hand_over(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """After a 101: from now on ``protocol`` hears what comes. Told of the connection's loss it tells us."""
        assert self._transport is not None
        self.resume()
        self._caller = None
        self.deadline = NEVER
        self._transport.set_protocol(protocol)
        return self._transport

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
            self._pool.strike("it did not answer in time")
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
                    if body.trailers:
                        caller.trailed(body.trailers)
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
        if not unheard:
            self._pool.strike("it closed a connection before its answer was complete")
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
            if head.status == 101 and caller.switches(head):
                self._reads_head, self._body, self._last = False, EndlessBody(), True
                self.deadline = self._pool.ticker.now + self._stall_s
                caller.answered(head, data[end + 4 :], False)
                return
            if head.status == 101 or self._interims > _INTERIM_ANSWERS_MAX:
                raise Fault("upstream_malformed", "an interim answer that was not asked for")
            if head.status != 100:
                caller.interim(head)
            data = data[end + 4 :]
            if not data:
                return

        if self._pool.health.shaky:
            self._pool.heard()
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
            if ended and self._body.trailers:
                caller.trailed(self._body.trailers)
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
            self._pool.strike("its answer was malformed")
            caller.failed("upstream_malformed", detail, False)
