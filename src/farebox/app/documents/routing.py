"""The shapes of farebox.yaml that say which calls a route takes and what changes on their way."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from farebox.app.documents.faults import Document, fault
from farebox.app.documents.upstreams import path
from farebox.domain.access import Match, Rewrite

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}\Z", re.ASCII)
_HEADER_VALUE = re.compile(r"[\x20-\x7e\x80-\xff]{0,4000}\Z")
_METHOD = re.compile(r"[A-Za-z]{1,20}\Z", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(:[0-9]{1,5})?\Z", re.ASCII)
_PARAMETER = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_]{0,63})\}\Z", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%-]*\Z", re.ASCII)
_VARIABLE = re.compile(r"\{([^{}]*)\}")
VARIABLES: Final = frozenset({"customer", "plan", "pass", "payer", "route", "request_id"})
#: Headers a route may not set: they frame the message or name the hop, or they are Farebox's own.
_FRAMING: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def _template(template: str) -> str:
    """A path template: plain segments, ``{name}`` for one segment, ``{*name}`` for the rest (last only)."""
    path(template)
    segments, seen = template[1:].split("/"), set()
    for place, segment in enumerate(segments):
        parameter = _PARAMETER.match(segment)
        if parameter is None:
            if not _SEGMENT.match(segment) or segment in (".", ".."):
                raise fault(
                    "PATH_MALFORMED",
                    f"{segment[:80]!r} is not a path segment: write text, {{name}} or {{*rest}}",
                )
            if not segment and place < len(segments) - 1:
                raise fault("PATH_MALFORMED", "an empty segment never matches: calls with // are refused")
            continue
        if parameter[1] and place < len(segments) - 1:
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


def _host(value: str) -> str:
    if not _HOST.match(value):
        raise fault("HOST_MALFORMED", f"{value[:80]!r} is not a host name: write it like api.example.com")
    return value.lower()


def _header_names(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not _HEADER_NAME.match(name):
            raise fault("HEADER_MALFORMED", f"{name[:60]!r} is not a header name")
        if not _HEADER_VALUE.match(value):
            raise fault(
                "HEADER_MALFORMED", f"the value of {name} holds characters that a header cannot carry"
            )
    if len({name.lower() for name in headers}) < len(headers):
        raise fault("HEADER_MALFORMED", "a header is named twice in different spellings: write it once")
    return headers


def _settable(headers: dict[str, str]) -> dict[str, str]:
    for name, value in _header_names(headers).items():
        if name.lower() in _FRAMING or name.lower().startswith("farebox-"):
            raise fault("HEADER_RESERVED", f"{name} is set by Farebox itself: choose another name")
        for variable in _VARIABLE.findall(value):
            if variable not in VARIABLES:
                raise fault(
                    "VARIABLE_UNKNOWN",
                    f"{{{variable}}} is not known in {name}: use {', '.join(sorted(VARIABLES))}",
                )
    return headers


HeaderText = Annotated[str, StringConstraints(strict=True)]


class MatchDocument(Document):
    """Which calls a route takes. Empty lists mean any."""

    path: Annotated[str, StringConstraints(strict=True, max_length=2000), AfterValidator(_template)]
    methods: Annotated[tuple[Annotated[str, AfterValidator(_method)], ...], BeforeValidator(_methods)] = ()
    hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_methods)] = ()
    headers: Annotated[dict[str, HeaderText], AfterValidator(_header_names)] = Field(default_factory=dict)

    def value(self) -> Match:
        headers = tuple((name.lower(), value) for name, value in self.headers.items())
        return Match(self.path, self.methods, self.hosts, headers)


class RewriteDocument(Document):
    """What changes on the way to the upstream."""

    strip_prefix: Annotated[str, AfterValidator(lambda p: p and path(p))] = ""
    set_headers: Annotated[dict[str, HeaderText], AfterValidator(_settable)] = Field(default_factory=dict)

    def value(self) -> Rewrite:
        return Rewrite(self.strip_prefix.rstrip("/"), tuple(self.set_headers.items()))


def match_document(match: Match) -> dict[str, Any]:
    """The inverse of ``MatchDocument.value``; what is at its default is left out."""
    document: dict[str, Any] = {"path": match.path}
    if match.methods:
        document["methods"] = list(match.methods)
    if match.hosts:
        document["hosts"] = list(match.hosts)
    if match.headers:
        document["headers"] = dict(match.headers)
    return document


def rewrite_document(rewrite: Rewrite) -> dict[str, Any]:
    """The inverse of ``RewriteDocument.value``."""
    document: dict[str, Any] = {}
    if rewrite.strip_prefix:
        document["strip_prefix"] = rewrite.strip_prefix
    if rewrite.set_headers:
        document["set_headers"] = dict(rewrite.set_headers)
    return document
