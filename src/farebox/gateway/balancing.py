"""Which target of an upstream takes a call.

Healthy targets share the calls by the upstream's policy. A target whose trial is due gets the next call, one at a time. When
no target is healthy all are used as if they were: a refusal out of caution helps nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import random
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from farebox.domain.access import Balance
from farebox.gateway.health import TargetHealth

if TYPE_CHECKING:
    from farebox.gateway.pools import Ticker


class Target(Protocol):
    """What a choice looks at."""

    @property
    def health(self) -> TargetHealth: ...

    @property
    def in_flight(self) -> int:
        """Calls it has now, and calls that wait for a connection to it."""


T = TypeVar("T", bound=Target)


def round_robin(targets: Sequence[T], turn: int) -> T:
    """One after the other."""
    return targets[turn % len(targets)]


def least_requests(targets: Sequence[T], turn: int) -> T:
    """The one with the fewest calls in flight; between equals, one after the other."""
    start = turn % len(targets)
    best = targets[start]
    fewest = best.in_flight
    for target in (*targets[start + 1 :], *targets[:start]):
        in_flight = target.in_flight
        if in_flight < fewest:
            best, fewest = target, in_flight
    return best


def two_choices(targets: Sequence[T], turn: int) -> T:
    """Two at random, and of these the one with fewer calls in flight: nearly as even as asking all, and processes that know
    nothing of each other do not all run to the same target."""
    count = len(targets)
    one = int(random() * count)
    if count == 1:
        return targets[one]
    other = (one + 1 + int(random() * (count - 1))) % count
    return targets[one] if targets[one].in_flight <= targets[other].in_flight else targets[other]


class Policy(Protocol):
    """Chooses one of at least one target; ``turn`` counts the choices."""

    def __call__(self, targets: Sequence[T], turn: int, /) -> T: ...


POLICIES: Final[Mapping[Balance, Policy]] = {
    "round_robin": round_robin,
    "least_requests": least_requests,
    "random": two_choices,
}


class Balancer(Generic[T]):
    """The targets of one upstream, and whose turn it is."""

    __slots__ = ("_policy", "_targets", "_ticker", "_turn")

    def __init__(self, targets: Sequence[T], balance: Balance, ticker: Ticker) -> None:
        self._targets = tuple(targets)
        self._policy = POLICIES[balance]
        self._ticker = ticker
        self._turn = -1

    def choose(self) -> T:
        """The target of the next call."""
        fit = []
        for target in self._targets:
            health = target.health
            if health.healthy:
                fit.append(target)
            elif health.trial_due:
                health.chosen(self._ticker.now)
                return target
        self._turn += 1
        return self._policy(fit or self._targets, self._turn)

    def choose_other(self, tried: Collection[T]) -> T | None:
        """A target for a call that could not be sent to those it ``tried``; None when there is no other."""
        others = [target for target in self._targets if target not in tried]
        if not others:
            return None
        self._turn += 1
        return self._policy([t for t in others if t.health.healthy] or others, self._turn)
