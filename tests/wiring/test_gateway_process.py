"""One gateway process and one shipper, as the supervisor starts them: real processes, a real socket, a real database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from farebox.domain.access import AccountFare, GatewayCatalog, Match, Route, Upstream
from farebox.store import changes, gateway_catalog, installation
from farebox.store.pool import Database
from tests.app.gate import a_customer
from tests.journeys.house import counting_upstream

HEAVY = ("fastapi", "pydantic", "starlette", "httpx", "granian", "eth_account", "typer", "ruamel")
FORBIDDEN = (
    "farebox.domain.rating",
    "farebox.domain.invoice",
    "farebox.app.billing",
    "farebox.app.documents",
    "farebox.embedded",
)


@pytest.mark.parametrize(
    "module", ["farebox.wiring.gateway", "farebox.wiring.shipper", "farebox.wiring.gateway_metrics"]
)
def test_a_gateway_process_stays_light(module: str) -> None:
    program = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"

    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    )

    assert loaded & {*HEAVY, *FORBIDDEN} == set()


def environment(url: str, data: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FAREBOX_", "PROMETHEUS_"))}
    (data / "metrics").mkdir(exist_ok=True)
    return {
        **kept,
        "FAREBOX_MODE": "sandbox",
        "FAREBOX_DATABASE_URL": url,
        "FAREBOX_MASTER_KEY": "m" * 40,
        "FAREBOX_DATA": str(data),
        "PROMETHEUS_MULTIPROC_DIR": str(data / "metrics"),
    }


@contextmanager
def a_role(
    module: str, url: str, data: Path, *arguments: str, sockets: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a role and wait until it says that it is ready."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**environment(url, data), "FAREBOX_READY_FD": str(write_end)},
        pass_fds=(write_end, *sockets),
    )
    os.close(write_end)
    try:
        assert os.read(read_end, 100).startswith(b"ready"), "it ended before it was ready"
        yield process
    finally:
        os.close(read_end)
        process.kill()
        process.wait()


def a_gateway(url: str, data: Path, listening: socket.socket, name: str = "gw0") -> Any:
    fd = listening.fileno()
    return a_role(
        "farebox.wiring.gateway",
        url,
        data,
        "--fd",
        str(fd),
        "--name",
        name,
        "--spool",
        str(data / "spool"),
        sockets=(fd,),
    )


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


async def get(listening: socket.socket, path: str, key: str) -> tuple[int, dict[str, str]]:
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: shop.test\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    lines = head.decode().split("\r\n")
    return int(lines[0].split(" ")[1]), {
        k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])
    }


async def publish(database: Database, upstream_url: str, *routes: str) -> None:
    catalog = GatewayCatalog(
        0,
        (Upstream("counting", upstream_url),),
        tuple(
            Route(r, Match(f"/{r}"), "counting", metric="api_calls", account=AccountFare()) for r in routes
        ),
    )
    async with database.transaction() as tx:
        await gateway_catalog.append(tx, replace(catalog), "test")


async def one(database: Database, statement: str) -> tuple[Any, ...]:
    async with database.connection() as tx:
        row = await (await tx.execute(statement)).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return tuple(row)


async def test_a_life_of_a_gateway(
    database: Database, database_url: str, tmp_path: Path, listening: socket.socket
) -> None:
    key = await a_customer(database, limit=100)
    with counting_upstream(tmp_path) as upstream:
        await publish(database, upstream.url, "one")
        with (
            a_gateway(database_url, tmp_path, listening) as gateway,
            a_role(
                "farebox.wiring.shipper", database_url, tmp_path, "--spool", str(tmp_path / "spool")
            ) as shipper,
        ):
            status, headers = await get(listening, "/one", key)
            assert (status, headers["ratelimit-limit"], headers["ratelimit-remaining"]) == (200, "100", "99")
            request_id = headers["farebox-request-id"]
            assert (await get(listening, "/two", key))[0] == 404

            # The catalog is followed without a restart, and so is what happens to a key.
            await publish(database, upstream.url, "one", "two")
            while (await get(listening, "/two", key))[0] == 404:
                await asyncio.sleep(0.02)
            assert (await get(listening, "/two", key))[0] == 200

            # A second process starts beside the first one, on the same spool.
            with (
                socket.create_server(("127.0.0.1", 0)) as another,
                a_gateway(database_url, tmp_path, another, "gw1") as second,
            ):
                assert (await get(another, "/one", key))[0] == 200
                second.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(second.wait, 20) == 0

            gateway.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(gateway.wait, 20) == 0
            assert await one(database, "SELECT count(*), bool_and(stopped_at IS NOT NULL) FROM process") == (
                2,
                True,
            )
            assert await one(database, "SELECT bool_and(closed_at IS NOT NULL) FROM lease") == (True,)
            calls = len(upstream.calls())
            assert await one(database, "SELECT spent FROM limit_counter") == (calls,)

            shipper.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(shipper.wait, 20) == 0
            assert await one(database, "SELECT count(*), count(DISTINCT event_id) FROM usage_event") == (
                calls,
                calls,
            )
            assert await one(
                database,
                f"SELECT customer_id FROM usage_event WHERE properties->>'request_id' = '{request_id}'",
            ) == ("acme",)
            assert await one(database, "SELECT bool_and(settled_at IS NOT NULL) FROM process") == (True,)
    assert any((tmp_path / "metrics").iterdir())


async def test_a_killed_gateway_is_settled_by_the_shipper(
    database: Database, database_url: str, tmp_path: Path, listening: socket.socket
) -> None:
    key = await a_customer(database, limit=100)
    with counting_upstream(tmp_path) as upstream:
        await publish(database, upstream.url, "one")
        with a_gateway(database_url, tmp_path, listening) as gateway:
            for _ in range(5):
                assert (await get(listening, "/one", key))[0] == 200
            gateway.kill()
        with a_role("farebox.wiring.shipper", database_url, tmp_path, "--spool", str(tmp_path / "spool")):
            while not (await one(database, "SELECT settled_at IS NOT NULL FROM process"))[0]:
                await asyncio.sleep(0.02)

    assert await one(database, "SELECT spent FROM limit_counter") == (5,)
    assert await one(database, "SELECT count(*) FROM usage_event") == (5,)


async def test_calls_are_billed_in_the_period_that_the_test_clock_shows(
    database: Database, database_url: str, tmp_path: Path, listening: socket.socket
) -> None:
    key = await a_customer(database)
    spool = str(tmp_path / "spool")
    with counting_upstream(tmp_path) as upstream:
        await publish(database, upstream.url, "one")
        with (
            a_gateway(database_url, tmp_path, listening),
            a_role("farebox.wiring.shipper", database_url, tmp_path, "--spool", spool),
        ):
            async with database.transaction() as tx:
                await installation.move_business_date(tx, datetime(2031, 2, 1, 12, tzinfo=UTC))
                await changes.announce(tx, "clock", "business_date")
            newest: datetime | None = None
            while newest is None or newest.year < 2031:
                assert (await get(listening, "/one", key))[0] == 200
                await asyncio.sleep(0.1)
                newest = (await one(database, "SELECT max(timestamp) FROM usage_event"))[0]

    assert newest == datetime(2031, 2, 1, 12, tzinfo=UTC)


async def test_a_gateway_that_cannot_look_at_its_spool_lives_on(
    database: Database, database_url: str, tmp_path: Path, listening: socket.socket
) -> None:
    """Else it would be taken for dead while it serves, and others would take its payments over."""
    with a_gateway(database_url, tmp_path, listening):
        (tmp_path / "spool").rename(tmp_path / "elsewhere")
        for _ in range(3):
            await one(database, "UPDATE process SET heartbeat_at = now() - interval '1 hour' RETURNING id")
            async with asyncio.timeout(30):
                while not (
                    await one(database, "SELECT heartbeat_at > now() - interval '1 minute' FROM process")
                )[0]:
                    await asyncio.sleep(0.05)


async def test_a_gateway_refuses_a_database_of_the_other_mode(
    live_database_url: str, tmp_path: Path, listening: socket.socket
) -> None:
    fd = listening.fileno()
    ended = subprocess.run(
        [sys.executable, "-m", "farebox.wiring.gateway", "--fd", str(fd), "--spool", str(tmp_path / "spool")],
        env=environment(live_database_url, tmp_path), pass_fds=(fd,), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 1
    assert "the database is live" in ended.stderr
