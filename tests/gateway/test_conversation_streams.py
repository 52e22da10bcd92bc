"""Trailers, upgrades and what cuts a call short, as conversations (conversations.py)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from farebox.app.admission import Call, Standing
from farebox.domain.access import Match, Route
from farebox.gateway.settings import GatewaySettings
from tests.gateway.conversations import Conversation, answered, chunks, forwarded, get, http, ok, seen
from tests.gateway.kit import OpenDoor, catalog
from tests.gateway.stage import UPSTREAM_URL, Stage

DEFAULTS = GatewaySettings()
GET_A = forwarded("GET /a HTTP/1.1")
CHUNKED = "Transfer-Encoding: chunked"


# ── trailers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answers_trailers_go_to_a_client_that_takes_them():
    talk = Conversation().client(
        http("GET /a HTTP/1.1", "Host: api.example", "TE: trailers", "Connection: TE")
    )
    talk.upstream_hears(forwarded("GET /a HTTP/1.1", "TE: trailers", "Connection: TE"))
    trailers = b"X-Sum: 1\r\nContent-Length: 7\r\nFarebox-Customer: mallory\r\n"
    talk.upstream(
        http(
            "HTTP/1.1 200 OK",
            CHUNKED,
            "Trailer: X-Sum, Content-Length",
            body=chunks(b"hi", trailers=trailers),
        )
    )
    talk.client_sees(
        answered(
            "HTTP/1.1 200 OK",
            framing=f"Trailer: X-Sum\r\n{CHUNKED}",
            body=chunks(b"hi", trailers=b"X-Sum: 1\r\n"),
        )
    )
    talk.client_is_kept().upstream_is_kept().ends((200, 0, 2)).play()


def test_an_answers_trailers_end_here_for_one_that_does_not():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(
        http("HTTP/1.1 200 OK", CHUNKED, "Trailer: X-Sum", body=chunks(b"hi", trailers=b"X-Sum: 1\r\n"))
    )
    talk.client_sees(seen()).client_is_kept().upstream_is_kept().play()


def test_a_requests_announced_trailers_go_up_and_no_others():
    raw = http("POST /a HTTP/1.1", "Host: api.example", CHUNKED, "Trailer: X-Sum, Farebox-Customer")
    raw += chunks(b"hi", trailers=b"X-Sum: 1\r\nX-Other: 2\r\nFarebox-Customer: mallory\r\n")
    up = forwarded(
        "POST /a HTTP/1.1", "Trailer: x-sum", framing=CHUNKED, body=chunks(b"hi", trailers=b"X-Sum: 1\r\n")
    )
    Conversation().client(raw).upstream_hears(up).upstream(ok()).client_sees(seen()).ends((200, 2, 2)).play()


def test_trailers_have_a_longest_length_and_a_greatest_number():
    for trailers in (b"X: y\r\n" * 33, b"X: " + b"y" * 9000 + b"\r\n"):
        talk = Conversation().client(
            http("POST /a HTTP/1.1", "Host: api.example", CHUNKED) + chunks(b"hi", trailers=trailers)
        )
        talk.client_is_refused(400, "request_malformed").upstream_hears_no_whole_request().play(cuts=False)


# ── upgrades ────────────────────────────────────────────────────────────────────────────────────────────────────────

UPGRADE = http(
    "GET /a HTTP/1.1",
    "Host: api.example",
    "Connection: keep-alive, Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Key: x",
)
UPGRADE_UP = forwarded(
    "GET /a HTTP/1.1", "Sec-WebSocket-Key: x", framing="Connection: Upgrade\r\nUpgrade: websocket"
)
SWITCHES = http(
    "HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Accept: y"
)
SWITCHED = answered(
    "HTTP/1.1 101 Switching Protocols",
    "Sec-WebSocket-Accept: y",
    ends="Connection: Upgrade\r\nUpgrade: websocket",
)


def upgraded() -> Conversation:
    return Conversation().client(UPGRADE).upstream_hears(UPGRADE_UP).upstream(SWITCHES).client_sees(SWITCHED)


def test_after_an_upgrade_bytes_pass_both_ways_as_they_are():
    talk = (
        upgraded().client(b"\x81\x85GET / HTTP/1.1\r\n\r\n").upstream_hears(b"\x81\x85GET / HTTP/1.1\r\n\r\n")
    )
    talk.upstream(b"HTTP/1.1 200 OK\r\n\r\n\x00\xff").client_sees(b"HTTP/1.1 200 OK\r\n\r\n\x00\xff")
    talk.client_closes().upstream_sees_the_end().ends((101, 20, 21)).play()


def test_the_first_bytes_may_come_with_the_101():
    talk = Conversation().client(UPGRADE).upstream_hears(UPGRADE_UP).upstream(SWITCHES + b"hello")
    talk.client_sees(SWITCHED + b"hello").upstream_closes().client_sees_the_end().ends((101, 0, 5)).play()


def test_what_a_client_sends_before_the_101_is_passed_on_after_it():
    talk = Conversation().client(UPGRADE + b"early").upstream_hears(UPGRADE_UP).upstream(SWITCHES)
    talk.upstream_hears(b"early").client_sees(SWITCHED).client_resets().upstream_sees_the_end().ends(
        (101, 5, 0)
    ).play()


def test_half_a_tunnel_may_end_before_the_other():
    talk = (
        upgraded()
        .client(b"last words")
        .upstream_hears(b"last words")
        .client_half_closes()
        .upstream_sees_the_end()
    )
    talk.upstream(b"mine too").client_sees(b"mine too").upstream_closes().client_sees_the_end().ends(
        (101, 10, 8)
    ).play()


def test_an_upgrade_that_is_refused_is_an_ordinary_answer():
    talk = Conversation().client(UPGRADE + get()).upstream_hears(UPGRADE_UP)
    talk.upstream(http("HTTP/1.1 403 No", "Content-Length: 2", body=b"no"))
    talk.client_sees(answered("HTTP/1.1 403 No", framing="Content-Length: 2", body=b"no"))
    talk.upstream_hears(GET_A, on=1).upstream(ok()).client_sees(seen()).upstream_connections(1).play()


@pytest.mark.parametrize("line", ["Upgrade: h2c", "Upgrade: websocket, other", "X: y", "Upgrade:"])
def test_a_101_to_what_was_not_offered_is_a_bad_answer(line: str):
    talk = Conversation().client(UPGRADE).upstream_hears(UPGRADE_UP)
    talk.upstream(http("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", line) + b"evil")
    talk.client_is_refused(502, "upstream_malformed", closed=False).upstream_sees_the_end().ends(
        (0, 0, 0)
    ).play()


def test_a_request_for_an_upgrade_has_no_body():
    raw = http(
        "POST /a HTTP/1.1",
        "Host: api.example",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Content-Length: 2",
        body=b"hi",
    )
    Conversation().client(raw).client_is_refused(501, "upgrade_unsupported").upstream_connections(0).play()


@pytest.mark.parametrize(
    "lines", [("Upgrade: websocket",), ("Connection: close", "Upgrade: websocket"), ("Connection: Upgrade",)]
)
def test_an_upgrade_that_connection_does_not_name_is_none(lines: tuple[str, ...]):
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.1", "Host: api.example", *lines))
        .upstream_hears(GET_A)
        .upstream(SWITCHES)
    )
    talk.client_is_refused(502, "upstream_malformed", closed="Connection: close" in lines).play()


def test_http_1_0_upgrades_to_nothing():
    talk = Conversation().client(UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"keep-alive, ", b""))
    talk.upstream_hears(forwarded("GET /a HTTP/1.1", "Sec-WebSocket-Key: x")).upstream(ok())
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().play()


def test_a_tunnel_in_which_nothing_moves_is_closed():
    talk = upgraded().wait(DEFAULTS.tunnel_idle_timeout_s - 1).upstream(b"x").client_sees(b"x")
    talk.wait(DEFAULTS.tunnel_idle_timeout_s - 1).client_is_kept().wait(
        2
    ).client_sees_the_end().upstream_sees_the_end()
    talk.ends((101, 0, 1)).play()


def test_a_tunnel_waits_for_the_slower_side():
    stage = Stage()
    client = stage.connect()
    client.sends(UPGRADE)
    upstream = stage.upstreams[0]
    upstream.sends(SWITCHES)
    client.stops_taking()
    for _ in range(256):
        upstream.sends(b"x" * 16 * 1024)

    assert client.unsent < 1024 * 1024
    client.takes_on()
    for _ in range(100):
        stage.settle()
    assert client.received.endswith(b"x" * 256 * 16 * 1024)
    stage.leave()


# ── what cuts a call short ──────────────────────────────────────────────────────────────────────────────────────────


def within(seconds: float) -> Conversation:
    """A route whose calls may take so long in all."""
    route = replace(Route("all", Match("/{*rest}"), "up0"), total_timeout_s=seconds)
    return Conversation(served=catalog(UPSTREAM_URL, routes=[route]))


def test_a_call_has_so_much_time_in_all_however_it_trickles():
    talk = (
        within(4.0)
        .client(get())
        .upstream_hears(GET_A)
        .upstream(http("HTTP/1.1 200 OK", "Content-Length: 10"))
    )
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 10"))
    for _ in range(3):
        talk.wait(1.0).upstream(b"x").client_sees(b"x")
    talk.client_is_kept().wait(1.5).client_sees_the_end().upstream_sees_the_end().ends((0, 0, 3)).play()


def test_a_call_that_was_not_answered_in_all_its_time_is_told_so():
    talk = within(2.0).client(get()).upstream_hears(GET_A).wait(1.5).client_is_kept().wait(1.0)
    talk.client_is_refused(504, "upstream_timeout", closed=False).upstream_sees_the_end().ends(
        (0, 0, 0)
    ).play()


def standing(door: OpenDoor) -> None:
    """Calls stand on customer cus_1 and its key."""
    door.decide = lambda call: door.admitted(call, standing=Standing("cus_1", float("inf"), "key_1"))


@pytest.mark.parametrize("whom", ["cus_1", "key_1"])
def test_a_revoked_customers_calls_are_cut_and_no_others(whom: str):
    def decide(door: OpenDoor) -> None:
        def by_path(call: Call):  # type: ignore[no-untyped-def]
            who = "cus_2" if call.path == "/other" else "cus_1"
            return door.admitted(call, standing=Standing(who, float("inf"), who.replace("cus", "key")))

        door.decide = by_path

    talk = Conversation(set_door=decide).client(get()).upstream_hears(GET_A)
    talk.client(get("/other"), on=2).upstream_hears(forwarded("GET /other HTTP/1.1"), on=2)
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Length: 10", body=b"hello"), on=1)
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 10", body=b"hello"))
    talk.then(lambda stage: stage.gateway.cut([whom])).client_sees_the_end().upstream_sees_the_end(1)
    talk.upstream(ok(), on=2).client_sees(seen(), on=2).ends((0, 0, 5), (200, 0, 2)).play()


def test_a_revoked_customers_tunnel_is_cut():
    talk = (
        Conversation(set_door=standing)
        .client(UPGRADE)
        .upstream_hears(UPGRADE_UP)
        .upstream(SWITCHES)
        .client_sees(SWITCHED)
    )
    talk.upstream(b"hi").client_sees(b"hi").then(lambda stage: stage.gateway.cut(["cus_1"]))
    talk.client_sees_the_end().upstream_sees_the_end().ends((101, 0, 2)).play()


class Allowance:
    """A flow that lets so many bytes through and then no more."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> int:
        taken = min(size, self.left)
        self.left -= taken
        return taken

    async def more(self) -> bool:
        return False


