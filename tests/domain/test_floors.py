"""What the gateway may import from the domain brings no prices and no invoices with it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "room", ["access", "catalog", "customer", "ledger", "limits", "payment", "subscription", "usage"]
)
def test_a_room_the_gateway_may_enter_has_no_door_to_rating(room: str) -> None:
    program = f"import sys, farebox.domain.{room}; print(*(m for m in sys.modules if m.startswith('farebox.domain')))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert f"farebox.domain.{room}" in loaded
    assert not {"farebox.domain.rating", "farebox.domain.invoice"} & set(loaded)
