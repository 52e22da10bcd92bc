"""Events come in once, durably, with a clear word for each; and are read back exactly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farebox.app.events import event_from, read_batch, read_event
from farebox.app.metering import Accepted
from farebox.base.errors import Reason, Refused
from farebox.domain.catalog import BooleanEntitlement, LimitEntitlement, Metric
from farebox.domain.usage import UsageEvent, aggregate
from farebox.store.pool import Database
from tests.app.office import Office, at, period

NOVEMBER = period("2026-11-01", "2026-12-01")


@pytest.fixture
async def office(database: Database) -> AsyncIterator[Office]:
    opened = Office(database)
    await opened.opened()
    yield opened
    await opened.close()


async def refusal(coroutine: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await coroutine  # type: ignore[misc]
    return caught.value.reason


async def test_the_same_event_sent_ten_times_at_once_is_stored_once(office: Office):
    event = office.event("7")

    answers = await asyncio.gather(*(office.metering.accept_one(event) for _ in range(10)))

    assert len({answer.event_id for answer in answers}) == 1
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 9
    assert (await office.metering.compute("acme", "api_calls", NOVEMBER)).value == 7


async def test_a_key_used_for_another_body_is_a_conflict_and_names_the_first_event(office: Office):
    first = await office.used("7", idempotency_key="k")

    for other in ({"value": "8"}, {"value": "7", "properties": {"a": 1}}):
        reason = await refusal(office.metering.accept_one(office.event(idempotency_key="k", **other)))
        assert (reason.code, reason.field) == ("EVENT_CONFLICT", "idempotency_key")
        assert reason.facts["event_id"] == first.event_id


async def test_the_same_body_may_be_written_differently(office: Office):
    first = await office.used("7.50", idempotency_key="k", properties={"a": 1, "b": 2})

    body = b'{"idempotency_key": "k", "metric_key": "api_calls", "value": 7.5, "properties": {"b":2, "a":1}, "customer_id": "acme"}'
    again = await office.metering.accept_one(read_event(body))

    assert again == Accepted(first.event_id, "k", duplicate=True)


async def test_one_bad_event_never_rejects_the_rest_of_a_batch(office: Office):
    await office.used("1", idempotency_key="before")
    batch = [
        office.event("1", idempotency_key="a"),
        office.event("1", customer_id="nobody"),
        office.event("1", metric_key="nothing"),
        office.event("1", idempotency_key="a"),
        office.event("2", idempotency_key="a"),
        office.event("1", when="1999-01-01"),
        office.event("1", when="2026-11-21T01:00:01"),
        office.event("1", idempotency_key="before"),
        office.event("2", idempotency_key="before"),
        Reason("EVENT_MALFORMED", "could not be read"),
        office.event("5", idempotency_key="z"),
    ]

    results = await office.metering.accept_batch(batch)

    said = [r.code if isinstance(r, Reason) else ("again" if r.duplicate else "stored") for r in results]
    assert said == [
        "stored", "CUSTOMER_UNKNOWN", "METRIC_UNKNOWN", "again", "EVENT_CONFLICT", "TIMESTAMP_TOO_OLD",
        "TIMESTAMP_IN_FUTURE", "again", "EVENT_CONFLICT", "EVENT_MALFORMED", "stored",
    ]  # fmt: skip
    used = await office.metering.compute("acme", "api_calls", NOVEMBER)
    assert (used.value, used.events) == (7, 3)
    assert await office.rows("SELECT row_count FROM ingest_batch ORDER BY id") == [(1,), (2,)]


async def test_a_batch_sent_again_stores_nothing_and_answers_the_same(office: Office):
    batch = [office.event() for _ in range(1000)]

    first = await office.metering.accept_batch(batch)
    again = await office.metering.accept_batch(batch)

    assert [a.event_id for a in first] == [a.event_id for a in again]  # type: ignore[union-attr]
    assert all(a.duplicate for a in again)  # type: ignore[union-attr]
    assert (await office.metering.compute("acme", "api_calls", NOVEMBER)).events == 1000


async def test_overlapping_batches_in_opposite_orders_do_not_deadlock(office: Office):
    events = [office.event() for _ in range(300)]

    results = await asyncio.gather(*(office.metering.accept_batch(events[::step]) for step in (1, -1) * 4))

    assert len({a.event_id for r in results for a in r}) == 300  # type: ignore[union-attr]
    assert (await office.metering.compute("acme", "api_calls", NOVEMBER)).events == 300


async def test_an_inactive_metric_takes_nothing_from_the_next_event_on(office: Office):
    await office.used()
    await office.plans.deactivate_metric("test", "api_calls")

    reason = await refusal(office.used())

    assert (reason.code, reason.field) == ("METRIC_INACTIVE", "metric_key")


async def test_whole_units_and_needed_properties_are_asked_for(office: Office):
    await office.metric("seats", value_type="integer")
    await office.metric("users", "unique_count", property="user")

    assert (await refusal(office.used("1.5", metric_key="seats"))).code == "VALUE_NOT_INTEGER"
    reason = await refusal(office.used(metric_key="users", properties={"who": "ann"}))
    assert (reason.code, reason.field) == ("PROPERTY_MISSING", "properties.user")


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"{", "EVENT_MALFORMED", None),
        (b"[]", "EVENT_MALFORMED", None),
        (b'{"customer_id": "acme"}', "EVENT_MALFORMED", "metric_key"),
        (b'{"customer_id": 1, "metric_key": "m", "idempotency_key": "k"}', "EVENT_MALFORMED", "customer_id"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "who": 1}', "EVENT_MALFORMED", "who"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": ""}', "IDEMPOTENCY_KEY_INVALID", "idempotency_key"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "\\u0000"}', "IDEMPOTENCY_KEY_INVALID", "idempotency_key"),
        (b'{"customer_id": "a\\u0000", "metric_key": "m", "idempotency_key": "k"}', "EVENT_MALFORMED", "customer_id"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": -1}', "DECIMAL_NEGATIVE", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": "NaN"}', "DECIMAL_NOT_FINITE", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": "Infinity"}', "DECIMAL_NOT_FINITE", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": 1e400000}', "DECIMAL_TOO_LARGE", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": "1e-31"}', "DECIMAL_TOO_FINE", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "value": true}', "EVENT_MALFORMED", "value"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "timestamp": "2026-11-21T10:00:00"}', "TIMESTAMP_MALFORMED", "timestamp"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "timestamp": "yesterday"}', "EVENT_MALFORMED", "timestamp"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": []}', "EVENT_MALFORMED", "properties"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": {"a": "\\u0000"}}', "PROPERTIES_MALFORMED", "properties"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": {"a": 1e300}}', "PROPERTIES_MALFORMED", "properties"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": {"a": ' + b"[" * 20 + b"]" * 20 + b"}}", "PROPERTIES_MALFORMED", "properties"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", "PROPERTIES_MALFORMED", "properties"),
        (b'{"customer_id": "a", "metric_key": "m", "idempotency_key": "k", "properties": {"a": "' + b"x" * 9000 + b'"}}', "PROPERTIES_TOO_LARGE", "properties"),
    ],
)  # fmt: skip
def test_a_malformed_event_is_refused_with_its_field(body: bytes, code: str, field: str | None):
    with pytest.raises(Refused) as caught:
        read_event(body)

    assert (caught.value.reason.code, caught.value.reason.field) == (code, field)
    if body != b"{":
        assert [r.code for r in read_batch(b'{"events": [' + body + b"]}")] == [code]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"nonsense", "BATCH_MALFORMED"),
        (b'{"event": []}', "BATCH_MALFORMED"),
        (b'{"events": []}', "BATCH_EMPTY"),
        (b'{"events": [' + b"{}," * 1000 + b"{}]}", "BATCH_TOO_LARGE"),
    ],
)
def test_a_malformed_batch_is_refused_as_a_whole(body: bytes, code: str):
    with pytest.raises(Refused) as caught:
        read_batch(body)
    assert caught.value.reason.code == code


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(-1e90, 1e90).filter(lambda f: f == 0 or abs(f) > 1e-90)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.isprintable),
    properties=st.dictionaries(texts, json_values, max_size=5),
    value=st.decimals(0, 10**39, places=20),
)
def test_whatever_is_accepted_comes_back_as_it_was_sent(
    database_url: str, key: str, properties: dict[str, object], value: Decimal
):
    async def tell() -> None:
        async with Office_at(database_url) as office:
            event = event_from(
                {
                    "customer_id": "acme",
                    "metric_key": "api_calls",
                    "idempotency_key": key,
                    "value": f"{value:f}",
                    "properties": properties,
                }
            )
            accepted = await office.metering.accept_one(event)
            [(stored_key, stored_value, stored)] = await office.rows(
                "SELECT idempotency_key, value, properties::text FROM usage_event WHERE event_id = %s",
                accepted.event_id,
            )
            assert (stored_key, stored_value) == (key, value)
            assert exact(stored) == exact(json.dumps(properties))
            await office.rows("DELETE FROM usage_event_key RETURNING 1")

    asyncio.run(tell())


def exact(text: str) -> Any:
    """JSON with its numbers as written: jsonb keeps every digit."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


