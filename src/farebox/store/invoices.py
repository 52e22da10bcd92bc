"""Calculations and invoices. Lock order: customer, invoice, counter; the number is taken last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from farebox.base.ids import CustomerId, InvoiceId, SubscriptionId
from farebox.base.money import Asset, Money
from farebox.base.time import Period
from farebox.domain.invoice import Invoice, InvoiceLine, Status
from farebox.domain.rating import line_document, line_from_document
from farebox.store.pool import Tx

# ── calculations ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class StoredCalculation:
    """A calculation as stored. ``watermark`` is the snapshot whose usage is in, ``versions`` subscription → [plan, version]."""

    id: str
    customer_id: str
    period: Period
    watermark: str
    versions: dict[str, list[Any]]
    document: dict[str, Any]
    created_at: datetime
    expires_at: datetime


ADD_CALCULATION: LiteralString = """
    INSERT INTO calculation
           (id, customer_id, period_start, period_end, watermark, versions, document, created_at, expires_at)
    VALUES (%(id)s, %(customer_id)s, %(start)s, %(end)s, %(watermark)s::pg_snapshot, %(versions)s, %(document)s,
            %(created_at)s, %(expires_at)s)"""


async def add_calculation(tx: Tx, calculation: StoredCalculation) -> None:
    """Store a calculation."""
    await tx.execute(
        ADD_CALCULATION,
        {
            "id": calculation.id,
            "customer_id": calculation.customer_id,
            "start": calculation.period.start,
            "end": calculation.period.end,
            "watermark": calculation.watermark,
            "versions": Jsonb(calculation.versions),
            "document": Jsonb(calculation.document),
            "created_at": calculation.created_at,
            "expires_at": calculation.expires_at,
        },
    )


# Primary key.
GET_CALCULATION: LiteralString = """
    SELECT id, customer_id, period_start, period_end, watermark::text, versions, document, created_at, expires_at
      FROM calculation
     WHERE id = %(id)s"""


async def get_calculation(tx: Tx, calculation_id: str) -> StoredCalculation | None:
    """The calculation with this id."""
    row = await (await tx.execute(GET_CALCULATION, {"id": calculation_id})).fetchone()
    if row is None:
        return None
    return StoredCalculation(row[0], row[1], Period(row[2], row[3]), *row[4:])


# ── invoices ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ADD: LiteralString = """
    INSERT INTO invoice (id, customer_id, kind, status, currency, period_start, period_end, subtotal_units, tax_units,
                         total_units, watermark, calculation_id, created_at)
    VALUES (%(id)s, %(customer_id)s, %(kind)s, %(status)s, %(currency)s, %(start)s, %(end)s, %(subtotal)s, %(tax)s,
            %(total)s, %(watermark)s::pg_snapshot, %(calculation_id)s, %(created_at)s)"""

ADD_LINES: LiteralString = """
    INSERT INTO invoice_line (invoice_id, line, subscription_id, charge_id, description, pricing_model, metric_key,
                              quantity, exact_amount, amount_units, detail, period_start, period_end)
    VALUES (%(invoice_id)s, %(line)s, %(subscription_id)s, %(charge_id)s, %(description)s, %(pricing_model)s,
            %(metric_key)s, %(quantity)s, %(exact_amount)s, %(amount)s, %(detail)s, %(start)s, %(end)s)"""


async def add(tx: Tx, invoice: Invoice, watermark: str, line_periods: Mapping[int, Period]) -> None:
    """Store a draft with its lines; ``line_periods`` says what each line is about."""
    await tx.execute(
        ADD,
        {
            "id": invoice.id,
            "customer_id": invoice.customer_id,
            "kind": invoice.kind,
            "status": str(invoice.status),
            "currency": invoice.currency.code,
            "start": invoice.period and invoice.period.start,
            "end": invoice.period and invoice.period.end,
            "subtotal": invoice.subtotal.units,
            "tax": invoice.tax.units,
            "total": invoice.total.units,
            "watermark": watermark,
            "calculation_id": invoice.calculation_id,
            "created_at": invoice.created_at,
        },
    )
    async with tx.cursor() as cursor:
        await cursor.executemany(
            ADD_LINES, [_line_values(invoice.id, line, line_periods.get(line.line)) for line in invoice.lines]
        )


# The counter's row is locked from here to the commit, which is the next thing that happens: numbers have no gaps, as a
# rollback gives the number back, and nobody waits for more than one commit. domain.invoice.invoice_number says the form.
ISSUE: LiteralString = """
    WITH taken AS (
        INSERT INTO invoice_counter AS old (series, last) VALUES (%(series)s, 1)
        ON CONFLICT (series) DO UPDATE SET last = old.last + 1
        RETURNING last
    )
    UPDATE invoice
       SET status = 'issued', issued_at = %(issued_at)s,
           number = %(series)s || '-' || lpad(taken.last::text, greatest(6, length(taken.last::text)), '0')
      FROM taken
     WHERE invoice.id = %(id)s AND invoice.status = 'draft'
    RETURNING number"""


async def issue(tx: Tx, invoice_id: str, series: str, issued_at: datetime) -> str | None:
    """Give a draft its number; the last statement of its transaction. None: it is no draft."""
    row = await (
        await tx.execute(ISSUE, {"id": invoice_id, "series": series, "issued_at": issued_at})
    ).fetchone()
    return None if row is None else row[0]


# Primary key.
GET: LiteralString = """
    SELECT id, customer_id, kind, status, currency, period_start, period_end, subtotal_units, tax_units, total_units,
           calculation_id, number, issued_at, created_at
      FROM invoice
     WHERE id = %(id)s"""

# Primary key of the lines.
LINES: LiteralString = """
    SELECT invoice_id, line, subscription_id, charge_id, description, pricing_model, metric_key, quantity, exact_amount,
           amount_units, detail, period_start, period_end
      FROM invoice_line
     WHERE invoice_id = ANY (%(ids)s)
     ORDER BY invoice_id, line"""


@dataclass(frozen=True, slots=True)
class StoredInvoice:
    """An invoice and what each of its lines is about."""

    invoice: Invoice
    line_periods: dict[int, Period]


async def get(tx: Tx, invoice_id: str) -> StoredInvoice | None:
    """The invoice with this id, with its lines."""
    row = await (await tx.execute(GET, {"id": invoice_id})).fetchone()
    return None if row is None else (await _with_lines(tx, [row]))[0]


# Primary key backwards (ids sort by time of making); a filter on the customer takes invoice_customer and sorts the few.
LIST: LiteralString = """
    SELECT id, customer_id, kind, status, currency, period_start, period_end, subtotal_units, tax_units, total_units,
           calculation_id, number, issued_at, created_at
      FROM invoice
     WHERE (%(before)s::text IS NULL OR id < %(before)s)
       AND (%(customer_id)s::text IS NULL OR customer_id = %(customer_id)s)
     ORDER BY id DESC
     LIMIT %(rows)s"""


async def list_before(tx: Tx, customer_id: str | None, before: str | None, rows: int) -> list[StoredInvoice]:
    """Invoices with their lines, newest first; of one customer or of all."""
    cursor = await tx.execute(LIST, {"customer_id": customer_id, "before": before, "rows": rows})
    return await _with_lines(tx, await cursor.fetchall())


# ── what has been invoiced ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Cover:
    """A stretch of a subscription's life that an invoice has charged for."""

    invoice_id: str
    subscription_id: str
    period: Period
    rated_from: datetime


