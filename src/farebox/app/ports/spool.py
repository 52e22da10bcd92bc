"""Where admitted calls are written down before they are forwarded: the gateway's local files (gateway/spool.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from farebox.domain.access import FareKind


@dataclass(frozen=True, slots=True)
class Rider:
    """What all calls of one grant (or payer) on one route have in common. Empty text: not known, not there.

    ``metric_key`` empty: the call is admitted and counted against its limits, but no usage event is made of it.
    ``billed_when_orphaned``: whether a call counts whose process died before the answer was known.
    ``metered``: its bytes or credits are limited, so that how it ends is written down even where detail is dropped.
    """

    fare: FareKind
    route_id: str
    metric_key: str = ""
    value: str = "1"
    customer_id: str = ""
    grant_id: str = ""
    pass_id: str = ""
    payer: str = ""
    billed_when_orphaned: bool = True
    metered: bool = False


class SpoolFull(Exception):
    """The record could not be written: the disk or the spool's own limit is full. The call must not be forwarded."""


class CallSpool(Protocol):
    """Two records a call. Both survive the death of the process the moment the method returns."""

    def stub(self, rider: Rider) -> bytes:
        """The rider as it is written into each record; keep it, it is the slow part."""
        ...

    def admitted(self, request_id: str, stub: bytes, lease_ids: Sequence[int]) -> int:
        """Note a call that spends one unit of each lease, before it is forwarded. Returns the number to give to ``done``;
        0 when the spool keeps no details (such a call is billed as it stands). Raises ``SpoolFull``."""
        ...

    def done(
        self,
        number: int,
        status: int,
        bytes_up: int,
        bytes_down: int,
        billed: bool,
        used: Sequence[tuple[int, int]] = (),
        credits: int | None = None,
    ) -> None:
        """Note how a call ended. ``billed`` False: nothing is owed for it, and the units it was admitted with are free again.

        ``used``: lease id → units used of it in all, as it stands with this call at its end, for each lease of bytes that
        it took from, and for that of credits if it did not cost one. ``credits`` it cost, for the usage event (negative:
        it brought some).
        """
        ...
