"""Every kind of limit of a pass at the door: what is refused when, what comes back, and what the client is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farebox.app.admission import Admitted, Refusal
from farebox.domain.access import FreeFare
from farebox.domain.limits import PassLimits, RequestWindow
from farebox.domain.passes import counter_of
from farebox.store import limits as limits_store
from tests.app.gate import ACCOUNT, EVERYTHING, Gate, a_call, a_customer, a_gate, header, sell_pass

#: Longer than any test, so that none meets its end.
LONG_S = 31 * 86_400


@pytest.fixture
async def gate(database_url: str, tmp_path: Path) -> AsyncIterator[Gate]:
    async with a_gate(database_url, tmp_path / "spool") as opened:
        yield opened


async def lets_in(gate: Gate, token: str) -> Admitted:
    return await gate.lets_in(a_call(EVERYTHING, Authorization=f"Bearer {token}"))


async def refuses(gate: Gate, token: str) -> Refusal:
    return await gate.refuses(a_call(EVERYTHING, Authorization=f"Bearer {token}"))


async def spent(gate: Gate, kind: str) -> int:
    """As the database knows it, once everybody has said what he used."""
    await gate.leases.heartbeat()
    counter = counter_of("pas_1", kind)  # type: ignore[arg-type]
    async with gate.database.connection() as tx:
        return int((await limits_store.counted(tx, [counter]))[counter].used)


async def test_only_so_many_calls_at_once_whatever_becomes_of_them(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(concurrency=2))
    served, failed = await lets_in(gate, token), await lets_in(gate, token)

    third = await refuses(gate, token)
    served.finish(200, 0, 10)
    again = await lets_in(gate, token)
    failed.finish(0, 0, 0)
    again.finish(503, 0, 0)

    assert third.reason.code == "concurrency_exceeded"
    assert third.retry_after_s is not None
    for _ in range(2):
        await lets_in(gate, token)


async def test_only_so_many_calls_in_a_window(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(requests=RequestWindow(2, LONG_S)))
    for _ in range(2):
        (await lets_in(gate, token)).finish(200, 0, 0)

    refused = await refuses(gate, token)

    assert refused.reason.code == "window_exceeded"
    assert refused.retry_after_s is not None
    assert 0 < refused.retry_after_s <= LONG_S
    assert header(refused.answer_headers, b"RateLimit-Limit") == b"2"


async def test_a_call_that_is_not_billed_does_not_count_in_its_window(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(requests=RequestWindow(1, LONG_S), credits=1))
    (await lets_in(gate, token)).finish(0, 0, 0)
    (await lets_in(gate, token)).finish(200, 0, 0)

    assert (await refuses(gate, token)).reason.code == "pass_exhausted"


async def test_all_limits_are_taken_together_or_not_at_all(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(calls=10, credits=10, concurrency=1))
    running = await lets_in(gate, token)

    for _ in range(5):
        assert (await refuses(gate, token)).reason.code == "concurrency_exceeded"
    running.finish(200, 0, 0)

    assert await spent(gate, "calls") == 1
    assert await spent(gate, "credits") == 1


@pytest.mark.parametrize(
    ("said", "cost"),
    [
        ([], 1), ([b"-5"], 5), ([b"0"], 0), ([b"+3"], -3), ([b" -7 "], 7), ([b"-2", b"-9"], 9),
        ([b"-1000001"], 1), ([b"five"], 1), ([b"-5.5"], 1), ([b"-4", b"nonsense"], 4), ([b""], 1),
    ],
)  # fmt: skip
async def test_the_upstream_says_what_a_call_costs(gate: Gate, said: list[bytes], cost: int) -> None:
    token = await sell_pass(gate, limits=PassLimits(credits=500))
    for _ in range(10):
        (await lets_in(gate, token)).finish(200, 0, 0)
    admitted = await lets_in(gate, token)
    assert admitted.meter is not None

    for value in said:
        admitted.meter.credits(value)
    admitted.finish(200, 0, 0)

    assert await spent(gate, "credits") == 10 + cost


async def test_a_call_that_is_not_billed_costs_no_credits_whatever_was_said(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(credits=500))
    admitted = await lets_in(gate, token)
    assert admitted.meter is not None

    admitted.meter.credits(b"-100")
    admitted.finish(0, 0, 0)

    assert await spent(gate, "credits") == 0


async def test_one_call_may_overdraw_and_the_next_is_refused(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(credits=10))
    admitted = await lets_in(gate, token)
    assert admitted.meter is not None

    admitted.meter.credits(b"-25")
    admitted.finish(200, 0, 0)

    refused = await refuses(gate, token)
    assert (refused.reason.code, refused.reason.facts["limit"]) == ("pass_exhausted", "credits")
    assert await spent(gate, "credits") == 25


async def test_credits_given_never_make_more_than_was_bought(gate: Gate) -> None:
    token = await sell_pass(gate, limits=PassLimits(credits=5))
    admitted = await lets_in(gate, token)
    assert admitted.meter is not None
    admitted.meter.credits(b"+1000")
    admitted.finish(200, 0, 0)
    await gate.leases.heartbeat()

    for _ in range(5):
        (await lets_in(gate, token)).finish(200, 0, 0)

    assert (await refuses(gate, token)).reason.code == "pass_exhausted"


async def test_the_headers_tell_of_the_limit_that_is_nearest_to_its_end(gate: Gate) -> None:
    held = PassLimits(calls=1000, credits=4, concurrency=1, download_bytes=10**6)
    token = await sell_pass(gate, limits=held, expires_at=datetime.now(UTC) + timedelta(hours=1))

    first = await lets_in(gate, token)
    first.finish(200, 0, 0)
    answer = (await lets_in(gate, token)).told_client()

    assert header(answer, b"RateLimit-Limit") == b"4"
    assert header(answer, b"RateLimit-Remaining") == b"2"
    assert header(answer, b"Farebox-Pass-Remaining") == (
        b"calls=998;credits=2;concurrency=0;download_bytes=1000000"
    )


async def test_calls_of_one_grant_and_route_stand_on_one_thing(gate: Gate) -> None:
    over = datetime.now(UTC) + timedelta(hours=1)
    token = await sell_pass(gate, calls=10, expires_at=over)
    key = await a_customer(gate.database, expires_at=over)

    by_pass = [(await lets_in(gate, token)).standing for _ in range(2)]
    by_key = [(await gate.lets_in(a_call(ACCOUNT, X_API_Key=key))).standing for _ in range(2)]

    assert by_pass[0] is by_pass[1]
    assert by_pass[0] is not None
    assert (by_pass[0].subject_id, by_pass[0].expires_s, by_pass[0].key_id) == ("pas_1", over.timestamp(), "")
    assert by_key[0] is by_key[1]
    assert by_key[0] is not None
    assert (by_key[0].subject_id, by_key[0].key_id) == ("acme", "ck_acme")
    assert by_key[0].expires_s > over.timestamp(), "a period's end ends no call of an account"


async def test_free_calls_need_nothing_and_leave_no_trace(gate: Gate) -> None:
    free = replace(ACCOUNT, account=None, free=FreeFare())

    admitted = await gate.lets_in(a_call(free, X_API_Key="fbx_ck_" + "a" * 32))
    admitted.finish(200, 0, 10)

    assert admitted.fare == "free"
    assert dict(admitted.told_upstream()).keys() == {b"Farebox-Request-Id", b"Farebox-Route"}
    assert gate.records() == []


async def test_only_the_free_methods_of_a_route_are_free(gate: Gate) -> None:
    some = replace(EVERYTHING, free=FreeFare(("OPTIONS",)))
    preflight, paid = a_call(some, Payment_Signature="good"), a_call(some)
    preflight.method = "OPTIONS"

    assert not gate.door.needs_body(preflight)
    assert (await gate.lets_in(preflight)).fare == "free"
    assert (await gate.refuses(paid)).reason.code == "payment_required"


async def test_a_route_that_sells_free_methods_only_says_so(gate: Gate) -> None:
    some = replace(ACCOUNT, account=None, free=FreeFare(("GET",)))
    call = a_call(some)
    call.method = "POST"

    assert (await gate.refuses(call)).reason.code == "not_for_sale"
