"""What is refused before a byte reaches an upstream, and what must not be refused."""

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


MALFORMED_HEADS = {
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "no host in 1.0": b"GET /x HTTP/1.0\r\n\r\n",
    "an empty host": b"GET /x HTTP/1.1\r\nHost:\r\n\r\n",
    "two hosts": b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "the same host twice": b"GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "a host with a path": b"GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a host with a user": b"GET /x HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "a host with a blank": b"GET /x HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a host list": b"GET /x HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "a host with a bad port": b"GET /x HTTP/1.1\r\nHost: a:99999\r\n\r\n",
    "a host with an empty port": b"GET /x HTTP/1.1\r\nHost: a:\r\n\r\n",
    "a broken IPv6 host": b"GET /x HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "absolute form": b"GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "a relative target": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
    "two blanks": b"GET  /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank at the end": b"GET /x HTTP/1.1 \r\nHost: a\r\n\r\n",
    "a tab": b"GET\t/x\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": b"GET /x\r\nHost: a\r\n\r\n",
    "a lower-case version": b"GET /x http/1.1\r\nHost: a\r\n\r\n",
    "not a version": b"GET /x HTTP/1\r\nHost: a\r\n\r\n",
    "a method that is no name": b"G(T /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "an empty method": b" /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "two empty lines first": b"\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank before the colon": b"GET /x HTTP/1.1\r\nHost : a\r\n\r\n",
    "a tab before the colon": b"GET /x HTTP/1.1\r\nHost: a\r\nX\t: 1\r\n\r\n",
    "no colon": b"GET /x HTTP/1.1\r\nHost: a\r\nNonsense\r\n\r\n",
    "an empty name": b"GET /x HTTP/1.1\r\nHost: a\r\n: v\r\n\r\n",
    "a folded header": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
    "a header that begins with a blank": b"GET /x HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare LF everywhere": b"GET /x HTTP/1.1\nHost: a\n\n",
    "a bare LF in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\nY: 2\r\n\r\n",
    "a bare CR in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\rY: 2\r\n\r\n",
    "a bare CR before CRLF": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\r\r\n\r\n",
    "NUL in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\x002\r\n\r\n",
    "a control character in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\x0b2\r\n\r\n",
    "a control character in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nX\x01: 1\r\n\r\n",
    "a byte beyond ASCII in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nX\xe9: 1\r\n\r\n",
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a Connection that is no list of names": b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: (close)\r\n\r\n",
}

FRAMING = {
    "both lengths": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other way": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two content lengths": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "the same content length twice": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of content lengths": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 4\r\n\r\nabcd",
    "a signed content length": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd",
    "a negative content length": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -4\r\n\r\nabcd",
    "a hexadecimal content length": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0x4\r\n\r\nabcd",
    "a content length with an underscore": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\nabcdabcdab",
    "an empty content length": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
    "an endless content length": b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    "a content length in Arabic digits": "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: ٤\r\n\r\nabcd".encode(),
    "chunked in 1.0": b"POST /x HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
    "gzip, chunked": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two transfer encodings": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "chunked twice in two lines": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a masked chunked": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "xchunked": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a quoted chunked": b'POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "an empty transfer encoding": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n",
    "a transfer encoding with a blank before the colon": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded transfer encoding": b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
}

PATHS = (
    b"//x", b"/a//b", b"/a//", b"/.", b"/..", b"/./a", b"/../a", b"/a/.", b"/a/..", b"/a/./b", b"/a/../b", b"/a%2fb", b"/a%2Fb",
    b"/a%5cb", b"/a%5Cb", b"/a%00", b"/a\\b", b"/%2e/a", b"/%2e%2e/a", b"/a/%2E%2e", b"/.%2e/a", b"/a/..;/b", b"/a/..;x=1/b",
    b"/a%", b"/a%2", b"/a%zz", b"/a%2gb", b"/a#b", b"/a\x7fb", b"/a\x01b", "/caf\u00e9".encode(), b"/a\xffb", b"/a?b#c", b"/a?b\x01",
    b"/a?caf\xe9",
)  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED_HEADS)
async def test_a_malformed_head_is_refused(house: House, name: str):
    await refused(house, MALFORMED_HEADS[name], 400, "request_malformed")