class Allowances:
    def __init__(self, upload: int | None, download: int | None) -> None:
        self.upload = None if upload is None else Allowance(upload)
        self.download = None if download is None else Allowance(download)
        self.said: list[bytes] = []

    def credits(self, value: bytes) -> None:
        self.said.append(value)


def metered(upload: int | None = None, download: int | None = None) -> Conversation:
    """So many bytes may go up, and so many come down."""

    def decide(door: OpenDoor) -> None:
        door.decide = lambda call: door.admitted(call, fare="pass", meter=Allowances(upload, download))  # type: ignore[arg-type]

    return Conversation(set_door=decide)


@pytest.mark.parametrize("size", [7, 8, 1000])
def test_a_download_ends_at_the_exact_byte_and_never_looks_whole(size: int):
    body = bytes(n % 251 for n in range(size))
    talk = metered(download=7).client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", f"Content-Length: {size}", body=body))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing=f"Content-Length: {size}", body=body[:7]))
    if size == 7:
        talk.client_is_kept()
    else:
        talk.client_sees_the_end()
    talk.ends((200, 0, 7)).play()


def test_an_upstream_that_goes_on_after_the_last_byte_is_left():
    talk = metered(download=7).client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Length: 1000", body=b"x" * 10))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 1000", body=b"x" * 7))
    talk.client_sees_the_end().upstream_sees_the_end().ends((200, 0, 7)).play()


