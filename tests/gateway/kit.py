"""A conversation kit: bytes in, bytes out, against a real gateway, a real upstream and a real door on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import h11

from farebox.app.admission import Admitted, Call, Decision, Door
from farebox.domain.access import GatewayCatalog, Match, Rewrite, Route, ServerSettings, Upstream
from farebox.gateway.server import Gateway
from farebox.gateway.settings import GatewaySettings

#: Waits short enough for tests, long enough for a busy machine.
QUICK = GatewaySettings(
    head_timeout_s=0.5,
    idle_timeout_s=1.0,
    body_stall_timeout_s=0.5,
    write_stall_timeout_s=1.0,
    linger_s=0.3,
    connect_timeout_s=1.0,
    upstream_stall_timeout_s=1.0,
    tick_s=0.02,
)
PATIENT = GatewaySettings(tick_s=0.05, linger_s=0.3)


@dataclass
class Finish:
    """What the door was told at the end of a call."""

    request_id: str
    status: int
    bytes_up: int
    bytes_down: int


class OpenDoor:
    """A door that lets everyone through and remembers how it ended. ``decide`` may say otherwise for a call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.let_in: list[str] = []
        self.finished: list[Finish] = []
        self.binds_bodies = False
        self.decide: Callable[[Call], Decision | Awaitable[Decision]] = self.admitted

    def needs_body(self, call: Call) -> bool:
        return self.binds_bodies

    def admit(self, call: Call) -> Decision | Awaitable[Decision]:
        self.calls.append(call)
        return self.decide(call)

    def admitted(self, call: Call, **more: Any) -> Admitted:
        """The plain yes; ``more`` are other fields of Admitted."""
        self.let_in.append(call.request_id)

        def finish(status: int, bytes_up: int, bytes_down: int) -> None:
            self.finished.append(Finish(call.request_id, status, bytes_up, bytes_down))

        plain = Admitted(
            "account",
            [(b"Farebox-Request-Id", call.request_id.encode()), (b"Farebox-Customer", b"acme")],
            [],
            finish,
        )
        return replace(plain, **more)


@dataclass
class Heard:
    """One request as the upstream got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    connection: int = 0

    def all(self, name: str) -> list[str]:
        return [v for k, v in self.headers if k.lower() == name.lower()]

    def one(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, f"{name} arrived {len(values)} times"
        return values[0] if values else None


Answering = Callable[[Heard, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def says_hello(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The plain answer: the target and the size of the body as text."""
    body = f"{heard.method} {heard.target} {len(heard.body)}".encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body))
    if heard.method != "HEAD":
        writer.write(body)


class RealUpstream:
    """An HTTP/1.1 server that records what it hears. ``answer`` speaks; ``reads_bodies`` False leaves the body to it."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.answer: Answering = says_hello
        self.reads_bodies = True
        self.connections = 0
        self.open = 0
        self.port = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while True:
                heard = await read_request(reader, self.reads_bodies)
                heard.connection = number
                self.heard.append(heard)
                await self.answer(heard, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


async def read_request(reader: asyncio.StreamReader, with_body: bool = True) -> Heard:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = [(k, v.strip()) for k, _, v in (line.partition(":") for line in lines[1:] if line)]
    heard = Heard(method, target, headers)
    if with_body:
        heard.body = await read_body(heard, reader)
    return heard


async def read_body(heard: Heard, reader: asyncio.StreamReader) -> bytes:
    if heard.one("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readline() == b"\r\n"
        return body
    return await reader.readexactly(int(heard.one("content-length") or 0))


@dataclass
class Said:
    """One answer as the client got it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


