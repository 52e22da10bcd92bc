"""API keys, idempotent requests, the test clock and the book's pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import psycopg
import pytest

from farebox.app.idempotency import CLAIM_LEASE_S, Idempotency, KeptAnswer, digest_of
from farebox.app.keys import ApiKey, ApiKeys, ensure_root
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.test_clock import TestClock
from farebox.base.errors import InvariantError, Reason, Refused
from farebox.base.ids import CustomerId
from farebox.base.secrets import key_hash
from farebox.domain.customer import Customer
from farebox.domain.ledger import Posting
from farebox.store import ledger
from farebox.store.pool import Database, Tx
from tests.app.office import Office, at


@pytest.fixture
async def office(database: Database) -> AsyncIterator[Office]:
    opened = Office(database)
    yield opened
    await opened.close()


async def refusal(coroutine: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await coroutine  # type: ignore[misc]
    return caught.value.reason


# ── API keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def known(keys: ApiKeys, key: str) -> str:
    answer = await keys.authenticate(key_hash(key))
    return answer.name if isinstance(answer, ApiKey) else answer.code


async def test_a_key_is_known_until_it_is_revoked_in_every_process(office: Office):
    elsewhere = ApiKeys(office.database, WallClock())
    made = await office.keys.create("test", "billing job", ("billing:read", "billing:write"))
    await office.keys.create("test", "boss", ("admin",))
    assert await known(elsewhere, made.key) == "billing job"

    await office.keys.revoke("test", made.key_id)
    elsewhere.forget()

    assert await known(elsewhere, made.key) == "API_KEY_ENDED"
    assert await known(elsewhere, "fbx_sk_nonsense") == "API_KEY_UNKNOWN"
    assert made.key not in str(await office.rows("SELECT * FROM api_key"))


async def test_a_rotated_key_overlaps_with_its_successor(office: Office):
    first = await office.keys.create("test", "job", ("events:write",))
    second = await office.keys.rotate("test", first.key_id, overlap_s=3600)
    assert (await known(office.keys, first.key), await known(office.keys, second.key)) == ("job", "job")

    third = await office.keys.rotate("test", second.key_id)
    office.keys.forget()

    assert (await known(office.keys, second.key), await known(office.keys, third.key)) == (
        "API_KEY_ENDED",
        "job",
    )
    assert third.record.scopes == ("events:write",)
    [expires] = (await office.rows("SELECT expires_at FROM api_key WHERE id = %s", first.key_id))[0]
    assert expires is not None


async def test_the_last_admin_key_cannot_be_revoked_even_by_two_at_once(office: Office):
    one, two = [await office.keys.create("test", name, ("admin",)) for name in ("one", "two")]

    outcomes = await asyncio.gather(
        office.keys.revoke("test", one.key_id), office.keys.revoke("test", two.key_id), return_exceptions=True
    )

    assert sorted(str(o.reason.code) for o in outcomes if isinstance(o, Refused)) == ["API_KEY_LAST_ADMIN"]
    assert sum(o is None for o in outcomes) == 1


async def test_the_root_key_opens_the_house_and_stays_revoked(office: Office):
    for _ in range(2):
        async with office.database.transaction() as tx:
            await ensure_root(tx, "fbx_sk_root")
    assert await known(office.keys, "fbx_sk_root") == "root"
    [root] = (await office.keys.list()).data
    await office.keys.create("test", "boss", ("admin",))
    await office.keys.revoke("test", root.id)
    async with office.database.transaction() as tx:
        await ensure_root(tx, "fbx_sk_root")
    office.keys.forget()

    assert await known(office.keys, "fbx_sk_root") == "API_KEY_ENDED"


async def test_faults_of_keys_are_named(office: Office):
    assert (await refusal(office.keys.create("test", "k", ("root",)))).field == "scopes"
    assert (await refusal(office.keys.create("test", "k", ()))).field == "scopes"
    assert (await refusal(office.keys.create("test", " ", ("admin",)))).field == "name"
    assert (
        await refusal(office.keys.create("test", "k", ("admin",), at("2020-01-01")))
    ).field == "expires_at"
    assert (await refusal(office.keys.revoke("test", "key_none"))).code == "API_KEY_NOT_FOUND"


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────────────────────────

DIGEST = digest_of("POST", "/v1/customers", b"{}")


def creation(office: Office, hold: asyncio.Event | None = None) -> object:
    async def effect(tx: Tx) -> KeptAnswer:
        made = await office.customers.create("test", Customer(CustomerId("acme"), "Acme"), within=tx)
        if hold is not None:
            await hold.wait()
        return KeptAnswer(201, made.id.encode())

    return effect


async def test_the_same_request_gets_its_first_answer_again(office: Office):
    once = Idempotency(office.database).once

    first = await once("key_1", "k", DIGEST, creation(office))  # type: ignore[arg-type]
    again = await once("key_1", "k", DIGEST, creation(office))  # type: ignore[arg-type]
    other = await refusal(once("key_1", "k", digest_of("POST", "/v1/customers", b"{1}"), creation(office)))  # type: ignore[arg-type]

    assert (first, again) == (KeptAnswer(201, b"acme"), KeptAnswer(201, b"acme", replayed=True))
    assert other.code == "IDEMPOTENCY_CONFLICT"
    assert (await refusal(once("key_2", "k", DIGEST, creation(office)))).code == "CUSTOMER_ID_DUPLICATE"  # type: ignore[arg-type]


async def test_while_the_first_request_runs_the_second_is_told_to_come_back(office: Office):
    once, hold = Idempotency(office.database).once, asyncio.Event()
    running = asyncio.create_task(once("key_1", "k", DIGEST, creation(office, hold)))  # type: ignore[arg-type]
    await asyncio.sleep(0.1)

    reason = await refusal(once("key_1", "k", DIGEST, creation(office)))  # type: ignore[arg-type]
    hold.set()

    assert (reason.code, reason.facts) == ("IDEMPOTENCY_IN_PROGRESS", {"retry_after_s": 1})
    assert await running == KeptAnswer(201, b"acme")


async def test_a_request_whose_process_dies_leaves_neither_an_effect_nor_a_lock(
    office: Office, database_url: str
):
    once, hold = Idempotency(office.database).once, asyncio.Event()
    async with await Database.open(database_url, name="doomed", size_max=1) as doomed:
        dying = Office(doomed)
        running = asyncio.create_task(Idempotency(doomed).once("key_1", "k", DIGEST, creation(dying, hold)))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        await office.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'farebox doomed'"
        )
        hold.set()
        with pytest.raises(Exception):  # noqa: B017 - whatever it says: the connection is gone
            await running

    assert await once("key_1", "k", DIGEST, creation(office)) == KeptAnswer(201, b"acme")  # type: ignore[arg-type]


async def test_a_refused_request_keeps_nothing(office: Office):
    once = Idempotency(office.database).once
    await office.customer("acme")
    assert (await refusal(once("key_1", "k", DIGEST, creation(office)))).code == "CUSTOMER_ID_DUPLICATE"  # type: ignore[arg-type]
    assert await office.rows("SELECT FROM idempotent_answer") == []


async def test_an_effect_of_its_own_is_claimed_before_and_its_claim_lapses(office: Office):
    idempotency, runs, hold = Idempotency(office.database), [], asyncio.Event()

    async def effect() -> KeptAnswer:
        runs.append(1)
        await hold.wait()
        return KeptAnswer(200, b"done")

    first = asyncio.create_task(idempotency.once_apart("a", "k", DIGEST, effect))
    while not runs:
        await asyncio.sleep(0.01)
    assert (await refusal(idempotency.once_apart("a", "k", DIGEST, effect))).code == "IDEMPOTENCY_IN_PROGRESS"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await refusal(idempotency.once_apart("a", "k", DIGEST, effect))).code == "IDEMPOTENCY_IN_PROGRESS"

    await office.rows(
        f"UPDATE idempotent_answer SET created_at = now() - interval '{CLAIM_LEASE_S + 1} s' RETURNING key"
    )
    hold.set()
    assert await idempotency.once_apart("a", "k", DIGEST, effect) == KeptAnswer(200, b"done")
    assert await idempotency.once_apart("a", "k", DIGEST, effect) == KeptAnswer(200, b"done", replayed=True)
    assert len(runs) == 2


async def test_a_refusal_gives_an_own_effects_claim_back(office: Office):
    idempotency = Idempotency(office.database)

    async def effect() -> KeptAnswer:
        raise Refused(Reason("NO", "no"))

    for _ in range(2):
        assert (await refusal(idempotency.once_apart("a", "k", DIGEST, effect))).code == "NO"
    for key in ("", "x" * 256, "a\nb"):
        assert (
            await refusal(idempotency.once_apart("a", key, DIGEST, effect))
        ).code == "IDEMPOTENCY_KEY_INVALID"


# ── the test clock ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_test_clock_moves_forward_only(database: Database):
    business, clock = BusinessDate(database, WallClock()), TestClock(database)
    assert await clock.read() is None
    later = WallClock().now() + timedelta(days=40)
    before = await business.now()

    await clock.move("test", later)
    assert await business.now() < later, "nobody has told this process yet"
    business.forget()

    assert (await business.now(), await clock.read()) == (later, later)
    assert before < later
    assert (await refusal(clock.move("test", later - timedelta(seconds=1)))).code == "TEST_CLOCK_BACKWARDS"
    assert (await refusal(clock.move("test", later + timedelta(days=9999)))).code == "TEST_CLOCK_TOO_FAR"


async def test_the_wall_clock_is_the_first_date(database: Database, live_database: Database):
    yesterday = WallClock().now() - timedelta(days=1)
    assert (await refusal(TestClock(database).move("test", yesterday))).code == "TEST_CLOCK_BACKWARDS"
    assert (await refusal(TestClock(live_database).move("test", yesterday))).code == "TEST_CLOCK_LIVE"


# ── the book ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def move(entry: str, amount: int) -> Posting:
    return Posting(entry, 1, "invoice", "revenue/account/acme", "receivable/acme", "USD", amount, entry)


async def test_an_entry_is_booked_once_and_cannot_say_something_else(office: Office):
    async with office.database.transaction() as tx:
        assert await ledger.post(tx, [move("invoice:1", 5), move("invoice:2", 7)]) == 2
        assert await ledger.post(tx, [move("invoice:1", 5)]) == 0
        assert await ledger.post(tx, []) == 0
    with pytest.raises(InvariantError):
        async with office.database.transaction() as tx:
            await ledger.post(tx, [move("invoice:1", 6)])

    page = await office.books.postings(limit=1)
    rest = await office.books.postings(limit=1, cursor=page.next_cursor)
    assert [row.posting.amount for row in page.data + rest.data] == [7, 5]
    assert [row.posting.amount for row in (await office.books.postings("invoice:1")).data] == [5]
    assert len((await office.books.postings(account="receivable/acme")).data) == 2
    first = await office.books.balances(limit=1)
    second = await office.books.balances(limit=1, cursor=first.next_cursor)
    assert [(b.account, b.balance) for b in first.data + second.data] == [
        ("receivable/acme", 12), ("revenue/account/acme", -12),
    ]  # fmt: skip
    assert (await refusal(office.books.payment("pay_none"))).code == "PAYMENT_NOT_FOUND"
    assert (await office.books.payments()).data == ()


@pytest.mark.parametrize("table", ["posting", "audit_entry"])
async def test_the_book_and_the_audit_cannot_be_changed(office: Office, table: str):
    async with office.database.transaction() as tx:
        await ledger.post(tx, [move("invoice:1", 5)])
    await office.customer()
    for statement in (f"UPDATE {table} SET id = DEFAULT", f"DELETE FROM {table}", f"TRUNCATE {table}"):
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            await office.rows(statement)
