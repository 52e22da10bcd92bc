"""What only a sandbox has: a clock that can be moved, and money for nothing."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from farebox.api.resource import Admin, Answer, Body, Reader, moment, moment_or_none, router
from farebox.app.documents.scalars import Instant, Positive
from farebox.app.sandbox import Faucet
from farebox.app.test_clock import TestClock


class MoveClock(Body):
    """Where the test clock shall stand."""

    now: Instant


class ClockAnswer(Answer):
    """Where the test clock stands; null: the wall clock counts."""

    now: str | None


class Helping(Body):
    """Who gets how much, in major units."""

    address: Annotated[str, Field(min_length=1, max_length=200)]
    amount: Positive
    asset: Annotated[str, Field(min_length=1, max_length=40)] = "USDC"


class FundedAnswer(Answer):
    """What the address holds now, in whole units of the token."""

    address: str
    asset: str
    network: str
    balance: int


def sandbox(clock: TestClock, faucet: Faucet) -> APIRouter:
    """``/v1/test-clock`` and ``/v1/sandbox/faucet``."""
    api = router("sandbox")

    @api.post("/test-clock")
    async def move_test_clock(caller: Admin, body: MoveClock) -> ClockAnswer:
        """Move the business date forward. Tokens and signatures stay on the wall's time."""
        return ClockAnswer(now=moment(await clock.move(caller.actor, body.now, within=caller.within)))

    @api.get("/test-clock")
    async def read_test_clock(caller: Reader) -> ClockAnswer:
        return ClockAnswer(now=moment_or_none(await clock.read()))

    @api.post("/sandbox/faucet")
    async def open_faucet(caller: Admin, body: Helping) -> FundedAnswer:
        """Give an address sandbox money."""
        funded = await faucet.fund(body.address, body.amount, body.asset, within=caller.within)
        return FundedAnswer(
            address=funded.address,
            asset=funded.token.symbol,
            network=funded.token.network,
            balance=funded.balance,
        )

    return api
