"""Invoices: issued over everything not invoiced yet, and read back with what came too late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter

from farebox.api.ledger import AuditAnswer, audit_answer
from farebox.api.pricing import LineAnswer, line_answer
from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    Reader,
    Writer,
    listed,
    moment,
    moment_or_none,
    number,
    router,
)
from farebox.app.billing import Billing, InvoiceView, StoredInvoice
from farebox.app.documents.scalars import Instant
from farebox.base.time import Period
from farebox.domain.invoice import Invoice


class IssueInvoice(Body):
    """Issue one invoice over everything up to the cutoff."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "lines": "one-off invoices are",
        "currency": "one-off invoices are",
    }

    customer_id: str
    cutoff_date: Instant
    calculation_id: str | None = None


class InvoiceLineAnswer(LineAnswer):
    """A line; `line` counts from 1 without gaps."""

    line: int


class InvoiceAnswer(Answer):
    """An invoice. Amounts are whole minor units of `currency`."""

    id: str
    number: str | None
    customer_id: str
    kind: str
    status: str
    currency: str
    period_start: str | None
    period_end: str | None
    subtotal_amount: int
    tax_amount: int
    total_amount: int
    line_items: list[InvoiceLineAnswer]
    calculation_id: str | None
    issued_at: str | None
    created_at: str


class LateUsageAnswer(Answer):
    """Events of the invoiced period that came in too late for it."""

    metric_key: str
    events: int
    value: str


class InvoiceMeta(Answer):
    """What is on no line of this invoice."""

    late_event_count: int
    late_usage: list[LateUsageAnswer]


class InvoiceWithMeta(InvoiceAnswer):
    """An invoice and what came too late for it."""

    meta: InvoiceMeta


def _fields(invoice: Invoice, about: Mapping[int, Period]) -> dict[str, Any]:
    return {
        "id": invoice.id,
        "number": invoice.number,
        "customer_id": invoice.customer_id,
        "kind": invoice.kind,
        "status": str(invoice.status),
        "currency": invoice.currency.code,
        "period_start": moment_or_none(invoice.period.start if invoice.period else None),
        "period_end": moment_or_none(invoice.period.end if invoice.period else None),
        "subtotal_amount": invoice.subtotal.units,
        "tax_amount": invoice.tax.units,
        "total_amount": invoice.total.units,
        "line_items": [
            InvoiceLineAnswer(
                line=line.line,
                **line_answer(line.rated, line.subscription_id, about.get(line.line)).model_dump(),
            )
            for line in invoice.lines
        ],
        "calculation_id": invoice.calculation_id,
        "issued_at": moment_or_none(invoice.issued_at),
        "created_at": moment(invoice.created_at),
    }


def invoice_answer(stored: StoredInvoice) -> InvoiceAnswer:
    return InvoiceAnswer(**_fields(stored.invoice, stored.line_periods))


def _view(view: InvoiceView) -> InvoiceWithMeta:
    late_usage = [
        LateUsageAnswer(metric_key=late.metric_key, events=late.events, value=number(late.value))
        for late in view.late_usage
    ]
    return InvoiceWithMeta(
        **_fields(view.invoice, view.line_periods),
        meta=InvoiceMeta(late_event_count=view.late_event_count, late_usage=late_usage),
    )


def invoices(billing: Billing) -> APIRouter:
    """``/v1/invoices``."""
    api = router("invoices")

    @api.post("/invoices", status_code=201)
    async def issue_invoice(caller: Writer, body: IssueInvoice) -> InvoiceWithMeta:
        view = await billing.issue(
            caller.actor, body.customer_id, body.cutoff_date, body.calculation_id, within=caller.within
        )
        return _view(view)

    @api.get("/invoices")
    async def list_invoices(
        caller: Reader, customer_id: str | None = None, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[InvoiceAnswer]:
        """Newest first."""
        return listed(await billing.list(customer_id, limit, cursor), invoice_answer)

    @api.get("/invoices/{invoice_id}")
    async def get_invoice(caller: Reader, invoice_id: str) -> InvoiceWithMeta:
        return _view(await billing.get(invoice_id))

    @api.get("/invoices/{invoice_id}/audit")
    async def invoice_audit(
        caller: Reader, invoice_id: str, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[AuditAnswer]:
        """Who did what to it, oldest first."""
        return listed(await billing.audit(invoice_id, limit, cursor), audit_answer)

    return api
