"""What a pass may hold, and how each limit is kept: pure values and state machines, without a clock or a database.

Amounts (``calls``, ``upload_bytes``, ``download_bytes``, ``credits``) are spent once for the life of the pass. ``concurrency``
is a number of slots that come back when a call ends. ``requests`` counts calls in windows of fixed length. Rates pace and
never refuse. All limits of a grant hold together or the call is not admitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Protocol

#: ``quota`` is an account's; all others are a pass's.
LimitKind = Literal[
    "quota",
    "calls",
    "upload_bytes",
    "download_bytes",
    "credits",
    "concurrency",
    "requests",
    "upload_rate",
    "download_rate",
]


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes of a body a second, kept over each window of ``window_s`` seconds by all gateway processes together."""

    bytes_per_second: int
    window_s: int = 60


@dataclass(frozen=True, slots=True)
class RequestWindow:
    """At most ``count`` calls in each window of ``window_s`` seconds."""

    count: int
    window_s: int


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What a pass holds; None: not limited. Bytes are those of bodies (and of both ways of a tunnel), not of heads."""

    calls: int | None = None
    upload_bytes: int | None = None
    download_bytes: int | None = None
    credits: int | None = None
    concurrency: int | None = None
    requests: RequestWindow | None = None
    upload_rate: Rate | None = None
    download_rate: Rate | None = None


#: A pass that is bounded by time alone.
NO_LIMITS: Final = PassLimits()


def limits_document(limits: PassLimits) -> dict[str, Any]:
    """The limits as plain JSON values: in tokens, quotes, the API and the database. What is not limited is left out.

    ``{"calls": 1000, "requests": {"count": 100, "window_s": 60}, "upload_rate": {"bytes_per_second": 50000, "window_s": 60}}``
    """
    return {name: value for name, value in asdict(limits).items() if value is not None}


def limits_from_document(document: Mapping[str, Any]) -> PassLimits:
    """The inverse of ``limits_document``."""
    requests, upload, download = (document.get(n) for n in ("requests", "upload_rate", "download_rate"))
    return PassLimits(
        calls=document.get("calls"),
        upload_bytes=document.get("upload_bytes"),
        download_bytes=document.get("download_bytes"),
        credits=document.get("credits"),
        concurrency=document.get("concurrency"),
        requests=requests and RequestWindow(requests["count"], requests["window_s"]),
        upload_rate=upload and Rate(upload["bytes_per_second"], upload["window_s"]),
        download_rate=download and Rate(download["bytes_per_second"], download["window_s"]),
    )


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────

#: One unit a call, taken before it is forwarded.
CALL_KINDS: Final[frozenset[LimitKind]] = frozenset({"quota", "calls", "credits", "requests", "concurrency"})
#: Spent by what passes; a transfer is cut at the exact byte.
BYTE_KINDS: Final[frozenset[LimitKind]] = frozenset({"upload_bytes", "download_bytes"})
#: Paced, never refused, never cut.
RATE_KINDS: Final[frozenset[LimitKind]] = frozenset({"upload_rate", "download_rate"})

#: A rate's burst: what passes in this time, but never less than BURST_BYTES_MIN nor more than a window's bytes.
BURST_S: Final = 0.25
BURST_BYTES_MIN: Final = 16_384
#: Who has used up a rate waits for this much of a second's bytes, so that bytes do not trickle one by one.
PACE_S: Final = 0.05
#: Nobody is told to wait less than this: clocks and sleeps are no finer.
WAIT_S_MIN: Final = 0.001


# ── the limits as state machines: the rules that slices of them (app/leases.py, store/limits.py) keep between processes ──


class Limit(Protocol):
    """What a call takes one or more units of, and may give back."""

    def allows(self, units: int = 1) -> bool: ...

    def take(self, units: int = 1) -> bool:
        """All of the units, or none of them."""
        ...

    def give_back(self, units: int = 1) -> None: ...


@dataclass(slots=True)
class Amount:
    """Spent once for the life of a pass. ``spent`` may pass ``capacity`` only by ``overdraw``."""

    capacity: int
    spent: int = 0

    @property
    def left(self) -> int:
        return self.capacity - self.spent

    @property
    def exhausted(self) -> bool:
        return self.left <= 0

    def allows(self, units: int = 1) -> bool:
        return units <= self.left

    def take(self, units: int = 1) -> bool:
        if not self.allows(units):
            return False
        self.spent += units
        return True

    def take_up_to(self, units: int) -> int:
        """As many of the units as are left: a transfer is cut at the exact byte."""
        taken = max(0, min(units, self.left))
        self.spent += taken
        return taken

    def overdraw(self, units: int) -> None:
        """A call turned out to cost more than was left when it had been served already."""
        self.spent += units

    def give_back(self, units: int = 1) -> None:
        """Never more comes back than was spent: nobody's balance rises above what was bought."""
        self.spent = max(0, self.spent - units)


