"""``farebox migrate``."""

from __future__ import annotations

from pathlib import Path

from farebox.base.errors import Reason, Refused
from farebox.cli.installation import config_of
from farebox.cli.printing import print_json
from farebox.store import migrate as migrations


def migrate(*, pre: bool, post: bool, check: bool, sandbox: bool, data: Path | None, as_json: bool) -> None:
    """Apply what is missing, or with ``check`` only look (``Refused`` when a migration that this version needs is missing)."""
    if pre and post:
        raise Refused(Reason("USAGE", "--pre and --post exclude each other; neither applies everything"))
    config = config_of(data)
    mode: migrations.Mode = "sandbox" if sandbox else config.mode
    if check:
        report = migrations.check(config.database_direct_url, mode)
    else:
        phase: migrations.Phase | None = "pre" if pre else "post" if post else None
        report = migrations.migrate(config.database_direct_url, mode, phase)
    if as_json:
        print_json({"mode": report.mode, "applied": report.applied, "pending": report.pending})
        return
    for name in report.applied:
        print(f"applied {name}")
    for name in report.pending:
        print(f"pending {name}")
    if not report.applied and not report.pending:
        print(f"up to date ({report.mode})")
