"""The question to a forward-auth listener and its answer, as bytes (docs/edges.md says what stands in them)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from farebox.inapp.identity import Headers, canonical

HEAD_END: Final = b"\r\n\r\n"
HEAD_BYTES_MAX: Final = 64 * 1024
#: A refusal with prices and quotes has a few KiB.
BODY_BYTES_MAX: Final = 1024 * 1024

_TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PRINTABLE: Final = bytes(c for c in range(256) if (c >= 0x20 and c != 0x7F) or c == 0x09)
_VISIBLE: Final = bytes(range(0x21, 0x7F))
#: Letters, digits, «-», «.», «_», «~» (RFC 3986 §2.3): an app that unescapes finds another path than the routes do.
_NEEDLESS_ESCAPE: Final = re.compile(
    rb"%(?:4[1-9A-Fa-f]|5[0-9Aa]|6[1-9A-Fa-f]|7[0-9Aa]|3[0-9]|2[DdEe]|5[Ff]|7[Ee])"
)

#: The question has these of its own, the connection to the listener others, and a question has no body.
_NOT_ASKED: Final = frozenset(
    {
        b"host", b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"content-length",
        b"upgrade", b"expect", b"http2-settings", b"farebox-edge-secret", b"x-real-ip", b"forwarded", b"x-forwarded-method",
        b"x-forwarded-uri", b"x-forwarded-host", b"x-forwarded-for", b"x-farebox-upstream", b"x-farebox-handed",
    }
)  # fmt: skip


class Unreadable(Exception):
    """A call that cannot be asked about: it could be read in two ways, or is no HTTP. ``status``: the answer to it."""

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.status = status


class Said(NamedTuple):
    """One answer of the listener. Names are lower case."""

    status: int
    headers: Headers
    body: bytes
    keeps_alive: bool

    @property
    def bare(self) -> bool:
        """No refusal of a call but one of the question: neither body nor a type of one."""
        return not self.body and not any(name == b"content-type" for name, _ in self.headers)


class Asking:
    """What stays the same in every question. ``host`` is the listener's."""

    def __init__(self, host: str, key: str) -> None:
        self._head = (
            f"GET /.farebox/authorize HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
            "X-Forwarded-Method: "
        ).encode("ascii")

    def question(self, scope: Mapping[str, Any]) -> bytes:
        """The question about one call. ``Unreadable``: there is none to ask."""
        method = str(scope.get("method", "GET")).encode("latin-1")
        if not method or method.translate(None, _TOKEN):
            raise Unreadable("The method is no token.")
        parts = [self._head, method, b"\r\nX-Forwarded-Uri: ", target_of(scope)]
        hosts: list[bytes] = []
        forwarded: list[bytes] = []
        names: list[bytes] = []
        values: list[bytes] = []
        for name, value in scope["headers"]:
            read = canonical(name)
            if read in _NOT_ASKED:
                if name == b"host":
                    hosts.append(value)
                elif name == b"x-forwarded-for":
                    forwarded.append(value)
                continue
            names.append(name)
            values.append(value)
        if len(hosts) != 1 or hosts[0].translate(None, _VISIBLE):
            raise Unreadable("A call has one Host.")
        values.append(chain_of(scope, forwarded))
        if b"".join(values).translate(None, _PRINTABLE):
            raise Unreadable("A header value holds a control character.")
        if not all(names) or b"".join(names).translate(None, _TOKEN):
            raise Unreadable("A header name is no token.")
        parts += (b"\r\nX-Forwarded-Host: ", hosts[0], b"\r\nX-Forwarded-For: ", values.pop())
        for name, value in zip(names, values, strict=True):
            parts += (b"\r\n", name, b": ", value)
        parts.append(HEAD_END)
        return b"".join(parts)


def target_of(scope: Mapping[str, Any]) -> bytes:
    """Path and query as the client sent them. The path is asked about as received, while the app goes by the unescaped
    one: where these two could lead to different routes, ``Unreadable``."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        raise Unreadable("The server of this app does not say which path it received (raw_path).", 503)
    query: bytes = scope.get("query_string", b"")
    if not raw.startswith(b"/") or raw.translate(None, _VISIBLE) or query.translate(None, _VISIBLE):
        raise Unreadable("The path or the query holds a blank or a character beyond ASCII: escape it.")
    path = raw.decode("ascii")
    if "%" in path:
        if _NEEDLESS_ESCAPE.search(raw):
            raise Unreadable("The path escapes a character that needs no escape: send it as it is.")
        path = unquote(path)
    if path != scope["path"]:
        raise Unreadable("The path that is asked about and the one that the app goes by differ.")
    return raw + b"?" + query if query else raw


def chain_of(scope: Mapping[str, Any], forwarded: Iterable[bytes]) -> bytes:
    """X-Forwarded-For with whoever connected to the app at its end, as any proxy writes it: whether that one's word is
    taken on those before is said by ``server.trusted_proxies``. A Unix socket's peer is this machine."""
    client = scope.get("client")
    peer = str(client[0]).partition("%")[0] if client and client[0] else "127.0.0.1"
    return b", ".join([*forwarded, peer.encode("latin-1", "replace")])


def read_head(data: bytes, end: int) -> tuple[Said, int]:
    """An answer's head, which ends at ``end``, and the length of the body that follows. Raises ``ValueError`` for what no
    listener of ours says."""
    lines = data[:end].split(b"\r\n")
    if lines[0][:9] != b"HTTP/1.1 ":
        raise ValueError("no HTTP/1.1")
    headers: Headers = []
    length, keeps_alive = 0, True
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            raise ValueError("a line that is no header")
        name, value = name.lower(), value.strip(b" \t")
        if name == b"content-length":
            length = int(value)
            if not 0 <= length <= BODY_BYTES_MAX:
                raise ValueError("a body too long")
        elif name == b"transfer-encoding":
            raise ValueError("a body in chunks")
        elif name == b"connection":
            keeps_alive = value.lower() != b"close"
        headers.append((name, value))
    return Said(int(lines[0][9:12]), headers, b"", keeps_alive), length
