"""``farebox invoice preview|issue|show``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farebox.base.money import Asset, Money
from farebox.cli.control import control
from farebox.cli.printing import print_facts, print_json, print_table


def preview(
    customer_id: str, period_start: str, period_end: str, data: Path | None, *, as_json: bool
) -> None:
    """What the usage of a period comes to; nothing is issued."""
    body = {"customer_id": customer_id, "period_start": period_start, "period_end": period_end}
    with control(data) as api:
        _print(api.post("/pricing/calculate", body), as_json)


def issue(customer_id: str, cutoff_date: str, data: Path | None, *, as_json: bool) -> None:
    """Issue one invoice."""
    with control(data) as api:
        _print(api.post("/invoices", {"customer_id": customer_id, "cutoff_date": cutoff_date}), as_json)


def show(invoice_id: str, data: Path | None, *, as_json: bool) -> None:
    """One invoice with its lines."""
    with control(data) as api:
        _print(api.get(f"/invoices/{invoice_id}"), as_json)


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    asset = Asset.named(document["currency"])
    head = ("number", "id", "calculation_id", "status", "customer_id", "period_start", "period_end")
    print_facts({name: document[name] for name in head if document.get(name)})
    rows = [
        {
            "line": line["description"],
            "from": line["period_start"],
            "to": line["period_end"],
            "quantity": line["quantity"],
            "amount": f"{Money(int(line['amount']), asset).major:f}",
        }
        for line in document["line_items"]
    ]
    print_table(rows, ("line", "from", "to", "quantity", "amount"), "no lines")
    print(f"total  {Money(int(document['total_amount']), asset)}")
