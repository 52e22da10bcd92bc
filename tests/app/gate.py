"""One gateway process's admission, with everything real but the network: database, cache, leases, tokens and spool."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal
from farebox.app.budgets import Budgets
from farebox.app.door import ExactDoor, FrontDoor
from farebox.app.grants import GrantCache
from farebox.app.leases import Leases
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import WallClock
from farebox.base.errors import Reason
from farebox.base.money import Money
from farebox.base.secrets import key_hash, new_customer_key
from farebox.base.time import Period
from farebox.domain.access import AccountFare, AdmissionGrant, ExactFare, GrantLimit, Match, Rewrite, Route
from farebox.domain.limits import PassLimits
from farebox.domain.passes import Pass, grant_of
from farebox.gateway.spool import Spool, file_name
from farebox.gateway.spool_records import AdmittedRecord, DoneRecord, Record, decode
from farebox.store import grants, processes
from farebox.store.changes import Listener
from farebox.store.pool import Database

ACCOUNT = Route("forecast", Match("/{*rest}"), "weather", metric="api_calls", account=AccountFare())
EVERYTHING = Route(
    "all",
    Match("/{*rest}"),
    "weather",
    Rewrite(set_headers=(("X-Plan", "{plan}"), ("X-Trace", "{customer}/{request_id}"))),
    metric="api_calls",
    exact=ExactFare(Money.parse("0.001 USDC"), ()),
    account=AccountFare("weather_api"),
)
_ids = itertools.count(1)


def a_call(route: Route = ACCOUNT, address: str = "192.0.2.7", **headers: str) -> Call:
    """Header names with underscores for dashes."""
    sent = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return Call(f"req_{next(_ids)}", "GET", "shop.test", "/rome", "", sent, address, route)


class ExactStandIn:
    """Takes the payment ``good``, once it is told to; the true one is tested on its own."""

    def __init__(self) -> None:
        self.finished: list[tuple[int, int, int]] = []
        self.settles: Refusal | None = None  # what becomes of the money of the next ones

    def payment_required(self, call: Call, error: str | None = None) -> Refusal:
        return Refusal(Reason("payment_required", "pay"))

    def needs_body(self, call: Call) -> bool:
        return call.method == "POST"

    async def admit(self, call: Call, proof: bytes) -> Decision:
        if proof != b"good":
            return Refusal(Reason("payment_invalid", "no"))
        return Admitted(
            "exact",
            [(b"Farebox-Payer", b"0xabc")],
            [],
            lambda status, up, down: self.finished.append((status, up, down)),
            self._before_release,
        )

    async def _before_release(self, status: int, headers: Headers) -> Refusal | None:
        return self.settles


@dataclass
class Gate:
    """A process at work. ``records`` reads back what it spooled."""

    database: Database
    door: FrontDoor
    grants: GrantCache
    leases: Leases
    spool: Spool
    exact: ExactStandIn
    tokens: PassTokens
    directory: Path
    process_id: str
    refreshed: list[str] = field(default_factory=list)
    clock_s: float | None = None

    async def admits(self, call: Call) -> Decision:
        decision = self.door.admit(call)
        return await decision if isinstance(decision, Awaitable) else decision

    async def lets_in(self, call: Call) -> Admitted:
        decision = await self.admits(call)
        assert isinstance(decision, Admitted), decision
        return decision

    async def refuses(self, call: Call) -> Refusal:
        decision = await self.admits(call)
        assert isinstance(decision, Refusal), decision
        return decision

    def records(self) -> list[Record]:
        found: list[Record] = []
        number = 1
        while (path := self.directory / file_name(self.process_id, number)).exists():
            found += [record for record, _ in decode(path.read_bytes(), 8).records]
            number += 1
        return found

    def admitted(self) -> list[AdmittedRecord]:
        return [r for r in self.records() if isinstance(r, AdmittedRecord) and not r.carried]

    def done(self) -> list[DoneRecord]:
        return [r for r in self.records() if isinstance(r, DoneRecord)]


@asynccontextmanager
async def a_gate(
    url: str,
    directory: Path,
    name: str = "gw_gate",
    *,
    listen: bool = False,
    fares: ExactDoor | None = None,
    **settings: Any,
) -> AsyncIterator[Gate]:
    """``fares`` takes payments instead of the stand-in."""
    database = await Database.open(url, name=name, size_max=4)
    async with database.connection() as tx:
        await processes.register(tx, name, "gateway", "test", 1)
    cache = GrantCache(database, **settings)
    leases = Leases(database, name, lease_s=10)
    spool = Spool(directory, name, leases=leases.open_leases)
    exact, tokens = ExactStandIn(), PassTokens(b"t" * 32, "sandbox", WallClock())
    gate: Gate

    async def refresh(customer_id: str) -> None:
        gate.refreshed.append(customer_id)

    door = FrontDoor(
        grants=cache,
        leases=leases,
        spool=spool,
        exact=fares or exact,
        tokens=tokens,
        budgets=Budgets.per_minute(5, 5, 5),
        refresh_account=refresh,
        business_now_s=lambda: gate.clock_s or time.time(),
    )
    gate = Gate(database, door, cache, leases, spool, exact, tokens, directory, name)

    def hear(kind: str, changed_id: str) -> None:
        if kind in ("key", "grant"):
            cache.invalidate(changed_id)
        elif kind == "lease":
            leases.wanted_elsewhere(changed_id)

    listener = Listener(url, hear, cache.flush)
    if listen:
        await listener.start()
    try:
        yield gate
    finally:
        await listener.close()
        await leases.close()
        spool.close()
        await database.close()


async def a_customer(
    database: Database,
    customer_id: str = "acme",
    *,
    limit: int | None = None,
    features: Sequence[str] = ("weather_api",),
    expires_at: datetime | None = None,
    with_grant: bool = True,
) -> str:
    """A company with a key (returned) and a grant."""
    key = new_customer_key()
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO customer (id, name) VALUES (%s, %s)", (customer_id, customer_id))
        await tx.execute(
            "INSERT INTO customer_key (id, customer_id, key_hash, hint) VALUES (%s, %s, %s, %s)",
            (f"ck_{customer_id}", customer_id, key_hash(key), key[-4:]),
        )
        if with_grant:
            await put_grant(tx, customer_id, limit=limit, features=features, expires_at=expires_at)
    return key


async def put_grant(
    tx: Any,
    customer_id: str = "acme",
    *,
    limit: int | None = None,
    features: Sequence[str] = ("weather_api",),
    expires_at: datetime | None = None,
    period: Period | None = None,
) -> AdmissionGrant:
    limits = () if limit is None else (quota(customer_id, limit),)
    return await grants.put(
        tx,
        AdmissionGrant(
            f"grn_{customer_id}",
            "customer",
            customer_id,
            "starter",
            None,
            frozenset(features),
            limits,
            expires_at,
            1,
        ),
        period,
    )


def quota(customer_id: str, limit: int) -> GrantLimit:
    return GrantLimit(f"quota:{customer_id}:api_calls", "quota", Decimal(limit), "api_calls", "api_calls")


async def sell_pass(
    gate: Gate,
    calls: int | None = None,
    route: Route = EVERYTHING,
    pass_id: str = "pas_1",
    limits: PassLimits | None = None,
    **when: datetime,
) -> str:
    """A pass (its grant and counters) and its token."""
    now = datetime.fromtimestamp(time.time()).astimezone()
    sold = Pass(
        id=pass_id, route_id=route.id, offer_id=None, name="", holder=None, status="active",
        limits=limits or PassLimits(calls),
        starts_at=now, expires_at=when.get("expires_at", now.replace(year=now.year + 1, day=1)),
    )  # fmt: skip
    async with gate.database.transaction() as tx:
        await grants.put(tx, grant_of(sold, f"grn_{pass_id}"))
    return gate.tokens.sign(sold)


def header(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


__all__ = [
    "ACCOUNT",
    "EVERYTHING",
    "Answer",
    "Gate",
    "a_call",
    "a_customer",
    "a_gate",
    "header",
    "put_grant",
    "quota",
    "sell_pass",
]
