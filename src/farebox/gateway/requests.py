"""The request that goes upstream: written from what the client sent, what the route changes and what the door adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from farebox.app.admission import Admitted, Call
from farebox.app.credentials import is_ours
from farebox.base.errors import InvariantError
from farebox.gateway.bodies import LAST_CHUNK, chunk
from farebox.gateway.fields import canonical
from farebox.gateway.forwarding import lines_for_proxy
from farebox.gateway.heads import RequestHead
from farebox.gateway.pools import UpstreamPool
from farebox.gateway.routing import Way

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection

_NAMES_KEPT_MAX: Final = 4096
_claimable: dict[bytes, bytes] = {}


def request_bytes(
    client: ClientConnection,
    head: RequestHead,
    call: Call,
    way: Way,
    pool: UpstreamPool,
    admitted: Admitted,
    payload: bytes,
    ended: bool,
    last_chunk: bytes = LAST_CHUNK,
) -> bytes:
    """Head and first bytes of the body (``payload``; ``ended``: that is all of it), framed for the upstream."""
    block = head.block
    lines = block.lines
    ours = way.our_names
    added: list[bytes] = []
    for name, value in admitted.forward_headers:
        lower = _claimable.get(name)
        if lower is None:
            lower = _claim(name)
        if lower and lower not in ours:
            ours |= {lower}
        if b"\n" in value or b"\r" in value:
            raise InvariantError(f"the value of {name!r} towards the upstream has a line end")
        added.append(name + b": " + value)
    if ours:
        lines = _without(lines, ours)
    host_line, prefix = pool.host_line, b""
    if way.rewrites_request:
        target, prefix = way.target(head.target, head.path, call.params)
        line = b"%b %b%b HTTP/1.1" % (call.method.encode(), pool.base_path, target)
        if way.keeps_host:
            host_line = b"Host: " + block.host.encode()
    elif pool.base_path or not head.version_1_1:
        line = b"%b %b%b HTTP/1.1" % (call.method.encode(), pool.base_path, head.target)
    else:
        line = head.line
    lines = [line, *lines]
    fare = admitted.fare
    if block.credentials and (fare != "pass" or len(block.credentials) > 1 or block.names_pass):
        # Where a single line authorizes a call by pass it is the pass. A paid or free call may carry one as well.
        credentials = block.credentials if fare == "account" else _not_ours(block.credentials)
        lines += _without(credentials, ours) if ours else credentials
    lines.append(host_line)
    if client.trusted:
        lines += lines_for_proxy(client.peer, block.forwarded, call.client_address, block.host, prefix)
    else:
        lines.append(client.forwarded_lines)
        lines.append(block.forwarded_host_line)
        if prefix:
            lines.append(b"X-Forwarded-Prefix: " + prefix)
    if call.body is not None:
        if call.body or block.content_length >= 0 or block.chunked:
            lines.append(b"Content-Length: %d" % len(call.body))
    elif block.chunked:
        lines.append(b"Transfer-Encoding: chunked")
        payload = chunk(payload) + last_chunk if ended else chunk(payload)
    elif block.content_length >= 0:
        lines.append(b"Content-Length: %d" % block.content_length)
    if block.upgrade and head.version_1_1:
        lines += (b"Connection: Upgrade", b"Upgrade: " + block.upgrade)
    if admitted.forward_lines:
        lines.append(admitted.forward_lines)
    lines += added
    lines.append(b"")
    lines.append(payload)
    return b"\r\n".join(lines)


def _without(lines: Sequence[bytes], names: frozenset[bytes]) -> list[bytes]:
    return [line for line in lines if canonical(line.partition(b":")[0].lower()) not in names]


def _claim(name: bytes) -> bytes:
    """The canonical form of a name that decisions set towards the upstream; empty for those that no client can set."""
    lower = canonical(name.lower())
    if lower.startswith(b"farebox-"):
        lower = b""
    if len(_claimable) >= _NAMES_KEPT_MAX:
        _claimable.clear()
    _claimable[name] = lower
    return lower


def _not_ours(credentials: Sequence[bytes]) -> list[bytes]:
    return [line for line in credentials if not is_ours(line.partition(b":")[2].strip(b" \t"))]
