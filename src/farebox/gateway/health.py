"""Whether a target of an upstream is called: what its connections show, and what it says when it is asked.

Passive: a target that fails ``strikes_max`` times in a row (no connection, no answer in time, an answer broken off or
malformed; an answer with status 500 is an answer) is out for a while, longer each time; then one call tries it.
Active: with a ``health`` path, a prober asks each target over and over, and several bad answers in a row take it out until
several good ones follow. A target is healthy when neither speaks against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import uniform
from typing import TYPE_CHECKING, Final, Literal

import structlog

from farebox.domain.access import HealthCheck
from farebox.gateway.heads import AnswerHead
from farebox.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from farebox.gateway.pools import UpstreamPool
    from farebox.gateway.upstream import UpstreamConnection

log = structlog.get_logger(__name__)

_PROBE_BODY_BYTES_MAX: Final = 64 * 1024

State = Literal["fit", "out", "due", "trying"]
Event = Literal["struck_out", "struck", "period_over", "chosen", "heard"]

#: What the connections of a target show of it. What is not in the table changes nothing.
_NEXT: Final[Mapping[tuple[State, Event], State]] = {
    ("fit", "struck_out"): "out",
    ("out", "period_over"): "due",  # one call may try it
    ("due", "chosen"): "trying",
    ("trying", "struck"): "out",
    ("trying", "period_over"): "due",  # the call that tried it left without an outcome
    ("out", "heard"): "fit",  # of a probe, or of a call that had nowhere else to go
    ("due", "heard"): "fit",
    ("trying", "heard"): "fit",
}


class TargetHealth:
    """What is known of one target. ``shaky``: an answer would be news."""

    __slots__ = (
        "_answers_probes", "_bad_probes", "_ejections", "_good_probes", "_period_ends", "_settings", "_since", "_state", "_strikes",
        "healthy", "shaky", "target", "trial_due", "upstream_id",
    )  # fmt: skip

    def __init__(self, upstream_id: str, target: str, settings: GatewaySettings) -> None:
        self.upstream_id = upstream_id
        self.target = target
        self.healthy = True
        self.trial_due = False
        self.shaky = False
        self._settings = settings
        self._state: State = "fit"
        self._strikes = 0
        self._ejections = 0  # in a row: each doubles the next period
        self._since = 0.0  # of the present state
        self._period_ends = 0.0
        self._answers_probes = True
        self._good_probes = 0
        self._bad_probes = 0

    # What the connections show

    def strike(self, now: float, why: str) -> None:
        """A call or a probe had no (whole) answer, and it was not the client's doing."""
        self._strikes += 1
        self.shaky = True
        if self._state == "fit" and self._strikes >= self._settings.strikes_max:
            self._move("struck_out", now, why)
        else:
            self._move("struck", now, why)

    def heard(self, now: float) -> None:
        """An answer came. Need only be told of a ``shaky`` target."""
        self._strikes = 0
        self._move("heard", now, "it answered a call")
        self.shaky = self._state != "fit"

    def chosen(self, now: float) -> None:
        """A call is under way to a target whose trial was due."""
        self._move("chosen", now, "")

    def tick(self, now: float) -> None:
        if self._state != "fit" and now >= self._period_ends:
            self._move("period_over", now, "")

    # What it says when it is asked

    def probed(self, well: bool, why: str, healthy_after: int, unhealthy_after: int) -> None:
        """A probe came back."""
        if well:
            self._good_probes, self._bad_probes = self._good_probes + 1, 0
            if not self._answers_probes and self._good_probes >= healthy_after:
                self._answers_probes = True
        else:
            self._good_probes, self._bad_probes = 0, self._bad_probes + 1
            if self._answers_probes and self._bad_probes >= unhealthy_after:
                self._answers_probes = False
        self._conclude(why)

    def no_longer_probed(self) -> None:
        """Nobody asks it any more: only its connections speak."""
        self._answers_probes = True
        self._good_probes = self._bad_probes = 0
        self._conclude("it is not probed any more")

    def _move(self, event: Event, now: float, why: str) -> None:
        to = _NEXT.get((self._state, event))
        if to is None:
            return
        settings = self._settings
        if to == "out":
            if self._state == "fit" and now - self._since > settings.ejection_s_max:
                self._ejections = 0
            period_s = min(settings.ejection_s * 2.0 ** min(self._ejections, 30), settings.ejection_s_max)
            self._period_ends = now + period_s * uniform(0.9, 1.1)  # processes do not try it all at once
            self._ejections += 1
        elif to == "trying":
            self._period_ends = now + settings.ejection_s
        elif to == "due":
            self._period_ends = float("inf")
        self._state = to
        self._since = now
        self._conclude(why)

    def _conclude(self, why: str) -> None:
        before = self.healthy
        self.healthy = self._state == "fit" and self._answers_probes
        self.trial_due = self._state == "due" and self._answers_probes
        if self.healthy != before:
            (log.info if self.healthy else log.warning)(
                "upstream_target_healthy" if self.healthy else "upstream_target_unhealthy",
                upstream=self.upstream_id,
                target=self.target,
                why=why,
            )