# Index invoiced_period_unique.
COVERS: LiteralString = """
    SELECT invoice_id, subscription_id, period_start, period_end, rated_from
      FROM invoiced_period
     WHERE subscription_id = ANY (%(ids)s) AND NOT voided
     ORDER BY subscription_id, period_start"""


async def covers(tx: Tx, subscription_ids: Sequence[str]) -> list[Cover]:
    """What of these subscriptions has been invoiced, in order of time."""
    rows = await (await tx.execute(COVERS, {"ids": list(subscription_ids)})).fetchall()
    return [Cover(row[0], row[1], Period(row[2], row[3]), row[4]) for row in rows]


ADD_COVERS: LiteralString = """
    INSERT INTO invoiced_period (invoice_id, subscription_id, period_start, period_end, rated_from)
    SELECT %(invoice_id)s, * FROM unnest(%(ids)s::text[], %(starts)s::timestamptz[], %(ends)s::timestamptz[],
                                         %(rated)s::timestamptz[])"""


async def add_covers(tx: Tx, covers: Sequence[Cover]) -> None:
    """Claim stretches for one invoice. ``invoiced_period_unique`` refuses a stretch that another one has claimed."""
    await tx.execute(
        ADD_COVERS,
        {
            "invoice_id": covers[0].invoice_id,
            "ids": [c.subscription_id for c in covers],
            "starts": [c.period.start for c in covers],
            "ends": [c.period.end for c in covers],
            "rated": [c.rated_from for c in covers],
        },
    )


