"""A real PostgreSQL for the tests: one server a session, one database a test.

The server is the embedded one, or the one that FAREBOX_TEST_DATABASE_URL names (the URL of a role that may create
databases, on PostgreSQL 15 to 18). A migrated sandbox database is made once and cloned for every test that asks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from farebox.embedded import EmbeddedPostgres
from farebox.store.migrate import Mode, migrate

EXTERNAL_URL = "FAREBOX_TEST_DATABASE_URL"

#: A test's data needs no power cut insurance; everything else is as in production.
SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "300"}


class Server:
    """The session's server. Started by the process that runs pytest, and used from its xdist workers by ``admin_url``."""

    def __init__(self) -> None:
        self.admin_url = os.environ.get(EXTERNAL_URL, "")
        self.template = f"farebox_template_{secrets.token_hex(4)}"
        self._embedded: EmbeddedPostgres | None = None
        self._directory: Path | None = None
        self._started = False

    def start(self) -> None:
        """Start once; make the template."""
        if self._started:
            return
        self._started = True
        if not self.admin_url:
            sweep_directories()
            self._directory = fresh_directory()
            self._embedded = EmbeddedPostgres(self._directory, settings=SETTINGS)
            self.admin_url = self._embedded.start()
        url = create(self.admin_url, self.template)
        migrate(url, "sandbox")
        with psycopg.connect(self.admin_url, autocommit=True) as admin:
            # Nobody may connect to it any more, autovacuum included: a template in use cannot be cloned.
            admin.execute(
                sql.SQL("ALTER DATABASE {} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false").format(
                    sql.Identifier(self.template)
                )
            )

    def stop(self) -> None:
        """Leave nothing behind."""
        if not self._started:
            return
        self._started = False
        if self._embedded is not None:
            self._embedded.stop()
        else:
            with psycopg.connect(self.admin_url, autocommit=True) as admin:
                admin.execute(
                    sql.SQL("ALTER DATABASE {} WITH IS_TEMPLATE false").format(sql.Identifier(self.template))
                )
            drop(self.admin_url, self.template)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def create(admin_url: str, name: str, template: str | None = None) -> str:
    """Make a database, empty or a clone, and return its URL."""
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template is not None:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(statement)
    return with_name(admin_url, name)


def drop(admin_url: str, name: str) -> None:
    """Drop a database, whoever is still connected."""
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def with_name(url: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextlib.contextmanager
def a_database(admin_url: str, template: str | None = None) -> Iterator[str]:
    """A database that lasts as long as the block: a clone of the template, or an empty one."""
    name = f"farebox_test_{secrets.token_hex(6)}"
    url = create(admin_url, name, template)
    try:
        yield url
    finally:
        drop(admin_url, name)


@contextlib.contextmanager
def a_migrated_database(admin_url: str, mode: Mode) -> Iterator[str]:
    """A database of its own in either mode, migrated from nothing (0.2 s; clones of the sandbox template take 0.03)."""
    with a_database(admin_url) as url:
        migrate(url, mode)
        yield url


_IN_USE: list[IO[str]] = []


def fresh_directory() -> Path:
    """A directory for a server's data that an unprivileged user can reach (pytest's own are closed to all others)."""
    directory = Path(tempfile.mkdtemp(prefix="farebox-tests-"))
    directory.chmod(0o755)
    mark = open(directory / "in_use", "w")  # noqa: SIM115 - locked as long as this process lives
    fcntl.flock(mark, fcntl.LOCK_EX)
    _IN_USE.append(mark)
    return directory


def sweep_directories() -> None:
    """Remove what sessions that were killed left behind: an old directory whose maker is gone."""
    for mark in Path(tempfile.gettempdir()).glob("farebox-tests-*/in_use"):
        with contextlib.suppress(OSError), open(mark) as held:
            if time.time() - mark.stat().st_mtime > 600:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(mark.parent, ignore_errors=True)
