"""Programs that tests run and that pip does not bring as packages of ours: install.sh does."""

from __future__ import annotations

import os
from pathlib import Path

TOOLS = Path(os.environ.get("FAREBOX_TEST_TOOLS") or Path(__file__).parents[2] / ".venv" / "tools")


def tool(name: str) -> str:
    """The path of a program; a test without it fails and says how to get it."""
    path = TOOLS / "bin" / name
    assert path.exists(), f"{path} is missing: run tests/tools/install.sh (or `make test`, which does)"
    return str(path)
