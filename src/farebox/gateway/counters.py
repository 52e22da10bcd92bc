"""What a gateway process has counted since it began: plain integers, read by whoever exports them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

#: Upper bounds in seconds; the last bucket is everything above.
LATENCY_BOUNDS_S: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)


class Counters:
    """``requests`` by (route, fare, status class 0–5; 0: no answer), ``refusals`` and ``upstream_errors`` by code."""

    __slots__ = (
        "bytes_down", "bytes_up", "connections_open", "connections_total", "latency_buckets", "latency_seconds_sum", "refusals",
        "requests", "retries", "upstream_errors",
    )  # fmt: skip

    def __init__(self) -> None:
        self.connections_open = 0
        self.connections_total = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.retries = 0
        self.requests: dict[tuple[str, str, int], int] = {}
        self.refusals: dict[str, int] = {}
        self.upstream_errors: dict[str, int] = {}
        self.latency_buckets = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self.latency_seconds_sum = 0.0

    def call(
        self, route: str, fare: str, status: int, bytes_up: int, bytes_down: int, duration_s: float
    ) -> None:
        """One admitted call ended."""
        key = (route, fare, status // 100)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down
        self.latency_buckets[bisect_left(LATENCY_BOUNDS_S, duration_s)] += 1
        self.latency_seconds_sum += duration_s

    def refusal(self, code: str) -> None:
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def upstream_error(self, code: str) -> None:
        self.upstream_errors[code] = self.upstream_errors.get(code, 0) + 1
