"""The head of the answer that goes to the client: written from what the upstream said, what the route changes and what the door adds."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from farebox.app.admission import LIMIT_NAMES, Admitted
from farebox.base.errors import InvariantError
from farebox.gateway.fields import canonical
from farebox.gateway.heads import AnswerHead, RequestHead
from farebox.gateway.routing import Way
from farebox.gateway.trailers import announced

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection
    from farebox.gateway.server import Gateway


def framed_lines(
    gateway: Gateway,
    client: ClientConnection,
    asked: RequestHead,
    head: AnswerHead,
    way: Way,
    admitted: Admitted,
    body_bytes: int,
    last: bool,
) -> tuple[list[bytes], bool]:
    """The lines up to and with how the body is framed, and whether that is in chunks of ours.

    ``body_bytes``: of a body that is all there; -1: more may come. ``last``: the connection cannot be used again after it.
    An answer that only its end frames, or ``last``, takes ``client.keep_alive`` away.
    """
    lines = field_lines(gateway, client, head, way, admitted)
    chunked = False
    status = head.status
    if head.content_length >= 0:
        if status != 204:
            lines.append(b"Content-Length: %d" % head.content_length)
    elif not (asked.method == "HEAD" or status == 204 or status == 304):
        if body_bytes >= 0:
            lines.append(b"Content-Length: %d" % body_bytes)
        elif asked.version_1_1:
            chunked = True
            if head.trailer and asked.block.takes_trailers:
                lines += announced(head.trailer, gateway.answer_book, set_by_us(way, admitted))
            lines.append(b"Transfer-Encoding: chunked")
        else:
            client.keep_alive = False
    elif head.chunked and asked.version_1_1 and status != 204:
        lines.append(b"Transfer-Encoding: chunked")
    if last:
        client.keep_alive = False
    if not client.keep_alive:
        lines.append(b"Connection: close")
    elif not asked.version_1_1:
        lines.append(b"Connection: keep-alive")
    return lines, chunked


def field_lines(
    gateway: Gateway, client: ClientConnection, head: AnswerHead, way: Way, admitted: Admitted
) -> list[bytes]:
    """The lines that do not depend on the body. Where we have something to say, an upstream's line of that name gives way.

    Raises ``InvariantError`` for a value that would begin another line.
    """
    lines = [head.reason, *(way.rewrite_answer(head.lines) if way.rewrites_answer else head.lines)]
    if admitted.answer_headers:
        contested = head.contested
        for name, value in admitted.answer_headers:
            if name not in gateway.contested:
                gateway.contest(name)
                contested = True
            if b"\n" in value or b"\r" in value:
                raise InvariantError(f"the value of {name!r} towards the client has a line end")
        if contested:
            lines = _without(lines, {name.lower() for name, _ in admitted.answer_headers})
        lines += [name + b": " + value for name, value in admitted.answer_headers]
    if admitted.answer_lines:
        if head.contested:
            lines = _without(lines, LIMIT_NAMES)
        lines.append(admitted.answer_lines)
    lines.append(client.request_id_line)
    return lines


def set_by_us(way: Way, admitted: Admitted) -> frozenset[bytes]:
    """Canonical names that we or the route set on the answer."""
    added = {canonical(name.lower()) for name, _ in admitted.answer_headers}
    return way.answer_names | added | (LIMIT_NAMES if admitted.answer_lines else frozenset())


def _without(lines: list[bytes], lower_names: Collection[bytes]) -> list[bytes]:
    return [line for line in lines if line.partition(b":")[0].lower() not in lower_names]
