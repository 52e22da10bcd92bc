"""Events: durable before the answer, once per key, and one bad event never rejects the rest."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.conftest import Shop

EVENT: dict[str, Any] = {
    "customer_id": "acme",
    "metric_key": "api_calls",
    "idempotency_key": "k1",
    "value": "2.5",
    "properties": {"city": "Paris"},
}


@pytest.fixture
async def metered(open_shop: Shop) -> Shop:
    await open_shop.has_customer()
    return open_shop


async def stored(shop: Shop) -> int:
    async with shop.database.connection() as tx:
        row = await (await tx.execute("SELECT count(*) FROM usage_event")).fetchone()
    assert row is not None
    return int(row[0])


async def test_an_event_is_stored_once_under_its_key(metered: Shop):
    first = await metered.post("/v1/events", EVENT, 202)
    again = await metered.post("/v1/events", EVENT, 202)
    assert first == again
    assert first["status"] == "queued"
    assert first["idempotency_key"] == "k1"
    code, field = await metered.refusal("/v1/events", {**EVENT, "value": 3}, 409)
    assert (code, field) == ("EVENT_CONFLICT", "idempotency_key")
    assert await stored(metered) == 1


async def test_twenty_at_once_are_one_event(metered: Shop):
    answers = await asyncio.gather(*(metered.http.post("/v1/events", json=EVENT) for _ in range(20)))
    assert {a.status_code for a in answers} == {202}
    assert len({a.json()["event_id"] for a in answers}) == 1
    assert await stored(metered) == 1


async def test_the_key_may_stand_in_the_header(metered: Shop):
    event = {k: v for k, v in EVENT.items() if k != "idempotency_key"}
    first = await metered.post("/v1/events", event, 202, Idempotency_Key="from the header")
    again = await metered.post("/v1/events", event, 202, Idempotency_Key="from the header")
    assert first == again
    assert first["idempotency_key"] == "from the header"
    body_wins = await metered.post("/v1/events", EVENT, 202, Idempotency_Key="ignored")
    assert body_wins["idempotency_key"] == "k1"


async def test_events_are_read_back_newest_first(metered: Shop):
    for day in (1, 2, 3):
        await metered.post(
            "/v1/events",
            {**EVENT, "idempotency_key": f"k{day}", "timestamp": f"2026-03-0{day}T00:00:00Z"},
            202,
        )
    period = {"period_start": "2026-03-01", "period_end": "2026-04-01"}
    everything = (await metered.get("/v1/events", customer_id="acme", **period))["data"]
    assert [e["idempotency_key"] for e in everything] == ["k3", "k2", "k1"]
    assert everything[0]["properties"] == {"city": "Paris"}
    assert everything[0]["value"] == "2.5"
    page = await metered.get("/v1/events", limit="2", **period)
    rest = await metered.get("/v1/events", limit="2", cursor=page["next_cursor"], **period)
    assert [e["idempotency_key"] for e in (*page["data"], *rest["data"])] == ["k3", "k2", "k1"]
    assert rest["next_cursor"] is None
    assert (await metered.get("/v1/events", customer_id="nobody", **period))["data"] == []
    assert (await metered.get("/v1/events", 422, period_end="0001-01-01"))["error"]["code"] == "PERIOD_EMPTY"
    assert (await metered.get("/v1/events", 422, period_start="2026-04-01", period_end="2026-03-01"))[
        "error"
    ]["code"] == "PERIOD_EMPTY"


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"customer_id": "nobody"}, 422, "customer_id"),
        ({"metric_key": "nothing"}, 422, "metric_key"),
        ({"value": "-5"}, 422, "value"),
        ({"value": "NaN"}, 400, "value"),
        ({"value": "1e400"}, 422, "value"),
        ({"value": "1" * 60}, 422, "value"),
        ({"value": "lots"}, 400, "value"),
        ({"timestamp": "2026-03-01T00:00:00"}, 400, "timestamp"),
        ({"timestamp": "2001-01-01T00:00:00Z"}, 422, "timestamp"),
        ({"timestamp": "2099-01-01T00:00:00Z"}, 422, "timestamp"),
        ({"idempotency_key": ""}, 400, "idempotency_key"),
        ({"idempotency_key": "x" * 256}, 400, "idempotency_key"),
        ({"properties": {"a": "x" * 9000}}, 422, "properties"),
        ({"properties": []}, 400, "properties"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
async def test_a_faulty_event_is_refused(
    metered: Shop, change: dict[str, Any], status: int, field: str | None
):
    answer = await metered.http.post("/v1/events", json={**EVENT, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field), error
    assert await stored(metered) == 0


async def test_a_batch_answers_for_each_event(metered: Shop):
    events = [
        {**EVENT, "idempotency_key": "a"},
        {**EVENT, "idempotency_key": "b", "value": "-1"},
        {"customer_id": "acme"},
        {**EVENT, "idempotency_key": "a", "value": 9},
        {**EVENT, "idempotency_key": "c", "metric_key": "nothing"},
        "not an event",
        {**EVENT, "idempotency_key": "d"},
    ]
    answer = await metered.post("/v1/events/batch", {"events": events}, 207)
    results = answer["results"]
    assert [r["status"] for r in results] == [
        "queued",
        "rejected",
        "rejected",
        "rejected",
        "rejected",
        "rejected",
        "queued",
    ]
    assert results[3]["error"]["code"] == "EVENT_CONFLICT"
    assert results[3]["http_status"] == 409
    assert results[4]["error"]["field"] == "metric_key"
    assert await stored(metered) == 2


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{}", 400, "BATCH_MALFORMED"),
        (b'{"events": []}', 400, "BATCH_EMPTY"),
        (b'{"events": 5}', 400, "BATCH_MALFORMED"),
        (b"[" * 50_000, 400, "BATCH_MALFORMED"),
        (json.dumps({"events": [EVENT] * 1001}).encode(), 413, "BATCH_TOO_LARGE"),
        (b" " * 10_000_001, 413, "BODY_TOO_LARGE"),
    ],
)
async def test_a_faulty_batch_is_refused_whole(metered: Shop, body: bytes, status: int, code: str):
    answer = await metered.http.post("/v1/events/batch", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_deep_nesting_in_an_event_is_malformed(metered: Shop):
    deep = (
        b'{"customer_id":"acme","metric_key":"api_calls","idempotency_key":"k","properties":{"a":'
        + b"[" * 3000
        + b"]" * 3000
        + b"}}"
    )
    answer = await metered.http.post("/v1/events", content=deep)
    assert answer.status_code == 400


async def test_usage_counts_against_the_entitlement_at_once(metered: Shop):
    await metered.post("/v1/events", {**EVENT, "value": 400, "idempotency_key": "x"}, 202)
    seen = await metered.get("/v1/entitlements/check", customer_id="acme", feature_key="api_calls")
    assert (seen["current_usage"], seen["remaining"], seen["exceeded"]) == ("400", "600", False)
