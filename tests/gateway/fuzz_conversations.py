"""A fuzzer over the gateway's connections: random clients, random upstreams, random cuts, and rules that must hold in all of it.

    .venv/bin/python -m tests.gateway.fuzz_conversations --seconds 600 [--seed N]

A case is a list of acts made from a seed (fuzz_cases.py), and the same list always plays in the same way (stage.py). Every
request carries a tag in its path, its body and the upstream's answer, so that a byte that strays from one exchange into another
is seen. Rules:

* nothing raises and nothing is logged as an error;
* what goes up is read by llhttp as the requests that were sent, each at most once (twice when it was tried again), to the target
  that its route makes of it, with our word on who called and no word of the client's;
* what comes down is HTTP, in the order of the requests, with the tag, status and bytes that the upstream said; an answer that
  broke off, or was cut, is never seen as whole; a whole one was reported to the door with its status and size before;
* after a 101 that was asked for, and only then, bytes pass raw, in order, both ways, and to nobody else;
* each admitted call is closed out once, with the bytes that either end saw pass; what a limit let pass is what passed;
* connections, pools, held bytes, tasks and counters end at zero; buffers stay within their limits.

A failure prints its seed and its acts, made as short as they can be.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import httptools

from farebox.app.admission import Admitted, Answer, Call, Decision, Refusal, Standing
from farebox.domain.access import (
    AnswerRewrite,
    Condition,
    FreeFare,
    GatewayCatalog,
    Match,
    Rewrite,
    Route,
)
from farebox.domain.access import Upstream as UpstreamEntry
from farebox.gateway.problems import refusal
from farebox.gateway.settings import GatewaySettings
from tests.gateway.conversations import http
from tests.gateway.fuzz_cases import (
    PLAIN_MODES,
    SPOILT_ANSWERS,
    SPOILT_CHUNKS,
    SPOILT_HEADS,
    Act,
    case,
)
from tests.gateway.kit import OpenDoor
from tests.gateway.stage import UPSTREAM_URL, End, Stage

#: Limits that random clients reach.
TIGHT: Final = GatewaySettings(
    request_line_bytes_max=300,
    head_bytes_max=1500,
    header_count_max=20,
    body_bytes_max=3000,
    paid_body_bytes_max=1500,
    site_body_bytes_max=500,
    buffered_bytes_max=3500,
    unread_body_bytes_max=500,
    ahead_bytes_max=1600,  # never less than a head: what is not yet one must be read on
    connections_max=6,
    write_buffer_bytes=700,
    head_timeout_s=2.0,
    idle_timeout_s=6.0,
    body_stall_timeout_s=3.0,
    write_stall_timeout_s=4.0,
    tunnel_idle_timeout_s=4.0,
    linger_s=1.0,
    connect_timeout_s=1.0,
    upstream_stall_timeout_s=4.0,
    upstream_head_bytes_max=2000,
    upstream_connections_max=3,
    upstream_waiting_max=3,
    upstream_waiting_timeout_s=2.0,
    upstream_idle_timeout_s=2.5,
)
_READ_BYTES: Final = 1000  # what one read gives, so that bodies of a few thousand come in several
_HELD_BYTES_MAX: Final = 8 * 1024  # what the gateway may hold for one connection under these limits

_SMALL_BYTES_MAX: Final = 60
_NOBODYS: Final = (
    b"x-hop", b"x-payment", b"payment-signature", b"http2-settings", b"x-original-url", b"x-original-uri", b"x-rewrite-url",
    b"forwarded", b"expect",
)  # fmt: skip
_TARGETS: Final = ("http://t0.example", "http://t1.example/base", "http://t2.example:81")
_UP_TRAILERS: Final = (
    b"X-Sum: 1\r\nFarebox-Customer: mallory\r\nAuthorization: x\r\nContent-Length: 9\r\nX-Set: mallory\r\n"
)
_IDEMPOTENT: Final = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")


# ── playing one ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Sent:
    """One request as a client sent it."""

    tag: str
    client: int
    method: str
    body: bytes
    loose: bool  # spoilt, or behind something spoilt: what it means is the gateway's to say
    spec: dict[str, Any]
    end: int  # of it, in all that its client says
    times_heard: int = 0
    rests: bool = False  # an end of its way did not take everything


@dataclass
class Told:
    """What the upstream answered to a tag: the whole body, and whether it said all of it."""

    status: int
    body: bytes
    whole: bool
    credits: str | None = None


@dataclass
class Client:
    end: End
    queue: bytearray = field(default_factory=bytearray)
    stream: bytearray = field(default_factory=bytearray)  # all that it ever said or will say
    tags: list[str] = field(default_factory=list)
    address: str = ""
    loose: bool = False


class Upstream:
    """An upstream's end of a connection: reads with llhttp what goes up, and says what it is told to say."""

    def __init__(self, run: Run, end: End) -> None:
        self.run = run
        self.end = end
        self.fed = 0
        self.asked: list[tuple[str, str]] = []  # (method, tag)
        self.answered = 0
        self.queue = bytearray()
        self.last: bytes | None = None  # said in one piece with the end of the queue
        self.then: str | None = None  # what happens once the queue is empty
        self.blind = False
        self.tunnel: str | None = None  # the tag that it changed protocols for
        self.tunnel_at = 0  # what was received before
        self.heard: list[Heard] = []
        number = run.stage.upstreams.index(end)
        self.host = run.stage.upstream_urls[number].removesuffix(":80")
        self._head_read = False
        self._trailers: list[bytes] = []
        self._url = b""
        self._body = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._parser = httptools.HttpRequestParser(self)

    def read(self) -> None:
        ahead = b""
        data = bytes(self.end.received[self.fed :])
        if not data or self.blind:
            return
        self.fed += len(data)
        if self.tunnel is not None:
            self._read_tunnel()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            ahead = data[exc.args[0] :]
            self._parser = httptools.HttpRequestParser(self)
        except httptools.HttpParserCallbackError as exc:
            raise AssertionError(f"{exc.__context__}: {data[-3000:]!r}") from exc.__context__
        except httptools.HttpParserInvalidMethodError:
            assert self.run.loose, bytes(self.end.received)  # llhttp knows its methods, we take any name
            self.blind = True
        except httptools.HttpParserError as exc:
            raise AssertionError(
                f"llhttp does not understand what went up: {exc!r}: {bytes(self.end.received)!r}"
            ) from exc
        assert not ahead, f"went up before the 101: {ahead!r}"

    def _read_tunnel(self) -> None:
        sent = self.run.sent[str(self.tunnel)]
        if not sent.loose:
            said = bytes(self.run.clients[sent.client].stream[sent.end :])
            heard = bytes(self.end.received[self.tunnel_at :])
            assert said.startswith(heard), f"foreign bytes in the tunnel of {sent.tag}: {heard!r}"

    def on_message_begin(self) -> None:
        self._url, self._body, self._headers = b"", b"", []
        self._head_read, self._trailers = False, []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_read:
            self._trailers.append(name.lower())
        else:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._head_read = True
        tag = self._url.partition(b"?")[0].rpartition(b"/")[2].decode()
        method = self._parser.get_method().decode()
        self.asked.append((method, tag))
        assert self._all(b"farebox-customer") == [b"acme"], self._headers
        assert self._all(b"host") == [self.host.encode()], (self.host, self._headers)
        [request_id] = self._all(b"farebox-request-id")
        assert len(self._all(b"x-forwarded-for")) == 1, self._headers
        assert not [name for name, _ in self._headers if name.startswith((b"farebox_", b"apicharge"))]
        sent = self.run.sent.get(tag)
        self.heard.append(Heard(tag, request_id.decode(), self))
        if sent is None or sent.loose:
            return
        assert not [name for name, _ in self._headers if name in _NOBODYS], self._headers
        assert not [value for _, value in self._headers if b"fbx_live" in value], self._headers
        client = self.run.clients[sent.client]
        assert self._all(b"x-forwarded-for") == [client.address.encode()], self._headers
        assert b"HTTP/1.1 101" not in client.end.received, f"{tag} was said within a tunnel"
        self._check_target(sent)
        self._check_route(sent)
        if sent.spec["upgrade"] and sent.spec["version"] == "1.1":
            assert self._all(b"upgrade") == [b"chat"]

    def _all(self, name: bytes) -> list[bytes]:
        return [value for given, value in self._headers if given == name]

    def _check_target(self, sent: Sent) -> None:
        path, _, query = self._url.decode().partition("?")
        mode, said = sent.spec["mode"], sent.spec["query"].removeprefix("?")
        expected = f"/{mode}/{sent.tag}"
        if mode == "strip":
            expected = f"/v1/{sent.tag}"
        elif mode == "set":
            expected = f"/moved/{sent.tag}"
        elif mode == "many" and self.host == "t1.example":
            expected = "/base" + expected
        assert path == expected, (path, expected)
        if mode != "set":
            assert query == said
            return
        names = [
            unquote(pair.partition("=")[0]).lower().partition("[")[0]
            for pair in query.replace(";", "&").split("&")
        ]
        assert names.count("plan") == 1
        assert query.endswith("plan=gold")
        assert "drop" not in names, query

    def _check_route(self, sent: Sent) -> None:
        """What its route sets is there once, and what the route asks for is what stands there."""
        mode, names = sent.spec["mode"], {name for name, _ in self._headers}
        if mode == "strip":
            assert self._all(b"x-set") == [b"ours"], self._headers
            assert b"x_set" not in names
            assert b"x-gone" not in names
        if mode == "cond":
            [took] = self._all(b"x-took")
            plans = [value for name, value in self._headers if name.replace(b"_", b"-") == b"x-plan"]
            query = sent.spec["query"]
            if took == b"gold":
                assert set(plans) == {b"gold"}, self._headers
            elif took == b"full":
                assert query == "?format=full", query
            else:
                assert not [plan for plan in plans if plan == b"gold"], self._headers
                assert query.lower() != "?format=full", query

    def on_body(self, body: bytes) -> None:
        self._body += body
        self.heard[-1].body_bytes += len(body)
        sent = self.run.sent.get(self.asked[-1][1])
        if sent is not None and not sent.loose:
            assert sent.body.startswith(self._body), (
                f"foreign bytes in the body of {sent.tag}: {self._body!r}"
            )

    def on_message_complete(self) -> None:
        method, tag = self.asked[-1]
        self.heard[-1].whole = True
        sent = self.run.sent.get(tag)
        if sent is None or sent.loose:
            assert sent is not None or self.run.loose, f"nobody sent {tag!r}"
            return
        assert (sent.method, sent.body) == (method, self._body), f"{tag} went up as something else"
        assert sent.spec["mode"] != "small" or len(sent.body) <= _SMALL_BYTES_MAX, f"{tag} is too large"
        assert set(self._trailers) <= {b"x-sum"}, self._trailers
        sent.times_heard += 1
        # A kept connection that was stale, and then as many targets as a call is taken to.
        times_max = (
            1 if method not in _IDEMPOTENT else 1 + TIGHT.attempts_max if sent.spec["mode"] == "many" else 2
        )
        assert sent.times_heard <= times_max, f"{tag} was forwarded again"


