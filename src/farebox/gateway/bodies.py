"""Where a body ends: by length, by chunks, or by the end of the connection. Bytes in, bytes out, no I/O.

Each reader's ``feed`` takes what arrived and gives (payload, ended, rest): rest is what stands behind the body's end
and belongs to the next message. The same bytes cut at other places give the same payload, end and rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

from farebox.gateway.fields import PRINTABLE, TOKEN
from farebox.gateway.problems import Fault

LAST_CHUNK: Final = b"0\r\n\r\n"

_CHUNK_LINE_BYTES_MAX: Final = 1024  # a size and its extensions
_EXTENSION_BYTES_MAX: Final = 16 * 1024  # all extensions of one body: they carry nothing and are dropped
_TRAILER_BYTES_MAX: Final = 8 * 1024
_TRAILER_COUNT_MAX: Final = 32
_HEX: Final = b"0123456789abcdefABCDEF"


class Body(Protocol):
    @property
    def trailers(self) -> Sequence[bytes]: ...  # the lines after the last chunk, once the body has ended

    def feed(self, data: bytes) -> tuple[bytes, bool, bytes]: ...


class LengthBody:
    """``Content-Length`` bytes."""

    __slots__ = ("left",)
    trailers: ClassVar[Sequence[bytes]] = ()

    def __init__(self, length: int) -> None:
        self.left = length

    def feed(self, data: bytes) -> tuple[bytes, bool, bytes]:
        size = len(data)
        if size < self.left:
            self.left -= size
            return data, False, b""
        payload, rest = (data, b"") if size == self.left else (data[: self.left], data[self.left :])
        self.left = 0
        return payload, True, rest


class EndlessBody:
    """An answer that ends when its connection does."""

    __slots__ = ()
    trailers: ClassVar[Sequence[bytes]] = ()

    def feed(self, data: bytes) -> tuple[bytes, bool, bytes]:
        return data, False, b""


class ChunkedBody:
    """RFC 9112 §7.1, strictly: bare hexadecimal sizes, CRLF everywhere. Extensions are checked, bounded and dropped: they
    have no meaning across a proxy. Trailers are checked, bounded and kept; which of them go on is trailers.py's business."""

    __slots__ = ("_extension_bytes", "_inbox", "_left", "_trailer_bytes", "_where", "trailers")

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self) -> None:
        self._where = self._SIZE
        self._left = 0
        self._inbox = b""
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self.trailers: Sequence[bytes] = ()

    def feed(self, data: bytes) -> tuple[bytes, bool, bytes]:
        if self._inbox:
            data = self._inbox + data
            self._inbox = b""
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while True:
            if self._where == self._DATA:
                if size - at < self._left:
                    if at < size:
                        pieces.append(data[at:])
                        self._left -= size - at
                    return b"".join(pieces), False, b""
                pieces.append(data[at : at + self._left])
                at += self._left
                self._where = self._DATA_END
            if self._where == self._DATA_END:
                found = data[at : at + 2]
                if found != b"\r\n":
                    if b"\r\n".startswith(found):
                        self._inbox = found
                        return b"".join(pieces), False, b""
                    raise Fault("request_malformed", "A chunk is longer than its size says.")
                at += 2
                self._where = self._SIZE
            end = data.find(b"\r\n", at)
            if end < 0:
                self._inbox = data[at:]
                self._check_unfinished(self._inbox)
                return b"".join(pieces), False, b""
            line = data[at:end]
            at = end + 2
            if self._where == self._SIZE:
                self._left = self._size_of(line)
                self._where = self._DATA if self._left else self._TRAILER
            elif not line:
                return b"".join(pieces), True, data[at:]
            else:
                self._check_trailer(line)

    def _size_of(self, line: bytes) -> int:
        size, semicolon, extension = line.partition(b";")
        if not size or len(size) > 15 or size.translate(None, _HEX):
            raise Fault("request_malformed", "A chunk size is not a plain hexadecimal number.")
        if semicolon:
            self._extension_bytes += len(extension)
            if len(line) > _CHUNK_LINE_BYTES_MAX or self._extension_bytes > _EXTENSION_BYTES_MAX:
                raise Fault("request_malformed", "The chunk extensions are too long.")
            if extension.translate(None, PRINTABLE):
                raise Fault("request_malformed", "A chunk extension holds a control character.")
        return int(size, 16)

    def _check_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > _TRAILER_BYTES_MAX or len(self.trailers) >= _TRAILER_COUNT_MAX:
            raise Fault("request_malformed", "The trailers are too long.")
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, TOKEN) or value.translate(None, PRINTABLE):
            raise Fault("request_malformed", "A trailer line is not «name: value».")
        self.trailers = [*self.trailers, line]

    def _check_unfinished(self, line: bytes) -> None:
        """Nothing that can no longer become a good line is waited for."""
        if len(line) > (_CHUNK_LINE_BYTES_MAX if self._where == self._SIZE else _TRAILER_BYTES_MAX):
            raise Fault("request_malformed", "A chunk size or trailer line is too long.")
        if line.removesuffix(b"\r").translate(None, PRINTABLE):
            raise Fault("request_malformed", "A chunk size or trailer line holds a control character.")


def chunk(payload: bytes) -> bytes:
    """One chunk of a body on its way out; nothing for nothing, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
