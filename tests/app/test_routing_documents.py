"""What farebox.yaml says of routing and rewriting: read into values, written back the same, and refused with a remedy."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.app.documents import Surroundings, read_catalog, write_catalog
from farebox.base.errors import Refused
from farebox.domain.access import (
    AnswerRewrite,
    Condition,
    ConditionMode,
    FreeFare,
    GatewayCatalog,
    Match,
    Rewrite,
    Route,
    catalog_document,
    catalog_from_document,
)
from farebox.gateway.routing import RouteTable

SELLER = "0x1111111111111111111111111111111111111111"
SANDBOX = Surroundings("sandbox")

ROUTES = """
upstreams: {u: {url: "http://u"}}
routes:
  - id: all
    match:
      path: "/v1/{city}/{*rest}"
      methods: [GET, options]
      hosts: [api.example.com, "*.Example.com", "api.example.com:8402", "[::1]", "*.example.com:9000", my_service]
      headers: {X-Api-Version: "2", X-Beta: {exists: true}, X-Old: {exists: false}, X-Kind: {prefix: fast}, X-Not: {not: slow}}
      query: {format: json, Tag: {contains: "a b"}, "filter.x": {exists: true}}
    upstream: u
    rewrite:
      set_path: "/v2/{city}/{*rest}"
      set_headers: {X-Plan: "{plan}"}
      remove_headers: [Cookie, x-secret]
      set_query: {plan: gold, city: "in {city}"}
      remove_query: api_key
      host: original
      answer: {set_headers: {Cache-Control: no-store}, remove_headers: [Server]}
    fares: {account: {}, free: {methods: OPTIONS}}
    body_bytes_max: 10MB
    timeout: 5s
    total_timeout: 60s
  - id: open
    match: {path: "/open/{*rest}"}
    upstream: u
    rewrite: {strip_prefix: /open/, add_prefix: /public/}
    fares: {free: {}}
    forward_auth: true
