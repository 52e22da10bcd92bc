"""Each resource: its happy path, and what it refuses."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from tests.api.conftest import Shop

# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_metric_is_made_read_renamed_and_closed(shop: Shop):
    made = await shop.post(
        "/v1/metrics",
        {"key": "m", "display_name": "M", "aggregation_type": "max", "value_type": "integer"},
        201,
    )
    assert made["id"].startswith("met_")
    assert (made["name"], made["aggregation"], made["status"]) == ("M", "max", "active")
    renamed = (await shop.http.patch("/v1/metrics/m", json={"name": "Most"})).json()
    assert renamed["name"] == "Most"
    assert (await shop.post("/v1/metrics/m/deactivate"))["status"] == "inactive"
    assert (await shop.get("/v1/metrics/m"))["status"] == "inactive"
    assert await shop.refusal("/v1/metrics", {"key": "m", "name": "M", "aggregation": "sum"}, 409) == (
        "METRIC_KEY_DUPLICATE",
        "key",
    )
    assert (await shop.get("/v1/metrics/none", 404))["error"]["code"] == "METRIC_NOT_FOUND"


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"aggregation": "percentile"}, 422, "NOT_AVAILABLE_YET", "aggregation"),
        ({"aggregation": "median"}, 400, "FIELD_MALFORMED", "aggregation"),
        ({"key": "a b"}, 400, "NAME_MALFORMED", "key"),
        ({"name": ""}, 400, "FIELD_MALFORMED", "name"),
        ({"aggregation": "unique_count"}, 422, "PROPERTY_REQUIRED", "property"),
        ({"filters": []}, 422, "NOT_AVAILABLE_YET", "filters"),
        ({"description": "a\x07b"}, 400, "TEXT_MALFORMED", "description"),
    ],
)
async def test_a_faulty_metric_is_refused(
    shop: Shop, change: dict[str, Any], status: int, code: str, field: str
):
    body = {"key": "m", "name": "M", "aggregation": "sum", **change}
    assert await shop.refusal("/v1/metrics", body, status) == (code, field)


# ── price plans ──────────────────────────────────────────────────────────────────────────────────────────────────────

PLAN = {
    "id": "p",
    "name": "P",
    "currency": "usd",
    "billing_period": {"days": 30},
    "charges": [{"model": "flat_fee", "properties": {"amount": 5}}],
}


async def test_a_plan_has_versions_that_never_change(shop: Shop):
    first = await shop.post("/v1/price-plans", PLAN, 201)
    same = await shop.post("/v1/price-plans", PLAN, 200)
    second = await shop.post("/v1/price-plans", {**PLAN, "name": "Q", "changelog": "a new name"}, 201)
    assert (first["version"], same["version"], second["version"]) == (1, 1, 2)
    assert first["charges"][0]["properties"] == {"amount": "5"}
    assert first["billing_period"] == {"days": 30}
    assert second["changelog"] == "a new name"
    versions = (await shop.get("/v1/price-plans/p/versions"))["data"]
    assert [v["version"] for v in versions] == [2, 1]
    assert (await shop.get("/v1/price-plans/p/versions/1"))["name"] == "P"
    closed = await shop.post("/v1/price-plans/p/versions/2/deprecate")
    assert closed["status"] == "deprecated"
    assert (await shop.get("/v1/price-plans"))["data"][0]["version"] == 2
    for path in ("/v1/price-plans/x", "/v1/price-plans/p/versions/9", "/v1/price-plans/x/versions"):
        assert (await shop.get(path, 404))["error"]["code"] == "PLAN_NOT_FOUND"


async def test_a_plan_with_an_unknown_metric_or_a_limit_that_does_not_add_up_is_refused(shop: Shop):
    unit = {"metric_key": "nothing", "pricing_model": "per_unit", "properties": {"unit_price": 1}}
    assert await shop.refusal("/v1/price-plans", {**PLAN, "charges": [unit]}, 422) == (
        "METRIC_UNKNOWN",
        "charges[0].metric_key",
    )
    await shop.post("/v1/metrics", {"key": "peak", "name": "Peak", "aggregation": "max"})
    limit = {"peak": {"type": "limit", "metric_key": "peak", "limit": 5}}
    code, field = await shop.refusal("/v1/price-plans", {**PLAN, "entitlements": limit}, 422)
    assert (code, field) == ("LIMIT_METRIC_UNSUPPORTED", "entitlements.peak.metric_key")


# ── customers ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_customer_is_made_changed_and_erased(shop: Shop):
    body = {
        "id": "acme", "name": "Acme", "email": "pay@acme.example", "currency": "eur", "timezone": "Europe/Warsaw",
        "billing": {"provider": "stripe"}, "payment_method": {"provider_customer_id": "cus_1"}, "metadata": {"tier": "gold"},
    }  # fmt: skip
    made = await shop.post("/v1/customers", body, 201)
    assert (made["currency"], made["timezone"], made["billing"]) == (
        "EUR",
        "Europe/Warsaw",
        {"provider": "stripe"},
    )
    changed = (await shop.http.patch("/v1/customers/acme", json={"email": None, "metadata": {}})).json()
    assert (changed["name"], changed["email"], changed["metadata"]) == ("Acme", None, {})
    erased = (await shop.http.delete("/v1/customers/acme")).json()
    assert erased["erased_at"]
    assert "Acme" not in str(await shop.get("/v1/customers/acme"))
    assert (await shop.http.patch("/v1/customers/acme", json={"name": "B"})).status_code == 422
    assert await shop.refusal("/v1/customers", body, 409) == ("CUSTOMER_ID_DUPLICATE", "id")


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"id": "a b"}, 400, "id"),
        ({"id": ""}, 400, "id"),
        ({"email": "nobody"}, 400, "email"),
        ({"currency": "DOLLAR"}, 422, "currency"),
        ({"timezone": "Mars/Base"}, 422, "timezone"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": []}, 400, "metadata"),
        ({"billing": {"provider": "stripe", "key": "x"}}, 400, "billing.key"),
        ({"tax_rates": []}, 422, "tax_rates"),
    ],
)
async def test_a_faulty_customer_is_refused(shop: Shop, change: dict[str, Any], status: int, field: str):
    code, at = await shop.refusal("/v1/customers", {"id": "acme", "name": "Acme", **change}, status)
    assert at == field, code


async def test_a_customers_keys_are_shown_once(open_shop: Shop):
    shop = open_shop
    key = await shop.has_customer()
    assert key.startswith("fbx_ck_")
    listed = (await shop.get("/v1/customers/acme/keys"))["data"]
    assert listed[0]["hint"] == key[-4:]
    assert key not in str(listed)
    assert (await shop.http.delete(f"/v1/customers/acme/keys/{listed[0]['key_id']}")).status_code == 204
    assert (await shop.get("/v1/customers/acme/keys"))["data"][0]["revoked_at"]
    assert (await shop.http.delete("/v1/customers/acme/keys/ck_none")).status_code == 404
    assert (await shop.http.post("/v1/customers/none/keys")).status_code == 404


async def test_lists_come_in_pages(shop: Shop):
    for n in range(7):
        await shop.post("/v1/customers", {"id": f"c{n}", "name": "C"})
    seen, cursor = [], None
    while True:
        query = {"limit": "3", **({"cursor": cursor} if cursor else {})}
        page = await shop.get("/v1/customers", **query)
        seen.append([c["id"] for c in page["data"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [["c0", "c1", "c2"], ["c3", "c4", "c5"], ["c6"]]


# ── subscriptions and entitlements ───────────────────────────────────────────────────────────────────────────────────


async def test_a_subscription_brings_entitlements(open_shop: Shop):
    shop = open_shop
    await shop.has_customer()
    [subscription] = (await shop.get("/v1/subscriptions", customer_id="acme"))["data"]
    assert subscription["status"] == "active"
    assert subscription["plan_version"] == 1
    assert subscription["start_date"] == "2026-01-01T00:00:00Z"
    assert (await shop.get(f"/v1/subscriptions/{subscription['id']}")) == subscription

    limit = await shop.get("/v1/entitlements/check", customer_id="acme", feature_key="api_calls")
    assert limit == {
        "feature_key": "api_calls", "type": "limit", "granted": True, "limit": "1000", "current_usage": "0", "remaining": "1000",
        "exceeded": False, "value": None, "source_plans": ["starter"],
    }  # fmt: skip
    sla = await shop.get("/v1/entitlements/check", customer_id="acme", feature_key="sla")
    assert (sla["type"], sla["value"]) == ("custom", "4h")
    absent = await shop.get("/v1/entitlements/check", customer_id="acme", feature_key="nothing")
    assert absent["granted"] is False
    everything = await shop.get("/v1/entitlements", customer_id="acme")
    assert [e["feature_key"] for e in everything["entitlements"]] == ["api_calls", "sla", "weather_api"]
    assert (await shop.get("/v1/entitlements/check", 404, customer_id="no", feature_key="x"))["error"][
        "code"
    ] == "CUSTOMER_NOT_FOUND"
    assert (await shop.get("/v1/entitlements/check", 400, customer_id="acme"))["error"][
        "field"
    ] == "feature_key"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"customer_id": "nobody"}, 404, "CUSTOMER_NOT_FOUND"),
        ({"plan_id": "nothing"}, 404, "PLAN_NOT_FOUND"),
        ({"plan_version": 7}, 404, "PLAN_NOT_FOUND"),
        ({"plan_version": 0}, 400, "FIELD_MALFORMED"),
        ({"plan_version": "1"}, 400, "FIELD_MALFORMED"),
        ({"start_date": "yesterday"}, 400, "TIMESTAMP_MALFORMED"),
        ({"start_date": "2026-01-01T00:00:00"}, 400, "TIMESTAMP_MALFORMED"),
        ({"start_date": "1026-01-01T00:00:00Z"}, 422, "START_OUT_OF_RANGE"),
        ({"start_date": "2026-02-01", "end_date": "2026-01-01"}, 422, "SUBSCRIPTION_ENDS_EARLY"),
        ({"billing_anchor": "whenever"}, 400, "FIELD_MALFORMED"),
        ({"trial_days": 14}, 422, "NOT_AVAILABLE_YET"),
    ],
)
async def test_a_faulty_subscription_is_refused(
    open_shop: Shop, change: dict[str, Any], status: int, code: str
):
    await open_shop.post("/v1/customers", {"id": "acme", "name": "Acme"})
    body = {"customer_id": "acme", "plan_id": "starter", **change}
    assert (await open_shop.refusal("/v1/subscriptions", body, status))[0] == code


# ── usage, pricing, invoices, the book ───────────────────────────────────────────────────────────────────────────────


async def uses(shop: Shop, calls: int, customer_id: str = "acme", day: str = "2026-03-05") -> None:
    events = [
        {"customer_id": customer_id, "metric_key": "api_calls", "idempotency_key": f"{customer_id}-{day}-{n}", "timestamp": f"{day}T10:00:00Z"}
        for n in range(calls)
    ]  # fmt: skip
    answer = await shop.post("/v1/events/batch", {"events": events}, 207)
    assert {r["status"] for r in answer["results"]} == {"queued"}


async def test_usage_becomes_a_calculation_an_invoice_and_postings(open_shop: Shop):
    shop = open_shop
    await shop.has_customer()
    await uses(shop, 250)
    period = {
        "customer_id": "acme",
        "period_start": "2026-03-01T00:00:00Z",
        "period_end": "2026-04-01T00:00:00Z",
    }

    exact = await shop.post("/v1/usage/compute", {**period, "metric_key": "api_calls"})
    assert (exact["value"], exact["events"], exact["meta"]["late_event_count"]) == ("250", 250, 0)
    summary = await shop.get("/v1/usage/summary", **period, metric_key="api_calls")
    assert summary["meta"]["lag_seconds"] >= 0

    calculated = await shop.post("/v1/pricing/calculate", period)
    assert (calculated["currency"], calculated["total_amount"]) == ("USD", 4900 + 250)
    lines = {line["charge_id"]: line for line in calculated["line_items"]}
    assert (lines["api_calls"]["quantity"], lines["api_calls"]["amount"]) == ("250", 250)
    assert lines["flat_fee"]["amount"] == 4900

    invoice = await shop.post(
        "/v1/invoices", {"customer_id": "acme", "cutoff_date": "2026-04-01T00:00:00Z"}, 201
    )
    assert invoice["status"] == "issued"
    assert invoice["total_amount"] == sum(line["amount"] for line in invoice["line_items"]) == 3 * 4900 + 250
    assert [line["line"] for line in invoice["line_items"]] == list(range(1, len(invoice["line_items"]) + 1))
    read = await shop.get(f"/v1/invoices/{invoice['id']}")
    assert read["line_items"] == invoice["line_items"]
    [listed] = (await shop.get("/v1/invoices", customer_id="acme"))["data"]
    assert (listed["number"], listed["line_items"]) == (invoice["number"], invoice["line_items"])
    assert [line["period_start"] for line in listed["line_items"]][::2] == [
        f"2026-0{month}-01T00:00:00Z" for month in (1, 2, 3)
    ]
    assert (await shop.get(f"/v1/invoices/{invoice['id']}/audit"))["data"][0]["action"].startswith("invoice.")

    [posting] = (await shop.get("/v1/ledger/postings", reference=invoice["id"]))["data"]
    assert (posting["destination"], posting["amount"], posting["asset"]) == (
        "receivable/acme",
        invoice["total_amount"],
        "USD",
    )
    balances = (await shop.get("/v1/ledger/balances"))["data"]
    assert sum(b["balance"] for b in balances) == 0
    assert {b["account"]: b["balance"] for b in balances}["receivable/acme"] == invoice["total_amount"]

    again = {"customer_id": "acme", "cutoff_date": "2026-04-01T00:00:00Z"}
    assert (await shop.refusal("/v1/invoices", again, 409))[0] == "PERIOD_ALREADY_INVOICED"


async def test_an_invoice_is_what_was_calculated(open_shop: Shop):
    shop = open_shop
    await shop.has_customer()
    await uses(shop, 10)
    period = {
        "customer_id": "acme",
        "period_start": "2026-01-01T00:00:00Z",
        "period_end": "2026-04-01T00:00:00Z",
    }
    calculated = await shop.post("/v1/pricing/calculate", period)
    await uses(shop, 5, day="2026-03-06")
    body = {
        "customer_id": "acme",
        "cutoff_date": "2026-04-01T00:00:00Z",
        "calculation_id": calculated["calculation_id"],
    }
    invoice = await shop.post("/v1/invoices", body, 201)
    assert invoice["total_amount"] == calculated["total_amount"]
    late = (await shop.get(f"/v1/invoices/{invoice['id']}"))["meta"]
    assert late["late_event_count"] == 5
    assert (await shop.refusal("/v1/invoices", {**body, "calculation_id": "calc_none"}, 404))[
        0
    ] == "CALCULATION_NOT_FOUND"


async def test_prices_are_previewed_without_a_customer(shop: Shop):
    tiers = [
        {"up_to": 200000, "unit_amount": 0},
        {"up_to": 1000000, "unit_amount": 0.00009},
        {"up_to": None, "unit_amount": "0.00004"},
    ]
    body = {
        "currency": "USD",
        "charges": [
            {"metric_key": "api_calls", "model": "tiered", "properties": {"tiers": tiers}},
            {"model": "flat_fee", "properties": {"amount": "49.00"}},
        ],
        "usage": {"api_calls": "1374923"},
    }
    answer = await shop.post("/v1/pricing/preview", body, 200)
    assert answer["total_amount"] == 13600
    tiered = answer["line_items"][0]
    assert (tiered["amount"], Decimal(tiered["exact_amount"])) == (8700, Decimal("86.99692"))
    assert [t["quantity"] for t in tiered["tier_breakdown"]] == ["200000", "800000", "374923"]
    assert tiered["steps"]


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"usage": {"m": "-1"}}, 422, "AMOUNT_NEGATIVE", "usage.m"),
        ({"usage": {"m": "many"}}, 400, "DECIMAL_MALFORMED", "usage.m"),
        ({"usage": {"m": "1" * 41}}, 400, "DECIMAL_MALFORMED", "usage.m"),
        ({"usage": {"m": 10**19 + 0.5}}, 200, "", None),
        ({"currency": "DOLLAR"}, 422, "ASSET_UNKNOWN", "currency"),
        ({"charges": []}, 400, "FIELD_MALFORMED", "charges"),
        ({"taxes": []}, 422, "NOT_AVAILABLE_YET", "taxes"),
    ],
)
async def test_a_faulty_preview_is_refused(
    shop: Shop, change: dict[str, Any], status: int, code: str, field: str | None
):
    body = {
        "currency": "USD",
        "charges": [{"metric_key": "m", "pricing_model": "per_unit", "properties": {"unit_price": 1}}],
        **change,
    }
    answer = await shop.http.post("/v1/pricing/preview", json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert (answer.json()["error"]["code"], answer.json()["error"]["field"]) == (code, field)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/invoices", {"customer_id": "nobody", "cutoff_date": "2026-04-01"}, 404, "CUSTOMER_NOT_FOUND"),
        ("/v1/invoices", {"customer_id": "idle", "cutoff_date": "2026-04-01"}, 422, "NO_SUBSCRIPTION"),
        ("/v1/invoices", {"customer_id": "idle"}, 400, "FIELD_MISSING"),
        (
            "/v1/invoices",
            {"customer_id": "idle", "currency": "USD", "lines": [], "cutoff_date": "2026-04-01"},
            422,
            "NOT_AVAILABLE_YET",
        ),
        (
            "/v1/pricing/calculate",
            {"customer_id": "idle", "period_start": "2026-04-01", "period_end": "2026-03-01"},
            422,
            "PERIOD_INVALID",
        ),
        (
            "/v1/usage/compute",
            {
                "customer_id": "idle",
                "metric_key": "nothing",
                "period_start": "2026-03-01",
                "period_end": "2026-04-01",
            },
            404,
            "METRIC_NOT_FOUND",
        ),
    ],
)
async def test_billing_refuses_what_makes_no_sense(
    open_shop: Shop, path: str, body: dict[str, Any], status: int, code: str
):
    await open_shop.post("/v1/customers", {"id": "idle", "name": "Idle"})
    assert (await open_shop.refusal(path, body, status))[0] == code


# ── passes, payments, keys, the sandbox ──────────────────────────────────────────────────────────────────────────────


async def test_an_operator_grants_looks_at_and_revokes_a_pass(open_shop: Shop):
    shop = open_shop
    granted = await shop.post(
        "/v1/passes", {"route": "forecast", "limits": {"calls": 500}, "duration": "1h", "holder": "Ada"}, 201
    )
    assert granted["token"].count(".") == 2
    assert granted["limits"] == {"calls": 500}
    read = await shop.get(f"/v1/passes/{granted['pass_id']}")
    assert (read["status"], read["spent"], read["holder"]) == ("active", {"calls": 0}, "Ada")
    assert "token" not in read
    assert (await shop.post(f"/v1/passes/{granted['pass_id']}/revoke"))["status"] == "revoked"
    assert (await shop.get("/v1/passes"))["data"][0]["status"] == "revoked"
    assert (await shop.get("/v1/passes", route="other"))["data"] == []
    assert (await shop.get("/v1/passes/pas_none", 404))["error"]["code"] == "PASS_UNKNOWN"


async def test_a_pass_may_hold_every_kind_of_limit_and_says_what_is_spent_of_each(open_shop: Shop):
    limits = {
        "calls": 1000, "credits": 500, "concurrency": 8, "upload_bytes": "50MB", "download_bytes": 1_000_000,
        "requests": {"count": 100, "window": "1m"}, "upload_rate": "100KB/s",
        "download_rate": {"bytes_per_second": 50_000, "window": "5m"},
    }  # fmt: skip

    granted = await open_shop.post(
        "/v1/passes", {"route": "forecast", "limits": limits, "duration": "1h"}, 201
    )

    assert granted["limits"] == {
        "calls": 1000, "credits": 500, "concurrency": 8, "upload_bytes": 50_000_000, "download_bytes": 1_000_000,
        "requests": {"count": 100, "window_s": 60}, "upload_rate": {"bytes_per_second": 100_000, "window_s": 60},
        "download_rate": {"bytes_per_second": 50_000, "window_s": 300},
    }  # fmt: skip
    read = await open_shop.get(f"/v1/passes/{granted['pass_id']}")
    assert read["limits"] == granted["limits"]
    assert read["spent"] == dict.fromkeys(
        ("calls", "credits", "concurrency", "upload_bytes", "download_bytes", "requests"), 0
    )


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"route": "nothing"}, 422, "route"),
        ({"duration": "soon"}, 400, "duration"),
        ({"duration": 3600}, 400, "duration"),
        ({"limits": {"calls": 0}}, 400, "limits.calls"),
        ({"limits": {"calls": -5}}, 400, "limits.calls"),
        ({"limits": {"calls": 1.5}}, 400, "limits.calls"),
        ({"limits": {"credits": 0}}, 400, "limits.credits"),
        ({"limits": {"concurrency": 100_001}}, 400, "limits.concurrency"),
        ({"limits": {"download_bytes": "50 parrots"}}, 400, "limits.download_bytes"),
        ({"limits": {"requests": {"count": 5}}}, 400, "limits.requests.window"),
        (
            {"limits": {"upload_rate": {"bytes_per_second": 5, "window": "2h"}}},
            400,
            "limits.upload_rate.window",
        ),
    ],
)
async def test_a_faulty_pass_is_refused(open_shop: Shop, change: dict[str, Any], status: int, field: str):
    body = {"route": "forecast", "limits": {"calls": 5}, "duration": "1h", **change}
    assert (await open_shop.refusal("/v1/passes", body, status))[1] == field


async def test_payments_are_there_to_read(shop: Shop):
    assert (await shop.get("/v1/payments"))["data"] == []
    assert (await shop.get("/v1/payments", payer="0xabc", status="settled"))["data"] == []
    assert (await shop.get("/v1/payments/pay_none", 404))["error"]["code"] == "PAYMENT_NOT_FOUND"


async def test_keys_are_made_rotated_and_the_last_admin_stays(shop: Shop):
    made = await shop.post("/v1/api-keys", {"name": "till", "scopes": ["events:write"]}, 201)
    rotated = await shop.post(f"/v1/api-keys/{made['key_id']}/rotate", {"overlap_s": 60}, 201)
    assert rotated["key"] != made["key"]
    keys = (await shop.get("/v1/api-keys"))["data"]
    assert made["key"] not in str(keys)
    root = next(k for k in keys if k["scopes"] == ["admin"])
    last = await shop.http.delete(f"/v1/api-keys/{root['key_id']}")
    assert (last.status_code, last.json()["error"]["code"]) == (409, "API_KEY_LAST_ADMIN")
    assert await shop.refusal("/v1/api-keys", {"name": "x", "scopes": ["everything"]}, 422) == (
        "SCOPE_UNKNOWN",
        "scopes",
    )
    assert await shop.refusal("/v1/api-keys", {"name": "x", "scopes": []}, 400) == (
        "FIELD_MALFORMED",
        "scopes",
    )
    past = {"name": "x", "scopes": ["admin"], "expires_at": "2020-01-01T00:00:00Z"}
    assert (await shop.refusal("/v1/api-keys", past, 422))[1] == "expires_at"


async def test_the_test_clock_moves_forward_only(shop: Shop):
    assert (await shop.get("/v1/test-clock"))["now"] is None
    moved = await shop.post("/v1/test-clock", {"now": "2031-05-01T00:00:00+02:00"})
    assert moved["now"] == "2031-04-30T22:00:00Z"
    assert await shop.refusal("/v1/test-clock", {"now": "2031-01-01T00:00:00Z"}, 422) == (
        "TEST_CLOCK_BACKWARDS",
        "now",
    )
    assert (await shop.get("/v1/test-clock"))["now"] == moved["now"]


async def test_the_faucet_gives_sandbox_money(shop: Shop):
    address = "0x" + "Ab" * 20
    funded = await shop.post("/v1/sandbox/faucet", {"address": address, "amount": "2.5", "asset": "USDC"})
    assert funded["balance"] == 100_000_000 + 2_500_000
    for change, field in (
        ({"amount": -1}, "amount"),
        ({"amount": 0}, "amount"),
        ({"asset": "GOLD"}, "asset"),
    ):
        assert (await shop.refusal("/v1/sandbox/faucet", {"address": address, "amount": 1, **change}, 422))[
            1
        ] == field
    assert (await shop.refusal("/v1/sandbox/faucet", {"address": "0x1", "amount": 1}, 400))[
        0
    ] == "ADDRESS_MALFORMED"
