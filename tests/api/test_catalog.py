"""The catalog over HTTP: as YAML or as JSON, looked at first, exported again."""

from __future__ import annotations

from farebox.base.money import Money
from tests.api.conftest import SHOP, Shop

YAML = {"Content-Type": "application/yaml"}


async def test_the_text_of_a_farebox_yaml_is_applied(shop: Shop):
    text = b'upstreams: {a: {url: "http://127.0.0.1:9000"}}\nroutes: [{id: r, match: {path: /}, upstream: a, fares: {exact: {price: "0.5 USDC"}}}]'
    answer = await shop.http.post("/v1/catalog/apply", content=text, headers=YAML)
    assert answer.status_code == 200
    assert answer.json()["changed"] is True
    again = await shop.http.put("/v1/catalog/apply", content=text, headers=YAML)
    assert again.json()["changed"] is False
    [route] = (await shop.get("/v1/routes"))["data"]
    assert route["fares"]["exact"]["price"] == {"amount": Money.parse("0.5 USDC").units, "currency": "USDC"}


async def test_what_is_exported_applies_back(open_shop: Shop):
    shop = open_shop
    exported = await shop.http.get("/v1/catalog/export")
    assert exported.headers["content-type"].startswith("application/yaml")
    answer = await shop.http.post("/v1/catalog/apply", content=exported.content, headers=YAML)
    assert answer.json()["changed"] is False


async def test_a_diff_does_nothing(shop: Shop):
    looked = await shop.post("/v1/catalog/diff", SHOP, 200)
    assert looked["changed"] is True
    assert looked["version"] is None
    assert (await shop.get("/v1/catalog"))["version"] == 0


async def test_every_fault_comes_back_with_its_path_and_nothing_is_half_applied(open_shop: Shop):
    shop = open_shop
    before = await shop.get("/v1/catalog")
    bad = {**SHOP, "coupons": [], "routes": [{**SHOP["routes"][0], "upstream": "x"}, {"id": "y"}]}
    error = (await shop.post("/v1/catalog/apply", bad, 400))["error"]
    assert {f["field"]: f["code"] for f in error["faults"]} == {
        "coupons": "NOT_AVAILABLE_YET",
        "routes[0].upstream": "UPSTREAM_UNKNOWN",
        "routes[1].match": "FIELD_MISSING",
        "routes[1].upstream": "FIELD_MISSING",
    }
    assert await shop.get("/v1/catalog") == before
    for content, code in (
        (b"a: [", "YAML_MALFORMED"),
        (b"a: 1\na: 2", "YAML_MALFORMED"),
        (b"\xff", "YAML_MALFORMED"),
    ):
        answer = await shop.http.post("/v1/catalog/apply", content=content, headers=YAML)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert (await shop.refusal("/v1/catalog/apply", [], 400))[0] == "BODY_MALFORMED"
