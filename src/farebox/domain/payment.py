"""A 402 payment's life, as a table. What the table lacks is refused and the state stays as it was (DESIGN §4).

The flow ``authorization`` is: reserve, verify, forward; when the upstream's head says < 400, settle, then release.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from farebox.base.errors import InvariantError


class State(StrEnum):
    RESERVED = "reserved"
    VERIFIED = "verified"
    SERVING = "serving"
    SERVED = "served"
    SETTLING = "settling"
    SETTLED = "settled"
    RELEASED = "released"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REFUNDED = "refunded"


class Event(StrEnum):
    VERIFIED = "verified"  # the signature and the window are good
    FORWARDED = "forwarded"  # the first byte went to the upstream
    HEAD_GOOD = "head_good"  # the upstream's head says < 400
    HEAD_BAD = "head_bad"  # the upstream refused or failed: nothing is taken
    SETTLE_STARTED = "settle_started"
    SETTLED = "settled"
    SETTLE_REFUSED = "settle_refused"
    SETTLE_UNKNOWN = "settle_unknown"
    INVALID = "invalid"  # a check found the payment wrong
    OWNER_LOST = "owner_lost"  # the process that held it died
    TAKEN_AGAIN = "taken_again"  # the same request brings a payment that took nothing
    REFUNDED = "refunded"


#: flow ``authorization``
TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.RESERVED: {
        Event.VERIFIED: State.VERIFIED,
        Event.INVALID: State.RELEASED,
        Event.OWNER_LOST: State.UNKNOWN,
    },
    State.VERIFIED: {
        Event.FORWARDED: State.SERVING,
        Event.OWNER_LOST: State.UNKNOWN,
    },
    State.SERVING: {
        Event.HEAD_GOOD: State.SETTLING,
        Event.HEAD_BAD: State.RELEASED,
        Event.OWNER_LOST: State.UNKNOWN,
    },
    State.SETTLING: {
        Event.SETTLED: State.SETTLED,
        Event.SETTLE_REFUSED: State.FAILED,
        Event.SETTLE_UNKNOWN: State.UNKNOWN,
        Event.OWNER_LOST: State.UNKNOWN,
    },
    State.UNKNOWN: {
        Event.SETTLED: State.SETTLED,
        Event.SETTLE_REFUSED: State.FAILED,
    },
    State.SETTLED: {Event.REFUNDED: State.REFUNDED},
    State.RELEASED: {Event.TAKEN_AGAIN: State.RESERVED},
}


def after(state: State, event: Event) -> State:
    """The next state; ``InvariantError`` when the table has no such move."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise InvariantError(f"a {state} payment cannot become {event}") from None
