"""``farebox price``: what usage costs under a plan, by the same pure function that writes invoices. No database."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

from farebox.app.documents import Surroundings, catalog_from_values
from farebox.app.documents.yaml_text import read_yaml
from farebox.base.errors import Reason, Refused, refuse
from farebox.base.money import parse_decimal, plain
from farebox.cli.printing import print_json, print_table
from farebox.domain.catalog import PlanVersion
from farebox.domain.rating import Rating, line_document, rate
from farebox.wiring.shop_file import read_text


def price(file: Path, usage: list[str], plan_id: str | None, *, as_json: bool) -> None:
    """Rate ``metric=quantity`` under the file's plan (one plan, or a farebox.yaml with ``plans``)."""
    quantities = _quantities(usage)
    plan = _plan(read_yaml(read_text(file)), plan_id)
    unpriced = sorted(set(quantities) - {c.metric_key for c in plan.charges})
    if unpriced:
        raise refuse(
            "METRIC_NOT_PRICED", f"plan {plan.plan_id} has no charge for {', '.join(unpriced)}", "--usage"
        )
    rating = rate(plan.currency, plan.charges, quantities)
    if as_json:
        print_json(
            {
                "plan_id": plan.plan_id,
                "currency": plan.currency.code,
                "total_amount": rating.total.units,
                "line_items": [line_document(line) for line in rating.lines],
            }
        )
    else:
        _print(plan, rating)


def _print(plan: PlanVersion, rating: Rating) -> None:
    print(f"{plan.name} ({plan.plan_id}), {plan.currency.code}")
    rows = [
        {"line": line.description, "quantity": plain(line.quantity), "amount": f"{line.amount.major:f}"}
        for line in rating.lines
    ]
    print_table(rows, ("line", "quantity", "amount"), "no charges")
    for line in rating.lines:
        if line.steps:
            print(f"\n{line.description}:")
            for step in line.steps:
                print(f"  {step}")
    print(f"\ntotal  {rating.total}")


def _quantities(usage: list[str]) -> dict[str, Decimal]:
    found: dict[str, Decimal] = {}
    faults: list[Reason] = []
    for given in usage:
        metric, equals, number = given.partition("=")
        if not equals or not metric or metric in found:
            faults.append(
                Reason(
                    "USAGE_MALFORMED", f"{given[:80]!r}: write metric=quantity, each metric once", "--usage"
                )
            )
            continue
        try:
            found[metric] = parse_decimal(number, "--usage")
        except Refused as refused:
            faults += refused.reasons
    if faults:
        raise Refused(*faults)
    return found


def _plan(values: Any, plan_id: str | None) -> PlanVersion:
    plans = values.get("plans") if isinstance(values, dict) and "plans" in values else [values]
    metrics = values.get("metrics", []) if isinstance(values, dict) else []
    # A plan on its own names metrics that are defined elsewhere: they are taken as given.
    surroundings = Surroundings("live", metric_keys=frozenset(_metric_keys(plans)))
    catalog = catalog_from_values({"plans": plans, "metrics": metrics}, surroundings)
    chosen = [p for p in catalog.plans if plan_id in (None, p.plan_id)]
    if len(chosen) != 1:
        known = ", ".join(p.plan_id for p in catalog.plans) or "none"
        raise refuse("PLAN_UNKNOWN", f"name one of the file's plans ({known})", "--plan")
    return chosen[0]


def _metric_keys(values: Any) -> list[str]:
    if isinstance(values, dict):
        own = [values["metric_key"]] if isinstance(values.get("metric_key"), str) else []
        return own + [key for value in values.values() for key in _metric_keys(value)]
    if isinstance(values, list):
        return [key for value in values for key in _metric_keys(value)]
    return []
