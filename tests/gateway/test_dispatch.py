"""A request that found no connection, or lost the one it had: what it waits for, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from farebox.gateway.dispatch import Dispatch
from farebox.gateway.pools import Destination, UpstreamPool
from farebox.gateway.upstream import Caller, UpstreamConnection
from tests.gateway.fleet import AGILE, open_fleet, until

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclass
class Connection:
    """One on paper."""

    reused: bool
    dropped: bool = False

    def drop(self) -> None:
        self.dropped = True


@dataclass
class Pool:
    """One on paper, that notes what becomes of it."""

    full: bool = False
    given_back: list[Connection] = field(default_factory=list)
    waiting: list[object] = field(default_factory=list)
    idle: list[Connection] = field(default_factory=list)

    def take(self) -> Connection | None:
        return self.idle.pop() if self.idle else None

    def wait(self, caller: object) -> None:
        self.waiting.append(caller)

    def give_back(self, connection: Connection) -> None:
        self.given_back.append(connection)


def dispatched(pool: Pool) -> Dispatch:
    target = cast(UpstreamPool, pool)
    return Dispatch(cast(Caller, object()), Destination(target, 5.0), target, 2)


def accepts(dispatch: Dispatch, connection: Connection) -> bool:
    return dispatch.accepts(cast(UpstreamConnection, connection))


def test_a_call_takes_whatever_connection_comes_first():
    dispatch = dispatched(Pool())
    dispatch.hold(REQUEST, True)
    dispatch.wait()

    assert accepts(dispatch, Connection(reused=True))
    assert dispatch.take() == (REQUEST, True)


def test_after_a_stale_connection_only_a_fresh_one_will_do():
    """Whatever else the target kept may be as stale; a call that is sent twice in vain is a 502."""
    pool = Pool()
    dispatch = dispatched(pool)
    assert dispatch.again(REQUEST, stale=True)
    kept, fresh = Connection(reused=True), Connection(reused=False)

    assert not accepts(dispatch, kept)
    assert pool.given_back == [kept], "somebody else can have it"
    assert len(pool.waiting) == 2, "and this call is in line again"
    assert accepts(dispatch, fresh)
    assert dispatch.take() == (REQUEST, True)


def test_where_there_is_no_room_for_a_fresh_one_a_kept_one_gives_way():
    pool = Pool(full=True, idle=[Connection(reused=True)])
    idle = pool.idle[0]
    dispatch = dispatched(pool)
    assert dispatch.again(REQUEST, stale=True)
    assert idle.dropped

    returned = Connection(reused=True)
    assert not accepts(dispatch, returned)
    assert returned.dropped
    assert pool.given_back == []


def test_who_no_longer_waits_gives_the_connection_back():
    pool = Pool()
    dispatch = dispatched(pool)
    connection = Connection(reused=False)

    assert not accepts(dispatch, connection)
    assert pool.given_back == [connection]


async def test_a_call_turns_to_a_target_whose_connections_are_all_idle():
    """It has one, kept and idle, and may have no more: that is room enough."""
    settings = replace(
        AGILE, upstream_connections_max=1, upstream_idle_timeout_s=60.0, upstream_waiting_timeout_s=1.0
    )
    async with open_fleet(2, settings, balance="round_robin") as fleet:
        assert [(await fleet.get()).status for _ in range(2)] == [200, 200]
        gone, there = fleet.servers
        await gone.stop()
        await until(lambda: fleet.pool(gone).connections == 0)

        assert [(await fleet.get()).status for _ in range(2)] == [200, 200]
        assert len(there.heard) == 3
