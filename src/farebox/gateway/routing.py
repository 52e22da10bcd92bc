"""Which route takes a call: templates compiled into a tree, the more specific one first, the catalog's order on ties.

A template's segments are literal, ``{name}`` (one non-empty segment) or, last, ``{*rest}`` (whatever is left, also
nothing). Specificity is decided segment by segment: literal before name before rest; between equal paths a route that
names a host goes before one that does not, then more header conditions, then named methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from farebox.app.admission import Headers
from farebox.base.errors import refuse
from farebox.domain.access import GatewayCatalog, Route
from farebox.gateway.fields import canonical
from farebox.gateway.targets import check_path

_NAME: Final = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_]*)\}\Z")
_PATHS_KEPT_MAX: Final = 4096
_PATH_KEPT_BYTES_MAX: Final = 256


@dataclass(slots=True)
class Way:
    """One route made ready: what is asked of each call that its path template takes."""

    route: Route
    order: int
    methods: frozenset[str]  # empty: any
    hosts: frozenset[str]  # exact, lower case, without port
    host_suffixes: tuple[str, ...]  # of wildcards: «.example.com»
    conditions: tuple[tuple[bytes, bytes], ...]
    strip_prefix: bytes
    our_names: frozenset[bytes]  # canonical names that the route sets: a client's are dropped
    unconditional: bool = False

    def takes(self, method: str, host: str, headers: Headers) -> bool:
        """Everything but the path and the method's list; the method is asked by ``Ways.choose``."""
        if self.hosts or self.host_suffixes:
            name = host.rpartition(":")[0] if host[-1] != "]" and ":" in host else host
            if name not in self.hosts and not name.endswith(self.host_suffixes or ("\0",)):
                return False
        return all(condition in headers for condition in self.conditions)

    @property
    def rank(self) -> tuple[int, int, int, int]:
        host = 0 if self.hosts else 1 if self.host_suffixes else 2
        return (host, -len(self.conditions), 0 if self.methods else 1, self.order)


@dataclass(slots=True)
class Found:
    """What is known of one path: it is clean, who may take it, and whether it is one of our own pages."""

    path: str
    ours: bool
    ways: tuple[tuple[Way, dict[str, str]], ...]
    only: Way | None = None  # the first way, when it takes every call
    only_params: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    literals: dict[str, _Node] = field(default_factory=dict)
    names: _Node | None = None
    ends: list[tuple[Way, tuple[str, ...]]] = field(default_factory=list)
    rests: list[tuple[Way, tuple[str, ...]]] = field(default_factory=list)


class RouteTable:
    """All routes of one catalog. Immutable but for its memory of recent paths."""

    def __init__(self, catalog: GatewayCatalog, owns: Callable[[str], bool]) -> None:
        self.known: dict[bytes, Found] = {}
        self.version = catalog.version
        self._owns = owns
        self._root = _Node()
        for order, route in enumerate(catalog.routes):
            self._add(_way(route, order), route.match.path)

    def find(self, path: bytes) -> Found:
        """Check a path (``Fault``) and find who may take it. Callers look into ``known`` first."""
        check_path(path)
        text = path.decode("ascii")
        ways: list[tuple[Way, dict[str, str]]] = []
        self._collect(self._root, text[1:].split("/"), 0, (), ways)
        found = Found(text, self._owns(text), tuple(ways))
        if ways and ways[0][0].unconditional:
            found.only, found.only_params = ways[0]
        if len(path) <= _PATH_KEPT_BYTES_MAX:
            if len(self.known) >= _PATHS_KEPT_MAX:
                self.known.clear()
            self.known[path] = found
        return found

    def _add(self, way: Way, template: str) -> None:
        node, names = self._root, []
        if not template.startswith("/"):
            raise _bad(way.route, f"{template!r} does not begin with a slash")
        segments = template[1:].split("/")
        for position, segment in enumerate(segments):
            named = _NAME.match(segment)
            if named is None:
                if "{" in segment or "}" in segment:
                    raise _bad(
                        way.route, f"{segment!r}: a name takes a whole segment, as in /weather/{{city}}"
                    )
                node = node.literals.setdefault(segment, _Node())
                continue
            names.append(named[2])
            if named[1]:
                if position != len(segments) - 1:
                    raise _bad(way.route, f"{segment!r} must be the last segment")
                _insert(node.rests, way, names)
                return
            if node.names is None:
                node.names = _Node()
            node = node.names
        _insert(node.ends, way, names)

    def _collect(
        self,
        node: _Node,
        segments: list[str],
        at: int,
        values: tuple[str, ...],
        into: list[tuple[Way, dict[str, str]]],
    ) -> None:
        if at == len(segments):
            into.extend((way, dict(zip(names, values, strict=True))) for way, names in node.ends)
            return
        segment = segments[at]
        literal = node.literals.get(segment)
        if literal is not None:
            self._collect(literal, segments, at + 1, values, into)
        if node.names is not None and segment:
            self._collect(node.names, segments, at + 1, (*values, segment), into)
        if node.rests:
            rest = (*values, "/".join(segments[at:]))
            into.extend((way, dict(zip(names, rest, strict=True))) for way, names in node.rests)


def choose(
    found: Found, method: str, host: str, headers: Headers
) -> tuple[Way, dict[str, str]] | frozenset[str]:
    """The way that takes this call; else the methods that would have been taken (empty: the path is unknown here)."""
    allowed: set[str] = set()
    for way, params in found.ways:
        if not way.takes(method, host, headers):
            continue
        if not way.methods or method in way.methods:
            return way, params
        allowed |= way.methods
    return frozenset(allowed)


def _way(route: Route, order: int) -> Way:
    match = route.match
    methods = {m.upper() for m in match.methods}
    if "GET" in methods:
        methods.add("HEAD")
    hosts = [h.lower() for h in match.hosts]
    way = Way(
        route=route,
        order=order,
        methods=frozenset(methods),
        hosts=frozenset(h for h in hosts if not h.startswith("*.")),
        host_suffixes=tuple(h[1:] for h in hosts if h.startswith("*.")),
        conditions=tuple((name.lower().encode(), value.encode()) for name, value in match.headers),
        strip_prefix=route.rewrite.strip_prefix.rstrip("/").encode(),
        our_names=frozenset(canonical(name.lower().encode()) for name, _ in route.rewrite.set_headers),
    )
    way.unconditional = not (way.methods or way.hosts or way.host_suffixes or way.conditions)
    return way


def _insert(into: list[tuple[Way, tuple[str, ...]]], way: Way, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise _bad(way.route, "a name occurs twice")
    into.append((way, tuple(names)))
    into.sort(key=lambda entry: entry[0].rank)


def _bad(route: Route, why: str) -> Exception:
    return refuse("ROUTE_TEMPLATE_MALFORMED", f"route {route.id}: {why}", "match.path")
