"""What a refusal looks like on the wire: one table from code to status, one problem+json (RFC 9457)."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Final

import structlog

from farebox.app.admission import Headers, Refusal
from farebox.base.errors import Reason

log = structlog.get_logger(__name__)

#: Reason.code → status. The only place of the gateway that knows both.
STATUS: Final[dict[str, int]] = {
    # the request itself
    "request_malformed": 400,
    "request_timeout": 408,
    "body_too_large": 413,
    "target_too_long": 414,
    "expectation_failed": 417,
    "head_too_large": 431,
    "upgrade_unsupported": 501,
    "method_unsupported": 501,
    "version_unsupported": 505,
    # the route
    "route_unknown": 404,
    "method_not_allowed": 405,
    "not_for_sale": 403,
    "hand_over": 421,  # forward-auth: an edge gives this call to the gateway
    # credentials and grants
    "credential_missing": 401,
    "credential_malformed": 401,
    "credential_unknown": 401,
    "credential_revoked": 401,
    "pass_ended": 401,
    "pass_unknown": 401,
    "not_covered": 403,
    "pass_exhausted": 402,
    "quota_exceeded": 429,
    "window_exceeded": 429,
    "concurrency_exceeded": 429,
    "budget_exceeded": 429,
    # payments and purchases
    "payment_required": 402,
    "payment_invalid": 402,
    "payment_used": 402,
    "payment_malformed": 400,
    "payment_in_flight": 409,
    "outcome_unknown": 409,
    "answer_gone": 409,
    "settlement_unknown": 503,
    "settlement_failed": 402,
    "quote_malformed": 400,
    "quote_unknown": 404,
    "quote_expired": 410,
    "purchase_unknown": 404,
    "purchase_malformed": 400,
    "idempotency_key_missing": 400,
    "idempotency_conflict": 409,
    "not_found": 404,
    # the world
    "unavailable": 503,
    "draining": 503,
    "upstream_busy": 503,
    "upstream_unreachable": 502,
    "upstream_failed": 502,
    "upstream_malformed": 502,
    "upstream_timeout": 504,
    # ours
    "internal_error": 500,
}

_PHRASE: Final = {int(s): s.phrase for s in HTTPStatus} | {402: "Payment Required"}
_STATUS_LINE: Final = {code: f"HTTP/1.1 {code} {phrase}".encode() for code, phrase in _PHRASE.items()}
_RESERVED: Final = frozenset({"type", "title", "status", "detail", "code", "request_id", "field"})


class Fault(Exception):
    """A message that breaks a rule of HTTP or of this gateway: a code of ``STATUS`` and what to do about it."""

    def __init__(self, code: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s


def refusal(code: str, message: str, retry_after_s: float | None = None) -> Refusal:
    """A refusal of the gateway's own."""
    return Refusal(Reason(code, message), retry_after_s=retry_after_s)


def status_line(status: int) -> bytes:
    """``HTTP/1.1 200 OK`` without the line end."""
    return _STATUS_LINE.get(status) or b"HTTP/1.1 %d Unknown" % status


def problem(refused: Refusal, request_id: str) -> tuple[int, Headers, bytes]:
    """Status, headers (without Content-Length) and body of a refusal.

    A code that the table lacks is our fault, never the caller's: it becomes a 500 that names the request, and is logged.
    """
    reason = refused.reason
    status = STATUS.get(reason.code)
    if status is None:
        log.error("refusal_code_unknown", code=reason.code, message=reason.message, request_id=request_id)
        reason = Reason(
            "internal_error", "Something went wrong on our side; quote the request id when you report it."
        )
        status = 500
    document: dict[str, object] = {
        "type": f"urn:farebox:problem:{reason.code}",
        "title": _PHRASE[status],
        "status": status,
        "detail": reason.message,
        "code": reason.code,
        "request_id": request_id,
    }
    if reason.field:
        document["field"] = reason.field
    for name, value in reason.facts.items():
        if name not in _RESERVED:
            document[name] = value
    headers: Headers = [(b"Content-Type", b"application/problem+json"), *refused.answer_headers]
    given = {name.lower() for name, _ in refused.answer_headers}
    if refused.retry_after_s is not None and b"retry-after" not in given:
        headers.append((b"Retry-After", b"%d" % max(1, math.ceil(refused.retry_after_s))))
    if status == 401 and b"www-authenticate" not in given:
        headers.append((b"WWW-Authenticate", b'Bearer realm="farebox"'))
    if b"cache-control" not in given:
        headers.append((b"Cache-Control", b"no-store"))
    return status, headers, json.dumps(document, default=str).encode()
