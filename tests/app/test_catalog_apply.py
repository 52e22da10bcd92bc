"""Applying a farebox.yaml: idempotent, whole or not at all, and heard by running roles."""

from __future__ import annotations

import asyncio

import pytest

from farebox.app.catalog import CatalogFile, Change
from farebox.app.documents import read_catalog
from farebox.app.plans import Plans
from farebox.base.errors import Refused
from farebox.domain.access import GatewayCatalog
from farebox.store import gateway_catalog
from farebox.store.changes import Listener
from farebox.store.pool import Database
from tests.app.test_catalog_documents import SANDBOX, SHOP


@pytest.fixture
def file(database: Database) -> CatalogFile:
    return CatalogFile(database, SANDBOX)


async def test_the_first_application_creates_everything(file: CatalogFile):
    applied = await file.apply("ada", SHOP)
    assert applied.version == 1
    assert {(c.kind, c.id): c.what for c in applied.changes} == {
        ("upstream", "weather"): "created",
        ("upstream", "plain"): "created",
        ("route", "forecast"): "created",
        ("route", "rest"): "created",
        ("server", "server"): "created",
        ("metric", "api_calls"): "created",
        ("metric", "people"): "created",
        ("plan", "starter"): "created",
        ("plan", "volume"): "created",
    }
    expected = read_catalog(SHOP, SANDBOX).gateway
    served = await file.read()
    assert (served.upstreams, served.routes, served.assets, served.server) == (
        expected.upstreams, expected.routes, expected.assets, expected.server,
    )  # fmt: skip


async def test_the_second_application_changes_nothing(file: CatalogFile, database: Database):
    await file.apply("ada", SHOP)
    again = await file.apply("ada", SHOP)
    assert not again.changed
    assert again.lines() == ()
    assert again.version == 1
    async with database.connection() as tx:
        row = await (await tx.execute("SELECT count(*) FROM price_plan_version")).fetchone()
        applications = await (
            await tx.execute("SELECT count(*) FROM audit_entry WHERE action = 'catalog.apply'")
        ).fetchone()
    assert row == (2,)
    assert applications == (1,)


async def test_what_changed_is_told_in_detail(file: CatalogFile):
    await file.apply("ada", SHOP)
    changed = (
        SHOP.replace('"0.001 USDC"', '"0.002 USDC"')
        .replace("amount: 49", "amount: 59")
        .replace("1500ms", "5s")
    )
    changed = changed.replace("  - id: rest", "  - id: everything")
    applied = await file.apply("ada", changed)
    assert applied.version == 2
    changes = {(c.kind, c.id): c for c in applied.changes if c.what != "unchanged"}
    assert changes["route", "forecast"] == Change(
        "route", "forecast", "changed", ("fares.exact.price: '0.001 USDC' → '0.002 USDC'",)
    )
    assert changes["upstream", "weather"].details == ("timeout: '1500ms' → '5s'",)
    assert changes["route", "everything"].what == "created"
    assert changes["route", "rest"].what == "removed"
    assert changes["plan", "starter"] == Change("plan", "starter", "changed", ("version 2",))
    assert len(changes) == 5


async def test_routes_that_changed_places_are_a_change(file: CatalogFile):
    head, forecast_and_rest = SHOP.split("  - id: forecast")
    forecast, rest = forecast_and_rest.split("  - id: rest")
    rest, tail = rest.split("metrics:")
    await file.apply("ada", SHOP)
    applied = await file.apply("ada", f"{head}  - id: rest{rest}  - id: forecast{forecast}metrics:{tail}")
    assert {c.id for c in applied.changes if c.what == "changed"} == {"forecast", "rest"}
    assert [r.id for r in (await file.read()).routes] == ["rest", "forecast"]


async def test_a_diff_says_the_same_and_does_nothing(file: CatalogFile):
    expected = await file.diff(SHOP)
    assert expected.version is None
    assert (await file.read()) == GatewayCatalog(version=0)
    applied = await file.apply("ada", SHOP)
    assert applied.changes == expected.changes


