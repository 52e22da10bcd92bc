"""Applying a farebox.yaml: all of it or nothing, any number of times, with a report of what changed.

Upstreams, routes, payments and server are the file's: what it no longer names is gone. (A file that has none of these
sections leaves them as they are.) Metrics and plans are only added to, as usage and subscriptions hold on to them: one
that is missing from the file stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from farebox.app.documents import Catalog, Surroundings, catalog_from_values, write_catalog
from farebox.app.documents.gateway import gateway_sections
from farebox.app.documents.yaml_text import read_yaml
from farebox.app.joining import joined
from farebox.app.plans import Plans
from farebox.app.ports.chain import Chain
from farebox.base.errors import Reason, Refused
from farebox.domain.access import GatewayCatalog
from farebox.domain.catalog import BooleanEntitlement, CustomEntitlement, LimitEntitlement, Metric
from farebox.store import audit, gateway_catalog, plans
from farebox.store.pool import Database, Tx

Kind = Literal["upstream", "route", "asset", "server", "metric", "plan"]
What = Literal["created", "changed", "unchanged", "removed"]

_ROWS: Final = 500
_GATEWAY_SECTIONS: Final = ("upstreams", "routes", "payments", "server")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing of the catalog and what became of it. ``details`` are lines such as ``fares.exact.price: "1 USDC" → "2 USDC"``."""

    kind: Kind
    id: str
    what: What
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" ({'; '.join(self.details)})" if self.details else ""
        return f"{self.kind} {self.id}: {self.what}{more}"


@dataclass(frozen=True, slots=True)
class Applied:
    """``version`` is the gateway catalog's after it (None from ``diff``); ``warnings`` hinder nothing."""

    version: int | None
    changes: tuple[Change, ...]
    warnings: tuple[Reason, ...]

    @property
    def changed(self) -> bool:
        return any(change.what != "unchanged" for change in self.changes)

    def lines(self) -> tuple[str, ...]:
        """What changed, one line each, for people; what did not is left out."""
        return tuple(str(change) for change in self.changes if change.what != "unchanged")


def surroundings_of(
    mode: Literal["live", "sandbox"],
    chains: Sequence[Chain],
    network: str | None = None,
    pay_to: str | None = None,
) -> Surroundings:
    """What files are read against: where the given chains settle. ``network`` and ``pay_to`` come from the environment.

    In the sandbox the chain's own account is paid where nobody is named.
    """
    recipients = {c.network: c.default_recipient for c in chains if c.default_recipient is not None}
    if network is not None and pay_to is not None:
        recipients = {network: pay_to}
    return Surroundings(
        mode=mode,
        networks=frozenset(c.network for c in chains),
        tokens=tuple(token for c in chains for token in c.tokens),
        pay_to=recipients,
    )


class CatalogFile:
    """Applies, compares and writes the catalog as one document."""

    def __init__(self, database: Database, surroundings: Surroundings) -> None:
        self._database = database
        self._plans = Plans(database)
        self._surroundings = surroundings

    async def apply(self, actor: str, text: str, within: Tx | None = None) -> Applied:
        """Make the catalog what the YAML says. ``Refused`` carries every fault with its path; then nothing has changed."""
        return await self.apply_values(actor, read_yaml(text), within)

    async def apply_values(self, actor: str, values: Any, within: Tx | None = None) -> Applied:
        """As ``apply``, from values that were read already (JSON)."""
        async with joined(self._database, within) as tx:
            return await self._apply(tx, actor, values)

    async def diff(self, text: str) -> Applied:
        """What ``apply`` would change or refuse."""
        return await self.diff_values(read_yaml(text))

    async def diff_values(self, values: Any) -> Applied:
        """As ``diff``. It is an application whose transaction is rolled back, so the two cannot disagree."""
        try:
            async with self._database.transaction() as tx:
                raise _OnlyLooking(await self._apply(tx, "diff", values))
        except _OnlyLooking as looked:
            return replace(looked.applied, version=None)

    async def export(self) -> str:
        """A farebox.yaml that applies back to the same catalog: the newest version of every plan that is open."""
        async with self._database.transaction() as tx:
            gateway = await gateway_catalog.latest(tx)
            metrics = await _all_metrics(tx)
            newest = await _all_plans(tx)
        open_plans = [stored.plan for stored in newest if stored.deprecated_at is None]
        limits = [e for p in open_plans for e in p.entitlements if isinstance(e, LimitEntitlement)]
        needed = {
            *(c.metric_key for p in open_plans for c in p.charges),
            *(limit.metric_key for limit in limits),
            *(r.metric for r in gateway.routes),
        }
        kept = [m for m in metrics if m.status == "active" or m.key in needed]
        return write_catalog(gateway, kept, open_plans, self._surroundings)

    async def read(self) -> GatewayCatalog:
        """What the gateways serve."""
        async with self._database.connection() as tx:
            return await gateway_catalog.latest(tx)

    async def _apply(self, tx: Tx, actor: str, values: Any) -> Applied:
        await gateway_catalog.lock(tx)
        before = await gateway_catalog.latest(tx)
        catalog = catalog_from_values(values, await self._what_is_known(tx))
        keeps_gateway = not isinstance(values, dict) or not any(s in values for s in _GATEWAY_SECTIONS)
        after = replace(catalog.gateway, version=before.version)
        changes: list[Change] = []
        if keeps_gateway:
            after = before
        else:
            changes += gateway_changes(before, after, self._surroundings)
        changes += await self._put_metrics_and_plans(tx, actor, catalog)
        if after != before:
            after = await gateway_catalog.append(tx, after, actor)
        if any(c.what != "unchanged" for c in changes):
            detail = {
                "version": after.version,
                "changes": [str(c) for c in changes if c.what != "unchanged"][:200],
            }
            await audit.add(tx, actor, "catalog.apply", "catalog", detail)
        return Applied(after.version, tuple(changes), catalog.warnings)

    async def _what_is_known(self, tx: Tx) -> Surroundings:
        features = {
            e.feature_key
            for stored in await _all_plans(tx)
            for e in stored.plan.entitlements
            if not isinstance(e, CustomEntitlement) and (not isinstance(e, BooleanEntitlement) or e.granted)
        }
        keys = frozenset(metric.key for metric in await _all_metrics(tx))
        return replace(self._surroundings, metric_keys=keys, features=frozenset(features))

    async def _put_metrics_and_plans(self, tx: Tx, actor: str, catalog: Catalog) -> list[Change]:
        """Each in a savepoint, so that a refused one does not hide the faults of the next."""
        changes: list[Change] = []
        faults: list[Reason] = []
        for place, metric in enumerate(catalog.metrics):
            try:
                async with tx.transaction():
                    put_metric = await self._plans.put_metric(actor, metric, within=tx)
                changes.append(Change("metric", metric.key, put_metric.outcome))
            except Refused as refused:
                faults += _within(refused.reasons, f"metrics[{place}]")
        for place, plan in enumerate(catalog.plans):
            try:
                async with tx.transaction():
                    changelog = catalog.changelogs.get(plan.plan_id, "")
                    put_plan = await self._plans.put_plan(actor, plan, changelog, within=tx)
                version = f"version {put_plan.stored.plan.version}"
                details = () if put_plan.outcome == "unchanged" else (version,)
                changes.append(Change("plan", plan.plan_id, put_plan.outcome, details))
            except Refused as refused:
                faults += _within(refused.reasons, f"plans[{place}]")
        if faults:
            raise Refused(*faults)
        return changes


