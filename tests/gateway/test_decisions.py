"""What the door says, and when it hears how it ended."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal
from farebox.base.errors import Reason, Unavailable, refuse
from farebox.domain.access import Match, Route
from farebox.gateway.problems import STATUS, refusal
from farebox.gateway.server import CallReport
from tests.gateway.kit import PATIENT, QUICK, Answering, Heard, House, open_house, says_hello
from tests.gateway.test_streaming import until

KIB = 1024


def later(decision: Decision, seconds: float = 0.05) -> Awaitable[Decision]:
    async def think() -> Decision:
        await asyncio.sleep(seconds)
        return decision

    return think()


async def test_a_refusal_is_a_problem_that_says_what_to_do(house: House):
    house.door.decide = lambda call: Refusal(
        Reason(
            "quota_exceeded",
            "The month's calls are used up; the next begins on 1 May.",
            "api_calls",
            {"limit": 10, "status": 1},
        ),
        [(b"RateLimit-Remaining", b"0")],
        retry_after_s=12.2,
    )
    answer = await house.get("/x")

    assert answer.status == 429
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["ratelimit-remaining"] == "0"
    assert answer.headers["retry-after"] == "13"
    assert "date" in answer.headers
    assert json.loads(answer.body) == {
        "type": "urn:farebox:problem:quota_exceeded",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "The month's calls are used up; the next begins on 1 May.",
        "code": "quota_exceeded",
        "field": "api_calls",
        "limit": 10,
        "request_id": answer.headers["farebox-request-id"],
    }
    assert house.upstream.heard == []
    assert house.gateway.counters.refusals == {"quota_exceeded": 1}


@pytest.mark.parametrize(("code", "status"), sorted(STATUS.items()))
async def test_every_code_has_its_status(house: House, code: str, status: int):
    house.door.decide = lambda call: refusal(code, "Because of that.")
    answer = await house.get("/x")

    assert answer.status == status == json.loads(answer.body)["status"]
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert answer.headers["cache-control"] == "no-store"


async def test_a_code_nobody_knows_is_our_fault_not_the_callers(house: House):
    house.door.decide = lambda call: refusal("no_such_code", "secret detail")
    answer = await house.get("/x")

    assert answer.status == 500
    problem = json.loads(answer.body)
    assert problem["code"] == "internal_error"
    assert problem["request_id"] == answer.headers["farebox-request-id"]
    assert "secret" not in answer.body.decode()


@pytest.mark.parametrize("waits", [False, True])
async def test_what_the_door_raises_becomes_an_answer(house: House, waits: bool):
    def raising(error: Exception) -> None:
        async def think() -> Decision:
            raise error

        def decide(call: Call) -> Decision | Awaitable[Decision]:
            if waits:
                return think()
            raise error

        house.door.decide = decide

    raising(Unavailable("the database", retry_after_s=3))
    unavailable = await house.get()
    raising(refuse("credential_unknown", "No such key.", None))
    refused = await house.get()
    raising(RuntimeError("a bug with a secret"))
    broken = await house.get()

    assert (unavailable.status, unavailable.headers["retry-after"]) == (503, "3")
    assert refused.status == 401
    assert broken.status == 500
    assert b"secret" not in broken.body


async def test_a_decision_may_take_its_time(house: House):
    house.door.decide = lambda call: later(house.door.admitted(call))
    answers = await house.says(
        b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel",
        b"loGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        methods=["POST", "GET"],
    )

    assert [s.body for s in answers.said] == [b"POST /1 5", b"GET /2 0"]


async def test_a_large_body_waits_for_a_slow_decision(house: House):
    decided = asyncio.Event()

    async def think(call: Call) -> Decision:
        await decided.wait()
        return house.door.admitted(call)

    house.door.decide = think
    reader, writer = await house.connect()
    size = 20 * 1024 * KIB
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
    writer.write(b"x" * size)
    await asyncio.sleep(0.3)
    assert writer.transport.get_write_buffer_size() > 10 * 1024 * KIB, (
        "the gateway swallowed the body before it was decided"
    )
    decided.set()
    await reader.readuntil(b"POST / %d" % size)
    writer.close()


async def test_a_client_that_left_before_the_decision_is_not_served_but_closed_out(house: House):
    house.door.decide = lambda call: later(house.door.admitted(call), 0.2)
    _, writer = await house.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel")
    await until(lambda: house.door.calls)
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert [f.status for f in house.door.finished] == [0]
    assert house.upstream.heard == []


async def test_a_stored_answer_is_given_as_it_was(house: House):
    house.door.decide = lambda call: Answer(
        201, [(b"Content-Type", b"text/plain"), (b"Content-Length", b"999"), (b"X-A", b"1")], b"stored"
    )
    answers = await house.says(
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        methods=["GET", "HEAD", "GET"],
    )

    assert [(s.status, s.body) for s in answers.said] == [(201, b"stored"), (201, b""), (201, b"stored")]
    assert answers.said[0].headers["x-a"] == "1"
    assert answers.said[0].headers["content-length"] == "6"
    assert house.upstream.heard == []


async def test_a_bound_body_is_whole_before_the_door_is_asked(house: House):
    house.door.binds_bodies = True
    chunked = b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3;x\r\ndef\r\n0\r\n\r\n"
    answers = await house.says(
        chunked[:60],
        chunked[60:90],
        chunked[90:] + b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
        pause_s=0.02,
        methods=["POST", "GET"],
    )

    assert [s.status for s in answers.said] == [200, 200]
    assert [c.body for c in house.door.calls] == [b"abcdef", b""]
    first, second = house.upstream.heard
    assert first.body == b"abcdef"
    assert first.one("Content-Length") == "6"
    assert first.one("Transfer-Encoding") is None
    assert second.one("Content-Length") is None
    assert house.door.finished[0].bytes_up == 6


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_bound_body_over_its_limit_is_refused_before_the_door_is_asked(house: House, chunked: bool):
    house.door.binds_bodies = True
    body = b"x" * (1100 * KIB)
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    raw = (
        head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if chunked
        else head + b"Content-Length: %d\r\n\r\n" % len(body)
    )
    answers = await house.says(raw)

    assert [s.status for s in answers.said] == [413]
    assert house.door.calls == []
    assert house.upstream.heard == []


async def test_a_bound_body_of_exactly_the_limit_passes(house: House):
    house.door.binds_bodies = True

    assert (await house.get(method="PUT", body=b"x" * (1024 * KIB))).status == 200


async def test_a_bound_body_is_asked_for_when_the_client_waits(house: House):
    house.door.binds_bodies = True
    reader, writer = await house.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_refused_body_is_taken_off_and_the_connection_used_again(house: House):
    house.door.decide = lambda call: (
        refusal("payment_required", "Pay first.") if call.method == "POST" else house.door.admitted(call)
    )
    answers = await house.says(
        b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc",
        b"x" * 997 + b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"0\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
        pause_s=0.02,
        methods=["POST", "POST", "GET"],
    )

    assert [s.status for s in answers.said] == [402, 402, 200]


async def test_an_endless_refused_body_is_not_read_to_its_end(house: House):
    house.door.decide = lambda call: refusal("payment_required", "Pay first.")
    answers = await house.says(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\nabc")

    assert [s.status for s in answers.said] == [402]
    assert answers.said[0].headers["connection"] == "close"


# ── settle before release ───────────────────────────────────────────────────────────────────────────────────────────


class Till:
    """The part of an exact fare that the gateway sees: it settles, keeps the answer, and writes down the order of things."""

    def __init__(self, house: House, refuses: Refusal | None = None, keeps: int = 64 * KIB) -> None:
        self.house = house
        self.events: list[str] = []
        self.refuses = refuses
        self.keeps = keeps
        self.kept: list[tuple[int, Headers, bytes]] = []
        self.admitted: list[Admitted] = []
        self.may_settle = asyncio.Event()
        self.may_settle.set()
        house.door.decide = self.admit

    def admit(self, call: Call) -> Admitted:
        answer_headers: Headers = []

        async def before_release(status: int, headers: Headers) -> Refusal | None:
            self.events.append(f"settle {status} {dict(headers).get(b'x-up', b'').decode()}")
            await self.may_settle.wait()
            answer_headers.append((b"PAYMENT-RESPONSE", b"settled"))
            return self.refuses

        async def keep_answer(status: int, headers: Headers, body: bytes) -> None:
            await asyncio.sleep(0.01)
            self.events.append("keep")
            self.kept.append((status, headers, body))

        plain = self.house.door.admitted(call, fare="exact", answer_headers=answer_headers)
        plain.before_release = before_release
        if self.keeps:
            plain.keep_answer_bytes_max, plain.keep_answer = self.keeps, keep_answer
        report = plain.finish

        def finish(status: int, up: int, down: int) -> None:
            self.events.append(f"finish {status}")
            report(status, up, down)

        plain.finish = finish
        self.admitted.append(plain)
        return plain


async def streams(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """100 bytes in ten pieces, by length or by chunks."""
    chunked = heard.target == "/chunked"
    writer.write(
        b"HTTP/1.1 200 OK\r\nX-Up: 1\r\n"
        + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 100\r\n\r\n")
    )
    for n in range(10):
        piece = b"%d" % n * 10
        writer.write(b"a\r\n%b\r\n" % piece if chunked else piece)
        await writer.drain()
        await asyncio.sleep(0.005)
    if chunked:
        writer.write(b"0\r\n\r\n")


WHOLE = b"".join(b"%d" % n * 10 for n in range(10))


@pytest.mark.parametrize("path", ["/length", "/chunked"])
async def test_nothing_is_released_before_it_is_settled_and_the_end_not_before_it_is_kept(
    house: House, path: str
):
    till = Till(house)
    till.may_settle.clear()
    house.upstream.answer = streams
    reader, writer = await house.connect()
    writer.write(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode())
    await until(lambda: till.events)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.2)
    till.may_settle.set()
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"PAYMENT-RESPONSE: settled" in head
    await reader.readuntil(b"9" * 10)
    assert till.events == ["settle 200 1", "keep", "finish 200"]
    writer.close()

    status, headers, body = till.kept[0]
    assert (status, body) == (200, WHOLE)
    assert (b"PAYMENT-RESPONSE", b"settled") in headers
    assert not {name.lower() for name, _ in headers} & {
        b"content-length",
        b"transfer-encoding",
        b"connection",
    }
    assert [(f.status, f.bytes_down) for f in house.door.finished] == [(200, 100)]


async def test_an_answer_that_came_in_one_piece_is_settled_kept_and_released_too(house: House):
    till = Till(house)
    answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n" * 2, methods=["GET", "GET"])

    assert [s.body for s in answers.said] == [b"GET /a 0"] * 2
    assert [k[2] for k in till.kept] == [b"GET /a 0"] * 2
    assert till.events == ["settle 200 ", "keep", "finish 200"] * 2
    assert answers.said[0].headers["payment-response"] == "settled"


async def test_a_large_answer_is_released_without_being_kept(house: House):
    till = Till(house, keeps=50)
    house.upstream.answer = streams
    answer = await house.get("/length")

    assert answer.body == WHOLE
    assert till.kept == []
    assert till.events == ["settle 200 1", "finish 200"]


async def test_a_settlement_that_fails_replaces_the_answer(house: House):
    till = Till(house, refuses=refusal("settlement_unknown", "Send the same payment again.", 5))
    house.upstream.answer = streams
    answers = await house.says(b"GET /chunked HTTP/1.1\r\nHost: a\r\n\r\n" * 2, methods=["GET", "GET"])

    assert [s.status for s in answers.said] == [503, 503]
    assert b"000" not in answers.said[0].body
    assert "payment-response" not in answers.said[0].headers
    assert till.kept == []
    assert till.events == ["settle 200 1", "finish 503"] * 2
    await until(lambda: house.upstream.open == 0)


async def test_a_settlement_that_raises_releases_nothing(house: House):
    async def explodes(status: int, headers: Headers) -> None:
        raise RuntimeError("secret")

    house.door.decide = lambda call: house.door.admitted(call, before_release=explodes)
    answer = await house.get()

    assert answer.status == 500
    assert b"secret" not in answer.body
    assert len(house.door.finished) == 1


async def test_a_client_that_leaves_during_settlement_does_not_stop_it_and_its_answer_is_kept(house: House):
    till = Till(house)
    till.may_settle.clear()
    house.upstream.answer = streams
    _, writer = await house.connect()
    writer.write(b"GET /chunked HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: till.events)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    till.may_settle.set()
    await until(lambda: house.door.finished)

    assert till.events == ["settle 200 1", "keep", "finish 0"]
    assert till.kept[0][2] == WHOLE


def slowly(seconds: float = 0.3, answer: Answering = says_hello) -> Answering:
    """An upstream that has acted, and then takes its time to say so."""

    async def works(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await answer(heard, reader, writer)

    return works


@pytest.mark.parametrize("leaves", ["resets", "closes", "says no more"])
@pytest.mark.parametrize("path", ["/one-piece", "/chunked"])
async def test_a_client_that_leaves_before_the_head_pays_for_what_the_upstream_did(
    house: House, path: str, leaves: str
):
    till = Till(house)
    house.upstream.answer = slowly(answer=streams if path == "/chunked" else says_hello)
    _, writer = await house.connect()
    writer.write(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode())
    await until(lambda: house.upstream.heard)
    match leaves:
        case "resets":
            writer.transport.abort()
        case "closes":
            writer.close()
        case _:
            writer.write_eof()
    await until(lambda: house.door.finished)

    assert till.events[0].startswith("settle 200")
    assert till.events[1:] == ["keep", "finish 0"]
    assert till.kept[0][2] == (WHOLE if path == "/chunked" else b"GET /one-piece 0")
    assert till.admitted[0].abandoned
    assert len(house.upstream.heard) == 1
    writer.close()


async def test_who_leaves_with_a_payment_in_its_body_sent_pays_too(house: House):
    till = Till(house)
    house.door.binds_bodies = True
    house.upstream.answer = slowly()
    _, writer = await house.connect()
    writer.write(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
    await until(lambda: house.upstream.heard)
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert till.events == ["settle 200 ", "keep", "finish 0"]


async def test_a_large_answer_nobody_waits_for_is_settled_and_dropped(house: House):
    till = Till(house, keeps=50)
    house.upstream.answer = slowly(answer=streams)
    _, writer = await house.connect()
    writer.write(b"GET /chunked HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: house.upstream.heard)
    writer.transport.abort()
    await until(lambda: house.door.finished)

    assert till.events == ["settle 200 1", "finish 0"]
    await until(lambda: house.upstream.open == 0)


async def test_a_client_that_leaves_before_its_request_could_be_sent_is_not_charged():
    async with open_house(replace(PATIENT, upstream_connections_max=1)) as house:
        house.upstream.answer = slowly(0.5)
        _, busy = await house.connect()
        busy.write(b"GET /busy HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: house.upstream.heard)
        till = Till(house)
        _, writer = await house.connect()
        writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: len(house.door.calls) == 2)
        writer.transport.abort()
        await until(lambda: house.door.finished)

        assert till.events == ["finish 0"]
        assert not till.admitted[0].abandoned
        await until(lambda: len(house.door.finished) == 2)
        assert [h.target for h in house.upstream.heard] == ["/busy"]
        busy.close()


async def test_an_upstream_that_never_answers_is_not_waited_for_longer_because_the_client_left():
    async with open_house(QUICK, timeout_s=0.5) as house:
        till = Till(house)
        house.upstream.answer = slowly(60)
        _, writer = await house.connect()
        writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: house.upstream.heard)
        writer.transport.abort()
        await until(lambda: house.door.finished, 3.0)

        assert till.events == ["finish 0"]
        assert till.admitted[0].abandoned
        assert house.gateway.counters.upstream_errors == {"upstream_timeout": 1}


async def test_a_drain_waits_for_an_answer_whose_client_left():
    async with open_house() as house:
        till = Till(house)
        house.upstream.answer = slowly(0.5)
        _, writer = await house.connect()
        writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: house.upstream.heard)
        writer.transport.abort()
        await until(lambda: house.gateway.counters.connections_open == 0)
        await house.gateway.drain(5.0)

        assert till.events == ["settle 200 ", "keep", "finish 0"]


async def test_an_upstream_that_dies_after_settlement_breaks_the_answer(house: House):
    till = Till(house)

    async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    house.upstream.answer = dies
    answers = await house.says(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")

    assert [(s.status, s.whole) for s in answers.said] == [(200, False)]
    assert till.events == ["settle 200 ", "finish 0"]


async def test_an_end_that_cannot_be_recorded_is_not_sent(house: House):
    def full(status: int, up: int, down: int) -> None:
        raise OSError("the spool is full")

    house.door.decide = lambda call: house.door.admitted(call, finish=full)
    answers = await house.says(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

    assert answers.said == []


# ── our own pages ───────────────────────────────────────────────────────────────────────────────────────────────────


class Pages:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str, bytes, str]] = []

    def owns(self, path: str) -> bool:
        return path.startswith("/.farebox/")

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal:
        self.asked.append((method, path, query, body, client_address))
        await asyncio.sleep(0)
        if path.endswith("/missing"):
            return refusal("not_found", "There is no such page.")
        if path.endswith("/bug"):
            raise RuntimeError("secret")
        return Answer(200, [(b"Content-Type", b"application/json")], b"{}")


async def test_our_own_pages_are_served_beside_the_routes():
    pages = Pages()
    async with open_house(site=pages) as house:
        answers = await house.says(
            b"GET /.farebox/quotes?route=x HTTP/1.1\r\nHost: a\r\n\r\n"
            b"POST /.farebox/purchases HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
            b"GET /.farebox/missing HTTP/1.1\r\nHost: a\r\n\r\nGET /.farebox/bug HTTP/1.1\r\nHost: a\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
            methods=["GET", "POST", "GET", "GET", "GET"],
        )
        too_large = await house.get("/.farebox/purchases", method="POST", body=b"x" * 70_000)

    assert [s.status for s in answers.said] == [200, 200, 404, 500, 200]
    assert answers.said[0].body == b"{}"
    assert pages.asked[0] == ("GET", "/.farebox/quotes", "route=x", b"", "127.0.0.1")
    assert pages.asked[1][3] == b"{}"
    assert too_large.status == 413
    assert [h.target for h in house.upstream.heard] == ["/x"]


# ── what is counted and told ────────────────────────────────────────────────────────────────────────────────────────


async def test_every_call_is_counted_and_told_once():
    told: list[CallReport] = []
    routes = [Route("paid", Match("/paid", ("GET",)), "up0"), Route("rest", Match("/rest/{*rest}"), "up0")]
    async with open_house(routes=routes, on_call=told.append) as house:
        await house.get("/paid")
        await house.get("/rest/a", method="POST", body=b"hello")
        await house.get("/nowhere")
        await house.get("/paid", method="PUT")
        await house.get("//")
        counters = house.gateway.counters

    assert counters.requests == {("paid", "account", 2): 1, ("rest", "account", 2): 1}
    assert counters.refusals == {"route_unknown": 1, "method_not_allowed": 1, "request_malformed": 1}
    assert counters.bytes_up == 5
    assert counters.bytes_down == len("GET /paid 0") + len("POST /rest/a 5")
    assert sum(counters.latency_buckets) == 2
    assert counters.connections_total == 5
    assert [(r.fare, r.status, r.code) for r in told] == [
        ("account", 200, None),
        ("account", 200, None),
        (None, 404, "route_unknown"),
        (None, 405, "method_not_allowed"),
        (None, 400, "request_malformed"),
    ]
    assert told[0].call is not None
    assert told[0].call.route.id == "paid"
    assert told[1].bytes_up == 5


async def test_a_call_that_its_upstream_failed_is_told_once_with_its_fare():
    told: list[CallReport] = []
    async with open_house(on_call=told.append, log_refusals=True) as house:

        async def dies(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        house.upstream.answer = dies
        assert (await house.get("/x", X_Request_Id="theirs")).status == 502

    assert [(r.fare, r.status, r.code) for r in told] == [("account", 0, "upstream_failed")]


async def test_a_hook_that_fails_disturbs_nobody():
    def fails(report: CallReport) -> None:
        raise RuntimeError("no terminal")

    async with open_house(on_call=fails, log_refusals=True, log_calls=True) as house:
        assert (await house.get()).status == 200
        assert (await house.get("//")).status == 400
    logging.getLogger().handlers.clear()
