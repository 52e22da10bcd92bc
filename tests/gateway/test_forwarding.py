"""What goes up and what comes down: headers, framing, pipelining, keep-alive, and the answers that have no body."""

from __future__ import annotations

import asyncio
import json

import pytest

from farebox.domain.access import Match, Rewrite, Route
from farebox.gateway.forwarding import TrustedProxies
from farebox.gateway.settings import GatewaySettings
from tests.gateway.kit import Answers, Heard, House, open_house, setting_headers

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def answering(house: House, raw: bytes, then_close: bool = False) -> None:
    """From now on the upstream answers each request with these bytes."""

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        if then_close:
            await writer.drain()
            writer.close()

    house.upstream.answer = answer


async def test_an_admitted_call_is_forwarded_and_answered(house: House):
    answer = await house.get("/weather/paris?units=c", X_Trace="1")

    assert answer.status == 200
    assert answer.body == b"GET /weather/paris?units=c 0"
    heard = house.upstream.heard[0]
    assert heard.one("X-Trace") == "1"
    assert heard.one("Host") == f"127.0.0.1:{house.upstream.port}"
    assert heard.one("X-Forwarded-Host") == "api.example.com"
    assert heard.one("X-Forwarded-For") == "127.0.0.1"
    assert heard.one("X-Forwarded-Proto") == "http"
    assert (
        answer.headers["farebox-request-id"]
        == heard.one("Farebox-Request-Id")
        == house.door.calls[0].request_id
    )
    assert [f.status for f in house.door.finished] == [200]


async def test_the_call_carries_what_the_door_needs(house: House):
    await house.get("/weather/paris?units=c", method="DELETE", X_Api_Key="fbx_ck_x")

    call = house.door.calls[0]
    assert (call.method, call.path, call.query, call.host) == (
        "DELETE",
        "/weather/paris",
        "units=c",
        "api.example.com",
    )
    assert call.header(b"x-api-key") == b"fbx_ck_x"
    assert call.client_address == "127.0.0.1"
    assert call.route.id == "all"
    assert call.params == {"rest": "weather/paris"}
    assert call.body is None


async def test_request_ids_differ_in_every_call_and_every_process():
    async with open_house() as one, open_house() as other:
        ids = [(await house.get()).headers["farebox-request-id"] for house in (one, one, other)]

    assert len(set(ids)) == 3
    assert all(i.startswith("req_") for i in ids)


async def test_hop_by_hop_headers_stay_on_their_hop(house: House):
    answering(
        house,
        b"HTTP/1.1 200 OK\r\nConnection: X-Internal, keep-alive\r\nX-Internal: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        b"Proxy-Authenticate: x\r\nTrailer: X\r\nX-Kept: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nhi",
    )
    answer = await house.get(
        Connection="keep-alive, X-Secret, TE", X_Secret="1", TE="trailers", Keep_Alive="5", Proxy_Connection="keep-alive",
        Proxy_Authorization="Basic x", Trailer="X-Sum", X_Kept="1",
    )  # fmt: skip

    heard = house.upstream.heard[0]
    assert (heard.one("Connection"), heard.one("TE")) == (
        "TE",
        "trailers",
    )  # ours, for trailers can be passed on
    for name in (
        "X-Secret",
        "Keep-Alive",
        "Proxy-Connection",
        "Proxy-Authorization",
        "Trailer",
    ):
        assert heard.one(name) is None, name
    assert heard.one("X-Kept") == "1"
    for name in ("connection", "x-internal", "keep-alive", "upgrade", "proxy-authenticate", "trailer"):
        assert name not in answer.headers, name
    assert answer.headers["x-kept"] == "1"
    assert answer.body == b"hi"


async def test_connection_cannot_name_away_what_we_set(house: House):
    answer = await house.get(
        Connection="close, Farebox-Customer, X-Forwarded-For, Host, Content-Length",
        Farebox_Customer="mallory",
    )

    assert answer.status == 200
    heard = house.upstream.heard[0]
    assert heard.one("Farebox-Customer") == "acme"
    assert heard.one("X-Forwarded-For") == "127.0.0.1"
    assert heard.one("Host") == f"127.0.0.1:{house.upstream.port}"


