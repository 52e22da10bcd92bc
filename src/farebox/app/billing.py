"""Billing: what usage costs, frozen in a calculation, and turned into an invoice.

An invoice charges a customer's subscriptions for every billing period that has ended by the cutoff and that no invoice has
charged for yet. Only when there is none, a cutoff inside a period makes an *interim* invoice: it charges what the period
costs so far, and the invoice that completes the period charges the difference, so that all invoices of a period come to what
the period costs, tiers and flat fees included. (Were both on one invoice, a cutoff of midnight UTC would begin the next
month of every customer east of Greenwich.) Nothing is charged beyond the present: a cutoff in the future counts as now.

What an invoice contains is decided by the database snapshot it froze. Usage that is committed later is never in it, and
shows up as late on that invoice until an invoice that rates the same period again has taken it in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any, Final

from farebox.app.customers import not_found
from farebox.app.joining import joined
from farebox.app.pages import Page, decode_cursor, page_of, rows_wanted
from farebox.app.ports.clock import BusinessClock, Clock
from farebox.base.errors import InvariantError, Refused, refuse
from farebox.base.ids import CustomerId, InvoiceId, SubscriptionId, new_id
from farebox.base.money import EXACT, Asset, Money
from farebox.base.time import Period, parse_instant, to_rfc3339
from farebox.domain.catalog import Charge, PlanVersion, charge_faults
from farebox.domain.invoice import Invoice, InvoiceLine, draft, issue, subtotal_of
from farebox.domain.ledger import invoice_issued
from farebox.domain.rating import RatedLine, Rating, line_document, line_from_document, rate
from farebox.domain.subscription import Subscription, billing_periods
from farebox.store import audit, customers, invoices, ledger, plans, subscriptions, usage
from farebox.store.audit import AuditEntry
from farebox.store.invoices import Cover, Invoiced, LateUsage, StoredCalculation, StoredInvoice
from farebox.store.pool import Database, Tx

__all__ = ["Billing", "Calculation", "InvoiceView", "LateUsage", "StoredInvoice"]

CALCULATION_LIFE: Final = timedelta(hours=24)
#: One series for now; its numbers are ``FB-000001`` and so on, without gaps.
SERIES: Final = "FB"
#: Billing periods times charges of one invoice. A subscription that was never invoiced is caught up in several.
LINES_MAX: Final = 10_000

_BEGINNING_OF_TIME: Final = datetime.fromisoformat("0001-01-02T00:00:00+00:00")
#: Periods are half-open: what happens now is within a period that ends an instant later.
_INSTANT: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Calculation:
    """What a period costs, frozen: the usage that was in and the plan versions that priced it. Good for 24 hours.

    ``line_periods[line.line]`` is the stretch of time that a line is about.
    """

    id: str
    customer_id: str
    currency: Asset
    period: Period
    lines: tuple[InvoiceLine, ...]
    line_periods: Mapping[int, Period]
    total: Money
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class InvoiceView:
    """An invoice, what each of its lines is about, and what came too late for it."""

    invoice: Invoice
    line_periods: Mapping[int, Period]
    late_usage: tuple[LateUsage, ...] = ()

    @property
    def late_event_count(self) -> int:
        return sum(late.events for late in self.late_usage)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A subscription's time to charge for: ``covered`` of one billing period. ``rated_from`` is where the usage to rate
    begins: the billing period's start when interim invoices (``completes``) have charged a part of it already."""

    subscription_id: str
    billing_period: Period
    covered: Period
    rated_from: datetime
    completes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rated:
    """A stretch and its lines."""

    stretch: _Stretch
    lines: tuple[RatedLine, ...]


