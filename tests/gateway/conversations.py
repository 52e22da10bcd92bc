"""Conversations as scripts: the client sends these bytes, the upstream hears exactly these, answers these, the client sees these.

``Conversation.play`` plays a script whole, byte by byte, and in random pieces, each time on a fresh stage, with the same
outcome: only then does it hold wherever the network cuts. Cut pieces may be framed in other chunks, so those plays compare
what a body says, not how it was chunked; the whole play compares every byte. ``play_on_sockets`` plays it over loopback.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from farebox.domain.access import GatewayCatalog
from farebox.gateway.server import Gateway
from farebox.gateway.settings import GatewaySettings
from tests.gateway.kit import Answers, OpenDoor, Said, catalog, listening
from tests.gateway.stage import CLIENT_ADDRESS, End, Stage, pieces_of

#: Stands for a request id where one is expected.
ID: Final = "req_ID"

_REQUEST_ID: Final = re.compile(rb"req_[0-9a-z]{16}_[0-9a-f]+")
_CHUNKED_HEAD: Final = re.compile(rb"(?i)transfer-encoding: chunked\r\n((?:[^\r\n]+\r\n)*)\r\n")
_RANDOM_PLAYS: Final = 4


def http(*lines: str, body: bytes = b"") -> bytes:
    """A message: its head from these lines, then ``body``."""
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def forwarded(
    request_line: str, *kept: str, framing: str = "", body: bytes = b"", host: str = "api.example"
) -> bytes:
    """A request as the upstream must hear it: ``kept`` lines of the client's, then ours."""
    return http(
        request_line,
        *kept,
        "Host: up.example",
        f"X-Forwarded-For: {CLIENT_ADDRESS}",
        "X-Forwarded-Proto: http",
        f"X-Forwarded-Host: {host}",
        *([framing] if framing else []),
        f"Farebox-Request-Id: {ID}",
        "Farebox-Customer: acme",
        body=body,
    )


def answered(status_line: str, *kept: str, framing: str = "", body: bytes = b"", ends: str = "") -> bytes:
    """An answer as the client must see it: ``kept`` lines of the upstream's, then ours; ``ends`` is the Connection line."""
    ours = [f"Farebox-Request-Id: {ID}", framing, ends]
    return http(status_line, *kept, *(line for line in ours if line), body=body)


