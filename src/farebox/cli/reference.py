"""``farebox version``, ``openapi`` and ``bench``."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from farebox import __version__
from farebox.base.errors import refuse
from farebox.cli.printing import print_json


def version(*, as_json: bool) -> None:
    """The version, with ``--json`` also what it runs on."""
    if as_json:
        print_json(
            {"version": __version__, "python": platform.python_version(), "platform": platform.platform()}
        )
    else:
        print(f"farebox {__version__}")


def openapi() -> None:
    """The control API's OpenAPI 3.1 document; the same one that a running API serves at ``/openapi.json``."""
    from farebox.api.application import UseCases, resources
    from farebox.api.openapi import document

    # The document is made of shapes; no use case is called for it.
    cases = UseCases(**dict.fromkeys((f.name for f in fields(UseCases)), cast(Any, None)))
    print_json(document(resources(cases)))


def bench(name: str | None, arguments: list[str]) -> None:
    """Run ``bench/<name>.py`` of a checkout; without a name list them. ``all`` runs one after the other."""
    directory = Path(__file__).resolve().parents[3] / "bench"
    scripts = {p.stem: p for p in sorted(directory.glob("*.py")) if not p.stem.startswith("_")}
    runnable = {stem: p for stem, p in scripts.items() if '__name__ == "__main__"' in p.read_text()}
    if not runnable:
        raise refuse(
            "NO_BENCHMARKS",
            "the benchmarks are in a checkout of the repository, not in the installed package",
        )
    if name is None:
        print("\n".join(runnable))
        return
    chosen = list(runnable.values()) if name == "all" else [runnable[name]] if name in runnable else []
    if not chosen:
        raise refuse("BENCHMARK_UNKNOWN", f"there is no benchmark {name!r}: {', '.join(runnable)} or all")
    for script in chosen:
        done = subprocess.run((sys.executable, str(script), *arguments), check=False)
        if done.returncode != 0:
            raise refuse("BENCHMARK_FAILED", f"{script.stem} ended with {done.returncode}")
