"""Reading the head of a request or an answer: sans I/O, strict, and independent of how the bytes were cut.

Why not a ready parser: the head must be refused or accepted as one piece (RFC 9112 §2, §3, §6 and the rules of our
own), the exact end of each message must be known (pipelining, tunnels), and lines that go on unchanged are passed on as
they came. tests/gateway holds this reader against llhttp: whatever passes here, llhttp reads in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from farebox.app.credentials import PASS_NAME, parted_cookie
from farebox.gateway.bodies import Body, ChunkedBody, LengthBody
from farebox.gateway.fields import PRINTABLE, TOKEN, Field, FieldBook, Kind
from farebox.gateway.problems import Fault
from farebox.gateway.trailers import may_trail

HEAD_END: Final = b"\r\n\r\n"

_METHODS: Final = {m.encode(): m for m in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
_METHOD_BYTES_MAX: Final = 32
_PROTOCOL: Final = TOKEN + b"/"
_LENGTH_DIGITS_MAX: Final = 18
_TOKENS_KEPT_MAX: Final = 1024
_CONTROLS_AND_SPACE: Final = bytes(range(0x21)) + b"\x7f"
_HOST_CHARACTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=%"

_PASS: Final = int(Kind.PASS)
_DROP: Final = int(Kind.DROP)
_HOST: Final = int(Kind.HOST)
_CONTENT_LENGTH: Final = int(Kind.CONTENT_LENGTH)
_TRANSFER_ENCODING: Final = int(Kind.TRANSFER_ENCODING)
_CONNECTION: Final = int(Kind.CONNECTION)
_EXPECT: Final = int(Kind.EXPECT)
_UPGRADE: Final = int(Kind.UPGRADE)
_FORWARDED: Final = int(Kind.FORWARDED)
_CREDENTIAL: Final = int(Kind.CREDENTIAL)
_OURS_IF_SET: Final = int(Kind.OURS_IF_SET)
_CREDITS: Final = int(Kind.CREDITS)
_TE: Final = int(Kind.TE)
_TRAILER: Final = int(Kind.TRAILER)


class HeaderBlock:
    """The header lines of a request, found good. Never changed once read: clients that keep a connection mostly say the
    same on it again and again, and the same bytes are then read only once."""

    raw: bytes
    headers: list[tuple[bytes, bytes]]  # all that was said: lower-case names, values
    lines: list[bytes]  # what goes on unchanged
    host: str  # lower case, with its port if one was sent
    forwarded_host_line: bytes
    # What the client says of those before it; believed from trusted proxies.
    forwarded: Sequence[tuple[bytes, bytes]] = ()
    # Lines of credentials that are none of our keys: they go on unless a pass is in them.
    credentials: Sequence[bytes] = ()
    names_pass = False  # in a header or cookie of that name: those, not the credentials, hold the pass
    content_length = -1  # -1: not said
    chunked = False
    says_close = False
    says_keep_alive = False
    expects_continue = False
    upgrade = b""  # the protocols the client offers to change to, but never h2c
    takes_trailers = False  # after an answer
    trailer_names: frozenset[bytes] = frozenset()  # announced, lower case: the request's own trailers

    def body(self) -> Body | None:
        """A reader for the body, None when there is none."""
        if self.chunked:
            return ChunkedBody()
        return LengthBody(self.content_length) if self.content_length > 0 else None


class RequestHead:
    """A request's head, found good."""

    __slots__ = ("block", "keep_alive", "line", "method", "path", "query", "target", "version_1_1")

    line: bytes  # the request line as it came
    method: str
    target: bytes
    path: bytes
    query: bytes
    version_1_1: bool
    keep_alive: bool
    block: HeaderBlock

    @property
    def upgrade(self) -> bytes:
        """The protocols to change to; HTTP/1.0 has none (RFC 9110 §7.8)."""
        return self.block.upgrade if self.version_1_1 else b""


