from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edges.edge import EDGES, SECRET, Edge, Upstream, an_edge, an_upstream, python_with_grpc
from tests.journeys import house as journeys
from tests.journeys.house import House, farebox_up
from tests.tools import tool

SHOP = """
upstreams:
  recording: {{url: "{upstream}"}}
server: {{trusted_proxies: ["127.0.0.1/32"]}}
routes:
  - id: free
    match: {{path: "/free/{{*rest}}"}}
    upstream: recording
    forward_auth: true
    fares: {{free: {{}}}}
  - id: paid
    match: {{path: "/paid/{{*rest}}"}}
    upstream: recording
    metric: api_calls
    forward_auth: true
    rewrite: {{set_headers: {{X-Plan: "{{plan}}"}}}}
    fares:
      exact: {{price: "0.001 USDC"}}
      passes: [{{id: seven, name: "Seven calls", price: "0.01 USDC", duration: 1h, limits: {{calls: 7}}}}]
      account: {{}}
  - id: forecasts
    match: {{path: "/weather.v1.Forecasts/{{method}}", methods: [POST]}}
    upstream: recording
    metric: api_calls
    forward_auth: true
    fares: {{account: {{}}}}
  - id: whole
    match: {{path: "/whole/{{*rest}}"}}
    upstream: recording
    metric: api_calls
    fares: {{account: {{}}}}
metrics:
  - {{key: api_calls, name: "API calls", aggregation: sum}}
plans:
  - id: starter
    name: Starter
    currency: USD
    billing_period: monthly
    charges:
      - {{metric_key: api_calls, pricing_model: per_unit, properties: {{unit_price: "0.01"}}}}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("nginx", "caddy", "envoy", "curl"):
        tool(name)
    return tmp_path_factory.mktemp("edges")


@pytest.fixture(scope="module")
def upstream(workshop: Path) -> Iterator[Upstream]:
    with an_upstream("recording_upstream.py", workshop / "upstream.log") as running:
        yield running


@pytest.fixture(scope="module")
def grpc_upstream(workshop: Path) -> Iterator[Upstream]:
    with an_upstream("grpc_upstream.py", workshop / "grpc.log", python_with_grpc()) as running:
        yield running


@pytest.fixture(scope="module")
def house(workshop: Path, upstream: Upstream) -> Iterator[House]:
    """A house with two gateway processes and forward-auth."""
    sold = journeys.Upstream(upstream.url, upstream.log)
    with farebox_up(
        workshop / "house",
        sold,
        gateways=2,
        shop=SHOP,
        FAREBOX_AUTHORIZE_PORT="0",
        FAREBOX_EDGE_SECRET=SECRET,
        FAREBOX_BUDGET_BAD_CREDENTIAL_RPM="0",
        FAREBOX_BUDGET_UNPAID_RPM="0",
    ) as running:
        yield running


@pytest.fixture(scope="module", params=sorted(EDGES))
def edge(
    request: pytest.FixtureRequest, workshop: Path, house: House, upstream: Upstream, grpc_upstream: Upstream
) -> Iterator[Edge]:
    """Each of the edges, one after the other."""
    name: str = request.param
    with an_edge(name, house, upstream, grpc_upstream, workshop / name) as running:
        yield running
