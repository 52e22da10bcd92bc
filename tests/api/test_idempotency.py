"""One key, one effect: whoever asks again gets the first answer, however many ask at once."""

from __future__ import annotations

import asyncio

from tests.api.conftest import Shop

METRIC = {"key": "m", "name": "M", "aggregation": "sum"}


async def count(shop: Shop, table: str) -> int:
    async with shop.database.connection() as tx:
        row = await (await tx.execute(f"SELECT count(*) FROM {table}")).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return int(row[0])


async def test_the_same_request_again_gives_the_first_answer_again(shop: Shop):
    first = await shop.http.post("/v1/metrics", json=METRIC, headers={"Idempotency-Key": "one"})
    again = await shop.http.post("/v1/metrics", json=METRIC, headers={"Idempotency-Key": "one"})
    other = await shop.http.post(
        "/v1/metrics", json={**METRIC, "name": "N"}, headers={"Idempotency-Key": "one"}
    )
    elsewhere = await shop.http.post("/v1/metrics/m/deactivate", json={}, headers={"Idempotency-Key": "one"})

    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "IDEMPOTENCY_CONFLICT")
    assert elsewhere.status_code == 409


async def test_the_key_in_the_body_wins(shop: Shop):
    body = {**METRIC, "idempotency_key": "in the body"}
    first = await shop.http.post("/v1/metrics", json=body, headers={"Idempotency-Key": "a"})
    again = await shop.http.post("/v1/metrics", json=body, headers={"Idempotency-Key": "b"})
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"


async def test_keys_have_bounds(shop: Shop):
    for key in ("", "x" * 256):
        answer = await shop.http.post("/v1/metrics", json=METRIC, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "IDEMPOTENCY_KEY_INVALID")
    assert await shop.refusal("/v1/metrics", {**METRIC, "idempotency_key": 5}, 400) == (
        "IDEMPOTENCY_KEY_INVALID",
        "idempotency_key",
    )


async def test_a_refusal_is_not_kept_and_leaves_nothing_behind(open_shop: Shop):
    shop = open_shop
    subscription = {"customer_id": "late", "plan_id": "starter"}
    early = await shop.http.post("/v1/subscriptions", json=subscription, headers={"Idempotency-Key": "s"})
    assert early.status_code == 404
    await shop.post("/v1/customers", {"id": "late", "name": "Late"})
    later = await shop.http.post("/v1/subscriptions", json=subscription, headers={"Idempotency-Key": "s"})
    assert later.status_code == 201


async def test_twenty_at_once_make_one(open_shop: Shop):
    shop = open_shop
    body = {"id": "acme", "name": "Acme"}
    answers = await asyncio.gather(
        *(shop.http.post("/v1/customers", json=body, headers={"Idempotency-Key": "once"}) for _ in range(20))
    )
    assert {a.status_code for a in answers} == {201}
    assert len({a.text for a in answers}) == 1
    assert await count(shop, "customer") == 1

    keys = await asyncio.gather(
        *(
            shop.http.post("/v1/customers/acme/keys", json={}, headers={"Idempotency-Key": "key"})
            for _ in range(20)
        )
    )
    assert len({a.json()["key"] for a in keys}) == 1
    assert await count(shop, "customer_key") == 1

    passes = await asyncio.gather(
        *(
            shop.http.post(
                "/v1/passes",
                json={"route": "forecast", "limits": {"calls": 5}, "duration": "1h"},
                headers={"Idempotency-Key": "pass"},
            )
            for _ in range(20)
        )
    )
    assert len({a.json()["pass_id"] for a in passes}) == 1
    assert await count(shop, "pass") == 1


async def test_sixty_different_requests_with_keys_do_not_wait_for_each_other_for_ever(open_shop: Shop):
    shop = open_shop
    answers = await asyncio.gather(
        *(
            shop.http.post(
                "/v1/customers", json={"id": f"c{n}", "name": "C"}, headers={"Idempotency-Key": f"k{n}"}
            )
            for n in range(60)
        )
    )
    assert {a.status_code for a in answers} == {201}


async def test_one_keys_answers_are_not_anothers(shop: Shop):
    writer = await shop.key_with("billing:write")
    mine = await shop.http.post("/v1/metrics", json=METRIC, headers={"Idempotency-Key": "same"})
    theirs = await shop.http.post("/v1/metrics", json=METRIC, headers={**writer, "Idempotency-Key": "same"})
    assert mine.status_code == 201
    assert (theirs.status_code, theirs.json()["error"]["code"]) == (409, "METRIC_KEY_DUPLICATE")


async def test_a_kept_answer_shows_no_secret_to_who_reads_the_database(open_shop: Shop):
    shop = open_shop
    await shop.post("/v1/customers", {"id": "acme", "name": "Acme"})
    made = await shop.http.post("/v1/customers/acme/keys", json={}, headers={"Idempotency-Key": "key"})
    async with shop.database.connection() as tx:
        rows = await (
            await tx.execute("SELECT body FROM idempotent_answer WHERE body IS NOT NULL")
        ).fetchall()
    assert rows
    assert all(made.json()["key"].encode() not in bytes(row[0]) for row in rows)
