"""The shapes of farebox.yaml that say which calls a route takes and what changes on their way.

The reference, with precedence and what is refused: docs/routing.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from farebox.app.documents.faults import Document, fault
from farebox.app.documents.upstreams import path
from farebox.base.errors import Reason
from farebox.domain.access import AnswerRewrite, Condition, ConditionMode, Match, Rewrite
from farebox.domain.paths import ambiguity

CONDITIONS_MAX: Final = 20
HOSTS_MAX: Final = 100
METHODS_MAX: Final = 20
#: Headers or query keys that one rewrite sets or removes.
REWRITES_MAX: Final = 50

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}\Z", re.ASCII)
_HEADER_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]{0,4000}\Z")
_METHOD = re.compile(r"[A-Za-z]{1,20}\Z", re.ASCII)
_HOST = re.compile(
    r"((\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]{0,249}[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]{2,45}\])(:(?P<port>[0-9]{1,5}))?\Z",
    re.ASCII,
)
_PARAMETER = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_]{0,63})\}\Z", re.ASCII)
_SEGMENT = re.compile(r"([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*\Z", re.ASCII)
_VARIABLE = re.compile(r"\{([^{}]*)\}")
_CONDITION_VALUE = re.compile(r"[\x20-\x7e]{1,1000}\Z")
_QUERY_NAME = re.compile(r"[A-Za-z0-9._~!$'()*,:@/-]{1,200}\Z", re.ASCII)
_QUERY_VALUE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,2000}\Z")
VARIABLES: Final = frozenset({"customer", "plan", "pass", "payer", "route", "request_id"})
#: Headers that frame the message or name the hop.
_FRAMING: Final = frozenset({
    "connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "te", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
#: Headers towards the upstream that are Farebox's own to write, beside ``farebox-*`` and ``x-forwarded-*``.
_OURS_UP: Final = _FRAMING | {"forwarded", "payment-signature", "x-payment"}
#: Headers towards the client that are Farebox's own to write, beside ``farebox-*`` and ``ratelimit-*``.
_OURS_DOWN: Final = _FRAMING | {"payment-required", "payment-response", "x-payment-response"}
#: Headers that do not go on to the upstream as they came: what was matched on them would not be what is forwarded.
_NOT_FORWARDED: Final = _OURS_UP | {
    "authorization", "proxy-authenticate", "proxy-authentication-info", "proxy-authorization", "proxy-connection", "x-api-key",
    "x-real-ip", "x-original-url", "x-original-uri", "x-rewrite-url",
}  # fmt: skip


def canonical(name: str) -> str:
    """A header's name as a CGI-like upstream sees it: ``X_Plan`` and ``x-plan`` are one."""
    return name.lower().replace("_", "-")


# ── which calls ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_literal(segment: str, last: bool) -> None:
    """A plain segment, such as every reader down the road reads in the same way: calls with others are refused."""
    if not _SEGMENT.match(segment):
        raise fault(
            "PATH_MALFORMED",
            f"{segment[:80]!r} is not a path segment: write text, {{name}} or {{*rest}}",
        )
    if not segment and not last:
        raise fault("PATH_MALFORMED", "an empty segment never matches: calls with // are refused")
    if (found := ambiguity(f"/{segment}".encode())) is not None:
        raise fault("PATH_MALFORMED", f"{segment[:80]!r} never matches: {found[:1].lower()}{found[1:]}")


def _template(template: str) -> str:
    """A path template: plain segments, ``{name}`` for one segment, ``{*name}`` for the rest (last only)."""
    path(template)
    segments, seen = template[1:].split("/"), set()
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        parameter = _PARAMETER.match(segment)
        if parameter is None:
            _check_literal(segment, last)
            continue
        if parameter[1] and not last:
            raise fault(
                "PATH_MALFORMED", f"{segment} takes the rest of the path: only the last segment may do that"
            )
        if parameter[2] in seen:
            raise fault("PATH_MALFORMED", f"{{{parameter[2]}}} appears twice: give each its own name")
        seen.add(parameter[2])
    return template


