"""A stage for conversations: a real gateway between connections in memory, on a clock that moves when a script says so.

Nothing here is a socket and nothing waits, so thousands of conversations run in a second, and each runs twice in the same way.
``StageLoop`` takes the place of the network: what the gateway opens or accepts is a ``Wire`` (the transport it holds), and the
script holds its other ``End``. A ``Wire`` follows uvloop's rules: data comes while reading is not paused, an end of the
stream is answered by ``eof_received``, ``close`` sends what is left first, ``abort`` does not, and nothing may be written on
a connection that was reported lost.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import structlog.testing

from farebox.domain.access import GatewayCatalog
from farebox.gateway.server import Gateway
from farebox.gateway.settings import GatewaySettings
from tests.gateway.kit import OpenDoor, catalog

T = TypeVar("T")

#: The upstream of every plain conversation, and the address its clients come from.
UPSTREAM_URL: Final = "http://up.example"
CLIENT_ADDRESS: Final = "203.0.113.7"

_READ_BYTES_MAX: Final = 256 * 1024  # uvloop's
_LEAVES_S: Final = 2.0  # longer than any decision of a test takes
_TURNS_MAX: Final = 1_000_000  # of the loop within one step of a script


class _NoSelector(selectors.SelectSelector):
    """Asked for events when nothing is ready: then either time passes or the step is over."""

    idle: Callable[[float | None], None]

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > 0:
            self.idle(timeout)
        return []


class StageLoop(asyncio.SelectorEventLoop):
    """An event loop whose network is the stage it stands on and whose clock is a number."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._until = self.now
        self._turns = 0
        self.stage: Stage | None = None
        selector = _NoSelector()
        selector.idle = self._idle
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def settle(self, seconds: float = 0.0) -> None:
        """Run until nothing is left to do before ``seconds`` from now."""
        self._turns = 0
        self._until = self.now + seconds
        self.run_forever()
        if seconds:
            self.run_forever()  # what the last moment set off

    def finish(self, work: Coroutine[Any, Any, T], seconds_max: float = 1000.0) -> T:
        self._turns = 0
        self._until = self.now + seconds_max
        return self.run_until_complete(work)

    def _idle(self, timeout: float | None) -> None:
        if timeout is None or self.now + timeout > self._until:
            self.now = self._until
            self.stop()
        else:
            self.now += timeout
            self._turns += 1
            assert self._turns < _TURNS_MAX, "the gateway never comes to rest"

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **more: Any
    ) -> Any:
        assert self.stage is not None
        return await self.stage.take_connection(protocol_factory, host, port)

    async def create_server(self, protocol_factory: Any, *args: Any, **more: Any) -> Any:
        assert self.stage is not None
        return self.stage.take_server(protocol_factory)