class AnswerHead:
    """An upstream's head, found good. ``lines`` go on unchanged; the status line is ours to write."""

    status: int
    reason: bytes  # the status line as we send it
    lines: list[bytes]
    keep_alive: bool
    content_length = -1  # -1: not said
    chunked = False
    contested = False  # a name is among them that gives way to ours
    credits: bytes | None = None  # what the upstream says the call costs
    upgrade = b""  # the protocols a 101 changes to, or a 426 asks for
    trailer = b""  # the names announced to come after the body

    def __init__(self, said: list[bytes], book: FieldBook) -> None:
        self._said = said
        self._book = book
        self._edition = book.edition

    @property
    def current(self) -> bool:
        """Whether it would still be read in the same way."""
        return self._edition == self._book.edition

    def fields(self) -> list[Field]:
        """Every header line, read. Few calls ask for this, so it is not kept from the first reading."""
        return [self._book.read(line) for line in self._said]


class ConnectionSays:
    """A ``Connection`` value, read."""

    __slots__ = ("close", "keep_alive", "names", "upgrade")

    def __init__(self, value: bytes) -> None:
        tokens = [t.strip(b" \t").lower() for t in value.split(b",")]
        if any(t.translate(None, TOKEN) for t in tokens):
            raise Fault("request_malformed", "The Connection header is not a list of names.")
        self.close = b"close" in tokens
        self.keep_alive = b"keep-alive" in tokens
        self.upgrade = b"upgrade" in tokens
        self.names = frozenset(tokens) - {b"close", b"keep-alive", b"upgrade", b"te", b""}


_connection_values: dict[bytes, ConnectionSays] = {}
_hosts: dict[bytes, tuple[str, bytes]] = {}  # the host and the X-Forwarded-Host line of a Host value
_status_lines: dict[bytes, tuple[int, bytes, bool]] = {}


def read_request_head(
    head: bytes,
    book: FieldBook,
    request_line_bytes_max: int,
    header_count_max: int,
    before: HeaderBlock | None = None,
) -> RequestHead:
    """Read a head (without its empty line). Raises ``Fault`` for the first rule it breaks.

    ``before`` are the header lines of the request before on this connection: repeated, they are not read again.
    """
    line, _, raw = head.partition(b"\r\n")
    if len(line) > request_line_bytes_max:
        raise Fault("target_too_long", f"The request line is longer than {request_line_bytes_max} bytes.")
    words = line.split(b" ")
    if len(words) != 3:
        raise Fault("request_malformed", "The request line is not «METHOD target HTTP/1.1».")
    read = RequestHead()
    read.line = line
    method, target, version = words
    read.method = _METHODS.get(method) or _read_method(method)
    if version != b"HTTP/1.1" and version != b"HTTP/1.0":
        raise _bad_version(version)
    if target[:1] != b"/":
        raise Fault(
            "request_malformed", "The target must be a path: proxy and authority forms are not served."
        )
    read.target = target
    read.path, _, query = target.partition(b"?")
    if query and (
        query.translate(None, _CONTROLS_AND_SPACE) != query or not query.isascii() or b"#" in query
    ):
        raise Fault(
            "request_malformed",
            "The query holds a blank, a control character, a fragment or a character beyond ASCII.",
        )
    read.query = query
    if before is not None and before.raw == raw:
        block = before
    else:
        block = read_header_block(raw, book, header_count_max)
    read.block = block
    if version == b"HTTP/1.1":
        read.version_1_1 = True
        read.keep_alive = not block.says_close
    else:
        if block.chunked:
            raise Fault("request_malformed", "Transfer-Encoding does not exist in HTTP/1.0.")
        read.version_1_1 = False
        read.keep_alive = block.says_keep_alive and not block.says_close
    return read