def chunks(*payloads: bytes, trailers: bytes = b"", last: bool = True) -> bytes:
    """A chunked body."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in payloads)
    return body + b"0\r\n" + trailers + b"\r\n" if last else body


def get(target: str = "/a") -> bytes:
    """The plainest request."""
    return http(f"GET {target} HTTP/1.1", "Host: api.example")


def ok(body: bytes = b"hi") -> bytes:
    """The plainest answer of an upstream."""
    return http("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", body=body)


def seen(body: bytes = b"hi") -> bytes:
    """The same as a client sees it."""
    return answered("HTTP/1.1 200 OK", framing=f"Content-Length: {len(body)}", body=body)


def with_plain_ids(data: bytes) -> bytes:
    return _REQUEST_ID.sub(ID.encode(), data)


def essence(stream: bytes) -> bytes:
    """The stream with each chunked body made one: what was said, without how it was cut on the way."""
    out: list[bytes] = []
    at = 0
    while head := _CHUNKED_HEAD.search(stream, at):
        payload, end, after = _read_chunks(stream, head.end())
        out.append(stream[at : head.start()])
        if end == b"0\r\n\r\n":
            out.append(b"Content-Length: %d\r\n%b\r\n%b" % (len(payload), head[1], payload))
        else:
            out.append(head[0] + (b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b"") + end)
        at = after
    return b"".join([*out, stream[at:]])


def _read_chunks(stream: bytes, at: int) -> tuple[bytes, bytes, int]:
    """(payload, last chunk with trailers or nothing, where the next message begins) of a chunked body that is well formed."""
    payload = b""
    while size := re.compile(rb"([0-9a-f]+)\r\n").match(stream, at):
        length, begin = int(size[1], 16), size.end()
        if not length:
            end = stream.find(b"\r\n\r\n", begin - 2)
            return (
                (payload, stream[at : end + 4], end + 4) if end >= 0 else (payload, stream[at:], len(stream))
            )
        if stream[begin + length : begin + length + 2] != b"\r\n":
            break
        payload += stream[begin : begin + length]
        at = begin + length + 2
    return payload, b"", at


Cut = Callable[[bytes], list[bytes]]


def _whole(data: bytes) -> list[bytes]:
    return [data]


def _byte_by_byte(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


def _at_random(seed: int) -> Cut:
    rng = random.Random(seed)

    def cut(data: bytes) -> list[bytes]:
        return pieces_of(data, [rng.randrange(len(data)) for _ in range(rng.randrange(1, 6))])

    return cut


@dataclass
class Play:
    """One playing of a script."""

    stage: Stage
    cut: Cut

    @property
    def exact(self) -> bool:
        return self.cut is _whole

    def client(self, number: int) -> End:
        while len(self.stage.clients) < number:
            self.stage.connect()
        return self.stage.clients[number - 1]

    def upstream(self, number: int) -> End:
        opened = self.stage.upstreams
        assert len(opened) >= max(1, number), f"the gateway opened {len(opened)} connections to its upstreams"
        return opened[number - 1] if number else opened[-1]

    def expect(self, who: str, end: End, expected: bytes) -> None:
        got = with_plain_ids(end.unheard())
        if not self.exact:
            got, expected = essence(got), essence(expected)
        assert got == expected, f"{who} got\n{got!r}\nand should have got\n{expected!r}"


Step = Callable[[Play], None]


@dataclass
class Conversation:
    """A script. Each method adds a step; ``play`` plays them in order and then checks that nothing was left over.

    Clients and upstream connections are numbered from 1 in the order in which they connect; an upstream step without a
    number means the connection that was opened last.
    """

    settings: GatewaySettings | None = None
    served: GatewayCatalog | None = None
    trusted_proxies: tuple[str, ...] = ()
    site: Any = None
    set_door: Callable[[OpenDoor], None] | None = None
    steps: list[Step] = field(default_factory=list)
    sent_steps: list[tuple[str, Any]] = field(default_factory=list)  # the same, for sockets
    ended: list[tuple[int, int, int]] | None = None

    # The client

    def client(self, data: bytes, on: int = 1) -> Conversation:
        def step(play: Play) -> None:
            end = play.client(on)
            for piece in play.cut(data):
                end.sends(piece)

        return self._add(step, "client", data)

    def client_connects(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on) and None)

    def client_sees(self, data: bytes, on: int = 1) -> Conversation:
        return self._add(lambda play: play.expect(f"client {on}", play.client(on), data), "client_sees", data)

    def client_is_refused(self, status: int, code: str, on: int = 1, closed: bool = True) -> Conversation:
        """With a problem+json; ``closed``: and the connection ends there."""

        def step(play: Play) -> None:
            end = play.client(on)
            said = read_one(end.unheard())
            check_refusal(said, status, code, closed)
            if closed:
                assert end.ended, "the connection stays open"

        return self._add(step, "client_is_refused", (status, code, closed))

    def client_sees_the_end(self, on: int = 1) -> Conversation:
        def step(play: Play) -> None:
            end = play.client(on)
            assert end.ended, "the connection stays open"
            assert end.heard == len(end.received), end.unheard()

        return self._add(step, "client_sees_the_end")

    def client_is_kept(self, on: int = 1) -> Conversation:
        def step(play: Play) -> None:
            assert not play.client(on).ended, "the connection was closed"

        return self._add(step)

    def client_closes(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on).closes())

    def client_half_closes(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on).half_closes())

    def client_resets(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on).resets())

    def client_stops_taking(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on).stops_taking())

    def client_takes_on(self, on: int = 1) -> Conversation:
        return self._add(lambda play: play.client(on).takes_on())

    # The upstream

    def upstream_hears(self, data: bytes, on: int = 0) -> Conversation:
        return self._add(
            lambda play: play.expect("the upstream", play.upstream(on), data), "upstream_hears", data
        )

    def upstream_hears_nothing(self) -> Conversation:
        """Of anything since the last look, on any connection."""

        def step(play: Play) -> None:
            assert [end.unheard() for end in play.stage.upstreams if end.heard < len(end.received)] == []

        return self._add(step, "upstream_hears_nothing")

    def upstream_hears_no_whole_request(self) -> Conversation:
        """A body was cut before its end: whatever went up is no request, and its connection is gone.

        How much of the head was on its way depends on the cuts; played whole, it is nothing at all.
        """

        def step(play: Play) -> None:
            for end in play.stage.upstreams:
                if end.heard < len(end.received):
                    assert not play.exact, bytes(end.received[end.heard :])
                    assert not whole_requests(end.unheard())
                    assert end.closed, "the upstream still waits for the rest"

        return self._add(step, "upstream_hears_nothing")

    def upstream_connections(self, count: int) -> Conversation:
        def step(play: Play) -> None:
            assert len(play.stage.upstreams) == count

        return self._add(step)

    def upstream(self, data: bytes, on: int = 0) -> Conversation:
        def step(play: Play) -> None:
            end = play.upstream(on)
            for piece in play.cut(data):
                end.sends(piece)

        return self._add(step, "upstream", data)

    def upstream_closes(self, on: int = 0) -> Conversation:
        return self._add(lambda play: play.upstream(on).closes(), "upstream_closes")

    def upstream_resets(self, on: int = 0) -> Conversation:
        return self._add(lambda play: play.upstream(on).resets())

    def upstream_stops_taking(self, on: int = 0) -> Conversation:
        return self._add(lambda play: play.upstream(on).stops_taking())

    def upstream_takes_on(self, on: int = 0) -> Conversation:
        return self._add(lambda play: play.upstream(on).takes_on())

    def upstream_sees_the_end(self, on: int = 0) -> Conversation:
        def step(play: Play) -> None:
            assert play.upstream(on).ended, "the connection stays open"

        return self._add(step)

    def upstream_is_kept(self, on: int = 0) -> Conversation:
        def step(play: Play) -> None:
            assert not play.upstream(on).ended, "the connection was closed"

        return self._add(step)

    # Everything else

    def wait(self, seconds: float) -> Conversation:
        return self._add(lambda play: play.stage.wait(seconds))

    def then(self, act: Callable[[Stage], Any]) -> Conversation:
        """Anything else, done to the stage or asked of it inside the gateway's loop."""
        return self._add(lambda play: play.stage.do(lambda: act(play.stage)))

    def ends(self, *finished: tuple[int, int, int]) -> Conversation:
        """What the door was told, call by call: (status or 0, bytes up, bytes down)."""
        self.ended = list(finished)
        return self

    def _add(self, step: Step, name: str = "", given: Any = None) -> Conversation:
        self.steps.append(step)
        self.sent_steps.append((name, given))
        return self

    # Playing

    def play(self, cuts: bool = True) -> None:
        """``cuts`` False: only whole, for conversations in which the cuts make a difference that is meant."""
        self.play_once(_whole)
        if cuts:
            self.play_once(_byte_by_byte)
            for seed in range(_RANDOM_PLAYS):
                self.play_once(_at_random(seed))

    def play_once(self, cut: Cut) -> None:
        door = OpenDoor()
        if self.set_door is not None:
            self.set_door(door)
        stage = Stage(self.settings, self.served, door, self.site, self.trusted_proxies)
        play = Play(stage, cut)
        try:
            for step in self.steps:
                step(play)
                stage.check()
            for end in [*stage.clients, *stage.upstreams]:
                assert end.heard == len(end.received), f"nobody expected {end.unheard()!r}"
        except BaseException:
            stage.abandon()
            raise
        stage.leave()
        if self.ended is not None:
            assert [(f.status, f.bytes_up, f.bytes_down) for f in door.finished] == self.ended

    async def play_on_sockets(self) -> None:
        """One client and one upstream connection at a time, on loopback. For scripts that only send, expect and close."""
        door = OpenDoor()
        if self.set_door is not None:
            self.set_door(door)
        upstream = _SocketUpstream()
        port = await upstream.start()
        gateway = Gateway(door, self.site, catalog(f"http://127.0.0.1:{port}"), self.settings)
        sock = listening()
        await gateway.serve(sock)
        reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])

        def local(data: bytes) -> bytes:
            data = data.replace(b"Host: up.example", b"Host: 127.0.0.1:%d" % port)
            return data.replace(CLIENT_ADDRESS.encode(), b"127.0.0.1")

        async def takes(read: Callable[[], Awaitable[bytes]], expected: bytes) -> None:
            got = b""
            async with asyncio.timeout(10):
                while essence(with_plain_ids(got)) != essence(expected):
                    data = await read()
                    assert data, f"the connection ended after\n{got!r}\nand should have said\n{expected!r}"
                    got += data

        try:
            for name, given in self.sent_steps:
                match name:
                    case "client":
                        writer.write(given)
                    case "client_sees":
                        await takes(lambda: reader.read(65536), given)
                    case "client_is_refused":
                        status, code, closed = given
                        check_refusal(
                            read_one(await asyncio.wait_for(reader.read(), 10)), status, code, closed
                        )
                    case "client_sees_the_end":
                        assert await asyncio.wait_for(reader.read(), 10) == b""
                    case "upstream_hears":
                        await takes(upstream.read, local(given))
                    case "upstream_hears_nothing":
                        assert upstream.heard.empty()
                    case "upstream":
                        upstream.write(given)
                    case "upstream_closes":
                        upstream.close()
                    case _:
                        raise AssertionError("a step that sockets do not play")
        finally:
            writer.close()
            await gateway.drain(0.5)
            await upstream.stop()