async def test_identity_headers_of_a_client_never_pass():
    routes = [Route("all", Match("/{*rest}"), "up0", setting_headers(("X-Plan", "{plan}")))]
    async with open_house(routes=routes) as house:
        house.door.decide = lambda call: house.door.admitted(
            call,
            forward_headers=[
                (b"Farebox-Customer", b"acme"),
                (b"X-Plan", b"starter"),
                (b"Idempotency-Key", b"ours"),
            ],
        )
        raw = (
            b"GET / HTTP/1.1\r\nHost: a\r\nFarebox-Customer: mallory\r\nfarebox-pass: p\r\nFAREBOX-PLAN: gold\r\nFarebox_Customer: m\r\n"
            b"farebox_request-id: x\r\nX-Plan: gold\r\nx-plan: gold\r\nX_Plan: gold\r\nIdempotency-Key: theirs\r\n"
            b"Content_Length: 5\r\nTransfer_Encoding: chunked\r\n\r\n"
        )
        answers = await house.says(raw, methods=["GET"])

        assert answers.said[0].status == 200
        heard = house.upstream.heard[0]
        assert heard.one("Farebox-Customer") == "acme"
        assert heard.one("X-Plan") == "starter"
        assert heard.one("Idempotency-Key") == "ours"
        names = {name.lower().replace("_", "-") for name, _ in heard.headers}
        assert not {n for n in names if n.startswith("farebox-")} - {"farebox-customer"}
        assert not names & {"content-length", "transfer-encoding"}
        assert "mallory" not in str(heard.headers)
        assert "gold" not in str(heard.headers)


async def test_our_credentials_end_here_and_theirs_go_on(house: House):
    await house.get(X_Api_Key="fbx_ck_secret", Payment_Signature="e30=", X_Payment="e30=")
    await house.get(Authorization="Bearer fbx_ck_secret")
    await house.get(Authorization="Bearer theirs", X_Api_Key="theirs")

    first, second, third = house.upstream.heard
    assert first.one("X-Api-Key") is first.one("Payment-Signature") is first.one("X-Payment") is None
    assert second.one("Authorization") is None
    assert third.one("Authorization") == "Bearer theirs"
    assert third.one("X-Api-Key") == "theirs"


async def test_a_pass_token_ends_here(house: House):
    house.door.decide = lambda call: house.door.admitted(call, fare="pass")
    await house.get(Authorization="Bearer eyJ.eyJ.x")

    assert house.upstream.heard[0].one("Authorization") is None


async def test_the_decisions_headers_win_over_the_upstreams(house: House):
    answering(
        house,
        b"HTTP/1.1 200 OK\r\nRateLimit-Remaining: 99\r\nratelimit-remaining: 98\r\nFarebox-Request-Id: forged\r\nFarebox-Credits: 5\r\n"
        b"Content-Length: 0\r\n\r\n",
    )
    house.door.decide = lambda call: house.door.admitted(
        call, answer_headers=[(b"RateLimit-Remaining", b"7")]
    )
    for _ in range(3):
        answer = await house.get()

        assert answer.headers["ratelimit-remaining"] == "7"
        assert answer.headers["farebox-request-id"] == house.door.calls[-1].request_id
        assert "farebox-credits" not in answer.headers


async def test_a_sandbox_says_so():
    async with open_house(GatewaySettings(sandbox=True, tick_s=0.05)) as house:
        assert (await house.get()).headers["farebox-sandbox"] == "1"
        assert (await house.get("//")).headers["farebox-sandbox"] == "1"


async def test_a_header_of_ours_cannot_smuggle_a_line(house: House):
    house.door.decide = lambda call: house.door.admitted(
        call, forward_headers=[(b"X-Plan", b"a\r\nX-Admin: 1")]
    )

    answer = await house.get()

    assert answer.status == 500
    assert house.upstream.heard == []
    assert [f.status for f in house.door.finished] == [0]


async def test_forwarded_headers_of_a_stranger_are_not_believed(house: House):
    await house.get(
        X_Forwarded_For="6.6.6.6", X_Forwarded_Proto="https", X_Forwarded_Host="evil", X_Forwarded_Prefix="/x", X_Real_Ip="6.6.6.6",
        Forwarded="for=6.6.6.6",
    )  # fmt: skip

    heard = house.upstream.heard[0]
    assert heard.one("X-Forwarded-For") == "127.0.0.1"
    assert heard.one("X-Forwarded-Proto") == "http"
    assert heard.one("X-Forwarded-Host") == "api.example.com"
    assert heard.one("X-Forwarded-Prefix") is heard.one("X-Real-Ip") is heard.one("Forwarded") is None
    assert house.door.calls[0].client_address == "127.0.0.1"


