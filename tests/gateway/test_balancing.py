"""Several targets share the calls as the seller says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.domain.access import Balance
from farebox.gateway.balancing import Balancer, least_requests, round_robin, two_choices
from farebox.gateway.health import TargetHealth
from farebox.gateway.pools import Ticker
from farebox.gateway.settings import GatewaySettings
from tests.gateway.fleet import Fleet, open_fleet, until
from tests.gateway.kit import Heard, Said, says_hello

BALANCES: tuple[Balance, ...] = ("round_robin", "least_requests", "random")


@dataclass(eq=False)
class Target:
    """A target on paper."""

    in_flight: int = 0
    health: TargetHealth = field(default_factory=lambda: TargetHealth("up", "http://a", GatewaySettings()))

    def falls_ill(self) -> None:
        for _ in range(3):
            self.health.probed(False, "it said so", 2, 3)


# ── on real servers ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_in_turn_each_target_gets_the_same_number_of_calls():
    async with open_fleet(3, balance="round_robin") as fleet:
        for _ in range(30):
            assert (await fleet.get()).status == 200

        assert fleet.shares() == [10, 10, 10]


async def test_at_random_each_target_gets_its_part():
    async with open_fleet(3, balance="random") as fleet:
        for _ in range(120):
            assert (await fleet.get()).status == 200

        assert sum(fleet.shares()) == 120
        assert min(fleet.shares()) > 10, "40 each in the mean; 10 would be six standard deviations off"


@pytest.mark.parametrize("balance", ["least_requests", "random"])
async def test_a_busy_target_is_spared(balance: Balance):
    async with open_fleet(2, balance=balance) as fleet:
        free = asyncio.Event()
        busy = asyncio.create_task(being_busy(fleet, free))
        await until(lambda: sum(fleet.shares()) == 1)
        slow, quick = sorted(fleet.servers, key=lambda s: len(s.heard), reverse=True)
        quick.answer = says_hello
        for _ in range(12):
            assert (await fleet.get()).status == 200

        assert (len(slow.heard), len(quick.heard)) == (1, 12)
        free.set()
        assert (await busy).status == 200


async def being_busy(fleet: Fleet, free: asyncio.Event) -> Said:
    """A call that no server answers until it is let."""

    async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        await says_hello(heard, reader, writer)

    for server in fleet.servers:
        server.answer = waits
    return await fleet.get()


async def test_calls_that_wait_for_a_connection_count_as_in_flight():
    async with open_fleet(2, balance="least_requests", connections_max=1) as fleet:
        free = asyncio.Event()
        calls = []
        for number in range(6):
            calls.append(asyncio.create_task(being_busy(fleet, free)))
            await until(lambda n=number: sum(p.in_flight for p in fleet.gateway.pools.all()) == n + 1)

        assert [p.in_flight for p in fleet.gateway.pools.all()] == [3, 3]
        free.set()
        assert {said.status for said in await asyncio.gather(*calls)} == {200}
        assert [p.in_flight for p in fleet.gateway.pools.all()] == [0, 0]


async def test_a_call_that_is_given_up_is_no_longer_in_flight():
    async with open_fleet(2, balance="least_requests") as fleet:
        call = asyncio.create_task(being_busy(fleet, asyncio.Event()))
        await until(lambda: sum(p.in_flight for p in fleet.gateway.pools.all()) == 1)
        call.cancel()

        await until(lambda: sum(p.in_flight for p in fleet.gateway.pools.all()) == 0)


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────

loads = st.lists(st.integers(0, 50), min_size=1, max_size=12)


@given(loads, st.integers(0, 1000))
def test_least_requests_never_chooses_a_busier_target_than_another(in_flight: list[int], turn: int):
    targets = [Target(n) for n in in_flight]
    assert least_requests(targets, turn).in_flight == min(in_flight)


@given(loads)
def test_random_never_chooses_the_busiest_of_all(in_flight: list[int]):
    targets = [Target(n) for n in in_flight]
    chosen = two_choices(targets, 0)
    if len(in_flight) > 1 and in_flight.count(max(in_flight)) == 1:
        assert chosen.in_flight < max(in_flight)


@given(st.integers(1, 9), st.integers(1, 5))
def test_in_turn_means_in_turn(count: int, rounds: int):
    targets = [Target() for _ in range(count)]
    chosen = [round_robin(targets, turn) for turn in range(count * rounds)]
    assert chosen == targets * rounds


@given(st.sampled_from(BALANCES), st.data())
def test_calls_come_and_go_and_no_choice_breaks_the_law(balance: Balance, data: st.DataObject):
    """Calls begin, end and find targets ill or well, in any order."""
    targets = [Target() for _ in range(data.draw(st.integers(1, 5)))]
    balancer = Balancer(targets, balance, Ticker())
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["begins", "begins", "ends", "falls ill", "fails over"])):
            case "begins":
                well = [t for t in targets if t.health.healthy]
                chosen = balancer.choose()
                assert chosen in (well or targets), "an ill one only when all are"
                if balance == "least_requests":
                    assert chosen.in_flight == min(t.in_flight for t in well or targets)
                chosen.in_flight += 1
            case "ends":
                busy = [t for t in targets if t.in_flight]
                if busy:
                    data.draw(st.sampled_from(busy)).in_flight -= 1
            case "falls ill":
                data.draw(st.sampled_from(targets)).falls_ill()
            case "fails over":
                tried = data.draw(st.lists(st.sampled_from(targets), unique=True))
                other = balancer.choose_other(tried)
                left = [t for t in targets if t not in tried]
                assert other in left if left else other is None
                if any(t.health.healthy for t in left):
                    assert other is not None
                    assert other.health.healthy
