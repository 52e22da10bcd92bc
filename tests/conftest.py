"""Fixtures that every room uses: a real database a test, cloned in a few hundredths of a second."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from farebox.store.pool import Database
from tests.database import Server, a_database, a_migrated_database

SERVER = pytest.StashKey[Server]()

# A busy machine is not a failed test: nothing here is judged by the clock.
settings.register_profile("farebox", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("farebox")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[SERVER] = Server()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Under xdist the controller owns the server, as it outlives every worker; the workers are told where it is."""
    server = node.config.stash[SERVER]
    server.start()
    node.workerinput["farebox_database"] = (server.admin_url, server.template)


def pytest_unconfigure(config: pytest.Config) -> None:
    server = config.stash.get(SERVER, None)
    if server is not None:
        server.stop()


@pytest.fixture(scope="session")
def database_server(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(URL of a role that may create databases, name of the migrated sandbox template)."""
    told = getattr(request.config, "workerinput", None)
    if told is not None:
        url, template = told["farebox_database"]
        return str(url), str(template)
    server = request.config.stash[SERVER]
    server.start()
    return server.admin_url, server.template


@pytest.fixture
def database_url(database_server: tuple[str, str]) -> Iterator[str]:
    """A fresh migrated sandbox database for this test alone."""
    admin_url, template = database_server
    with a_database(admin_url, template) as url:
        yield url


@pytest.fixture
def empty_database_url(database_server: tuple[str, str]) -> Iterator[str]:
    """A database with nothing in it."""
    with a_database(database_server[0]) as url:
        yield url


@pytest.fixture
def live_database_url(database_server: tuple[str, str]) -> Iterator[str]:
    """A fresh migrated live database for this test alone."""
    with a_migrated_database(database_server[0], "live") as url:
        yield url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open ``Database`` on ``database_url``."""
    opened = await Database.open(database_url, name="test")
    yield opened
    await opened.close()


@pytest.fixture
async def live_database(live_database_url: str) -> AsyncIterator[Database]:
    """An open ``Database`` on a live one."""
    opened = await Database.open(live_database_url, name="test")
    yield opened
    await opened.close()