async def test_a_trusted_proxy_is_believed_and_extended():
    async with open_house(trusted_proxies=("127.0.0.0/8", "10.0.0.0/8")) as house:
        await house.get(
            X_Forwarded_For="6.6.6.6, 203.0.113.9, 10.1.2.3", X_Forwarded_Proto="https", X_Forwarded_Host="shop.example", X_Real_Ip="1.1.1.1",
            Forwarded="for=203.0.113.9;proto=https",
        )  # fmt: skip

        heard = house.upstream.heard[0]
        assert heard.one("X-Forwarded-For") == "6.6.6.6, 203.0.113.9, 10.1.2.3, 127.0.0.1"
        assert heard.one("X-Forwarded-Proto") == "https"
        assert heard.one("X-Forwarded-Host") == "shop.example"
        assert heard.one("X-Real-Ip") == "1.1.1.1"
        assert heard.one("Forwarded") == "for=203.0.113.9;proto=https, for=127.0.0.1"
        assert house.door.calls[0].client_address == "203.0.113.9"


TRUSTED = TrustedProxies(("127.0.0.0/8", "10.0.0.0/8", "2001:db8:1::/48"))


@pytest.mark.parametrize(
    ("said", "client"),
    [
        ("for=203.0.113.9", "203.0.113.9"),
        ("For=203.0.113.9;Proto=https;by=10.0.0.1", "203.0.113.9"),
        ('for="203.0.113.9:4711"', "203.0.113.9"),
        ("for=203.0.113.9:4711", "203.0.113.9"),
        ('for="[2001:db8::17]:4711"', "2001:db8::17"),
        ('for="[2001:db8::17]"', "2001:db8::17"),
        ('for="[2001:DB8:0::17]:_port"', "2001:db8::17"),
        ("for=[2001:db8::17]", "2001:db8::17"),
        ("for=2001:db8::17", "2001:db8::17"),
        ('for="[::ffff:203.0.113.9]"', "203.0.113.9"),
        # several of ours stand between: each believed for the one before it, nobody further
        ("for=6.6.6.6, for=203.0.113.9, for=10.1.2.3", "203.0.113.9"),
        ('for=6.6.6.6,for=203.0.113.9 , for="[2001:db8:1::5]:80";proto=http', "203.0.113.9"),
        ("for=10.9.9.9, for=10.1.2.3", "10.9.9.9"),
        # what is hidden hides everything before it
        ("for=6.6.6.6, for=_hidden, for=10.1.2.3", "10.1.2.3"),
        ("for=6.6.6.6, for=unknown", "127.0.0.1"),
        ('for=6.6.6.6, for="_gazonk:80"', "127.0.0.1"),
        ("for=6.6.6.6, proto=https", "127.0.0.1"),
        # so does what is malformed
        ("for=6.6.6.6, for=300.1.1.1", "127.0.0.1"),
        ("for=6.6.6.6, for=1.2.3.4.5, for=10.1.2.3", "10.1.2.3"),
        ("for=6.6.6.6, for=7.7.7.7;for=8.8.8.8", "127.0.0.1"),
        ("for=6.6.6.6, 7.7.7.7", "127.0.0.1"),
        ('for=6.6.6.6, for="[2001:db8::17]x"', "127.0.0.1"),
        ('for=6.6.6.6, for="[fe80::1%25eth0]"', "127.0.0.1"),
        # a client's open quotation mark does not swallow what the proxy added
        ('for="6.6.6.6, for=203.0.113.9', "203.0.113.9"),
        ('for=6.6.6.6;host="a, for=203.0.113.9', "203.0.113.9"),
        ("", "127.0.0.1"),
        (",,,", "127.0.0.1"),
        ("for=6.6.6.6, " * 1000 + "for=203.0.113.9, " + "for=10.1.2.3, " * 20, "203.0.113.9"),
        ("for=203.0.113.9, " + ", ".join(["for=10.1.2.3"] * 1000), "10.1.2.3"),
    ],
)
def test_a_trusted_proxys_forwarded_header_names_the_client(said: str, client: str):
    assert TRUSTED.client_of("127.0.0.1", [(b"forwarded", said.encode())]) == client


