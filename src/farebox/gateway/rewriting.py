"""What a route changes on the way up and on the way down, compiled once per catalog.

Whatever is put into a path was a segment of the path that was matched (or its whole rest, at the end), so that no rewrite
makes a target that targets.py would have refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from farebox.app.admission import Headers
from farebox.domain.access import AnswerRewrite, Rewrite
from farebox.gateway.conditions import folded
from farebox.gateway.fields import canonical

_PARAMETER: Final = re.compile(r"\{\*?([A-Za-z_][A-Za-z0-9_]*)\}\Z")
_VARIABLE: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PIECES: Final = re.compile(rb"([&;])")
#: A parameter is already escaped as a path needs it; a query needs more.
_ESCAPED_IN_QUERY: Final = {ord(c): f"%{ord(c):02X}" for c in "!\"$&'()*+,:;<=>?@[]^`{|}"}


class TargetRewrite:
    """Path and query as the upstream gets them."""

    __slots__ = ("_add", "_drops", "_pairs", "_segments", "_strip")

    def __init__(self, rewrite: Rewrite) -> None:
        self._strip = rewrite.strip_prefix.rstrip("/").encode()
        self._add = rewrite.add_prefix.rstrip("/").encode()
        # (text, whether it names a parameter) of each segment
        self._segments: tuple[tuple[str, bool], ...] | None = None
        if rewrite.set_path:
            named = [(segment, _PARAMETER.match(segment)) for segment in rewrite.set_path[1:].split("/")]
            self._segments = tuple((found[1], True) if found else (text, False) for text, found in named)
        self._pairs = tuple((quote(name, safe=""), _parts(value)) for name, value in rewrite.set_query)
        self._drops = frozenset(
            folded(name.encode()) for name in (*(n for n, _ in rewrite.set_query), *rewrite.remove_query)
        )

    def target(self, target: bytes, path: bytes, params: Mapping[str, str]) -> tuple[bytes, bytes]:
        """The new target, and the prefix that was taken off it (empty: none)."""
        tail = target[len(path) :]
        if self._drops:
            query = self._query(tail[1:], params)
            tail = b"?" + query if query else b""
        if self._segments is not None:
            new = "/".join([params[text] if named else text for text, named in self._segments])
            return b"/" + new.encode("ascii") + tail, b""
        stripped = b""
        prefix = self._strip
        if prefix and path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"/", b""):
            stripped = prefix
            path = path[len(prefix) :] or b"/"
        return self._add + path + tail, stripped

    def _query(self, query: bytes, params: Mapping[str, str]) -> bytes:
        kept: list[bytes] = []
        pieces = _PIECES.split(query)  # piece, separator, piece, …
        for place in range(0, len(pieces), 2):
            if pieces[place] and self._drops_piece(pieces[place]):
                continue
            if kept:
                kept.append(pieces[place - 1])
            kept.append(pieces[place])
        query = b"".join(kept)
        for name, parts in self._pairs:
            value = "".join([_in_query(params[text]) if named else text for text, named in parts])
            query += (b"&" if query else b"") + f"{name}={value}".encode("ascii")
        return query

    def _drops_piece(self, piece: bytes) -> bool:
        name = unquote_to_bytes(piece.partition(b"=")[0].replace(b"+", b" "))
        return folded(name) in self._drops


def _parts(value: str) -> tuple[tuple[str, bool], ...]:
    """``"{city},{land}"`` → the texts, escaped, and the names of parameters, in order."""
    parts = _VARIABLE.split(value)  # text, name, text, …
    return tuple(
        (text, True) if place % 2 else (quote(text, safe=""), False)
        for place, text in enumerate(parts)
        if text
    )


def _in_query(parameter: str) -> str:
    return parameter.translate(_ESCAPED_IN_QUERY)


class AnswerRewriting:
    """The lines of an answer's head as the client gets them. ``names``: canonical, of what is set or removed."""

    __slots__ = ("_fields", "_lines", "names")

    def __init__(self, rewrite: AnswerRewrite) -> None:
        self._fields: Headers = [(n.encode("ascii"), v.encode("latin-1")) for n, v in rewrite.set_headers]
        self._lines = [name + b": " + value for name, value in self._fields]
        self.names = frozenset(
            canonical(name.lower().encode())
            for name in (*(n for n, _ in rewrite.set_headers), *rewrite.remove_headers)
        )

    def head(self, lines: Sequence[bytes]) -> list[bytes]:
        return [*self.without(lines), *self._lines]

    def without(self, lines: Sequence[bytes]) -> list[bytes]:
        names = self.names
        return [line for line in lines if canonical(line.partition(b":")[0].lower()) not in names]

    def fields(self, fields: Headers) -> Headers:
        names = self.names
        return [*(field for field in fields if canonical(field[0].lower()) not in names), *self._fields]