class Prober:
    """Asks one target whether it is well, one question at a time, on the target's own connections. A ``Caller``.

    That all of them are busy says nothing of its health: such a question does not count.
    """

    __slots__ = ("_body_bytes", "_connection", "_due", "_pool", "_request", "_state", "_until", "check")

    def __init__(self, pool: UpstreamPool, check: HealthCheck) -> None:
        self.check = check
        self._pool = pool
        self._request = b"GET %b%b HTTP/1.1\r\n%b\r\nUser-Agent: farebox-health\r\nAccept: */*\r\n\r\n" % (
            pool.base_path,
            check.path.encode("ascii"),
            pool.host_line,
        )
        self._state: Literal["idle", "waiting", "asked", "answered"] = "idle"
        self._connection: UpstreamConnection | None = None
        self._body_bytes = 0
        self._until = 0.0
        self._due = pool.ticker.now + uniform(0.0, 0.1) * check.interval_s  # soon, but not all at once

    def tick(self, now: float) -> None:
        """Ask when it is time; give a question up when it took too long."""
        if self._state != "idle":
            if now >= self._until:
                self._give_up()
        elif now >= self._due:
            self._ask(now)

    def stop(self) -> None:
        """Ask no more."""
        self._due = float("inf")
        self._let_go()

    def _ask(self, now: float) -> None:
        check = self.check
        self._due = now + check.interval_s * uniform(0.9, 1.1)
        self._until = now + check.timeout_s
        self._body_bytes = 0
        self._state = "waiting"
        connection = self._pool.take()
        if connection is not None:
            self.connected(connection)
        else:
            self._pool.wait(self)

    def _give_up(self) -> None:
        state, full = self._state, self._pool.full
        self._let_go()
        if state == "asked" or (state == "waiting" and not full):
            self._conclude(False, f"{self.check.path} was not answered in {self.check.timeout_s:g} s")

    def _let_go(self) -> None:
        state, self._state = self._state, "idle"
        connection, self._connection = self._connection, None
        if state == "waiting":
            self._pool.leave(self)
        elif connection is not None:
            connection.drop()

    def _conclude(self, well: bool, why: str) -> None:
        self._pool.health.probed(well, why, self.check.healthy_after, self.check.unhealthy_after)

    # From the pool and its connection

    def connected(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._state = "asked"
        connection.send(self, self._request, True, self.check.timeout_s, False)

    def not_connected(self, code: str, detail: str) -> None:
        self._state = "idle"
        if code != "upstream_busy":
            self._conclude(False, f"{self.check.path} could not be asked for")

    def interim(self, head: AnswerHead) -> None:
        pass

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        statuses = self.check.statuses
        well = head.status in statuses if statuses else 200 <= head.status < 400
        self._conclude(well, f"{self.check.path} answered {head.status}")
        self._state = "answered"
        self.answered_more(payload, ended)

    def answered_more(self, payload: bytes, ended: bool) -> None:
        if ended:
            self._connection = None
            self._state = "idle"
            return
        self._body_bytes += len(payload)
        if self._body_bytes > _PROBE_BODY_BYTES_MAX:
            self._let_go()

    def trailed(self, lines: Sequence[bytes]) -> None:
        pass

    def switches(self, head: AnswerHead) -> bool:
        return False

    def failed(self, code: str, detail: str, unheard: bool) -> None:
        state, self._state = self._state, "idle"
        self._connection = None
        if unheard:
            self._due = 0.0  # the connection had been given up before it was asked: ask on another
        elif state == "asked":
            self._conclude(False, f"{self.check.path} had no answer")

    def upstream_full(self) -> None:
        pass

    def upstream_drained(self) -> None:
        pass