@pytest.mark.parametrize(
    ("said", "client"),
    [
        ("203.0.113.9:80, 10.1.1.1", "203.0.113.9"),
        ("[2001:db8::17]:80", "2001:db8::17"),
        ("2001:db8::17", "2001:db8::17"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("6.6.6.6, unknown", "127.0.0.1"),
        ("6.6.6.6, 1.2.3.4:http", "127.0.0.1"),
    ],
)
def test_x_forwarded_for_is_read_in_the_same_way_and_comes_first(said: str, client: str):
    both = [(b"forwarded", b"for=5.5.5.5"), (b"x-forwarded-for", said.encode())]
    assert TRUSTED.client_of("127.0.0.1", both) == client


async def test_what_a_trusted_proxy_says_in_forwarded_is_told_in_both_languages():
    async with open_house(trusted_proxies=("127.0.0.0/8", "10.0.0.0/8")) as house:
        await house.get(
            Forwarded='for="[2001:db8::17]:80";proto=https;host=shop.example, for=10.1.2.3;proto=http;host=inner'
        )

        heard = house.upstream.heard[0]
        assert heard.one("X-Forwarded-For") == "2001:db8::17, 10.1.2.3, 127.0.0.1"
        assert heard.one("X-Forwarded-Proto") == "https"
        assert heard.one("X-Forwarded-Host") == "shop.example"
        assert heard.one("Forwarded") == (
            'for="[2001:db8::17]:80";proto=https;host=shop.example, for=10.1.2.3;proto=http;host=inner, for=127.0.0.1'
        )
        assert house.door.calls[0].client_address == "2001:db8::17"


async def test_a_strangers_word_ahead_of_the_proxys_is_not_taken_for_the_proxys():
    async with open_house(trusted_proxies=("127.0.0.0/8",)) as house:
        await house.get(
            Forwarded="for=6.6.6.6;proto=https;host=evil, for=203.0.113.9;proto=http;host=shop.example"
        )

        heard = house.upstream.heard[0]
        assert heard.one("X-Forwarded-Proto") == "http"
        assert heard.one("X-Forwarded-Host") == "shop.example"
        assert heard.one("X-Forwarded-For") == "203.0.113.9, 127.0.0.1"
        assert house.door.calls[0].client_address == "203.0.113.9"


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ("/v1/weather?x=1", "/base/weather?x=1"),
        ("/v1", "/base/"),
        ("/v1?x", "/base/?x"),
        ("/v1x", "/base/v1x"),
        ("/other", "/base/other"),
    ],
)
async def test_a_prefix_is_stripped_at_a_segment_and_the_upstreams_path_put_before(sent: str, got: str):
    async with open_house(routes=[Route("all", Match("/{*rest}"), "up0", Rewrite("/v1/"))]) as house:
        from tests.gateway.kit import catalog

        house.gateway.replace_catalog(
            catalog(house.upstream.url + "/base/", routes=house.gateway.layout.catalog.routes)
        )
        assert (await house.get(sent)).status == 200

        assert house.upstream.heard[0].target == got


async def test_a_body_goes_up_with_its_length(house: House):
    answer = await house.get(method="POST", body=b"hello")

    assert answer.body == b"POST / 5"
    heard = house.upstream.heard[0]
    assert heard.body == b"hello"
    assert heard.one("Content-Length") == "5"
    assert house.door.finished[0].bytes_up == 5
    assert house.door.finished[0].bytes_down == len(answer.body)


async def test_an_empty_body_keeps_its_length(house: House):
    await house.says(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", methods=["POST"])

    assert house.upstream.heard[0].one("Content-Length") == "0"


async def test_pipelined_requests_are_answered_in_order(house: House):
    raw = b"".join(
        [
            b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
            b"GET //3 HTTP/1.1\r\nHost: a\r\n\r\n"[:0],
            b"POST /4 HTTP/1.1\r\nHost: a\r\n" + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",
            b"HEAD /5 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /6 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /7 HTTP/1.1\r\nHost: a\r\n\r\n",
        ]
    )
    answers = await house.says(raw, methods=["GET", "POST", "POST", "HEAD", "GET"])

    assert [s.body for s in answers.said] == [b"GET /1 0", b"POST /2 3", b"POST /4 2", b"", b"GET /6 0"]
    assert answers.said[-1].headers["connection"] == "close"
    assert [h.target for h in house.upstream.heard] == ["/1", "/2", "/4", "/5", "/6"]


async def test_a_thousand_pipelined_requests_that_need_nobody_are_answered(house: House):
    house.door.decide = lambda call: (_ for _ in ()).throw(AssertionError("nobody asks"))
    house.gateway.replace_catalog(type(house.gateway.layout.catalog)(2))

    answers = await house.says(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 3000, methods=["GET"] * 3000)

    assert [s.status for s in answers.said] == [404] * 3000


async def test_connections_are_kept_on_both_sides(house: House):
    reader, writer = await house.connect()
    for n in range(5):
        writer.write(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % n)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection" not in head.lower()
        await reader.readexactly(8)
    writer.close()

    assert house.upstream.connections == 1
    assert house.gateway.counters.connections_total == 1


async def test_http_1_0_is_served_and_closed_unless_it_asks(house: House):
    closed = await house.says(b"GET /1 HTTP/1.0\r\nHost: a\r\n\r\n")
    kept = await house.says(
        b"GET /2 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n" * 2, methods=["GET", "GET"]
    )

    assert closed.said[0].headers["connection"] == "close"
    assert [s.headers["connection"] for s in kept.said] == ["keep-alive", "keep-alive"]


async def test_an_answer_of_unknown_length_reaches_an_http_1_0_client_whole(house: House):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"3;x=y\r\ndef\r\n0\r\nX-Sum: 1\r\n\r\n")

    house.upstream.answer = answer
    reader, writer = await house.connect()
    writer.write(b"GET /1 HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n")
    raw = await reader.read()
    writer.close()

    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"abcdef"
    assert b"Transfer-Encoding" not in head
    assert b"Connection: close" in head