"""


def routes(text: str) -> tuple[Route, ...]:
    return read_catalog(text, SANDBOX).gateway.routes


def faults(text: str) -> dict[str | None, str]:
    """Path → code of everything that is wrong."""
    with pytest.raises(Refused) as caught:
        read_catalog(text, SANDBOX)
    assert all("\n" not in r.message and len(r.message) < 400 for r in caught.value.reasons)
    return {reason.field: reason.code for reason in caught.value.reasons}


def route(**fields: Any) -> str:
    """A file with one route; it has an account fare unless it says otherwise."""
    whole = {
        "id": "r",
        "match": {"path": "/{a}/{*rest}"},
        "upstream": "u",
        "fares": {"account": {}},
        **fields,
    }
    return json.dumps({"upstreams": {"u": {"url": "http://u"}}, "routes": [whole]})


def test_every_word_of_routing_is_read():
    everything, opened = routes(ROUTES)

    assert everything.match == Match(
        "/v1/{city}/{*rest}",
        ("GET", "OPTIONS"),
        (
            "api.example.com",
            "*.example.com",
            "api.example.com:8402",
            "[::1]",
            "*.example.com:9000",
            "my_service",
        ),
        (
            Condition("x-api-version", "exact", "2"),
            Condition("x-beta", "exists"),
            Condition("x-old", "absent"),
            Condition("x-kind", "prefix", "fast"),
            Condition("x-not", "not", "slow"),
        ),
        (
            Condition("format", "exact", "json"),
            Condition("Tag", "contains", "a b"),
            Condition("filter.x", "exists"),
        ),
    )
    assert everything.rewrite == Rewrite(
        set_headers=(("X-Plan", "{plan}"),),
        set_path="/v2/{city}/{*rest}",
        remove_headers=("Cookie", "x-secret"),
        set_query=(("plan", "gold"), ("city", "in {city}")),
        remove_query=("api_key",),
        host="original",
        answer=AnswerRewrite((("Cache-Control", "no-store"),), ("Server",)),
    )
    assert (everything.body_bytes_max, everything.timeout_s, everything.total_timeout_s) == (
        10_000_000,
        5.0,
        60.0,
    )
    assert everything.free == FreeFare(("OPTIONS",))
    assert opened.rewrite == Rewrite("/open", add_prefix="/public")
    assert opened.free == FreeFare()
    assert opened.forward_auth
    assert not everything.forward_auth


def test_a_free_get_is_a_free_head():
    text = route(fares={"free": {"methods": ["GET"]}, "account": {}})
    assert routes(text)[0].free == FreeFare(("GET", "HEAD"))


def test_what_is_written_reads_back_the_same_and_so_does_what_is_stored():
    first = read_catalog(ROUTES, SANDBOX)
    text = write_catalog(first.gateway, first.metrics, first.plans, SANDBOX)
    assert read_catalog(text, SANDBOX).gateway == first.gateway

    stored = json.loads(json.dumps(catalog_document(first.gateway)))
    assert catalog_from_document(0, stored) == first.gateway


def test_a_catalog_of_the_first_release_is_still_read():
    stored = json.loads(json.dumps(catalog_document(read_catalog(route(), SANDBOX).gateway)))
    old = stored["routes"][0]
    old["match"] = {"path": "/x", "methods": [], "hosts": [], "headers": [["x-kind", "fast"]]}
    old["rewrite"] = {"strip_prefix": "/v1", "set_headers": [["X-Plan", "{plan}"]]}
    for name in ("free", "body_bytes_max", "timeout_s", "total_timeout_s", "forward_auth"):
        del old[name]

    read = catalog_from_document(0, stored).routes[0]
    assert read.match == Match("/x", headers=(Condition("x-kind", "exact", "fast"),))
    assert read.rewrite == Rewrite("/v1", (("X-Plan", "{plan}"),))


NAMES = st.sampled_from(("x-a", "x-b", "x-c", "format", "q"))
TEXTS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="{}"), min_size=1, max_size=8
)
SEGMENTS = st.sampled_from(("a", "b.c", "S%C3%A3o", "x:y"))


@st.composite
def conditions(draw: st.DrawFn) -> tuple[Condition, ...]:
    found = []
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        mode: ConditionMode = draw(st.sampled_from(get_args(ConditionMode)))
        found.append(Condition(name, mode, "" if mode in ("exists", "absent") else draw(TEXTS)))
    return tuple(found)


@st.composite
def written_routes(draw: st.DrawFn) -> Route:
    def pairs() -> tuple[tuple[str, str], ...]:
        return tuple((name, draw(TEXTS)) for name in draw(st.lists(NAMES, max_size=2, unique=True)))

    def others(taken: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
        names = draw(st.lists(NAMES, max_size=3, unique=True))
        return tuple(n for n in names if n not in dict(taken))

    path = "".join(f"/{s}" for s in draw(st.lists(SEGMENTS, max_size=2))) + "/{x}/{*rest}"
    up, down, query = pairs(), pairs(), pairs()
    whole = draw(st.booleans())
    literal = st.lists(SEGMENTS, max_size=2).map(lambda s: "".join(f"/{x}" for x in s))
    free_methods = draw(st.sampled_from((None, ("OPTIONS",), ("GET", "HEAD"), ("PUT",))))
    timeout_s = draw(st.sampled_from((None, 0.25, 5.0)))
    return Route(
        "r",
        Match(
            path,
            draw(st.sampled_from(((), ("GET", "PUT", "OPTIONS"), ("GET", "HEAD", "OPTIONS", "PUT")))),
            tuple(
                draw(
                    st.lists(
                        st.sampled_from(("a.b", "*.a.b", "a.b:80", "[::1]:80", "*.c")),
                        max_size=2,
                        unique=True,
                    )
                )
            ),
            draw(conditions()),
            draw(conditions()),
        ),
        "u",
        Rewrite(
            "" if whole else draw(literal),
            up,
            add_prefix="" if whole else draw(literal),
            set_path=draw(st.sampled_from(("/n/{x}/{*rest}", "/n", "/{x}"))) if whole else "",
            remove_headers=others(up),
            set_query=query,
            remove_query=others(query),
            host=draw(st.sampled_from(("upstream", "original"))),
            answer=AnswerRewrite(down, others(down)),
        ),
        free=None if free_methods is None else FreeFare(free_methods),
        body_bytes_max=draw(st.sampled_from((None, 1, 1234, 10_000_000))),
        timeout_s=timeout_s,
        total_timeout_s=draw(st.sampled_from((None, 5.0, 3600.0))),
        forward_auth=draw(st.booleans()),
    )


@given(written_routes())
def test_whatever_a_route_says_is_written_and_read_back_the_same(written: Route):
    """And every catalog that is taken here is one that a gateway takes."""
    from farebox.domain.access import Upstream

    catalog = GatewayCatalog(0, (Upstream("u", "http://u"),), (written,))
    read = read_catalog(write_catalog(catalog, (), (), SANDBOX), SANDBOX).gateway
    assert read == catalog
    assert catalog_from_document(0, json.loads(json.dumps(catalog_document(read)))) == catalog
    RouteTable(read, lambda _: False)


@pytest.mark.parametrize(
    ("fields", "at", "code"),
    [
        ({"match": {"path": "/a/../b"}}, "match.path", "PATH_MALFORMED"),
        ({"match": {"path": "/a/%2e%2E/b"}}, "match.path", "PATH_MALFORMED"),
        ({"match": {"path": "/a/..;x"}}, "match.path", "PATH_MALFORMED"),
        ({"match": {"path": "/a%2fb"}}, "match.path", "PATH_MALFORMED"),
        ({"match": {"path": "/a%zz"}}, "match.path", "PATH_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["*"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["*.*.com"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["a.*.com"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["a..com"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["a:0"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "hosts": ["https://a"]}}, "match.hosts[0]", "HOST_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": {"exists": "yes"}}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": {"regex": "a"}}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": {"not": "a", "prefix": "b"}}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": {}}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": 2}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": ""}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": "é"}}}, "match.headers.X", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X": " a"}}}, "match.headers", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "headers": {"X-A": "1", "x_a": "2"}}}, "match.headers", "HEADER_MALFORMED"),
        ({"match": {"path": "/", "headers": {"Host": "a"}}}, "match.headers", "HEADER_RESERVED"),
        ({"match": {"path": "/", "headers": {"Authorization": {"exists": True}}}}, "match.headers", "HEADER_RESERVED"),
        ({"match": {"path": "/", "headers": {"X_Forwarded-Proto": "https"}}}, "match.headers", "HEADER_RESERVED"),
        ({"match": {"path": "/", "headers": {"Payment-Signature": {"exists": True}}}}, "match.headers", "HEADER_RESERVED"),
        ({"match": {"path": "/", "query": {"a b": "1"}}}, "match.query", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "query": {"a[0]": "1"}}}, "match.query", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "query": {"a": "1", "A": "1"}}}, "match.query", "CONDITION_MALFORMED"),
        ({"match": {"path": "/", "query": {f"a{n}": "1" for n in range(21)}}}, "match.query", "FIELD_MALFORMED"),
        ({"rewrite": {"set_path": "/{b}"}}, "rewrite.set_path", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"set_path": "/{rest}"}}, "rewrite.set_path", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"set_path": "/{*a}"}}, "rewrite.set_path", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"set_path": "/{*rest}/x"}}, "rewrite.set_path", "PATH_MALFORMED"),
        ({"rewrite": {"set_path": "/x.{a}"}}, "rewrite.set_path", "PATH_MALFORMED"),
        ({"rewrite": {"set_path": "/x?y=1"}}, "rewrite.set_path", "PATH_MALFORMED"),
        ({"rewrite": {"set_path": "/../x"}}, "rewrite.set_path", "PATH_MALFORMED"),
        ({"rewrite": {"set_path": "/x", "strip_prefix": "/y"}}, "rewrite.set_path", "REWRITE_CONTRADICTORY"),
        ({"rewrite": {"set_path": "/x", "add_prefix": "/y"}}, "rewrite.set_path", "REWRITE_CONTRADICTORY"),
        ({"rewrite": {"add_prefix": "/x//y"}}, "rewrite.add_prefix", "PATH_MALFORMED"),
        ({"rewrite": {"add_prefix": "x"}}, "rewrite.add_prefix", "PATH_MALFORMED"),
        ({"rewrite": {"strip_prefix": "/{a}"}}, "rewrite.strip_prefix", "PATH_MALFORMED"),
        ({"rewrite": {"set_headers": {"Content_Length": "1"}}}, "rewrite.set_headers", "HEADER_RESERVED"),
        ({"rewrite": {"set_headers": {"farebox_customer": "1"}}}, "rewrite.set_headers", "HEADER_RESERVED"),
        ({"rewrite": {"set_headers": {"X-Forwarded-For": "1"}}}, "rewrite.set_headers", "HEADER_RESERVED"),
        ({"rewrite": {"set_headers": {"X-Plan": "1", "x_plan": "2"}}}, "rewrite.set_headers", "HEADER_MALFORMED"),
        ({"rewrite": {"remove_headers": ["Transfer-Encoding"]}}, "rewrite.remove_headers", "HEADER_RESERVED"),
        ({"rewrite": {"remove_headers": ["Farebox-Customer"]}}, "rewrite.remove_headers", "HEADER_RESERVED"),
        ({"rewrite": {"remove_headers": ["X Y"]}}, "rewrite.remove_headers", "HEADER_MALFORMED"),
        ({"rewrite": {"set_headers": {"X-A": "1"}, "remove_headers": ["x_a"]}}, "rewrite.remove_headers", "REWRITE_CONTRADICTORY"),
        ({"rewrite": {"set_query": {"a": "{b}"}}}, "rewrite.set_query", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"set_query": {"a": "{customer}"}}}, "rewrite.set_query", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"set_query": {"a&b": "1"}}}, "rewrite.set_query", "QUERY_MALFORMED"),
        ({"rewrite": {"set_query": {"a": "1\n2"}}}, "rewrite.set_query", "QUERY_MALFORMED"),
        ({"rewrite": {"set_query": {"a": "1"}, "remove_query": ["A"]}}, "rewrite.remove_query", "REWRITE_CONTRADICTORY"),
        ({"rewrite": {"host": "client"}}, "rewrite.host", "FIELD_MALFORMED"),
        ({"rewrite": {"answer": {"set_headers": {"Connection": "close"}}}}, "rewrite.answer.set_headers", "HEADER_RESERVED"),
        ({"rewrite": {"answer": {"set_headers": {"RateLimit-Limit": "1"}}}}, "rewrite.answer.set_headers", "HEADER_RESERVED"),
        ({"rewrite": {"answer": {"set_headers": {"X": "{plan}"}}}}, "rewrite.answer.set_headers", "VARIABLE_UNKNOWN"),
        ({"rewrite": {"answer": {"remove_headers": ["PAYMENT-RESPONSE"]}}}, "rewrite.answer.remove_headers", "HEADER_RESERVED"),
        ({"rewrite": {"answer": {"set_headers": {"X": "1"}, "remove_headers": ["x"]}}}, "rewrite.answer.remove_headers", "REWRITE_CONTRADICTORY"),
        ({"fares": {"free": {}, "account": {}}}, "fares", "FARE_UNREACHABLE"),
        ({"match": {"path": "/", "methods": ["GET"]}, "fares": {"free": {"methods": ["GET"]}, "account": {}}}, "fares", "FARE_UNREACHABLE"),
        ({"match": {"path": "/", "methods": ["GET"]}, "fares": {"free": {"methods": ["PUT"]}}}, "fares.free.methods[0]", "FREE_METHOD_UNKNOWN"),
        ({"body_bytes_max": "10 megabytes"}, "body_bytes_max", "SIZE_MALFORMED"),
        ({"timeout": "2h"}, "timeout", "DURATION_MALFORMED"),
        ({"total_timeout": "2d"}, "total_timeout", "DURATION_MALFORMED"),
        ({"total_timeout": "1s", "timeout": "2s"}, "total_timeout", "DURATION_MALFORMED"),
        ({"forward_auth": "yes"}, "forward_auth", "FIELD_MALFORMED"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_path(fields: dict[str, Any], at: str, code: str):
    assert faults(route(**fields)) == {f"routes[0].{at}": code}


def test_two_wrong_variables_of_one_path_are_told_with_the_ones_that_are_right():
    with pytest.raises(
        Refused, match=r"\{b\} is not known here: the parameters of match.path are \{a\}, \{rest\}"
    ):
        read_catalog(route(rewrite={"set_path": "/{b}"}), SANDBOX)
    with pytest.raises(Refused, match=r"write \{\*rest\} as in match.path"):
        read_catalog(route(rewrite={"set_path": "/{rest}"}), SANDBOX)


def test_what_an_edge_cannot_keep_is_refused_on_its_routes():
    limits = {
        "calls": 5, "requests": {"count": 5, "window": "1m"}, "upload_bytes": "1MB", "download_bytes": "1MB", "upload_rate": "1MB/s",
        "download_rate": "1MB/s", "credits": 5, "concurrency": 5,
    }  # fmt: skip
    offer = {"id": "h", "name": "H", "price": "1 USDC", "duration": "1h", "limits": limits}
    fares = {"exact": {"price": "1 USDC"}, "passes": [offer]}
    network = "eip155:84532"
    sells = Surroundings("sandbox", frozenset({network}), pay_to={network: SELLER})

    def told(**fields: Any) -> dict[str | None, str]:
        with pytest.raises(Refused) as caught:
            read_catalog(route(fares=fares, **fields), sells)
        return {r.field: r.code for r in caught.value.reasons if r.code == "FORWARD_AUTH_CANNOT_KEEP"}

    at = "routes[0].fares.passes[0].limits"
    assert told(forward_auth=True, charge_on="success") == dict.fromkeys(
        [
            "routes[0].charge_on",
            *(f"{at}.{name}" for name in ("upload_bytes", "download_bytes", "upload_rate", "download_rate", "credits", "concurrency")),
        ],
        "FORWARD_AUTH_CANNOT_KEEP",
    )  # fmt: skip
    assert told(charge_on="success") == {}


def test_what_an_edge_has_to_do_by_itself_is_a_warning():
    catalog = read_catalog(
        route(
            forward_auth=True,
            timeout="5s",
            rewrite={"strip_prefix": "/v1", "set_headers": {"X-Plan": "{plan}"}},
        ),
        SANDBOX,
    )
    assert [(w.code, w.field) for w in catalog.warnings] == [
        ("FORWARD_AUTH_LEFT_TO_EDGE", "routes[0].timeout")
    ]
    assert "rewrite.strip_prefix" in catalog.warnings[0].message
    assert "set_headers" not in catalog.warnings[0].message


def test_a_free_route_is_no_route_without_a_fare():
    assert read_catalog(route(fares={"free": {}}), SANDBOX).warnings == ()
    assert [w.code for w in read_catalog(route(fares={}), SANDBOX).warnings] == ["ROUTE_WITHOUT_FARE"]