class Wire(asyncio.Transport):
    """A connection as the gateway holds it."""

    def __init__(self, loop: StageLoop, protocol: Any, address: str) -> None:
        super().__init__()
        self.loop = loop
        self.protocol = protocol
        self.address = address
        self.end = End(self)
        self.reading = True
        self.closing = False
        self.lost = False
        self.reads_at_most = _READ_BYTES_MAX
        self._losing = False
        self._unsent = bytearray()
        self._high = 64 * 1024
        self._paused_protocol = False
        self._wrote_eof = False
        self._arriving = bytearray()
        self._eof_arriving = False
        self._reset_arriving = False

    # What the gateway calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.address, 1) if name == "peername" else default

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._must_live()
        assert isinstance(data, (bytes, bytearray)), type(data)
        if self._wrote_eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._losing or not data:
            self.end.rested |= bool(data)
            return
        if self.end.gone:
            self.end.rested = True
            self.loop.call_soon(self._lose, ConnectionResetError())
            return
        self._unsent += data
        self._send()
        if not self._paused_protocol and len(self._unsent) > self._high:
            self._paused_protocol = True
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        self._must_live()
        self._wrote_eof = True
        self._send()

    def close(self) -> None:
        if self.closing:
            return
        self.closing = True
        self.reading = False
        self._send()

    def abort(self) -> None:
        if self._losing:
            return
        self.closing = self._losing = True
        self.reading = False
        self._unsent.clear()
        self.loop.call_soon(self._lose, None)

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self._must_live()
        self.reading = False

    def resume_reading(self) -> None:
        self._must_live()
        if not self.reading and not self.closing:
            self.reading = True
            self.loop.call_soon(self._deliver)

    def _must_live(self) -> None:
        if self.lost:
            raise RuntimeError("unable to perform operation; the handler is closed")

    # What the script sets off

    def arrive(self, data: bytes) -> None:
        self._arriving += data
        self._deliver()

    def arrive_end(self) -> None:
        self._eof_arriving = True
        if self.end.gone and self._unsent:
            self._reset_arriving = True
            self._lose(ConnectionResetError())  # what is written finds nobody
        self._deliver()

    def arrive_reset(self) -> None:
        self._reset_arriving = True
        if self._unsent:
            self._lose(ConnectionResetError())
        self._deliver()

    def take_on(self) -> None:
        self._send()

    def _deliver(self) -> None:
        while self.reading and self._arriving and not self._reset_arriving:
            data = bytes(self._arriving[: self.reads_at_most])
            del self._arriving[: len(data)]
            self.protocol.data_received(data)
        if not self.reading:
            return
        if self._reset_arriving:
            self._lose(ConnectionResetError())
        elif self._eof_arriving:
            self._eof_arriving = False
            if not self.protocol.eof_received():
                self.close()

    def _send(self) -> None:
        if self.end.taking:
            self.end.received += self._unsent
            self._unsent.clear()
            if self._paused_protocol and not self.lost:
                self._paused_protocol = False
                self.protocol.resume_writing()
        if self._unsent:
            return
        if self._wrote_eof:
            self.end.ended = True
        if self.closing and not self._losing:
            self._losing = True
            self.loop.call_soon(self._lose, None)

    def _lose(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = self.closing = self._losing = True
        self.reading = False
        self.end.ended = self.end.closed = True
        self.protocol.connection_lost(exc)


class End:
    """The other end of a connection: the client's, or the upstream's. Each call is one act of a script."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.received = bytearray()  # all of it, in order
        self.heard = 0  # so much of it a script has looked at
        self.ended = False  # the gateway sends no more
        self.closed = False  # the connection is gone
        self.gone = False  # we are
        self.taking = True
        self.said_all = False
        self.rested = False  # it did not take everything at once

    def _act(self, act: Callable[..., None], *args: Any) -> None:
        self._wire.loop.call_soon(act, *args)
        self._wire.loop.settle()

    def sends(self, data: bytes) -> None:
        if not self._wire.lost and not self.said_all:
            self._act(self._wire.arrive, data)

    def half_closes(self) -> None:
        """Says no more, and listens on."""
        if not self._wire.lost:
            self.said_all = True
            self._act(self._wire.arrive_end)

    def closes(self) -> None:
        """Leaves in good order."""
        if not self._wire.lost:
            self.gone = True
            self._act(self._wire.arrive_end)

    def resets(self) -> None:
        if not self._wire.lost:
            self.gone = True
            self._act(self._wire.arrive_reset)

    def stops_taking(self) -> None:
        self.taking = False
        self.rested = True

    def takes_on(self) -> None:
        self.taking = True
        if not self._wire.lost:
            self._act(self._wire.take_on)

    @property
    def unsent(self) -> int:
        """Bytes the gateway holds for us."""
        return self._wire.get_write_buffer_size()

    def unheard(self) -> bytes:
        """What came since the last look."""
        data = bytes(self.received[self.heard :])
        self.heard = len(self.received)
        return data


class _Server:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def close(self) -> None:
        self._stage.accepts = False


_loop: StageLoop | None = None


class Stage:
    """A gateway, the clients that connect to it, and the connections it opens to its upstreams, in that order."""

    def __init__(
        self,
        settings: GatewaySettings | None = None,
        served: GatewayCatalog | None = None,
        door: OpenDoor | None = None,
        site: Any = None,
        trusted_proxies: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        """``more``: of the gateway."""
        global _loop
        if _loop is None:
            _loop = StageLoop()
        self.loop = _loop
        self.loop.stage = self
        self.errors: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.door = door or OpenDoor()
        self.clients: list[End] = []
        self.upstreams: list[End] = []
        self.upstream_urls: list[str] = []  # of each, host:port
        self.upstream_refuses = False
        self.upstream_hangs = False
        self.targets_down: set[str] = set()  # hosts that refuse connections
        self.expected_logs: set[str] = set()  # loud ones that a script provokes
        self.accepts = False
        self._accept: Callable[[], Any] | None = None
        self._logs_kept = structlog.testing.capture_logs()
        self.logs = self._logs_kept.__enter__()
        self.gateway = Gateway(
            self.door,
            site,
            served or catalog(UPSTREAM_URL, trusted_proxies=trusted_proxies),
            settings,
            **more,
        )
        self.loop.finish(self.gateway.serve(None))  # type: ignore[arg-type] - the loop does not ask for one

    # The network

    async def take_connection(self, factory: Callable[[], Any], host: str, port: int) -> tuple[Wire, Any]:
        await asyncio.sleep(0)
        if self.upstream_hangs:
            await self.loop.create_future()
        if self.upstream_refuses or host in self.targets_down:
            raise ConnectionRefusedError
        protocol = factory()
        wire = Wire(self.loop, protocol, "192.0.2.1")
        self.upstreams.append(wire.end)
        self.upstream_urls.append(f"{host}:{port}")
        protocol.connection_made(wire)
        return wire, protocol

    def take_server(self, factory: Callable[[], Any]) -> _Server:
        self._accept = factory
        self.accepts = True
        return _Server(self)

    def connect(self, address: str = CLIENT_ADDRESS) -> End:
        assert self._accept is not None
        assert self.accepts
        protocol = self._accept()
        wire = Wire(self.loop, protocol, address)
        self.clients.append(wire.end)
        wire.end._act(protocol.connection_made, wire)
        return wire.end

    # Time

    def settle(self) -> None:
        self.loop.settle()

    def wait(self, seconds: float) -> None:
        """So much time passes."""
        self.loop.settle(seconds)

    def do(self, act: Callable[[], Any]) -> None:
        """Something of the gateway's own, inside its loop."""
        self.loop.call_soon(act)
        self.loop.settle()

    # The end

    def leave(self) -> None:
        """Everybody goes, the gateway ends, and nothing of any call is left behind. Raises AssertionError for what is."""
        gateway = self.gateway
        try:
            self.check()
            for end in self.clients:
                end.takes_on()
                end.closes()
            for _ in range(3):  # a call that waited, or one behind it, is sent on a fresh connection
                self.wait(_LEAVES_S)
                for end in self.upstreams:
                    end.takes_on()
                    end.closes()
            self.check()
            self.check_empty()
        finally:
            self.loop.finish(gateway.drain(1.0))
            self._logs_kept.__exit__(None, None, None)
        self.check()
        assert not [end for end in [*self.clients, *self.upstreams] if not end.closed], (
            "a connection outlives the gateway"
        )

    def abandon(self) -> None:
        """A script broke off: end without asking for more."""
        self.loop.finish(self.gateway.drain(0.0))
        self._logs_kept.__exit__(None, None, None)

    def check(self) -> None:
        """What must hold at any time."""
        assert not self.errors, self.errors
        loud = [
            entry
            for entry in self.logs
            if entry["log_level"] in ("error", "critical", "exception")
            and entry["event"] not in self.expected_logs
        ]
        assert not loud, loud
        ended = [f.request_id for f in self.door.finished]
        assert len(ended) == len(set(ended)), f"finished twice: {ended}"

    def check_empty(self) -> None:
        """What must hold once everybody has gone."""
        gateway = self.gateway
        assert gateway.counters.connections_open == 0
        assert gateway.buffered_bytes == 0, f"{gateway.buffered_bytes} bytes of bodies are still counted"
        assert not gateway.unattended
        assert not gateway.timed
        assert not gateway._tasks
        assert sorted(self.door.let_in) == sorted(f.request_id for f in self.door.finished), (
            "a call was admitted and never ended"
        )
        open_up = [n for n, end in enumerate(self.upstreams, 1) if not end.closed]
        assert not open_up, f"upstream connections {open_up} are still open"
        for pool in [*gateway.pools.all(), *gateway.pools._retired]:
            assert (pool.connections, pool.in_flight) == (0, 0), f"{pool.url} counts what is not there"
            assert not pool._connecting


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """``data`` cut at these places."""
    places = sorted({c % (len(data) + 1) for c in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a != b]