class _OnlyLooking(Exception):
    """Rolls a look back."""

    def __init__(self, applied: Applied) -> None:
        super().__init__()
        self.applied = applied


def gateway_changes(
    before: GatewayCatalog, after: GatewayCatalog, surroundings: Surroundings
) -> list[Change]:
    """What became of each upstream, route, token and of the server settings."""
    old, new = gateway_sections(before, surroundings), gateway_sections(after, surroundings)
    changes = [
        *_compared("upstream", old.get("upstreams", {}), new.get("upstreams", {})),
        *_compared("route", _by_id(old.get("routes", [])), _by_id(new.get("routes", []))),
        *_compared("asset", _assets(old), _assets(new)),
    ]
    server = (
        {"server": old["server"]} if "server" in old else {},
        {"server": new["server"]} if "server" in new else {},
    )
    changes += _compared("server", *server)
    old_order = [r.id for r in before.routes if after.route(r.id)]
    new_order = [r.id for r in after.routes if before.route(r.id)]
    if old_order != new_order:
        moved = {a for a, b in zip(old_order, new_order, strict=True) if a != b}
        changes = [
            replace(c, what="changed", details=(*c.details, "its place among the routes"))
            if c.kind == "route" and c.id in moved and c.what in ("unchanged", "changed")
            else c
            for c in changes
        ]
    return changes


def _compared(kind: Kind, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    changes: list[Change] = []
    for name, value in new.items():
        if name not in old:
            changes.append(Change(kind, name, "created"))
        elif old[name] == value:
            changes.append(Change(kind, name, "unchanged"))
        else:
            changes.append(Change(kind, name, "changed", tuple(_differences(old[name], value))))
    changes += [Change(kind, name, "removed") for name in old if name not in new]
    return changes


def _differences(old: Any, new: Any, path: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            below = f"{path}.{name}" if path else name
            if name not in old:
                yield f"{below}: added"
            elif name not in new:
                yield f"{below}: removed"
            elif old[name] != new[name]:
                yield from _differences(old[name], new[name], below)
        return
    yield f"{path}: {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _by_id(items: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {item["id"]: item for item in items}


def _assets(sections: Mapping[str, Any]) -> dict[str, Any]:
    assets = sections.get("payments", {}).get("assets", [])
    return {f"{asset['symbol']} on {asset['network']}": asset for asset in assets}


def _within(reasons: Iterable[Reason], path: str) -> list[Reason]:
    return [replace(r, field=f"{path}.{r.field}" if r.field else path) for r in reasons]


async def _all_metrics(tx: Tx) -> list[Metric]:
    found: list[Metric] = []
    while rows := await plans.metrics_after(tx, found[-1].key if found else "", _ROWS):
        found += [stored.metric for stored in rows]
    return found


async def _all_plans(tx: Tx) -> list[plans.StoredPlan]:
    found: list[plans.StoredPlan] = []
    while rows := await plans.plans_after(tx, found[-1].plan.plan_id if found else "", _ROWS):
        found += rows
    return found


__all__ = ["Applied", "CatalogFile", "Change", "gateway_changes", "surroundings_of"]
