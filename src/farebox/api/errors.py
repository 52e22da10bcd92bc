"""The one table from reasons to statuses, and the one shape of an error answer.

    {"error": {"code": "METRIC_UNKNOWN", "message": "…", "field": "charges[0].metric_key", "request_id": "req_…",
               "facts": {…}, "faults": [{"code", "message", "field"}, …]}}

``facts`` and ``faults`` stand there only when there is something to say: values a caller can act on, and all faults of a
document that has several (the first one is told twice).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from farebox.base.errors import Reason, Refused, Unavailable

#: Codes whose status does not follow from their last word (``_STATUS_OF_ENDING``). What is in neither is 422.
_STATUS_OF_CODE: Final = {
    "API_KEY_MISSING": 401,
    "API_KEY_UNKNOWN": 401,
    "API_KEY_ENDED": 401,
    "SCOPE_MISSING": 403,
    "SANDBOX_ONLY": 403,
    "TEST_CLOCK_LIVE": 403,
    "PATH_UNKNOWN": 404,
    "METHOD_NOT_ALLOWED": 405,
    "BODY_TIMEOUT": 408,
    "BODY_TOO_LARGE": 413,
    "BATCH_TOO_LARGE": 413,
    "CONTENT_TYPE_UNSUPPORTED": 415,
    "RATE_LIMITED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "FIELD_MISSING": 400,
    "FIELD_UNKNOWN": 400,
    "CURSOR_INVALID": 400,
    "LIMIT_OUT_OF_RANGE": 400,
    "IDEMPOTENCY_KEY_INVALID": 400,
    "BATCH_EMPTY": 400,
    "DECIMAL_NOT_FINITE": 400,
    "PASS_UNKNOWN": 404,
    "PAYMENT_UNKNOWN": 404,
    "CALCULATION_STALE": 409,
    "PERIOD_ALREADY_INVOICED": 409,
    "METRIC_KEY_DUPLICATE": 409,
    "CUSTOMER_ID_DUPLICATE": 409,
    "API_KEY_LAST_ADMIN": 409,
    "CUSTOMER_HAS_SUBSCRIPTIONS": 409,
}

_STATUS_OF_ENDING: Final = (
    ("_MALFORMED", 400),
    ("_NOT_FOUND", 404),
    ("_CONFLICT", 409),
    ("_IN_PROGRESS", 409),
)

#: A document with a malformed value is malformed, whatever else is wrong with it.
_GRAVITY: Final = (400, 404, 409, 422)


def status_of(code: str) -> int:
    """The HTTP status of a reason's code."""
    known = _STATUS_OF_CODE.get(code)
    if known is not None:
        return known
    return next((status for ending, status in _STATUS_OF_ENDING if code.endswith(ending)), 422)


def status_of_all(reasons: Sequence[Reason]) -> int:
    """The status of several reasons together: malformed before not found before refused by a rule."""
    statuses = {status_of(reason.code) for reason in reasons}
    return next((status for status in _GRAVITY if status in statuses), min(statuses))


def error_document(reasons: Sequence[Reason], request_id: str) -> dict[str, Any]:
    """The body of an error answer."""
    first = reasons[0]
    error: dict[str, Any] = {
        "code": first.code,
        "message": first.message,
        "field": first.field,
        "request_id": request_id,
    }
    if first.facts:
        error["facts"] = {name: _plain(value) for name, value in first.facts.items()}
    if len(reasons) > 1:
        error["faults"] = [{"code": r.code, "message": r.message, "field": r.field} for r in reasons]
    return {"error": error}


def error_answer(error: Refused | Unavailable, request_id: str) -> tuple[int, bytes, float | None]:
    """(status, body, seconds for ``Retry-After`` or None) of a refusal or an outage."""
    if isinstance(error, Unavailable):
        # What is out of reach is for the log: a driver's words may name hosts and users.
        reason = Reason("UNAVAILABLE", "Farebox cannot answer right now: send the same request again shortly")
        return 503, as_json(error_document([reason], request_id)), error.retry_after_s
    body = as_json(error_document(error.reasons, request_id))
    retry_after_s = error.reason.facts.get("retry_after_s")
    return status_of_all(error.reasons), body, float(retry_after_s) if retry_after_s is not None else None


def as_json(document: Any) -> bytes:
    """Compact UTF-8 JSON. ``Decimal`` never gets here: answers write decimals as strings."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def retry_after(seconds: float) -> str:
    """Whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Decimal | float):
        return f"{value:f}"
    return str(value)