@dataclass(frozen=True, slots=True)
class Invoiced:
    """What invoices have charged so far for one charge in one billing period."""

    exact_amount: Decimal
    amount_units: int


# Primary key of the lines, by the invoices that cover.
INVOICED: LiteralString = """
    SELECT charge_id, sum(exact_amount), sum(amount_units)
      FROM invoice_line
     WHERE invoice_id = ANY (%(invoices)s) AND subscription_id = %(subscription_id)s
       AND period_start >= %(start)s AND period_start < %(end)s
     GROUP BY charge_id"""


async def invoiced(
    tx: Tx, invoice_ids: Sequence[str], subscription_id: str, period: Period
) -> dict[str, Invoiced]:
    """Charge → what these invoices have charged for stretches that begin in the billing period."""
    values = {
        "invoices": list(invoice_ids),
        "subscription_id": subscription_id,
        "start": period.start,
        "end": period.end,
    }
    rows = await (await tx.execute(INVOICED, values)).fetchall()
    return {row[0]: Invoiced(row[1], int(row[2])) for row in rows}


# ── late usage ───────────────────────────────────────────────────────────────────────────────────────────────────────

# An event is late for a stretch when its time lies in it, its metric is charged there, the invoice's snapshot does not
# show its batch, and no invoice that rated the same time since has seen it. Events by usage_event_read, the rest by
# primary keys.
LATE: LiteralString = """
    SELECT e.metric_key, count(*), sum(e.value)
      FROM invoice i
      JOIN usage_event e ON e.customer_id = i.customer_id AND e."timestamp" >= i.period_start AND e."timestamp" < i.period_end
      JOIN ingest_batch b ON b.id = e.batch_id
     WHERE i.id = %(id)s
       AND NOT pg_visible_in_snapshot(b.xid, i.watermark)
       AND e.metric_key = ANY (array(SELECT l.metric_key FROM invoice_line l WHERE l.invoice_id = i.id))
       AND EXISTS (
           SELECT FROM invoiced_period p
             JOIN invoice_line l ON l.invoice_id = p.invoice_id AND l.subscription_id = p.subscription_id
                                AND l.metric_key = e.metric_key
            WHERE p.invoice_id = i.id AND NOT p.voided
              AND e."timestamp" >= p.period_start AND e."timestamp" < p.period_end
              AND NOT EXISTS (
                  SELECT FROM invoiced_period q
                    JOIN invoice j ON j.id = q.invoice_id
                   WHERE q.subscription_id = p.subscription_id AND NOT q.voided AND pg_visible_in_snapshot(b.xid, j.watermark)
                     AND e."timestamp" >= q.rated_from AND e."timestamp" < q.period_end))
     GROUP BY e.metric_key
     ORDER BY e.metric_key"""


@dataclass(frozen=True, slots=True)
class LateUsage:
    """Events of an invoiced period that no invoice has seen. ``value`` is the sum of their values."""

    metric_key: str
    events: int
    value: Decimal


async def late(tx: Tx, invoice_id: str) -> list[LateUsage]:
    """What came too late for an invoice, by metric."""
    return [LateUsage(*row) for row in await (await tx.execute(LATE, {"id": invoice_id})).fetchall()]


