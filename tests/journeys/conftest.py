"""Journeys: everything real, on loopback, through the command an operator types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.house import House, Upstream, counting_upstream, farebox_up


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    with counting_upstream(tmp_path) as running:
        yield running


@pytest.fixture
def house(tmp_path: Path, upstream: Upstream) -> Iterator[House]:
    """One house with three gateway processes."""
    with farebox_up(tmp_path / "house", upstream, gateways=3) as running:
        yield running