@pytest.mark.parametrize("name", FRAMING)
async def test_a_body_that_could_end_in_two_places_is_refused(house: House, name: str):
    await refused(house, FRAMING[name], 400, "request_malformed")


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_that_could_be_read_two_ways_is_refused(house: House, path: bytes):
    await refused(house, b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request_malformed")


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET /x HTTP/1.2\r\nHost: a\r\n\r\n", 505, "version_unsupported"),
        (b"GET /x HTTP/0.9\r\nHost: a\r\n\r\n", 505, "version_unsupported"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version_unsupported"),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501, "method_unsupported"),
        (b"TRACE /x HTTP/1.1\r\nHost: a\r\n\r\n", 501, "method_unsupported"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 501, "upgrade_unsupported"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 2\r\n\r\nhi", 417, "expectation_failed"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "target_too_long"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431, "head_too_large"),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431, "head_too_large"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nhi", 413, "body_too_large"),
    ],
)  # fmt: skip
async def test_what_is_not_served_says_so(house: House, raw: bytes, status: int, code: str):
    await refused(house, raw, status, code)


async def test_a_head_without_end_is_cut_off_at_its_limit(house: House):
    await refused(house, b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 8000, 431, "head_too_large")
    await refused(house, b"G" * 9000, 414, "target_too_long")


@pytest.mark.parametrize(
    "path",
    [b"/", b"/a/", b"/a.b/c", b"/a...b", b"/.well-known/x", b"/..a", b"/a;b=1", b"/a%20b", b"/%C3%A9", b"/a|b", b"/{x}", b"/a:b@c",
     b"/a?b=//../%2f", b"/a?100%", b"/a?[b]=\"{c}\"", b"/a?", b"/~x/*"],
)  # fmt: skip
async def test_an_unusual_but_clear_target_is_forwarded_as_it_came(house: House, path: bytes):
    answers = await house.says(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n", methods=["GET"])

    assert answers.said[0].status == 200, answers.said[0].body
    assert house.upstream.heard[0].target == path.decode()


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


BAD_CHUNKS = {
    "a size with a sign": b"+2\r\nhi\r\n0\r\n\r\n",
    "a size with 0x": b"0x2\r\nhi\r\n0\r\n\r\n",
    "a size with a blank": b"2 \r\nhi\r\n0\r\n\r\n",
    "a blank before the size": b" 2\r\nhi\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\nhihihihihihihihi\r\n0\r\n\r\n",
    "no size": b"\r\nhi\r\n0\r\n\r\n",
    "a size beyond all bounds": b"fffffffffffffffff\r\nhi",
    "a bare LF after the size": b"2\nhi\r\n0\r\n\r\n",
    "a bare LF after the data": b"2\r\nhi\n0\r\n\r\n",
    "data longer than the size": b"2\r\nhi!\r\n0\r\n\r\n",
    "an extension with a bare LF": b"2;a\nb\r\nhi\r\n0\r\n\r\n",
    "an extension with a bare CR": b"2;a\rb\r\nhi\r\n0\r\n\r\n",
    "a long extension": b"2;" + b"a" * 2000 + b"\r\nhi\r\n0\r\n\r\n",
    "a trailer that is no header": b"2\r\nhi\r\n0\r\nNonsense\r\n\r\n",
    "a trailer with a bare LF": b"2\r\nhi\r\n0\r\nA: b\n\r\n",
    "a folded trailer": b"2\r\nhi\r\n0\r\nA: b\r\n c\r\n\r\n",
    "endless trailers": b"2\r\nhi\r\n0\r\n" + b"A: b\r\n" * 2000,
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_a_malformed_chunk_ends_the_request(house: House, name: str):
    """The head may have gone up by then; the upstream sees a body that never ends, and no second request."""
    raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + BAD_CHUNKS[name]
    answers = await house.says(raw + GOOD)

    assert [s.status for s in answers.said] == [400]
    assert answers.said[0].headers["connection"] == "close"
    assert house.upstream.heard == []


async def test_a_malformed_chunk_that_comes_with_the_head_never_reaches_the_upstream(house: House):
    raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    answers = await house.says(raw)

    assert answers.said[0].status == 400
    assert house.upstream.connections == 0
    assert [f.status for f in house.door.finished] == [0]


async def test_extensions_and_trailers_of_a_request_are_checked_and_dropped(house: House):
    raw = (
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\nTrailer: X-Sum\r\n\r\n"
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
