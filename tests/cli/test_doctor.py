"""``farebox doctor``: each thing that can be wrong, made wrong, is found, named and given a remedy."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from farebox.base.errors import Refused
from farebox.config import Config
from farebox.gateway.spool import Spool
from farebox.store import limits, processes
from farebox.store.pool import Database
from farebox.wiring import checkup
from tests.app.gate import a_customer
from tests.cli.test_commands import farebox, refused
from tests.wire import a_wire

KEYS = {"FAREBOX_MODE": "sandbox", "FAREBOX_MASTER_KEY": "0123456789abcdef0123456789abcdef"}


def doctor(url: str, directory: Path, *arguments: str, **settings: str) -> Any:
    return farebox(
        "doctor",
        *arguments,
        "--data",
        str(directory),
        cwd=directory,
        FAREBOX_DATABASE_URL=url,
        **KEYS,
        **settings,
    )


async def found(url: str, spool: Path, **settings: str) -> dict[str, checkup.Finding]:
    config = Config.parse({"FAREBOX_DATABASE_URL": url, **KEYS, **settings})
    return {finding.check: finding for finding in await checkup.examine(config, spool)}


async def a_lost_gateway(database: Database, host: str = "far-away", process_id: str = "gw_lost") -> None:
    """A host that burned down: its gateway held eight of a hundred calls and had said that it used three."""
    await a_customer(database, limit=100)
    async with database.transaction() as tx:
        await processes.register(tx, process_id, "gateway", host, 4711)
        await limits.take(tx, "quota:acme:api_calls", process_id, wanted=8, needed=0, used=0, ttl_s=60)
        await tx.execute("UPDATE lease SET used = 3")
        await tx.execute("UPDATE process SET heartbeat_at = now() - interval '1 hour'")


async def row(database: Database, statement: str) -> tuple[Any, ...]:
    async with database.connection() as tx:
        one = await (await tx.execute(statement)).fetchone()  # type: ignore[arg-type]
    assert one is not None
    return tuple(one)


def test_a_healthy_house_is_found_healthy(database_url: str, tmp_path: Path) -> None:
    said = doctor(database_url, tmp_path)
    assert said.returncode == 0, said.stdout
    assert "PROBLEM" not in said.stdout

    document = json.loads(doctor(database_url, tmp_path, "--json").stdout)
    assert document["healthy"] is True
    assert [check["check"] for check in document["checks"]] == [
        "database", "migrations", "variables", "keys", "disk", "spool",
        "clocks", "change notices", "shipping", "spool files", "stranded", "jobs",
    ]  # fmt: skip


def test_a_misspelt_variable_and_an_absent_database_are_named_with_a_remedy(tmp_path: Path) -> None:
    said = doctor("postgresql://nobody@127.0.0.1:1/none", tmp_path, FAREBOX_GATEWAY_PROT="8402")

    assert said.returncode == 1
    assert "PROBLEM  database: unreachable" in said.stdout
    assert "FAREBOX_GATEWAY_PROT" in said.stdout
    assert "→ start PostgreSQL" in said.stdout


def test_a_database_that_was_never_migrated_is_named_with_a_remedy(
    empty_database_url: str, tmp_path: Path
) -> None:
    said = doctor(empty_database_url, tmp_path)

    assert said.returncode == 1
    assert "run `farebox migrate`" in said.stdout


async def test_slices_of_a_lost_host_are_listed_and_written_off_on_demand(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    await a_lost_gateway(database)

    told = await asyncio.to_thread(doctor, database_url, tmp_path, "--json")
    assert told.returncode == 1
    [stranded] = [c for c in json.loads(told.stdout)["checks"] if not c["ok"]]
    assert stranded["check"] == "stranded"
    assert "--write-off" in stranded["remedy"]
    assert stranded["details"] == [
        {"process": "gw_lost", "host": "far-away", "silent_s": stranded["details"][0]["silent_s"],
         "limit": "quota:acme:api_calls", "of": "acme", "units": 6, "unspent_units": 3}
    ]  # fmt: skip

    await asyncio.to_thread(doctor, database_url, tmp_path, "--write-off", "gw_lost")
    assert await row(database, "SELECT spent FROM limit_counter") == (6,), "it counts as spent"
    assert await row(database, "SELECT closed_at IS NOT NULL FROM lease") == (True,)
    assert (await found(database_url, tmp_path / "spool"))["stranded"].ok
    again = await asyncio.to_thread(doctor, database_url, tmp_path, "--write-off", "gw_lost")
    assert "is settled" in refused(again)


async def test_what_may_still_live_or_can_be_settled_exactly_is_not_written_off(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    await a_lost_gateway(database, socket.gethostname())
    spool = Spool(tmp_path / "spool", "gw_lost")
    config = Config.parse({"FAREBOX_DATABASE_URL": database_url, **KEYS})
    for process_id, why in (("gw_lost", "SPOOL_HERE"), ("gw_unheard_of", "PROCESS_UNKNOWN")):
        with pytest.raises(Refused) as refusal:
            await checkup.write_off(config, process_id, tmp_path / "spool")
        assert refusal.value.reason.code == why
    spool.close()

    findings = await found(database_url, tmp_path / "spool")
    assert "its shipper" in findings["spool files"].remedy
    assert findings["stranded"].ok, "its spool is here: nothing is lost"

    await row(database, "UPDATE process SET heartbeat_at = now() RETURNING id")
    with pytest.raises(Refused, match="may still serve"):
        await checkup.write_off(config, "gw_lost", tmp_path / "elsewhere")


async def test_a_way_to_the_database_that_carries_no_notices_is_found(
    database_url: str, tmp_path: Path
) -> None:
    """As a transaction pooler: the one who listens is not the one who is told."""

    def swallow(sent: bytes) -> bytes:
        return sent.replace(b"LISTEN farebox_doctor_", b"LISTEN nothing_of_it__")

    async with a_wire(database_url, swallow) as wire:
        findings = await found(wire.url, tmp_path)
        assert "FAREBOX_DATABASE_DIRECT_URL" in findings["change notices"].remedy

        findings = await found(wire.url, tmp_path, FAREBOX_DATABASE_DIRECT_URL=database_url)
        assert findings["change notices"].ok


async def test_a_nearly_full_spool_dead_jobs_and_a_shipper_that_lags_are_found(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "gw_x.000001.spool").write_bytes(b"x" * 900_000)
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO job (kind, key, status) VALUES ('mail', '1', 'dead')")
        await processes.register(tx, "gw_slow", "gateway", "here", 1)
        await tx.execute("UPDATE process SET shipped_to = now() - interval '10 minutes'")

    findings = await found(database_url, tmp_path, FAREBOX_SPOOL_BYTES_MAX="1MB")

    assert {name for name, finding in findings.items() if not finding.ok} == {"spool", "shipping", "jobs"}
    assert "gw_slow" in findings["shipping"].said
    assert findings["jobs"].said == "given up: 1 mail"