class _SocketUpstream:
    """Takes connections, gives what it hears to the script, and says what the script says."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        while data := await reader.read(65536):
            self.heard.put_nowait(data)

    async def read(self) -> bytes:
        return await self.heard.get()

    def write(self, data: bytes) -> None:
        self._writers[-1].write(data)

    def close(self) -> None:
        self._writers[-1].close()

    async def stop(self) -> None:
        for writer in self._writers:
            writer.close()
        self._server.close()


# Reading what was said


def read_one(data: bytes, method: str = "GET") -> Said:
    """The one answer that stands there, read by h11."""
    answers = Answers([method])
    answers.feed(data)
    answers.feed(b"")
    assert len(answers.said) == 1, data
    assert answers.said[0].whole, data
    return answers.said[0]


def check_refusal(said: Said, status: int, code: str, closed: bool) -> None:
    """A problem+json with this status and code, that says what to do."""
    assert said.status == status, (said.status, said.body)
    assert said.headers["content-type"] == "application/problem+json"
    assert said.headers["cache-control"] == "no-store"
    assert (said.headers.get("connection") == "close") == closed, said.headers
    problem = json.loads(said.body)
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["type"].endswith(code)
    assert problem["title"]
    assert len(problem["detail"]) > 10
    assert problem["request_id"] == said.headers["farebox-request-id"]


@dataclass
class Request:
    """One request as an independent reader takes it from what went up."""

    method: str = ""
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def value(self, name: bytes) -> bytes | None:
        return next((v for k, v in self.headers if k.lower() == name), None)


def whole_requests(data: bytes) -> list[Request]:
    """The whole requests in a stream, as llhttp reads them. Raises AssertionError for one that it does not understand."""
    import httptools

    class Reader:
        def __init__(self) -> None:
            self.whole: list[Request] = []
            self.now = Request()

        def on_message_begin(self) -> None:
            self.now = Request()

        def on_url(self, url: bytes) -> None:
            self.now.target += url

        def on_header(self, name: bytes, value: bytes) -> None:
            self.now.headers.append((name, value))

        def on_headers_complete(self) -> None:
            self.now.method = parser.get_method().decode()

        def on_body(self, body: bytes) -> None:
            self.now.body += body

        def on_message_complete(self) -> None:
            self.whole.append(self.now)

    reader = Reader()
    parser = httptools.HttpRequestParser(reader)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as exc:
        raise AssertionError(f"llhttp does not understand what went up: {exc!r}: {data!r}") from exc
    return reader.whole
