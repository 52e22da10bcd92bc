"""A client's TCP connection as such: written to, not read for now, and closed so that the client can read what was said last.

What is said on it is connection.py's business.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from farebox.gateway.forwarding import Forwarded, lines_for_stranger
from farebox.gateway.upstream import NEVER

if TYPE_CHECKING:
    from farebox.gateway.server import Gateway

#: Why the socket is not read for now: too much came ahead, the upstream takes no more, a limit paces.
AHEAD, UPLOAD, PACED = 1, 2, 4

#: What a client may still send while we linger.
_LINGER_BYTES_MAX: Final = 1024 * 1024


class ClientSocket(asyncio.Protocol):
    """``deadline`` is on the gateway's ticker; ``_transport`` becomes None when the connection is gone."""

    __slots__ = (
        "_full", "_gateway", "_held", "_settings", "_taken_off", "_transport", "_unflushed", "deadline", "forwarded_lines", "peer", "trusted",
    )  # fmt: skip

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._settings = gateway.settings
        self._transport: asyncio.Transport | None = None
        self._held = 0  # AHEAD | UPLOAD | PACED
        self._taken_off = 0  # bytes read only to be rid of them
        self._full = False  # the client does not keep up with its answer
        self._unflushed = 0  # what it had not taken when we last looked
        self.deadline = NEVER

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gateway = self._gateway
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(self._settings.write_buffer_bytes)
        name = transport.get_extra_info("peername")
        self.peer = name[0].removeprefix("::ffff:") if isinstance(name, tuple) and name else ""
        self.trusted = self.peer in gateway.trusted_proxies
        self.forwarded_lines = lines_for_stranger(self.peer)

    def address(self, forwarded: Forwarded) -> str:
        """The client's: the peer's, or what a trusted one says in these header lines."""
        return self._gateway.trusted_proxies.client_of(self.peer, forwarded) if self.trusted else self.peer

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def full(self) -> bool:
        """The client does not keep up with what is written."""
        return self._full

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._full = True
            self._unflushed = self._transport.get_write_buffer_size()
            self.deadline = self._gateway.ticker.now + self._settings.write_stall_timeout_s

    def _still_takes(self, transport: asyncio.Transport) -> bool:
        """Whether a client that does not keep up has taken anything since we last looked; if so it gets as long again."""
        left = transport.get_write_buffer_size()
        if left >= self._unflushed:
            return False
        self._unflushed = left
        self.deadline = self._gateway.ticker.now + self._settings.write_stall_timeout_s
        return True

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hold(self, why: int) -> None:
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._held |= why

    def _release(self, why: int) -> None:
        if not self._held:
            return
        self._held &= ~why
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _linger(self, transport: asyncio.Transport) -> None:
        """Say that we have said all, and let the client finish: were the connection closed while it still sends, the reset
        could take our last words from it."""
        self._taken_off = 0
        self.deadline = self._gateway.ticker.now + self._settings.linger_s
        self._release(AHEAD | UPLOAD | PACED)
        if transport.can_write_eof():
            transport.write_eof()

    def _linger_on(self, size: int) -> None:
        """So much came while we linger."""
        self._taken_off += size
        if self._taken_off > _LINGER_BYTES_MAX:
            self.abort()

    def _close_written(self, transport: asyncio.Transport) -> None:
        """Close once everything written has gone out."""
        self.deadline = self._gateway.ticker.now + self._settings.write_stall_timeout_s
        self._unflushed, self._full = transport.get_write_buffer_size(), True
        transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()
