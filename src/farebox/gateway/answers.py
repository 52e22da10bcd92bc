"""Answers of our own: refusals, stored answers and pages, as bytes, and which refusal fits what went wrong."""

from __future__ import annotations

from typing import Final

import structlog

from farebox.app.admission import Headers, Refusal
from farebox.base.errors import FareboxError, Refused, Unavailable
from farebox.gateway.fields import TOKEN
from farebox.gateway.heads import RequestHead
from farebox.gateway.problems import Fault, refusal, status_line

log = structlog.get_logger(__name__)

_NO_ROOM_RETRY_S: Final = 2.0
#: Never copied from a stored answer or one of our pages: they are about the connection or written here.
_OWN_TO_WRITE: Final = frozenset(
    {
        b"content-length",
        b"transfer-encoding",
        b"connection",
        b"keep-alive",
        b"farebox-request-id",
        b"farebox-sandbox",
    }
)


def written(
    status: int,
    headers: Headers,
    body: bytes,
    *,
    to: RequestHead | None,
    date: bytes,
    request_id_line: bytes,
    keep_alive: bool,
) -> bytes:
    """A whole answer as it goes out. ``to``: the request; None when it was not even one."""
    lines = [status_line(status)]
    for name, value in headers:
        if name.lower() in _OWN_TO_WRITE or name.translate(None, TOKEN) or b"\n" in value or b"\r" in value:
            continue
        lines.append(b"%b: %b" % (name, value))
    if status != 204 and status != 304:
        lines.append(b"Content-Length: %d" % len(body))
    lines.append(b"Date: " + date)
    lines.append(request_id_line)
    if not keep_alive:
        lines.append(b"Connection: close")
    elif to is not None and not to.version_1_1:
        lines.append(b"Connection: keep-alive")
    lines.append(b"")
    lines.append(b"" if (to is not None and to.method == "HEAD") or status in (204, 304) else body)
    return b"\r\n".join(lines)


def unrouted(allowed: frozenset[str]) -> Refusal:
    """For a path that no route takes, or none with this method."""
    if not allowed:
        return refusal("route_unknown", "No route takes this path; /.farebox/quotes lists what is on sale.")
    names = ", ".join(sorted(allowed))
    refused = refusal("method_not_allowed", f"This path takes {names}.")
    refused.answer_headers.append((b"Allow", names.encode()))
    return refused


def refusal_of(exc: Exception, request_id: str) -> Refusal:
    """For what was raised where a decision was expected. A fault of ours is logged and not told."""
    if isinstance(exc, Unavailable):
        return refusal("unavailable", f"{exc.what}; come back later.", exc.retry_after_s)
    if isinstance(exc, Refused):
        return Refusal(exc.reason)
    log.error("call_failed", request_id=request_id, exc_info=exc, ours=isinstance(exc, FareboxError))
    return refusal(
        "internal_error", "Something went wrong on our side; quote the request id when you report it."
    )


def too_large(bytes_max: int) -> Fault:
    return Fault("body_too_large", f"The body is longer than the {bytes_max} bytes taken here.")


def too_much_held() -> Fault:
    return Fault(
        "budget_exceeded",
        "Too many request bodies of this address are held at the moment; send this one again in a moment.",
        _NO_ROOM_RETRY_S,
    )


def no_room() -> Fault:
    return Fault(
        "unavailable",
        "Too many request bodies are held at the moment; send this one again in a moment.",
        _NO_ROOM_RETRY_S,
    )