def _methods(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _method(value: str) -> str:
    if not _METHOD.match(value):
        raise fault("METHOD_MALFORMED", f"{value[:40]!r} is not a method such as GET")
    return value.upper()


#: HTTP methods, in upper case; one may stand alone.
Methods = Annotated[
    tuple[Annotated[str, AfterValidator(_method)], ...],
    BeforeValidator(_methods),
    Field(max_length=METHODS_MAX),
]


def _host(value: str) -> str:
    found = _HOST.match(value)
    if not found or ".." in value or (found["port"] and not 0 < int(found["port"]) <= 65535):
        raise fault(
            "HOST_MALFORMED",
            f"{value[:80]!r} is not a host name: write it like api.example.com, *.example.com or api.example.com:8402",
        )
    return value.lower()


Asked = tuple[ConditionMode, str]


def _asked(value: Any) -> Asked:
    """``"2"``, ``{exists: true}``, ``{prefix: v2.}``, ``{contains: beta}``, ``{not: v1}``."""
    if isinstance(value, str):
        return "exact", _comparable(value)
    if (
        not isinstance(value, Mapping)
        or len(value) != 1
        or set(value) - {"exists", "prefix", "contains", "not"}
    ):
        raise fault(
            "CONDITION_MALFORMED",
            f"{str(value)[:60]!r} is not a condition: write text, or one of {{exists: true}}, {{prefix: …}}, {{contains: …}}, {{not: …}}",
        )
    ((mode, wanted),) = value.items()
    if mode == "exists":
        if not isinstance(wanted, bool):
            raise fault("CONDITION_MALFORMED", "exists is true or false, without quotes")
        return ("exists" if wanted else "absent"), ""
    if not isinstance(wanted, str):
        raise fault("CONDITION_MALFORMED", f"{str(wanted)[:60]!r} is not text: write it in quotes")
    return cast(ConditionMode, mode), _comparable(wanted)


def _comparable(value: str) -> str:
    if not _CONDITION_VALUE.match(value):
        raise fault(
            "CONDITION_MALFORMED",
            f"{value[:60]!r} cannot be compared: write 1 to 1000 visible ASCII characters",
        )
    return value


_ASKED_SCHEMA: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": 1000},
            {
                "type": "object",
                "properties": {
                    "exists": {"type": "boolean"},
                    "prefix": {"type": "string"},
                    "contains": {"type": "string"},
                    "not": {"type": "string"},
                },
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
            },
        ]
    }
)
Conditions = Annotated[
    dict[str, Annotated[Asked, BeforeValidator(_asked), _ASKED_SCHEMA]], Field(max_length=CONDITIONS_MAX)
]


def _on_headers(asked: dict[str, Asked]) -> dict[str, Asked]:
    for name, (mode, value) in asked.items():
        if not _HEADER_NAME.match(name):
            raise fault("HEADER_MALFORMED", f"{name[:60]!r} is not a header name")
        plain = canonical(name)
        if plain in _NOT_FORWARDED or plain.startswith(("farebox-", "x-forwarded-")):
            remedy = "use hosts" if plain == "host" else "choose another one"
            raise fault("HEADER_RESERVED", f"{name} does not go on to the upstream as it came: {remedy}")
        if mode != "contains" and value != value.strip(" "):
            raise fault("CONDITION_MALFORMED", f"{name}: header values begin and end without blanks")
    _check_once(asked)
    return asked


def _on_query(asked: dict[str, Asked]) -> dict[str, Asked]:
    for name in asked:
        if not _QUERY_NAME.match(name):
            raise fault(
                "CONDITION_MALFORMED",
                f"{name[:60]!r} is not a name in a query: use letters, digits and - . _ ~ ! $ ' ( ) * , : @ /",
            )
    if len({name.lower() for name in asked}) < len(asked):
        raise fault("CONDITION_MALFORMED", "a name of the query is there in two spellings: write it once")
    return asked


class MatchDocument(Document):
    """Which calls a route takes. Empty lists mean any."""

    path: Annotated[str, StringConstraints(strict=True, max_length=2000), AfterValidator(_template)]
    methods: Methods = ()
    hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_host)], ...],
        BeforeValidator(_methods),
        Field(max_length=HOSTS_MAX),
    ] = ()
    headers: Annotated[Conditions, AfterValidator(_on_headers)] = Field(default_factory=dict)
    query: Annotated[Conditions, AfterValidator(_on_query)] = Field(default_factory=dict)

    def value(self) -> Match:
        return Match(
            self.path,
            self.methods,
            self.hosts,
            tuple(Condition(name.lower(), mode, value) for name, (mode, value) in self.headers.items()),
            tuple(Condition(name, mode, value) for name, (mode, value) in self.query.items()),
        )


# ── what changes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _prefix(prefix: str) -> str:
    """A literal path to take off or to put before; «/» alone is none."""
    if not prefix:
        return prefix
    bare = path(prefix).rstrip("/")
    for segment in bare[1:].split("/") if bare else ():
        _check_literal(segment, False)
    return bare


