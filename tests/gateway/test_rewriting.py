"""What a route changes on the way up and down, and that nothing else changes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import Refused
from farebox.domain.access import (
    AnswerRewrite,
    Condition,
    GatewayCatalog,
    Match,
    Rewrite,
    Route,
    Upstream,
)
from farebox.gateway.problems import Fault
from farebox.gateway.routing import RouteTable, choose
from farebox.gateway.targets import check_path
from tests.gateway.kit import Heard, House, Said, open_house


def table(*routes: Route) -> RouteTable:
    return RouteTable(GatewayCatalog(1, (Upstream("u", "http://u"),), routes), lambda _: False)


def sent_on(rewrite: Rewrite, target: str, path: str = "/{*rest}") -> str:
    """The target that goes upstream."""
    bare, _, query = target.partition("?")
    chosen = choose(
        table(Route("r", Match(path), "u", rewrite)).find(bare.encode()), "GET", "a", [], query.encode()
    )
    assert not isinstance(chosen, frozenset), "no route takes it"
    way, params = chosen
    assert way.rewrites_request
    return way.target(target.encode(), bare.encode(), params)[0].decode()


async def through(rewrite: Rewrite, path: str = "/x", **headers: str) -> tuple[Heard, Said]:
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", rewrite)]) as house:
        said = await house.get(path, **headers)
        assert said.status == 200
        return house.upstream.heard[0], said


# ── the path ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rewrite", "sent", "got"),
    [
        (Rewrite("/v1"), "/v1/a?b=1", "/a?b=1"),
        (Rewrite("/v1/"), "/v1", "/"),
        (Rewrite("/v1"), "/v1?", "/?"),
        (Rewrite("/v1"), "/v1x/a", "/v1x/a"),
        (Rewrite("/v1"), "/V1/a", "/V1/a"),
        (Rewrite("/v1"), "/a/v1/a", "/a/v1/a"),
        (Rewrite(add_prefix="/api/"), "/a/", "/api/a/"),
        (Rewrite(add_prefix="/api"), "/", "/api/"),
        (Rewrite("/v1", add_prefix="/v2"), "/v1/a?x", "/v2/a?x"),
        (Rewrite("/v1", add_prefix="/v2"), "/b", "/v2/b"),
    ],
)
def test_prefixes_come_off_and_on_at_a_segment(rewrite: Rewrite, sent: str, got: str):
    assert sent_on(rewrite, sent) == got


@pytest.mark.parametrize(
    ("path", "set_path", "sent", "got"),
    [
        ("/weather/{city}", "/v2/{city}", "/weather/paris?x=1", "/v2/paris?x=1"),
        ("/weather/{city}", "/v2/{city}/now", "/weather/S%C3%A3o", "/v2/S%C3%A3o/now"),
        ("/weather/{city}", "/v2", "/weather/paris", "/v2"),
        ("/{a}/{b}", "/{b}/{a}/{b}", "/1/2", "/2/1/2"),
        ("/a/{*rest}", "/b/{*rest}", "/a/1/2/", "/b/1/2/"),
        ("/a/{*rest}", "/b/{*rest}", "/a/", "/b/"),
        ("/{*rest}", "/{*rest}", "/", "/"),
        ("/{a}/{*rest}", "/x/{a}/{*rest}", "/...;/y;v=1", "/x/...;/y;v=1"),
    ],
)
def test_a_new_path_holds_segments_as_they_were_matched(path: str, set_path: str, sent: str, got: str):
    assert sent_on(Rewrite(set_path=set_path), sent, path) == got


async def test_the_upstreams_own_path_stands_before_a_rewritten_one():
    async with open_house(routes=[Route("r", Match("/a/{b}"), "up0", Rewrite(set_path="/{b}"))]) as house:
        served = house.gateway.layout.catalog
        upstreams = (replace(served.upstreams[0], url=house.upstream.url + "/base"),)
        house.gateway.replace_catalog(replace(served, version=2, upstreams=upstreams))
        await house.get("/a/c?d")

        assert house.upstream.heard[0].target == "/base/c?d"


async def test_the_prefix_that_was_taken_off_is_told():
    heard, _ = await through(Rewrite("/v1"), "/v1/a", X_Forwarded_Prefix="/forged")
    other, _ = await through(Rewrite("/v1"), "/a", X_Forwarded_Prefix="/forged")

    assert (heard.target, heard.one("X-Forwarded-Prefix")) == ("/a", "/v1")
    assert (other.target, other.one("X-Forwarded-Prefix")) == ("/a", None)


@pytest.mark.parametrize(
    ("said", "told"),
    [("/outer", "/outer/v1"), ("/", "/v1"), ("/a/../b", "/v1"), ("evil", "/v1"), ("//x", "/v1")],
)
async def test_a_trusted_proxys_prefix_stands_before_ours(said: str, told: str):
    routes = [Route("r", Match("/{*rest}"), "up0", Rewrite("/v1"))]
    async with open_house(routes=routes, trusted_proxies=("127.0.0.1",)) as house:
        await house.get("/v1/a", X_Forwarded_Prefix=said)

        assert house.upstream.heard[0].one("X-Forwarded-Prefix") == told


# ── the query ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "left"),
    [
        ("", ""),
        ("?", ""),
        ("?a=1&b=%zz&&c", "?a=1&b=%zz&&c"),
        ("?api_key=1", ""),
        ("?a=1&api_key=1&b=2", "?a=1&b=2"),
        ("?api_key&a=1", "?a=1"),
        ("?API_KEY=1&a", "?a"),
        ("?%61pi%5Fkey=1&a", "?a"),
        ("?api_key[]=1&api_key%5B0%5D=1&a", "?a"),
        ("?a=1;api_key=2;b=3", "?a=1;b=3"),
        ("?+api_key=1&%20api.key=2&a", "?a"),
        ("?api_key%00x=1&a", "?a"),
        ("?a=api_key&xapi_key=1&api_key2", "?a=api_key&xapi_key=1&api_key2"),
    ],
)
def test_what_is_taken_out_of_a_query_is_out_in_every_spelling(query: str, left: str):
    assert sent_on(Rewrite(remove_query=("api_key",)), "/x" + query) == "/x" + left


@pytest.mark.parametrize(
    ("query", "got"),
    [
        ("", "?plan=gold%20%26%20more&city=S%C3%A3o%26x%3D1"),
        ("?a=1", "?a=1&plan=gold%20%26%20more&city=S%C3%A3o%26x%3D1"),
        ("?plan=free&a&Plan=free;plan=free", "?a&plan=gold%20%26%20more&city=S%C3%A3o%26x%3D1"),
    ],
)
def test_what_is_set_in_a_query_is_there_once_and_escaped(query: str, got: str):
    rewrite = Rewrite(set_query=(("plan", "gold & more"), ("city", "{city}")))
    target = sent_on(rewrite, "/w/S%C3%A3o&x=1" + query, "/w/{city}")

    assert target == "/w/S%C3%A3o&x=1" + got
    said = [pair for pair in parse_qsl(target.partition("?")[2], keep_blank_values=True) if pair[0] != "a"]
    assert said == [("plan", "gold & more"), ("city", "São&x=1")]


# ── headers up ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_headers_are_set_and_removed_whatever_their_spelling():
    rewrite = Rewrite(set_headers=(("X-Plan", "ours"),), remove_headers=("X-Secret", "Cookie"))
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", rewrite)]) as house:
        house.door.decide = lambda call: house.door.admitted(call, forward_headers=[(b"X-Plan", b"ours")])
        raw = (
            b"GET / HTTP/1.1\r\nHost: a\r\nX-Plan: gold\r\nx_plan: gold\r\nX-PLAN: gold\r\nX-Secret: 1\r\nx_secret: 1\r\nCookie: 1\r\n"
            b"X-Kept: 1\r\nx_kept: 2\r\n\r\n"
        )
        await house.says(raw, methods=["GET"])

        names = [name.lower() for name, _ in house.upstream.heard[0].headers]
        assert house.upstream.heard[0].all("X-Plan") == ["ours"]
        assert not {"x_plan", "x-secret", "x_secret", "cookie"} & set(names)
        assert {"x-kept", "x_kept"} <= set(names)


@pytest.mark.parametrize(
    "rewrite",
    [Rewrite(set_headers=(("Authorization", "Basic eA=="),)), Rewrite(remove_headers=("authorization",))],
)
async def test_a_credential_of_the_clients_gives_way_to_the_routes(rewrite: Rewrite):
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", rewrite)]) as house:
        ours = [(n.encode(), v.encode()) for n, v in rewrite.set_headers]
        house.door.decide = lambda call: house.door.admitted(call, forward_headers=ours)
        await house.get(Authorization="Bearer theirs", X_Api_Key="theirs")

        assert house.upstream.heard[0].all("Authorization") == [v for _, v in rewrite.set_headers]
        assert house.upstream.heard[0].one("X-Api-Key") == "theirs"


async def test_a_route_may_keep_the_host_that_was_asked_for():
    heard, _ = await through(Rewrite(host="original"))

    assert heard.all("Host") == ["api.example.com"]
    assert heard.one("X-Forwarded-Host") == "api.example.com"


# ── the way down ─────────────────────────────────────────────────────────────────────────────────────────────────────

DOWN = Rewrite(
    answer=AnswerRewrite(
        (("X-Served-By", "farebox"), ("Cache-Control", "no-store")), ("Server", "X-Internal")
    )
)
ANSWER = (
    b"HTTP/1.1 103 Early Hints\r\nLink: </s>\r\nX-Internal: 1\r\nX-Served-By: u\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nServer: u\r\nserver: v\r\nX-Internal: 1\r\nx_internal: 1\r\nX-Served-By: u\r\nCache-Control: public\r\n"
    b"X-Kept: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nhi"
)


def answering(house: House, raw: bytes) -> None:
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    house.upstream.answer = answer


async def test_an_answers_head_is_rewritten_and_its_interim_answers_are_rid_of_what_is_removed():
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", DOWN)]) as house:
        answering(house, ANSWER)
        house.door.decide = lambda call: house.door.admitted(
            call, answer_headers=[(b"RateLimit-Remaining", b"7")]
        )
        answers = await house.says(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", methods=["GET"])

        said = answers.said[0]
        assert said.body == b"hi"
        assert (said.headers["x-served-by"], said.headers["cache-control"]) == ("farebox", "no-store")
        assert (said.headers["x-kept"], said.headers["ratelimit-remaining"]) == ("1", "7")
        assert not {"server", "x-internal", "x_internal"} & said.headers.keys()
        assert answers.interim[0].headers == {"link": "</s>"}


async def test_our_own_answers_are_not_rewritten():
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", DOWN)]) as house:
        await house.upstream.stop()
        refused = await house.get()

        assert refused.status == 502
        assert "x-served-by" not in refused.headers


async def test_what_is_removed_does_not_come_as_a_trailer_either():
    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", DOWN)]) as house:
        answering(
            house,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 1\r\nX-Internal: 1\r\nx_served-by: u\r\n\r\n",
        )
        reader, writer = await house.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE, close\r\n\r\n")
        raw = await reader.read()
        writer.close()

    assert raw.endswith(b"0\r\nX-Sum: 1\r\n\r\n")
    assert b"nternal" not in raw


async def test_a_kept_answer_is_kept_as_it_was_sent():
    kept: list[Any] = []

    async def keep(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        kept.append((status, dict(headers), body))

    async with open_house(routes=[Route("r", Match("/{*rest}"), "up0", DOWN)]) as house:
        answering(house, ANSWER.partition(b"\r\n\r\n")[2])
        house.door.decide = lambda call: house.door.admitted(
            call, keep_answer=keep, keep_answer_bytes_max=1000
        )
        await house.get()

    status, headers, body = kept[0]
    assert (status, body) == (200, b"hi")
    assert (headers[b"X-Served-By"], headers[b"Cache-Control"], headers[b"x-kept"]) == (
        b"farebox",
        b"no-store",
        b"1",
    )
    assert not {b"server", b"x-internal", b"x-served-by", b"cache-control"} & headers.keys()


# ── what cannot be ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "rewrite"),
    [
        ("/{a}", Rewrite(set_path="/{b}")),
        ("/{*a}", Rewrite(set_path="/{a}/x")),
        ("/{a}", Rewrite(set_path="/{*a}")),
        ("/{a}", Rewrite(set_path="/x/../{a}")),
        ("/{a}", Rewrite(set_path="/x/.{a}")),
        ("/{a}", Rewrite(set_path="x")),
        ("/{a}", Rewrite(add_prefix="/x/%2e%2e")),
        ("/{a}", Rewrite(add_prefix="/x//y")),
        ("/{a}", Rewrite(strip_prefix="/x%2fy")),
        ("/{a}", Rewrite(set_query=(("q", "{b}"),))),
        ("/a/%2e%2e/b", Rewrite()),
    ],
)  # fmt: skip
def test_a_gateway_takes_no_catalog_whose_rewrites_could_go_wrong(path: str, rewrite: Rewrite):
    with pytest.raises(Refused) as caught:
        table(Route("r", Match(path), "u", rewrite))
    assert caught.value.reason.code == "ROUTE_TEMPLATE_MALFORMED"


SEGMENT = st.text(st.sampled_from("ab.%2eE;:=&~!\"<|'+"), max_size=6)
PATHS = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda segments: "/" + "/".join(segments))
QUERIES = st.text(st.sampled_from("ab=&;%2+[]_.q"), max_size=20)
TEMPLATES = st.sampled_from(("/{*rest}", "/{x}/{*rest}", "/{x}", "/{x}/{y}", "/a/{*rest}", "/a/{x}/{*rest}"))
REWRITES = st.sampled_from((
    Rewrite(), Rewrite("/a"), Rewrite(add_prefix="/b"), Rewrite("/a", add_prefix="/b"), Rewrite("/a", remove_query=("q",)),
    Rewrite(set_path="/c"), Rewrite(set_path="/c/"),
))  # fmt: skip
WITH_PARAMETERS = {
    "/{*rest}": ("/n/{*rest}", "/{*rest}"),
    "/{x}/{*rest}": ("/{x}/{*rest}", "/n/{*rest}", "/{x}", "/{x}/{x}/{*rest}"),
    "/{x}": ("/{x}", "/n/{x}/", "/{x}/m"),
    "/{x}/{y}": ("/{y}/{x}", "/n/{y}"),
    "/a/{*rest}": ("/{*rest}",),
    "/a/{x}/{*rest}": ("/{x}/{*rest}", "/{*rest}"),
}


@given(st.lists(TEMPLATES, min_size=1, max_size=3), REWRITES, PATHS, QUERIES, st.data())
def test_what_is_forwarded_is_what_was_matched_unless_a_rewrite_says_so(
    templates: list[str], rewrite: Rewrite, path: str, query: str, data: st.DataObject
):
    """And whatever it says, the gateway itself would have taken what comes out."""
    routes = []
    for n, template in enumerate(templates):
        if data.draw(st.booleans()):
            new = data.draw(st.sampled_from(WITH_PARAMETERS[template]))
            says = Rewrite(set_path=new, set_query=(("q", "{x}"),) if "{x}" in template else ())
        else:
            says = rewrite
        conditions = (Condition("a", "exists"),) if data.draw(st.booleans()) else ()
        routes.append(Route(f"r{n}", Match(template, query=conditions), "u", says))
    target = path + "?" + query
    try:
        chosen = choose(table(*routes).find(path.encode()), "GET", "h", [], query.encode())
    except Fault:
        return
    if isinstance(chosen, frozenset):
        return
    way, params = chosen

    if way.rewrites_request:
        new_target, prefix = way.target(target.encode(), path.encode(), params)
        new_path, _, new_query = new_target.partition(b"?")
        check_path(new_path)
        assert new_query.isascii()
        assert not set(b" #\r\n\0") & set(new_target)
        assert path.encode().startswith(prefix)
        says = way.route.rewrite
        if not (says.set_query or says.remove_query):
            assert new_query == query.encode()
        if not (says.set_path or says.add_prefix or prefix):
            assert new_path == path.encode()
    else:
        assert way.route.rewrite == Rewrite(), "a rewrite was forgotten"


def test_a_route_that_changes_nothing_is_asked_nothing():
    way = table(Route("r", Match("/{*rest}"), "u")).find(b"/x").only
    assert way is not None
    assert not way.rewrites_request | way.rewrites_answer | way.conditional
    assert not way.our_names
