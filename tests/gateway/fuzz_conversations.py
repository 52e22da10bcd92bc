"""A fuzzer over the gateway's connections: random clients, random upstreams, random cuts, and rules that must hold in all of it.

    .venv/bin/python -m tests.gateway.fuzz_conversations --seconds 600 [--seed N]

A case is a list of acts made from a seed, and the same list always plays in the same way (stage.py). Every request carries a tag
in its path, its body and the upstream's answer, so that a byte that strays from one exchange into another is seen. Rules:

* nothing raises and nothing is logged as an error;
* what goes up is read by llhttp as the requests that were sent, each at most once (twice when it was tried again);
* what comes down is HTTP, in the order of the requests, with the tag, status and bytes that the upstream said; an answer that
  broke off is never seen as whole; a whole one was reported to the door with its status and size before;
* each admitted call is closed out once; connections, held bytes and counters end at zero; buffers stay within their limits.

A failure prints its seed and its acts, made as short as they can be.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httptools

from farebox.app.admission import Answer, Call, Decision, Refusal
from farebox.domain.access import GatewayCatalog, Match, Route
from farebox.gateway.problems import refusal
from farebox.gateway.settings import GatewaySettings
from tests.gateway.conversations import http
from tests.gateway.kit import OpenDoor, catalog
from tests.gateway.stage import UPSTREAM_URL, End, Stage
from tests.gateway.test_smuggling import BAD_ANSWERS, BAD_CHUNKS, FRAMING, MALFORMED_HEADS

Act = tuple[Any, ...]

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

_SPOILT_HEADS: Final = (*MALFORMED_HEADS.values(), *FRAMING.values())
_SPOILT_CHUNKS: Final = tuple(c for c in BAD_CHUNKS.values() if len(c) < 500)
_SPOILT_ANSWERS: Final = tuple(a for a in BAD_ANSWERS.values() if len(a) < 500)
_MODES: Final = ("yes",) * 8 + (
    "no",
    "slow",
    "slowno",
    "whole",
    "settle",
    "unsettled",
    "raise",
    "page",
    "nowhere",
)
_IDEMPOTENT: Final = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")


# ── cases ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def case(seed: int) -> list[Act]:
    """The acts of one case."""
    rng = random.Random(seed)
    acts: list[Act] = [("connect",)]
    spoils = rng.random() < 0.4
    for _ in range(rng.randrange(4, 40)):
        acts.extend(_some_acts(rng, spoils))
    return acts


def _some_acts(rng: random.Random, spoils: bool) -> list[Act]:
    who = rng.randrange(8)
    roll = rng.random()
    if roll < 0.05:
        return [("connect",)]
    if roll < 0.40:
        said: list[Act] = [("say", who, _request(rng, spoils)) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        return [*said, *_sends("send", who, rng)]
    if roll < 0.75:
        return [("answer", who, _answer(rng, spoils)), *_sends("give", who, rng)]
    if roll < 0.83:
        return _sends(rng.choice(("send", "give")), who, rng)
    if roll < 0.90:
        return [("wait", rng.choice((0.1, 0.3, 1.0, 1.5, 3.0, 5.0)))]
    if roll < 0.93:
        return [(rng.choice(("leave", "uleave")), who, rng.choice(("closes", "half_closes", "resets")))]
    if roll < 0.97:
        return [(rng.choice(("stop", "ustop", "take", "utake")), who)]
    if roll < 0.985:
        return [("catalog", rng.randrange(3))]
    return [("network", rng.choice(("refuses", "hangs", "works", "works")))]


def _sends(act: str, who: int, rng: random.Random) -> list[Act]:
    roll = rng.random()
    if roll < 0.6:
        return [(act, who, 1 << 20)]
    if roll < 0.75:
        return [(act, who, 1)] * rng.randrange(1, 30)
    return [(act, who, rng.choice((3, 17, 60, 200, 900))) for _ in range(rng.randrange(1, 6))]


def _request(rng: random.Random, spoils: bool) -> dict[str, Any]:
    method = rng.choice(
        ("GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PURGE")
    )
    framing = rng.choice(
        ("none", "length", "chunked") if method in ("POST", "PUT", "PATCH", "GET") else ("none",)
    )
    spec = {
        "mode": rng.choice(_MODES),
        "method": method,
        "framing": framing,
        "size": rng.choice((0, 1, 5, 40, 400, 1400, 2900, 3001, 5000)) if framing != "none" else 0,
        "version": rng.choice(("1.1",) * 6 + ("1.0",)),
        "connection": rng.choice(("",) * 8 + ("close", "keep-alive", "X-Hop")),
        "expect": rng.random() < 0.1,
        "chunk": rng.choice((1, 7, 100, 10_000)),
        "fill": rng.choice((0,) * 10 + (250, 1400, 2000)),
    }
    if spec["version"] == "1.0" and framing == "chunked":
        spec["framing"] = "length"
    if spoils and rng.random() < 0.2:
        spec["spoil"] = rng.choice(("head", "chunk", "flip", "cut", "noise"))
        spec["at"] = rng.randrange(1 << 16)
        spec["byte"] = rng.randrange(256)
    return spec


def _answer(rng: random.Random, spoils: bool) -> dict[str, Any]:
    spec = {
        "framing": rng.choice(("length",) * 4 + ("chunked",) * 3 + ("endless",)),
        "size": rng.choice((0, 1, 5, 40, 900, 2000, 6000)),
        "status": rng.choice((200,) * 8 + (201, 299, 204, 304, 402, 404, 500)),
        "chunk": rng.choice((1, 7, 300, 10_000)),
        "interim": rng.choice((0,) * 8 + (1, 3, 17)),
        "close": rng.random() < 0.1,
        "version": rng.choice(("1.1",) * 8 + ("1.0",)),
        "trailer": rng.random() < 0.1,
    }
    if spoils and rng.random() < 0.3:
        spec["spoil"] = rng.choice(("malformed", "short", "reset", "more", "more"))
        spec["at"] = rng.randrange(1 << 16)
    return spec


# ── playing one ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Sent:
    """One request as a client sent it."""

    tag: str
    client: int
    method: str
    body: bytes
    loose: bool  # spoilt, or behind something spoilt: what it means is the gateway's to say
    times_heard: int = 0


@dataclass
class Told:
    """What the upstream answered to a tag: the whole body, and whether it said all of it."""

    status: int
    body: bytes
    whole: bool


@dataclass
class Client:
    end: End
    queue: bytearray = field(default_factory=bytearray)
    tags: list[str] = field(default_factory=list)
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
        self._url = b""
        self._body = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._parser = httptools.HttpRequestParser(self)

    def read(self) -> None:
        data = bytes(self.end.received[self.fed :])
        if not data or self.blind:
            return
        self.fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserInvalidMethodError:
            assert self.run.loose, bytes(self.end.received)  # llhttp knows its methods, we take any name
            self.blind = True
        except httptools.HttpParserError as exc:
            raise AssertionError(
                f"llhttp does not understand what went up: {exc!r}: {bytes(self.end.received)!r}"
            ) from exc

    def on_message_begin(self) -> None:
        self._url, self._body, self._headers = b"", b"", []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        tag = self._url.rpartition(b"/")[2].decode()
        self.asked.append((self._parser.get_method().decode(), tag))
        named = [value for name, value in self._headers if name == b"farebox-customer"]
        assert named == [b"acme"], self._headers
        sent = self.run.sent.get(tag)
        if sent is not None and not sent.loose:
            assert not [name for name, _ in self._headers if name in (b"expect", b"x-hop")]

    def on_body(self, body: bytes) -> None:
        self._body += body
        sent = self.run.sent.get(self.asked[-1][1])
        if sent is not None and not sent.loose:
            assert sent.body.startswith(self._body), (
                f"foreign bytes in the body of {sent.tag}: {self._body!r}"
            )

    def on_message_complete(self) -> None:
        method, tag = self.asked[-1]
        sent = self.run.sent.get(tag)
        if sent is None or sent.loose:
            assert sent is not None or self.run.loose, f"nobody sent {tag!r}"
            return
        assert (sent.method, sent.body) == (method, self._body), f"{tag} went up as something else"
        sent.times_heard += 1
        assert sent.times_heard == 1 or (method in _IDEMPOTENT and sent.times_heard == 2), (
            f"{tag} was forwarded again"
        )


class FuzzDoor(OpenDoor):
    """Decides by the path: /mode/tag."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.decide = self._by_path

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
    routes = [
        Route(mode, Match(f"/{mode}/{{tag}}"), "up0") for mode in sorted(set(_MODES) - {"nowhere", "page"})
    ]
    return [
        catalog(UPSTREAM_URL, routes=routes),
        catalog("http://other.example", routes=routes),
        catalog(UPSTREAM_URL, "http://third.example", routes=routes),
    ]


