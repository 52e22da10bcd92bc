"""A shop that takes exact fares on a real database, with as many processes as a story needs, and buyers who sign."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal
from farebox.app.exact_fares import ExactFares, Owner
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import BusinessDate, WallClock
from farebox.app.purchases import Purchases
from farebox.app.quotes import Quotes
from farebox.app.site import Site
from farebox.base.money import Money
from farebox.domain.access import ExactFare, GatewayCatalog, Match, PassOffer, Route, Upstream
from farebox.domain.limits import PassLimits
from farebox.protocols.evm import (
    TransferAuthorization,
    address_of,
    chain_id,
    checksum_address,
    domain_separator,
    parse_address,
    sign,
    transfer_digest,
)
from farebox.rails.sandbox import SandboxChain
from farebox.store import gateway_catalog, processes
from farebox.store.pool import Database

Json = dict[str, Any]
SELLER = "0x" + "5e" * 20

ROUTE = Route(
    id="forecast",
    match=Match("/weather/{city}"),
    upstream="weather",
    exact=ExactFare(Money.parse("0.001 USDC"), ()),
    passes=(PassOffer("hour", "One hour", Money.parse("0.25 USDC"), 3600, PassLimits(500)),),
    description="The weather of a city",
)
CATALOG = GatewayCatalog(1, (Upstream("weather", "http://127.0.0.1:9"),), (ROUTE,))


@dataclass
class Process:
    """One gateway process: its own pool, its own row, its own memory."""

    database: Database
    owner: Owner
    chain: SandboxChain
    fares: ExactFares
    purchases: Purchases
    tokens: PassTokens
    site: Site


@asynccontextmanager
async def a_process(
    url: str, name: str = "", catalog: GatewayCatalog = CATALOG, seller: str = SELLER
) -> AsyncIterator[Process]:
    database = await Database.open(url, name="till")
    name = name or f"gw_{secrets.token_hex(4)}"
    async with database.connection() as tx:
        epoch = await processes.register(tx, name, "gateway", "test", 1)
    owner, clock = Owner(name, epoch), WallClock()
    chain = SandboxChain(database, seller)
    tokens = PassTokens(b"t" * 32, "sandbox", clock)
    quotes = Quotes(b"q" * 32, "sandbox", [chain], clock, lambda: catalog)
    fares = ExactFares(database, [chain], clock, owner, lambda: catalog)
    purchases = Purchases(
        database, quotes, tokens, clock, BusinessDate(database, clock), owner, lambda: catalog
    )
    try:
        yield Process(database, owner, chain, fares, purchases, tokens, Site(purchases, tokens))
    finally:
        await fares.close()
        await chain.close()
        await database.close()


async def publish(database: Database, catalog: GatewayCatalog = CATALOG) -> None:
    """Store a catalog as an operator's apply would."""
    async with database.transaction() as tx:
        await gateway_catalog.append(tx, catalog, "test")


def a_call(
    path: str = "/weather/rome",
    method: str = "GET",
    query: str = "",
    body: bytes | None = None,
    route: Route = ROUTE,
) -> Call:
    return Call("req_1", method, "shop.test", path, query, [], "127.0.0.1", route, body=body)


def read_header(headers: Headers, name: bytes) -> Json:
    value = next(v for k, v in headers if k.lower() == name.lower())
    return json.loads(base64.b64decode(value, validate=True))  # type: ignore[no-any-return]


def has_header(headers: Headers, name: bytes) -> bool:
    return any(k.lower() == name.lower() for k, _ in headers)


def write_header(message: Any) -> bytes:
    return base64.b64encode(json.dumps(message).encode())


@dataclass
class Buyer:
    """Somebody with a key. ``signs`` builds the wire message by hand, apart from the code under test."""

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @property
    def address(self) -> str:
        return checksum_address(address_of(self.key))

    def signs(self, challenge: Json, **changes: Any) -> Json:
        """A payment for the first offer. ``changes`` alter the authorization before it is signed."""
        offer = challenge["accepts"][0]
        authorization = {
            "from": self.address,
            "to": offer["payTo"],
            "value": offer["amount"],
            "validAfter": "0",
            "validBefore": str(int(time.time()) + offer["maxTimeoutSeconds"]),
            "nonce": "0x" + secrets.token_hex(32),
        } | changes
        return {
            "x402Version": 2,
            "resource": challenge["resource"],
            "accepted": offer,
            "payload": {"authorization": authorization, "signature": self.signature(offer, authorization)},
        }

    def signature(self, offer: Json, authorization: Json) -> str:
        domain = domain_separator(
            offer["extra"]["name"],
            offer["extra"]["version"],
            chain_id(offer["network"]),
            parse_address(offer["asset"]),
        )
        transfer = TransferAuthorization(
            parse_address(authorization["from"]),
            parse_address(authorization["to"]),
            int(authorization["value"]),
            int(authorization["validAfter"]),
            int(authorization["validBefore"]),
            bytes.fromhex(authorization["nonce"][2:]),
        )
        return "0x" + sign(self.key, transfer_digest(domain, transfer)).hex()

    def pays(self, process: Process, call: Call, **changes: Any) -> bytes:
        """The header of a payment for a call's challenge."""
        return write_header(self.signs(challenge(process, call), **changes))


def challenge(process: Process, call: Call) -> Json:
    return read_header(process.fares.payment_required(call).answer_headers, b"PAYMENT-REQUIRED")


@dataclass
class UpstreamOf:
    """Plays the gateway around a decision: forwards, settles, keeps, finishes; counts what reached the upstream."""

    status: int = 200
    body: bytes = b'{"weather":"fine"}'
    calls: int = 0
    arrived: Awaitable[None] | None = None  # awaited while the upstream "works"

    async def serve(self, decision: Decision) -> Answer | Refusal:
        if not isinstance(decision, Admitted):
            return decision
        self.calls += 1
        if self.arrived is not None:
            await self.arrived
        headers: Headers = [(b"Content-Type", b"application/json")]
        assert decision.before_release is not None or has_header(decision.answer_headers, b"PAYMENT-RESPONSE")
        if decision.before_release is not None:
            refused = await decision.before_release(self.status, headers)
            if refused is not None:
                decision.finish(0, 0, 0)
                return refused
        if decision.keep_answer is not None and len(self.body) <= decision.keep_answer_bytes_max:
            await decision.keep_answer(self.status, headers + decision.answer_headers, self.body)
        decision.finish(self.status, 0, len(self.body))
        return Answer(self.status, headers + decision.answer_headers, self.body)


async def rows(database: Database, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    async with database.connection() as tx:
        return await (await tx.execute(statement, values)).fetchall()  # type: ignore[arg-type]
