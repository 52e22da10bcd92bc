"""Which route takes a call: templates compiled into a tree, the more specific one first, the catalog's order on ties.

A template's segments are literal, ``{name}`` (one non-empty segment) or, last, ``{*rest}`` (whatever is left, also
nothing). Among the routes whose template takes a path, the first of this order takes the call, if it takes the rest of it:

1. the path, segment by segment: literal before name before rest;
2. the host: a name before a wildcard, a longer wildcard before a shorter one, with a port before without, any host last;
3. more conditions (headers and query together) before fewer (conditions.py);
4. named methods before any;
5. the order of the catalog.

A path is matched as it stands, and upstreams forgive more than that: escapes (``/p%61id``), path parameters (``/paid;x``), upper
and lower case, a last slash. Where a path read so would come to a route whose template is nearer to it, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes

from farebox.app.admission import Headers
from farebox.base.errors import refuse
from farebox.domain.access import GatewayCatalog, Route
from farebox.gateway.conditions import (
    Asked,
    Reading,
    headers_meet,
    on_header,
    on_query,
    query_meets,
    read_query,
)
from farebox.gateway.fields import canonical
from farebox.gateway.problems import Fault
from farebox.gateway.rewriting import AnswerRewriting, TargetRewrite
from farebox.gateway.targets import check_path

_NAME: Final = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_]*)\}\Z")
_PATHS_KEPT_MAX: Final = 4096
_PATH_KEPT_BYTES_MAX: Final = 256
_HOSTS_KEPT_MAX: Final = 16
_HOST_KEPT_BYTES_MAX: Final = 64
_FORGIVEN: Final = re.compile(r"[%;A-Z]|/\Z")

#: A way and the values of its template's parameters, as they stand in the path.
Taken = tuple["Way", dict[str, str]]


@dataclass(frozen=True, slots=True)
class HostPattern:
    """One host that a route names. ``name`` is lower case and, of a wildcard, begins with the dot; ``port`` empty: any."""

    name: str
    wildcard: bool
    port: str

    def takes(self, name: str, port: str) -> bool:
        if self.port and self.port != port:
            return False
        if self.wildcard:
            return name.endswith(self.name) and len(name) > len(self.name)
        return name == self.name

    @property
    def rank(self) -> tuple[int, int, int]:
        return (1 if self.wildcard else 0, -len(self.name) if self.wildcard else 0, 0 if self.port else 1)


_ANY_HOST: Final = (2, 0, 0)


@dataclass(slots=True)
class Way:
    """One route made ready, for one of the hosts that it names: what is asked of each call that its path template takes,
    and what is changed on its way up and down.

    ``rewrites_request``: path, query or Host change; ``rewrites_answer``: the head of the answer does. ``our_names`` are
    the canonical names of the headers that the route sets or removes: a client's are dropped.
    """

    route: Route
    order: int
    methods: frozenset[str]  # empty: any
    host: HostPattern | None
    on_headers: tuple[Asked, ...]
    on_query: tuple[Asked, ...]
    our_names: frozenset[bytes]
    rewrites_request: bool
    rewrites_answer: bool
    keeps_host: bool
    _target: TargetRewrite
    _answer: AnswerRewriting
    shape: tuple[int, ...]  # of its template, a segment each: 0 literal, 1 name, 2 rest
    conditional: bool = False
    unconditional: bool = False

    def meets(self, headers: Headers, query: Sequence[Reading]) -> bool:
        """The conditions. Raises ``Fault`` for a call that can be read in two ways."""
        return headers_meet(self.on_headers, headers) and query_meets(self.on_query, query)

    def target(self, target: bytes, path: bytes, params: dict[str, str]) -> tuple[bytes, bytes]:
        """The target as the upstream gets it (without its own base path), and the prefix taken off it."""
        return self._target.target(target, path, params)

    def rewrite_answer(self, lines: Sequence[bytes]) -> list[bytes]:
        """The header lines of the upstream's answer as the client gets them."""
        return self._answer.head(lines)

    def strip_answer(self, lines: Sequence[bytes]) -> list[bytes]:
        """Of an interim answer: without what is removed or set."""
        return self._answer.without(lines)

    @property
    def answer_names(self) -> frozenset[bytes]:
        """Canonical names of the answer's headers that the route sets or removes."""
        return self._answer.names

    def rewrite_fields(self, fields: Headers) -> Headers:
        """As ``rewrite_answer``, of fields: for an answer that is kept."""
        return self._answer.fields(fields)

    @property
    def rank(self) -> tuple[tuple[int, int, int], int, int, int]:
        host = self.host.rank if self.host is not None else _ANY_HOST
        return (
            host,
            -len(self.on_headers) - len(self.on_query),
            0 if self.methods else 1,
            self.order,
        )


