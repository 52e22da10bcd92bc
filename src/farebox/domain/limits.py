"""What a pass may hold, and how each limit is kept: pure values and state machines, without a clock or a database.

Amounts (``calls``, ``upload_bytes``, ``download_bytes``, ``credits``) are spent once for the life of the pass. ``concurrency``
is a number of slots that come back when a call ends. ``requests`` counts calls in windows of fixed length. Rates pace and
never refuse. All limits of a grant hold together or the call is not admitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
