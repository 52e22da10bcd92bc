"""Which route takes a call."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.domain.access import Condition, ConditionMode, FreeFare, GatewayCatalog, Match, Route, Upstream
from farebox.gateway.problems import Fault
from farebox.gateway.routing import RouteTable, choose
from tests.gateway.kit import open_house


def table(*matches: Match) -> RouteTable:
    routes = tuple(Route(f"r{n}", match, "u") for n, match in enumerate(matches))
    return RouteTable(
        GatewayCatalog(1, (Upstream("u", "http://u"),), routes), lambda path: path.startswith("/.farebox/")
    )


def taken(
    routes: RouteTable,
    path: str,
    method: str = "GET",
    host: str = "a",
    query: str = "",
    lines: list[tuple[bytes, bytes]] | None = None,
    **headers: str,
) -> tuple[str, dict[str, str]] | set[str]:
    found = routes.find(path.encode())
    said = [*(lines or ()), *((n.replace("_", "-").encode(), v.encode()) for n, v in headers.items())]
    chosen = choose(found, method, host, said, query.encode())
    if isinstance(chosen, frozenset):
        return set(chosen)
    if found.only is not None:
        assert (found.only, found.only_params) == chosen, "the short way and the long way disagree"
    return chosen[0].route.id, chosen[1]


@pytest.mark.parametrize(
    ("template", "path", "params"),
    [
        ("/", "/", {}),
        ("/", "/a", None),
        ("/weather", "/weather", {}),
        ("/weather", "/weather/", None),
        ("/weather/", "/weather/", {}),
        ("/weather/{city}", "/weather/paris", {"city": "paris"}),
        ("/weather/{city}", "/weather/", None),
        ("/weather/{city}", "/weather", None),
        ("/weather/{city}", "/weather/paris/now", None),
        ("/weather/{city}", "/weather/S%C3%A3o", {"city": "S%C3%A3o"}),
        ("/{a}/x/{b}", "/1/x/2", {"a": "1", "b": "2"}),
        ("/{*rest}", "/", {"rest": ""}),
        ("/{*rest}", "/a/b/c", {"rest": "a/b/c"}),
        ("/a/{*rest}", "/a/", {"rest": ""}),
        ("/a/{*rest}", "/a", None),
        ("/a/{b}/{*rest}", "/a/1/2/3", {"b": "1", "rest": "2/3"}),
        ("/Weather", "/weather", None),
    ],
)
def test_a_template_takes_what_it_says(template: str, path: str, params: dict[str, str] | None):
    assert taken(table(Match(template)), path) == (("r0", params) if params is not None else set())


def test_the_more_specific_wins_whatever_the_order():
    templates = [
        "/{*rest}",
        "/weather/{*rest}",
        "/weather/{city}",
        "/weather/paris",
        "/{area}/paris",
        "/weather/{city}/now",
    ]
    for routes in (table(*map(Match, templates)), table(*map(Match, reversed(templates)))):
        names = templates if routes.find(b"/x").ways[0][0].route.id == "r0" else templates[::-1]

        def winner(path: str, routes: RouteTable = routes, names: list[str] = names) -> str:
            chosen = taken(routes, path)
            assert isinstance(chosen, tuple)
            return names[int(chosen[0][1:])]

        assert winner("/weather/paris") == "/weather/paris"
        assert winner("/weather/rome") == "/weather/{city}"
        assert winner("/weather/rome/now") == "/weather/{city}/now"
        assert winner("/weather/rome/then") == "/weather/{*rest}"
        assert winner("/news/paris") == "/{area}/paris"
        assert winner("/news/rome") == "/{*rest}"


def test_the_order_breaks_ties():
    assert taken(table(Match("/{a}"), Match("/{b}")), "/x") == ("r0", {"a": "x"})


def test_a_route_that_names_methods_leaves_the_others_to_the_next():
    routes = table(Match("/a", ("post",)), Match("/{x}", ("GET",)))

    assert taken(routes, "/a", "POST") == ("r0", {})
    assert taken(routes, "/a", "GET") == ("r1", {"x": "a"})
    assert taken(routes, "/a", "HEAD") == ("r1", {"x": "a"}), "GET implies HEAD"
    assert taken(routes, "/a", "PUT") == {"POST", "GET", "HEAD"}
    assert taken(routes, "/a/b", "PUT") == set()


def test_hosts_are_exact_or_a_wildcard():
    routes = table(
        Match("/{*r}"),
        Match("/{*r}", hosts=("*.example.com",)),
        Match("/{*r}", hosts=("API.example.com", "[::1]")),
        Match("/{*r}", hosts=("*.b.example.com", "far.example.org")),
        Match("/{*r}", hosts=("api.example.com:9000", "*.example.com:9000")),
    )

    for host, route in [
        ("api.example.com", "r2"),
        ("api.example.com.", "r2"),
        ("api.example.com:8402", "r2"),
        ("api.example.com:9000", "r4"),
        ("[::1]:8402", "r2"),
        ("[::1]", "r2"),
        ("www.example.com", "r1"),
        ("www.example.com:9000", "r4"),
        ("a.b.example.com", "r3"),
        ("a.b.example.com:9000", "r3"),
        ("far.example.org.:80", "r3"),
        ("b.example.com", "r1"),
        ("example.com", "r0"),
        (".example.com", "r0"),
        ("evilexample.com", "r0"),
        ("example.com.evil", "r0"),
    ]:
        assert taken(routes, "/x", host=host) == (route, {"r": "x"}), host


def test_a_host_that_nobody_names_finds_no_route():
    routes = table(Match("/{*r}", hosts=("api.example.com",)), Match("/{*r}", ("POST",), ("other.example",)))

    assert taken(routes, "/x", host="a") == set()
    assert taken(routes, "/x", host="other.example") == {"POST"}


def test_a_hundred_hosts_ask_for_one_path_and_little_is_remembered():
    routes = table(*(Match("/{*r}", hosts=(f"h{n}.example",)) for n in range(100)))

    for n in range(100):
        assert taken(routes, "/x", host=f"h{n}.example") == (f"r{n}", {"r": "x"})
        assert taken(routes, "/x", host="x" * 200) == set()
    assert len(routes.find(b"/x").by_host) <= 16
    assert all(len(host) <= 64 for host in routes.known[b"/x"].by_host)


def header(name: str, mode: ConditionMode, value: str = "") -> Match:
    return Match("/{*r}", headers=(Condition(name, mode, value),))


def query(name: str, mode: ConditionMode, value: str = "") -> Match:
    return Match("/{*r}", query=(Condition(name, mode, value),))


EXACT = Condition("x-version", "exact", "2")


def test_header_conditions_are_all_met():
    routes = table(
        Match("/{*r}"),
        Match("/{*r}", headers=(EXACT,)),
        Match("/{*r}", headers=(EXACT, Condition("x-beta", "exact", "yes"))),
    )

    assert taken(routes, "/x") == ("r0", {"r": "x"})
    assert taken(routes, "/x", x_version="2") == ("r1", {"r": "x"})
    assert taken(routes, "/x", x_version="2", x_beta="yes") == ("r2", {"r": "x"})
    assert taken(routes, "/x", x_version="3", x_beta="yes") == ("r0", {"r": "x"})


@pytest.mark.parametrize(
    ("mode", "wanted", "takes", "leaves"),
    [
        ("exact", "v2", ["v2"], ["V2", "v2 ", "v", "v22", "", None]),
        ("prefix", "v2", ["v2", "v2.1"], ["av2", "V2", "v", "", None]),
        ("contains", "v2", ["v2", "av2b"], ["v-2", "V2", "", None]),
        ("not", "v2", ["v3", "V2", "v22", "", None], ["v2"]),
        ("exists", "", ["v2", ""], [None]),
        ("absent", "", [None], ["v2", ""]),
    ],
)
def test_a_condition_holds_for_what_it_says(
    mode: ConditionMode, wanted: str, takes: list[str | None], leaves: list[str | None]
):
    on_headers = table(Match("/{*r}"), header("x-v", mode, wanted))
    on_query = table(Match("/{*r}"), query("v", mode, wanted))

    for value, route in [*((v, "r1") for v in takes), *((v, "r0") for v in leaves)]:
        said = {} if value is None else {"x_v": value}
        assert taken(on_headers, "/x", **said) == (route, {"r": "x"}), value
        sent = "a=1" if value is None else f"a=1&v={value.replace(' ', '%20')}"
        assert taken(on_query, "/x", query=sent) == (route, {"r": "x"}), value


@pytest.mark.parametrize(
    ("sent", "route"),
    [
        ("", "r0"),
        ("format=pdf", "r1"),
        ("a&format=pdf&b=", "r1"),
        ("format=p%64f", "r1"),
        ("%66ormat=pdf", "r1"),
        ("format=p%2564f", "r0"),
        ("format=PDF", "r0"),
        ("format", "r0"),
        ("format=", "r0"),
        ("format=pdf=", "r0"),
        ("xformat=pdf", "r0"),
        ("format2=pdf", "r0"),
        ("a=format=pdf", "r0"),
        ("format=pdf&format=pdf", "r1"),
        ("&&format=pdf&", "r1"),
    ],
)
def test_a_query_is_split_at_ampersands_and_unescaped_once(sent: str, route: str):
    routes = table(Match("/{*r}"), query("format", "exact", "pdf"))
    assert taken(routes, "/x", query=sent) == (route, {"r": "x"})


@pytest.mark.parametrize(
    "sent",
    [
        "format=pdf&format=html",
        "format=html&format=pdf",
        "format=pdf&Format=html",
        "FORMAT=pdf",
        "format[]=pdf",
        "format%5B0%5D=pdf",
        "a=1;format=pdf",
        "format=pdf;a=1",
        "format=pdf%00",
        "%00format=pdf",
        "+format=pdf",
        "%20format=pdf",
        "a=%&format=pdf",
        "a=%zz",
        "format=%7",
        "&".join(["a=1"] * 501),
    ],
)
def test_a_query_that_two_readers_read_differently_is_refused(sent: str):
    for match in (query("format", "exact", "pdf"), query("format", "not", "pdf")):
        with pytest.raises(Fault, match=r"query") as caught:
            taken(table(Match("/{*r}"), match), "/x", query=sent)
        assert caught.value.code == "request_malformed"


def test_a_plus_is_refused_only_where_it_makes_a_difference():
    routes = table(Match("/{*r}"), query("q", "exact", "a b"), query("q", "exact", "a+b"))

    assert taken(routes, "/x", query="q=a%20b") == ("r1", {"r": "x"})
    assert taken(routes, "/x", query="q=a%2Bb") == ("r2", {"r": "x"})
    assert taken(routes, "/x", query="q=c+d&other=a+b") == ("r0", {"r": "x"})
    with pytest.raises(Fault):
        taken(routes, "/x", query="q=a+b")


def test_a_query_that_nobody_asks_about_may_look_as_it_likes():
    routes = table(Match("/{*r}"), Match("/q", query=(Condition("v", "exists"),)))

    assert taken(routes, "/x", query="a=%&v=1;v=2&V=3&%00") == ("r0", {"r": "x"})


@pytest.mark.parametrize(
    "lines",
    [
        [(b"x-version", b"2"), (b"x-version", b"3")],
        [(b"x-version", b"3"), (b"x-version", b"2")],
        [(b"x-version", b"2"), (b"x-version", b"2")],  # joined by a CGI-like upstream it is «2, 2»
        [(b"x_version", b"2")],
        [(b"x-version", b"2"), (b"x_version", b"3")],
        [(b"x-version", b"2"), (b"connection", b"close, X-Version")],
        [(b"connection", b"x_version"), (b"x-version", b"2")],
    ],
)
def test_a_header_that_two_readers_read_differently_is_refused(lines: list[tuple[bytes, bytes]]):
    for match in (header("x-version", "exact", "2"), header("x-version", "not", "2")):
        with pytest.raises(Fault, match="x-version") as caught:
            taken(table(Match("/{*r}"), match), "/x", lines=lines)
        assert caught.value.code == "request_malformed"


def test_several_lines_that_agree_in_every_reading_are_fine():
    routes = table(Match("/{*r}"), header("x-version", "prefix", "2"))

    assert taken(routes, "/x", lines=[(b"x-version", b"2a"), (b"x-version", b"2b")]) == ("r1", {"r": "x"})
    assert taken(routes, "/x", lines=[(b"x-version", b"3"), (b"x-version", b"4")]) == ("r0", {"r": "x"})


def test_a_doubt_does_not_matter_when_another_condition_fails():
    routes = table(Match("/{*r}"), Match("/{*r}", headers=(EXACT, Condition("x-beta", "exists"))))

    assert taken(routes, "/x", lines=[(b"x-version", b"2"), (b"x-version", b"3")]) == ("r0", {"r": "x"})


async def test_a_call_that_could_go_two_ways_reaches_nobody():
    paid, free = (
        Route("pdf", Match("/{*r}", query=(Condition("format", "exact", "pdf"),)), "up0"),
        Route("free", Match("/{*r}"), "up0", free=FreeFare()),
    )
    async with open_house(routes=[paid, free]) as house:
        assert (await house.get("/x?format=pdf")).status == 200
        assert house.door.calls[-1].route.id == "pdf"
        assert (await house.get("/x?format=html")).status == 200
        assert house.door.calls[-1].route.id == "free"

        for sent in ("format=html&format=pdf", "format=pdf%00", "a;format=pdf", "FORMAT=pdf"):
            refused = await house.get(f"/x?{sent}")
            assert (refused.status, refused.headers["connection"]) == (400, "close"), sent
        assert len(house.upstream.heard) == len(house.door.calls) == 2


# ── precedence ───────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTS = ("h.example", "*.example", "*.h.example", "h.example:81", "*.example:81")


@st.composite
def matches(draw: st.DrawFn) -> Match:
    segments = draw(st.lists(st.sampled_from(("a", "b", "{}")), min_size=1, max_size=3))
    path = "".join("/" + (f"{{p{n}}}" if s == "{}" else s) for n, s in enumerate(segments))
    if draw(st.booleans()):
        path += "/{*rest}"
    modes = st.sampled_from(get_args(ConditionMode))
    headers = draw(
        st.lists(st.builds(Condition, st.sampled_from(("x-a", "x-b")), modes, st.just("1")), max_size=2)
    )
    asked = draw(st.lists(st.builds(Condition, st.sampled_from(("q", "r")), modes, st.just("1")), max_size=2))
    return Match(
        path,
        tuple(draw(st.lists(st.sampled_from(("GET", "POST")), max_size=2, unique=True))),
        tuple(draw(st.lists(st.sampled_from(HOSTS), max_size=2, unique=True))),
        tuple(headers),
        tuple(asked),
    )


def kinds(template: str, path: str) -> tuple[int, ...] | None:
    """How specific a template is, segment by segment, when it takes the path: the plain reading of the rule."""
    wanted, given_ = template[1:].split("/"), path[1:].split("/")
    found: list[int] = []
    for n, segment in enumerate(wanted):
        if segment.startswith("{*"):
            return (*found, 2) if n < len(given_) else None
        if n >= len(given_) or (segment.startswith("{") and not given_[n]):
            return None
        if not segment.startswith("{") and segment != given_[n]:
            return None
        found.append(1 if segment.startswith("{") else 0)
    return tuple(found) if len(wanted) == len(given_) else None


def host_rank(pattern: str, host: str) -> tuple[int, int, int] | None:
    name, _, port = pattern.partition(":")
    bare, _, sent = host.partition(":")
    if port and port != sent:
        return None
    if name.startswith("*."):
        return (1, -len(name), not port) if bare.endswith(name[1:]) and bare != name[1:] else None
    return (0, 0, not port) if name == bare else None


def holds(condition: Condition, said: dict[str, str]) -> bool:
    value = said.get(condition.name)
    if condition.mode in ("exists", "absent"):
        return (value is not None) is (condition.mode == "exists")
    if value is None or condition.mode == "not":
        return condition.mode == "not" and value != condition.value
    if condition.mode == "exact":
        return value == condition.value
    return value.startswith(condition.value) if condition.mode == "prefix" else condition.value in value


@given(
    st.lists(matches(), min_size=1, max_size=6),
    st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=4),
    st.sampled_from(("GET", "HEAD", "POST", "PUT")),
    st.sampled_from(("h.example", "x.h.example", "h.example:81", "other", "y.example:81")),
    st.dictionaries(st.sampled_from(("x-a", "x-b")), st.sampled_from(("1", "21", "12", ""))),
    st.dictionaries(st.sampled_from(("q", "r")), st.sampled_from(("1", "21", "12", ""))),
)
def test_the_first_in_the_written_order_takes_the_call(
    asked: list[Match],
    segments: list[str],
    method: str,
    host: str,
    headers: dict[str, str],
    said: dict[str, str],
):
    path = "/" + "/".join(segments)
    ranked: list[tuple[object, int]] = []
    for order, match in enumerate(asked):
        specific = kinds(match.path, path)
        hosts = [rank for h in match.hosts if (rank := host_rank(h, host)) is not None]
        methods = {*match.methods, *(("HEAD",) if "GET" in match.methods else ())}
        if (
            specific is not None
            and (hosts or not match.hosts)
            and (not methods or method in methods)
            and all(holds(c, headers) for c in match.headers)
            and all(holds(c, said) for c in match.query)
        ):
            best = min(hosts) if hosts else (2, 0, 0)
            conditions = len(match.headers) + len(match.query)
            ranked.append(((specific, best, -conditions, not methods, order), order))
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    query_ = "&".join(f"{name}={value}" for name, value in said.items())

    chosen = taken(table(*asked), path, method, host, query_, lines)

    if ranked:
        assert isinstance(chosen, tuple)
        assert chosen[0] == f"r{min(ranked)[1]}"
    else:
        assert isinstance(chosen, set)


def test_the_tables_own_order_is_the_written_one_in_small():
    by_rank = [
        Match("/a/{*r}", hosts=("h.example:81",)),
        Match("/a/{*r}", hosts=("h.example",)),
        Match("/a/{*r}", hosts=("*.h.example",)),
        Match("/a/{*r}", hosts=("*.example",), headers=(EXACT,)),
        Match("/a/{*r}", hosts=("*.example",)),
        Match("/a/{*r}", headers=(EXACT,), query=(Condition("q", "exists"),)),
        Match("/a/{*r}", headers=(EXACT,)),
        Match("/a/{*r}", ("GET",)),
        Match("/a/{*r}"),
        Match("/{*r}", hosts=("h.example:81",), headers=(EXACT,)),
    ]
    for shift in range(len(by_rank)):
        order = [*range(shift, len(by_rank)), *range(shift)]
        ways = table(*(by_rank[n] for n in order)).find(b"/a/x").ways
        assert [order[int(way.route.id[1:])] for way, _ in ways] == list(range(len(by_rank)))


def test_our_own_pages_are_known_by_their_path():
    assert table().find(b"/.farebox/quotes").ours
    assert not table().find(b"/x").ours


def test_the_memory_of_paths_is_bounded():
    routes = table(Match("/{*r}"))
    for n in range(20_000):
        routes.find(b"/%d" % n)
    routes.find(b"/" + b"x" * 1000)

    assert len(routes.known) <= 4096
    assert all(len(path) <= 256 for path in routes.known)
