"""``farebox apply``, ``diff`` and ``export``: the shop as one file."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from farebox.app.catalog import Applied, CatalogFile
from farebox.cli.installation import config_of
from farebox.cli.printing import print_json
from farebox.store.pool import Database
from farebox.wiring.shop import catalog_file
from farebox.wiring.shop_file import read_text

ACTOR = "farebox apply"

T = TypeVar("T")


def apply(file: Path, data: Path | None, *, as_json: bool) -> None:
    """Apply the file; running gateways pick it up by themselves."""
    text = _text(file)
    _print(_with_catalog(data, lambda catalog: catalog.apply(ACTOR, text)), "nothing to change", as_json)


def diff(file: Path, data: Path | None, *, as_json: bool) -> None:
    """Say what ``apply`` would change, or refuse what it would refuse."""
    text = _text(file)
    _print(_with_catalog(data, lambda catalog: catalog.diff(text)), "no difference", as_json)


def export(data: Path | None) -> None:
    """Write the shop as YAML."""
    sys.stdout.write(_with_catalog(data, lambda catalog: catalog.export()))


def _text(file: Path) -> str:
    return sys.stdin.read() if str(file) == "-" else read_text(file)


def _with_catalog(data: Path | None, work: Callable[[CatalogFile], Awaitable[T]]) -> T:
    config = config_of(data)

    async def run() -> T:
        async with await Database.open(config.database_url, name="cli", size_max=2) as database:
            return await work(catalog_file(config, database))

    return asyncio.run(run())


def _print(applied: Applied, nothing: str, as_json: bool) -> None:
    if as_json:
        changes = [
            {"kind": c.kind, "id": c.id, "what": c.what, "details": c.details} for c in applied.changes
        ]
        warnings = [{"code": w.code, "field": w.field, "message": w.message} for w in applied.warnings]
        print_json(
            {"version": applied.version, "changed": applied.changed, "changes": changes, "warnings": warnings}
        )
        return
    for line in applied.lines():
        print(line)
    if not applied.changed:
        print(nothing)
    for warning in applied.warnings:
        print(f"note: {warning.field}: {warning.message}", file=sys.stderr)