def test_a_chunked_download_that_is_cut_has_no_last_chunk():
    talk = metered(download=7).client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", CHUNKED, body=chunks(b"hello", b" world", last=False)))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing=CHUNKED, body=chunks(b"hello w", last=False)))
    talk.client_sees_the_end().upstream_sees_the_end().ends((200, 0, 7)).play()


def test_a_little_that_is_left_of_an_upload_that_was_cut_is_read_off_and_goes_nowhere():
    talk = metered(upload=7).client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 20"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 20"), on=1)
    talk.client(b"0123456789").upstream_hears(b"0123456", on=1).upstream_sees_the_end(on=1)
    talk.client_is_refused(402, "pass_exhausted", closed=False).ends((0, 7, 0), (200, 0, 2))
    talk.client(b"9876543210" + get()).upstream_hears(GET_A, on=2).upstream(ok(), on=2)
    talk.client_sees(seen()).client_is_kept().play(cuts=False)


@pytest.mark.parametrize("framing", [f"Content-Length: {DEFAULTS.unread_body_bytes_max + 11}", CHUNKED])
def test_an_upload_of_which_much_or_who_knows_how_much_is_left_closes_when_it_is_cut(framing: str):
    piece = chunks(b"0123456789", last=False) if framing == CHUNKED else b"0123456789"
    passed = chunks(b"0123456", last=False) if framing == CHUNKED else b"0123456"
    talk = metered(upload=7).client(http("POST /a HTTP/1.1", "Host: api.example", framing))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing=framing))
    talk.client(piece).upstream_hears(passed).upstream_sees_the_end()
    talk.client_is_refused(402, "pass_exhausted").ends((0, 7, 0)).play(cuts=False)


