"""The gateway's numbers for Prometheus: plain integers on the hot path, carried over once a second."""

from __future__ import annotations

from collections.abc import Iterable
from math import nan
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from farebox.gateway.counters import LATENCY_BOUNDS_S, Counters
from farebox.gateway.health import TargetHealth

_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")


class GatewayMetrics:
    """Registers the metrics of this process (prometheus_client's multiprocess mode) and remembers what it has carried over."""

    def __init__(self) -> None:
        self._requests = Counter(
            "farebox_gateway_requests", "Admitted calls that ended.", ["route", "fare", "status"]
        )
        self._refusals = Counter("farebox_gateway_refusals", "Calls refused, by problem code.", ["code"])
        self._upstream_errors = Counter(
            "farebox_gateway_upstream_errors", "Calls an upstream failed, by problem code.", ["code"]
        )
        self._bytes = Counter("farebox_gateway_bytes", "Bytes of bodies.", ["direction"])
        self._connections_total = Counter("farebox_gateway_connections", "Client connections taken.")
        self._retries = Counter("farebox_gateway_upstream_retries", "Calls sent again on a fresh connection.")
        self._latency = Histogram(
            "farebox_gateway_call_seconds",
            "From the request's head to the end of the answer.",
            buckets=LATENCY_BOUNDS_S,
        )
        self._connections = Gauge(
            "farebox_gateway_connections_open", "Client connections open.", multiprocess_mode="livesum"
        )
        self._in_flight = Gauge(
            "farebox_gateway_calls_in_flight", "Calls admitted and not ended.", multiprocess_mode="livesum"
        )
        self._grants = Gauge(
            "farebox_gateway_grants_known", "Keys and passes in memory.", multiprocess_mode="livesum"
        )
        self._spool_bytes = Gauge(
            "farebox_spool_bytes", "Size of the spool on this host.", multiprocess_mode="livemax"
        )
        self._targets = Gauge(
            "farebox_upstream_target_healthy",
            "Whether calls are sent to a target; in the process that thinks least of it.",
            ["upstream", "target"],
            multiprocess_mode="livemin",
        )
        self._targets_shown: set[tuple[str, str]] = set()
        self._carried: dict[tuple[str, ...], float] = {}

    def flush(
        self,
        counters: Counters,
        spool_bytes: int,
        calls_in_flight: int,
        grants_known: int,
        targets: Iterable[TargetHealth] = (),
    ) -> None:
        """Carry over what has been counted since the last time."""
        for (route, fare, status_class), count in counters.requests.items():
            labels = (route, fare, _CLASSES[status_class])
            self._carry(self._requests.labels(*labels), count, "requests", *labels)
        for code, count in counters.refusals.items():
            self._carry(self._refusals.labels(code), count, "refusals", code)
        for code, count in counters.upstream_errors.items():
            self._carry(self._upstream_errors.labels(code), count, "upstream_errors", code)
        self._carry(self._bytes.labels("up"), counters.bytes_up, "bytes", "up")
        self._carry(self._bytes.labels("down"), counters.bytes_down, "bytes", "down")
        self._carry(self._connections_total, counters.connections_total, "connections")
        self._carry(self._retries, counters.retries, "retries")
        # A histogram has no way to observe many at once; its buckets are counters like the rest.
        for number, count in enumerate(counters.latency_buckets):
            self._latency._buckets[number].inc(self._gained(count, "latency", str(number)))
        self._latency._sum.inc(self._gained(counters.latency_seconds_sum, "latency_sum"))
        self._connections.set(counters.connections_open)
        self._in_flight.set(calls_in_flight)
        self._grants.set(grants_known)
        self._spool_bytes.set(spool_bytes)
        self._show(targets)

    def _show(self, targets: Iterable[TargetHealth]) -> None:
        shown = set()
        for health in targets:
            labels = (health.upstream_id, health.target)
            self._targets.labels(*labels).set(1 if health.healthy else 0)
            shown.add(labels)
        for labels in self._targets_shown - shown:
            # The files that processes share their values in cannot forget a label: no value is the next best thing.
            self._targets.labels(*labels).set(nan)
        self._targets_shown = shown

    def _carry(self, counter: Counter, value: float, *name: str) -> None:
        gained = self._gained(value, *name)
        if gained:
            counter.inc(gained)

    def _gained(self, value: float, *name: str) -> float:
        gained = value - self._carried.get(name, 0)
        self._carried[name] = value
        return gained
