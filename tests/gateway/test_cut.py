"""A call ends when what it stands on ends: its pass is over, its key or customer was taken back."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import pytest

from farebox.app.admission import Admitted, Call, Standing
from tests.gateway.kit import QUICK, Heard, House, open_house
from tests.gateway.test_streaming import until
from tests.gateway.test_timeouts import says_nothing, trickles
from tests.gateway.test_tunnels import echoes, opened

ALICE = Standing("cus_alice", 1000.0, "key_alice")
BOB = Standing("pas_bob", float("inf"))


@dataclass
class BusinessDate:
    now_s: float = 500.0

    def __call__(self) -> float:
        return self.now_s


def stand_on(house: House, **by_path: Standing) -> None:
    def decide(call: Call) -> Admitted:
        return house.door.admitted(call, standing=by_path.get(call.path.strip("/")))

    house.door.decide = decide


async def begun(house: House, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A call whose answer trickles."""
    reader, writer = await house.connect()
    writer.write(b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize("revoked", ["cus_alice", "key_alice"])
async def test_a_revoked_subject_or_key_ends_its_calls_and_no_others(house: House, revoked: str):
    stand_on(house, alice=ALICE, bob=BOB)
    house.upstream.answer = trickles
    (alice, a), (bob, b), (free, c) = [await begun(house, path) for path in ("alice", "bob", "free")]

    assert house.gateway.cut([revoked, "key_other"]) == 1
    rest = await asyncio.wait_for(alice.read(), 10)
    await bob.readexactly(64)
    await free.readexactly(64)

    assert not rest.endswith(b"0\r\n\r\n")
    assert [f.status for f in house.door.finished] == [0]
    assert house.gateway.cut([revoked]) == 0
    for writer in (a, b, c):
        writer.close()


async def test_a_call_that_has_no_answer_yet_is_told_why(house: House):
    stand_on(house, alice=ALICE)
    house.upstream.answer = says_nothing
    asking = asyncio.ensure_future(house.get("/alice"))
    await until(lambda: house.upstream.heard)
    house.gateway.cut({"cus_alice"})
    said = await asking

    assert said.status == 401
    assert json.loads(said.body)["code"] == "credential_revoked"
    assert len(house.door.finished) == 1
    await until(lambda: house.upstream.open == 0)


async def test_a_call_that_was_forwarded_is_reported_as_abandoned(house: House):
    seen: list[Admitted] = []

    def decide(call: Call) -> Admitted:
        seen.append(house.door.admitted(call, standing=ALICE))
        return seen[-1]

    house.door.decide = decide
    house.upstream.answer = trickles
    _, writer = await begun(house, "alice")
    house.gateway.cut(["cus_alice"])
    writer.close()

    assert [a.abandoned for a in seen] == [True]
    assert house.door.finished[0].bytes_down > 0


async def test_a_pass_that_ends_by_the_business_date_ends_its_calls():
    date = BusinessDate()
    async with open_house(QUICK, business_now_s=date) as house:
        stand_on(house, alice=ALICE, bob=BOB)
        house.upstream.answer = trickles
        (alice, a), (bob, b) = [await begun(house, path) for path in ("alice", "bob")]
        await alice.readexactly(64)
        assert not house.door.finished

        date.now_s = 1000.0
        await asyncio.wait_for(alice.read(), 10)
        await bob.readexactly(64)

        assert [f.status for f in house.door.finished] == [0]
        a.close()
        b.close()


async def test_a_tunnel_is_cut_too(house: House):
    stand_on(house, talk=ALICE)
    house.upstream.answer = echoes
    reader, writer, _ = await opened(house)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    house.gateway.cut(["cus_alice"])
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()

    assert [(f.status, f.bytes_up, f.bytes_down) for f in house.door.finished] == [(101, 5, 5)]
    await until(lambda: house.upstream.open == 0)


async def test_an_upload_under_way_is_cut(house: House):
    async def swallows(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    stand_on(house, alice=ALICE)
    house.upstream.reads_bodies = False
    house.upstream.answer = swallows
    asking = asyncio.ensure_future(
        house.says(b"POST /alice HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf", methods=["POST"])
    )
    await until(lambda: house.upstream.heard)
    house.gateway.cut(["cus_alice"])
    answers = await asking

    assert answers.said[0].status == 401
    assert [f.bytes_up for f in house.door.finished] == [4]
