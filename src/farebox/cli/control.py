"""Commands that speak with the control API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from farebox.base.errors import Unavailable
from farebox.cli.installation import control_of
from farebox.client import Farebox


@contextmanager
def control(data: Path | None) -> Iterator[Farebox]:
    """A client of this installation's control API. An API that does not answer is ``Unavailable``."""
    url, key = control_of(data)
    with Farebox(url, key) as farebox:
        try:
            yield farebox
        except httpx.TransportError as error:
            raise Unavailable(
                f"the control API at {url} does not answer: {str(error) or type(error).__name__}"
            ) from None
