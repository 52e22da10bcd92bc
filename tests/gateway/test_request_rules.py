"""What is refused before a byte reaches an upstream, and what must not be refused. The catalogue of bad requests is in
test_smuggling.py."""

from __future__ import annotations

import asyncio
import json

import pytest

from farebox.gateway.settings import GatewaySettings
from tests.gateway.kit import Answers, House, open_house

GOOD = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"


async def refused(house: House, raw: bytes, status: int, code: str) -> None:
    """The request gets this problem on a connection that then closes, and the upstream never hears of it."""
    answers = await house.says(raw + GOOD)

    assert [s.status for s in answers.said] == [status], raw
    said = answers.said[0]
    assert said.headers["content-type"] == "application/problem+json"
    assert said.headers["connection"] == "close"
    problem = json.loads(said.body)
    assert problem["code"] == code, raw
    assert problem["status"] == status
    assert problem["type"].endswith(code)
    assert problem["title"]
    assert len(problem["detail"]) > 10
    assert problem["request_id"] == said.headers["farebox-request-id"]
    assert house.upstream.heard == []
    assert house.door.calls == []


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nhi", 501,
         "upgrade_unsupported"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 2\r\n\r\nhi", 417, "expectation_failed"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "target_too_long"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431, "head_too_large"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431, "head_too_large"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nhi", 413, "body_too_large"),
    ],
)  # fmt: skip
async def test_what_is_not_served_says_so(house: House, raw: bytes, status: int, code: str):
    await refused(house, raw, status, code)


@pytest.mark.parametrize(
    "host", ["a", "A.Example", "a:8402", "127.0.0.1:80", "[::1]", "[::1]:8402", "a_b.example"]
)
async def test_a_good_host_is_taken(house: House, host: str):
    answers = await house.says(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), methods=["GET"])

    assert answers.said[0].status == 200
    assert house.door.calls[0].host == host.lower()


async def test_ordinary_oddities_pass(house: House):
    raw = (
        b"\r\nPURGE /x HTTP/1.1\r\nhOsT:a\r\nX-Empty:\r\nX-Blanks: \t a b \t \r\nX-Latin: caf\xe9\r\nCookie: a=b; c=\"d\"\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    )  # fmt: skip
    answers = await house.says(raw, methods=["PURGE"])

    assert answers.said[0].status == 200
    heard = house.upstream.heard[0]
    assert heard.method == "PURGE"
    assert heard.one("X-Empty") == ""
    assert heard.one("X-Blanks") == "a b"
    assert heard.one("X-Latin") == "caf\xe9"
    assert heard.one("Cookie") == 'a=b; c="d"'
    assert heard.one("Upgrade") is heard.one("HTTP2-Settings") is heard.one("Connection") is None


async def test_extensions_and_unannounced_trailers_of_a_request_are_checked_and_dropped(house: House):
    raw = (
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\nTrailer: Content-Length\r\n\r\n"
        b"5;name=value\r\nhello\r\n0006\r\n world\r\n0;last\r\nX-Sum: 1\r\nContent-Length: 7\r\n\r\n"
    )
    answers = await house.says(raw, methods=["POST"])

    assert answers.said[0].status == 200
    heard = house.upstream.heard[0]
    assert heard.body == b"hello world"
    assert heard.one("Transfer-Encoding") == "chunked"
    assert heard.one("X-Sum") is heard.one("Trailer") is heard.one("Content-Length") is None


async def test_many_extensions_are_too_many(house: House):
    raw = (
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        + (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 30
    )
    answers = await house.says(raw)

    assert [s.status for s in answers.said] == [400]


async def test_a_streamed_body_over_the_limit_is_cut_off():
    async with open_house(GatewaySettings(body_bytes_max=1000, linger_s=0.2, tick_s=0.05)) as house:
        raw = (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"64\r\n"
            + b"x" * 100
            + b"\r\n"
        )
        answers = await house.says(raw, *[b"64\r\n" + b"x" * 100 + b"\r\n"] * 20)

        assert [s.status for s in answers.said] == [413]
        assert house.upstream.heard == []
        assert [f.status for f in house.door.finished] == [0]


async def test_a_pipelined_bad_request_is_answered_after_the_good_one(house: House):
    answers = await house.says(GOOD + b"GET //x HTTP/1.1\r\nHost: a\r\n\r\n" + GOOD)

    assert [s.status for s in answers.said] == [200, 400]
    assert len(house.upstream.heard) == 1


async def test_the_refused_sees_its_answer_while_it_is_still_sending(house: House):
    """A body that nobody reads must not turn the answer into a reset."""
    reader, writer = await house.connect()
    writer.write(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
    for _ in range(8):
        writer.write(b"x" * 65536)
        await asyncio.sleep(0.005)
    answers = Answers()
    answers.feed(await reader.read())
    writer.close()

    assert [s.status for s in answers.said] == [413]


async def test_header_lines_said_again_are_judged_with_their_own_request_line(house: House):
    lines = b"Host: a\r\nX-Trace: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answers = await house.says(
        b"POST /1 HTTP/1.1\r\n" + lines + b"PUT /2 HTTP/1.1\r\n" + lines + b"PUT /3 HTTP/1.0\r\n" + lines
    )

    assert [s.status for s in answers.said] == [200, 200, 400]
    assert [(h.method, h.target, h.one("X-Trace")) for h in house.upstream.heard] == [
        ("POST", "/1", "1"),
        ("PUT", "/2", "1"),
    ]


async def test_header_lines_said_again_make_the_same_call_again(house: House):
    lines = b"Host: a\r\nConnection: X-Secret\r\nX-Secret: 1\r\nAuthorization: Bearer theirs\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    await house.says(b"".join(b"GET /%d HTTP/1.1\r\n" % n + lines for n in range(3)), methods=["GET"] * 3)

    first, *others = [
        [pair for pair in h.headers if pair[0] != "Farebox-Request-Id"] for h in house.upstream.heard
    ]
    assert others == [first, first]
    assert ("Authorization", "Bearer theirs") in first
    assert len({c.request_id for c in house.door.calls}) == 3