class Billing:
    """Rates, freezes and issues."""

    def __init__(self, database: Database, clock: Clock, business_date: BusinessClock) -> None:
        self._database = database
        self._clock = clock
        self._business_date = business_date

    @staticmethod
    def preview(currency: Asset, charges: Iterable[Charge], usage: Mapping[str, Decimal]) -> Rating:
        """Price charges without a database: ``usage`` is metric key → quantity. The function that invoices use too.

        Refuses every fault of the charges at once (paths ``charges[0]…``), then those of the quantities.
        """
        charges = tuple(charges)
        faults = [
            fault for i, charge in enumerate(charges) for fault in charge_faults(charge, f"charges[{i}]")
        ]
        if faults:
            raise Refused(*faults)
        return rate(currency, charges, usage)

    async def calculate(self, customer_id: str, period: Period, within: Tx | None = None) -> Calculation:
        """What the customer's subscriptions cost in a period, from the usage committed by now; kept for 24 hours.

        Refuses ``CUSTOMER_NOT_FOUND``, ``PERIOD_EMPTY``, ``PERIOD_TOO_LONG``, ``PERIOD_NOT_STARTED`` and ``NO_SUBSCRIPTION``
        (none runs in it).
        """
        if period.start == period.end:
            raise refuse("PERIOD_EMPTY", "the period ends where it starts", "period_end")
        present = await self._business_date.now() + _INSTANT
        async with joined(self._database, within) as tx:
            if await customers.get(tx, customer_id) is None:
                raise not_found("customer_id")
            watermark = await usage.snapshot(tx)
            running = await subscriptions.with_plans(tx, customer_id, period.start, period.end)
            if not running:
                raise refuse(
                    "NO_SUBSCRIPTION", "no subscription of this customer runs in the period", "customer_id"
                )
            taken = await invoices.covers(tx, [s.id for s, _ in running])
            stretches = [
                stretch
                for subscription, plan in running
                for stretch in _within(subscription, plan, period, present, taken)
            ]
            if not stretches:
                raise refuse("PERIOD_NOT_STARTED", "the period lies in the future", "period_start")
            charges = {str(s.id): len(plan.charges) for s, plan in running}
            if sum(charges[stretch.subscription_id] for stretch in stretches) > LINES_MAX:
                raise refuse(
                    "PERIOD_TOO_LONG", f"this would come to more than {LINES_MAX} lines", "period_end"
                )
            rated = await _rate(tx, customer_id, running, stretches, watermark)
            now = self._clock.now()
            stored = StoredCalculation(
                id=new_id("calc"),
                customer_id=customer_id,
                period=period,
                watermark=watermark,
                versions=_versions(running),
                document=_document(running[0][1].currency, rated),
                created_at=now,
                expires_at=now + CALCULATION_LIFE,
            )
            await invoices.add_calculation(tx, stored)
        return _calculation(stored, running[0][1].currency, rated)

    async def issue(
        self,
        actor: str,
        customer_id: str,
        cutoff: datetime,
        calculation_id: str | None = None,
        within: Tx | None = None,
    ) -> InvoiceView:
        """Issue one invoice over the billing periods that have ended by the cutoff and were not invoiced yet (without any:
        over the running ones so far), all subscriptions together; or over exactly what a calculation froze. It is booked
        in the same transaction. An invoice over nothing is issued too: whoever asks for one invoice gets it (runs over all
        customers skip those).

        An erased customer's last periods are issued like any other's: the books stay.

        Refuses ``CUSTOMER_NOT_FOUND``, ``NO_SUBSCRIPTION``, ``PERIOD_ALREADY_INVOICED`` (conflict;
        ``facts["invoice_id"]``), ``CALCULATION_NOT_FOUND``, ``CALCULATION_EXPIRED``, ``CALCULATION_STALE`` (conflict: a
        subscription, a plan version or an invoice has come between), ``CALCULATION_MISMATCH`` (of another customer, or it
        reaches beyond the cutoff), ``INVOICE_TOO_LONG``.
        """
        now = await self._business_date.now()
        present = now + _INSTANT
        async with joined(self._database, within) as tx:
            if await customers.lock(tx, customer_id) is None:
                raise not_found("customer_id")
            if calculation_id is None:
                watermark = await usage.snapshot(tx)
                running = await subscriptions.with_plans(
                    tx, customer_id, _BEGINNING_OF_TIME, min(cutoff, present)
                )
                stretches = await _due(tx, running, min(cutoff, present))
                currency = running[0][1].currency
                rated = await _rate(tx, customer_id, running, stretches, watermark)
            else:
                calculation = await self._fresh(tx, customer_id, cutoff, calculation_id)
                watermark = calculation.watermark
                currency, rated = _from_document(calculation.document)
                await _check_uncovered(tx, [r.stretch for r in rated])
            return await self._write(
                tx, actor, CustomerId(customer_id), currency, rated, watermark, calculation_id, now
            )

    async def get(self, invoice_id: str) -> InvoiceView:
        """With the usage that came too late for it. Refuses ``INVOICE_NOT_FOUND``."""
        async with self._database.connection() as tx:
            stored = await invoices.get(tx, invoice_id)
            if stored is None:
                raise refuse("INVOICE_NOT_FOUND", "there is no invoice with this id", "invoice_id")
            late = await invoices.late(tx, invoice_id)
        return InvoiceView(stored.invoice, stored.line_periods, tuple(late))

    async def list(
        self, customer_id: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> Page[StoredInvoice]:
        """Newest first, with their lines; of one customer or of all. Late usage is told by ``get`` alone."""
        async with self._database.connection() as tx:
            rows = await invoices.list_before(tx, customer_id, decode_cursor(cursor), rows_wanted(limit))
        return page_of(rows, limit, lambda stored: stored.invoice.id)

    async def audit(self, invoice_id: str, limit: int = 50, cursor: str | None = None) -> Page[AuditEntry]:
        """Who did what to an invoice, oldest first. Refuses ``INVOICE_NOT_FOUND``."""
        after = decode_cursor(cursor) or "0"
        if not (after.isascii() and after.isdigit() and len(after) < 19):
            raise refuse("CURSOR_INVALID", "this is not a cursor that a list answered with", "cursor")
        async with self._database.connection() as tx:
            if await invoices.get(tx, invoice_id) is None:
                raise refuse("INVOICE_NOT_FOUND", "there is no invoice with this id", "invoice_id")
            entries = await audit.by_subject(tx, invoice_id, int(after), rows_wanted(limit))
        return page_of(entries, limit, lambda entry: str(entry.id))

    # ── inside an issue ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _fresh(
        self, tx: Tx, customer_id: str, cutoff: datetime, calculation_id: str
    ) -> StoredCalculation:
        """The calculation, if it may still become an invoice."""
        calculation = await invoices.get_calculation(tx, calculation_id)
        if calculation is None:
            raise refuse("CALCULATION_NOT_FOUND", "there is no calculation with this id", "calculation_id")
        if calculation.customer_id != customer_id:
            raise refuse("CALCULATION_MISMATCH", "this calculation is another customer's", "calculation_id")
        if calculation.expires_at <= self._clock.now():
            raise refuse(
                "CALCULATION_EXPIRED", "calculations live for 24 hours: calculate again", "calculation_id"
            )
        if calculation.period.end > cutoff:
            raise refuse("CALCULATION_MISMATCH", "this calculation reaches beyond the cutoff", "cutoff_date")
        running = await subscriptions.with_plans(
            tx, customer_id, calculation.period.start, calculation.period.end
        )
        if _versions(running) != calculation.versions:
            raise _stale("the customer's subscriptions have changed since")
        return calculation

    async def _write(
        self,
        tx: Tx,
        actor: str,
        customer_id: CustomerId,
        currency: Asset,
        rated: Sequence[_Rated],
        watermark: str,
        calculation_id: str | None,
        issued_at: datetime,
    ) -> InvoiceView:
        """Store, book and number the invoice. The number comes last: its counter is everybody's."""
        flat = [(r.stretch, line) for r in rated for line in r.lines]
        invoice = draft(
            InvoiceId(new_id("inv")),
            customer_id,
            currency,
            Period(min(r.stretch.covered.start for r in rated), max(r.stretch.covered.end for r in rated)),
            [(SubscriptionId(stretch.subscription_id), line) for stretch, line in flat],
            created_at=self._clock.now(),
            calculation_id=calculation_id,
        )
        line_periods = {number: stretch.covered for number, (stretch, _) in enumerate(flat, start=1)}
        await invoices.add(tx, invoice, watermark, line_periods)
        await invoices.add_covers(
            tx,
            [
                Cover(invoice.id, r.stretch.subscription_id, r.stretch.covered, r.stretch.rated_from)
                for r in rated
            ],
        )
        await ledger.post(tx, invoice_issued(invoice.id, invoice.customer_id, invoice.total))
        await audit.add(
            tx,
            actor,
            "invoice.issue",
            invoice.id,
            {
                "customer_id": customer_id,
                "calculation_id": calculation_id,
                "total_units": invoice.total.units,
            },
        )
        late = await invoices.late(tx, invoice.id)
        number = await invoices.issue(tx, invoice.id, SERIES, issued_at)
        if number is None:
            raise InvariantError(f"invoice {invoice.id} was no draft right after it was written")
        return InvoiceView(issue(invoice, number, issued_at), line_periods, tuple(late))