@dataclass(slots=True)
class Slots:
    """So many at once."""

    capacity: int
    taken: int = 0

    def allows(self, units: int = 1) -> bool:
        return self.taken + units <= self.capacity

    def take(self, units: int = 1) -> bool:
        if not self.allows(units):
            return False
        self.taken += units
        return True

    def give_back(self, units: int = 1) -> None:
        self.taken = max(0, self.taken - units)


@dataclass(slots=True)
class Window:
    """So many in each window ``[start_s, start_s + window_s)``, aligned to the epoch."""

    capacity: int
    window_s: int
    start_s: int = 0
    counted: int = 0

    def turn_over(self, now_s: float) -> None:
        """Begin the window that ``now_s`` lies in, if it is a later one. A clock set back turns nothing back."""
        start_s = math.floor(now_s / self.window_s) * self.window_s
        if start_s > self.start_s:
            self.start_s, self.counted = start_s, 0

    @property
    def end_s(self) -> int:
        return self.start_s + self.window_s

    def allows(self, units: int = 1) -> bool:
        return self.counted + units <= self.capacity

    def take(self, units: int = 1) -> bool:
        if not self.allows(units):
            return False
        self.counted += units
        return True

    def give_back(self, units: int = 1, start_s: int | None = None) -> None:
        """``start_s`` is that of the window they were taken in (None: this one); those of an earlier one are gone with it."""
        if start_s is None or start_s == self.start_s:
            self.counted = max(0, self.counted - units)


class Pace:
    """A token bucket: over any ``T`` seconds at most ``rate * T + burst`` bytes pass.

    ``rate`` is in bytes a second and may change (``turn_to``); ``now_s`` is any clock that never runs backwards.
    """

    __slots__ = ("_at_s", "_level", "burst", "rate", "window_s")

    def __init__(self, rate: int, window_s: int, now_s: float) -> None:
        self.window_s = window_s
        self.rate = rate
        self.burst = burst_bytes(rate, window_s)
        self._level = float(self.burst)  # bytes that may pass now
        self._at_s = now_s

    def take(self, now_s: float, size: int) -> int:
        """How many of ``size`` bytes may pass now."""
        self._fill(now_s)
        allowed = min(size, int(self._level))
        self._level -= allowed
        return allowed

    def give_back(self, size: int) -> None:
        """Bytes that were taken and did not pass."""
        self._level = min(float(self.burst), self._level + size)

    def wait_s(self, now_s: float) -> float:
        """Seconds until some more may pass: a piece worth sending. ``inf`` at rate 0."""
        self._fill(now_s)
        piece = min(float(self.burst), max(1.0, self.rate * PACE_S))
        missing = piece - self._level
        if missing <= 0:
            return 0.0
        return max(WAIT_S_MIN, missing / self.rate) if self.rate else math.inf

    def turn_to(self, rate: int, now_s: float) -> None:
        """Another rate from now on; 0: nothing flows in. What may pass at once never grows by it, so that turning back and
        forth gains nothing."""
        self._fill(now_s)
        self.rate = rate
        if rate:
            self.burst = burst_bytes(rate, self.window_s)
            self._level = min(self._level, float(self.burst))

    def _fill(self, now_s: float) -> None:
        if now_s > self._at_s:
            self._level = min(float(self.burst), self._level + (now_s - self._at_s) * self.rate)
            self._at_s = now_s


def burst_bytes(rate: int, window_s: int) -> int:
    """What may pass at once where ``rate`` bytes a second are kept over ``window_s`` seconds."""
    return max(1, min(max(BURST_BYTES_MIN, int(rate * BURST_S)), rate * window_s))


def take_all(limits: Sequence[Limit], units: int = 1) -> bool:
    """So many units of every limit, or nothing of any."""
    if not all(limit.allows(units) for limit in limits):
        return False
    for limit in limits:
        limit.take(units)
    return True