@dataclass(slots=True)
class Found:
    """What is known of one path: it is clean, who may take it, and whether it is one of our own pages."""

    path: str
    ours: bool
    ways: tuple[Taken, ...]
    only: Way | None = None  # the first way, when it takes every call
    only_params: dict[str, str] = field(default_factory=dict)
    names_hosts: bool = False
    forgiving: tuple[Taken, ...] = ()  # who else may take it at an upstream that forgives more than we do
    by_host: dict[str, tuple[Taken, ...]] = field(default_factory=dict)

    def at(self, host: str) -> tuple[Taken, ...]:
        """Those of the ways that take this host (lower case, perhaps with a port)."""
        if not self.names_hosts:
            return self.ways
        ways = self.by_host.get(host)
        if ways is None:
            name, port = _host_and_port(host)
            ways = tuple(
                taken for taken in self.ways if taken[0].host is None or taken[0].host.takes(name, port)
            )
            if len(host) <= _HOST_KEPT_BYTES_MAX:
                if len(self.by_host) >= _HOSTS_KEPT_MAX:
                    self.by_host.clear()
                self.by_host[host] = ways
        return ways


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
        self._forgiving = _Node()  # the same templates as a forgiving upstream reads them
        self._forgives = False  # they are not spelled as it reads them
        for order, route in enumerate(catalog.routes):
            self._add(tuple(_ways(route, order)), route)
        _sort(self._root)
        _sort(self._forgiving)

    def find(self, path: bytes) -> Found:
        """Check a path (``Fault``) and find who may take it. Callers look into ``known`` first."""
        check_path(path)
        text = path.decode("ascii")
        ways: list[Taken] = []
        self._collect(self._root, text[1:].split("/"), 0, (), ways)
        found = Found(text, self._owns(text), tuple(ways))
        found.names_hosts = any(way.host is not None for way, _ in ways)
        if ways and (self._forgives or _FORGIVEN.search(text)):
            found.forgiving = self._read_forgivingly(text, ways)
        if ways and ways[0][0].unconditional and not found.forgiving:
            found.only, found.only_params = ways[0]
        if len(path) <= _PATH_KEPT_BYTES_MAX:
            if len(self.known) >= _PATHS_KEPT_MAX:
                self.known.clear()
            self.known[path] = found
        return found

    def _read_forgivingly(self, text: str, here: list[Taken]) -> tuple[Taken, ...]:
        ways: list[Taken] = []
        self._collect(self._forgiving, _forgiven(text[1:].split("/")), 0, (), ways)
        known = {id(way) for way, _ in here}
        return tuple(taken for taken in ways if id(taken[0]) not in known)

    def _add(self, ways: tuple[Way, ...], route: Route) -> None:
        template = route.match.path
        if not template.startswith("/"):
            raise _bad(route, f"{template!r} does not begin with a slash")
        segments = template[1:].split("/")
        self._place(self._root, segments, ways, route)
        forgiven = _forgiven(segments)
        self._forgives |= forgiven != segments
        self._place(self._forgiving, forgiven, ways, route)

    def _place(self, node: _Node, segments: list[str], ways: tuple[Way, ...], route: Route) -> None:
        names: list[str] = []
        for position, segment in enumerate(segments):
            named = _NAME.match(segment)
            if named is None:
                if "{" in segment or "}" in segment:
                    raise _bad(route, f"{segment!r}: a name takes a whole segment, as in /weather/{{city}}")
                node = node.literals.setdefault(segment, _Node())
                continue
            names.append(named[2])
            if named[1]:
                if position != len(segments) - 1:
                    raise _bad(route, f"{segment!r} must be the last segment")
                _insert(node.rests, ways, names)
                return
            if node.names is None:
                node.names = _Node()
            node = node.names
        _insert(node.ends, ways, names)

    def _collect(
        self,
        node: _Node,
        segments: list[str],
        at: int,
        values: tuple[str, ...],
        into: list[Taken],
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


def choose(found: Found, method: str, host: str, headers: Headers, query: bytes) -> Taken | frozenset[str]:
    """The way that takes this call; else the methods that would have been taken (empty: the path is unknown here).

    Raises ``Fault`` for a call that one reader would give to this route and another reader to that one.
    """
    allowed: set[str] = set()
    readings: list[Reading] = []
    for taken in found.at(host):
        way = taken[0]
        if way.conditional:
            if way.on_query and not readings:
                readings = read_query(query)
            if not way.meets(headers, readings):
                continue
        if not way.methods or method in way.methods:
            if found.forgiving:
                _check_forgiving(found, way, method, host, headers, query)
            return taken
        allowed |= way.methods
    return frozenset(allowed)


def _check_forgiving(found: Found, way: Way, method: str, host: str, headers: Headers, query: bytes) -> None:
    """Raises ``Fault`` when a forgiving upstream would take the call for one of a route nearer to its path. Where that is a
    matter of case or of a last slash alone, only when the call would cost something else there."""
    name, port = _host_and_port(host)
    for other, _ in found.forgiving:
        if (
            not _nearer(other.shape, way.shape)
            or (other.methods and method not in other.methods)
            or (other.host is not None and not other.host.takes(name, port))
            or (other.conditional and not other.meets(headers, read_query(query) if other.on_query else []))
        ):
            continue
        if "%" in found.path or ";" in found.path or _terms(other.route) != _terms(way.route):
            raise Fault(
                "request_malformed",
                "The path leads to another route when it is read with its escapes undone, without parameters («;x») or a last "
                "slash, or in lower case: write it as that route does.",
            )
        return


def _nearer(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a template is the more specific one where the two first differ in kind."""
    return next((a < b for a, b in zip(one, other, strict=False) if a != b), False)


def _terms(route: Route) -> tuple[object, ...]:
    """What a call of the route costs."""
    return route.exact, route.passes, route.account, route.free, route.metric, route.charge_on


def _forgiven(segments: Sequence[str]) -> list[str]:
    """A path's or template's segments as the most forgiving upstream reads them."""
    read = [segment if _NAME.match(segment) else _forgiven_one(segment) for segment in segments]
    return read[:-1] if len(read) > 1 and not read[-1] else read


def _forgiven_one(segment: str) -> str:
    if "%" in segment:  # twice, as careless servers do
        segment = unquote_to_bytes(unquote_to_bytes(segment)).decode("latin-1")
    return segment.partition(";")[0].lower()


def _ways(route: Route, order: int) -> Iterator[Way]:
    match, rewrite = route.match, route.rewrite
    methods = {m.upper() for m in match.methods}
    if "GET" in methods:
        methods.add("HEAD")
    dropped = (*(name for name, _ in rewrite.set_headers), *rewrite.remove_headers)
    on_headers = tuple(map(on_header, match.headers))
    asked = tuple(map(on_query, match.query))
    answer = AnswerRewriting(rewrite.answer)
    moves = rewrite.strip_prefix.rstrip("/") or rewrite.add_prefix.rstrip("/") or rewrite.set_path
    changes = moves or rewrite.set_query or rewrite.remove_query or rewrite.host == "original"
    target = TargetRewrite(rewrite)
    named = [_NAME.match(segment) for segment in match.path[1:].split("/")]
    shape = tuple(0 if found is None else 2 if found[1] else 1 for found in named)
    hosts: Sequence[HostPattern | None] = [_host_pattern(h) for h in dict.fromkeys(match.hosts)] or [None]
    for host in hosts:
        way = Way(
            route=route,
            order=order,
            methods=frozenset(methods),
            host=host,
            on_headers=on_headers,
            on_query=asked,
            our_names=frozenset(canonical(name.lower().encode()) for name in dropped),
            rewrites_request=bool(changes),
            rewrites_answer=bool(answer.names),
            keeps_host=rewrite.host == "original",
            _target=target,
            _answer=answer,
            shape=shape,
            conditional=bool(on_headers or asked),
        )
        way.unconditional = not (way.methods or way.host or way.conditional)
        yield way


def _host_pattern(host: str) -> HostPattern:
    name, port = _host_and_port(host.lower())
    wildcard = name.startswith("*.")
    return HostPattern(name[1:] if wildcard else name, wildcard, port)


def _host_and_port(host: str) -> tuple[str, str]:
    """A name's closing dot (the root of DNS) makes it no other name."""
    if ":" not in host or host.endswith("]"):
        return host.removesuffix("."), ""
    name, _, port = host.rpartition(":")
    return name.removesuffix("."), port


def _insert(into: list[tuple[Way, tuple[str, ...]]], ways: tuple[Way, ...], names: list[str]) -> None:
    route = ways[0].route
    if len(set(names)) != len(names):
        raise _bad(route, "a name occurs twice")
    _check(route, names)
    into.extend((way, tuple(names)) for way in ways)


def _check(route: Route, names: Sequence[str]) -> None:
    """What the catalog's reader holds too: that no call comes out of here on a path that would be refused on its way in."""
    for template in (
        route.match.path,
        route.rewrite.set_path,
        route.rewrite.strip_prefix,
        route.rewrite.add_prefix,
    ):
        if not template:
            continue
        literal = "/".join("x" if _NAME.match(segment) else segment for segment in template.split("/"))
        if not template.startswith("/") or "{" in literal or "}" in literal:
            raise _bad(route, f"{template!r} does not begin with a slash, or a name takes no whole segment")
        try:
            check_path(literal.encode())
        except Fault as fault:
            raise _bad(route, f"{template!r}: {fault.detail}") from None
    parameters = {segment for segment in route.match.path.split("/") if _NAME.match(segment)}
    for segment in route.rewrite.set_path.split("/"):
        if _NAME.match(segment) and segment not in parameters:
            raise _bad(route, f"{segment!r} of set_path is not in the path that is matched")
    for _, value in route.rewrite.set_query:
        for variable in re.findall(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", value):
            if variable not in names:
                raise _bad(route, f"{{{variable}}} of set_query is not in the path that is matched")


def _sort(node: _Node) -> None:
    """Once, when all are there: thousands of routes may share one template."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        node.ends.sort(key=lambda entry: entry[0].rank)
        node.rests.sort(key=lambda entry: entry[0].rank)
        waiting.extend(node.literals.values())
        if node.names is not None:
            waiting.append(node.names)


def _bad(route: Route, why: str) -> Exception:
    return refuse("ROUTE_TEMPLATE_MALFORMED", f"route {route.id}: {why}", "match.path")
