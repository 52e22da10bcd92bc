"""The connections to targets: bounded, shared fairly, kept over changes; and what becomes of a call whose target is away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace

import pytest

from farebox.domain.access import Upstream
from farebox.gateway.pools import Ticker, UpstreamPool, readdressed
from tests.gateway.fleet import AGILE, Fleet, open_fleet, until
from tests.gateway.kit import Heard, RealUpstream, says_hello


async def dead(fleet: Fleet, *servers: RealUpstream) -> None:
    for server in servers:
        await server.stop()


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_calls_wait_in_line_for_the_connections_an_upstream_may_have():
    async with open_fleet(1, connections_max=1, waiting_max=3) as fleet:
        free, server = asyncio.Event(), fleet.servers[0]
        server.answer = when(free)
        pool, calls = fleet.pool(server), []
        for number in range(4):
            calls.append(asyncio.create_task(fleet.get(f"/{number}")))
            await until(lambda n=number: pool.in_flight == n + 1)
        one_too_many = await fleet.get("/4")
        free.set()

        assert one_too_many.status == 503
        assert "retry-after" in one_too_many.headers
        assert [said.status for said in await asyncio.gather(*calls)] == [200] * 4
        assert [h.target for h in server.heard] == ["/0", "/1", "/2", "/3"], "first come, first served"
        assert server.connections == 1


async def test_a_client_that_leaves_the_line_is_not_called():
    async with open_fleet(1, connections_max=1) as fleet:
        free, server = asyncio.Event(), fleet.servers[0]
        server.answer = when(free)
        pool = fleet.pool(server)
        first = asyncio.create_task(fleet.get("/first"))
        await until(lambda: pool.in_flight == 1)
        second = asyncio.create_task(fleet.get("/second"))
        await until(lambda: pool.in_flight == 2)
        second.cancel()
        await until(lambda: pool.in_flight == 1)
        free.set()

        assert (await first).status == 200
        assert (await fleet.get("/third")).status == 200
        assert [h.target for h in server.heard] == ["/first", "/third"]


async def test_each_upstream_keeps_idle_connections_as_long_as_it_says():
    async with open_fleet(1, idle_timeout_s=0.1) as fleet:
        await fleet.get()
        await until(lambda: fleet.servers[0].open == 0)
        assert (await fleet.get()).status == 200


async def test_each_upstream_is_waited_for_as_long_as_it_says():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        async with open_fleet(1, url=f"http://127.0.0.1:{port}", connect_timeout_s=0.2) as fleet:
            with contextlib.ExitStack() as callers:
                for _ in range(3):  # more than its queue takes, and it takes nobody from there
                    caller = callers.enter_context(socket.socket())
                    caller.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        caller.connect(("127.0.0.1", port))
                assert (await fleet.get()).status == 504


async def test_a_target_that_hangs_up_at_once_costs_a_connection_a_call():
    taken = 0

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        taken += 1
        writer.transport.abort()

    server = await asyncio.start_server(hangs_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with open_fleet(1, url=url) as fleet:
        statuses = [(await fleet.get()).status for _ in range(5)]

        assert statuses == [502] * 5
        assert taken <= 10
        assert fleet.gateway.pools.all()[0].connections == 0
    server.close()


# ── a change of the catalog ──────────────────────────────────────────────────────────────────────────────────────────


async def test_unchanged_targets_keep_their_connections():
    async with open_fleet(1) as fleet, open_fleet(1) as other:
        await fleet.get("/before")
        fleet.applies(url="", targets=(fleet.servers[0].url, other.servers[0].url), timeout_s=9.0)
        await fleet.get("/one")
        await fleet.get("/two")

        assert [h.connection for h in fleet.servers[0].heard] == [1, 1]
        assert len(other.servers[0].heard) == 1


async def test_what_waits_for_a_target_that_is_taken_out_is_served_there():
    async with open_fleet(1, connections_max=1) as fleet, open_fleet(1) as other:
        free, server = asyncio.Event(), fleet.servers[0]
        server.answer = when(free)
        pool = fleet.pool(server)
        calls = [asyncio.create_task(fleet.get(f"/{n}")) for n in range(3)]
        await until(lambda: pool.in_flight == 3)
        fleet.applies(url=other.servers[0].url)
        assert (await fleet.get("/new")).status == 200
        free.set()

        assert [said.status for said in await asyncio.gather(*calls)] == [200] * 3
        assert len(server.heard) == 3
        assert [h.target for h in other.servers[0].heard] == ["/new"]
        await until(lambda: server.open == 0)


async def test_two_upstreams_of_one_address_have_limits_of_their_own():
    async with open_fleet(1, connections_max=1) as fleet:
        server = fleet.servers[0]
        fleet.gateway.replace_catalog(
            replace(
                fleet.catalog,
                version=2,
                upstreams=(Upstream("up0", server.url, connections_max=1), Upstream("up1", server.url)),
            )
        )
        assert sorted(p.settings.upstream_connections_max for p in fleet.gateway.pools.all()) == [1, 1024]


# ── targets that are away ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_target_that_cannot_be_reached_costs_no_call():
    """Not even one with a body that is only good for sending once: nothing of it was sent."""
    async with open_fleet(2) as fleet:
        await dead(fleet, fleet.servers[0])
        for number in range(4):
            assert (await fleet.get(f"/{number}")).status == 200
            assert (await fleet.get(f"/{number}", method="POST", body=b"x" * 100)).status == 200
            answers = await fleet.says(
                b"POST /chunked HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
                b"6\r\n world\r\n0\r\n\r\n",
                methods=["POST"],
            )
            assert [s.status for s in answers.said] == [200]

        heard = fleet.servers[1].heard
        assert len(heard) == 12
        assert {h.body for h in heard if h.target == "/chunked"} == {b"hello world"}
        assert fleet.gateway.counters.upstream_errors == {}


async def test_a_call_that_turns_elsewhere_is_addressed_to_whoever_gets_it():
    async with open_fleet(2, paths=("/one", "/other/v2")) as fleet:
        await dead(fleet, fleet.servers[0])
        for _ in range(2):
            assert (await fleet.get("/x?y=1", X_Note="Host: nobody")).status == 200

        for heard in fleet.servers[1].heard:
            assert heard.target == "/other/v2/x?y=1"
            assert heard.one("host") == f"127.0.0.1:{fleet.servers[1].port}"
            assert heard.one("x-note") == "Host: nobody"


@pytest.mark.parametrize(("attempts_max", "statuses"), [(1, {200, 502}), (2, {200, 502}), (3, {200})])
async def test_a_call_is_taken_to_so_many_targets_and_no_more(attempts_max: int, statuses: set[int]):
    settings = replace(AGILE, attempts_max=attempts_max, strikes_max=1000)
    async with open_fleet(3, settings) as fleet:
        await dead(fleet, *fleet.servers[:2])
        assert {(await fleet.get()).status for _ in range(6)} == statuses


async def test_what_was_sent_is_sent_again_only_if_that_is_harmless():
    async with open_fleet(2) as fleet:
        for server in fleet.servers:
            server.answer = breaks_off_once_for(fleet)
        assert (await fleet.get("/safe")).status == 200
        assert [h.target for s in fleet.servers for h in s.heard] == ["/safe", "/safe"]

        for server in fleet.servers:
            server.heard.clear()
        assert (await fleet.get("/order", method="POST", body=b"one piano")).status == 502
        assert [h.target for s in fleet.servers for h in s.heard] == ["/order"]


def breaks_off_once_for(fleet: Fleet):
    """The first server to hear of something hangs up without an answer; whoever hears of it after that answers."""

    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if sum(len(s.heard) for s in fleet.servers) == 1:
            writer.close()
            raise ConnectionResetError
        await says_hello(heard, reader, writer)

    return answer


def when(free: asyncio.Event):
    async def answer(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        await says_hello(heard, reader, writer)

    return answer


@pytest.mark.parametrize(
    ("one", "other", "data", "as_the_other_gets_it"),
    [
        (
            "http://a:1", "http://b:2/p",
            b"GET /x HTTP/1.1\r\nX: y\r\nHost: a:1\r\n\r\n",
            b"GET /p/x HTTP/1.1\r\nX: y\r\nHost: b:2\r\n\r\n",
        ),
        (
            "http://a:1/p", "http://b:2",
            b"POST /p/p/x HTTP/1.1\r\nHost: a:1\r\n\r\n\r\nHost: a:1\r\n",
            b"POST /p/x HTTP/1.1\r\nHost: b:2\r\n\r\n\r\nHost: a:1\r\n",
        ),
        (  # a route that keeps the client's Host: there is no name of the target to change, not in the body either
            "http://a:1", "http://b:2/p",
            b"PUT / HTTP/1.1\r\nHost: shop\r\n\r\n\r\nHost: a:1\r\n\r\n",
            b"PUT /p/ HTTP/1.1\r\nHost: shop\r\n\r\n\r\nHost: a:1\r\n\r\n",
        ),
        ("http://a:1/p", "http://a:1/p", b"GET /p/ HTTP/1.1\r\n\r\n", b"GET /p/ HTTP/1.1\r\n\r\n"),
    ],
)  # fmt: skip
def test_a_request_is_readdressed_in_its_head_alone(
    one: str, other: str, data: bytes, as_the_other_gets_it: bytes
):
    pools = [UpstreamPool(url, AGILE, Ticker()) for url in (one, other)]
    assert readdressed(data, *pools) == as_the_other_gets_it
