"""Paths that could be read in two ways are refused on their way in (domain/paths.py says which, and why)."""

from __future__ import annotations

from farebox.domain.paths import ambiguity
from farebox.gateway.problems import Fault


def check_path(path: bytes) -> None:
    """Raises ``Fault`` for a path that could be read in two ways."""
    found = ambiguity(path)
    if found is not None:
        raise Fault("request_malformed", found)