@pytest.mark.parametrize(
    ("old", "new", "path", "code"),
    [
        ("upstream: weather", "upstream: nowhere", "routes[0].upstream", "UPSTREAM_UNKNOWN"),
        ("aggregation_type: sum", "aggregation_type: max", "metrics[0].aggregation", "METRIC_FIXED"),
        ("amount: 49", "amount: -49", "plans[0].charges[0].properties.amount", "AMOUNT_NEGATIVE"),
        ("metric_key: api_calls, limit: 10000", "metric_key: people, limit: 10000", "plans[0].entitlements.api_calls.metric_key", "LIMIT_METRIC_UNSUPPORTED"),
    ],
)  # fmt: skip
async def test_a_bad_file_changes_nothing(file: CatalogFile, old: str, new: str, path: str, code: str):
    await file.apply("ada", SHOP)
    before = await file.export()
    bad = (
        SHOP.replace(old, new)
        .replace("http://127.0.0.1:9000/", "http://127.0.0.1:9999/")
        .replace("name: Starter", "name: Other")
    )
    with pytest.raises(Refused) as caught:
        await file.apply("ada", bad)
    assert [(r.field, r.code) for r in caught.value.reasons] == [(path, code)]
    assert await file.export() == before
    assert (await file.read()).version == 1


async def test_what_was_exported_applies_back_to_the_same(file: CatalogFile):
    await file.apply("ada", SHOP)
    text = await file.export()
    again = await file.apply("ada", text)
    assert again.lines() == ()
    assert await file.export() == text


async def test_an_export_names_every_metric_that_it_needs(file: CatalogFile, database: Database):
    await file.apply(
        "ada",
        "metrics: [{key: calls, name: Calls, aggregation: sum}, {key: gone, name: Gone, aggregation: sum}]\n"
        "plans: [{id: p, name: P, currency: USD, billing_period: monthly, "
        "entitlements: {calls: {type: limit, metric_key: calls, limit: 5}}}]",
    )
    for key in ("calls", "gone"):
        await Plans(database).deactivate_metric("ada", key)

    exported = read_catalog(await file.export(), SANDBOX)  # as a database that knows none of it would

    assert [m.key for m in exported.metrics] == ["calls"]


async def test_a_file_without_gateway_sections_leaves_the_gateway_alone(file: CatalogFile):
    await file.apply("ada", SHOP)
    applied = await file.apply("ada", "metrics: [{key: extra, name: Extra, aggregation: count}]")
    assert applied.lines() == ("metric extra: created",)
    assert len((await file.read()).routes) == 2
    emptied = await file.apply("ada", "routes: []")
    assert [c.what for c in emptied.changes if c.kind == "route"] == ["removed", "removed"]


async def test_metrics_that_exist_already_may_be_referred_to(file: CatalogFile):
    await file.apply("ada", "metrics: [{key: known, name: Known, aggregation: sum}]")
    await file.apply(
        "ada",
        "upstreams: {a: {url: http://a}}\nroutes: [{id: r, match: {path: /}, upstream: a, metric: known, fares: {account: {}}}]",
    )
    assert (await file.read()).routes[0].metric == "known"


async def test_applications_at_once_come_one_after_the_other(file: CatalogFile, database: Database):
    files = [SHOP.replace("0.001", f"0.00{n}") for n in range(1, 7)]
    await asyncio.gather(*(file.apply("ada", text) for text in files))
    async with database.connection() as tx:
        latest = await gateway_catalog.latest(tx)
    assert latest.version >= 6
    applied = await file.apply("ada", files[0])
    assert {c.what for c in applied.changes if c.kind == "plan"} == {"unchanged"}


async def test_running_roles_hear_of_a_new_version(file: CatalogFile, database_url: str):
    heard: list[tuple[str, str]] = []
    listener = Listener(database_url, lambda kind, changed: heard.append((kind, changed)), lambda: None)
    await listener.start()
    await file.apply("ada", SHOP)
    await file.apply("ada", SHOP)
    for _ in range(100):
        if heard:
            break
        await asyncio.sleep(0.02)
    await listener.close()
    assert heard == [("catalog", "1")]
