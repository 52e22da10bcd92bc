"""After 101 Switching Protocols: two connections that only pass bytes on, both ways, until one of them is over.

What the bytes mean is between the client and the upstream. A side that has said all is told on to the other (half-close), and
the tunnel is over when both have, when either connection is lost, when nothing moved for ``tunnel_idle_timeout_s``, when a
limit is used up, or when the gateway cuts it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from farebox.app.admission import Flow, Meter
from farebox.gateway.passage import Passage

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection
    from farebox.gateway.server import Gateway
    from farebox.gateway.upstream import UpstreamConnection

#: Why a side is not read for now.
_OTHER_FULL, _PACED = 1, 2


class Tunnel:
    """``ended(code)`` is called once, when it is over, before the connections close; ``bytes_up``/``bytes_down`` stand then."""

    def __init__(
        self,
        gateway: Gateway,
        client: ClientConnection,
        upstream: UpstreamConnection,
        meter: Meter | None,
        ended: Callable[[str | None], None],
    ) -> None:
        self._gateway = gateway
        self._client = client
        self._upstream = upstream
        self._ended = ended
        self._over = False
        self.moved_s = gateway.ticker.now  # when bytes moved last
        self._from_client = _Side(self, meter.upload if meter is not None else None)
        self._from_upstream = _Side(self, meter.download if meter is not None else None)

    @property
    def bytes_up(self) -> int:
        return self._from_client.passed

    @property
    def bytes_down(self) -> int:
        return self._from_upstream.passed

    def begin(self, ahead: bytes) -> None:
        """Take both connections over. ``ahead``: what the upstream said right after its 101."""
        client, upstream = self._from_client, self._from_upstream
        full = self._client.full
        upstream.become(self._upstream.hand_over(upstream), client)
        transport, said = self._client.hand_over(client)
        client.become(transport, upstream)
        if full:
            upstream.hold(_OTHER_FULL)
        self.expire()
        if ahead:
            upstream.data_received(ahead)
        if said and not self._over:
            client.data_received(said)

    def expire(self) -> None:
        """Look at the clock: the client's deadline passed, or the tunnel begins."""
        ends_at = self.moved_s + self._gateway.settings.tunnel_idle_timeout_s
        if ends_at < self._gateway.ticker.now:
            self.cut(None)
        else:
            self._client.deadline = ends_at

    def cut(self, code: str | None) -> None:
        """End it now. What was passed on is still delivered."""
        if self._over:
            return
        self._end(code)
        self._upstream.drop()
        self._client.cut()

    def side_over(self) -> None:
        """One side has said all it had to say."""
        if not self._over and self._from_client.over and self._from_upstream.over:
            self._end(None)
            self._upstream.leave()
            self._client.cut()

    def side_lost(self, side: _Side, exc: Exception | None) -> None:
        """A connection is gone: the other one gets what was passed on, and is closed."""
        begun = not self._over
        if begun:
            self._end(None)
        if side is self._from_client:
            if begun:
                self._upstream.leave()
            self._client.connection_lost(exc)
        else:
            if begun:
                self._client.cut()
            self._upstream.connection_lost(exc)

    def spawn_for(self, side: _Side, flow: Flow) -> Passage:
        return Passage(
            flow,
            onward=side.pass_on,
            hold=lambda: side.hold(_PACED),
            release=lambda: side.release(_PACED),
            cut=self.cut,
            spawn=self._gateway.spawn,
        )

    def _end(self, code: str | None) -> None:
        self._over = True
        for side in (self._from_client, self._from_upstream):
            side.stop()
        self._ended(code)

    @property
    def now_s(self) -> float:
        return self._gateway.ticker.now


class _Side(asyncio.Protocol):
    """What comes from one of the two connections, on its way to the other."""

    __slots__ = ("_held", "_other", "_passage", "_stopped", "_transport", "_tunnel", "over", "passed")

    _transport: asyncio.Transport
    _other: _Side

    def __init__(self, tunnel: Tunnel, flow: Flow | None) -> None:
        self._tunnel = tunnel
        self._passage: Passage | None = None if flow is None else tunnel.spawn_for(self, flow)
        self._held = 0  # _OTHER_FULL | _PACED
        self._stopped = False
        self.passed = 0  # bytes
        self.over = False  # it will say no more, and the other side knows

    def become(self, transport: asyncio.Transport, other: _Side) -> None:
        self._transport = transport
        self._other = other

    def stop(self) -> None:
        self._stopped = True
        if self._passage is not None:
            self._passage.stop()

    # From the event loop

    def data_received(self, data: bytes) -> None:
        if self._stopped:
            return
        if self._passage is None:
            self.pass_on(data, False)
        else:
            self._passage.push(data, False)

    def eof_received(self) -> bool:
        if self._stopped:
            return False
        if self._passage is None:
            self.pass_on(b"", True)
        else:
            self._passage.push(b"", True)
        return not self._stopped and self._transport.can_write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tunnel.side_lost(self, exc)

    def pause_writing(self) -> None:
        self._other.hold(_OTHER_FULL)

    def resume_writing(self) -> None:
        self._tunnel.moved_s = self._tunnel.now_s
        self._other.release(_OTHER_FULL)

    # Within the tunnel

    def pass_on(self, data: bytes, ended: bool) -> None:
        self._tunnel.moved_s = self._tunnel.now_s
        to = self._other._transport
        if data:
            self.passed += len(data)
            to.write(data)
        if ended and not self.over:
            self.over = True
            if not to.can_write_eof():
                to.close()  # TLS knows no half-close: whoever can say no more on it has left
            elif not to.is_closing():
                to.write_eof()
            self._tunnel.side_over()

    def hold(self, why: int) -> None:
        if not self._held and not self._transport.is_closing():
            self._transport.pause_reading()
        self._held |= why

    def release(self, why: int) -> None:
        if not self._held:
            return
        self._held &= ~why
        if not self._held and not self._transport.is_closing():
            self._transport.resume_reading()


def agreed(offered: bytes, taken: bytes) -> bool:
    """Whether an upstream's ``Upgrade`` names only protocols that the client's had."""
    protocols = _protocols(taken)
    return bool(protocols) and protocols <= _protocols(offered)


def _protocols(said: bytes) -> set[bytes]:
    return {p.strip().lower() for p in said.split(b",")} - {b""}


__all__: Final = ["Tunnel", "agreed"]