def read_header_block(raw: bytes, book: FieldBook, header_count_max: int) -> HeaderBlock:
    """Read the header lines of a request. Raises ``Fault``."""
    lines = raw.split(b"\r\n") if raw else []
    if len(lines) > header_count_max:
        raise Fault("head_too_large", f"There are more than {header_count_max} header lines.")
    known = book.known
    headers: list[tuple[bytes, bytes]] = []
    kept: list[bytes] = []
    specials: list[tuple[bytes, int, bytes, bytes]] = []
    host: bytes | None = None
    for line in lines:
        pair, kind = known.get(line) or book.read(line)
        headers.append(pair)
        if kind == _PASS:
            kept.append(line)
        elif kind == _HOST and host is None:
            host = pair[1]
        elif kind != _DROP:
            specials.append((line, kind, *pair))
    if host is None:
        raise Fault("request_malformed", "The request has no Host header.")
    read = HeaderBlock()
    read.raw = raw
    read.headers = headers
    read.lines = kept
    read.host, read.forwarded_host_line = _hosts.get(host) or _read_host(host)
    if specials:
        _read_specials(read, specials, book)
    return read


def _read_specials(
    read: HeaderBlock, specials: list[tuple[bytes, int, bytes, bytes]], book: FieldBook
) -> None:
    length: bytes | None = None
    upgrades: list[bytes] = []
    connection: list[ConnectionSays] = []
    for line, kind, name, value in specials:
        if kind == _CREDENTIAL:
            # Our own keys end here; whatever else authorizes is the upstream's business.
            if name == b"cookie":
                _read_cookie(read, line, value)
            elif name == PASS_NAME:
                read.names_pass = True
            elif not _is_ours(value):
                read.credentials = [*read.credentials, line]
        elif kind == _CONNECTION:
            connection.append(_connection_values.get(value) or _read_connection(value))
        elif kind == _CONTENT_LENGTH:
            if length is not None:
                raise Fault("request_malformed", "There is more than one Content-Length.")
            length = value
        elif kind == _TRANSFER_ENCODING:
            if read.chunked or value.lower() != b"chunked":
                raise Fault("request_malformed", "The only Transfer-Encoding served is a single «chunked».")
            read.chunked = True
        elif kind == _FORWARDED:
            read.forwarded = [*read.forwarded, (name, value)]
        elif kind == _EXPECT:
            if value.lower() != b"100-continue":
                raise Fault("expectation_failed", "The only expectation met is 100-continue.")
            read.expects_continue = True
        elif kind == _UPGRADE:
            upgrades.append(value)
        elif kind == _TE:
            if b"trailers" in _names(value):
                read.takes_trailers = True
        elif kind == _TRAILER:
            if any(name.translate(None, TOKEN) for name in _names(value)):
                raise Fault("request_malformed", "The Trailer header is not a list of names.")
            read.trailer_names |= _names(value)
        else:
            raise Fault("request_malformed", "There is more than one Host header.")
    if read.chunked and length is not None:
        raise Fault("request_malformed", "A request has either a Content-Length or a Transfer-Encoding.")
    if length is not None:
        read.content_length = read_length(length)
    for says in connection:
        read.says_close |= says.close
        read.says_keep_alive |= says.keep_alive
        if says.names:
            _drop_named(read, says.names)
    # An offer of HTTP/2 may be ignored (RFC 9110 §7.8) and common clients make it with each request.
    if upgrades and any(says.upgrade for says in connection):
        offered = [p for p in _listed(b",".join(upgrades)) if p.lower() != b"h2c"]
        if any(p.translate(None, _PROTOCOL) for p in offered):
            raise Fault("request_malformed", "The Upgrade header is not a list of protocols.")
        read.upgrade = b", ".join(offered)
    if read.takes_trailers and not read.upgrade:
        # What we pass on to the client, we may ask the upstream for. TE is of one hop, so this one is ours.
        read.lines = [*read.lines, b"TE: trailers", b"Connection: TE"]
    if read.trailer_names:
        read.trailer_names = frozenset(n for n in read.trailer_names if may_trail(n, book))
        if read.trailer_names and read.chunked:
            read.lines = [*read.lines, b"Trailer: " + b", ".join(sorted(read.trailer_names))]