async def test_a_chunked_answer_stays_chunked_without_extensions_and_trailers(house: House):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3;a=b\r\nabc\r\n"
        )
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"3\r\ndef\r\n0\r\nX-Sum: 1\r\n\r\n")

    house.upstream.answer = answer
    reader, writer = await house.connect()
    writer.write(b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    raw = await reader.read()
    writer.close()

    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    assert b"Transfer-Encoding: chunked" in head
    assert b"Content-Length" not in head
    assert house.door.finished[0].bytes_down == 6


async def test_an_answer_that_ends_with_its_connection_is_whole(house: House):
    answering(house, b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello", then_close=True)
    answer = await house.get()

    assert (answer.status, answer.body, answer.whole) == (200, b"hello", True)
    assert [f.status for f in house.door.finished] == [200]
    assert (await house.get()).body == b"hello"


async def test_an_http_1_0_upstream_is_understood(house: House):
    answering(house, b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", then_close=True)

    assert [(await house.get()).body for _ in range(3)] == [b"hello"] * 3
    assert house.upstream.connections == 3


async def test_answers_without_a_body_keep_the_connection_in_step(house: House):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = {
            "/head": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
            "/chunkedhead": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
            "/304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\nETag: \"x\"\r\n\r\n",
            "/0": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "/last": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        }  # fmt: skip
        writer.write(raw[heard.target])

    house.upstream.answer = answer
    asked = [
        ("HEAD", "/head"),
        ("HEAD", "/chunkedhead"),
        ("GET", "/204"),
        ("GET", "/304"),
        ("GET", "/0"),
        ("GET", "/last"),
    ]
    raw = b"".join(f"{m} {t} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for m, t in asked)
    answers = await house.says(raw, methods=[m for m, _ in asked])

    assert [s.status for s in answers.said] == [200, 200, 204, 304, 200, 200]
    assert answers.said[0].headers["content-length"] == "1000"
    assert "content-length" not in answers.said[2].headers
    assert answers.said[-1].body == b"hi"
    assert house.upstream.connections == 1


async def test_interim_answers_pass_but_100_is_ours(house: House):
    answering(
        house,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </s.css>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    )
    answers = await house.says(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", methods=["GET"])
    old = await house.says(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")

    assert [s.status for s in answers.interim] == [103]
    assert answers.interim[0].headers["link"] == "</s.css>"
    assert answers.said[0].body == b"hi"
    assert old.interim == []
    assert old.said[0].body == b"hi"


async def test_a_client_that_waits_is_told_to_continue_once_it_is_admitted(house: House):
    reader, writer = await house.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    answers = Answers()
    answers.feed(await reader.readuntil(b"POST / 5"))
    writer.close()

    assert answers.said[0].status == 200
    assert house.upstream.heard[0].one("Expect") is None


async def test_a_client_that_waits_and_is_refused_is_not_told_to_continue(house: House):
    from farebox.gateway.problems import refusal

    house.door.decide = lambda call: refusal("credential_missing", "Bring a key.")
    answers = await house.says(
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    )

    assert answers.interim == []
    assert answers.said[0].status == 401
    assert answers.said[0].headers["connection"] == "close"


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 40,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_a_malformed_answer_is_a_502(house: House, raw: bytes):
    answering(house, raw)
    answer = await house.get()

    assert answer.status == 502
    assert json.loads(answer.body)["code"] == "upstream_malformed"
    assert [f.status for f in house.door.finished] == [0]
    assert house.gateway.counters.upstream_errors == {"upstream_malformed": 1}


async def test_bytes_after_an_answer_are_never_given_to_the_next_caller(house: House):
    answering(
        house,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    )

    assert [(await house.get()).body for _ in range(3)] == [b"hi"] * 3
    assert house.upstream.connections == 3
