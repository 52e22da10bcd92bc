"""A gateway process may open as many connections as its settings say, or says that it may not."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
from dataclasses import replace
from farebox.gateway.settings import GatewaySettings
from farebox.wiring.descriptors import make_room

resource.setrlimit(resource.RLIMIT_NOFILE, (300, 900))
few = replace(GatewaySettings(), connections_max={clients}, upstream_connections_max=100)
print(make_room(few, [few, few]), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def said(clients: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{clients}", str(clients))],
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout


def test_a_gateway_takes_all_the_descriptors_it_may_have():
    assert said(600).splitlines() == ["900 (900, 900)"]


def test_too_few_descriptors_for_its_connections_are_said_once():
    warning, outcome = said(800).splitlines()

    assert "descriptors_too_few" in warning
    assert "wanted" in warning
    assert outcome == "900 (900, 900)"
