"""The smuggling catalogue: messages that two readers would take apart differently, and what becomes of each.

A bad request is answered with a problem on a connection that then closes. Nothing of it goes up, nothing of what stands behind
it is read as a request, and the upstream connection that others use is neither touched nor poisoned. A bad answer is a 502,
and its connection is never used again. Every case is played whole, byte by byte and in random pieces (conversations.py).
"""

from __future__ import annotations

import asyncio

import pytest

from farebox.app.admission import Refusal
from farebox.domain.access import AccountFare, Condition, FreeFare, Match, Route
from farebox.gateway.problems import Fault, refusal
from farebox.gateway.routing import RouteTable, choose
from tests.gateway.conversations import Conversation, answered, chunks, forwarded, get, http, ok, seen
from tests.gateway.kit import House, catalog
from tests.gateway.stage import UPSTREAM_URL, Stage

#: What a smuggler would like to be read as a request of its own.
SMUGGLED = get("/smuggled")


def used() -> Conversation:
    """Another client's call went before: its upstream connection is open, kept and idle."""
    talk = Conversation().client(get("/before"), on=2).upstream_hears(forwarded("GET /before HTTP/1.1"))
    return talk.upstream(ok()).client_sees(seen(), on=2)


def goes_on(talk: Conversation) -> Conversation:
    """The other client's next call, on the same upstream connection, is served as if nothing had been."""
    talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"), on=1)
    return talk.upstream(ok(b"after"), on=1).client_sees(seen(b"after"), on=2)


def refused(raw: bytes, status: int = 400, code: str = "request_malformed") -> None:
    """The head alone is enough to refuse: the upstream never hears of it, however it is cut."""
    talk = used().client(raw + SMUGGLED).client_is_refused(status, code).upstream_hears_nothing()
    goes_on(talk).upstream_connections(1).ends((200, 0, 2), (200, 0, 5)).play()


def request(*lines: str, start: str = "POST /x HTTP/1.1") -> bytes:
    return http(start, *lines)


# ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MALFORMED_HEADS = {
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "no host in 1.0": b"GET /x HTTP/1.0\r\n\r\n",
    "an empty host": b"GET /x HTTP/1.1\r\nHost:\r\n\r\n",
    "two hosts": b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "two hosts, apart": b"GET /x HTTP/1.1\r\nHost: a\r\nX: y\r\nhost: b\r\n\r\n",
    "the same host twice": b"GET /x HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "a host with a path": b"GET /x HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a host with a user": b"GET /x HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "a host with a blank": b"GET /x HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a host with a tab": b"GET /x HTTP/1.1\r\nHost: a\tb\r\n\r\n",
    "a host with NUL": b"GET /x HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    "a host beyond ASCII": "GET /x HTTP/1.1\r\nHost: ä\r\n\r\n".encode(),
    "a host with a query": b"GET /x HTTP/1.1\r\nHost: a?b\r\n\r\n",
    "a host with a fragment": b"GET /x HTTP/1.1\r\nHost: a#b\r\n\r\n",
    "a host with a backslash": b"GET /x HTTP/1.1\r\nHost: a\\b\r\n\r\n",
    "a host list": b"GET /x HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "a host with a bad port": b"GET /x HTTP/1.1\r\nHost: a:99999\r\n\r\n",
    "a host with a signed port": b"GET /x HTTP/1.1\r\nHost: a:+80\r\n\r\n",
    "a host with two ports": b"GET /x HTTP/1.1\r\nHost: a:80:81\r\n\r\n",
    "a host with an empty port": b"GET /x HTTP/1.1\r\nHost: a:\r\n\r\n",
    "a broken IPv6 host": b"GET /x HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "something behind an IPv6 host": b"GET /x HTTP/1.1\r\nHost: [::1]evil\r\n\r\n",
    "a misspelt host": b"GET /x HTTP/1.1\r\nHost : a\r\n\r\n",
    "absolute form": b"GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "absolute form of another host": b"GET http://b.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "absolute form, https": b"GET https://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "authority form": b"GET a.example:80 HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "a relative target": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
    "only a query": b"GET ?x HTTP/1.1\r\nHost: a\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "two blanks": b"GET  /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "two blanks before the version": b"GET /x  HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank at the end": b"GET /x HTTP/1.1 \r\nHost: a\r\n\r\n",
    "a blank in the target": b"GET /x y HTTP/1.1\r\nHost: a\r\n\r\n",
    "a second version": b"GET /x HTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tab": b"GET\t/x\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "a vertical tab": b"GET\x0b/x\x0bHTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /x\r\n",
    "HTTP/0.9 with a head": b"GET /x\r\nHost: a\r\n\r\n",
    "a lower-case version": b"GET /x http/1.1\r\nHost: a\r\n\r\n",
    "not a version": b"GET /x HTTP/1\r\nHost: a\r\n\r\n",
    "a long version": b"GET /x HTTP/1.10\r\nHost: a\r\n\r\n",
    "a signed version": b"GET /x HTTP/+1.1\r\nHost: a\r\n\r\n",
    "another protocol": b"GET /x ICAP/1.0\r\nHost: a\r\n\r\n",
    "a method that is no name": b"G(T /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method with a colon": b"GET: /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "an endless method": b"G" * 33 + b" /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "an empty method": b" /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "two empty lines first": b"\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bare LF first": b"\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bare CR first": b"\rGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank before the colon": b"GET /x HTTP/1.1\r\nHost: a\r\nX : 1\r\n\r\n",
    "a tab before the colon": b"GET /x HTTP/1.1\r\nHost: a\r\nX\t: 1\r\n\r\n",
    "a blank in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nFarebox Customer: mallory\r\n\r\n",
    "no colon": b"GET /x HTTP/1.1\r\nHost: a\r\nNonsense\r\n\r\n",
    "an empty name": b"GET /x HTTP/1.1\r\nHost: a\r\n: v\r\n\r\n",
    "a folded header": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
    "a header folded with a tab": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\r\n\t2\r\n\r\n",
    "a fold that hides a length": b"POST /x HTTP/1.1\r\nHost: a\r\nX: 1\r\n Content-Length: 50\r\n\r\n",
    "a header that begins with a blank": b"GET /x HTTP/1.1\r\n Host: a\r\n\r\n",
    "a blank line that is not empty": b"GET /x HTTP/1.1\r\nHost: a\r\n \r\n\r\n",
    "bare LF everywhere": b"GET /x HTTP/1.1\nHost: a\n\n",
    "bare LF at the end": b"GET /x HTTP/1.1\r\nHost: a\r\n\n",
    "bare LF after the request line": b"GET /x HTTP/1.1\nHost: a\r\n\r\n",
    "a bare LF in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\nY: 2\r\n\r\n",
    "a bare LF that hides a length": b"POST /x HTTP/1.1\r\nHost: a\r\nX: 1\nContent-Length: 50\r\n\r\n",
    "a bare CR in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\rY: 2\r\n\r\n",
    "a bare CR before CRLF": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\r\r\n\r\n",
    "a bare CR in the target": b"GET /x\ry HTTP/1.1\r\nHost: a\r\n\r\n",
    "LF CR": b"GET /x HTTP/1.1\n\rHost: a\n\r\n\r",
    "NUL in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\x002\r\n\r\n",
    "NUL in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nX\x00: 1\r\n\r\n",
    "NUL in the target": b"GET /x\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    "NUL first": b"\x00GET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "DEL in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\x7f\r\n\r\n",
    "a control character in a value": b"GET /x HTTP/1.1\r\nHost: a\r\nX: 1\x0b2\r\n\r\n",
    "a control character in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nX\x01: 1\r\n\r\n",
    "a byte beyond ASCII in a name": b"GET /x HTTP/1.1\r\nHost: a\r\nX\xe9: 1\r\n\r\n",
    "a byte-order mark": b"\xef\xbb\xbfGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "SSH on a plain port": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a proxy protocol": b"PROXY TCP4 198.51.100.1 198.51.100.2 1 2\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a binary proxy protocol": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c",
    "a Connection that is no list of names": b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: (close)\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED_HEADS)