class Office_at:
    """An office in an event loop of its own."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Office:
        self._database = await Database.open(self._url, size_max=2, name="test")
        self._office = Office(self._database)
        if not await self._office.rows("SELECT FROM customer"):
            await self._office.opened()
        return self._office

    async def __aexit__(self, *_: object) -> None:
        await self._office.close()
        await self._database.close()


@pytest.mark.parametrize("aggregation", ["sum", "count", "max", "min", "last", "unique_count"])
async def test_postgresql_and_the_domain_come_to_the_same_number(office: Office, aggregation: str):
    prop = "user" if aggregation == "unique_count" else None
    await office.metric("m", aggregation, property=prop)  # type: ignore[arg-type]
    metric = Metric("m", "m", aggregation, prop)  # type: ignore[arg-type]
    assert (await office.metering.compute("acme", "m", NOVEMBER)).value == aggregate(metric, [])
    values = [
        ("3", "02", "ann"),
        ("0.5", "05", 7),
        ("9", "04", "ann"),
        ("9", "05", True),
        ("1.25", "03", "bob"),
    ]
    for value, day, user in values:
        await office.used(value, f"2026-11-{day}", metric_key="m", properties={"user": user})

    rows = await office.rows(
        "SELECT event_id, customer_id, metric_key, value, timestamp, idempotency_key, properties, batch_id FROM usage_event"
    )
    expected = aggregate(metric, [UsageEvent(*row) for row in rows])
    used = await office.metering.compute("acme", "m", NOVEMBER)

    assert (used.value, used.events) == (expected, 5)


async def test_the_summary_follows_the_fold_by_days_of_the_customers_zone(office: Office):
    await office.customer("kiwi", timezone="Pacific/Auckland")
    for when, value in (("2026-11-10T10:59", "1"), ("2026-11-10T11:00", "2"), ("2026-11-11T10:59", "4")):
        await office.used(value, when, customer_id="kiwi")
    before = await office.metering.summary("kiwi", "api_calls", NOVEMBER)
    assert before.events == 0
    assert before.lag_s >= 0

    assert await office.folded() == (3, 3)
    assert await office.folded() == (0, 0)

    after = await office.metering.summary("kiwi", "api_calls", NOVEMBER)
    assert [(str(d.day), d.value, d.events) for d in after.days] == [
        ("2026-11-10", 1, 1),
        ("2026-11-11", 6, 2),
    ]
    assert (after.value, after.events, after.lag_s) == (7, 3, 0)


async def test_a_batch_that_is_held_open_is_folded_when_it_commits(office: Office, database_url: str):
    async with await psycopg.AsyncConnection.connect(database_url) as slow:
        await slow.execute("INSERT INTO ingest_batch (source, row_count) VALUES ('test', 1)")
        await slow.execute(
            """INSERT INTO usage_event (event_id, customer_id, metric_key, value, timestamp, batch_id)
               SELECT 'evt_slow', 'acme', 'api_calls', 1000, '2026-11-20Z', max(id) FROM ingest_batch"""
        )
        for _ in range(5):
            await office.used("1", "2026-11-20")
        assert await office.folded() == (5, 5)
        assert (await office.metering.summary("acme", "api_calls", NOVEMBER)).value == 5
        await slow.commit()

    assert await office.folded() == (1, 1)
    assert (await office.metering.summary("acme", "api_calls", NOVEMBER)).value == 1005


async def test_api_events_spend_the_quota_of_their_period_once(office: Office):
    await office.customer("beta")
    await office.plan(
        "limited", (), (LimitEntitlement("calls", "api_calls", Decimal(100)), BooleanEntitlement("sso"))
    )
    await office.used("5", "2026-11-03", customer_id="beta")
    await office.used("1000", "2026-10-31T23:59", customer_id="beta")
    await office.subscribed("beta", "limited")

    seeded = await office.entitlements.check("beta", "calls")
    again = office.event("10", "2026-11-20", customer_id="beta")
    for _ in range(3):
        await office.metering.accept_one(again)
    await office.metering.accept_batch(
        [office.event("2", "2026-11-20", customer_id="beta") for _ in range(10)]
    )
    after = await office.entitlements.check("beta", "calls")

    assert (seeded.current_usage, seeded.remaining) == (5, 95)
    assert (after.current_usage, after.remaining, after.exceeded) == (35, 65, False)


async def test_a_count_metric_spends_one_an_event(office: Office):
    await office.metric("requests", "count")
    await office.customer("beta")
    await office.plan("counted", (), (LimitEntitlement("requests", "requests", Decimal(3)),))
    await office.subscribed("beta", "counted")

    await office.metering.accept_batch(
        [office.event("500", customer_id="beta", metric_key="requests") for _ in range(3)]
    )

    checked = await office.entitlements.check("beta", "requests")
    assert (checked.current_usage, checked.remaining, checked.exceeded) == (3, 0, True)


async def test_events_that_come_while_a_counter_is_made_are_counted_once(office: Office):
    await office.customer("beta")
    await office.plan("limited", (), (LimitEntitlement("calls", "api_calls", Decimal(10_000)),))

    async def stream() -> None:
        for _ in range(40):
            await office.metering.accept_batch(
                [office.event("1", "2026-11-05", customer_id="beta") for _ in range(5)]
            )

    await asyncio.gather(stream(), stream(), office.subscribed("beta", "limited"))

    assert (await office.entitlements.check("beta", "calls")).current_usage == 400


async def test_a_timestamp_an_hour_ahead_is_the_last_one_taken(office: Office):
    now = office.clock.instant
    await office.used(when=(now + timedelta(hours=1)).isoformat()[:19])

    reason = await refusal(office.used(when=(now + timedelta(hours=1, seconds=1)).isoformat()[:19]))

    assert (reason.code, reason.field) == ("TIMESTAMP_IN_FUTURE", "timestamp")
    assert at("2026-11-21") == now


@pytest.mark.parametrize("count", [3, 150])
async def test_what_is_odd_but_allowed_is_stored_as_it_was_sent_in_small_and_in_large_batches(
    office: Office, count: int
):
    odd = {
        "customer_id": "acme",
        "metric_key": "api_calls",
        "value": "1E+2",
        "timestamp": "2026-11-20T01:00:00.5+05:30",
        "properties": {"path": "C:\\new\ttab", "line": "a\nb", "name": "Zoë"},
    }
    events = [{**odd, "idempotency_key": f"k\\t{n}"} for n in range(count)]
    body = json.dumps({"events": events}, indent=1).encode()

    first = await office.metering.accept_batch(read_batch(body))
    again = await office.metering.accept_batch(read_batch(json.dumps({"events": events}).encode()))

    assert [a.duplicate for a in first if isinstance(a, Accepted)] == [False] * count
    assert again == [Accepted(a.event_id, a.idempotency_key, True) for a in first if isinstance(a, Accepted)]
    stored = await office.rows(
        "SELECT DISTINCT value, timestamp::text, properties, starts_with(idempotency_key, 'k\\t') FROM usage_event"
    )
    assert stored == [(Decimal(100), "2026-11-19 19:30:00.5+00", odd["properties"], True)]


@settings(max_examples=300)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "customer_id": st.sampled_from(["acme", "", "a" * 101, "a\tb", "Zoë"]),
                "metric_key": st.sampled_from(["m", "", "\u200b"]),
                "idempotency_key": st.sampled_from(["k", "", "k" * 256, "k\n"]),
                "value": st.sampled_from(["1", "1.5", "-1", "1E+2", "NaN", "9" * 41, "0." + "0" * 30 + "1"]),
                "timestamp": st.sampled_from(["2026-11-20T00:00:00Z", "2026-11-20T00:00:00"]),
                "properties": st.sampled_from(
                    [{}, {"a": 1}, {"a": [1]}, {"a": "\u0000"}, {"a": 1e200}, {"a": "b" * 9000}, [], 7]
                ),
            }
        ),
        min_size=1,
        max_size=2,
    )
)
def test_a_batch_finds_the_faults_that_each_event_has_alone(documents: list[dict[str, Any]]):
    def alone(document: dict[str, Any]) -> object:
        try:
            return read_event(json.dumps(document).encode())
        except Refused as refused:
            return refused.reason

    assert read_batch(json.dumps({"events": documents}).encode()) == [alone(d) for d in documents]
