"""The control API's answers as Prometheus metrics, in files that the supervisor's ops port sums (docs/operations.md)."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Histogram

REQUESTS: Final = Counter(
    "farebox_api_requests", "Answers of the control API by method and status.", ["method", "status"]
)
LATENCY: Final = Histogram(
    "farebox_api_duration_seconds",
    "Time from a request's head to its answer.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
#: Anything else a client makes up is one label, so that nobody can fill the memory with labels.
_METHODS: Final = frozenset({"GET", "POST", "PATCH", "PUT", "DELETE", "HEAD"})


def observe(method: str, status: int, seconds: float) -> None:
    """Count one answer."""
    REQUESTS.labels(method if method in _METHODS else "other", str(status)).inc()
    LATENCY.observe(seconds)
