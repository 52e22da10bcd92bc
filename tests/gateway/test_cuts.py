"""The same bytes give the same answer wherever they are cut; and what is taken, another reader takes in the same way."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.gateway.bodies import Body, ChunkedBody, LengthBody
from farebox.gateway.fields import request_fields
from farebox.gateway.heads import RequestHead, check_unfinished, read_request_head
from farebox.gateway.problems import Fault
from farebox.gateway.targets import check_path
from tests.gateway.kit import Answers, House
from tests.gateway.stage import pieces_of

CONVERSATION = (
    b"\r\nGET /1?x=1 HTTP/1.1\r\nHost: a.example\r\nX-Empty:\r\nAccept: */*\r\n\r\n"
    b"POST /2 HTTP/1.1\r\nHost: a.example\r\nContent-Length: 11\r\n\r\nhello\r\n\r\nab"
    b'PUT /3 HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n5;e="x"\r\nhello\r\n1\r\n\r\r\n0\r\nX-T: 1\r\n\r\n'
    b"HEAD /4 HTTP/1.1\r\nHost: a.example\r\n\r\n"
    b"GET //5 HTTP/1.1\r\nHost: a.example\r\n\r\n"
)
METHODS = ["GET", "POST", "PUT", "HEAD", "GET"]
EXPECTED = [(200, b"GET /1?x=1 0"), (200, b"POST /2 11"), (200, b"PUT /3 6"), (200, b""), (400, None)]


def check(answers: Answers) -> None:
    assert [s.status for s in answers.said] == [status for status, _ in EXPECTED]
    for said, (_, body) in zip(answers.said, EXPECTED, strict=True):
        assert body is None or said.body == body


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 64, 1000])
async def test_a_conversation_cut_into_equal_pieces(house: House, step: int):
    pieces = [CONVERSATION[i : i + step] for i in range(0, len(CONVERSATION), step)]
    check(await house.says(*pieces, methods=METHODS, pause_s=0 if step > 2 else 0.0002))


# ── readers alone ───────────────────────────────────────────────────────────────────────────────────────────────────


def read_whole(body: Body, pieces: list[bytes]) -> tuple[bytes, bool, bytes, bool]:
    """Payload, whether it ended, the rest, whether a rule was broken."""
    payload, rest = b"", b""
    ended = False
    try:
        for piece in pieces:
            if ended:
                rest += piece
                continue
            got, ended, rest = body.feed(piece)
            payload += got
    except Fault:
        return b"", False, b"", True
    return payload, ended, rest, False


CHUNKY = st.lists(
    st.sampled_from(
        [b"5\r\nhello\r\n", b"1;x=\"y\"\r\na\r\n", b"00a\r\n0123456789\r\n", b"0\r\n", b"\r\n", b"X: y\r\n", b"0\r\n\r\n", b"5\r\nhell", b"\n",
         b"zz\r\n", b"\r", b"-1\r\n", b"2\r\n\r\n\r\n", b" ", b";", b"GET / HTTP/1.1\r\n\r\n"]
    ),
    max_size=8,
).map(b"".join)  # fmt: skip


@given(CHUNKY, st.lists(st.integers(0, 200), max_size=6))
def test_a_chunked_body_is_read_alike_however_it_is_cut(data: bytes, cuts: list[int]):
    whole = read_whole(ChunkedBody(), [data] if data else [])
    assert read_whole(ChunkedBody(), pieces_of(data, cuts)) == whole
    assert read_whole(ChunkedBody(), pieces_of(data, list(range(200)))) == whole


@given(st.integers(1, 50), st.binary(max_size=100), st.lists(st.integers(0, 100), max_size=5))
def test_a_body_of_known_length_is_read_alike_however_it_is_cut(length: int, data: bytes, cuts: list[int]):
    payload, ended, rest, broken = read_whole(LengthBody(length), pieces_of(data, cuts))

    assert payload == data[:length]
    assert rest == data[length:]
    assert ended == (len(data) >= length)
    assert not broken


class Witness:
    """llhttp's reading of the same bytes."""

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.heads = 0
        self.whole = 0
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        pass

    def on_url(self, url: bytes) -> None:
        if not self.heads:
            self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.heads:
            self.headers.append(
                (name.lower(), value.rstrip(b" \t"))
            )  # blanks at the end it leaves to its caller

    def on_headers_complete(self) -> None:
        self.heads += 1

    def on_body(self, data: bytes) -> None:
        if self.heads == 1:
            self.body += data

    def on_message_complete(self) -> None:
        self.whole += 1


def ours(data: bytes) -> tuple[RequestHead, bytes, bool] | None:
    """Our reading of one request: its head, its body, whether it is whole. None: refused."""
    head_bytes, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    try:
        check_unfinished(data[: len(head_bytes) + 2], 8192, 32768)
        head = read_request_head(head_bytes, request_fields(), 8192, 100)
        check_path(head.path)
        body = head.block.body()
        payload, ended, left = (b"", True, rest) if body is None else body.feed(rest)
    except Fault:
        return None
    return head, payload, ended and not left


PARTS = st.lists(
    st.sampled_from(
        [b"GET /x HTTP/1.1\r\n", b"POST /a/b?c HTTP/1.1\r\n", b"PUT /x HTTP/1.0\r\n", b"Host: a\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n",
         b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"transfer-encoding: Chunked\r\n", b"Transfer-Encoding: identity\r\n",
         b"Transfer-Encoding : chunked\r\n", b"Content-Length: +5\r\n", b"X: \t y \r\n", b"X:\r\n", b" folded\r\n", b"\r\n", b"\r\n", b"\n", b"\r",
         b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"\x00", b"\x0b", b"Connection: close\r\n", b"X: caf\xe9\r\n", b"A\xe9: x\r\n",
         b"X: a\rb\r\n", b"X: a\nb\r\n", b"Content-Length: 5, 5\r\n", b"Expect: 100-continue\r\n", b"X_y: z\r\n"]
    ),
    max_size=10,
).map(b"".join)  # fmt: skip


def agree(data: bytes) -> bool:
    """Whatever we take, llhttp reads as the same one request. True when it was taken."""
    read = ours(data)
    if read is None:
        return False
    head, payload, whole = read
    witness = Witness()
    try:
        witness.parser.feed_data(data)
    except httptools.HttpParserError:
        # It may know fewer methods or choke on what follows; it must not have read another message before.
        assert witness.heads <= 1 or not whole, data
        if witness.heads == 0:
            return True
    assert witness.target == head.target, data
    assert witness.headers == head.block.headers, data
    if whole:
        assert witness.body == payload, data
        assert witness.whole == 1, data
    return True


@given(PARTS)
def test_whatever_we_take_llhttp_reads_in_the_same_way(data: bytes):
    agree(data)


@given(
    st.sampled_from([b"GET /x HTTP/1.1\r\nHost: a\r\n", b"POST /x HTTP/1.1\r\nHost: a\r\n"]),
    PARTS,
    st.integers(0, 300),
    st.binary(max_size=3),
)
def test_whatever_we_take_of_a_good_request_spoiled_llhttp_reads_in_the_same_way(
    start: bytes, parts: bytes, place: int, spoil: bytes
):
    data = start + parts + b"\r\n"
    at = place % (len(data) + 1)
    agree(data[:at] + spoil + data[at:])


def test_the_witness_is_heard():
    """Guards the tests above against a reader that refuses everything."""
    assert agree(b"GET /x?y HTTP/1.1\r\nHost: a\r\nX: \t y \r\nX:\r\n\r\n")
    assert agree(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert agree(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