def _read_cookie(read: HeaderBlock, line: bytes, value: bytes) -> None:
    """The cookie of a pass ends here; all others go on."""
    if PASS_NAME in value:
        theirs, ours = parted_cookie(value)
        if ours:
            read.names_pass = True
            line = b"Cookie: " + theirs if theirs else b""
    if line:
        read.lines.append(line)


def _is_ours(value: bytes) -> bool:
    """A Farebox key, bare or as a Bearer."""
    return value.startswith(b"fbx_") or (
        value[:7].lower() == b"bearer " and value[7:].lstrip().startswith(b"fbx_")
    )


def _drop_named(read: HeaderBlock, names: frozenset[bytes]) -> None:
    """Fields that Connection names are hop by hop. Host and framing cannot be dropped: they are written anew."""
    read.lines = [line for line in read.lines if line.partition(b":")[0].lower() not in names]
    read.credentials = [line for line in read.credentials if line.partition(b":")[0].lower() not in names]
    read.forwarded = [pair for pair in read.forwarded if pair[0] not in names]


def read_answer_head(head: bytes, book: FieldBook) -> AnswerHead:
    """Read an upstream's head (without its empty line). Raises ``Fault``; the caller answers 502."""
    lines = head.split(b"\r\n")
    status_line = lines.pop(0)
    read = AnswerHead(lines, book)
    status = _status_lines.get(status_line) or _read_status_line(status_line)
    read.status, read.reason, read.keep_alive = status
    known = book.known
    kept: list[bytes] = []
    transfer: bytes | None = None
    named: frozenset[bytes] = frozenset()
    for line in lines:
        pair, kind = known.get(line) or book.read(line)
        if kind == _PASS:
            kept.append(line)
        elif kind == _OURS_IF_SET:
            kept.append(line)
            read.contested = True
        elif kind == _CONTENT_LENGTH:
            length = read_length(pair[1])
            if read.content_length not in (-1, length):
                raise Fault("upstream_malformed", "two different Content-Lengths")
            read.content_length = length
        elif kind == _CONNECTION:
            says = _connection_values.get(pair[1]) or _read_connection(pair[1])
            if says.close:
                read.keep_alive = False
            elif says.keep_alive and status_line.startswith(b"HTTP/1.0"):
                read.keep_alive = True
            named = named | says.names if says.names else named
        elif kind == _TRANSFER_ENCODING:
            if transfer is not None or pair[1].lower() != b"chunked":
                raise Fault("upstream_malformed", "a Transfer-Encoding other than a single chunked")
            transfer = b"chunked"
            read.chunked = True
        elif kind == _CREDITS:
            read.credits = pair[1]
        elif kind == _UPGRADE:
            read.upgrade = b", ".join([read.upgrade, pair[1]] if read.upgrade else [pair[1]])
        elif kind == _TRAILER:
            read.trailer = b", ".join([read.trailer, pair[1]] if read.trailer else [pair[1]])
    if transfer is not None and read.content_length >= 0:
        raise Fault("upstream_malformed", "both Content-Length and Transfer-Encoding")
    if transfer is not None and status_line.startswith(b"HTTP/1.0"):
        raise Fault("upstream_malformed", "a Transfer-Encoding in HTTP/1.0")
    if read.status == 204 and (read.chunked or read.content_length > 0):
        read.keep_alive = (
            False  # it must not announce a body (RFC 9110 §8.6): what comes next may be one all the same
        )
    if named:
        kept = [line for line in kept if line.partition(b":")[0].lower() not in named]
    if read.status == 426 and read.upgrade:
        kept += [b"Connection: Upgrade", b"Upgrade: " + read.upgrade]  # it says which (RFC 9110 §15.5.22)
    read.lines = kept
    return read


