"""``farebox doctor``: what is wrong with this installation, and what to do next."""

from __future__ import annotations

import asyncio
from pathlib import Path

import typer

from farebox.cli.installation import config_of
from farebox.cli.printing import print_json, print_table
from farebox.wiring import checkup


def examine(data: Path | None, *, as_json: bool) -> None:
    """Print every check; exit code 1 when one of them found a problem."""
    config = config_of(data)
    findings = asyncio.run(checkup.examine(config, checkup.spool_directory_of(config)))
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print_json(
            {
                "healthy": healthy,
                "checks": [
                    {
                        "check": finding.check,
                        "ok": finding.ok,
                        "said": finding.said,
                        "remedy": finding.remedy or None,
                        "details": list(finding.details),
                    }
                    for finding in findings
                ],
            }
        )
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'PROBLEM'}  {finding.check}: {finding.said}")
            if finding.details and not finding.ok:
                print_table(finding.details, list(finding.details[0]), "")
            if finding.remedy:
                print(f"         → {finding.remedy}")
    if not healthy:
        raise typer.Exit(1)


def write_off(process_id: str, data: Path | None, *, as_json: bool) -> None:
    """Count what a lost process held as spent, for good."""
    config = config_of(data)
    closed = asyncio.run(checkup.write_off(config, process_id, checkup.spool_directory_of(config)))
    if as_json:
        print_json({"process": process_id, "slices_closed": closed})
    else:
        print(f"{process_id}: {closed} slices of limits closed; what they held of amounts counts as spent")
