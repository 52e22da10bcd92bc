"""An invoice: lines that add up, a number without gaps in its series, and a life in one table.

An issued invoice is never edited. What turns out wrong later is a line on the next one, or a note.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal

from farebox.base.errors import InvariantError, refuse
from farebox.base.ids import CustomerId, InvoiceId, SubscriptionId
from farebox.base.money import Asset, Money
from farebox.base.time import Period
from farebox.domain.rating import RatedLine

Kind = Literal["period", "one_off"]

_SERIES = re.compile(r"[A-Z0-9]{1,12}\Z", re.ASCII)


class Status(StrEnum):
    DRAFT = "draft"
    ISSUED = "issued"
    PAID = "paid"
    ARCHIVED = "archived"  # written off
    VOID = "void"


class Event(StrEnum):
    ISSUE = "issue"
    PAY = "pay"
    ARCHIVE = "archive"
    VOID = "void"


TRANSITIONS: Final[dict[Status, dict[Event, Status]]] = {
    Status.DRAFT: {Event.ISSUE: Status.ISSUED},
    Status.ISSUED: {Event.PAY: Status.PAID, Event.ARCHIVE: Status.ARCHIVED, Event.VOID: Status.VOID},
    Status.PAID: {},
    Status.ARCHIVED: {},
    Status.VOID: {},
}


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """A rated charge on an invoice. ``line`` counts from 1 without gaps."""

    line: int
    subscription_id: SubscriptionId | None
    rated: RatedLine

    @property
    def amount(self) -> Money:
        return self.rated.amount


@dataclass(frozen=True, slots=True)
class Invoice:
    """``total = subtotal + tax``, ``subtotal`` the sum of the lines. Making one that does not add up is an ``InvariantError``."""

    id: InvoiceId
    customer_id: CustomerId
    status: Status
    currency: Asset
    period: Period | None
    lines: tuple[InvoiceLine, ...]
    subtotal: Money
    tax: Money
    total: Money
    created_at: datetime
    kind: Kind = "period"
    number: str | None = None
    calculation_id: str | None = None
    issued_at: datetime | None = None

    def __post_init__(self) -> None:
        _check_totals(self)


def draft(
    invoice_id: InvoiceId,
    customer_id: CustomerId,
    currency: Asset,
    period: Period,
    rated: Iterable[tuple[SubscriptionId | None, RatedLine]],
    created_at: datetime,
    calculation_id: str | None = None,
) -> Invoice:
    """A draft with its lines numbered in the order given and its totals made from them."""
    lines = tuple(
        InvoiceLine(n, subscription_id, line) for n, (subscription_id, line) in enumerate(rated, start=1)
    )
    subtotal = subtotal_of(currency, lines)
    return Invoice(
        id=invoice_id,
        customer_id=customer_id,
        status=Status.DRAFT,
        currency=currency,
        period=period,
        lines=lines,
        subtotal=subtotal,
        tax=Money(0, currency),
        total=subtotal,
        created_at=created_at,
        calculation_id=calculation_id,
    )


def issue(invoice: Invoice, number: str, issued_at: datetime) -> Invoice:
    """The draft with its number, from now on fixed. ``Refused`` when it is no draft."""
    return dataclasses.replace(
        invoice, status=after(invoice.status, Event.ISSUE), number=number, issued_at=issued_at
    )


def after(status: Status, event: Event) -> Status:
    """The next status; ``Refused`` when the table has no such move."""
    following = TRANSITIONS[status].get(event)
    if following is None:
        raise refuse(
            "INVOICE_STATE",
            f"an invoice that is {status} does not take {event}",
            "status",
            status=str(status),
        )
    return following


def subtotal_of(currency: Asset, lines: Iterable[InvoiceLine]) -> Money:
    """The sum of the rounded lines."""
    return sum((line.amount for line in lines), Money(0, currency))


def invoice_number(series: str, count: int) -> str:
    """``FB-000001``: the series, then the place in it, six digits or as many as it takes."""
    if not _SERIES.match(series):
        raise refuse(
            "SERIES_MALFORMED", f"{series[:60]!r} must be 1 to 12 capital letters or digits", "series"
        )
    if count < 1:
        raise InvariantError(f"invoice numbers count from 1, not {count}")
    return f"{series}-{count:06d}"


def _check_totals(invoice: Invoice) -> None:
    if [line.line for line in invoice.lines] != list(range(1, len(invoice.lines) + 1)):
        raise InvariantError(f"the lines of invoice {invoice.id} are not numbered 1 to {len(invoice.lines)}")
    if subtotal_of(invoice.currency, invoice.lines) != invoice.subtotal:
        raise InvariantError(f"the lines of invoice {invoice.id} do not add up to {invoice.subtotal}")
    if invoice.subtotal + invoice.tax != invoice.total:
        raise InvariantError(f"subtotal and tax of invoice {invoice.id} do not add up to {invoice.total}")
    if (invoice.number is None) != (invoice.status is Status.DRAFT):
        raise InvariantError(f"invoice {invoice.id} is {invoice.status} and its number is {invoice.number}")