def check_unfinished(data: bytes, request_line_bytes_max: int, head_bytes_max: int) -> None:
    """Refuse early what can no longer become a good head: bare line ends, control characters (TLS on a plain port), length."""
    controls = data.translate(None, PRINTABLE).replace(b"\r\n", b"")
    if controls not in (b"", b"\r") or (controls and not data.endswith(b"\r")):
        raise Fault(
            "request_malformed", "The head holds a control character or a line that does not end in CRLF."
        )
    if data.find(b"\r\n", 0, request_line_bytes_max + 2) < 0 and len(data) > request_line_bytes_max + 1:
        raise Fault("target_too_long", f"The request line is longer than {request_line_bytes_max} bytes.")
    if len(data) > head_bytes_max:
        raise Fault("head_too_large", f"The head is longer than {head_bytes_max} bytes.")


def read_length(value: bytes) -> int:
    """A Content-Length: digits and nothing else (no sign, no list, no blank)."""
    if not value.isdigit() or len(value) > _LENGTH_DIGITS_MAX:
        raise Fault("request_malformed", "The Content-Length is not a plain number.")
    return int(value)


def _read_method(method: bytes) -> str:
    if not method or method.translate(None, TOKEN) or len(method) > _METHOD_BYTES_MAX:
        raise Fault("request_malformed", "The method is not a name.")
    if method in (b"CONNECT", b"TRACE"):
        raise Fault("method_unsupported", f"{method.decode()} is not served here.")
    return method.decode()


def _listed(value: bytes) -> list[bytes]:
    return [part for part in (p.strip(b" \t") for p in value.split(b",")) if part]


def _names(value: bytes) -> frozenset[bytes]:
    return frozenset(part.lower() for part in _listed(value))


def _bad_version(version: bytes) -> Fault:
    name, _, number = version.partition(b"/")
    major, _, minor = number.partition(b".")
    if name == b"HTTP" and len(major) == len(minor) == 1 and (major + minor).isdigit():
        return Fault("version_unsupported", "Only HTTP/1.1 and HTTP/1.0 are served here.")
    return Fault("request_malformed", "The request line does not end in an HTTP version.")


def _read_host(value: bytes) -> tuple[str, bytes]:
    """A Host (RFC 9110 §7.2): a name, an IPv4 or a bracketed IPv6 address, and perhaps a port."""
    bad = Fault("request_malformed", "The Host header is not a host and perhaps a port.")
    if value.startswith(b"["):
        address, bracket, port = value[1:].partition(b"]")
        if not bracket or b":" not in address or address.translate(None, b"0123456789abcdefABCDEF:."):
            raise bad
        if port and not port.startswith(b":"):
            raise bad
        port = port[1:]
    else:
        name, colon, port = value.partition(b":")
        if not name or name.translate(None, _HOST_CHARACTERS) or (colon and not port):
            raise bad
    if port and (not port.isdigit() or not 0 < int(port[:6]) <= 65535):
        raise bad
    if len(value) > 255 + 6:
        raise bad
    lower = value.lower()
    read = (lower.decode(), b"X-Forwarded-Host: " + lower)
    _keep(_hosts, value, read)
    return read


def _read_connection(value: bytes) -> ConnectionSays:
    says = ConnectionSays(value)
    if len(value) <= 128:
        _keep(_connection_values, value, says)
    return says


def _read_status_line(line: bytes) -> tuple[int, bytes, bool]:
    version, _, rest = line.partition(b" ")
    code, _, phrase = rest.partition(b" ")
    if (
        version not in (b"HTTP/1.1", b"HTTP/1.0")
        or len(code) != 3
        or not code.isdigit()
        or not b"100" <= code <= b"599"
    ):
        raise Fault("upstream_malformed", "a status line that is not HTTP/1")
    if phrase.translate(None, PRINTABLE):
        raise Fault("upstream_malformed", "a control character in the status line")
    read = (int(code), b"HTTP/1.1 " + rest, version == b"HTTP/1.1")
    if len(line) <= 128:
        _keep(_status_lines, line, read)
    return read


def _keep(kept: dict[bytes, Any], key: bytes, value: Any) -> None:
    if len(kept) >= _TOKENS_KEPT_MAX:
        kept.clear()
    kept[key] = value