# ── which time to charge for ─────────────────────────────────────────────────────────────────────────────────────────


async def _due(
    tx: Tx, running: Sequence[tuple[Subscription, PlanVersion]], until: datetime
) -> list[_Stretch]:
    """The billing periods that have ended by ``until`` and that no invoice has charged for, oldest subscription first;
    without any, what the running ones have come to."""
    if not running:
        raise refuse(
            "NO_SUBSCRIPTION", "no subscription of this customer has begun before the cutoff", "customer_id"
        )
    taken = await invoices.covers(tx, [subscription.id for subscription, _ in running])
    stretches: list[_Stretch] = []
    lines = 0
    for subscription, plan in running:
        for period in billing_periods(subscription, plan.interval, subscription.start_at, until):
            stretch = _open_part(subscription, period, min(period.end, until), taken)
            if stretch is not None:
                stretches.append(stretch)
                lines += len(plan.charges)
                if lines > LINES_MAX:
                    raise refuse(
                        "INVOICE_TOO_LONG",
                        f"this invoice would have more than {LINES_MAX} lines: take an earlier cutoff first",
                        "cutoff_date",
                    )
    complete = [stretch for stretch in stretches if stretch.covered.end == stretch.billing_period.end]
    if complete:
        return complete
    if not stretches:
        last = max(taken, key=lambda cover: cover.period.end)
        raise refuse(
            "PERIOD_ALREADY_INVOICED",
            "everything up to the cutoff has been invoiced",
            "cutoff_date",
            invoice_id=last.invoice_id,
        )
    return stretches


