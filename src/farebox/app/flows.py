"""What limits the bytes and credits of one call: bytes are taken from leases before they pass, rates are shared in turn.

A ``Flow`` is one direction of one call. Bytes are cut at the exact byte where a pass has no more of them. A rate never cuts:
whoever finds it used up waits in the pass's lane, and the calls in a lane are served in turn, each an equal part of what may
pass, so that a large download does not keep a small one waiting for its end.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import structlog

from farebox.app.admission import Flow
from farebox.app.holdings import Holding
from farebox.app.leases import Leases
from farebox.base.errors import Unavailable

#: The most credits an upstream may take, or give back, for one call.
CREDITS_ADJUSTMENT_MAX: Final = 1_000_000
#: How long a transfer under way waits for a database that is away, and how often it asks.
FLOW_PATIENCE_S: Final = 30.0
ASK_AGAIN_S: Final = 1.0
#: How long it waits for bytes that other processes hold: longer than a lease lives whose holder says nothing any more.
HELD_PATIENCE_S: Final = 120.0
#: What a flow waits for at most at a time: a slice much larger than what is on its way would be others' to use.
_WANTED_BYTES_MAX: Final = 262_144

_SIGNED = re.compile(rb"[+-]?[0-9]{1,9}\Z")

log = structlog.get_logger(__name__)


class Lane:
    """One rate in one process, and the calls that wait for it."""

    __slots__ = ("__weakref__", "_held", "_leases", "_serving", "_turns")

    def __init__(self, leases: Leases, held: Holding) -> None:
        self._leases = leases
        self._held = held
        self._turns: deque[tuple[CallFlow, int, asyncio.Future[bool]]] = deque()
        self._serving: asyncio.Task[None] | None = None

    def take(self, flow: CallFlow, size: int) -> int:
        """What the flow was given in its turn; more only where nobody waits."""
        taken = min(flow.given, size)
        flow.given -= taken
        if taken < size and not self._turns:
            taken += self._leases.take_units(self._held, size - taken)
        return taken

    def put_back(self, units: int) -> None:
        self._leases.put_back_units(self._held, units)

    async def turn(self, flow: CallFlow, wanted: int) -> bool:
        """Wait until the flow was given something. False: the grant is gone."""
        waits: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._turns.append((flow, wanted, waits))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name="lane")
        return await waits

    async def _serve(self) -> None:
        try:
            while self._turns:
                wanted = sum(size for _, size, _ in self._turns)
                if await self._leases.more_units(self._held, wanted) is not None:
                    self._end_all(False)
                    return
                self._hand_out(self._leases.take_units(self._held, wanted))
        except Exception as error:  # noqa: BLE001 - whoever waits hears of it
            self._end_all(error)
        finally:
            self._serving = None

    def _hand_out(self, units: int) -> None:
        """Equal parts in the order of waiting; what one does not need is for those behind it."""
        for waiting in range(len(self._turns), 0, -1):
            flow, wanted, waits = self._turns.popleft()
            if waits.done():  # nobody waits for it any more
                continue
            part = 0 if flow.closed else min(wanted, -(-units // waiting))
            if part or flow.closed:
                units -= part
                flow.given += part
                waits.set_result(not flow.closed)
            else:
                self._turns.append((flow, wanted, waits))
        if units:
            self.put_back(units)

    def _end_all(self, how: bool | Exception) -> None:
        while self._turns:
            _, _, waits = self._turns.popleft()
            if waits.done():
                continue
            if isinstance(how, bool):
                waits.set_result(how)
            else:
                waits.set_exception(how)


@dataclass(frozen=True, slots=True)
class Way:
    """What limits one direction of all calls of a pass: its bytes, its rate, or both."""

    amount: Holding | None
    lane: Lane | None


class CallFlow:
    """Implements ``admission.Flow`` for one direction of one call."""

    __slots__ = ("_leases", "_missing", "_way", "closed", "given")

    def __init__(self, leases: Leases, way: Way) -> None:
        self._leases = leases
        self._way = way
        self._missing = 1  # bytes that could not pass at the last asking
        self.given = 0  # bytes handed out in the lane that did not pass yet
        self.closed = False

    def take(self, size: int) -> int:
        way = self._way
        allowed = size if way.lane is None else way.lane.take(self, size)
        if way.amount is not None and allowed:
            there = self._leases.take_units(way.amount, allowed)
            if way.lane is not None and there < allowed:
                way.lane.put_back(allowed - there)
            allowed = there
        self._missing = max(1, min(size - allowed, _WANTED_BYTES_MAX))
        return allowed

    async def more(self) -> bool:
        way = self._way
        if way.amount is not None and not await self._more_bytes(way.amount):
            return False
        # With something given there is something to take, and only who took it may wait for another turn.
        return way.lane is None or self.given > 0 or await way.lane.turn(self, self._missing)

    def close(self) -> None:
        """The call is over: what was given to it and did not pass is for the others."""
        self.closed = True
        if self.given and self._way.lane is not None:
            self._way.lane.put_back(self.given)
            self.given = 0

    async def _more_bytes(self, amount: Holding) -> bool:
        """Whether there are any; waits for what other processes hold, which may come back, and for an absent database."""
        began_at = time.monotonic()
        while not self.closed:
            try:
                not_taken = await self._leases.more_units(amount, self._missing)
            except Unavailable:
                if time.monotonic() > began_at + FLOW_PATIENCE_S:
                    raise
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            if not_taken is None:
                return True
            if not_taken.nothing.why != "held" or time.monotonic() > began_at + HELD_PATIENCE_S:
                return False
        return False


class CallMeter:
    """Implements ``admission.Meter``. ``cost`` is what the upstream said the call costs in credits; None: it said nothing."""

    __slots__ = ("_flows", "cost", "download", "upload")

    def __init__(self, leases: Leases, upload: Way | None, download: Way | None) -> None:
        up = None if upload is None else CallFlow(leases, upload)
        down = None if download is None else CallFlow(leases, download)
        self.upload: Flow | None = up
        self.download: Flow | None = down
        self._flows = [flow for flow in (up, down) if flow is not None]
        self.cost: int | None = None

    def credits(self, value: bytes) -> None:
        """A signed whole number: -5 takes five, 0 is free, +3 gives three. What is said last counts."""
        text = value.strip(b" \t")
        if not _SIGNED.match(text) or abs(int(text)) > CREDITS_ADJUSTMENT_MAX:
            log.warning("credits_malformed", value=value[:40].decode("latin-1"), most=CREDITS_ADJUSTMENT_MAX)
            return
        self.cost = -int(text)

    def close(self) -> None:
        for flow in self._flows:
            flow.close()


class Lanes:
    """One lane a rate and process, whichever route or grant version asks for it."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._lanes: WeakValueDictionary[str, Lane] = WeakValueDictionary()

    def way(self, amount: Holding | None, rate: Holding | None) -> Way | None:
        """How one direction is limited; None: not at all."""
        if amount is None and rate is None:
            return None
        lane = None
        if rate is not None:
            lane = self._lanes.get(rate.counter_id)
            if lane is None:
                lane = self._lanes[rate.counter_id] = Lane(self._leases, rate)
        return Way(amount, lane)
