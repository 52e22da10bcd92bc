"""The thin client of the control API."""

from __future__ import annotations

import json

import httpx
import pytest

from farebox.client import ApiError, Farebox


def api(answer: httpx.Response | list[httpx.Response]) -> tuple[Farebox, list[httpx.Request]]:
    requests: list[httpx.Request] = []
    answers = answer if isinstance(answer, list) else [answer]

    def serve(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers.pop(0)

    return Farebox("http://api.test/", "fbx_sk_x", transport=httpx.MockTransport(serve)), requests


def test_a_write_carries_the_key_and_an_idempotency_key():
    farebox, requests = api(
        [httpx.Response(201, json={"id": "acme"}), httpx.Response(200, json={"id": "acme"})]
    )
    assert farebox.post("/customers", {"id": "acme"}) == {"id": "acme"}
    farebox.post("/customers", {"id": "acme"}, idempotency_key="mine")
    assert str(requests[0].url) == "http://api.test/v1/customers"
    assert requests[0].headers["authorization"] == "Bearer fbx_sk_x"
    assert len(requests[0].headers["idempotency-key"]) >= 16
    assert requests[1].headers["idempotency-key"] == "mine"


def test_an_error_says_its_code_and_its_field():
    body = {"error": {"code": "METRIC_KEY_DUPLICATE", "message": "there is one already", "field": "key"}}
    farebox, _ = api(httpx.Response(409, json=body))
    with pytest.raises(ApiError) as error:
        farebox.post("/metrics", {})
    assert (error.value.status, error.value.code, error.value.field) == (409, "METRIC_KEY_DUPLICATE", "key")


@pytest.mark.parametrize(
    "answer", [httpx.Response(502, text="<html>"), httpx.Response(500, json=[1]), httpx.Response(503)]
)
def test_an_error_that_is_not_ours_is_an_error_too(answer: httpx.Response):
    farebox, _ = api(answer)
    with pytest.raises(ApiError) as error:
        farebox.get("/metrics")
    assert error.value.code == "HTTP_ERROR"


def test_a_list_is_read_page_by_page():
    pages = [
        httpx.Response(200, json={"data": [{"n": 1}, {"n": 2}], "next_cursor": "c"}),
        httpx.Response(200, json={"data": [{"n": 3}], "next_cursor": None}),
    ]
    farebox, requests = api(pages)
    assert [row["n"] for row in farebox.each("/events", limit=2)] == [1, 2, 3]
    assert requests[1].url.params["cursor"] == "c"
    assert requests[1].url.params["limit"] == "2"


def test_an_event_is_recorded_under_its_own_key():
    farebox, requests = api(httpx.Response(202, json={"event_id": "evt_1"}))
    farebox.record("acme", "api_calls", "order-7", value=3)
    assert json.loads(requests[0].content) == {
        "customer_id": "acme",
        "metric_key": "api_calls",
        "idempotency_key": "order-7",
        "value": 3,
    }