def _new_path(template: str) -> str:
    return template and _template(template)


def _check_names(names: Iterable[str], ours: frozenset[str], prefixes: tuple[str, ...]) -> None:
    for name in names:
        if not _HEADER_NAME.match(name):
            raise fault("HEADER_MALFORMED", f"{name[:60]!r} is not a header name")
        plain = canonical(name)
        if plain in ours or plain.startswith(prefixes):
            raise fault("HEADER_RESERVED", f"{name} is set by Farebox itself: choose another name")


def _check_once(names: Iterable[str]) -> None:
    named = [canonical(name) for name in names]
    if len(set(named)) < len(named):
        raise fault("HEADER_MALFORMED", "a header is named twice in different spellings: write it once")


def _check_values(headers: Mapping[str, str], variables: frozenset[str]) -> None:
    for name, value in headers.items():
        if not _HEADER_VALUE.match(value):
            raise fault(
                "HEADER_MALFORMED", f"the value of {name} holds characters that a header cannot carry"
            )
        for variable in _VARIABLE.findall(value):
            if variable not in variables:
                known = f"use {', '.join(sorted(variables))}" if variables else "answers know no variables"
                raise fault("VARIABLE_UNKNOWN", f"{{{variable}}} is not known in {name}: {known}")


def _set_up(headers: dict[str, str]) -> dict[str, str]:
    _check_names(headers, _OURS_UP, ("farebox-", "x-forwarded-"))
    _check_once(headers)
    _check_values(headers, VARIABLES)
    return headers


def _removed_up(names: tuple[str, ...]) -> tuple[str, ...]:
    _check_names(names, _OURS_UP, ("farebox-", "x-forwarded-"))
    _check_once(names)
    return names


def _set_down(headers: dict[str, str]) -> dict[str, str]:
    _check_names(headers, _OURS_DOWN, ("farebox-", "ratelimit-"))
    _check_once(headers)
    _check_values(headers, frozenset())
    return headers


def _removed_down(names: tuple[str, ...]) -> tuple[str, ...]:
    _check_names(names, _OURS_DOWN, ("farebox-", "ratelimit-"))
    _check_once(names)
    return names


def _query_names(names: Iterable[str]) -> None:
    named = list(names)
    for name in named:
        if not _QUERY_NAME.match(name):
            raise fault(
                "QUERY_MALFORMED",
                f"{name[:60]!r} is not a name in a query: use letters, digits and - . _ ~ ! $ ' ( ) * , : @ /",
            )
    if len({name.lower() for name in named}) < len(named):
        raise fault("QUERY_MALFORMED", "a name is there in two spellings: write it once")


def _set_query(pairs: dict[str, str]) -> dict[str, str]:
    _query_names(pairs)
    for name, value in pairs.items():
        if not _QUERY_VALUE.match(value):
            raise fault("QUERY_MALFORMED", f"the value of {name} is too long or holds control characters")
    return pairs


def _removed_query(names: tuple[str, ...]) -> tuple[str, ...]:
    _query_names(names)
    return names


HeaderText = Annotated[str, StringConstraints(strict=True)]
_Texts = Annotated[dict[str, HeaderText], Field(max_length=REWRITES_MAX)]
_Names = Annotated[tuple[HeaderText, ...], BeforeValidator(_methods), Field(max_length=REWRITES_MAX)]


class AnswerRewriteDocument(Document):
    """What changes on the way back to the client."""

    set_headers: Annotated[_Texts, AfterValidator(_set_down)] = Field(default_factory=dict)
    remove_headers: Annotated[_Names, AfterValidator(_removed_down)] = ()

    def value(self) -> AnswerRewrite:
        return AnswerRewrite(tuple(self.set_headers.items()), self.remove_headers)


class RewriteDocument(Document):
    """What changes on the way to the upstream, and back."""

    strip_prefix: Annotated[HeaderText, AfterValidator(_prefix)] = ""
    add_prefix: Annotated[HeaderText, AfterValidator(_prefix)] = ""
    set_path: Annotated[HeaderText, AfterValidator(_new_path)] = ""
    set_headers: Annotated[_Texts, AfterValidator(_set_up)] = Field(default_factory=dict)
    remove_headers: Annotated[_Names, AfterValidator(_removed_up)] = ()
    set_query: Annotated[_Texts, AfterValidator(_set_query)] = Field(default_factory=dict)
    remove_query: Annotated[_Names, AfterValidator(_removed_query)] = ()
    host: Literal["upstream", "original"] = "upstream"
    answer: AnswerRewriteDocument = AnswerRewriteDocument()

    def value(self) -> Rewrite:
        return Rewrite(
            self.strip_prefix,
            tuple(self.set_headers.items()),
            add_prefix=self.add_prefix,
            set_path=self.set_path,
            remove_headers=self.remove_headers,
            set_query=tuple(self.set_query.items()),
            remove_query=self.remove_query,
            host=self.host,
            answer=self.answer.value(),
        )