def _open_part(
    subscription: Subscription, period: Period, end: datetime, taken: Sequence[Cover]
) -> _Stretch | None:
    """What of a billing period up to ``end`` is not charged yet; None: nothing."""
    before = [c for c in taken if c.subscription_id == subscription.id and c.period.start in period]
    start = max((c.period.end for c in before), default=period.start)
    if start >= end:
        return None
    completes = tuple(dict.fromkeys(c.invoice_id for c in before))
    return _Stretch(subscription.id, period, Period(start, end), period.start, completes)


def _within(
    subscription: Subscription, plan: PlanVersion, window: Period, present: datetime, taken: Sequence[Cover]
) -> list[_Stretch]:
    """What of a window is to be charged for: the parts still open, and as a plain price those that were charged before."""
    stretches = []
    until = min(window.end, present)
    for period in billing_periods(subscription, plan.interval, window.start, until):
        start, end = max(period.start, window.start), min(period.end, until)
        stretch = _open_part(subscription, period, end, taken)
        if stretch is None or stretch.covered.start < start:
            stretch = _Stretch(subscription.id, period, Period(start, end), start)
        stretches.append(stretch)
    return stretches


async def _check_uncovered(tx: Tx, stretches: Sequence[_Stretch]) -> None:
    """Refuse a calculation whose time was charged for since, or that does not begin where invoicing stopped."""
    taken = await invoices.covers(tx, sorted({stretch.subscription_id for stretch in stretches}))
    for stretch in stretches:
        own = [c for c in taken if c.subscription_id == stretch.subscription_id]
        for cover in own:
            if cover.period.start < stretch.covered.end and cover.period.end > stretch.covered.start:
                raise refuse(
                    "PERIOD_ALREADY_INVOICED",
                    "what this calculation charges for has been invoiced",
                    "calculation_id",
                    invoice_id=cover.invoice_id,
                )
        before = [c for c in own if c.period.start in stretch.billing_period]
        if tuple(dict.fromkeys(c.invoice_id for c in before)) != stretch.completes:
            raise _stale("an invoice of the same billing period has come between")
        if stretch.covered.start != max((c.period.end for c in before), default=stretch.billing_period.start):
            raise refuse(
                "CALCULATION_MISMATCH",
                "a calculation that becomes an invoice begins where invoicing stopped: at "
                + to_rfc3339(max((c.period.end for c in before), default=stretch.billing_period.start)),
                "calculation_id",
            )


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