def test_an_upload_is_cut_at_the_exact_byte_and_the_upstream_never_sees_a_whole_request():
    def told(stage: Stage) -> None:
        said = stage.clients[0].unheard()
        assert said.startswith(b"HTTP/1.1 402 ")
        assert b'"code": "pass_exhausted"' in said

    talk = metered(upload=7).client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 20"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 20"))
    talk.client(b"0123456789").upstream_hears(b"0123456").upstream_sees_the_end().then(told).ends(
        (0, 7, 0)
    ).play()


def test_a_tunnel_is_cut_at_the_exact_byte():
    talk = (
        metered(download=7)
        .client(UPGRADE)
        .upstream_hears(UPGRADE_UP)
        .upstream(SWITCHES)
        .client_sees(SWITCHED)
    )
    talk.upstream(b"0123456789").client_sees(b"0123456").client_sees_the_end().upstream_sees_the_end()
    talk.ends((101, 0, 7)).play()


class _Later:
    """A flow that lets nothing pass at once, and everything half a second later."""

    def __init__(self) -> None:
        self.left = 0
        self.taken = 0

    def take(self, size: int) -> int:
        passing = min(size, self.left)
        self.left -= passing
        self.taken += passing
        return passing

    async def more(self) -> bool:
        await asyncio.sleep(0.5)
        self.left = 1000
        return True


class _PacedBothWays:
    def __init__(self) -> None:
        self.upload = _Later()
        self.download = _Later()

    def credits(self, value: bytes) -> None:
        """Nothing is priced here."""


def test_an_upload_that_still_waits_when_the_answer_is_whole_costs_nothing():
    door, meter = OpenDoor(), _PacedBothWays()
    door.decide = lambda call: door.admitted(call, meter=meter)
    stage = Stage(door=door)
    client = stage.connect()
    client.sends(http("POST /a HTTP/1.1", "Host: a", "Content-Length: 5", body=b"hello"))
    [upstream] = stage.upstreams
    upstream.sends(ok(b"no"))
    stage.wait(3.0)
    arrived = bytes(upstream.received).partition(b"\r\n\r\n")[2]
    [finished] = door.finished
    stage.leave()
    assert (len(arrived), finished.bytes_up, meter.upload.taken) == (0, 0, 0)
