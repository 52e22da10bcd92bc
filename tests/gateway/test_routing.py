"""Which route takes a call."""

from __future__ import annotations

import pytest

from farebox.domain.access import GatewayCatalog, Match, Route, Upstream
from farebox.gateway.routing import RouteTable, choose


def table(*matches: Match) -> RouteTable:
    routes = tuple(Route(f"r{n}", match, "u") for n, match in enumerate(matches))
    return RouteTable(
        GatewayCatalog(1, (Upstream("u", "http://u"),), routes), lambda path: path.startswith("/.farebox/")
    )


def taken(
    routes: RouteTable, path: str, method: str = "GET", host: str = "a", **headers: str
) -> tuple[str, dict[str, str]] | set[str]:
    found = routes.find(path.encode())
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    chosen = choose(found, method, host, lines)
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
    )

    for host, route in [
        ("api.example.com", "r2"),
        ("api.example.com:8402", "r2"),
        ("[::1]:8402", "r2"),
        ("[::1]", "r2"),
        ("www.example.com", "r1"),
        ("a.b.example.com", "r1"),
        ("example.com", "r0"),
        ("evilexample.com", "r0"),
    ]:
        assert taken(routes, "/x", host=host) == (route, {"r": "x"}), host


def test_header_conditions_are_all_met():
    routes = table(
        Match("/{*r}"),
        Match("/{*r}", headers=(("X-Version", "2"),)),
        Match("/{*r}", headers=(("X-Version", "2"), ("X-Beta", "yes"))),
    )

    assert taken(routes, "/x") == ("r0", {"r": "x"})
    assert taken(routes, "/x", x_version="2") == ("r1", {"r": "x"})
    assert taken(routes, "/x", x_version="2", x_beta="yes") == ("r2", {"r": "x"})
    assert taken(routes, "/x", x_version="3", x_beta="yes") == ("r0", {"r": "x"})


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
