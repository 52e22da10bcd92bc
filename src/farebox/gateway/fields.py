"""Header fields: what each name means to a proxy, and a book of lines already read.

Most header lines of a busy gateway are the same few hundred, over and over. A line that was read, checked and
classified once is looked up whole afterwards, which is several times cheaper than tokenising it again; a line that
breaks a rule never enters the book. Only short lines of names that repeat are kept, and never credentials.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from farebox.gateway.problems import Fault

TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Everything that may stand in a line: no control character but the tab; bytes above 0x7f are opaque.
PRINTABLE: Final = bytes(c for c in range(256) if (c >= 0x20 and c != 0x7F) or c == 0x09)

_KEPT_LINES_MAX: Final = 4096
_KEPT_LINE_BYTES_MAX: Final = 256


class Kind(IntEnum):
    """What a proxy does with a field."""

    PASS = 0  # goes on as it came
    DROP = 1  # hop by hop, or a name only we may set
    HOST = 2
    CONTENT_LENGTH = 3
    TRANSFER_ENCODING = 4
    CONNECTION = 5
    EXPECT = 6
    UPGRADE = 7
    FORWARDED = 8  # believed from trusted proxies, dropped from everyone else
    CREDENTIAL = 9  # goes on unless it was ours
    OURS_IF_SET = 10  # in answers: dropped when the decision sets the same name
    CREDITS = 11  # in answers: what the upstream says a call costs; read, never passed on
    TE = 12  # of requests: whether trailers are taken
    TRAILER = 13  # which names come after a chunked body


#: One line read: ((lower-case name, value), kind). A tuple, not a class: it is unpacked for each line of each call.
Field = tuple[tuple[bytes, bytes], int]

_HOP_BY_HOP: Final = (
    b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"proxy-authentication-info",
)  # fmt: skip

#: IIS, Symfony and their like route by these instead of the target that was matched and paid for. A proxy that we trust passes
#: its clients' on as they came, so nobody's word is taken; a route may set one itself.
_OTHER_TARGETS: Final = (b"x-original-url", b"x-original-uri", b"x-rewrite-url")

_REQUEST_KINDS: Final[dict[bytes, Kind]] = {
    **dict.fromkeys(_HOP_BY_HOP, Kind.DROP),
    b"te": Kind.TE,
    b"trailer": Kind.TRAILER,
    b"http2-settings": Kind.DROP,
    b"payment-signature": Kind.DROP,  # a signed payment is valid money: it never goes to an upstream
    b"x-payment": Kind.DROP,
    **dict.fromkeys(_OTHER_TARGETS, Kind.DROP),
    b"host": Kind.HOST,
    b"content-length": Kind.CONTENT_LENGTH,
    b"transfer-encoding": Kind.TRANSFER_ENCODING,
    b"connection": Kind.CONNECTION,
    b"expect": Kind.EXPECT,
    b"upgrade": Kind.UPGRADE,
    b"forwarded": Kind.FORWARDED,
    b"x-real-ip": Kind.FORWARDED,
    b"authorization": Kind.CREDENTIAL,
    b"x-api-key": Kind.CREDENTIAL,
    b"apicharge": Kind.CREDENTIAL,
    b"cookie": Kind.CREDENTIAL,
}
_ANSWER_KINDS: Final[dict[bytes, Kind]] = {
    **dict.fromkeys(_HOP_BY_HOP, Kind.DROP),
    b"te": Kind.DROP,
    b"trailer": Kind.TRAILER,
    b"upgrade": Kind.UPGRADE,
    b"farebox-credits": Kind.CREDITS,
    b"apicharge-credits": Kind.CREDITS,
    b"content-length": Kind.CONTENT_LENGTH,
    b"transfer-encoding": Kind.TRANSFER_ENCODING,
    b"connection": Kind.CONNECTION,
}
#: Names whose values hardly repeat, or must not stay in memory.
_NEVER_KEPT: Final = frozenset({
    b"authorization", b"x-api-key", b"apicharge", b"cookie", b"set-cookie", b"payment-signature", b"x-payment", b"payment-response", b"etag",
    b"last-modified", b"x-request-id", b"idempotency-key", b"traceparent", b"if-none-match", b"farebox-credits",
    b"apicharge_credits", b"sec-websocket-key", b"sec-websocket-accept",
})  # fmt: skip


def canonical(name: bytes) -> bytes:
    """A lower-case name as a CGI-like upstream sees it: there ``Farebox_Customer`` and ``Farebox-Customer`` are one."""
    return name.replace(b"_", b"-")


class FieldBook:
    """Reads header lines of one direction. ``known`` is open to the loop that reads heads: one lookup a line."""

    __slots__ = ("_kinds", "_names", "_prefixes", "edition", "known")

    def __init__(self, kinds: dict[bytes, Kind], prefixes: tuple[tuple[bytes, Kind], ...]) -> None:
        self._kinds = dict(kinds)
        self._prefixes = prefixes
        self._names: dict[bytes, tuple[bytes, int, bool]] = {}
        self.known: dict[bytes, Field] = {}
        self.edition = 0  # moves when a name changes its kind: what was read before must be read again

    def read(self, line: bytes) -> Field:
        """Read a line that is not known yet. Raises ``Fault`` for a bad name, a bad character or a folded line."""
        name, colon, value = line.partition(b":")
        if not colon:
            raise _no_field()
        lower, kind, keeps = self._names.get(name) or self._read_name(name)
        if value.translate(None, PRINTABLE):
            raise Fault("request_malformed", "A header value holds a control character.")
        field = ((lower, value.strip(b" \t")), kind)
        if keeps and len(line) <= _KEPT_LINE_BYTES_MAX:
            if len(self.known) >= _KEPT_LINES_MAX:
                self.known.clear()
            self.known[line] = field
        return field

    def kind_of(self, lower: bytes) -> int:
        """What is done with a field of this lower-case name."""
        return int(self._kind(lower))

    def contest(self, lower: bytes) -> None:
        """From now on this name gives way to ours when a decision sets it."""
        if self._kinds.get(lower, Kind.PASS) == Kind.PASS:
            self._kinds[lower] = Kind.OURS_IF_SET
            self._names.clear()
            self.known.clear()
            self.edition += 1

    def _read_name(self, name: bytes) -> tuple[bytes, int, bool]:
        if not name or name.translate(None, TOKEN):
            raise _no_field()
        lower = name.lower()
        read = (lower, int(self._kind(lower)), lower not in _NEVER_KEPT)
        if len(name) <= _KEPT_LINE_BYTES_MAX:
            if len(self._names) >= _KEPT_LINES_MAX:
                self._names.clear()
            self._names[name] = read
        return read

    def _kind(self, lower: bytes) -> Kind:
        name = canonical(lower)
        kind = self._kinds.get(name)
        if kind is not None:
            # A misspelt framing field frames nothing, yet some upstream may think it does: it stays here. ApiCharge spells
            # its credits with an underscore.
            return kind if name == lower or kind == Kind.CREDITS else Kind.DROP
        for prefix, kind in self._prefixes:
            if name.startswith(prefix):
                return kind
        return Kind.PASS


def _no_field() -> Fault:
    return Fault(
        "request_malformed",
        "A header line is not «name: value»; folded lines and blanks before the colon are refused.",
    )


def request_fields() -> FieldBook:
    """The book for what clients send."""
    return FieldBook(_REQUEST_KINDS, ((b"farebox-", Kind.DROP), (b"x-forwarded-", Kind.FORWARDED)))


def answer_fields() -> FieldBook:
    """The book for what upstreams answer."""
    return FieldBook(_ANSWER_KINDS, ((b"farebox-", Kind.DROP),))
