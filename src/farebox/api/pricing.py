"""Pricing: what usage would cost (no database), and what it does cost (frozen for 24 hours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field

from farebox.api.resource import Answer, Body, Reader, Writer, moment, moment_or_none, router
from farebox.api.usage import period
from farebox.app.billing import Billing, Calculation
from farebox.app.documents.billing import Charges, charges_of
from farebox.app.documents.scalars import Currency, Instant, Key, NotNegative
from farebox.base.time import Period
from farebox.domain.rating import RatedLine, Rating, line_document


class TierShareAnswer(Answer):
    """What one tier contributed."""

    tier: int
    up_to: str | None
    quantity: str
    unit_price: str
    flat_price: str
    amount: str


class LineAnswer(Answer):
    """One charge, priced: `amount` in minor units, `exact_amount` in major units before the one rounding."""

    charge_id: str
    description: str
    pricing_model: str
    metric_key: str | None
    quantity: str
    amount: int
    exact_amount: str
    tier_breakdown: list[TierShareAnswer]
    steps: list[str]
    subscription_id: str | None = None
    period_start: str | None = None
    period_end: str | None = None


class PreviewAnswer(Answer):
    """Priced charges."""

    currency: str
    total_amount: int
    line_items: list[LineAnswer]


class CalculationAnswer(PreviewAnswer):
    """A frozen calculation, good for issuing an invoice until it expires."""

    calculation_id: str
    customer_id: str
    period_start: str
    period_end: str
    created_at: str
    expires_at: str


class Preview(Body):
    """Charges and usage to price. `usage` is metric key → quantity."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "discounts": "discounts are",
        "taxes": "taxes are",
        "minimum_commitment": "commitments are",
        "conventions": "conventions are",
    }

    currency: Currency
    charges: Annotated[Charges, Field(min_length=1)]
    usage: dict[Key, NotNegative] = Field(default_factory=dict)
    period_start: Instant | None = None
    period_end: Instant | None = None


class Calculate(Body):
    """Which period of whom to calculate."""

    customer_id: str
    period_start: Instant
    period_end: Instant


def line_answer(
    rated: RatedLine, subscription_id: str | None = None, about: Period | None = None
) -> LineAnswer:
    """``about`` is the stretch of time the line charges for."""
    return LineAnswer(
        **line_document(rated),
        subscription_id=subscription_id,
        period_start=moment_or_none(about.start if about else None),
        period_end=moment_or_none(about.end if about else None),
    )


def _preview(rating: Rating) -> PreviewAnswer:
    return PreviewAnswer(
        currency=rating.total.asset.code,
        total_amount=rating.total.units,
        line_items=[line_answer(line) for line in rating.lines],
    )


def _calculation(calculation: Calculation) -> CalculationAnswer:
    return CalculationAnswer(
        calculation_id=calculation.id,
        customer_id=calculation.customer_id,
        currency=calculation.currency.code,
        total_amount=calculation.total.units,
        line_items=[
            line_answer(line.rated, line.subscription_id, calculation.line_periods.get(line.line))
            for line in calculation.lines
        ],
        period_start=moment(calculation.period.start),
        period_end=moment(calculation.period.end),
        created_at=moment(calculation.created_at),
        expires_at=moment(calculation.expires_at),
    )


def pricing(billing: Billing) -> APIRouter:
    """``/v1/pricing``."""
    api = router("pricing")

    @api.post("/pricing/preview")
    async def preview_pricing(caller: Reader, body: Preview) -> PreviewAnswer:
        """Price charges for given usage. Touches no database."""
        return _preview(billing.preview(body.currency, charges_of(body.charges), body.usage))

    @api.post("/pricing/calculate")
    async def calculate_pricing(caller: Writer, body: Calculate) -> CalculationAnswer:
        """What a customer's subscriptions cost in a period, frozen."""
        span = period(body.period_start, body.period_end)
        return _calculation(await billing.calculate(body.customer_id, span, within=caller.within))

    return api
