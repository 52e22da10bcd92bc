"""Whose fault it is.

    FareboxError
    ├── Refused          the caller's: says what to do; never retried as it is
    ├── Unavailable      the world's: says when to come back
    └── InvariantError   ours: stop, roll back, look

A ``Reason`` is a small frozen value with a stable ``code``; it knows nothing of HTTP. Each edge keeps one table
from code to status. Expected outcomes on hot paths are returned, not raised.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was refused.

    ``code`` is stable (clients match on it), ``message`` says what happened and what to do next, ``field`` names
    the input at fault as a path (``charges[0].properties.tiers``), ``facts`` are values a caller can act on.
    """

    code: str
    message: str
    field: str | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class FareboxError(Exception):
    """Everything Farebox raises on purpose."""


class Refused(FareboxError):
    """The caller's fault. Carries one reason, or several when a document has several faults."""

    def __init__(self, *reasons: Reason) -> None:
        if not reasons:
            raise InvariantError("Refused needs at least one reason")
        super().__init__("; ".join(f"{r.field}: {r.message}" if r.field else r.message for r in reasons))
        self.reasons = reasons

    @property
    def reason(self) -> Reason:
        """The first (often the only) reason."""
        return self.reasons[0]


class Unavailable(FareboxError):
    """The world's fault: a database, a chain, a facilitator. ``retry_after_s`` says when to come back."""

    def __init__(self, what: str, retry_after_s: float = 1.0) -> None:
        super().__init__(what)
        self.what = what
        self.retry_after_s = retry_after_s


class InvariantError(FareboxError):
    """Ours: a law of the house was broken. Nothing may continue as if it had not been."""


def refuse(code: str, message: str, field: str | None = None, **facts: Any) -> Refused:
    """Build the exception for one reason: ``raise refuse("METRIC_UNKNOWN", "…", "metric_key")``."""
    return Refused(Reason(code, message, field, facts))
