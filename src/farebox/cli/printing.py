"""What commands print: a table for people or one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from farebox.base.money import Money, plain


def print_json(document: Any) -> None:
    """One document, indented, on standard output. Values that are not JSON are written as text."""
    json.dump(document, sys.stdout, indent=2, default=str, ensure_ascii=False)
    print()


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
    """Columns as wide as their content; ``empty`` is said when there are no rows."""
    if not rows:
        print(empty)
        return
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in ([column.upper() for column in columns], *cells):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {_cell(value)}")


def price_text(money: Money) -> str:
    """A price as one writes it: ``0.001 USDC``, without the zeros of the asset's last decimals."""
    return f"{plain(money.major)} {money.asset.code}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(v) for v in value)
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)