def rewrite_faults(match: Match, rewrite: Rewrite, at: str) -> Iterator[Reason]:
    """What is wrong with a rewrite beside the calls it is for; ``at`` is the path of the rewrite."""
    if rewrite.set_path and (rewrite.strip_prefix or rewrite.add_prefix):
        other = "strip_prefix" if rewrite.strip_prefix else "add_prefix"
        message = f"set_path writes the whole path, {other} changes the one that came: keep one of them"
        yield Reason("REWRITE_CONTRADICTORY", message, f"{at}.set_path")
    for first, second, what, fold in (
        (rewrite.set_headers, rewrite.remove_headers, "headers", canonical),
        (rewrite.answer.set_headers, rewrite.answer.remove_headers, "headers", canonical),
        (rewrite.set_query, rewrite.remove_query, "query", str.lower),
    ):
        where = f"{at}.answer" if first is rewrite.answer.set_headers and first else at
        both = {fold(name) for name, _ in first} & {fold(name) for name in second}
        if both:
            message = f"{min(both)} is both set and removed: setting it drops what came, so leave it out here"
            yield Reason("REWRITE_CONTRADICTORY", message, f"{where}.remove_{what}")
    yield from _unknown_variables(match, rewrite, at)


def _unknown_variables(match: Match, rewrite: Rewrite, at: str) -> Iterator[Reason]:
    parameters = [found for found in map(_PARAMETER.match, match.path[1:].split("/")) if found]
    names = {found[2] for found in parameters}
    known = ", ".join(f"{{{name}}}" for name in sorted(names)) or "it has none"
    segments = {found[0] for found in parameters}
    for found in filter(None, map(_PARAMETER.match, rewrite.set_path[1:].split("/"))):
        if found[0] not in segments:
            remedy = (
                f"write {{{'' if found[1] else '*'}{found[2]}}} as in match.path"
                if found[2] in names
                else f"the parameters of match.path are {known}"
            )
            yield Reason("VARIABLE_UNKNOWN", f"{found[0]} is not known here: {remedy}", f"{at}.set_path")
    for name, value in rewrite.set_query:
        for variable in _VARIABLE.findall(value):
            if variable not in names:
                message = f"{{{variable}}} is not known in {name}: the parameters of match.path are {known}"
                yield Reason("VARIABLE_UNKNOWN", message, f"{at}.set_query")


# ── back from values to documents ────────────────────────────────────────────────────────────────────────────────────


def conditions_document(conditions: Sequence[Condition]) -> dict[str, Any]:
    """``{"x-api-version": "2", "x-beta": {"exists": true}}``."""
    return {c.name: _condition_document(c) for c in conditions}


def _condition_document(condition: Condition) -> Any:
    match condition.mode:
        case "exact":
            return condition.value
        case "exists" | "absent":
            return {"exists": condition.mode == "exists"}
        case mode:
            return {mode: condition.value}


def match_document(match: Match) -> dict[str, Any]:
    """The inverse of ``MatchDocument.value``; what is at its default is left out."""
    document: dict[str, Any] = {"path": match.path}
    if match.methods:
        document["methods"] = list(match.methods)
    if match.hosts:
        document["hosts"] = list(match.hosts)
    if match.headers:
        document["headers"] = conditions_document(match.headers)
    if match.query:
        document["query"] = conditions_document(match.query)
    return document


def rewrite_document(rewrite: Rewrite) -> dict[str, Any]:
    """The inverse of ``RewriteDocument.value``; what is at its default is left out."""
    answer = _without_defaults(
        set_headers=dict(rewrite.answer.set_headers), remove_headers=list(rewrite.answer.remove_headers)
    )
    return _without_defaults(
        strip_prefix=rewrite.strip_prefix,
        add_prefix=rewrite.add_prefix,
        set_path=rewrite.set_path,
        set_headers=dict(rewrite.set_headers),
        remove_headers=list(rewrite.remove_headers),
        set_query=dict(rewrite.set_query),
        remove_query=list(rewrite.remove_query),
        host="" if rewrite.host == "upstream" else rewrite.host,
        answer=answer,
    )


def _without_defaults(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}