@dataclass
class Heard:
    """A call as it came to an upstream."""

    tag: str
    request_id: str
    upstream: Upstream
    body_bytes: int = 0
    whole: bool = False


class FuzzFlow:
    """One direction of a limit; what it gave is what must have passed."""

    def __init__(self, run: Run, spec: dict[str, Any]) -> None:
        self.run = run
        self.left: int = spec["first"]
        self.step: int = spec["step"]
        self.later: list[tuple[float, int]] = list(spec["more"])
        self.end: str = spec["end"]
        self.taken = 0

    def take(self, size: int) -> int:
        assert size > 0
        taken = min(size, self.left, self.step)
        self.left -= taken
        self.taken += taken
        return taken

    async def more(self) -> bool:
        if self.left:
            return True
        if self.later:
            delay_s, size = self.later.pop(0)
            await asyncio.sleep(delay_s)
            self.left += size
            return True
        if self.end == "raise":
            self.run.stage.expected_logs.add("flow_failed")
            raise ConnectionError("the database is away")
        self.left += 1 << 20 if self.end == "all" else 0
        return self.end == "all"


class FuzzMeter:
    def __init__(self, run: Run, tag: str, spec: dict[str, Any]) -> None:
        self.tag = tag
        self.up = FuzzFlow(run, spec["up"]) if spec["up"] else None
        self.down = FuzzFlow(run, spec["down"]) if spec["down"] else None
        self.upload: Any = self.up
        self.download: Any = self.down
        self.said: list[bytes] = []

    def credits(self, value: bytes) -> None:
        self.said.append(value)


