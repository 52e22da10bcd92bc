"""Which fields may follow a chunked body across a proxy (RFC 9110 §6.5, RFC 9112 §7.1.2), and what an upstream says in one.

A trailer comes when everything was decided by the head, so whatever frames, routes, authorises or describes a message has
no business in one: it is dropped here, as are the names that only we or the route may set. What is left goes on where the
other side can take it: an answer's to a client that said ``TE: trailers``, a request's when its head announced the name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from farebox.gateway.bodies import LAST_CHUNK
from farebox.gateway.fields import TOKEN, FieldBook, Kind, canonical

_PASS: Final = (int(Kind.PASS), int(Kind.OURS_IF_SET))
_CREDITS: Final = int(Kind.CREDITS)

#: Beside what the books drop or treat by itself: fields that a recipient acts on before it has seen the body.
_OF_THE_HEAD: Final = frozenset({
    # how to act on a request
    b"accept", b"accept-encoding", b"cache-control", b"cookie", b"if-match", b"if-modified-since", b"if-none-match", b"if-range",
    b"if-unmodified-since", b"max-forwards", b"origin", b"pragma", b"range", b"idempotency-key",
    # what an answer is
    b"accept-ranges", b"age", b"allow", b"date", b"expires", b"location", b"retry-after", b"set-cookie", b"status", b"vary",
    b"warning", b"www-authenticate", b"strict-transport-security", b"payment-required", b"payment-response",
    # what the body is
    b"content-encoding", b"content-location", b"content-range", b"content-type", b"content-disposition",
})  # fmt: skip
_OF_THE_HEAD_PREFIXES: Final = (b"access-control-", b"sec-", b"ratelimit-", b"x-forwarded-", b":")


def may_trail(lower: bytes, book: FieldBook) -> bool:
    """Whether a name may stand in a trailer that goes on."""
    name = canonical(lower)
    return (
        book.kind_of(lower) in _PASS
        and name not in _OF_THE_HEAD
        and not name.startswith(_OF_THE_HEAD_PREFIXES)
    )


def passing(lines: Sequence[bytes], book: FieldBook, ours: Collection[bytes]) -> list[bytes]:
    """The trailer lines that may go on. ``ours``: canonical names that we or the route set. Raises ``Fault``."""
    return [
        line
        for line in lines
        if may_trail(lower := book.read(line)[0][0], book) and canonical(lower) not in ours
    ]


def announced(names: bytes, book: FieldBook, ours: Collection[bytes]) -> list[bytes]:
    """The ``Trailer`` line that goes on for one that said ``names``, or none."""
    kept = [
        name
        for name in (part.strip(b" \t") for part in names.split(b","))
        if name
        and not name.translate(None, TOKEN)
        and may_trail(name.lower(), book)
        and canonical(name.lower()) not in ours
    ]
    return [b"Trailer: " + b", ".join(kept)] if kept else []


def credits_in(lines: Sequence[bytes], book: FieldBook) -> bytes | None:
    """What the upstream says after its body that the call costs; None: nothing."""
    said: bytes | None = None
    for line in lines:
        (_, value), kind = book.read(line)
        if kind == _CREDITS:
            said = value
    return said


def last_chunk(lines: Sequence[bytes]) -> bytes:
    """The end of a chunked body with these trailers."""
    return b"\r\n".join([b"0", *lines, b"", b""]) if lines else LAST_CHUNK
