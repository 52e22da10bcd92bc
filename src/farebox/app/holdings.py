"""What a process holds of one counter, and how each answer of the database changes it. No database and no waiting here."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final

from farebox.domain.access import GrantLimit
from farebox.domain.limits import BYTE_KINDS, RATE_KINDS, LimitKind, Pace
from farebox.store import limits

#: The first slice of a counter whose rate is not known yet, and how fast slices may grow from one ask to the next.
FIRST_SLICE: Final = 8
SLICE_GROWTH_MAX: Final = 8
#: The same for bytes; and the most bytes of a slice, so that a lost host does not strand more.
FIRST_SLICE_BYTES: Final = 262_144
SLICE_BYTES_MAX: Final = 268_435_456
#: A lease's local deadline is this much before the database's: clocks differ in rate by far less within a lease.
DEADLINE_MARGIN_S: Final = 1.0
#: The same for a window, which may be short: so much, and this share of what is left of it.
WINDOW_MARGIN_S: Final = 0.002
WINDOW_MARGIN_SHARE: Final = 0.0005
#: A counter found exhausted is not asked about again for this long.
EXHAUSTED_FOR_S: Final = 0.5
#: When to come back for a slot, or for what others hold.
RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a lease lives (as the database is told), and the most calls of one slice."""

    lease_s: float
    slice_max: int


@dataclass(frozen=True, slots=True)
class Slicing:
    """How much of a counter a process asks for: at ``first``, and at ``most``; ``share`` and ``smallest`` as in ``limits.Wish``."""

    first: int
    most: int
    share: int = limits.SLICE_SHARE
    smallest: int = 1


CALLS: Final = Slicing(FIRST_SLICE, 1 << 62)
BYTES: Final = Slicing(FIRST_SLICE_BYTES, SLICE_BYTES_MAX, smallest=FIRST_SLICE_BYTES)
SLOTS: Final = Slicing(1, 1, share=1)  # as many as are waited for: they come back and are used again
SHARE: Final = Slicing(1 << 62, 1 << 62, share=1)  # whatever nobody else paces by


def slicing_of(kind: LimitKind) -> Slicing:
    if kind in RATE_KINDS:
        return SHARE
    if kind in BYTE_KINDS:
        return BYTES
    return SLOTS if kind == "concurrency" else CALLS