class FuzzDoor(OpenDoor):
    """Decides by the path: /mode/tag."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.decide = self._by_path

    def admitted(self, call: Call, **more: Any) -> Admitted:
        headers = [(n.encode(), v.encode()) for n, v in call.route.rewrite.set_headers]
        sent = self.run.sent.get(call.path.rpartition("/")[2])
        ends_s = sent.spec["expires_s"] if sent is not None else None
        standing = Standing(
            f"cus{call.client_address}", math.inf if ends_s is None else self.run.business_s + ends_s
        )
        admitted = super().admitted(call, **{"standing": standing, **more})
        admitted.forward_headers.extend(headers)
        return admitted

    def needs_body(self, call: Call) -> bool:
        return call.path.startswith(("/whole/", "/settle/", "/unsettled/"))

    def _by_path(self, call: Call) -> Any:
        mode = call.path.split("/")[1]
        match mode:
            case "no":
                return refusal("payment_required", "Pay what is asked for.")
            case "raise":
                return self._fails(call)
            case "slow":
                return self._slowly(call, self.admitted)
            case "slowno":
                return self._slowly(call, lambda _: refusal("credential_missing", "Bring a key."))
            case "settle" | "unsettled":
                return self._settles(call, mode == "settle")
            case "free":
                return self.admitted(call, fare="free", standing=None)
            case "metered":
                tag = call.path.rpartition("/")[2]
                spec = self.run.sent[tag].spec if tag in self.run.sent else {"up": None, "down": None}
                meter = self.run.meters[call.request_id] = FuzzMeter(self.run, tag, spec)
                return self.admitted(call, meter=meter)
            case _:
                return self.admitted(call)

    async def _slowly(self, call: Call, decide: Any) -> Decision:
        await asyncio.sleep(0.7)
        decided: Decision = decide(call)
        return decided

    async def _fails(self, call: Call) -> Decision:
        from farebox.base.errors import Unavailable

        await asyncio.sleep(0.1)
        raise Unavailable("the database", 2.0)

    def _settles(self, call: Call, good: bool) -> Decision:
        tag = call.path.rpartition("/")[2]

        async def release(status: int, headers: Any) -> Refusal | None:
            await asyncio.sleep(0.4)
            return None if good else refusal("settlement_failed", "The payment could not be settled.")

        async def keep(status: int, headers: Any, body: bytes) -> None:
            await asyncio.sleep(0.2)
            told = self.run.told.get(tag)
            assert told is not None
            if call.method != "HEAD":
                assert told.body.startswith(body), f"the answer kept for {tag} is not what was said"

        return self.admitted(
            call, fare="exact", before_release=release, keep_answer=keep, keep_answer_bytes_max=1000
        )


class Pages:
    """Our own pages: each says what it was sent."""

    def owns(self, path: str) -> bool:
        return path.startswith("/page/")

    async def answer(
        self, method: str, path: str, query: str, headers: Any, body: bytes, client: str
    ) -> Answer:
        await asyncio.sleep(0.1)
        return Answer(200, [(b"X-Page", path.rpartition("/")[2].encode())], body)


def catalogs() -> list[GatewayCatalog]:
    plain = [Route(mode, Match(f"/{mode}/{{tag}}"), "up0") for mode in (*PLAIN_MODES, "metered")]
    gold, full = (Condition("x-plan", "exact", "gold"),), (Condition("format", "exact", "full"),)
    special = [
        Route("many", Match("/many/{tag}"), "many"),
        Route("timed", Match("/timed/{tag}"), "up0", timeout_s=1.0, total_timeout_s=2.0),
        Route("small", Match("/small/{tag}"), "up0", body_bytes_max=_SMALL_BYTES_MAX),
        Route("free", Match("/free/{tag}"), "up0", free=FreeFare()),
        Route(
            "strip",
            Match("/strip/{*rest}"),
            "up0",
            Rewrite(
                strip_prefix="/strip",
                add_prefix="/v1",
                set_headers=(("X-Set", "ours"),),
                remove_headers=("X-Gone",),
                answer=AnswerRewrite((("X-Way", "strip"),), ("X-Secret",)),
            ),
        ),
        Route(
            "set",
            Match("/set/{tag}"),
            "up0",
            Rewrite(set_path="/moved/{tag}", set_query=(("plan", "gold"),), remove_query=("drop",)),
        ),
        Route("gold", Match("/cond/{tag}", headers=gold), "up0", Rewrite(set_headers=(("X-Took", "gold"),))),
        Route("full", Match("/cond/{tag}", query=full), "up0", Rewrite(set_headers=(("X-Took", "full"),))),
        Route("plain", Match("/cond/{tag}"), "up0", Rewrite(set_headers=(("X-Took", "plain"),))),
    ]
    many = UpstreamEntry("many", targets=_TARGETS, timeout_s=3.0)
    fewer = UpstreamEntry("many", targets=_TARGETS[:2], timeout_s=3.0, balance="least_requests")

    def served(url: str, many: UpstreamEntry, routes: Sequence[Route]) -> GatewayCatalog:
        return GatewayCatalog(1, (UpstreamEntry("up0", url, timeout_s=5.0), many), tuple(routes))

    return [
        served(UPSTREAM_URL, many, [*plain, *special]),
        served("http://other.example", fewer, [*plain, *special]),
        served(UPSTREAM_URL, many, plain),
        served(UPSTREAM_URL, fewer, special),
    ]


class Run:
    """One case being played."""

    def __init__(self) -> None:
        random.seed(0)  # what the gateway rolls dice for, it rolls again when the case is played again
        self.sent: dict[str, Sent] = {}
        self.told: dict[str, Told] = {}
        self.unsure: set[str] = set()  # tags of which nobody can say whether the answer is whole
        self.loose = False
        self.clients: list[Client] = []
        self.upstreams: list[Upstream] = []
        self.meters: dict[str, FuzzMeter] = {}
        self.tunnels: dict[str, bytearray] = {}  # what upstreams said in them, by tag
        self.business_s = 1000.0
        self.catalogs = catalogs()
        self.door = FuzzDoor(self)
        self.stage = Stage(
            TIGHT, self.catalogs[0], self.door, Pages(), business_now_s=lambda: self.business_s
        )
        self.draining: asyncio.Task[None] | None = None

    def play(self, acts: Sequence[Act]) -> None:
        stage = self.stage
        try:
            for act in acts:
                getattr(self, f"_{act[0]}")(*act[1:])
                self._look()
            stage.upstream_hangs = False
        except BaseException:
            stage.abandon()
            raise
        stage.leave()
        self._look()
        for client in self.clients:
            self._check_answers(client)
        self._check_uploads()
        self._check_meters()

    def _look(self) -> None:
        """After each act."""
        stage = self.stage
        for end in stage.upstreams[len(self.upstreams) :]:
            end._wire.reads_at_most = _READ_BYTES
            self.upstreams.append(Upstream(self, end))
        for upstream in self.upstreams:
            upstream.read()
            assert upstream.end.unsent < _HELD_BYTES_MAX, f"{upstream.end.unsent} bytes wait for an upstream"
        for client in self.clients:
            assert client.end.unsent < _HELD_BYTES_MAX, f"{client.end.unsent} bytes wait for a client"
        for connection in stage.gateway._connections:
            assert len(connection._inbox) < _HELD_BYTES_MAX, (
                f"{len(connection._inbox)} bytes of a client wait to be read"
            )
        for exchange in stage.gateway.timed:
            assert exchange.ends_at >= stage.gateway.ticker.now, f"{exchange.call} is overdue"
        assert 0 <= stage.gateway.buffered_bytes <= TIGHT.buffered_bytes_max
        stage.check()

    # Clients

    def _connect(self) -> None:
        if len(self.clients) < 8 and self.stage.accepts:
            address = f"203.0.113.{len(self.clients)}"
            end = self.stage.connect(address)
            end._wire.reads_at_most = _READ_BYTES
            self.clients.append(Client(end, address=address))

    def _say(self, who: int, spec: dict[str, Any]) -> None:
        number = who % len(self.clients)
        client = self.clients[number]
        tag = f"t{len(self.sent)}"
        body = _filled(b"<%b>" % tag.encode(), spec["size"])
        spoil = spec.get("spoil")
        lines = [
            f"{spec['method']} /{spec['mode']}/{tag}{spec['query']} HTTP/{spec['version']}",
            f"Host: c{number}.example",
        ]
        if spec["connection"]:
            lines.append(f"Connection: {spec['connection']}")
            if spec["connection"] == "X-Hop":
                lines.append("X-Hop: 1")
        lines += spec["extra"]
        if spec["te"]:
            lines.append("TE: trailers")
        if spec["upgrade"]:
            lines += ["Connection: Upgrade", "Upgrade: chat, h2c"]
        trails = spec["trailers"] and spec["framing"] == "chunked"
        if trails:
            lines.append("Trailer: X-Sum, Farebox-Customer")
        if spec["expect"]:
            lines.append("Expect: 100-continue")
        if spec["fill"]:
            lines.append("X-Fill: " + "f" * spec["fill"])
        lines.append("Farebox-Customer: mallory")
        if spec["framing"] == "length":
            lines.append(f"Content-Length: {len(body)}")
        elif spec["framing"] == "chunked":
            lines.append("Transfer-Encoding: chunked")
        raw = http(
            *lines,
            body=_chunked(body, spec["chunk"], _UP_TRAILERS if trails else b"")
            if spec["framing"] == "chunked"
            else body,
        )
        if spoil:
            client.loose = self.loose = True
            at = spec["at"] % len(raw)
            match spoil:
                case "head":
                    raw = SPOILT_HEADS[spec["at"] % len(SPOILT_HEADS)]
                case "chunk":
                    raw = (
                        http(lines[0], lines[1], "Transfer-Encoding: chunked")
                        + SPOILT_CHUNKS[spec["at"] % len(SPOILT_CHUNKS)]
                    )
                case "flip":
                    raw = raw[:at] + bytes([spec["byte"]]) + raw[at + 1 :]
                case "cut":
                    raw = raw[:at]
                case _:
                    raw = raw[:at] + bytes([spec["byte"]]) * 3 + raw[at:]
        client.tags.append(tag)
        client.queue += raw
        client.stream += raw
        self.sent[tag] = Sent(tag, number, spec["method"], body, client.loose, spec, len(client.stream))

    def _send(self, who: int, count: int) -> None:
        client = self.clients[who % len(self.clients)]
        data = bytes(client.queue[:count])
        del client.queue[:count]
        if data and not client.end.gone:
            client.end.sends(data)

    def _talk(self, who: int, size: int) -> None:
        """Bytes of a protocol that the client asked for last: ahead of its 101, after it, or with none to come."""
        client = self.clients[who % len(self.clients)]
        if client.tags and self.sent[client.tags[-1]].spec["upgrade"]:
            said = _filled(b"<%b>" % client.tags[-1].encode(), size)
            client.queue += said
            client.stream += said

    def _leave(self, who: int, how: str) -> None:
        getattr(self.clients[who % len(self.clients)].end, how)()

    def _stop(self, who: int) -> None:
        self.clients[who % len(self.clients)].end.stops_taking()

    def _take(self, who: int) -> None:
        self.clients[who % len(self.clients)].end.takes_on()

    # Upstreams

    def _living(self) -> list[Upstream]:
        return [u for u in self.upstreams if not u.end.closed and not u.end.gone]

    def _answer(self, who: int, spec: dict[str, Any]) -> None:
        asked = [
            u
            for u in self._living()
            if u.answered < len(u.asked) and not u.queue and u.then is None and u.tunnel is None
        ]
        if not asked:
            return
        upstream = asked[who % len(asked)]
        method, tag = upstream.asked[upstream.answered]
        upstream.answered += 1
        body = _filled(b"[%b]" % tag.encode(), spec["size"])
        status, framing, spoil = spec["status"], spec["framing"], spec.get("spoil")
        bodiless = method == "HEAD" or status in (204, 304)
        if spec["version"] == "1.0" and framing == "chunked":
            framing = "length"
        sent = self.sent.get(tag)
        if sent is not None and sent.spec["upgrade"] and spec["switch"] != "no" and spoil is None:
            self._switches(upstream, tag, spec)
            return
        lines = [f"HTTP/{spec['version']} {status} Said", f"X-Tag: {tag}", "X-Secret: 1", "X-Way: evil"]
        if status == 426:
            lines += ["Upgrade: other", "Connection: Upgrade"]
        if spec["credits"] is not None:
            lines.append(f"{'Farebox-Credits' if spec['close'] else 'apicharge_credits'}: {spec['credits']}")
        if spec["close"]:
            lines.append("Connection: close")
        if framing == "length" and status != 204:
            lines.append(f"Content-Length: {len(body)}")
        elif framing == "chunked" and status != 204:
            lines.append("Transfer-Encoding: chunked")
        raw = http("HTTP/1.1 103 Hints", f"X-Hint: {tag}") * spec["interim"] + http(*lines)
        told = Told(status, b"" if bodiless else body, True, spec["credits"])
        if not bodiless:
            trailers = b"X-Sum: 1\r\nSet-Cookie: a=1\r\nX-Way: evil\r\n" if spec["trailer"] else b""
            if framing == "chunked" and spec["credits_after"] is not None:
                trailers += b"Farebox-Credits: %b\r\n" % spec["credits_after"].encode()
                told.credits = spec["credits_after"]
            raw += _chunked(body, spec["chunk"], trailers) if framing == "chunked" else body
            if framing == "endless":
                upstream.then = "closes"
        if spoil == "malformed":
            raw = SPOILT_ANSWERS[spec["at"] % len(SPOILT_ANSWERS)]
            raw = raw.replace(b"\r\n", f"\r\nX-Tag: {tag}\r\n".encode(), 1)
            upstream.then = "closes"
            told = Told(200, b"", False)
            self.unsure.add(tag)  # as an answer to HEAD some of these are good
        elif spoil in ("short", "reset"):
            cut = spec["at"] % max(1, len(raw))
            raw = raw[:cut]
            upstream.then = "closes" if spoil == "short" else "resets"
            told.whole = False
            if framing == "endless":
                self.unsure.add(tag)
        elif spoil == "more" and framing != "endless":
            upstream.last = raw[-1:] + http(
                "HTTP/1.1 200 OK", "X-Tag: evil", "Content-Length: 4", body=b"evil"
            )
            raw = raw[:-1]
        self.told[tag] = told
        upstream.queue += raw

    def _switches(self, upstream: Upstream, tag: str, spec: dict[str, Any]) -> None:
        """Grants an upgrade, or one that nobody asked for."""
        sent = self.sent[tag]
        good = spec["switch"] == "yes" and sent.spec["version"] == "1.1" and not sent.body
        said = _filled(b"[%b]" % tag.encode(), spec["ahead"])
        protocol = {"yes": "Upgrade: chat", "other": "Upgrade: other"}.get(
            spec["switch"], "Upgrade: chat, other"
        )
        raw = http("HTTP/1.1 103 Hints", f"X-Hint: {tag}") * spec["interim"]
        raw += http("HTTP/1.1 101 Said", f"X-Tag: {tag}", "Connection: Upgrade", protocol, body=said)
        upstream.queue += raw
        self.told[tag] = Told(101, b"", good)
        self.tunnels[tag] = bytearray(said)
        if sent.body:
            upstream.blind = True  # the rest of it may be on its way
            return
        upstream.tunnel = tag
        upstream.tunnel_at = len(upstream.end.received)

    def _utalk(self, who: int, size: int) -> None:
        talking = [u for u in self._living() if u.tunnel is not None and u.then is None]
        if talking:
            upstream = talking[who % len(talking)]
            said = _filled(b"[%b]" % str(upstream.tunnel).encode(), size)
            upstream.queue += said
            self.tunnels[str(upstream.tunnel)] += said

    def _give(self, who: int, count: int) -> None:
        giving = [u for u in self._living() if u.queue or u.then or u.last]
        if not giving:
            return
        upstream = giving[who % len(giving)]
        data = bytes(upstream.queue[:count])
        del upstream.queue[:count]
        if data:
            upstream.end.sends(data)
        if upstream.queue:
            return
        if upstream.last is not None:
            # Bytes past an answer's end: only those that come with it can be told from an early answer to the next call.
            wire = upstream.end._wire
            alone = wire.reading and not wire._arriving
            last, upstream.last = upstream.last, None
            upstream.end.sends(last if alone else last[:1])
        if upstream.then is not None:
            how, upstream.then = upstream.then, None
            getattr(upstream.end, how)()

    def _uleave(self, who: int, how: str) -> None:
        living = self._living()
        if living:
            upstream = living[who % len(living)]
            for _, tag in upstream.asked:
                if (
                    tag in self.told
                    and tag != upstream.tunnel
                    and (upstream.queue or upstream.then or upstream.last)
                ):
                    self._cut_short(upstream, tag)
            upstream.queue.clear()
            upstream.last = None
            upstream.then = None
            getattr(upstream.end, how)()

    def _cut_short(self, upstream: Upstream, tag: str) -> None:
        """The answer to the last thing asked never came to its end (or, without a length, came to another)."""
        if tag == upstream.asked[upstream.answered - 1][1]:
            self.told[tag] = Told(self.told[tag].status, self.told[tag].body, False)
            self.unsure.add(tag)

    def _ustop(self, who: int) -> None:
        living = self._living()
        if living:
            living[who % len(living)].end.stops_taking()

    def _utake(self, who: int) -> None:
        living = self._living()
        if living:
            living[who % len(living)].end.takes_on()

    # Everything else

    def _wait(self, seconds: float) -> None:
        self.stage.wait(seconds)

    def _target(self, number: int, state: str) -> None:
        host = _TARGETS[number].split("/")[2].partition(":")[0]
        if state == "lives":
            self.stage.targets_down.discard(host)
            return
        self.stage.targets_down.add(host)
        for upstream in self._living():
            if upstream.host.partition(":")[0] == host and not upstream.queue and upstream.then is None:
                self._uleave(self._living().index(upstream), "resets")

    def _cut(self, who: int) -> None:
        subject = f"cus203.0.113.{who}"
        gateway = self.stage.gateway
        before = [
            c.request_id for c in gateway._connections if c.standing and c.standing.subject_id == subject
        ]
        self.stage.do(lambda: gateway.cut({subject}))
        for connection in gateway._connections:
            if connection.standing is not None and connection.request_id in before:
                assert self._settles(connection), f"{connection.call} goes on after it was cut"

    def _date(self, seconds: float) -> None:
        self.business_s += seconds
        self.stage.wait(1.5)
        for connection in self.stage.gateway._connections:
            assert connection.stands_until_s > self.business_s or self._settles(connection)

    def _settles(self, connection: Any) -> bool:
        return connection.call is not None and connection.call.path.startswith(("/settle/", "/unsettled/"))

    def _drain(self, timeout_s: float) -> None:
        if self.draining is None:

            def begin() -> None:
                self.draining = self.stage.loop.create_task(self.stage.gateway.drain(timeout_s))

            self.stage.do(begin)

    def _catalog(self, number: int) -> None:
        self.stage.do(lambda: self.stage.gateway.replace_catalog(self.catalogs[number]))

    def _network(self, state: str) -> None:
        self.stage.upstream_refuses = state == "refuses"
        self.stage.upstream_hangs = state == "hangs"

    # What a client saw

    def _check_answers(self, client: Client) -> None:
        data, order = bytes(client.end.received), -1
        finished = {f.request_id: f for f in self.door.finished}
        at = 0
        while at < len(data):
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                assert b"HTTP/1.1 ".startswith(data[at : at + 9]) or data[at:].startswith(b"HTTP/1.1 "), data[
                    at:
                ]
                return
            lines = data[at:end].split(b"\r\n")
            version, code, _ = lines[0].split(b" ", 2)
            assert version == b"HTTP/1.1", lines[0]
            status = int(code)
            pairs = [
                (name.lower(), value.strip())
                for name, _, value in (line.partition(b":") for line in lines[1:])
            ]
            fields = dict(pairs)
            at = end + 4
            self._check_head(status, pairs)
            if status == 101:
                self._check_tunnel(client, fields, data[at:])
                return
            if status < 200:
                if status == 103:
                    assert client.loose or fields[b"x-hint"].decode() in client.tags
                continue
            assert len([1 for name, _ in pairs if name in (b"content-length", b"transfer-encoding")]) <= 1, (
                lines
            )
            tag = fields.get(b"x-tag", b"").decode()
            if not tag:
                at = self._check_our_own(client, status, fields, data, at)
                continue
            assert tag != "evil", "an answer that nobody asked for was given to a client"
            if tag not in client.tags:
                assert client.loose, f"the answer to {tag} went to another client"
                return
            assert client.tags.index(tag) > order, f"the answer to {tag} came out of order"
            order = client.tags.index(tag)
            told = self.told[tag]
            assert status == told.status
            method = self.sent[tag].method
            if self.sent[tag].loose:
                return  # what it was read as is not ours to say
            spec = self.sent[tag].spec
            if spec["mode"] == "strip":
                assert [v for n, v in pairs if n == b"x-way"] == [b"strip"]
                assert b"x-secret" not in fields
            body, whole, at, trailers = _body(fields, data, at, method == "HEAD" or status in (204, 304))
            assert told.body.startswith(body), f"foreign bytes in the answer to {tag}: {body!r}"
            assert set(trailers) <= (
                {b"x-sum", b"x-way"}
                if spec["te"] and spec["mode"] != "strip"
                else {b"x-sum"}
                if spec["te"]
                else set()
            ), trailers
            reported = finished.get(fields[b"farebox-request-id"].decode())
            assert reported is not None
            assert len(body) <= reported.bytes_down, f"{tag}: more came than was reported: {reported}"
            if not client.end.rested:
                assert len(body) == reported.bytes_down, f"{tag}: {len(body)} came: {reported}"
            if whole is None or not whole:
                assert at == len(data)
                return
            if tag not in self.unsure:
                assert told.whole, f"the answer to {tag} broke off and was shown as whole"
                assert body == told.body, f"the answer to {tag} is not whole and was shown as such"
            assert (reported.status, reported.bytes_down) == (status, len(body)), f"{tag}: {reported}"
            assert reported.bytes_up <= len(self.sent[tag].body)
            meter = self.meters.get(reported.request_id)
            if meter is not None and tag not in self.unsure:
                assert meter.said == ([] if told.credits is None else [told.credits.encode()]), (
                    meter.said,
                    told,
                )

    def _check_head(self, status: int, pairs: list[tuple[bytes, bytes]]) -> None:
        names = [name.replace(b"_", b"-") for name, _ in pairs]
        assert b"farebox-credits" not in names, pairs
        assert b"apicharge-credits" not in names, pairs
        assert status < 200 or names.count(b"farebox-request-id") == 1

    def _check_tunnel(self, client: Client, fields: dict[bytes, bytes], raw: bytes) -> None:
        tag = fields[b"x-tag"].decode()
        if tag not in client.tags or self.sent[tag].loose:
            assert client.loose, f"the tunnel of {tag} is another client's"
            return
        assert self.sent[tag].spec["upgrade"], f"{tag} did not ask for a tunnel"
        assert self.told[tag].whole, f"{tag} did not ask for this protocol"
        assert self.tunnels[tag].startswith(raw), f"foreign bytes in the tunnel of {tag}: {raw!r}"
        reported = next(
            f for f in self.door.finished if f.request_id == fields[b"farebox-request-id"].decode()
        )
        assert reported.status in (101, 0), reported
        assert len(raw) <= reported.bytes_down
        if not client.end.rested:
            assert len(raw) == reported.bytes_down, f"{len(raw)} bytes came through: {reported}"
        upstream = next(u for u in self.upstreams if u.tunnel == tag)
        heard = len(upstream.end.received) - upstream.tunnel_at
        assert heard <= reported.bytes_up
        if not upstream.end.rested:
            assert heard == reported.bytes_up, f"{heard} bytes went through: {reported}"

    def _check_uploads(self) -> None:
        """What was reported as sent up is what came there."""
        finished = {f.request_id: f for f in self.door.finished}
        for upstream in self.upstreams:
            for heard in upstream.heard:
                reported = finished.get(heard.request_id)
                if reported is None or reported.status == 101:
                    assert reported is not None, f"{heard.tag} went up without a call"
                    continue
                assert heard.body_bytes <= reported.bytes_up, f"{heard}: {reported}"
                if not upstream.end.rested and not upstream.blind:
                    assert heard.body_bytes == reported.bytes_up, (
                        f"{heard.body_bytes} bytes of {heard.tag}: {reported}"
                    )

    def _check_meters(self) -> None:
        finished = {f.request_id: f for f in self.door.finished}
        for request_id, meter in self.meters.items():
            reported = finished[request_id]
            assert len(meter.said) <= 1, meter.said
            for flow, passed in ((meter.up, reported.bytes_up), (meter.down, reported.bytes_down)):
                assert flow is None or flow.taken == passed, (
                    f"{meter.tag}: {flow.taken} were let pass: {reported}"
                )

    def _check_our_own(
        self, client: Client, status: int, fields: dict[bytes, bytes], data: bytes, at: int
    ) -> int:
        """A refusal or a page. To HEAD it has no body, and then the next head begins at once."""
        page = fields.get(b"x-page")
        if page is not None:
            assert page.decode() in client.tags or client.loose
        else:
            assert fields[b"content-type"] == b"application/problem+json", fields
        length = int(fields[b"content-length"])
        if data[at : at + 1] in (b"{", b"<"):
            assert len(data) - at >= length or client.end.closed
            if page is not None:
                assert (
                    data[at : at + length].startswith(b"<%b>" % page[:length]) or length < 5 or client.loose
                )
            return at + length
        return at


def _body(
    fields: dict[bytes, bytes], data: bytes, at: int, bodiless: bool
) -> tuple[bytes, bool | None, int, list[bytes]]:
    """(body, whether whole; None: nobody can say, where the next answer begins, names of trailers)."""
    if bodiless:
        return b"", True, at, []
    if b"content-length" in fields:
        length = int(fields[b"content-length"])
        body = data[at : at + length]
        return body, len(body) == length, at + len(body), []
    if b"transfer-encoding" not in fields:
        return data[at:], None, len(data), []
    body = b""
    while True:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return body, False, len(data), []
        size = int(data[at:line_end], 16)
        if not size:
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                return body, False, len(data), []
            lines = data[line_end + 2 : end].split(b"\r\n") if end > line_end else []
            return body, True, end + 4, [line.partition(b":")[0].lower() for line in lines]
        piece = data[line_end + 2 : line_end + 2 + size]
        body += piece
        at = line_end + 2 + size
        if data[at : at + 2] != b"\r\n":
            assert at + 2 > len(data), "a chunk without its end"
            return body, False, len(data), []
        at += 2


def _filled(pattern: bytes, size: int) -> bytes:
    return (pattern * (size // len(pattern) + 1))[:size]


def _chunked(body: bytes, size: int, trailers: bytes = b"") -> bytes:
    pieces = [body[n : n + size] for n in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n" + trailers + b"\r\n"


# ── playing many ────────────────────────────────────────────────────────────────────────────────────────────────────


def failure_of(acts: Sequence[Act]) -> str | None:
    """What goes wrong when these acts are played; None when nothing does."""
    try:
        Run().play(acts)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is a find
        return f"{type(exc).__name__}: {exc}\n{''.join(traceback.format_tb(exc.__traceback__)[-3:])}"
    return None


def shrunk(acts: Sequence[Act], seconds_max: float = 30.0) -> list[Act]:
    """As few of these acts as still fail."""
    acts = list(acts)
    until = time.monotonic() + seconds_max
    size = len(acts) // 2
    while size and time.monotonic() < until:
        at, dropped = 1, False
        while at < len(acts) and time.monotonic() < until:
            fewer = acts[:at] + acts[at + size :]
            if failure_of(fewer) is not None:
                acts, dropped = fewer, True
            else:
                at += size
        if not dropped or size > 1:
            size //= 2
    return acts


def report(seed: int) -> str | None:
    """The whole story of a seed that fails."""
    acts = case(seed)
    first = failure_of(acts)
    if first is None:
        return None
    acts = shrunk(acts)
    return "\n".join(
        [f"seed {seed}", *(f"  {act}" for act in acts), failure_of(acts) or f"(not each time) {first}"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="play this one case and stop")
    parser.add_argument("--first", type=int, help="the first of many seeds; by default one from the clock")
    options = parser.parse_args()
    if options.seed is not None:
        story = report(options.seed)
        print(story or f"seed {options.seed}: nothing found")
        return 1 if story else 0
    first = options.first if options.first is not None else time.time_ns() // 1000
    end, seed = time.monotonic() + options.seconds, first
    while time.monotonic() < end:
        story = report(seed)
        if story:
            print(story)
            return 1
        seed += 1
    print(f"{seed - first} cases from seed {first}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
