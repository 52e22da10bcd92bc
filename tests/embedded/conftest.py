"""A server of the test's own, to be stopped, killed and started again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.database import fresh_directory


@pytest.fixture
def data_dir() -> Iterator[Path]:
    directory = fresh_directory()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