def test_a_malformed_head_is_refused(name: str):
    refused(MALFORMED_HEADS[name])


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"GET /x HTTP/1.2\r\nHost: a\r\n\r\n", 505, "version_unsupported"),
        (b"GET /x HTTP/0.9\r\nHost: a\r\n\r\n", 505, "version_unsupported"),
        (b"GET /x HTTP/2.0\r\nHost: a\r\n\r\n", 505, "version_unsupported"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "version_unsupported"),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501, "method_unsupported"),
        (b"TRACE /x HTTP/1.1\r\nHost: a\r\n\r\n", 501, "method_unsupported"),
    ],
)  # fmt: skip
def test_a_request_in_a_protocol_that_is_not_served_is_refused(raw: bytes, status: int, code: str):
    refused(raw, status, code)


# ── bodies that could end in two places ─────────────────────────────────────────────────────────────────────────────

CHUNKED = "Transfer-Encoding: chunked"
FRAMING = {
    # CL.TE and TE.CL
    "both lengths": request("Host: a", "Content-Length: 4", CHUNKED) + b"0\r\n\r\n",
    "both lengths, the other way": request("Host: a", CHUNKED, "Content-Length: 4") + b"0\r\n\r\n",
    "both lengths, the body as long as said": request("Host: a", "Content-Length: 5", CHUNKED) + b"0\r\n\r\n",
    "both lengths, the length zero": request("Host: a", "Content-Length: 0", CHUNKED) + b"0\r\n\r\n",
    "both lengths, the length named away": request("Host: a", "Connection: Content-Length", "Content-Length: 4", CHUNKED) + b"0\r\n\r\n",
    "both lengths, the encoding named away": request("Host: a", "Connection: Transfer-Encoding", "Content-Length: 4", CHUNKED) + b"0\r\n\r\n",
    "both lengths in a GET": request("Host: a", "Content-Length: 4", CHUNKED, start="GET /x HTTP/1.1") + b"0\r\n\r\n",
    # TE.TE
    "xchunked": request("Host: a", "Transfer-Encoding: xchunked"),
    "chunkedx": request("Host: a", "Transfer-Encoding: chunkedx"),
    "a quoted chunked": request("Host: a", 'Transfer-Encoding: "chunked"'),
    "a chunked in single quotes": request("Host: a", "Transfer-Encoding: 'chunked'"),
    "a vertical tab before chunked": request("Host: a", "Transfer-Encoding: \x0bchunked"),
    "a form feed after chunked": request("Host: a", "Transfer-Encoding: chunked\x0c"),
    "NUL after chunked": request("Host: a", "Transfer-Encoding: chunked\x00"),
    "a no-break space before chunked": request("Host: a", "Transfer-Encoding: \xa0chunked"),
    "identity": request("Host: a", "Transfer-Encoding: identity"),
    "gzip, chunked": request("Host: a", "Transfer-Encoding: gzip, chunked"),
    "chunked, gzip": request("Host: a", "Transfer-Encoding: chunked, gzip"),
    "chunked, identity": request("Host: a", "Transfer-Encoding: chunked, identity"),
    "chunked twice in a list": request("Host: a", "Transfer-Encoding: chunked, chunked"),
    "chunked and nothing": request("Host: a", "Transfer-Encoding: chunked,"),
    "nothing and chunked": request("Host: a", "Transfer-Encoding: ,chunked"),
    "chunked with a parameter": request("Host: a", "Transfer-Encoding: chunked;x=1"),
    "chunked with words behind": request("Host: a", "Transfer-Encoding: chunked false"),
    "chunked twice in two lines": request("Host: a", CHUNKED, CHUNKED),
    "chunked and something else": request("Host: a", CHUNKED, "Transfer-Encoding: x"),
    "something else and chunked": request("Host: a", "Transfer-Encoding: x", CHUNKED),
    "chunked and identity in two lines": request("Host: a", CHUNKED, "Transfer-encoding: identity"),
    "an empty transfer encoding": request("Host: a", "Transfer-Encoding:"),
    "an empty one before": request("Host: a", "Transfer-Encoding:", CHUNKED),
    "a blank before the colon": request("Host: a", "Transfer-Encoding : chunked"),
    "a tab before the colon": request("Host: a", "Transfer-Encoding\t: chunked"),
    "a blank before the name": request("Host: a", " Transfer-Encoding: chunked"),
    "a folded transfer encoding": request("Host: a", "Transfer-Encoding:", " chunked"),
    "a transfer encoding folded with a tab": request("Host: a", "Transfer-Encoding:", "\tchunked"),
    "a transfer encoding behind a bare LF": request("Host: a", "X: x\nTransfer-Encoding: chunked"),
    "a transfer encoding behind a bare CR": request("Host: a", "X: x\rTransfer-Encoding: chunked"),
    "a bare LF in the name": request("Host: a", "Transfer-Encoding\n: chunked"),
    "chunked in 1.0": request("Host: a", CHUNKED, start="POST /x HTTP/1.0") + b"0\r\n\r\n",
    "chunked in 1.0 with a length": request("Host: a", CHUNKED, "Content-Length: 5", start="POST /x HTTP/1.0") + b"0\r\n\r\n",
    "chunked in 1.0, kept": request("Host: a", CHUNKED, "Connection: keep-alive", start="POST /x HTTP/1.0") + b"0\r\n\r\n",
    # lengths
    "two content lengths": request("Host: a", "Content-Length: 4", "Content-Length: 5") + b"abcd",
    "two content lengths, one zero": request("Host: a", "Content-Length: 0", "Content-Length: 40"),
    "the same content length twice": request("Host: a", "Content-Length: 4", "Content-Length: 4") + b"abcd",
    "a list of content lengths": request("Host: a", "Content-Length: 4, 4") + b"abcd",
    "a list of different content lengths": request("Host: a", "Content-Length: 4, 5") + b"abcd",
    "a content length and nothing": request("Host: a", "Content-Length: 4,") + b"abcd",
    "a signed content length": request("Host: a", "Content-Length: +4") + b"abcd",
    "a negative content length": request("Host: a", "Content-Length: -4") + b"abcd",
    "a negative zero": request("Host: a", "Content-Length: -0"),
    "a hexadecimal content length": request("Host: a", "Content-Length: 0x4") + b"abcd",
    "a content length in letters": request("Host: a", "Content-Length: a") + b"abcd",
    "a content length with an underscore": request("Host: a", "Content-Length: 1_0") + b"abcdabcdab",
    "a content length with a blank within": request("Host: a", "Content-Length: 1 0"),
    "a content length with a tab within": request("Host: a", "Content-Length: 1\t0"),
    "a content length with a vertical tab": request("Host: a", "Content-Length: \x0b4") + b"abcd",
    "a content length with NUL": request("Host: a", "Content-Length: 4\x00") + b"abcd",
    "a content length with a fraction": request("Host: a", "Content-Length: 4.0") + b"abcd",
    "a content length with an exponent": request("Host: a", "Content-Length: 4e0") + b"abcd",
    "a quoted content length": request("Host: a", 'Content-Length: "4"') + b"abcd",
    "a content length with a parameter": request("Host: a", "Content-Length: 4;x") + b"abcd",
    "an empty content length": request("Host: a", "Content-Length:"),
    "an endless content length": request("Host: a", "Content-Length: " + "9" * 30),
    "a content length beyond 64 bits": request("Host: a", "Content-Length: 18446744073709551620"),
    "a content length in Arabic digits": "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: ٤\r\n\r\nabcd".encode(),
    "a content length with a superscript": request("Host: a", "Content-Length: \xb2") + b"ab",
    "a blank before the colon of a length": request("Host: a", "Content-Length : 4") + b"abcd",
    "a folded content length": request("Host: a", "Content-Length:", " 4") + b"abcd",
    "a bad length in a GET": request("Host: a", "Content-Length: x", start="GET /x HTTP/1.1"),
    "a bad length in a HEAD": request("Host: a", "Content-Length: 4, 4", start="HEAD /x HTTP/1.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMING)
def test_a_body_that_could_end_in_two_places_is_refused(name: str):
    refused(FRAMING[name])


@pytest.mark.parametrize("value", ["Chunked", "CHUNKED", " chunked", "\tchunked", "chunked \t", "cHuNkEd"])
def test_a_chunked_that_everybody_reads_alike_is_chunked_and_goes_up_in_one_spelling(value: str):
    talk = used().client(
        request("Host: api.example", f"Transfer-Encoding:{value}") + chunks(b"hi") + SMUGGLED
    )
    talk.upstream_hears(forwarded("POST /x HTTP/1.1", framing=CHUNKED, body=chunks(b"hi")), on=1).upstream(
        ok()
    ).client_sees(seen())
    talk.upstream_hears(forwarded("GET /smuggled HTTP/1.1"), on=1).upstream(ok()).client_sees(seen()).play()


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_a_length_counts_whatever_the_method(method: str):
    """The body of a GET is a body: what stands in it is no request."""
    start = f"{method} /x HTTP/1.1"
    talk = used().client(
        request("Host: api.example", f"Content-Length: {len(SMUGGLED)}", start=start) + SMUGGLED
    )
    talk.upstream_hears(forwarded(start, framing=f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED), on=1)
    talk.upstream(http("HTTP/1.1 204 No Content")).client_sees(answered("HTTP/1.1 204 No Content"))
    goes_on(talk).upstream_connections(1).play()


MISSPELT = ("Content_Length: 5", "content_length: 5", "Transfer_Encoding: chunked", "TRANSFER_ENCODING: chunked", "Content-Length_: 5", "_Content-Length: 5", "X-Content-Length: 5", "Farebox_Customer: mallory", "farebox-customer: mallory", "FAREBOX-CUSTOMER: mallory", "Farebox-customer:mallory", "farebox_request-id: x", "X_Forwarded_For: 6.6.6.6", "x-forwarded_host: evil", "X_Real_IP: 6.6.6.6", "_Farebox-Customer: mallory")  # fmt: skip


@pytest.mark.parametrize("line", MISSPELT)
def test_a_name_that_a_careless_upstream_takes_for_ours_frames_nothing_and_goes_nowhere(line: str):
    """CGI-like upstreams read ``_`` and ``-`` as one. What only looks alike to a human is left alone."""
    stays = line.startswith(("_", "X-Content-Length", "Content-Length_"))
    talk = used().client(http("GET /x HTTP/1.1", "Host: api.example", line))
    talk.upstream_hears(forwarded("GET /x HTTP/1.1", *([line] if stays else [])), on=1).upstream(
        ok()
    ).client_sees(seen())
    goes_on(talk).upstream_connections(1).play()


# ── chunks ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_CHUNKS = {
    "a size with a sign": b"+2\r\nhi\r\n0\r\n\r\n",
    "a negative size": b"-2\r\nhi\r\n0\r\n\r\n",
    "a size with 0x": b"0x2\r\nhi\r\n0\r\n\r\n",
    "a size with a blank": b"2 \r\nhi\r\n0\r\n\r\n",
    "a size with a tab": b"2\t\r\nhi\r\n0\r\n\r\n",
    "a blank before an extension": b"2 ;a\r\nhi\r\n0\r\n\r\n",
    "a blank before the size": b" 2\r\nhi\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\nhihihihihihihihi\r\n0\r\n\r\n",
    "a size that is no number": b"g\r\nhi\r\n0\r\n\r\n",
    "a fraction": b"2.0\r\nhi\r\n0\r\n\r\n",
    "a quoted size": b'"2"\r\nhi\r\n0\r\n\r\n',
    "a list of sizes": b"2,2\r\nhi\r\n0\r\n\r\n",
    "a size in full-width digits": "２\r\nhi\r\n0\r\n\r\n".encode(),
    "NUL in the size": b"2\x00\r\nhi\r\n0\r\n\r\n",
    "no size": b"\r\nhi\r\n0\r\n\r\n",
    "only an extension": b";a=b\r\nhi\r\n0\r\n\r\n",
    "a size beyond 64 bits": b"10000000000000002\r\nhi\r\n0\r\n\r\n",
    "a size beyond all bounds": b"fffffffffffffffff\r\nhi",
    "a size with endless zeros": b"0" * 100 + b"2\r\nhi\r\n0\r\n\r\n",
    "a bare LF after the size": b"2\nhi\r\n0\r\n\r\n",
    "a bare CR after the size": b"2\rhi\r\n0\r\n\r\n",
    "a bare LF after the data": b"2\r\nhi\n0\r\n\r\n",
    "a bare CR after the data": b"2\r\nhi\r0\r\n\r\n",
    "nothing after the data": b"2\r\nhi0\r\n\r\n",
    "data longer than the size": b"2\r\nhi!\r\n0\r\n\r\n",
    "data shorter than the size": b"4\r\nhi\r\n0\r\n\r\n",
    "an extension with a bare LF": b"2;a\nb\r\nhi\r\n0\r\n\r\n",
    "an extension that ends in a bare LF": b"2;a\nhi\r\n0\r\n\r\n",
    "an extension with a bare CR": b"2;a\rb\r\nhi\r\n0\r\n\r\n",
    "an extension with NUL": b"2;a\x00\r\nhi\r\n0\r\n\r\n",
    "a quoted extension with a line end": b'2;a="\r\nhi"\r\n0\r\n\r\n',
    "a long extension": b"2;" + b"a" * 2000 + b"\r\nhi\r\n0\r\n\r\n",
    "a bare LF after the last chunk": b"2\r\nhi\r\n0\n\r\n",
    "a last chunk that ends in a bare LF": b"2\r\nhi\r\n0\r\n\n",
    "a trailer that is no header": b"2\r\nhi\r\n0\r\nNonsense\r\n\r\n",
    "a trailer with a blank before the colon": b"2\r\nhi\r\n0\r\nA : b\r\n\r\n",
    "a trailer with a bare LF": b"2\r\nhi\r\n0\r\nA: b\n\r\n",
    "a trailer with a bare CR": b"2\r\nhi\r\n0\r\nA: b\rC: d\r\n\r\n",
    "a trailer with NUL": b"2\r\nhi\r\n0\r\nA: b\x00\r\n\r\n",
    "a folded trailer": b"2\r\nhi\r\n0\r\nA: b\r\n c\r\n\r\n",
    "a request for a trailer": b"2\r\nhi\r\n0\r\n" + SMUGGLED,
    "endless trailers": b"2\r\nhi\r\n0\r\n" + b"A: b\r\n" * 2000,
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_malformed_chunk_that_comes_with_the_head_never_reaches_the_upstream(name: str):
    """Whole, nothing goes up. Cut, the head may have gone by then: the upstream gets a body that never ends, and no request."""
    if len(BAD_CHUNKS[name]) > 1000:
        talk = Conversation().client(request("Host: api.example", CHUNKED) + BAD_CHUNKS[name] + SMUGGLED)
        talk.client_is_refused(400, "request_malformed").upstream_hears_no_whole_request().play(cuts=False)
        return
    talk = used().client(request("Host: api.example", CHUNKED) + BAD_CHUNKS[name] + SMUGGLED)
    talk.client_is_refused(400, "request_malformed").upstream_hears_no_whole_request()
    # Another client's calls go on; the connection that heard half a request is gone.
    talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"))
    talk.upstream(ok(b"after")).client_sees(seen(b"after"), on=2).play()


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_malformed_chunk_in_a_body_that_is_wanted_whole_never_reaches_the_upstream(name: str):
    talk = Conversation(set_door=lambda door: setattr(door, "binds_bodies", True))
    talk.client(request("Host: api.example", CHUNKED) + BAD_CHUNKS[name] + SMUGGLED)
    talk.client_is_refused(400, "request_malformed").upstream_hears_nothing().upstream_connections(0).ends()
    talk.play(cuts=len(BAD_CHUNKS[name]) < 1000)


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_after_a_malformed_chunk_in_the_body_of_a_refused_request_nothing_is_read(name: str):
    """The door said no and the body is only read off: its end must be as clear as that of any other."""
    from tests.gateway.test_conversations import refusing

    def closed_after_one_problem(stage: Stage) -> None:
        assert stage.clients[0].ended
        assert stage.clients[0].received.count(b"HTTP/1.1 402 ") == 1
        assert stage.clients[0].unheard().count(b"smuggled") == 0
        assert len(stage.door.calls) == 1

    talk = refusing("payment_required").client(
        request("Host: api.example", CHUNKED) + BAD_CHUNKS[name] + SMUGGLED
    )
    talk.then(closed_after_one_problem).upstream_connections(0).play(cuts=len(BAD_CHUNKS[name]) < 1000)


FORBIDDEN_TRAILERS = ("Content-Length: 7", "Transfer-Encoding: chunked", "Host: evil", "Farebox-Customer: mallory", "farebox_customer: mallory", "Connection: close", "Authorization: Bearer x", "X-Api-Key: fbx_ck_x", "X-Forwarded-For: 6.6.6.6", "Content-Type: text/html", "Trailer: x", "TE: trailers", "Expect: 100-continue", "Payment-Signature: e30=", "Cookie: a=b", "Set-Cookie: a=b", "Range: bytes=0-1")  # fmt: skip


@pytest.mark.parametrize("line", FORBIDDEN_TRAILERS)
def test_a_trailer_frames_nothing_and_names_nobody(line: str):
    trailers = line.encode() + b"\r\n"
    talk = used().client(request("Host: api.example", CHUNKED) + chunks(b"hi", trailers=trailers) + SMUGGLED)
    talk.upstream_hears(forwarded("POST /x HTTP/1.1", framing=CHUNKED, body=chunks(b"hi")), on=1)
    talk.upstream(http("HTTP/1.1 200 OK", CHUNKED) + chunks(b"ho", trailers=trailers))
    talk.client_sees(answered("HTTP/1.1 200 OK", framing="Content-Length: 2", body=b"ho"))
    talk.upstream_hears(forwarded("GET /smuggled HTTP/1.1"), on=1).upstream(ok()).client_sees(
        seen()
    ).upstream_connections(1).play()


# ── targets ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PATHS = (
    b"//x", b"//", b"/a//b", b"/a//", b"///", b"//evil.example/x", b"/.", b"/..", b"/./a", b"/../a", b"/a/.", b"/a/..", b"/a/./b", b"/a/../b",
    b"/a/../../b", b"/a%2fb", b"/a%2Fb", b"/free/..%2fpaid/x", b"/free%2f..%2fpaid", b"/a%5cb", b"/a%5Cb", b"/a/..%5cb", b"/a%00", b"/%00",
    b"/a%00.html", b"/a\\b", b"/a\\..\\b", b"/\\evil", b"/%2e/a", b"/%2e%2e/a", b"/a/%2E%2e", b"/.%2e/a", b"/%2E./a", b"/a/%2e", b"/a/..;/b",
    b"/a/..;x=1/b", b"/a/.;/b", b"/a/%2e%2e;x/b", b"/;/a", b"/a/;/b", b"/a/;x=1/b", b"/a/%c0%ae%c0%ae/b", b"/a/%C0%AE./b", b"/a%c0%afb",
    b"/a%C1%9Cb", b"/a%c0%80", b"/a/%e0%80%ae/b", b"/a%e0%80%afb", b"/a%", b"/a%2", b"/a%zz", b"/a%2gb", b"/%u002e%u002e/a", b"/a#b",
    b"/#", b"/a?b#c", b"/a\x7fb", b"/a\x01b", b"/a\tb", "/caf\u00e9".encode(), b"/a\xffb", b"/a?b\x01", b"/a?b\x00", b"/a?caf\xe9",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_could_be_read_two_ways_is_refused(path: bytes):
    refused(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")


@pytest.mark.parametrize(
    "path",
    ["/", "/a/", "/a.b/c", "/a...b", "/...", "/.well-known/x", "/..a", "/a..", "/a;b=1", "/a;/b", "/a%20b", "/%C3%A9", "/a%0d%0ab", "/%252e%252e/a",
     "/a%252fb", "/a|b", "/{x}", "/a:b@c", "/a?b=//../%2f", "/a?100%", '/a?[b]="{c}"', "/a?", "/a??b", "/~x/*", "/a?b=c;d", "/%E0%A4%85"],
)  # fmt: skip
def test_an_unusual_but_clear_target_is_forwarded_as_it_came(path: str):
    talk = Conversation().client(get(path)).upstream_hears(forwarded(f"GET {path} HTTP/1.1"))
    talk.upstream(ok()).client_sees(seen()).play()


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_ANSWERS = {
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "HTTP/0.9": b"<html>hello</html>\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a lower-case version": b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a blank first": b" HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "an empty line first": b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "two blanks": b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
    "a tab": b"HTTP/1.1\t200\tOK\r\nContent-Length: 0\r\n\r\n",
    "two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a signed status": b"HTTP/1.1 +20 OK\r\n\r\n",
    "status 0": b"HTTP/1.1 000 OK\r\n\r\n",
    "status 999": b"HTTP/1.1 999 OK\r\n\r\n",
    "a status in Arabic digits": "HTTP/1.1 ٢٠٠ OK\r\n\r\n".encode(),
    "no status": b"HTTP/1.1\r\n\r\n",
    "a phrase with a bare CR": b"HTTP/1.1 200 OK\rX: y\r\nContent-Length: 0\r\n\r\n",
    "a phrase with a bare LF": b"HTTP/1.1 200 OK\nX: y\r\nContent-Length: 0\r\n\r\n",
    "a phrase with NUL": b"HTTP/1.1 200 O\x00K\r\nContent-Length: 0\r\n\r\n",
    "two different lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "a signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "an endless length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other way": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nxx",
    "gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "xchunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a transfer encoding with a blank before the colon": b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a bare LF in a value": b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\nContent-Length: 0\r\n\r\n",
    "a bare CR in a value": b"HTTP/1.1 200 OK\r\nX: a\rY: b\r\nContent-Length: 0\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nX: a\x00\r\nContent-Length: 0\r\n\r\n",
    "a blank before the colon": b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n",
    "a folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nNonsense\r\nContent-Length: 0\r\n\r\n",
    "an empty name": b"HTTP/1.1 200 OK\r\n: a\r\nContent-Length: 0\r\n\r\n",
    "a 101 that nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a bad interim answer": b"HTTP/1.1 103 Early Hints\r\nX: a\nb\r\n\r\n",
    "a bad chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_malformed_answer_is_a_502_and_the_last_of_its_connection(name: str):
    talk = (
        used()
        .client(get("/x"))
        .upstream_hears(forwarded("GET /x HTTP/1.1"), on=1)
        .upstream(BAD_ANSWERS[name], on=1)
    )
    if name == "a bad chunk size":
        # Cut, the head has gone by then; what follows is a broken body.
        talk.client_is_refused(502, "upstream_malformed", closed=False).upstream_sees_the_end(1).play(
            cuts=False
        )
        return
    talk.client_is_refused(502, "upstream_malformed", closed=False).upstream_sees_the_end(1)
    talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"), on=2)
    talk.upstream(ok(b"after"), on=2).client_sees(seen(b"after"), on=2).ends(
        (200, 0, 2), (0, 0, 0), (200, 0, 5)
    ).play()


@pytest.mark.parametrize("name", [n for n in BAD_CHUNKS if n not in ("data shorter than the size",)])
def test_a_malformed_chunk_in_an_answer_is_never_shown_as_an_end(name: str):
    talk = Conversation().client(get("/x")).upstream_hears(forwarded("GET /x HTTP/1.1"))
    talk.upstream(http("HTTP/1.1 200 OK", CHUNKED)).client_sees(answered("HTTP/1.1 200 OK", framing=CHUNKED))

    def broken_off(stage: Stage) -> None:
        shown = stage.clients[0].unheard()
        assert not shown.endswith(b"0\r\n\r\n")
        assert stage.clients[0].ended
        assert stage.upstreams[0].ended
        assert [f.status for f in stage.door.finished] == [0]

    talk.upstream(BAD_CHUNKS[name]).then(broken_off).play(cuts=len(BAD_CHUNKS[name]) < 1000)


def test_an_equal_length_said_twice_is_one_length():
    """RFC 9110 §8.6 allows it, and old upstreams do it."""
    talk = Conversation().client(get()).upstream_hears(forwarded("GET /a HTTP/1.1"))
    talk.upstream(http("HTTP/1.1 200 OK", "Content-Length: 2", "Content-Length: 2", body=b"hi")).client_sees(
        seen()
    )
    talk.upstream_is_kept().play()


EVIL = http("HTTP/1.1 200 OK", "Content-Length: 4", body=b"evil")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("more", [EVIL, b"x", b"\r\n", b"\x00"])
def test_bytes_after_an_answer_are_never_given_to_the_next_caller(method: str, more: bytes):
    """In the same piece, or in one of its own: the connection ends there."""
    answer = ok() if method == "GET" else http("HTTP/1.1 200 OK", "Content-Length: 2")
    shown = seen() if method == "GET" else answered("HTTP/1.1 200 OK", framing="Content-Length: 2")
    for pieces in ([answer + more], [answer, more]):
        talk = used().client(http(f"{method} /x HTTP/1.1", "Host: api.example"))
        talk.upstream_hears(forwarded(f"{method} /x HTTP/1.1"), on=1)
        for piece in pieces:
            talk.upstream(piece, on=1)
        talk.client_sees(shown).upstream_sees_the_end(1)
        talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"), on=2)
        talk.upstream(ok(b"after"), on=2).client_sees(seen(b"after"), on=2).client_is_kept().play()


def test_an_answer_before_its_request_ends_the_connection():
    """An upstream that talks on an idle connection: what it says belongs to nobody."""
    talk = used().upstream(EVIL, on=1).upstream_sees_the_end(1)
    talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"), on=2)
    talk.upstream(ok(b"after"), on=2).client_sees(seen(b"after"), on=2).play()


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_a_body_where_there_is_none_is_given_to_nobody(status: str):
    talk = used().client(get("/x")).upstream_hears(forwarded("GET /x HTTP/1.1"), on=1)
    talk.upstream(http(f"HTTP/1.1 {status}") + EVIL, on=1).client_sees(
        answered(f"HTTP/1.1 {status}")
    ).upstream_sees_the_end(1)
    talk.client(get("/after"), on=2).upstream_hears(forwarded("GET /after HTTP/1.1"), on=2)
    talk.upstream(ok(b"after"), on=2).client_sees(seen(b"after"), on=2).play()


def test_an_answers_headers_are_not_the_gateways():
    """An upstream cannot speak for us to the client."""
    talk = Conversation().client(get()).upstream_hears(forwarded("GET /a HTTP/1.1"))
    talk.upstream(
        http(
            "HTTP/1.1 200 OK",
            "Farebox-Request-Id: forged",
            "farebox-sandbox: 1",
            "Farebox_Customer: x",
            "Content-Length: 2",
            body=b"hi",
        )
    )
    talk.client_sees(seen()).play()


# ── another path than the one that was matched ──────────────────────────────────────────────────────────────────────

FREE, DEAR = FreeFare(), AccountFare()
STREETS = (
    Route("paid", Match("/paid/{*rest}"), "up0", account=DEAR),
    Route("report", Match("/reports/{id}"), "up0", account=DEAR),
    Route("all reports", Match("/reports/all"), "up0", account=DEAR, metric="reports"),
    Route("me", Match("/users/me"), "up0", account=DEAR),
    Route("user", Match("/users/{name}"), "up0", account=DEAR),
    Route("coffee", Match("/caf%C3%A9"), "up0", account=DEAR),
    Route("orders", Match("/orders", ("POST",)), "up0", account=DEAR),
    Route("gold", Match("/plans/a", headers=(Condition("x-plan", "exact", "gold"),)), "up0", account=DEAR),
    Route("inside", Match("/inside", hosts=("in.example",)), "up0", account=DEAR),
    Route("matrix", Match("/cars;new/{*rest}"), "up0", account=DEAR),
    Route("cars", Match("/cars/{*rest}"), "up0", account=DEAR),
    Route("free", Match("/{*rest}"), "up0", free=FREE),
)


def street(path: str, method: str = "GET", host: str = "api.example", **headers: str) -> str | None:
    """The route that a path leads to. Raises Fault for one that is refused."""
    table = RouteTable(catalog(UPSTREAM_URL, routes=STREETS), lambda _: False)
    said = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    found = table.find(path.encode())
    chosen = choose(found, method, host, said, b"")
    assert found.only is None or not found.forgiving
    return None if isinstance(chosen, frozenset) else chosen[0].route.id


@pytest.mark.parametrize(
    "path",
    ["/p%61id/x", "/%70%61%69%64/x", "/p%2561id/x", "/paid;x/y", "/paid;x=1;y=2/y", "/paid%3bx/y", "/PAID/x", "/Paid/x", "/reports/%61ll",
     "/reports/all;x", "/reports/ALL", "/reports/all/", "/users/m%65", "/users/me;x", "/caf%c3%a9", "/caf%C3%A9;x", "/CAF%C3%A9",
     "/cars;old/1", "/cars%3Bnew/1", "/CARS;new/1"],
)  # fmt: skip
def test_a_path_that_a_forgiving_upstream_takes_for_another_routes_is_refused(path: str):
    with pytest.raises(Fault, match="another route"):
        street(path)


@pytest.mark.parametrize(
    ("path", "route"),
    [("/paid/x", "paid"), ("/paid/p%61id;x/Y/", "paid"), ("/paid", "free"), ("/reports/7", "report"), ("/reports/Q%33;draft", "report"),
     ("/reports/all", "all reports"), ("/users/Me", "user"), ("/users/me", "me"), ("/users/Bob", "user"), ("/caf%C3%A9", "coffee"),
     ("/cars;new/1", "matrix"), ("/cars/1;new", "cars"), ("/docs;v=1/Intro/", "free"), ("/docs/100%25", "free"), ("/orders/", "free"),
     ("/Orders", "free"), ("/Plans/a", "free"), ("/inside/", "free"), ("/", "free"), ("/{paid}", "free")],
)  # fmt: skip
def test_a_path_that_all_upstreams_take_for_the_same_routes_goes_on(path: str, route: str):
    assert street(path) == route


def test_it_is_refused_only_where_the_other_route_would_take_the_call():
    for path, more in [
        ("/Orders", {"method": "POST"}),
        ("/Plans/a", {"x_plan": "gold"}),
        ("/inside/", {"host": "in.example"}),
    ]:
        with pytest.raises(Fault, match="another route"):
            street(path, **more)


def test_a_path_read_in_a_forgiving_way_reaches_no_upstream():
    talk = Conversation(served=catalog(UPSTREAM_URL, routes=STREETS)).client(get("/p%61id/x") + SMUGGLED)
    talk.client_is_refused(400, "request_malformed").upstream_hears_nothing().play()


@pytest.mark.parametrize("name", ["X-Original-URL", "x-original-uri", "X-Rewrite-URL", "X_Original_URL"])
@pytest.mark.parametrize("trusted", [(), ("203.0.113.0/24",)])
def test_nobody_says_another_target_than_the_one_that_was_matched(name: str, trusted: tuple[str, ...]):
    """IIS, Symfony and their like would route by it; a proxy in front passes on what its clients say."""
    talk = Conversation(trusted_proxies=trusted)
    talk.client(http("GET /a HTTP/1.1", "Host: api.example", f"{name}: /paid", "X-Kept: 1"))
    talk.upstream_hears(forwarded("GET /a HTTP/1.1", "X-Kept: 1")).upstream(ok()).client_sees(seen()).play()


@pytest.mark.parametrize(
    "name", ["X-Original-URL", "Farebox-Customer", "Authorization", "X-API-Key", "Host", "X-Forwarded-For", "X-Payment", "Connection"]
)  # fmt: skip
def test_no_trailer_says_who_calls_or_what_for(name: str):
    raw = http(
        "POST /a HTTP/1.1", "Host: api.example", "Transfer-Encoding: chunked", f"Trailer: X-Sum, {name}"
    )
    raw += chunks(b"hi", trailers=f"X-Sum: 1\r\n{name}: x\r\n".encode())
    heard = forwarded(
        "POST /a HTTP/1.1",
        "Trailer: x-sum",
        framing="Transfer-Encoding: chunked",
        body=chunks(b"hi", trailers=b"X-Sum: 1\r\n"),
    )
    Conversation().client(raw).upstream_hears(heard).upstream(ok()).client_sees(seen()).play()


@pytest.mark.parametrize(
    "named",
    ["Farebox-Customer, Farebox-Request-Id", "farebox_customer", "X-Forwarded-For, X-Forwarded-Host, Host"],
)
def test_connection_takes_nothing_of_ours_off(named: str):
    talk = Conversation().client(http("GET /a HTTP/1.1", "Host: api.example", f"Connection: {named}"))
    talk.upstream_hears(forwarded("GET /a HTTP/1.1")).upstream(ok()).client_sees(seen()).play()


# ── behind an upgrade ───────────────────────────────────────────────────────────────────────────────────────────────

ASKS = http("GET /up HTTP/1.1", "Host: api.example", "Connection: Upgrade", "Upgrade: chat")
ASKS_UP = forwarded("GET /up HTTP/1.1", framing="Connection: Upgrade\r\nUpgrade: chat")


def test_what_stands_behind_a_refused_upgrade_is_a_request_like_any_other():
    talk = Conversation().client(ASKS + SMUGGLED).upstream_hears(ASKS_UP)
    talk.upstream(http("HTTP/1.1 403 No", "Content-Length: 0"))
    talk.client_sees(answered("HTTP/1.1 403 No", framing="Content-Length: 0"))
    talk.upstream_hears(forwarded("GET /smuggled HTTP/1.1")).upstream(ok()).client_sees(seen())
    talk.ends((403, 0, 0), (200, 0, 2)).play()


def test_the_words_of_a_refused_upgrade_go_nowhere():
    stage = Stage()
    client = stage.connect()
    client.sends(ASKS + b"\x81\x85GET /x HTTP/1.1\r\n\r\n" + SMUGGLED)
    [upstream] = stage.upstreams
    heard = bytes(upstream.received)
    upstream.sends(http("HTTP/1.1 426 No", "Content-Length: 0"))

    assert [line for line in client.received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")] == [
        b"HTTP/1.1 426 No",
        b"HTTP/1.1 400 Bad Request",
    ]
    assert upstream.received == heard
    assert len(stage.upstreams) == 1
    stage.leave()


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked", "Content-Length: 0"])
def test_an_upgrade_has_no_body_to_hide_one_in(framing: str):
    raw = ASKS[:-2] + framing.encode() + b"\r\n\r\n"
    if framing.endswith(" 0"):
        up = forwarded(
            "GET /up HTTP/1.1", framing="Content-Length: 0\r\nConnection: Upgrade\r\nUpgrade: chat"
        )
        Conversation().client(raw).upstream_hears(up).upstream(ok()).client_sees(seen()).play()
    else:
        talk = Conversation().client(raw + SMUGGLED).client_is_refused(501, "upgrade_unsupported")
        talk.upstream_hears_nothing().play()


# ── over real sockets, and one by one behind each other ─────────────────────────────────────────────────────────────


async def test_the_catalogue_over_real_sockets(house: House):
    """Each bad head on a connection of its own, between good calls that share the upstream's connection."""
    good = b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n"
    bad = [*MALFORMED_HEADS.values(), *FRAMING.values()]
    for raw in bad:
        answers = await house.says(good + raw + good, methods=())
        assert [s.status for s in answers.said] == [200, 400], raw

    assert {h.target for h in house.upstream.heard} == {"/good"}
    assert len(house.upstream.heard) == len(bad)
    assert house.upstream.connections == 1


async def test_a_malformed_chunk_over_real_sockets_is_no_request(house: House):
    for chunk in BAD_CHUNKS.values():
        raw = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk
        answers = await house.says(raw + SMUGGLED)

        assert [s.status for s in answers.said] == [400], chunk
        assert answers.said[0].headers["connection"] == "close"
    assert house.upstream.heard == []


async def test_ten_thousand_requests_in_one_breath_are_each_asked_and_answered(house: House):
    last = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

    def every_other(call: object) -> object:
        count[0] += 1
        return house.door.admitted(call) if count[0] % 2 else no

    count = [0]
    no: Refusal = refusal("payment_required", "Pay what is asked for.")
    house.door.decide = every_other  # type: ignore[assignment]
    reader, writer = await house.connect()
    writer.write(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi" * 10_000 + last)
    said = await asyncio.wait_for(reader.read(), 120)
    writer.close()

    assert (said.count(b"HTTP/1.1 200 "), said.count(b"HTTP/1.1 402 ")) == (5001, 5000)
    assert count == [10_001]
    assert len(house.upstream.heard) == len(house.door.finished) == 5001
    assert house.upstream.connections == 1
