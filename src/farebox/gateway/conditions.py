"""Conditions on headers and on the query: whether a call meets them, in every way that an upstream may read it.

A condition that we find met and the upstream does not, or the other way around, would be the way around a paid route. So
what is said under a name is read in all the ways servers are known to read it, and a call whose readings do not come to
the same is refused (``Fault``, 400) instead of being given to one of two routes:

* several values: each on its own, and lines of a header also joined by a comma;
* names of headers: as they are, and ``_`` as ``-`` (CGI); a line that ``Connection`` takes off before the upstream sees it
  also as not said;
* the query: pairs by ``&``, and also by ``;``; percent signs decoded once; ``+`` as itself and as a blank; names as they
  are, and as ``folded`` has them. Escapes that are none, a NUL, or more than ``QUERY_PAIRS_MAX`` pairs: refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from farebox.app.admission import Headers
from farebox.domain.access import Condition
from farebox.gateway.fields import canonical
from farebox.gateway.problems import Fault

#: Servers stop reading at some number of pairs, at 1,000 the common ones.
QUERY_PAIRS_MAX: Final = 500

#: One way to read a query: names and values, decoded.
Reading = list[tuple[bytes, bytes]]

_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")
_SEPARATORS: Final = re.compile(rb"[&;]")
_AS_UNDERSCORE: Final = bytes.maketrans(b". ", b"__")


class Asked:
    """One condition, made ready. ``name`` and ``folded`` are what is looked for in headers or in a query."""

    __slots__ = ("_mode", "_value", "folded", "name")

    def __init__(self, condition: Condition, folded: bytes) -> None:
        self.name = condition.name.encode()
        self.folded = folded
        self._mode = condition.mode
        self._value = condition.value.encode()

    def agreed(self, readings: Iterable[Sequence[bytes]]) -> bool | None:
        """Whether it holds in each of the readings (the values said in each); None when they do not agree."""
        verdict: bool | None = None
        for values in readings:
            holds = self.holds(values)
            if holds is None or (verdict is not None and verdict is not holds):
                return None
            verdict = holds
        return verdict

    def holds(self, values: Sequence[bytes]) -> bool | None:
        """Whether it holds of these values; None when it does for some of them."""
        mode, wanted = self._mode, self._value
        if mode == "exists" or mode == "absent":
            return bool(values) is (mode == "exists")
        if not values:
            return mode == "not"
        if len(values) == 1 and mode == "exact":
            return values[0] == wanted
        if mode == "exact" or mode == "not":
            same = [value == wanted for value in values]
            holds = all(same)
            return None if holds is not any(same) else holds is (mode == "exact")
        found = [value.startswith(wanted) if mode == "prefix" else wanted in value for value in values]
        holds = all(found)
        return None if holds is not any(found) else holds


def on_header(condition: Condition) -> Asked:
    return Asked(condition, canonical(condition.name.encode()))


def on_query(condition: Condition) -> Asked:
    return Asked(condition, folded(condition.name.encode()))


def headers_meet(asked: Sequence[Asked], headers: Headers) -> bool:
    """Whether a call's headers meet all conditions. Raises ``Fault`` when that depends on who reads them."""
    doubtful: Asked | None = None
    for one in asked:
        verdict = _header_verdict(one, headers)
        if verdict is False:
            return False
        if verdict is None:
            doubtful = one
    if doubtful is not None:
        raise _two_ways("header", doubtful)
    return True


def _header_verdict(asked: Asked, headers: Headers) -> bool | None:
    name, length = asked.folded, len(asked.folded)
    said = [field for field in headers if len(field[0]) == length and canonical(field[0]) == name]
    if not said:
        return asked.holds(())
    readings = [[value for given, value in said if given == asked.name]]
    if len(said) > 1 or said[0][0] != asked.name:
        values = [value for _, value in said]
        readings += [values, [b",".join(values)], [b", ".join(values)]]
    for given, value in headers:
        if given == b"connection" and name in (canonical(t.strip(b" \t").lower()) for t in value.split(b",")):
            readings.append([])
    return asked.agreed(readings) if len(readings) > 1 else asked.holds(readings[0])


def query_meets(asked: Sequence[Asked], readings: Sequence[Reading]) -> bool:
    """Whether a query meets all conditions. Raises ``Fault`` when that depends on who reads it."""
    doubtful: Asked | None = None
    for one in asked:
        verdict = one.agreed(values for reading in readings for values in _values(one, reading))
        if verdict is False:
            return False
        if verdict is None:
            doubtful = one
    if doubtful is not None:
        raise _two_ways("query parameter", doubtful)
    return True


def _values(asked: Asked, reading: Reading) -> tuple[list[bytes], list[bytes]]:
    return (
        [value for name, value in reading if name == asked.name],
        [value for name, value in reading if folded(name) == asked.folded],
    )


def read_query(query: bytes) -> list[Reading]:
    """Every way to read a query (without its question mark). Raises ``Fault`` for one that nobody can be sure of."""
    if not query:
        return [[]]
    if _BAD_ESCAPE.search(query):
        raise Fault(
            "request_malformed",
            "The query decides which route takes this call, and has a percent sign without two hexadecimal digits, or a NUL.",
        )
    if query.count(b"&") + query.count(b";") >= QUERY_PAIRS_MAX:
        raise Fault(
            "request_malformed",
            f"The query decides which route takes this call, and has more than {QUERY_PAIRS_MAX} parameters.",
        )
    pieces = [query.split(b"&")]
    if b";" in query:
        pieces.append(_SEPARATORS.split(query))
    readings = [_pairs(split) for split in pieces]
    if b"+" in query:
        readings += [_pairs([piece.replace(b"+", b" ") for piece in split]) for split in pieces]
    return readings


def _pairs(pieces: Iterable[bytes]) -> Reading:
    pairs: Reading = []
    for piece in pieces:
        if piece:
            name, _, value = piece.partition(b"=")
            pairs.append((unquote_to_bytes(name), unquote_to_bytes(value)))
    return pairs


def folded(name: bytes) -> bytes:
    """A decoded name of a query in its coarsest reading: no matter upper and lower case (ASP.NET), ``x[]`` and ``x[0]`` as
    ``x`` (PHP, Rails), blanks and dots as underscores and none in front, up to a NUL (PHP)."""
    return name.partition(b"\0")[0].partition(b"[")[0].strip(b" ").lower().translate(_AS_UNDERSCORE)


def _two_ways(what: str, asked: Asked) -> Fault:
    name = asked.name.decode("ascii", "replace")
    return Fault(
        "request_malformed",
        f"The {what} «{name}» decides which route takes this call, and here it can be read in more than one way: send it once, spelled exactly so.",
    )