class Answers:
    """Reads answers with h11, so that the gateway's own reader does not mark its own homework."""

    def __init__(self, methods: Sequence[str] = ()) -> None:
        self.said: list[Said] = []
        self.interim: list[Said] = []
        self._methods = list(methods)
        self._talk = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        self._ask()

    def _ask(self) -> None:
        method = self._methods.pop(0) if self._methods else "GET"
        self._talk.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        self._talk.send(h11.EndOfMessage())

    def feed(self, data: bytes) -> None:
        """What was received; nothing means the end. A broken answer stays ``whole`` False."""
        self._talk.receive_data(data)
        while True:
            if self._talk.their_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
                assert not self._talk.trailing_data[0], "bytes after the last answer"
                return
            try:
                event = self._talk.next_event()
            except h11.RemoteProtocolError:
                assert not data, "a malformed answer"
                return
            match event:
                case h11.InformationalResponse():
                    self.interim.append(_said(event))
                case h11.Response():
                    self.said.append(_said(event))
                case h11.Data():
                    self.said[-1].body += event.data
                case h11.EndOfMessage():
                    self.said[-1].whole = True
                    if self._talk.their_state is h11.DONE:
                        self._talk.start_next_cycle()
                        self._ask()
                case _:
                    return


def _said(event: h11.Response | h11.InformationalResponse) -> Said:
    said = Said(event.status_code)
    for name, value in event.headers:
        key = name.decode().lower()
        assert key not in said.headers or key == "set-cookie", f"{key} was said twice"
        said.headers[key] = value.decode("latin-1")
    return said


@dataclass
class House:
    """A gateway in front of an upstream."""

    gateway: Gateway
    door: OpenDoor
    upstream: RealUpstream
    port: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)

    async def says(
        self, *pieces: bytes, pause_s: float = 0.0, methods: Sequence[str] = (), timeout_s: float = 10.0
    ) -> Answers:
        """Send pieces, close our side only when the gateway has closed or an answer to each expected request is whole."""
        reader, writer = await self.connect()
        answers = Answers(methods)
        expected = len(methods)
        try:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
            async with asyncio.timeout(timeout_s):
                while not (expected and sum(s.whole for s in answers.said) >= expected):
                    data = await reader.read(1 << 16)
                    answers.feed(data)
                    if not data:
                        break
        finally:
            writer.close()
        return answers

    async def get(self, path: str = "/", method: str = "GET", body: bytes = b"", **headers: str) -> Said:
        """One plain request on a connection of its own."""
        lines = [f"{method} {path} HTTP/1.1", "Host: api.example.com"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        answers = await self.says("\r\n".join([*lines, "", ""]).encode() + body, methods=[method])
        return answers.said[0]


def catalog(
    *urls: str,
    routes: Sequence[Route] | None = None,
    trusted_proxies: tuple[str, ...] = (),
    timeout_s: float = 5.0,
) -> GatewayCatalog:
    upstreams = tuple(Upstream(f"up{n}", url, timeout_s=timeout_s) for n, url in enumerate(urls))
    taken = tuple(routes) if routes is not None else (Route("all", Match("/{*rest}"), "up0"),)
    return GatewayCatalog(1, upstreams, taken, server=ServerSettings(trusted_proxies=trusted_proxies))


def setting_headers(*pairs: tuple[str, str]) -> Rewrite:
    return Rewrite(set_headers=pairs)


def listening() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    return sock


@contextlib.asynccontextmanager
async def open_house(
    settings: GatewaySettings = PATIENT,
    routes: Sequence[Route] | None = None,
    trusted_proxies: tuple[str, ...] = (),
    site: Any = None,
    timeout_s: float = 5.0,
    door: Door | None = None,
    **more: Any,
) -> AsyncIterator[House]:
    """``door`` stands in for the open one, which then sees no call. ``timeout_s``: the upstream's."""
    upstream = RealUpstream()
    await upstream.start()
    open_door = OpenDoor()
    served = catalog(upstream.url, routes=routes, trusted_proxies=trusted_proxies, timeout_s=timeout_s)
    gateway = Gateway(door or open_door, site, served, settings, **more)
    sock = listening()
    port = sock.getsockname()[1]
    await gateway.serve(sock)
    try:
        yield House(gateway, open_door, upstream, port)
    finally:
        await gateway.drain(0.5)
        await upstream.stop()
