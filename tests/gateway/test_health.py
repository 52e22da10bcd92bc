"""Targets go down and come up, and callers do not notice as long as there is one that serves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from farebox.domain.access import HealthCheck
from farebox.gateway.health import TargetHealth
from farebox.gateway.settings import GatewaySettings
from tests.gateway.fleet import AGILE, Fleet, comes_up, open_fleet, until
from tests.gateway.kit import Heard, says_hello

CHECK = HealthCheck("/healthz", interval_s=0.1, timeout_s=1.0, healthy_after=2, unhealthy_after=2)
#: The connections' own failures do not take a target out: only what it says when asked does.
ASKING_ONLY = replace(AGILE, strikes_max=1_000_000)


async def says(status: int, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 %d Said So\r\nContent-Length: 0\r\n\r\n" % status)


def well_if(statuses: dict[str, int]):
    """Answers a probe with the status noted there, and any call as usual."""

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if heard.one("user-agent") == "farebox-health":
            await says(statuses["probe"], writer)
        else:
            await says_hello(heard, reader, writer)

    return answer


async def calling(fleet: Fleet, stop: asyncio.Event, statuses: list[int]) -> None:
    while not stop.is_set():
        statuses.append((await fleet.get()).status)


# ── what the connections show ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("balance", ["round_robin", "least_requests", "random"])
async def test_servers_go_down_and_up_under_load_and_no_call_fails(balance: str):
    async with open_fleet(3, balance=balance) as fleet:
        stop, statuses = asyncio.Event(), []
        callers = [asyncio.create_task(calling(fleet, stop, statuses)) for _ in range(4)]
        for server in fleet.servers:
            await server.stop()
            await until(lambda s=server: not fleet.pool(s).health.healthy)
            heard = len(server.heard)
            await comes_up(server)
            await until(lambda s=server: fleet.pool(s).health.healthy)
            await until(lambda s=server, n=heard: len(s.heard) > n + 3)
        stop.set()
        await asyncio.gather(*callers)

        assert set(statuses) == {200}


async def test_when_all_are_down_all_are_tried_and_the_first_one_up_serves():
    """An hour out: only because nobody is left is it called at all."""
    async with open_fleet(2, replace(AGILE, ejection_s=3600, ejection_s_max=3600)) as fleet:
        for server in fleet.servers:
            await server.stop()
        while any(fleet.healthy()):
            assert (await fleet.get()).status == 502
        assert (await fleet.get()).status == 502
        await comes_up(fleet.servers[1])

        assert [(await fleet.get()).status for _ in range(4)] == [200] * 4
        assert fleet.healthy() == [False, True], "an answer brought it back"


async def test_a_target_that_never_answers_is_left_out():
    async with open_fleet(2, timeout_s=0.5) as fleet:

        async def hangs(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(3600)

        fleet.servers[0].answer = hangs
        statuses = [(await fleet.get()).status for _ in range(6)]

        assert sorted(statuses) == [200] * 3 + [504] * 3
        assert fleet.healthy() == [False, True]


async def test_an_answer_with_status_500_is_an_answer():
    async with open_fleet(2) as fleet:

        async def fails(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await says(500, writer)

        fleet.servers[0].answer = fails
        statuses = [(await fleet.get()).status for _ in range(10)]

        assert statuses.count(500) == 5
        assert fleet.healthy() == [True, True]


async def test_clients_that_leave_prove_nothing_of_the_target():
    async with open_fleet(2) as fleet:

        async def hangs(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(3600)

        for server in fleet.servers:
            server.answer = hangs
        for number in range(8):
            call = asyncio.create_task(fleet.get())
            await until(lambda n=number: sum(fleet.shares()) == n + 1)
            call.cancel()
        await until(lambda: all(pool.connections == 0 for pool in fleet.gateway.pools.all()))

        assert fleet.healthy() == [True, True]


async def test_the_next_call_tries_a_target_whose_time_is_over():
    async with open_fleet(2, replace(AGILE, ejection_s=0.05, ejection_s_max=0.05)) as fleet:
        sick = fleet.servers[0]
        await sick.stop()
        while all(fleet.healthy()):
            assert (await fleet.get()).status == 200
        await comes_up(sick)
        await until(lambda: fleet.pool(sick).health.trial_due)
        assert (await fleet.get("/trial")).status == 200

        assert [h.target for h in sick.heard] == ["/trial"]
        assert fleet.healthy() == [True, True]


# ── what it says when it is asked ────────────────────────────────────────────────────────────────────────────────────


async def test_a_target_that_says_it_is_not_well_gets_no_calls_until_it_does():
    async with open_fleet(2, ASKING_ONLY, health=CHECK) as fleet:
        says_so = {"probe": 503}
        fleet.servers[0].answer = well_if(says_so)
        with capture_logs() as lines:
            await until(lambda: fleet.healthy() == [False, True])
        before = fleet.shares()[0]
        assert [(await fleet.get()).status for _ in range(10)] == [200] * 10
        assert fleet.shares()[0] == before
        said = [line for line in lines if line["event"] == "upstream_target_unhealthy"]
        assert [(line["upstream"], line["target"]) for line in said] == [("up0", fleet.servers[0].url)]
        assert said[0]["why"] == "/healthz answered 503"

        says_so["probe"] = 204
        await until(lambda: fleet.healthy() == [True, True])
        for _ in range(10):
            assert (await fleet.get()).status == 200
        assert fleet.shares()[0] == before + 5


async def test_a_target_that_is_gone_or_silent_is_noticed_without_a_call():
    async with open_fleet(3, ASKING_ONLY, health=CHECK) as fleet:

        async def silent(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(3600)

        fleet.servers[0].answer = silent
        await fleet.servers[1].stop()
        await until(lambda: fleet.healthy() == [False, False, True])

        assert {(await fleet.get()).status for _ in range(6)} == {200}
        assert fleet.shares() == [0, 0, 6]
        fleet.servers[0].answer = says_hello
        await comes_up(fleet.servers[1])
        await until(lambda: fleet.healthy() == [True, True, True])


async def test_when_all_say_they_are_not_well_all_are_used():
    async with open_fleet(2, ASKING_ONLY, health=CHECK) as fleet:
        for server in fleet.servers:
            server.answer = well_if({"probe": 500})
        await until(lambda: fleet.healthy() == [False, False])

        assert [(await fleet.get()).status for _ in range(4)] == [200] * 4
        assert fleet.shares() == [2, 2]


async def test_a_probe_is_a_plain_request_one_at_a_time_on_the_pools_connections():
    async with open_fleet(1, ASKING_ONLY, paths=("/base",), health=replace(CHECK, path="/up?x=1")) as fleet:
        server = fleet.servers[0]
        await until(lambda: len(server.heard) >= 4)

        heard = server.heard[0]
        assert (heard.method, heard.target) == ("GET", "/base/up?x=1")
        assert heard.one("host") == f"127.0.0.1:{server.port}"
        assert heard.one("user-agent") == "farebox-health"
        assert server.connections == 1
        assert fleet.door.calls == [], "nobody pays for a probe"


async def test_only_the_statuses_that_the_seller_names_are_well():
    async with open_fleet(2, ASKING_ONLY, health=replace(CHECK, statuses=(204,))) as fleet:
        fleet.servers[0].answer = well_if({"probe": 200})
        fleet.servers[1].answer = well_if({"probe": 204})
        await until(lambda: fleet.healthy() == [False, True])
        asked = len(fleet.servers[1].heard)
        await until(lambda: len(fleet.servers[1].heard) > asked + 3)
        assert fleet.healthy() == [False, True]


async def test_an_endless_answer_to_a_probe_is_cut():
    async with open_fleet(1, ASKING_ONLY, health=CHECK) as fleet:
        server = fleet.servers[0]

        async def endless(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x" * 10_000)
                await writer.drain()
                await asyncio.sleep(0)
            raise ConnectionResetError

        server.answer = endless
        await until(lambda: len(server.heard) >= 3)
        assert fleet.healthy() == [True]
        assert server.open <= 1


async def test_probes_wait_like_calls_and_a_full_house_is_not_an_illness():
    async with open_fleet(1, ASKING_ONLY, health=replace(CHECK, timeout_s=0.2), connections_max=1) as fleet:
        free, server = asyncio.Event(), fleet.servers[0]

        async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if heard.target == "/long":
                await free.wait()
            await says_hello(heard, reader, writer)

        server.answer = waits
        with capture_logs() as lines:
            call = asyncio.create_task(fleet.get("/long"))
            await until(lambda: any(h.target == "/long" for h in server.heard))
            prober, given_up = fleet.pool(server).prober, 0
            assert prober is not None
            for _ in range(4):  # questions that begin to wait, and that are given up
                await until(lambda: prober._state == "waiting")
                await until(lambda: prober._state != "waiting")
                given_up += 1
            free.set()

            assert (await call).status == 200
            assert given_up > CHECK.unhealthy_after
            assert not [line for line in lines if line["event"] == "upstream_target_unhealthy"]


async def test_a_change_of_the_catalog_keeps_what_is_known_of_unchanged_targets():
    async with open_fleet(2, ASKING_ONLY, health=CHECK) as fleet:
        fleet.servers[0].answer = well_if({"probe": 503})
        await until(lambda: fleet.healthy() == [False, True])
        prober = fleet.pool(fleet.servers[0]).prober

        fleet.applies(timeout_s=7.0, balance="random")
        assert fleet.healthy() == [False, True]
        assert fleet.pool(fleet.servers[0]).prober is prober

        fleet.applies(health=None)
        assert fleet.healthy() == [True, True], "nobody asks it any more"
        await fleet.get()
        asked = len(fleet.servers[0].heard)

        fleet.applies(health=replace(CHECK, path="/other"))
        await until(lambda: any(h.target == "/other" for h in fleet.servers[0].heard[asked:]))


async def test_draining_stops_the_probes():
    async with open_fleet(1, ASKING_ONLY, health=CHECK) as fleet:
        server, free = fleet.servers[0], asyncio.Event()
        await until(lambda: server.heard)

        async def waits(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await free.wait()
            await says_hello(heard, reader, writer)

        server.answer = waits
        call = asyncio.create_task(fleet.get("/last"))
        await until(lambda: any(h.target == "/last" for h in server.heard))
        draining = asyncio.create_task(fleet.gateway.drain(10))
        await until(lambda: fleet.gateway.draining)
        assert all(pool.prober is None for pool in fleet.gateway.pools.all())
        fleet.applies(timeout_s=8.0)
        assert all(pool.prober is None for pool in fleet.gateway.pools.all())
        free.set()
        assert (await call).status == 200
        await draining


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────

RULES = GatewaySettings(strikes_max=3, ejection_s=5.0, ejection_s_max=60.0)


def struck_out(health: TargetHealth, now: float) -> None:
    while health.healthy:
        health.strike(now, "it hung up")


def test_failures_count_only_in_a_row():
    health = TargetHealth("up", "http://a", RULES)
    for _ in range(10):
        health.strike(0.0, "it hung up")
        health.strike(0.0, "it hung up")
        assert health.shaky
        health.heard(0.0)
        assert not health.shaky
    assert health.healthy


def test_each_time_out_is_twice_as_long_up_to_a_minute():
    health, now = TargetHealth("up", "http://a", RULES), 1000.0
    struck_out(health, now)
    for period_s in (5, 10, 20, 40, 60, 60):
        health.tick(now + period_s * 0.89)
        assert not health.trial_due
        now += period_s * 1.11
        health.tick(now)
        assert health.trial_due
        health.chosen(now)
        assert not health.trial_due, "one call at a time"
        health.strike(now, "it hung up again")
        assert not health.healthy


def test_a_target_that_was_well_for_long_begins_anew():
    health, now = TargetHealth("up", "http://a", RULES), 1000.0
    for _ in range(3):
        struck_out(health, now)
        health.heard(now)
    now += 61
    struck_out(health, now)
    health.tick(now + 5.6)
    assert health.trial_due


def test_a_trial_without_an_outcome_is_followed_by_another():
    health = TargetHealth("up", "http://a", RULES)
    struck_out(health, 0.0)
    health.tick(6.0)
    health.chosen(6.0)
    health.tick(10.9)
    assert not health.trial_due
    health.tick(11.0)
    assert health.trial_due
    health.heard(12.0)
    assert health.healthy


def test_it_takes_several_answers_in_a_row_to_change_ones_mind():
    health = TargetHealth("up", "http://a", RULES)
    verdicts = []
    for well in (False, False, True, False, False, False, True, False, True, True):
        health.probed(well, "it said so", healthy_after=2, unhealthy_after=3)
        verdicts.append(health.healthy)
    assert verdicts == [True] * 5 + [False] * 4 + [True]


def test_no_call_tries_what_says_itself_that_it_is_not_well():
    health = TargetHealth("up", "http://a", RULES)
    struck_out(health, 0.0)
    for _ in range(3):
        health.probed(False, "it said so", 2, 3)
    health.tick(6.0)
    assert not health.trial_due
    for _ in range(2):
        health.probed(True, "it said so", 2, 3)
    assert health.trial_due
