"""Lists are read in pages: a key of the last row is the cursor, so that rows written meanwhile move nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from farebox.base.errors import refuse

T = TypeVar("T")

PAGE_ROWS_DEFAULT: Final = 50
PAGE_ROWS_MAX: Final = 500
CURSOR_CHARS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page. ``next_cursor`` None: this was the last."""

    data: tuple[T, ...]
    next_cursor: str | None


def rows_wanted(limit: int) -> int:
    """How many rows to read for a page of ``limit``: one more, which tells whether there is a next page."""
    if not 1 <= limit <= PAGE_ROWS_MAX:
        raise refuse("LIMIT_OUT_OF_RANGE", f"a page holds 1 to {PAGE_ROWS_MAX} rows", "limit")
    return limit + 1


def page_of(rows: Sequence[T], limit: int, key: Callable[[T], str]) -> Page[T]:
    """Make the page of at most ``limit`` from the rows that ``rows_wanted`` asked for."""
    kept = tuple(rows[:limit])
    return Page(kept, encode_cursor(key(kept[-1])) if len(rows) > limit else None)


def encode_cursor(key: str) -> str:
    """An opaque word for the key of the last row seen."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str | None:
    """The key of the last row seen; None for the first page. Refuses what ``encode_cursor`` never made."""
    if cursor is None:
        return None
    try:
        if len(cursor) > CURSOR_CHARS_MAX:
            raise ValueError
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        key = raw.decode()
        if "\0" in key:
            raise ValueError
    except (ValueError, binascii.Error) as error:
        raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor") from error
    return key
