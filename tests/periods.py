"""An anchor's periods one after the other, as tests look at them."""

from __future__ import annotations

from datetime import datetime

from farebox.base.time import Anchor, Interval, Period


def periods_of(anchor: Anchor, interval: Interval, until: datetime) -> list[Period]:
    """Every period from the anchor on that starts before ``until``."""
    found: list[Period] = []
    start = anchor.at
    while start < until:
        found.append(anchor.period_at(interval, start))
        start = found[-1].end
    return found
