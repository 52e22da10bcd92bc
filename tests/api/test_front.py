"""What every request meets: who asks, how often, how large, how strict; and that nothing of ours leaks out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from farebox.api.rate_limits import RateLimits
from tests.api.conftest import Shop

PATHS_WITHOUT_KEY = ("/healthz", "/ready", "/openapi.json", "/docs")


# ── who asks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "API_KEY_MISSING"),
        ("Bearer", "API_KEY_MISSING"),
        ("Basic YTpi", "API_KEY_MISSING"),
        ("Bearer fbx_sk_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "API_KEY_UNKNOWN"),
        ("Bearer fbx_ck_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "API_KEY_UNKNOWN"),
        ("Bearer \xff\xfe", "API_KEY_UNKNOWN"),
        ("Bearer " + "x" * 5000, "API_KEY_UNKNOWN"),
    ],
)
async def test_without_a_good_key_nothing_is_answered(shop: Shop, authorization: str | None, code: str):
    transport = httpx.ASGITransport(app=shop.process.app)
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as stranger:
        for path in ("/v1/metrics", "/v1/events", "/v1/nothing/here"):
            answer = await stranger.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == code
            assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_revoked_key_opens_nothing_any_more(shop: Shop):
    made = await shop.post("/v1/api-keys", {"name": "short-lived", "scopes": ["billing:read"]})
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert (await shop.http.get("/v1/metrics", headers=headers)).status_code == 200

    assert (await shop.http.delete(f"/v1/api-keys/{made['key_id']}")).status_code == 204
    for _ in range(100):
        answer = await shop.http.get("/v1/metrics", headers=headers)
        if answer.status_code == 401:
            break
        await asyncio.sleep(0.05)
    assert answer.json()["error"]["code"] == "API_KEY_ENDED"


@pytest.mark.parametrize(
    ("scope", "method", "path", "body"),
    [
        ("billing:read", "POST", "/v1/metrics", {"key": "m", "name": "M", "aggregation": "sum"}),
        (
            "billing:read",
            "POST",
            "/v1/events",
            {"customer_id": "a", "metric_key": "m", "idempotency_key": "k"},
        ),
        ("billing:write", "POST", "/v1/catalog/apply", {}),
        ("billing:write", "POST", "/v1/api-keys", {"name": "n", "scopes": ["admin"]}),
        ("events:write", "GET", "/v1/customers", None),
        ("events:write", "GET", "/v1/entitlements/check?customer_id=a&feature_key=b", None),
        ("entitlements:read", "GET", "/v1/invoices", None),
        ("gateway", "GET", "/v1/ledger/balances", None),
        ("billing:write", "GET", "/v1/audit", None),
    ],
)
async def test_a_key_does_only_what_its_scopes_say(shop: Shop, scope: str, method: str, path: str, body: Any):
    headers = await shop.key_with(scope)
    answer = await shop.http.request(method, path, json=body, headers=headers)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error["code"] == "SCOPE_MISSING"
    assert error["facts"]["scopes"]


async def test_trying_keys_is_slowed_down_but_known_keys_go_on(shop: Shop):
    assert (await shop.http.get("/v1/metrics")).status_code == 200
    shop.process.app._unknown_keys = RateLimits(5)
    wrong = {"Authorization": "Bearer fbx_sk_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}
    statuses = [(await shop.http.get("/v1/metrics", headers=wrong)).status_code for _ in range(8)]
    assert statuses == [401] * 5 + [429] * 3
    assert (await shop.http.get("/v1/metrics")).status_code == 200


# ── how often ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_answer_says_how_much_is_left(shop: Shop):
    shop.process.app._limits = RateLimits(6000, monotonic=lambda: 0.0)
    first = await shop.http.get("/v1/metrics")
    second = await shop.http.get("/v1/metrics")
    assert first.headers["ratelimit-limit"] == "6000"
    assert int(second.headers["ratelimit-remaining"]) == int(first.headers["ratelimit-remaining"]) - 1
    assert int(second.headers["ratelimit-reset"]) >= 1


async def test_a_key_that_asks_too_often_is_told_when_to_come_back(shop: Shop):
    shop.process.app._limits = RateLimits(3)
    answers = [await shop.http.get("/v1/metrics") for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "RATE_LIMITED"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["ratelimit-remaining"] == "0"


async def test_events_count_apart_and_not_at_all_for_keys_made_for_them(open_shop: Shop):
    shop = open_shop
    app = shop.process.app
    writer = await shop.key_with("events:write")
    app._limits, app._event_limits = RateLimits(2), RateLimits(1)
    event = {"customer_id": "nobody", "metric_key": "api_calls", "idempotency_key": "k"}

    by_admin = [(await shop.http.post("/v1/events", json=event)).status_code for _ in range(2)]
    by_writer = [
        (await shop.http.post("/v1/events", json=event, headers=writer)).status_code for _ in range(4)
    ]

    assert by_admin == [422, 429]
    assert by_writer == [422] * 4
    assert (await shop.http.get("/v1/metrics")).status_code == 200


def test_a_bucket_fills_up_evenly():
    now = [100.0]
    limits = RateLimits(60, monotonic=lambda: now[0])
    assert [limits.take("a").retry_after_s > 0 for _ in range(61)] == [False] * 60 + [True]  # type: ignore[union-attr]
    assert limits.take("b").remaining == 59  # type: ignore[union-attr]
    now[0] += 2
    assert [limits.take("a").retry_after_s > 0 for _ in range(3)] == [False, False, True]  # type: ignore[union-attr]
    assert RateLimits(0).take("a") is None


# ── the body ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"key": "a", "key": "b", "name": "N", "aggregation": "sum"}', "JSON_MALFORMED"),
        (b"[" * 100_000, "JSON_MALFORMED"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "JSON_MALFORMED"),
        (b'{"key": NaN}', "JSON_MALFORMED"),
        (b'{"key": Infinity}', "JSON_MALFORMED"),
        (b'{"key": 1e999}', "JSON_MALFORMED"),
        (b'{"key": ' + b"9" * 5000 + b"}", "JSON_MALFORMED"),
        (b'{"key": "\\u0000"}', "JSON_MALFORMED"),
        (b'{"key": "\\ud800"}', "JSON_MALFORMED"),
        (b'{"key": "\xff"}', "JSON_MALFORMED"),
        (b"{", "JSON_MALFORMED"),
        (b"not json", "JSON_MALFORMED"),
        (b"[]", "FIELD_MALFORMED"),
        (b'"text"', "FIELD_MALFORMED"),
        (b"", "BODY_MALFORMED"),
    ],
)
async def test_a_body_that_is_not_strict_json_is_malformed(shop: Shop, body: bytes, code: str):
    answer = await shop.http.post("/v1/metrics", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_a_body_of_another_type_is_not_guessed_at(shop: Shop):
    for content_type in ("application/x-www-form-urlencoded", "text/plain", "application/yaml"):
        answer = await shop.http.post("/v1/metrics", content=b"key=m", headers={"Content-Type": content_type})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "CONTENT_TYPE_UNSUPPORTED")


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(shop: Shop):
    answer = await shop.http.post("/v1/metrics", content=b" " * 1_000_001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")
    assert answer.json()["error"]["facts"] == {"bytes_max": 1_000_000}


async def test_a_body_that_grows_too_large_on_the_way_is_cut_off(shop: Shop):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100_000
            yield b" " * 100_000

    answer = await shop.http.post(
        "/v1/metrics", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert sent < 2_000_000


async def test_unknown_fields_and_wrong_types_are_named_by_their_path(shop: Shop):
    body = {
        "id": "p",
        "name": 5,
        "currency": "USD",
        "billing_period": "monthly",
        "chargs": [],
        "charges": [
            {"metric_key": "m", "pricing_model": "tiered", "properties": {"tiers": [{"up_to": None, "unit_price": "abc"}]}},
            {"metric_key": "m", "pricing_model": "per_unit", "properties": {"unit_price": -1, "colour": "red"}},
        ],
    }  # fmt: skip
    answer = await shop.http.post("/v1/price-plans", json=body)
    assert answer.status_code == 400
    faults = {f["field"]: f["code"] for f in answer.json()["error"]["faults"]}
    assert faults == {
        "name": "FIELD_MALFORMED",
        "charges[0].properties.tiers[0].unit_price": "DECIMAL_MALFORMED",
        "charges[1].properties.unit_price": "AMOUNT_NEGATIVE",
        "charges[1].properties.colour": "FIELD_UNKNOWN",
        "chargs": "FIELD_UNKNOWN",
    }
    assert "did you mean 'charges'" in answer.text


async def test_a_price_written_as_a_number_keeps_its_digits(shop: Shop):
    raw = b"""{"currency": "USD", "usage": {"m": 1}, "charges":
        [{"metric_key": "m", "pricing_model": "per_unit", "properties": {"unit_price": 0.123456789012345678}}]}"""
    answer = await shop.http.post("/v1/pricing/preview", content=raw)
    assert answer.json()["line_items"][0]["exact_amount"] == "0.123456789012345678"


# ── where ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_unknown_places_and_methods_are_said_to_be_so(shop: Shop):
    nothing = await shop.http.get("/v1/nothing")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "PATH_UNKNOWN")
    wrong = await shop.http.delete("/v1/metrics")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "GET, POST"
    assert (await shop.http.get("/v1/metrics/")).status_code == 404
    assert (await shop.http.get("/v1/metrics?x=%00")).status_code == 400
    assert (await shop.http.get("/v1/metrics/a%00b")).status_code == 400


async def test_an_unknown_query_parameter_is_not_left_out_in_silence(shop: Shop):
    answer = await shop.http.get("/v1/metrics?limt=5")
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "limt")
    for query in ("limit=0", "limit=501", "limit=x", "cursor=%21%21"):
        assert (await shop.http.get(f"/v1/metrics?{query}")).status_code == 400


# ── what every answer carries ────────────────────────────────────────────────────────────────────────────────────────


async def test_each_answer_has_an_id_and_takes_one_that_was_given(shop: Shop):
    own = await shop.http.get("/v1/nothing")
    assert own.headers["farebox-request-id"] == own.json()["error"]["request_id"]
    given = await shop.http.get("/v1/nothing", headers={"X-Request-Id": "trace-12345678"})
    assert given.json()["error"]["request_id"] == "trace-12345678"
    odd = await shop.http.get("/v1/nothing", headers={"X-Request-Id": "a b\tc"})
    assert odd.json()["error"]["request_id"].startswith("req_")


async def test_the_sandbox_says_that_it_is_one(shop: Shop):
    assert (await shop.http.get("/v1/metrics")).headers["farebox-sandbox"] == "1"


async def test_our_own_fault_shows_an_id_and_nothing_else(shop: Shop):
    """The table is taken away under the running process: what no code expects."""
    async with shop.database.transaction() as tx:
        await tx.execute("ALTER TABLE metric RENAME TO metric_gone")
    answer = await shop.http.get("/v1/metrics")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "INTERNAL"
    assert answer.headers["farebox-request-id"] in error["message"]
    for secret in ("metric_gone", "Traceback", "psycopg", "SELECT", shop.config.admin_key):
        assert secret not in answer.text
    keyed = await shop.http.post(
        "/v1/metrics", json={"key": "m", "name": "M", "aggregation": "sum"}, headers={"Idempotency-Key": "k"}
    )
    assert keyed.status_code == 500


# ── pages without a key ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_health_and_documents_need_no_key(shop: Shop):
    transport = httpx.ASGITransport(app=shop.process.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as stranger:
        for path in PATHS_WITHOUT_KEY:
            assert (await stranger.get(path)).status_code == 200, path
        assert (await stranger.get("/ready")).json() == {
            "status": "ready",
            "checks": {"database": "ok", "changes": "ok"},
        }
        assert (await stranger.head("/healthz")).content == b""


async def test_the_documentation_page_loads_nothing_from_elsewhere(shop: Shop):
    page = await shop.http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for word in ("http://", "https://", "//cdn", "src="):
        assert word not in page.text


async def test_the_openapi_document_covers_every_resource_and_the_error_shape(shop: Shop):
    document = (await shop.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    paths = document["paths"]
    for path in (
        "/v1/metrics", "/v1/metrics/{key}", "/v1/price-plans", "/v1/price-plans/{plan_id}/versions", "/v1/customers",
        "/v1/customers/{customer_id}/keys", "/v1/subscriptions", "/v1/events", "/v1/events/batch", "/v1/usage/summary",
        "/v1/usage/compute", "/v1/pricing/preview", "/v1/pricing/calculate", "/v1/invoices", "/v1/entitlements",
        "/v1/entitlements/check", "/v1/passes", "/v1/payments", "/v1/routes", "/v1/ledger/postings", "/v1/ledger/balances",
        "/v1/api-keys", "/v1/catalog", "/v1/catalog/apply", "/v1/test-clock", "/v1/sandbox/faucet", "/healthz", "/ready",
    ):  # fmt: skip
        assert path in paths, path
    assert {"get", "post"} <= set(paths["/v1/events"])
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            if path.startswith("/v1/"):
                assert operation["responses"]["default"]["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/ErrorAnswer"
                }, (path, method)
    names = set(document["components"]["schemas"])
    for reference in _references(document):
        assert reference.startswith("#/components/schemas/")
        assert reference.removeprefix("#/components/schemas/") in names, reference
    ids = [o["operationId"] for operations in paths.values() for o in operations.values()]
    assert len(ids) == len(set(ids))
    assert "‹" not in json.dumps(document, ensure_ascii=False)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [r for item in value.values() for r in _references(item)]
    if isinstance(value, list):
        return [r for item in value for r in _references(item)]
    return []


async def test_while_the_database_is_away_the_answer_is_to_come_back(shop: Shop):
    assert (await shop.http.get("/v1/metrics")).status_code == 200
    await shop.database.close()
    for answer in (
        await shop.http.get("/v1/metrics"),
        await shop.http.post(
            "/v1/customers", json={"id": "a", "name": "A"}, headers={"Idempotency-Key": "k"}
        ),
        await shop.http.get("/v1/entitlements/check?customer_id=a&feature_key=b"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "UNAVAILABLE")
        assert int(answer.headers["retry-after"]) >= 1
    ready = await shop.http.get("/ready")
    assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "does not answer")
    assert (await shop.http.get("/healthz")).status_code == 200
