"""HTTP done right, rule by rule, as conversations; each also holds byte by byte and in random pieces (conversations.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farebox.app.admission import Answer, Call, Refusal
from farebox.domain.access import Match, Route
from farebox.gateway.problems import refusal
from farebox.gateway.settings import GatewaySettings
from tests.gateway.conversations import (
    CLIENT_ADDRESS,
    Conversation,
    answered,
    chunks,
    essence,
    forwarded,
    get,
    http,
    ok,
    seen,
    whole_requests,
)
from tests.gateway.kit import OpenDoor, catalog
from tests.gateway.stage import UPSTREAM_URL, Stage

KIB = 1024
DEFAULTS = GatewaySettings()
GET_A = forwarded("GET /a HTTP/1.1")


def one_call(conversation: Conversation | None = None) -> Conversation:
    """A conversation whose first call is over: both connections are open and used."""
    talk = conversation or Conversation()
    return talk.client(get()).upstream_hears(GET_A).upstream(ok()).client_sees(seen())


def refusing(code: str) -> Conversation:
    """The door says no."""

    def no(call: Call) -> Refusal:
        return refusal(code, "Bring what is asked for.")

    return Conversation(set_door=lambda door: setattr(door, "decide", no))


def binding(settings: GatewaySettings | None = None) -> Conversation:
    """The door wants the whole body first."""
    return Conversation(settings, set_door=lambda door: setattr(door, "binds_bodies", True))


# ── keep-alive and pipelining ───────────────────────────────────────────────────────────────────────────────────────


def test_a_call_goes_up_and_its_answer_comes_down():
    one_call().ends((200, 0, 2)).play()


def test_fields_and_phrases_pass_as_they_came():
    talk = Conversation()
    talk.client(
        http(
            "GET /a?b=c HTTP/1.1",
            "hOsT:api.example",
            "X-Empty:",
            "X-Blanks:  a b \t",
            "x-Word: \u00e9",
            "Cookie: a=b",
        )
    )
    talk.upstream_hears(
        forwarded("GET /a?b=c HTTP/1.1", "X-Empty:", "X-Blanks:  a b \t", "x-Word: \u00e9", "Cookie: a=b")
    )
    talk.upstream(
        http("HTTP/1.1 299 Quite \u00e9", "Set-Cookie: a=1", "Set-Cookie: b=2", "Content-Length: 0")
    )
    talk.client_sees(
        answered(
            "HTTP/1.1 299 Quite \u00e9", "Set-Cookie: a=1", "Set-Cookie: b=2", framing="Content-Length: 0"
        )
    )
    talk.play()


def test_both_connections_are_kept_for_the_next_call():
    talk = one_call()
    for _ in range(3):
        one_call(talk)
    talk.upstream_connections(1).client_is_kept().ends(*[(200, 0, 2)] * 4).play()


def pipelining() -> Conversation:
    talk = Conversation()
    talk.client(
        get("/1")
        + http("POST /2 HTTP/1.1", "Host: api.example", "Content-Length: 3", body=b"abc")
        + http("POST /3 HTTP/1.1", "Host: api.example", "Transfer-Encoding: chunked", body=chunks(b"hi"))
        + http("HEAD /4 HTTP/1.1", "Host: api.example")
    )
    talk.upstream_hears(forwarded("GET /1 HTTP/1.1")).upstream(ok(b"one")).client_sees(seen(b"one"))
    talk.upstream_hears(forwarded("POST /2 HTTP/1.1", framing="Content-Length: 3", body=b"abc"))
    talk.upstream(ok(b"two")).client_sees(seen(b"two"))
    talk.upstream_hears(
        forwarded("POST /3 HTTP/1.1", framing="Transfer-Encoding: chunked", body=chunks(b"hi"))
    )
    talk.upstream(ok(b"three")).client_sees(seen(b"three"))
    talk.upstream_hears(forwarded("HEAD /4 HTTP/1.1"))
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Length: 1000"))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 1000"))
    return talk.upstream_connections(1).client_is_kept()


def test_pipelined_requests_go_up_one_by_one_and_are_answered_in_order():
    pipelining().play()


def test_pipelined_requests_may_be_cut_at_any_place():
    for place in range(1, 400):
        pipelining().play_once(lambda data, at=place: [piece for piece in (data[:at], data[at:]) if piece])  # type: ignore[misc]


def test_a_client_that_says_close_is_answered_and_closed():
    talk = Conversation()
    talk.client(http("GET /a HTTP/1.1", "Host: api.example", "Connection: close") + get("/never"))
    talk.upstream_hears(GET_A).upstream(ok())
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().upstream_hears_nothing().play()


def test_http_1_0_is_served_and_closed_and_goes_up_as_1_1():
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.0", "Host: api.example"))
        .upstream_hears(GET_A)
        .upstream(ok())
    )
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().play()


def test_http_1_0_is_kept_when_it_asks():
    talk = Conversation()
    for _ in range(2):
        talk.client(http("GET /a HTTP/1.0", "Host: api.example", "Connection: keep-alive"))
        talk.upstream_hears(GET_A).upstream(ok())
        talk.client_sees(
            answered(
                "HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: keep-alive", body=b"hi"
            )
        )
    talk.client_is_kept().play()


def test_close_wins_over_keep_alive():
    talk = Conversation().client(
        http("GET /a HTTP/1.0", "Host: api.example", "Connection: keep-alive, close")
    )
    talk.upstream_hears(GET_A).upstream(ok())
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().play()


def test_an_upstream_that_says_close_costs_the_client_nothing():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", "Connection: close", "Content-Length: 2", body=b"hi")).client_sees(
        seen()
    )
    talk.upstream_sees_the_end(1).client_is_kept()
    one_call(talk).upstream_connections(2).play()


def test_an_http_1_0_upstream_is_closed_unless_it_keeps():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(
        http("HTTP/1.0 200 OK", "Connection: keep-alive", "Content-Length: 2", body=b"hi")
    ).client_sees(seen())
    talk.upstream_is_kept().client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.0 200 OK", "Content-Length: 2", body=b"hi")).client_sees(seen())
    talk.upstream_sees_the_end(1).client_is_kept().play()


def test_one_empty_line_before_a_request_is_forgiven():
    talk = one_call().client(b"\r\n" + get()).upstream_hears(GET_A).upstream(ok()).client_sees(seen())
    talk.play()


def test_a_client_that_goes_takes_its_call_with_it():
    for leave in ("closes", "half_closes", "resets"):
        talk = Conversation().client(get()).upstream_hears(GET_A)
        getattr(talk, f"client_{leave}")()
        talk.upstream_sees_the_end().ends((0, 0, 0)).play()


def test_a_client_that_goes_between_calls_leaves_the_upstreams_connection_to_others():
    talk = one_call().client_closes().client_sees_the_end().upstream_is_kept()
    talk.client(get(), on=2).upstream_hears(GET_A).upstream(ok()).client_sees(seen(), on=2)
    talk.upstream_connections(1).play()


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_of_known_length_goes_up_as_it_comes():
    talk = Conversation()
    talk.client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 10", body=b"first"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 10", body=b"first"))
    talk.client(b"other").upstream_hears(b"other").upstream(ok()).client_sees(seen()).ends(
        (200, 10, 2)
    ).play()


def test_a_chunked_body_goes_up_as_it_comes():
    talk = Conversation()
    talk.client(
        http(
            "POST /a HTTP/1.1",
            "Host: api.example",
            "Transfer-Encoding: Chunked",
            body=chunks(b"first", last=False),
        )
    )
    talk.upstream_hears(
        forwarded("POST /a HTTP/1.1", framing="Transfer-Encoding: chunked", body=chunks(b"first", last=False))
    )
    talk.client(b"0005;ext=1\r\nother\r\n").upstream_hears(b"5\r\nother\r\n")
    talk.client(b"00;last\r\n\r\n").upstream_hears(b"0\r\n\r\n")
    talk.upstream(ok()).client_sees(seen()).ends((200, 10, 2)).play_once(lambda data: [data])


def test_a_chunked_body_may_be_cut_anywhere():
    talk = Conversation()
    talk.client(
        http(
            "POST /a HTTP/1.1",
            "Host: api.example",
            "Transfer-Encoding: chunked",
            body=b'5;e="x"\r\nfirst\r\n002\r\n\r\n\r\n0\r\n\r\n',
        )
    )
    talk.upstream_hears(
        forwarded("POST /a HTTP/1.1", framing="Transfer-Encoding: chunked", body=chunks(b"first\r\n"))
    )
    talk.upstream(ok()).client_sees(seen()).ends((200, 7, 2)).play()


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "PURGE"])
def test_any_method_may_have_a_body(method: str):
    talk = Conversation()
    talk.client(http(f"{method} /a HTTP/1.1", "Host: api.example", "Content-Length: 2", body=b"hi"))
    talk.upstream_hears(forwarded(f"{method} /a HTTP/1.1", framing="Content-Length: 2", body=b"hi"))
    talk.upstream(ok()).client_sees(seen()).ends((200, 2, 2)).play()


def test_an_empty_body_keeps_its_length():
    talk = Conversation().client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 0"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 0"))
    talk.upstream(ok(b"")).client_sees(seen(b"")).ends((200, 0, 0)).play()


def test_a_body_that_the_door_wants_whole_goes_up_with_its_length():
    talk = binding()
    talk.client(
        http(
            "POST /a HTTP/1.1",
            "Host: api.example",
            "Transfer-Encoding: chunked",
            body=chunks(b"he", last=False),
        )
    )
    talk.client(chunks(b"llo"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5", body=b"hello"))
    talk.upstream(ok()).client_sees(seen()).ends((200, 5, 2)).play()


def test_an_answer_of_known_length_comes_down_as_it_comes():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Length: 10", body=b"first"))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 10", body=b"first"))
    talk.upstream(b"other").client_sees(b"other").client_is_kept().upstream_is_kept().ends(
        (200, 0, 10)
    ).play()


def test_a_chunked_answer_comes_down_as_it_comes():
    talk = Conversation().client(get("/events")).upstream_hears(forwarded("GET /events HTTP/1.1"))
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked"))
    talk.client_sees(
        answered("HTTP/1.1 200 OK", "Content-Type: text/event-stream", framing="Transfer-Encoding: chunked")
    )
    for n in range(3):
        talk.upstream(b"8;x=y\r\ndata: %d\n\r\n" % n).client_sees(b"8\r\ndata: %d\n\r\n" % n)
    talk.upstream(b"0\r\n\r\n").client_sees(b"0\r\n\r\n").client_is_kept().upstream_is_kept().ends(
        (200, 0, 24)
    )
    talk.play_once(lambda data: [data])


def test_a_chunked_answer_may_be_cut_anywhere():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(
        http(
            "HTTP/1.1 200 OK",
            "Transfer-Encoding: chunked",
            body=b'5;x="y"\r\nhello\r\n002\r\n\r\n\r\n0\r\n\r\n',
        )
    )
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 7", body=b"hello\r\n"))
    talk.client_is_kept().upstream_is_kept().ends((200, 0, 7)).play()


def test_an_answer_that_ends_with_its_connection_is_whole():
    talk = (
        Conversation()
        .client(get())
        .upstream_hears(GET_A)
        .upstream(http("HTTP/1.1 200 OK", "X: 1", body=b"hello"))
    )
    talk.client_sees(
        answered(
            "HTTP/1.1 200 OK", "X: 1", framing="Transfer-Encoding: chunked", body=chunks(b"hello", last=False)
        )
    )
    talk.upstream_closes().client_sees(b"0\r\n\r\n").client_is_kept().ends((200, 0, 5))
    talk.play_once(lambda data: [data])


def test_an_answer_of_unknown_length_ends_with_the_connection_of_a_1_0_client():
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.0", "Host: api.example", "Connection: keep-alive"))
        .upstream_hears(GET_A)
    )
    talk.upstream(http("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=chunks(b"hello", last=False)))
    talk.client_sees(answered("HTTP/1.1 200 OK", ends="Connection: close", body=b"hello"))
    talk.upstream(chunks(b"again")).client_sees(b"again").client_sees_the_end().upstream_is_kept().play()


@pytest.mark.parametrize("ending", ["closes", "resets"])
@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (("Content-Length: 10", b"hello"), ("Content-Length: 10", b"hello")),
        (
            ("Transfer-Encoding: chunked", chunks(b"hello", last=False)),
            ("Transfer-Encoding: chunked", chunks(b"hello", last=False)),
        ),
    ],
)
def test_an_answer_that_breaks_off_is_never_shown_as_whole(
    ending: str, sent: tuple[str, bytes], shown: tuple[str, bytes]
):
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 200 OK", sent[0], body=sent[1]))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing=shown[0], body=shown[1]))
    getattr(talk, f"upstream_{ending}")()
    talk.client_sees_the_end().ends((0, 0, 5)).play()


def test_an_answer_without_length_that_is_reset_is_not_whole():
    talk = Conversation().client(get()).upstream_hears(GET_A).upstream(http("HTTP/1.1 200 OK", body=b"hello"))
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Transfer-Encoding: chunked", body=chunks(b"hello", last=False))
    )
    talk.upstream_resets().client_sees_the_end().ends((0, 0, 5)).play()


def test_an_early_answer_ends_the_call_and_closes_both_connections():
    talk = Conversation()
    talk.client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 1000", body=b"x" * 10))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 1000", body=b"x" * 10))
    talk.upstream(http("HTTP/1.1 413 Too much", "Content-Length: 2", body=b"no"))
    talk.client_sees(
        answered("HTTP/1.1 413 Too much", framing="Content-Length: 2", ends="Connection: close", body=b"no")
    )
    talk.client(b"x" * 10).upstream_sees_the_end().wait(DEFAULTS.linger_s + 1).client_sees_the_end().ends(
        (413, 10, 2)
    ).play()


# ── Expect: 100-continue ────────────────────────────────────────────────────────────────────────────────────────────

EXPECTING = http("POST /a HTTP/1.1", "Host: api.example", "Expect: 100-continue", "Content-Length: 5")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_a_client_that_waits_is_told_to_continue_once_it_is_admitted():
    talk = Conversation().client(EXPECTING).client_sees(CONTINUE)
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5"))
    talk.client(b"hello").upstream_hears(b"hello").upstream(CONTINUE + ok()).client_sees(
        seen()
    ).client_is_kept().play()


def test_a_client_whose_body_is_wanted_whole_is_told_to_continue():
    talk = binding().client(EXPECTING).client_sees(CONTINUE).client(b"hello")
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5", body=b"hello"))
    talk.upstream(ok()).client_sees(seen()).play()


def test_a_client_that_waits_and_is_refused_is_not_told_to_continue():
    refusing("credential_missing").client(EXPECTING).client_is_refused(401, "credential_missing").play()


def test_a_client_that_did_not_wait_is_not_told_to_continue():
    talk = Conversation().client(EXPECTING + b"hello")
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5", body=b"hello"))
    talk.upstream(ok()).client_sees(seen()).play(cuts=False)


def test_http_1_0_knows_no_continue():
    talk = Conversation().client(EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0"))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5"))
    talk.client(b"hello").upstream_hears(b"hello").upstream(ok())
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().play()


def test_there_is_nothing_to_wait_for_without_a_body():
    talk = Conversation().client(http("GET /a HTTP/1.1", "Host: api.example", "Expect: 100-continue"))
    talk.upstream_hears(GET_A).upstream(ok()).client_sees(seen()).play()


def test_no_other_expectation_is_met():
    talk = Conversation().client(EXPECTING.replace(b"100-continue", b"miracles"))
    talk.client_is_refused(417, "expectation_failed").upstream_hears_nothing().play()


# ── answers without a body, and interim ones ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked", "X: 1"])
def test_an_answer_to_head_has_no_body_whatever_it_says(framing: str):
    talk = (
        Conversation()
        .client(http("HEAD /a HTTP/1.1", "Host: api.example"))
        .upstream_hears(forwarded("HEAD /a HTTP/1.1"))
    )
    talk.upstream(http("HTTP/1.1 200 OK", framing))
    if framing == "X: 1":
        talk.client_sees(answered("HTTP/1.1 200 OK", framing))
    else:
        talk.client_sees(answered("HTTP/1.1 200 OK", framing=framing))
    one_call(talk).upstream_connections(1).client_is_kept().play()


def test_204_and_304_have_no_body():
    talk = Conversation()
    talk.client(get()).upstream_hears(GET_A).upstream(http("HTTP/1.1 204 No Content"))
    talk.client_sees(answered("HTTP/1.1 204 No Content"))
    talk.client(get()).upstream_hears(GET_A).upstream(
        http("HTTP/1.1 304 Not Modified", 'ETag: "x"', "Content-Length: 1000")
    )
    talk.client_sees(answered("HTTP/1.1 304 Not Modified", 'ETag: "x"', framing="Content-Length: 1000"))
    one_call(talk).upstream_connections(1).client_is_kept().play()


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_a_204_that_announces_a_body_is_the_last_of_its_connection(framing: str):
    """RFC 9110 §8.6, RFC 9112 §6.1: it must not; what such an upstream sends next may be that body."""
    talk = (
        Conversation().client(get()).upstream_hears(GET_A).upstream(http("HTTP/1.1 204 No Content", framing))
    )
    talk.client_sees(answered("HTTP/1.1 204 No Content")).upstream_sees_the_end(1)
    one_call(talk).upstream_connections(2).client_is_kept().play()


def test_interim_answers_pass_and_100_is_ours():
    talk = Conversation().client(get()).upstream_hears(GET_A)
    talk.upstream(
        CONTINUE + http("HTTP/1.1 103 Early Hints", "Link: </s.css>", "Connection: X-Hop", "X-Hop: 1")
    )
    talk.client_sees(http("HTTP/1.1 103 Early Hints", "Link: </s.css>"))
    talk.upstream(http("HTTP/1.1 102 Processing") + ok())
    talk.client_sees(http("HTTP/1.1 102 Processing") + seen()).client_is_kept().upstream_is_kept().play()


def test_http_1_0_sees_no_interim_answers():
    talk = Conversation().client(http("GET /a HTTP/1.0", "Host: api.example")).upstream_hears(GET_A)
    talk.upstream(http("HTTP/1.1 103 Early Hints", "Link: </s.css>") + ok())
    talk.client_sees(
        answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
    )
    talk.client_sees_the_end().play()


def test_an_upstream_that_only_hints_is_given_up():
    talk = Conversation().client(get()).upstream_hears(GET_A).upstream(http("HTTP/1.1 100 Continue") * 17)
    talk.client_is_refused(502, "upstream_malformed", closed=False).upstream_sees_the_end().ends(
        (0, 0, 0)
    ).play()


# ── hop by hop ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_about_a_hop_stays_on_it():
    talk = Conversation()
    talk.client(
        http(
            "GET /a HTTP/1.1", "Host: api.example", "Connection: keep-alive, X-Hop", "X-Hop: 1", "x-hop: 2", "Keep-Alive: timeout=5",
            "Proxy-Connection: keep-alive", "Proxy-Authorization: Basic x", "Proxy-Authenticate: x", "X-End: 1",
        )
    )  # fmt: skip
    talk.upstream_hears(forwarded("GET /a HTTP/1.1", "X-End: 1"))
    talk.upstream(
        http(
            "HTTP/1.1 200 OK", "Connection: X-Hop", "connection: keep-alive", "X-Hop: 1", "Keep-Alive: timeout=5", "Upgrade: h2c",
            "Proxy-Authenticate: x", "Proxy-Connection: x", "X-End: 1", "Content-Length: 2", body=b"hi",
        )
    )  # fmt: skip
    talk.client_sees(answered("HTTP/1.1 200 OK", "X-End: 1", framing="Content-Length: 2", body=b"hi")).play()


def test_an_offer_of_http_2_is_ignored():
    talk = Conversation()
    talk.client(
        http(
            "GET /a HTTP/1.1",
            "Host: api.example",
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            "HTTP2-Settings: AAMAAABk",
        )
    )
    talk.upstream_hears(GET_A).upstream(ok()).client_sees(seen()).play()


@pytest.mark.parametrize(
    "name",
    ["Host", "Content-Length", "Farebox-Customer", "X-Forwarded-For", "Transfer-Encoding", "close, Host"],
)
def test_connection_names_nothing_away_that_we_write(name: str):
    talk = Conversation()
    talk.client(
        http("POST /a HTTP/1.1", "Host: api.example", f"Connection: {name}", "Content-Length: 2", body=b"hi")
    )
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 2", body=b"hi"))
    talk.upstream(ok())
    if "close" in name:
        talk.client_sees(
            answered("HTTP/1.1 200 OK", framing="Content-Length: 2", ends="Connection: close", body=b"hi")
        )
        talk.client_sees_the_end()
    else:
        talk.client_sees(seen()).client_is_kept()
    talk.play()


# ── retry ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_a_stale_connection_is_replaced_for_what_may_be_repeated(method: str, ending: str):
    talk = (
        one_call()
        .client(http(f"{method} /b HTTP/1.1", "Host: api.example"))
        .upstream_hears(forwarded(f"{method} /b HTTP/1.1"), on=1)
    )
    getattr(talk, f"upstream_{ending}")(on=1)
    talk.upstream_hears(forwarded(f"{method} /b HTTP/1.1"), on=2).upstream(
        http("HTTP/1.1 200 OK", "Content-Length: 0")
    )
    talk.client_sees(seen(b"")).ends((200, 0, 2), (200, 0, 0)).play()


@pytest.mark.parametrize("method", ["POST", "PATCH", "PURGE", "get"])
def test_what_may_not_be_repeated_is_not(method: str):
    talk = (
        one_call()
        .client(http(f"{method} /b HTTP/1.1", "Host: api.example"))
        .upstream_hears(forwarded(f"{method} /b HTTP/1.1"), on=1)
    )
    talk.upstream_closes(on=1).client_is_refused(502, "upstream_failed", closed=False)
    talk.upstream_connections(1).ends((200, 0, 2), (0, 0, 0)).play()


def test_a_body_that_is_at_hand_is_sent_again_and_one_that_streams_is_not():
    put = http("PUT /b HTTP/1.1", "Host: api.example", "Content-Length: 5", body=b"hello")
    up = forwarded("PUT /b HTTP/1.1", framing="Content-Length: 5", body=b"hello")
    talk = one_call().client(put).upstream_hears(up, on=1).upstream_closes(on=1).upstream_hears(up, on=2)
    talk.upstream(ok()).client_sees(seen()).ends((200, 0, 2), (200, 5, 2)).play(cuts=False)

    talk = (
        one_call()
        .client(put[:-2])
        .upstream_hears(up[:-2], on=1)
        .client(put[-2:])
        .upstream_hears(up[-2:], on=1)
    )
    talk.upstream_closes(on=1).client_is_refused(502, "upstream_failed", closed=False).upstream_connections(
        1
    ).play()


def test_a_head_longer_than_what_may_be_sent_ahead_is_still_read():
    fill = "X: " + "y" * 400
    talk = Conversation(GatewaySettings(ahead_bytes_max=200, head_bytes_max=1000))
    second = http("GET /b HTTP/1.1", "Host: api.example", fill)
    talk.client(get()).upstream_hears(GET_A).client(second[:300])
    talk.upstream(ok()).client_sees(seen()).client(second[300:])
    talk.upstream_hears(forwarded("GET /b HTTP/1.1", fill)).upstream(ok()).client_sees(seen()).play(
        cuts=False
    )


def test_a_fresh_connection_is_not_tried_twice():
    talk = Conversation().client(get()).upstream_hears(GET_A).upstream_closes()
    talk.client_is_refused(502, "upstream_failed", closed=False).upstream_connections(1).ends(
        (0, 0, 0)
    ).play()


def test_an_answer_that_began_is_not_asked_for_again():
    talk = (
        one_call()
        .client(get())
        .upstream_hears(GET_A, on=1)
        .upstream(b"HTTP/1.1 2", on=1)
        .upstream_closes(on=1)
    )
    talk.client_is_refused(502, "upstream_failed", closed=False).upstream_connections(1).play()


def test_a_connection_that_was_closed_while_idle_is_not_used():
    talk = (
        one_call()
        .upstream_closes(on=1)
        .client(http("POST /b HTTP/1.1", "Host: api.example", "Content-Length: 0"))
    )
    talk.upstream_hears(forwarded("POST /b HTTP/1.1", framing="Content-Length: 0"), on=2)
    talk.upstream(ok()).client_sees(seen()).play()


# ── waits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _one_call_failed(stage: Stage) -> None:
    assert [f.status for f in stage.door.finished] == [0]


def a_bit_more(seconds: float) -> float:
    return seconds + 2 * DEFAULTS.tick_s


def test_a_head_must_be_there_in_time_however_it_trickles():
    talk = Conversation().client(b"GET /a HTTP/1.1\r\nHost: api.example\r\n")
    for _ in range(9):
        talk.wait(1.0).client(b"X: y\r\n")
    talk.wait(0.9).client_is_kept().wait(1.0).client_is_refused(408, "request_timeout").play(cuts=False)


def test_a_connection_that_never_speaks_is_closed_without_a_word():
    talk = Conversation().client_connects().wait(DEFAULTS.head_timeout_s - 1).client_is_kept()
    talk.wait(a_bit_more(1)).client_sees_the_end().play()


def test_an_idle_connection_is_closed_without_a_word():
    (
        one_call()
        .wait(DEFAULTS.idle_timeout_s - 1)
        .client_is_kept()
        .wait(a_bit_more(1))
        .client_sees_the_end()
        .play()
    )


def test_a_body_must_move_on():
    talk = Conversation().client(
        http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 10", body=b"abc")
    )
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 10", body=b"abc"))
    talk.wait(DEFAULTS.body_stall_timeout_s - 1).client(b"d").upstream_hears(b"d")
    talk.wait(DEFAULTS.body_stall_timeout_s - 1).client_is_kept().wait(a_bit_more(1))
    talk.client_is_refused(408, "request_timeout").upstream_sees_the_end().ends((0, 4, 0)).play()


def test_a_body_that_is_wanted_whole_must_move_on():
    talk = binding().client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 10", body=b"abc"))
    talk.wait(a_bit_more(DEFAULTS.body_stall_timeout_s)).client_is_refused(408, "request_timeout")
    talk.upstream_hears_nothing().ends().play()


def test_an_upstream_must_begin_to_answer_in_time():
    talk = Conversation().client(get()).upstream_hears(GET_A).wait(4.0).client_is_kept().wait(a_bit_more(1.0))
    talk.client_is_refused(504, "upstream_timeout", closed=False).upstream_sees_the_end().ends(
        (0, 0, 0)
    ).play()


def test_the_time_to_answer_begins_when_the_request_is_whole():
    talk = Conversation().client(
        http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 4", body=b"ab")
    )
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 4", body=b"ab"))
    talk.wait(20).client(b"cd").upstream_hears(b"cd").wait(4).upstream(ok()).client_sees(seen()).play()


def test_an_upstream_must_go_on_answering():
    talk = (
        Conversation()
        .client(get())
        .upstream_hears(GET_A)
        .upstream(http("HTTP/1.1 200 OK", "Content-Length: 10", body=b"hello"))
    )
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 10", body=b"hello"))
    talk.wait(DEFAULTS.upstream_stall_timeout_s - 1).upstream(b"!").client_sees(b"!")
    talk.wait(DEFAULTS.upstream_stall_timeout_s - 1).client_is_kept().wait(a_bit_more(1))
    talk.client_sees_the_end().upstream_sees_the_end().ends((0, 0, 6)).play()


def test_a_client_that_takes_nothing_is_given_up():
    big = b"x" * 300 * KIB
    talk = Conversation().client(get()).upstream_hears(GET_A).client_stops_taking()
    talk.upstream(http("HTTP/1.1 200 OK", f"Content-Length: {2 * len(big)}", body=big))
    talk.wait(DEFAULTS.write_stall_timeout_s - 1).upstream_is_kept().wait(
        a_bit_more(2)
    ).upstream_sees_the_end()
    talk.client_sees_the_end().then(_one_call_failed).play(cuts=False)


def test_an_upstream_that_takes_nothing_is_given_up():
    big = b"x" * 300 * KIB
    up = forwarded("POST /a HTTP/1.1", framing=f"Content-Length: {2 * len(big)}", body=b"x")
    talk = Conversation().client(
        http("POST /a HTTP/1.1", "Host: api.example", f"Content-Length: {2 * len(big)}", body=b"x")
    )
    talk.upstream_hears(up).upstream_stops_taking().client(big)
    talk.wait(DEFAULTS.upstream_stall_timeout_s - 1).client_is_kept().wait(a_bit_more(1))
    talk.client_is_refused(504, "upstream_timeout").upstream_sees_the_end().play(cuts=False)


def test_a_connection_to_the_upstream_must_come_about_in_time():
    talk = (
        Conversation()
        .then(lambda stage: setattr(stage, "upstream_hangs", True))
        .client(get())
        .wait(4.0)
        .client_is_kept()
    )
    talk.wait(a_bit_more(1.0)).client_is_refused(504, "upstream_timeout", closed=False).ends((0, 0, 0)).play()


def test_an_upstream_that_is_not_there_is_a_502_and_the_connection_goes_on():
    talk = Conversation().then(lambda stage: setattr(stage, "upstream_refuses", True))
    talk.client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 5", body=b"hello"))
    talk.client_is_refused(502, "upstream_unreachable", closed=False)
    talk.then(lambda stage: setattr(stage, "upstream_refuses", False))
    one_call(talk).play()


def test_an_idle_connection_to_the_upstream_is_closed_before_the_upstream_does_it():
    talk = one_call().wait(3.0).upstream_is_kept().wait(a_bit_more(1.0)).upstream_sees_the_end(1)
    one_call(talk).upstream_connections(2).play()


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_line_has_a_longest_length():
    longest = "/" + "x" * (DEFAULTS.request_line_bytes_max - len("GET / HTTP/1.1"))
    talk = (
        Conversation()
        .client(get(longest))
        .upstream_hears(forwarded(f"GET {longest} HTTP/1.1"))
        .upstream(ok())
        .client_sees(seen())
    )
    talk.client(get(longest + "x")).client_is_refused(414, "target_too_long").upstream_hears_nothing().play(
        cuts=False
    )
    Conversation().client(b"G" * (DEFAULTS.request_line_bytes_max + 2)).client_is_refused(
        414, "target_too_long"
    ).play(cuts=False)


def test_a_head_has_a_longest_length():
    rest = DEFAULTS.head_bytes_max - len(get()[:-4]) - len("\r\nX: ")
    fits = "X: " + "y" * rest
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.1", "Host: api.example", fits))
        .upstream_hears(forwarded("GET /a HTTP/1.1", fits))
    )
    talk.upstream(ok()).client_sees(seen())
    talk.client(http("GET /a HTTP/1.1", "Host: api.example", fits + "y")).client_is_refused(
        431, "head_too_large"
    )
    talk.upstream_hears_nothing().play(cuts=False)
    talk = (
        Conversation()
        .client(b"GET /a HTTP/1.1\r\n" + b"X: y\r\n" * 6000)
        .client_is_refused(431, "head_too_large")
        .play(cuts=False)
    )


def test_a_head_has_so_many_lines():
    lines = [f"X-{n}: y" for n in range(DEFAULTS.header_count_max - 1)]
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.1", "Host: api.example", *lines))
        .upstream_hears(forwarded("GET /a HTTP/1.1", *lines))
    )
    talk.upstream(ok()).client_sees(seen())
    talk.client(http("GET /a HTTP/1.1", "Host: api.example", *lines, "X: y")).client_is_refused(
        431, "head_too_large"
    )
    talk.upstream_hears_nothing().play()


SMALL = GatewaySettings(body_bytes_max=10, paid_body_bytes_max=5, site_body_bytes_max=5, buffered_bytes_max=8)


@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
def test_a_body_may_be_as_long_as_the_limit(framing: str):
    body = chunks(b"x" * 10) if "chunked" in framing else b"x" * 10
    talk = Conversation(SMALL).client(http("POST /a HTTP/1.1", "Host: api.example", framing, body=body))
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing=framing, body=body))
    talk.upstream(ok()).client_sees(seen()).ends((200, 10, 2)).play()


def test_a_body_that_says_it_is_too_long_is_refused_at_once():
    talk = Conversation(SMALL).client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 11"))
    talk.client_is_refused(413, "body_too_large").upstream_hears_nothing().ends().play()


def test_a_body_that_turns_out_too_long_is_cut_off():
    talk = Conversation(SMALL)
    talk.client(
        http(
            "POST /a HTTP/1.1",
            "Host: api.example",
            "Transfer-Encoding: chunked",
            body=chunks(b"x" * 6, last=False),
        )
    )
    talk.upstream_hears(
        forwarded("POST /a HTTP/1.1", framing="Transfer-Encoding: chunked", body=chunks(b"x" * 6, last=False))
    )
    talk.client(b"5\r\nxxxxx\r\n").client_is_refused(413, "body_too_large").upstream_sees_the_end().play(
        cuts=False
    )


def test_a_body_that_comes_too_long_with_its_head_never_goes_up_whole():
    talk = Conversation(SMALL)
    talk.client(
        http("POST /a HTTP/1.1", "Host: api.example", "Transfer-Encoding: chunked", body=chunks(b"x" * 11))
    )
    talk.client_is_refused(413, "body_too_large").upstream_hears_no_whole_request().play()


@pytest.mark.parametrize("framing", ["Content-Length: 6", "Transfer-Encoding: chunked"])
def test_a_body_that_is_wanted_whole_has_a_limit_of_its_own(framing: str):
    body = chunks(b"x" * 6) if "chunked" in framing else b"x" * 6
    talk = binding(SMALL).client(http("POST /a HTTP/1.1", "Host: api.example", framing, body=body))
    talk.client_is_refused(413, "body_too_large").upstream_hears_nothing().ends().play()


def test_all_bodies_that_are_held_have_a_limit_together():
    half = http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 5", body=b"abcd")
    talk = binding(SMALL).client(half).client(half[:-2] + b"cde", on=2)
    talk.client_is_refused(503, "unavailable", on=2).client(b"e")
    talk.upstream_hears(forwarded("POST /a HTTP/1.1", framing="Content-Length: 5", body=b"abcde"))
    talk.upstream(ok()).client_sees(seen()).play()


class Page:
    """A site with one page that says what it was sent."""

    def owns(self, path: str) -> bool:
        return path.startswith("/.farebox/")

    async def answer(
        self, method: str, path: str, query: str, headers: object, body: bytes, client: str
    ) -> Answer:
        return Answer(200, [(b"Content-Type", b"text/plain")], body)


def test_a_body_for_one_of_our_pages_has_a_limit_of_its_own():
    talk = Conversation(SMALL, site=Page())
    talk.client(http("POST /.farebox/x HTTP/1.1", "Host: api.example", "Content-Length: 6", body=b"abcdef"))
    talk.client_is_refused(413, "body_too_large").upstream_hears_nothing().ends().play()


def test_more_connections_than_may_be_are_told_so():
    talk = Conversation(GatewaySettings(connections_max=1)).client_connects(1).client_connects(2)
    talk.client_is_refused(503, "unavailable", on=2)
    one_call(talk).client_closes().client_closes(2).wait(3)
    talk.client(get(), on=3).upstream_hears(GET_A).upstream(ok()).client_sees(seen(), on=3).play()


BUSY = GatewaySettings(upstream_connections_max=1, upstream_waiting_max=1, upstream_waiting_timeout_s=3.0)


def test_calls_beyond_the_upstreams_connections_wait_and_only_so_many():
    talk = Conversation(BUSY).client(get("/1"), on=1).upstream_hears(forwarded("GET /1 HTTP/1.1"))
    talk.client(get("/2"), on=2).client(get("/3"), on=3).client_is_refused(
        503, "upstream_busy", on=3, closed=False
    )
    talk.upstream(ok(b"one")).client_sees(seen(b"one"), on=1).upstream_hears(forwarded("GET /2 HTTP/1.1"))
    talk.upstream(ok(b"two")).client_sees(seen(b"two"), on=2).upstream_connections(1).ends(
        (0, 0, 0), (200, 0, 3), (200, 0, 3)
    ).play()


def test_calls_that_wait_for_a_connection_wait_only_so_long():
    talk = (
        Conversation(BUSY)
        .client(get("/1"), on=1)
        .upstream_hears(forwarded("GET /1 HTTP/1.1"))
        .client(get("/2"), on=2)
    )
    talk.wait(a_bit_more(3.0)).client_is_refused(503, "upstream_busy", on=2, closed=False)
    talk.upstream(ok(b"one")).client_sees(seen(b"one"), on=1).play()


def test_an_upstreams_head_has_a_longest_length():
    talk = (
        Conversation()
        .client(get())
        .upstream_hears(GET_A)
        .upstream(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 65 * KIB)
    )
    talk.client_is_refused(502, "upstream_malformed", closed=False).upstream_sees_the_end().play(cuts=False)


def test_a_refused_bodys_rest_is_taken_off_up_to_a_limit():
    post = http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 1000", body=b"x" * 10)
    talk = refusing("payment_required").client(post).client_is_refused(402, "payment_required", closed=False)
    talk.client(b"x" * 990 + post).client_is_refused(
        402, "payment_required", closed=False
    ).client_is_kept().play()

    much = http("POST /a HTTP/1.1", "Host: api.example", f"Content-Length: {65 * KIB}", body=b"x" * 10)
    refusing("payment_required").client(much).client_is_refused(402, "payment_required").play()


def test_what_is_sent_ahead_stays_in_the_network():
    """Half a megabyte of pipelined requests behind a call under way: the gateway holds what its limits say."""
    stage = Stage()
    client = stage.connect()
    client.sends(get())
    many = get("/b") * 20_000
    for at in range(0, len(many), 16 * KIB):
        client.sends(many[at : at + 16 * KIB])
    held = len(next(iter(stage.gateway._connections))._inbox)

    assert DEFAULTS.ahead_bytes_max < held < DEFAULTS.ahead_bytes_max + 16 * KIB + 1
    client.resets()
    stage.leave()


def test_a_slow_reader_holds_less_than_a_megabyte_and_then_gets_the_rest():
    size = 4 * KIB * KIB
    stage = Stage()
    client = stage.connect()
    client.stops_taking()
    client.sends(get())
    upstream = stage.upstreams[0]
    upstream.sends(http("HTTP/1.1 200 OK", f"Content-Length: {size}"))
    for _ in range(size // KIB // 16):
        upstream.sends(b"x" * 16 * KIB)

    assert client.unsent < KIB * KIB
    client.takes_on()
    for _ in range(100):
        stage.settle()
    assert client.received.partition(b"\r\n\r\n")[2] == b"x" * size
    assert [(f.status, f.bytes_down) for f in stage.door.finished] == [(200, size)]
    stage.leave()


# ── who is before us ────────────────────────────────────────────────────────────────────────────────────────────────

CLAIMS = ("X-Forwarded-For: 198.51.100.1, 10.0.0.9", "X-Forwarded-Proto: https", "X-Forwarded-Host: shop.example", "Forwarded: for=198.51.100.1;proto=https", "X-Real-IP: 198.51.100.1", "X_Forwarded_For: 1.1.1.1")  # fmt: skip


def test_a_strangers_word_on_where_it_comes_from_is_not_passed_on():
    talk = (
        Conversation()
        .client(http("GET /a HTTP/1.1", "Host: api.example", *CLAIMS))
        .upstream_hears(GET_A)
        .upstream(ok())
        .client_sees(seen())
    )
    talk.then(lambda stage: _called_from(stage, CLIENT_ADDRESS)).play()


def test_a_trusted_proxys_word_is_passed_on_and_extended():
    talk = Conversation(trusted_proxies=(CLIENT_ADDRESS, "10.0.0.0/8")).client(
        http("GET /a HTTP/1.1", "Host: api.example", *CLAIMS)
    )
    talk.upstream_hears(
        http(
            "GET /a HTTP/1.1", "Host: up.example", f"X-Forwarded-For: 198.51.100.1, 10.0.0.9, {CLIENT_ADDRESS}", "X-Forwarded-Proto: https",
            "X-Forwarded-Host: shop.example", f"Forwarded: for=198.51.100.1;proto=https, for={CLIENT_ADDRESS}", "x-real-ip: 198.51.100.1",
            "Farebox-Request-Id: req_ID", "Farebox-Customer: acme",
        )
    )  # fmt: skip
    talk.upstream(ok()).client_sees(seen()).then(lambda stage: _called_from(stage, "198.51.100.1")).play()


def _called_from(stage: Stage, address: str) -> None:
    assert [call.client_address for call in stage.door.calls] == [address]


# ── routes and catalogs ─────────────────────────────────────────────────────────────────────────────────────────────


def test_no_route_is_a_404_and_another_method_a_405_and_the_connection_goes_on():
    served = catalog(UPSTREAM_URL, routes=[Route("a", Match("/a", methods=frozenset({"GET"})), "up0")])
    talk = Conversation(served=served).client(get("/b")).client_is_refused(404, "route_unknown", closed=False)
    talk.client(http("POST /a HTTP/1.1", "Host: api.example", "Content-Length: 2", body=b"hi"))
    talk.client_is_refused(405, "method_not_allowed", closed=False)
    one_call(talk).ends((200, 0, 2)).play()


def test_a_call_ends_at_the_upstream_where_it_began():
    def moves(stage: Stage) -> None:
        stage.gateway.replace_catalog(replace(catalog("http://other.example"), version=2))

    talk = (
        Conversation()
        .client(get() + get("/b"))
        .upstream_hears(GET_A)
        .then(moves)
        .upstream(ok())
        .client_sees(seen())
    )
    talk.upstream_sees_the_end(1)
    talk.upstream_hears(forwarded("GET /b HTTP/1.1").replace(b"up.example", b"other.example"), on=2).upstream(
        ok()
    ).client_sees(seen())
    talk.play()


# ── the same over sockets, and the kit itself ───────────────────────────────────────────────────────────────────────


async def test_a_few_of_these_over_real_sockets():
    await one_call().play_on_sockets()
    await (
        Conversation()
        .client(
            http(
                "POST /a HTTP/1.1",
                "Host: api.example",
                "Transfer-Encoding: chunked",
                body=b"5;e\r\nfirst\r\n0\r\n\r\n",
            )
        )
        .upstream_hears(
            forwarded("POST /a HTTP/1.1", framing="Transfer-Encoding: chunked", body=chunks(b"first"))
        )
        .upstream(http("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=chunks(b"hello")))
        .client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 5", body=b"hello"))
        .play_on_sockets()
    )
    await (
        Conversation()
        .client(get("//"))
        .client_is_refused(400, "request_malformed")
        .upstream_hears_nothing()
        .play_on_sockets()
    )
    await (
        Conversation().client(http("GET /a HTTP/1.0", "Host: api.example")).upstream_hears(GET_A)
        .upstream(http("HTTP/1.1 200 OK", body=b"hello")).upstream_closes()
        .client_sees(answered("HTTP/1.1 200 OK", ends="Connection: close", body=b"hello")).client_sees_the_end()
        .play_on_sockets()
    )  # fmt: skip


def test_a_script_that_is_wrong_fails():
    """Guards every test above against a kit that agrees to anything."""
    wrong = [
        Conversation().client(get()).upstream_hears(GET_A + b"x"),
        Conversation().client(get()),
        one_call().client_sees_the_end(),
        one_call().client_is_refused(400, "request_malformed"),
        one_call().ends((200, 0, 3)),
        Conversation().client(get()).upstream_hears(GET_A).upstream(ok()),
        Conversation().client(get()).upstream_hears(GET_A).upstream(b"nonsense\r\n\r\n").client_sees(seen()),
        Conversation().client(get("//")).client_is_refused(400, "request_malformed", closed=False),
        one_call().upstream_connections(2),
    ]
    for talk in wrong:
        with pytest.raises(AssertionError):
            talk.play()


def test_a_call_that_never_ended_is_noticed():
    class Forgetful(OpenDoor):
        def admitted(self, call: Call, **more: object):  # type: ignore[no-untyped-def]
            return super().admitted(call, finish=lambda *_: None)

    stage = Stage(door=Forgetful())
    stage.connect().sends(get())
    stage.upstreams[0].sends(ok())
    with pytest.raises(AssertionError, match="never ended"):
        stage.leave()


def test_one_body_in_other_chunks_is_the_same_conversation():
    one = http("POST / HTTP/1.1", "Transfer-Encoding: chunked", "X: 1", body=chunks(b"hello", b" world"))
    other = http("POST / HTTP/1.1", "Transfer-Encoding: chunked", "X: 1", body=chunks(b"h", b"ello world"))
    cut_short = http(
        "POST / HTTP/1.1", "Transfer-Encoding: chunked", "X: 1", body=chunks(b"hello", b" world", last=False)
    )

    assert (
        essence(one)
        == essence(other)
        == http("POST / HTTP/1.1", "Content-Length: 11", "X: 1", body=b"hello world")
    )
    assert essence(cut_short) != essence(one)
    assert essence(one + one) == 2 * essence(one)
    assert [(r.method, r.target, r.body) for r in whole_requests(one + other + cut_short)] == [
        ("POST", b"/", b"hello world")
    ] * 2