class Run:
    """One case being played."""

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}
        self.told: dict[str, Told] = {}
        self.unsure: set[str] = set()  # tags of which nobody can say whether the answer is whole
        self.loose = False
        self.clients: list[Client] = []
        self.upstreams: list[Upstream] = []
        self.catalogs = catalogs()
        self.door = FuzzDoor(self)
        self.stage = Stage(TIGHT, self.catalogs[0], self.door, Pages())

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
        for client in self.clients:
            self._check_answers(client)

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
        assert 0 <= stage.gateway.buffered_bytes <= TIGHT.buffered_bytes_max
        stage.check()

    # Clients

    def _connect(self) -> None:
        if len(self.clients) < 8:
            end = self.stage.connect(f"203.0.113.{len(self.clients)}")
            end._wire.reads_at_most = _READ_BYTES
            self.clients.append(Client(end))

    def _say(self, who: int, spec: dict[str, Any]) -> None:
        number = who % len(self.clients)
        client = self.clients[number]
        tag = f"t{len(self.sent)}"
        body = _filled(b"<%b>" % tag.encode(), spec["size"])
        spoil = spec.get("spoil")
        lines = [f"{spec['method']} /{spec['mode']}/{tag} HTTP/{spec['version']}", f"Host: c{number}.example"]
        if spec["connection"]:
            lines += (
                [f"Connection: {spec['connection']}", "X-Hop: 1"]
                if spec["connection"] == "X-Hop"
                else [f"Connection: {spec['connection']}"]
            )
        if spec["expect"]:
            lines.append("Expect: 100-continue")
        if spec["fill"]:
            lines.append("X-Fill: " + "f" * spec["fill"])
        lines.append("Farebox-Customer: mallory")
        if spec["framing"] == "length":
            lines.append(f"Content-Length: {len(body)}")
        elif spec["framing"] == "chunked":
            lines.append("Transfer-Encoding: chunked")
        raw = http(*lines, body=_chunked(body, spec["chunk"]) if spec["framing"] == "chunked" else body)
        if spoil:
            client.loose = self.loose = True
            at = spec["at"] % len(raw)
            match spoil:
                case "head":
                    raw = _SPOILT_HEADS[spec["at"] % len(_SPOILT_HEADS)]
                case "chunk":
                    raw = (
                        http(lines[0], lines[1], "Transfer-Encoding: chunked")
                        + _SPOILT_CHUNKS[spec["at"] % len(_SPOILT_CHUNKS)]
                    )
                case "flip":
                    raw = raw[:at] + bytes([spec["byte"]]) + raw[at + 1 :]
                case "cut":
                    raw = raw[:at]
                case _:
                    raw = raw[:at] + bytes([spec["byte"]]) * 3 + raw[at:]
        self.sent[tag] = Sent(tag, number, spec["method"], body, client.loose)
        client.tags.append(tag)
        client.queue += raw

    def _send(self, who: int, count: int) -> None:
        client = self.clients[who % len(self.clients)]
        data = bytes(client.queue[:count])
        del client.queue[:count]
        if data and not client.end.gone:
            client.end.sends(data)

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
        asked = [u for u in self._living() if u.answered < len(u.asked) and not u.queue and u.then is None]
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
        lines = [f"HTTP/{spec['version']} {status} Said", f"X-Tag: {tag}"]
        if spec["close"]:
            lines.append("Connection: close")
        if framing == "length" and status != 204:
            lines.append(f"Content-Length: {len(body)}")
        elif framing == "chunked" and status != 204:
            lines.append("Transfer-Encoding: chunked")
        raw = http("HTTP/1.1 103 Hints", f"X-Hint: {tag}") * spec["interim"] + http(*lines)
        told = Told(status, b"" if bodiless else body, True)
        if not bodiless:
            raw += (
                _chunked(body, spec["chunk"], b"X-Sum: 1\r\n" if spec["trailer"] else b"")
                if framing == "chunked"
                else body
            )
            if framing == "endless":
                upstream.then = "closes"
        if spoil == "malformed":
            raw = _SPOILT_ANSWERS[spec["at"] % len(_SPOILT_ANSWERS)]
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
                if tag in self.told and (upstream.queue or upstream.then or upstream.last):
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
            if status < 200:
                if status == 103:
                    assert fields[b"x-hint"].decode() in client.tags
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
            body, whole, at = _body(fields, data, at, method == "HEAD" or status in (204, 304))
            assert told.body.startswith(body), f"foreign bytes in the answer to {tag}: {body!r}"
            if whole is None or not whole:
                assert at == len(data)
                return
            if tag not in self.unsure:
                assert told.whole, f"the answer to {tag} broke off and was shown as whole"
                assert body == told.body, f"the answer to {tag} is not whole and was shown as such"
            reported = finished[fields[b"farebox-request-id"].decode()]
            assert (reported.status, reported.bytes_down) == (status, len(body)), f"{tag}: {reported}"
            assert method == "HEAD" or reported.bytes_up <= len(self.sent[tag].body)

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


def _body(fields: dict[bytes, bytes], data: bytes, at: int, bodiless: bool) -> tuple[bytes, bool | None, int]:
    """(body, whether whole; None: nobody can say, where the next answer begins)."""
    if bodiless:
        return b"", True, at
    if b"content-length" in fields:
        length = int(fields[b"content-length"])
        body = data[at : at + length]
        return body, len(body) == length, at + len(body)
    if b"transfer-encoding" not in fields:
        return data[at:], None, len(data)
    body = b""
    while True:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return body, False, len(data)
        size = int(data[at:line_end], 16)
        if not size:
            end = data.find(b"\r\n\r\n", at)
            return body, end >= 0, end + 4 if end >= 0 else len(data)
        piece = data[line_end + 2 : line_end + 2 + size]
        body += piece
        at = line_end + 2 + size
        if data[at : at + 2] != b"\r\n":
            assert at + 2 > len(data), "a chunk without its end"
            return body, False, len(data)
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
    if failure_of(acts) is None:
        return None
    acts = shrunk(acts)
    return "\n".join([f"seed {seed}", *(f"  {act}" for act in acts), f"{failure_of(acts)}"])


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
