"""What gateway processes count is summed on the ops port, also after one of them died."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from farebox.wiring.ops import Metrics
from farebox.wiring.supervisor import ChildState

ROOT = Path(__file__).parents[2]

PROCESS = """
import os
from farebox.gateway.counters import Counters
from farebox.gateway.health import TargetHealth
from farebox.gateway.settings import GatewaySettings
from farebox.wiring.gateway_metrics import GatewayMetrics
counters = Counters()
metrics = GatewayMetrics()
for _ in range(3):
    counters.call("forecast", "account", 200, 10, 100, 0.002)
    counters.refusal("credential_unknown")
    metrics.flush(counters, 4096, 1, 2)
counters.connections_open = 5
counters.call("forecast", "exact", 502, 0, 0, 99.0)
metrics.flush(counters, 4096, 1, 2)
metrics.flush(counters, 4096, 1, 2)
one, other, gone = (TargetHealth("weather", f"http://{name}", GatewaySettings()) for name in ("one", "other", "gone"))
if os.environ["ILL"] == "yes":
    for _ in range(3):
        other.probed(False, "it said so", 2, 3)
metrics.flush(counters, 4096, 1, 2, [one, other, gone])
metrics.flush(counters, 4096, 1, 2, [one, other])
print(os.getpid())
"""


def test_counters_of_all_processes_are_summed(tmp_path: Path):
    directory = tmp_path / "metrics"
    Metrics.prepare(directory)
    metrics = Metrics(directory, lambda: [ChildState("gw0", "gateway", 7, True, 2)])
    pids = []
    for ill in ("yes", "no"):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory), "ILL": ill},
            capture_output=True,
            text=True,
            check=True,
        )
        pids.append(int(done.stdout.splitlines()[-1]))

    text = metrics.text().decode()

    assert 'farebox_gateway_requests_total{fare="account",route="forecast",status="2xx"} 6.0' in text
    assert 'farebox_gateway_refusals_total{code="credential_unknown"} 6.0' in text
    assert 'farebox_gateway_bytes_total{direction="down"} 600.0' in text
    assert 'farebox_gateway_call_seconds_bucket{le="0.0025"} 6.0' in text
    assert "farebox_gateway_call_seconds_count 8.0" in text
    assert "farebox_gateway_connections_open 10.0" in text
    assert "farebox_gateway_calls_in_flight 2.0" in text
    assert "farebox_spool_bytes 4096.0" in text, (
        "one directory a host: the processes' figures are not added up"
    )
    assert 'farebox_upstream_target_healthy{target="http://one",upstream="weather"} 1.0' in text
    assert 'farebox_upstream_target_healthy{target="http://other",upstream="weather"} 0.0' in text, (
        "one process does not call it: that is to be seen"
    )
    assert 'farebox_upstream_target_healthy{target="http://gone",upstream="weather"} NaN' in text
    assert 'farebox_process_ready{kind="gateway",process="gw0"} 1.0' in text
    assert 'farebox_process_restarts_total{kind="gateway",process="gw0"} 2.0' in text

    metrics.bury(pids[0])
    text = metrics.text().decode()
    assert 'farebox_upstream_target_healthy{target="http://other",upstream="weather"} 1.0' in text
    assert "farebox_gateway_connections_open 5.0" in text
    assert 'farebox_gateway_requests_total{fare="account",route="forecast",status="2xx"} 6.0' in text


def test_every_metric_is_in_the_operations_page():
    rooms = [
        path
        for room in ("wiring", "worker", "gateway")
        for path in (ROOT / "src" / "farebox" / room).glob("*.py")
    ]
    source = "".join(path.read_text() for path in rooms)
    page = (ROOT / "docs" / "operations.md").read_text()
    names = set(re.findall(r'"(farebox_[a-z_]+)"', source))
    documented = {name.removesuffix("_total") for name in re.findall(r"`(farebox_[a-z_]+)`", page)}
    assert names == documented
