"""Passes of the operator, and the tokens that show them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from farebox.app.pass_tokens import PassClaims, PassTokens, is_pass_token
from farebox.app.passes import Passes
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.base.errors import Reason, Refused
from farebox.domain.limits import PassLimits
from farebox.domain.passes import Pass
from farebox.protocols.passes import Keyring
from farebox.store import changes, grants
from farebox.store.pool import Database
from tests.app.till import publish, rows


class StoppedClock:
    def __init__(self, now: datetime) -> None:
        self.instant = now

    def now(self) -> datetime:
        return self.instant


@pytest.fixture
def tokens() -> PassTokens:
    return PassTokens(b"t" * 32, "sandbox", WallClock())


@pytest.fixture
async def passes(database: Database, tokens: PassTokens) -> Passes:
    await publish(database)
    return Passes(database, tokens, BusinessDate(database, WallClock()))


def a_pass(**fields: object) -> Pass:
    now = datetime(2026, 11, 21, 10, tzinfo=UTC)
    return Pass(
        **{
            "id": "pas_1", "route_id": "forecast", "offer_id": None, "name": "A pass", "holder": None, "status": "active",
            "limits": PassLimits(5), "starts_at": now, "expires_at": now + timedelta(hours=1), **fields,
        }  # type: ignore[arg-type]
    )  # fmt: skip


async def test_a_granted_pass_opens_its_route_until_it_is_revoked(
    passes: Passes, database: Database, tokens: PassTokens
):
    granted, token = await passes.grant("forecast", PassLimits(500), 3600, "acme", "key_1")

    claims = tokens.verify(token)
    assert isinstance(claims, PassClaims)
    assert claims.pass_id == granted.id
    async with database.connection() as tx:
        grant = await grants.by_subject(tx, "pass", granted.id)
    assert grant is not None
    assert grant.routes == {"forecast"}
    assert grant.expires_at == granted.expires_at
    assert await passes.get(granted.id) == (granted, {"calls": 0})
    assert await passes.list() == [granted]

    revoked = await passes.revoke(granted.id, "key_1")
    assert (revoked.status, (await passes.revoke(granted.id, "key_1")).revoked_at) == (
        "revoked",
        revoked.revoked_at,
    )
    async with database.connection() as tx:
        grant = await grants.by_subject(tx, "pass", granted.id)
    assert grant is not None
    assert grant.revoked_at is not None
    assert await rows(database, "SELECT action FROM audit_entry ORDER BY id") == [
        ("pass.grant",),
        ("pass.revoke",),
    ]


async def test_every_gateway_hears_of_a_grant_and_of_its_end(
    passes: Passes, database: Database, database_url: str
):
    heard: list[tuple[str, str]] = []
    listener = changes.Listener(database_url, lambda kind, id: heard.append((kind, id)), lambda: None)
    await listener.start()
    granted, _ = await passes.grant("forecast", PassLimits(), 60, None, "key_1")
    await passes.revoke(granted.id, "key_1")
    while len(heard) < 2:
        await asyncio.sleep(0.01)
    await listener.close()
    assert heard == [("grant", granted.id), ("grant", granted.id)]


@pytest.mark.parametrize(
    ("route", "calls", "duration_s", "code"),
    [
        ("nowhere", 5, 60, "ROUTE_UNKNOWN"),
        ("forecast", 0, 60, "PASS_INVALID"),
        ("forecast", -1, 60, "PASS_INVALID"),
        ("forecast", 5, 0, "PASS_INVALID"),
        ("forecast", 5, 10**12, "PASS_INVALID"),
    ],
)
async def test_a_pass_that_makes_no_sense_is_refused_and_not_written(
    passes: Passes, database: Database, route: str, calls: int, duration_s: int, code: str
):
    with pytest.raises(Refused) as refused:
        await passes.grant(route, PassLimits(calls), duration_s, None, "key_1")
    assert refused.value.reason.code == code
    assert await rows(database, "SELECT count(*) FROM pass") == [(0,)]


async def test_an_unknown_pass_is_said_to_be_unknown(passes: Passes):
    for ask in (passes.get("pas_x"), passes.revoke("pas_x", "key_1")):
        with pytest.raises(Refused) as refused:
            await ask
        assert refused.value.reason.code == "PASS_UNKNOWN"


def test_a_token_ends_when_its_pass_does():
    clock = StoppedClock(datetime(2026, 11, 21, 10, 59, 59, tzinfo=UTC))
    tokens = PassTokens(b"t" * 32, "sandbox", clock)
    token = tokens.sign(a_pass())
    assert tokens.sign(a_pass()) == token, "the same pass has one token"
    assert isinstance(tokens.verify(token), PassClaims)
    clock.instant += timedelta(seconds=1)
    ended = tokens.verify(token)
    assert isinstance(ended, Reason)
    assert ended.code == "pass_ended"


def test_only_our_tokens_are_taken(tokens: PassTokens):
    live = a_pass(starts_at=datetime.now(UTC), expires_at=datetime.now(UTC) + timedelta(hours=1))
    good = tokens.sign(live)
    assert isinstance(tokens.verify(good), PassClaims)
    assert is_pass_token(good)
    foreign = [
        PassTokens(b"u" * 32, "sandbox", WallClock()).sign(live),
        PassTokens(b"t" * 32, "live", WallClock()).sign(live),
        Keyring(b"t" * 32).sign(
            "JWT", {"aud": "farebox/sandbox", "jti": "pas_1", "exp": 2**33, "route": "forecast"}
        ),
        good[:-4] + "AAAA",
        good + "A",
        good + ".",
        "",
        "a.b.c",
    ]
    for token in foreign:
        reason = tokens.verify(token)
        assert isinstance(reason, Reason), token
        assert reason.code == "credential_unknown"
    assert not is_pass_token("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxIn0.c2ln")
    assert not is_pass_token("fbx_ck_abc")


def test_keys_rotate_with_overlap():
    live = a_pass(starts_at=datetime.now(UTC), expires_at=datetime.now(UTC) + timedelta(hours=1))
    old = PassTokens(b"1" * 32, "sandbox", WallClock())
    new = PassTokens(b"2" * 32, "sandbox", WallClock(), older_seeds=[b"1" * 32])
    assert isinstance(new.verify(old.sign(live)), PassClaims)
    assert isinstance(old.verify(new.sign(live)), Reason)
    assert len(new.jwks()["keys"]) == 2