# The same question for a metric and a period, over all invoices of a customer.
LATE_EVENTS: LiteralString = """
    SELECT count(*)
      FROM usage_event e
      JOIN ingest_batch b ON b.id = e.batch_id
     WHERE e.customer_id = %(customer_id)s AND e.metric_key = %(metric_key)s
       AND e."timestamp" >= %(start)s AND e."timestamp" < %(end)s
       AND EXISTS (
           SELECT FROM invoice i
             JOIN invoiced_period p ON p.invoice_id = i.id AND NOT p.voided
             JOIN invoice_line l ON l.invoice_id = i.id AND l.subscription_id = p.subscription_id
                                AND l.metric_key = e.metric_key
            WHERE i.customer_id = e.customer_id AND NOT pg_visible_in_snapshot(b.xid, i.watermark)
              AND e."timestamp" >= p.period_start AND e."timestamp" < p.period_end
              AND NOT EXISTS (
                  SELECT FROM invoiced_period q
                    JOIN invoice j ON j.id = q.invoice_id
                   WHERE q.subscription_id = p.subscription_id AND NOT q.voided AND pg_visible_in_snapshot(b.xid, j.watermark)
                     AND e."timestamp" >= q.rated_from AND e."timestamp" < q.period_end))"""


async def late_events(tx: Tx, customer_id: str, metric_key: str, start: datetime, end: datetime) -> int:
    """How many events of ``[start, end)`` came after their time was invoiced and are on no invoice."""
    values = {"customer_id": customer_id, "metric_key": metric_key, "start": start, "end": end}
    row = await (await tx.execute(LATE_EVENTS, values)).fetchone()
    return int(row[0]) if row else 0


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _with_lines(tx: Tx, rows: Sequence[tuple[Any, ...]]) -> list[StoredInvoice]:
    lines: dict[str, list[tuple[Any, ...]]] = {row[0]: [] for row in rows}
    for line in await (await tx.execute(LINES, {"ids": list(lines)})).fetchall():
        lines[line[0]].append(line)
    return [_stored(row, lines[row[0]]) for row in rows]


def _stored(row: tuple[Any, ...], lines: Sequence[tuple[Any, ...]]) -> StoredInvoice:
    currency = Asset.named(row[4])
    invoice = Invoice(
        id=InvoiceId(row[0]),
        customer_id=CustomerId(row[1]),
        kind=row[2],
        status=Status(row[3]),
        currency=currency,
        period=None if row[5] is None else Period(row[5], row[6]),
        lines=tuple(_line(currency, line) for line in lines),
        subtotal=Money(int(row[7]), currency),
        tax=Money(int(row[8]), currency),
        total=Money(int(row[9]), currency),
        calculation_id=row[10],
        number=row[11],
        issued_at=row[12],
        created_at=row[13],
    )
    return StoredInvoice(
        invoice, {line[1]: Period(line[11], line[12]) for line in lines if line[11] is not None}
    )


def _line(currency: Asset, row: tuple[Any, ...]) -> InvoiceLine:
    document = {
        "charge_id": row[3],
        "description": row[4],
        "pricing_model": row[5],
        "metric_key": row[6],
        "quantity": row[7],
        "exact_amount": row[8],
        "amount": int(row[9]),
        **row[10],
    }
    return InvoiceLine(row[1], row[2] and SubscriptionId(row[2]), line_from_document(currency, document))


def _line_values(invoice_id: str, line: InvoiceLine, period: Period | None) -> dict[str, Any]:
    document = line_document(line.rated)
    return {
        "invoice_id": invoice_id,
        "line": line.line,
        "subscription_id": line.subscription_id,
        "charge_id": document["charge_id"],
        "description": document["description"],
        "pricing_model": document["pricing_model"],
        "metric_key": document["metric_key"],
        "quantity": line.rated.quantity,
        "exact_amount": line.rated.exact_amount,
        "amount": line.amount.units,
        "detail": Jsonb({"tier_breakdown": document["tier_breakdown"], "steps": document["steps"]}),
        "start": period and period.start,
        "end": period and period.end,
    }
