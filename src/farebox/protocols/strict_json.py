"""JSON read strictly, for payments, tokens and purchases: one meaning or none.

Refused: duplicate keys, nesting beyond a limit, NaN and Infinity, numbers too long to be meant, lone surrogates and NUL in
strings, anything that is not UTF-8. ``Fields`` then reads an object field by field, naming the path of what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from farebox.base.errors import Refused, refuse

DEPTH_MAX: Final = 32
_NUMBER_CHARACTERS_MAX: Final = 20
_WHOLE: Final = re.compile(r"(0|[1-9][0-9]{0,77})\Z", re.ASCII)
# A string that never ends is one match too, and nothing is tried twice: a hostile text is walked once.
_OPENING: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def loads(data: bytes | str, code: str = "JSON_MALFORMED", depth_max: int = DEPTH_MAX) -> Any:
    """The value of a JSON text. Raises ``Refused`` with ``code``, and nothing else."""
    try:
        text = data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError:
        raise refuse(code, "the text is not UTF-8") from None
    # Counting brackets costs nothing; only a text with many of them is walked.
    if text.count("[") + text.count("{") > depth_max and _depth(text) > depth_max:
        raise refuse(code, f"the JSON is nested deeper than {depth_max} levels")
    try:
        value = _DECODER.decode(text)
    except _NotStrict as exc:
        raise refuse(code, str(exc)) from None
    except (ValueError, RecursionError):
        raise refuse(code, "the text is not JSON") from None
    if "\\u" in text:
        _check_strings(value, code)
    return value


def dumps(value: Any) -> str:
    """Compact JSON as raw UTF-8: some buyers' software cannot read ``\\u`` escapes in headers."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Fields:
    """Typed reading of one JSON object. Every method raises ``Refused`` with ``code`` and the path of the field at fault."""

    __slots__ = ("_code", "_object", "_path")

    def __init__(self, value: object, code: str = "JSON_MALFORMED", path: str = "") -> None:
        if not isinstance(value, dict):
            raise refuse(code, "must be a JSON object", path or None)
        self._object: dict[str, Any] = value
        self._code = code
        self._path = path

    def text(self, key: str, characters_max: int = 256) -> str:
        """A string that must be there and not be empty."""
        value = self._object.get(key)
        if type(value) is not str or not value:
            self.wrong(key, "must be a text" if key in self._object else "is missing")
        if len(value) > characters_max:
            self.wrong(key, f"is longer than {characters_max} characters")
        return value

    def optional_text(self, key: str, characters_max: int = 256) -> str | None:
        return None if self._object.get(key) is None else self.text(key, characters_max)

    def whole_text(self, key: str) -> int:
        """A whole number written as a string: ``0|[1-9][0-9]*``, at most 78 digits."""
        value = self._object.get(key)
        if type(value) is not str or not _WHOLE.match(value):
            self.wrong(
                key,
                "must be a whole number written as a string, without sign, point or leading zero, of at most 78 digits",
            )
        return int(value)

    def whole(self, key: str, lowest: int, highest: int) -> int:
        """A JSON integer within bounds (``true`` is not one)."""
        value = self._object.get(key)
        if type(value) is not int or not lowest <= value <= highest:
            self.wrong(key, f"must be a whole number from {lowest} to {highest}")
        return value

    def flag(self, key: str) -> bool:
        value = self._object.get(key)
        if type(value) is not bool:
            self.wrong(key, "must be true or false")
        return value

    def fields(self, key: str) -> Fields:
        """An object inside this one."""
        return Fields(self._object.get(key), self._code, self._at(key))

    def mapping(self, key: str) -> dict[str, Any]:
        """An object whose inside is not ours to read; absent or null reads as empty."""
        value = self._object.get(key)
        if value is None:
            return {}
        if type(value) is not dict:
            self.wrong(key, "must be a JSON object")
        return value

    def array(self, key: str, items_max: int) -> list[Any]:
        value = self._object.get(key)
        if type(value) is not list or len(value) > items_max:
            self.wrong(key, f"must be a list of at most {items_max}")
        return value

    def all(self) -> dict[str, Any]:
        """A copy of the whole object."""
        return dict(self._object)

    def raw(self, key: str) -> Any:
        return self._object.get(key)

    def only(self, keys: frozenset[str]) -> None:
        """Refuse a field that is not known: a misspelt option must not be dropped in silence."""
        for key in self._object:
            if key not in keys:
                self.wrong(key, "is not a field of this object")

    def wrong(self, key: str, what: str) -> NoReturn:
        path = self._at(key)
        raise refuse(self._code, f"{path} {what}", path)

    def _at(self, key: str) -> str:
        key = key[:60]
        return f"{self._path}.{key}" if self._path else key


class _NotStrict(ValueError):
    """What this reader refuses although other readers take it."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _NotStrict(f"the key {key[:60]!r} occurs twice in one object")
            seen.add(key)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _NUMBER_CHARACTERS_MAX:
        raise _NotStrict("a number has too many digits; large amounts are written as strings")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits) if len(digits) <= 40 else math.inf
    if not math.isfinite(value):
        raise _NotStrict("a number is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise _NotStrict(f"{name} is not a JSON number")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _OPENING.finditer(text):
        if (mark := found[0]) in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "]}":
            depth -= 1
    return deepest


def _check_strings(value: Any, code: str) -> None:
    """Escapes can write what no UTF-8 text and no PostgreSQL text can hold."""
    match value:
        case str():
            if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise refuse(code, "a string holds a NUL or half of a surrogate pair")
        case list():
            for item in value:
                _check_strings(item, code)
        case Mapping():
            for key, item in value.items():
                _check_strings(key, code)
                _check_strings(item, code)


__all__ = ["DEPTH_MAX", "Fields", "Refused", "dumps", "loads"]
