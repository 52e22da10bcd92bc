from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edges.edge import free_port
from tests.inapp.app_server import App, an_app, gateway_key
from tests.journeys.house import House, Upstream, farebox_up

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def a_house(directory: Path, shop: str, app_port: int) -> Iterator[House]:
    """``farebox up`` with a shop whose upstream is the app at ``app_port``, and a forward-auth listener."""
    at = "http://127.0.0.1:8000"
    assert at in shop
    escaped = shop.replace("{", "{{").replace("}", "}}").replace(at, "{upstream}")
    with farebox_up(
        directory,
        Upstream(f"http://127.0.0.1:{app_port}", directory / "unused.log"),
        shop=escaped,
        gateways=2,
        FAREBOX_AUTHORIZE_PORT="0",
        FAREBOX_EDGE_SECRET="0123456789" * 4,
        FAREBOX_BUDGET_UNPAID_RPM="0",
        FAREBOX_BUDGET_BAD_CREDENTIAL_RPM="0",
    ) as house:
        yield house


@pytest.fixture(scope="module", params=["fastapi", "litestar"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """Each of the examples as it is shipped, with its shop; only ports differ."""
    place, directory, port = EXAMPLES / request.param, tmp_path_factory.mktemp(request.param), free_port()
    with (
        a_house(directory / "house", (place / "farebox.yaml").read_text(), port) as house,
        an_app(place, port, house, directory / "app.log", FARE_KEY=gateway_key(house)) as app,
    ):
        yield app


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An app in two processes that tells what it heard of each call (telling_app/app.py)."""
    place, directory, port = (
        Path(__file__).parent / "telling_app",
        tmp_path_factory.mktemp("app"),
        free_port(),
    )
    with (
        a_house(directory / "house", (place / "farebox.yaml").read_text(), port) as house,
        an_app(place, port, house, directory / "app.log", 2, FARE_KEY=gateway_key(house)) as app,
    ):
        yield app
