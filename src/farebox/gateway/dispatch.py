"""A request that has no connection: what is held of it until it has one, and to which targets it may still be taken.

Most calls find an idle connection and never need one of these. It is made for a call that has to wait, and for one that is
sent once more: over a fresh connection when a kept one turned out to be stale, to another target when one failed.
"""

from __future__ import annotations

from typing import Final

from farebox.gateway.pools import Destination, UpstreamPool, readdressed
from farebox.gateway.upstream import Caller, UpstreamConnection

#: Of a body that still comes; what is beyond it stays with the client until there is a connection.
_HELD_BYTES_MAX: Final = 64 * 1024


class Dispatch:
    """One call's, for as long as the call lasts. ``caller`` waits in the queue of one target's pool at a time."""

    __slots__ = (
        "_attempts_max",
        "_caller",
        "_ended",
        "_first",
        "_fresh",
        "_held",
        "_pool",
        "_size",
        "_to",
        "_tried",
        "waits",
    )

    def __init__(self, caller: Caller, to: Destination, pool: UpstreamPool, attempts_max: int) -> None:
        """``pool``: of the target that the request was written for."""
        self._caller = caller
        self._to = to
        self._first = self._pool = pool
        self._attempts_max = attempts_max
        self._tried: tuple[UpstreamPool, ...] = ()  # targets that could not be reached, or failed
        self._fresh = False  # only a connection that nobody used before will do
        self._held: list[bytes] = []
        self._size = 0
        self._ended = False
        self.waits = False

    def hold(self, data: bytes, ended: bool) -> bool:
        """More of the request. False: no more should come for now."""
        self._held.append(data)
        self._size += len(data)
        self._ended = ended
        return ended or self._size <= _HELD_BYTES_MAX

    def wait(self) -> None:
        """Get in line; the caller is told."""
        self.waits = True
        if self._fresh and self._pool.full and (kept := self._pool.take()) is not None:
            kept.drop()  # or there would be no room for a fresh one
        self._pool.wait(self._caller)

    def leave(self) -> None:
        """The caller no longer waits; what was held is dropped."""
        if self.waits:
            self._pool.leave(self._caller)
            self.drop()

    def drop(self) -> None:
        self.waits = False
        self._held.clear()
        self._size = 0

    def accepts(self, connection: UpstreamConnection) -> bool:
        """Whether it is one to send on; else others get it, and the caller waits on."""
        if not self.waits:
            self._pool.give_back(connection)
            return False
        if self._fresh and connection.reused:
            if self._pool.full:
                connection.drop()  # or there would be no room for a fresh one
            else:
                self._pool.give_back(connection)
            self._pool.wait(self._caller)
            return False
        return True

    def take(self) -> tuple[bytes, bool]:
        """What is to be sent, and whether that is all of it."""
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        ended = self._ended
        self.drop()
        return (data if self._pool is self._first else readdressed(data, self._first, self._pool)), ended

    def again(self, data: bytes, stale: bool) -> bool:
        """Send the whole request once more, if it may be. ``stale``: a kept connection was closed before it heard of it, which
        says nothing against the target: another one that is kept may be as stale, so a fresh one is waited for."""
        if stale:
            self._fresh = True
        elif not self._turns_elsewhere():
            return False
        self.hold(data, True)
        self.wait()
        return True

    def elsewhere(self) -> bool:
        """What waits is taken to another target, if there is one left to try."""
        if not self._turns_elsewhere():
            return False
        self.wait()
        return True

    def _turns_elsewhere(self) -> bool:
        balancer = self._to.balancer
        if balancer is None or len(self._tried) + 2 > self._attempts_max:
            return False
        self._tried = (*self._tried, self._pool)
        other = balancer.choose_other(self._tried)
        if other is None:
            return False
        self._pool = other
        self._fresh = True
        return True
