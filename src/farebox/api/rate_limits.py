"""How often a key may ask: a token bucket each, refilled evenly, in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BUCKETS_MAX: Final = 50_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """``reset_s``: until the bucket is full again; ``retry_after_s`` is above zero when the request is refused."""

    limit: int
    remaining: int
    reset_s: float
    retry_after_s: float = 0.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimits:
    """``per_minute`` requests a name, all of which may come at once; 0 means no limit."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._per_second = per_minute / 60
        self._monotonic = monotonic
        self._buckets: dict[str, _Bucket] = {}

    def take(self, name: str) -> Allowance | None:
        """Count one request of a name. None: there is no limit."""
        if self._per_minute == 0:
            return None
        now = self._monotonic()
        bucket = self._buckets.get(name)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[name] = _Bucket(float(self._per_minute), now)
        bucket.tokens = min(float(self._per_minute), bucket.tokens + (now - bucket.at) * self._per_second)
        bucket.at = now
        if bucket.tokens < 1:
            return Allowance(
                self._per_minute, 0, self._until_full(bucket), (1 - bucket.tokens) / self._per_second
            )
        bucket.tokens -= 1
        return Allowance(self._per_minute, int(bucket.tokens), self._until_full(bucket))

    def look(self, name: str) -> Allowance | None:
        """What the next ``take`` would say, without counting. None: there is no limit, or nothing was counted yet."""
        bucket = self._buckets.get(name)
        if self._per_minute == 0 or bucket is None:
            return None
        tokens = bucket.tokens + (self._monotonic() - bucket.at) * self._per_second
        wait_s = 0.0 if tokens >= 1 else (1 - tokens) / self._per_second
        return Allowance(self._per_minute, int(tokens), self._until_full(bucket), wait_s)

    def _until_full(self, bucket: _Bucket) -> float:
        return (self._per_minute - bucket.tokens) / self._per_second

    def _make_room(self, now: float) -> None:
        """Drop buckets that are full again: a full one and none at all are the same."""
        if len(self._buckets) < BUCKETS_MAX:
            return
        self._buckets = {n: b for n, b in self._buckets.items() if now - b.at < 60}
        if len(self._buckets) >= BUCKETS_MAX:
            self._buckets.clear()