async def _rate(
    tx: Tx,
    customer_id: str,
    running: Sequence[tuple[Subscription, PlanVersion]],
    stretches: Sequence[_Stretch],
    watermark: str,
) -> list[_Rated]:
    """Price each stretch from the usage that the watermark shows."""
    by_id = {str(subscription.id): plan for subscription, plan in running}
    metric_keys = {c.metric_key for plan in by_id.values() for c in plan.charges if c.metric_key is not None}
    metrics = await plans.metrics(tx, sorted(metric_keys))
    quantities: dict[tuple[str, datetime, datetime], Decimal] = {}
    rated = []
    for stretch in stretches:
        plan = by_id[stretch.subscription_id]
        used: dict[str, Decimal] = {}
        for key in dict.fromkeys(c.metric_key for c in plan.charges if c.metric_key is not None):
            asked = (key, stretch.rated_from, stretch.covered.end)
            if asked not in quantities:
                quantities[asked] = (
                    await usage.used(tx, customer_id, metrics[key], *asked[1:], watermark)
                ).value
            used[key] = quantities[asked]
        lines = rate(plan.currency, plan.charges, used).lines
        if stretch.completes:
            charged = await invoices.invoiced(
                tx, stretch.completes, stretch.subscription_id, stretch.billing_period
            )
            lines = tuple(_difference(line, charged.get(line.charge_id)) for line in lines)
        rated.append(_Rated(stretch, lines))
    return rated


def _difference(line: RatedLine, charged: Invoiced | None) -> RatedLine:
    """The line of a whole period less what interim invoices have charged of it."""
    if charged is None:
        return line
    before = Money(charged.amount_units, line.amount.asset)
    rest = line.amount - before
    with localcontext(EXACT):
        exact = line.exact_amount - charged.exact_amount
    return dataclasses.replace(
        line,
        exact_amount=exact,
        amount=rest,
        steps=(*line.steps, f"{line.amount} for the period less {before} invoiced before = {rest}"),
    )


# ── calculations as documents ────────────────────────────────────────────────────────────────────────────────────────


def _versions(running: Sequence[tuple[Subscription, PlanVersion]]) -> dict[str, list[Any]]:
    return {str(s.id): [s.plan_id, s.plan_version, s.end_at and to_rfc3339(s.end_at)] for s, _ in running}


def _document(currency: Asset, rated: Sequence[_Rated]) -> dict[str, Any]:
    return {
        "currency": currency.code,
        "stretches": [
            {
                "subscription_id": r.stretch.subscription_id,
                "billing_period": _period_document(r.stretch.billing_period),
                "covered": _period_document(r.stretch.covered),
                "rated_from": to_rfc3339(r.stretch.rated_from),
                "completes": list(r.stretch.completes),
                "lines": [line_document(line) for line in r.lines],
            }
            for r in rated
        ],
    }


def _from_document(document: dict[str, Any]) -> tuple[Asset, list[_Rated]]:
    currency = Asset.named(document["currency"])
    return currency, [
        _Rated(
            _Stretch(
                subscription_id=stretch["subscription_id"],
                billing_period=_period_from(stretch["billing_period"]),
                covered=_period_from(stretch["covered"]),
                rated_from=parse_instant(stretch["rated_from"]),
                completes=tuple(stretch["completes"]),
            ),
            tuple(line_from_document(currency, line) for line in stretch["lines"]),
        )
        for stretch in document["stretches"]
    ]


def _period_document(period: Period) -> list[str]:
    return [to_rfc3339(period.start), to_rfc3339(period.end)]


def _period_from(document: list[str]) -> Period:
    return Period(parse_instant(document[0]), parse_instant(document[1]))


def _calculation(stored: StoredCalculation, currency: Asset, rated: Sequence[_Rated]) -> Calculation:
    flat = [(r.stretch, line) for r in rated for line in r.lines]
    lines = tuple(
        InvoiceLine(n, SubscriptionId(stretch.subscription_id), line)
        for n, (stretch, line) in enumerate(flat, start=1)
    )
    return Calculation(
        id=stored.id,
        customer_id=stored.customer_id,
        currency=currency,
        period=stored.period,
        lines=lines,
        line_periods={n: stretch.covered for n, (stretch, _) in enumerate(flat, start=1)},
        total=subtotal_of(currency, lines),
        created_at=stored.created_at,
        expires_at=stored.expires_at,
    )


def _stale(why: str) -> Refused:
    return refuse("CALCULATION_STALE", f"{why}: calculate again", "calculation_id")