class Holding:
    """What this process holds of one counter. ``left`` is what the fast path spends; all else serves the slow one."""

    __slots__ = (
        "__weakref__",
        "asked_at",
        "asking",
        "called_at",
        "capacity",
        "ceding",
        "counter_id",
        "deadline",
        "dirty",
        "fenced",
        "gained",
        "granted",
        "hard",
        "heard_since",
        "kind",
        "lease_id",
        "left",
        "left_at_ask",
        "low",
        "near_end",
        "nothing",
        "nothing_until",
        "pace",
        "particular",
        "remainder",
        "said_at",
        "slicing",
        "stale",
        "touched",
        "waiting",
        "wanted",
        "window_s",
    )

    def __init__(self, limit: GrantLimit, now: float) -> None:
        self.counter_id = limit.counter_id
        self.kind: LimitKind = limit.kind
        self.slicing = slicing_of(limit.kind)
        self.capacity = limit.limit
        self.hard = limit.on_exceed == "block"
        self.lease_id = 0
        self.granted = 0
        self.left = 0
        self.deadline = 0.0  # local; 0: must ask first
        self.low = 0  # ask ahead when this little is left
        self.remainder: int | None = None  # what nobody holds, as last heard
        self.near_end = False
        self.wanted = self.slicing.first
        self.waiting = 0  # units that are waited for
        self.asking: asyncio.Task[None] | None = None
        self.nothing: limits.Nothing | None = None
        self.nothing_until = 0.0
        self.touched = 0.0
        self.asked_at = 0.0
        self.left_at_ask = 0
        self.called_at = 0.0  # others were called to give back
        self.heard_since: datetime | None = (
            None  # by the database's clock: what they answer from then on counts
        )
        self.said_at = 0.0
        self.dirty = False
        self.particular = limit.kind in ("concurrency", "requests")  # what is put back needs a look
        self.fenced = (
            0  # units of this lease and of earlier ones do not come back: somebody else has closed it
        )
        self.stale = 0  # slots in flight whose lease is lost: they do not come back to this one
        self.ceding = 0  # slots promised to other processes, as soon as calls end
        self.gained = 0  # units to be told to the database: more than this lease has used
        self.window_s = limit.window_s
        self.pace: Pace | None = None
        if limit.kind in RATE_KINDS:
            self.pace = Pace(int(limit.limit or 0), limit.window_s or 1, now)
            self.pace.turn_to(0, now)  # nothing is leased yet

    @property
    def used(self) -> int:
        """Units of the open lease that are spent or in flight. Negative when calls of an earlier lease were taken back,
        more than was granted when credits were overdrawn."""
        return self.granted - self.left - self.ceding

    @property
    def share(self) -> int:
        """Of a rate: bytes a second that this process may pass now."""
        return self.granted if self.pace is not None else 0

    @property
    def remaining(self) -> int | None:
        """Units nobody has spent yet, as far as this process knows; None: not limited."""
        if self.capacity is None or self.remainder is None:
            return None
        return max(0, self.remainder + self.left)

    def comes_back(self, lease_id: int) -> bool:
        """Whether a unit of a ``particular`` holding that was taken under a lease (0: not known) may be used again here."""
        if self.kind == "requests":
            return lease_id == self.lease_id != 0  # of this window
        if self.slicing is not SLOTS:
            return lease_id > self.fenced
        if self.stale:
            self.stale -= 1
            return False
        return True

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────

    def wish(self, now: float, terms: Terms) -> limits.Wish:
        """What to ask for now."""
        self._adapt(now, terms)
        return limits.Wish(
            self.counter_id,
            wanted=self.wanted,
            needed=max(0, self.waiting - max(0, self.left)) if self.pace is None else 1,
            used=self.used,
            share=self.slicing.share,
            smallest=self.slicing.smallest,
            # Who has slots takes others' word for theirs: processes that are all busy would ask each other all the time.
            heard_since=limits.ANY_TIME if self.slicing is SLOTS and self.granted else self.heard_since,
        )

    def _adapt(self, now: float, terms: Terms) -> None:
        """Want what one lease's time will use at the present rate, growing no faster than the rate is believed."""
        if self.asked_at and self.slicing.first < self.slicing.most:
            rate = max(0, self.left_at_ask - self.left) / max(now - self.asked_at, 0.05)
            most = min(self.slicing.most, self.wanted * SLICE_GROWTH_MAX)
            if self.slicing is CALLS:
                most = min(most, terms.slice_max)
            lasting_s = min(terms.lease_s, self.window_s or terms.lease_s)
            self.wanted = max(self.slicing.first, min(most, math.ceil(rate * lasting_s)))
        self.asked_at = now

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def received(self, got: limits.Slice, sent: float, terms: Terms) -> None:
        """A slice, by a question that was ``sent`` then (by the local clock)."""
        if self.lease_id not in (0, got.lease_id):
            self.lost(sent, by_others=True)  # closed by someone else; this is a new one
        used = self.used
        self.lease_id = got.lease_id
        # The database's total, not the part this answer speaks of: an earlier answer may have been lost on the way.
        self.granted = got.granted
        self.left = self.left_at_ask = got.granted - used - self.ceding
        self.deadline = _deadline(sent, got.window_left_s, terms.lease_s)
        self.capacity = got.capacity
        self.nothing = self.heard_since = None
        self.said_at = sent
        self.heard(got.remainder)
        if got.amount < self.wanted and self.slicing is not SLOTS:
            self.near_end = self.hard
        self.low = 0 if self.near_end or self.slicing is SLOTS else got.amount // 2
        self.touched = max(self.touched, sent)
        self.repace(sent)

    def renewed(self, kept: limits.Renewed, sent: float, terms: Terms) -> None:
        """The lease goes on. An answer may have been lost on the way: the database knows how much it is."""
        self.left += kept.granted - self.granted
        self.granted = kept.granted
        self.repace(sent)
        self.confirmed(kept, sent, terms)

    def confirmed(self, kept: limits.Renewed, sent: float, terms: Terms) -> None:
        """As ``renewed``, of a lease that changed meanwhile perhaps: how much it is is heard elsewhere."""
        self.deadline = max(self.deadline, _deadline(sent, kept.window_left_s, terms.lease_s))
        self.said_at = sent
        self.heard(kept.remainder)

    def owed(self, got: limits.Slice | None, now: float) -> None:
        """A debt was paid; None: there is no such counter any more, and no debt."""
        if got is None:
            self.left = 0
        elif self.lease_id not in (0, got.lease_id):
            self.lost(now, by_others=True)
        else:  # the deadline stays as it is: a new lease is asked about before it is spent
            self.left += got.granted - self.granted
            self.granted, self.lease_id = got.granted, got.lease_id
            self.heard(got.remainder)

    def heard(self, remainder: Decimal | None) -> None:
        """Near the end slices go back sooner. Slots are asked for when others want them; a rate is for whoever transfers."""
        self.remainder = None if remainder is None else math.floor(remainder)
        self.near_end = self.pace is not None or (
            self.hard
            and self.remainder is not None
            and self.slicing is not SLOTS
            and self.remainder < self.slicing.first * limits.SLICE_SHARE
        )

    def told_nothing(self, got: limits.Nothing, now: float) -> None:
        """There was no slice."""
        self.nothing = got
        if got.why == "held":
            self.nothing_until = 0.0
        else:
            left_s = math.inf if got.window_left_s is None else got.window_left_s
            self.nothing_until = now + min(EXHAUSTED_FOR_S, left_s)
            self.heard_since = None  # the next question is a new one
        self.remainder = 0
        self.near_end = self.slicing is not SLOTS
        self.low = 0

    def lost(self, now: float, *, by_others: bool) -> None:
        """The lease is over: nothing of it may be spent. ``by_others``: closed in our name, so that what is in flight of it
        was accounted for by whoever did it."""
        if self.slicing is SLOTS:
            self.stale += max(0, self.used)  # these calls run on, but their slots are not ours to use again
        elif by_others and self.lease_id > self.fenced:
            self.fenced = self.lease_id
            self.particular = True
        self.lease_id = self.granted = self.left = self.ceding = 0
        self.deadline = 0.0
        self.repace(now)

    def repace(self, now: float) -> None:
        if self.pace is not None and self.pace.rate != self.granted:
            self.pace.turn_to(self.granted, now)


@dataclass(frozen=True, slots=True)
class NotTaken:
    """Why a call got nothing. ``why`` as in ``limits.Nothing``; ``held`` may be tried again soon."""

    holding: Holding
    nothing: limits.Nothing

    @property
    def retry_after_s(self) -> float | None:
        """When there may be some again: at the window's end, or soon. None: not by waiting here."""
        if self.nothing.window_left_s is not None:
            return self.nothing.window_left_s
        if self.nothing.why == "held" or self.holding.kind == "concurrency":
            return RETRY_AFTER_S
        return None


def _deadline(sent: float, window_left_s: float | None, lease_s: float) -> float:
    """By our own clock, counted from before the question was sent: never later than by the database's."""
    after_s = lease_s - DEADLINE_MARGIN_S
    if window_left_s is not None:
        after_s = min(after_s, window_left_s * (1 - WINDOW_MARGIN_SHARE) - WINDOW_MARGIN_S)
    return sent + after_s
