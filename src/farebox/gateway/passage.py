"""One direction of one call's bytes under limits: they are taken from a flow before they go on, and what may not pass yet waits.

    what arrives ──take──▶ onward
                   └─less─▶ held; the source rests ──more──▶ take … ──▶ the source goes on
                                                     └─never─▶ cut, at exactly this byte

Held is at most what had arrived when the source was told to rest: one read, which uvloop bounds at 256 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from farebox.app.admission import Flow

log = structlog.get_logger(__name__)

#: After a flow said «more» and then gave nothing: others were faster.
_TAKE_AGAIN_S: Final = 0.01


class Passage:
    """Bytes in by ``push``, bytes out by ``onward(payload, ended)``, in order.

    ``hold`` and ``release`` stop and start the source; ``cut(code)`` is called at most once: ``pass_exhausted`` when nothing may
    pass any more, ``unavailable`` when that could not be found out. After ``stop`` nothing is called.
    """

    __slots__ = (
        "_cut",
        "_ended",
        "_flow",
        "_held",
        "_hold",
        "_onward",
        "_release",
        "_spawn",
        "_stopped",
        "waits",
    )

    def __init__(
        self,
        flow: Flow,
        *,
        onward: Callable[[bytes, bool], None],
        hold: Callable[[], None],
        release: Callable[[], None],
        cut: Callable[[str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._flow = flow
        self._onward = onward
        self._hold = hold
        self._release = release
        self._cut = cut
        self._spawn = spawn
        self._held = b""
        self._ended = False
        self._stopped = False
        self.waits = False  # something is held, and the source rests

    def push(self, payload: bytes, ended: bool) -> None:
        """More from the source; ``ended``: the last of it. After ``stop`` it is dropped and not taken."""
        if self._stopped:
            return
        if self.waits:
            self._held += payload
            self._ended = ended
            return
        passing, over = self.admit(payload, ended)
        if passing or over:
            self._onward(passing, over)

    def admit(self, payload: bytes, ended: bool) -> tuple[bytes, bool]:
        """What of this may go on at once, and whether that is the end; the rest follows by ``onward``."""
        size = len(payload)
        taken = self._flow.take(size) if size else 0
        if taken == size:
            return payload, ended
        self._held, self._ended, self.waits = payload[taken:], ended, True
        self._hold()
        self._spawn(self._follow())
        return payload[:taken], False

    def stop(self) -> None:
        """The call is over; what is held is dropped."""
        self._stopped = True
        self._held = b""

    async def _follow(self) -> None:
        while not self._stopped:
            try:
                more = await self._flow.more()
            except Exception:
                log.exception("flow_failed")
                if not self._stopped:
                    self._cut("unavailable")
                return
            if self._stopped:
                return
            if not more:
                self._cut("pass_exhausted")
                return
            taken = self._flow.take(len(self._held))
            if not taken:
                await asyncio.sleep(_TAKE_AGAIN_S)
                continue
            passing, self._held = self._held[:taken], self._held[taken:]
            if self._held:
                self._onward(passing, False)
                continue
            self.waits = False
            self._onward(passing, self._ended)
            if not self._ended and not self._stopped and not self.waits:
                self._release()
            return
