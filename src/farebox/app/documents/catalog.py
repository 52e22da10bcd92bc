"""A whole farebox.yaml: read with every fault at once, and written back so that it reads the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from farebox.app.documents.billing import MetricDocument, PlanDocument, metric_section, plan_section
from farebox.app.documents.faults import FAULTS_MAX, Document, reasons
from farebox.app.documents.gateway import (
    ROUTES_MAX,
    UPSTREAMS_MAX,
    GatewayReader,
    PaymentsDocument,
    RouteDocument,
    ServerDocument,
    gateway_sections,
    left_to_the_edge,
    routes_without_fare,
    unknown_features,
)
from farebox.app.documents.scalars import Id
from farebox.app.documents.surroundings import Surroundings
from farebox.app.documents.upstreams import UpstreamDocument
from farebox.app.documents.yaml_text import read_yaml, write_yaml
from farebox.base.errors import Reason, Refused
from farebox.domain.access import GatewayCatalog
from farebox.domain.catalog import (
    BooleanEntitlement,
    LimitEntitlement,
    Metric,
    PlanVersion,
    metric_faults,
    plan_document,
    plan_faults,
)

METRICS_MAX = 1_000
PLANS_MAX = 1_000


class CatalogDocument(Document):
    """The sections of a farebox.yaml. Items of a section are read one by one, so that one bad item hides no other."""

    not_yet: ClassVar[Mapping[str, str]] = {"coupons": "coupons are", "tax_rates": "tax rates are"}

    upstreams: dict[str, Any] | None = None
    routes: list[Any] | None = None
    metrics: list[Any] | None = None
    plans: list[Any] | None = None
    payments: dict[str, Any] | None = None
    server: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a file says, checked. ``gateway.version`` is 0 and each plan's version 1: storing decides them.

    ``changelogs`` are the plans' own words for what changed; ``warnings`` are likely mistakes that hinder nothing.
    """

    gateway: GatewayCatalog
    metrics: tuple[Metric, ...]
    plans: tuple[PlanVersion, ...]
    changelogs: Mapping[str, str]
    warnings: tuple[Reason, ...] = ()


def read_catalog(text: str, surroundings: Surroundings) -> Catalog:
    """The catalog of a farebox.yaml. ``Refused`` carries every fault, each with its path; nothing is half right."""
    return catalog_from_values(read_yaml(text), surroundings)


def catalog_from_values(values: Any, surroundings: Surroundings) -> Catalog:
    """As ``read_catalog``, from values already read (the control API takes the same document as JSON)."""
    reader = _Reader(surroundings)
    catalog = reader.read({} if values is None else values)
    if reader.faults:
        raise Refused(*reader.faults[:FAULTS_MAX])
    return catalog


def write_catalog(
    gateway: GatewayCatalog,
    metrics: Iterable[Metric],
    plans: Iterable[PlanVersion],
    surroundings: Surroundings,
) -> str:
    """A farebox.yaml that ``read_catalog`` reads back to the same catalog."""
    return write_yaml(catalog_values(gateway, metrics, plans, surroundings))


def catalog_values(
    gateway: GatewayCatalog,
    metrics: Iterable[Metric],
    plans: Iterable[PlanVersion],
    surroundings: Surroundings,
) -> dict[str, Any]:
    """The sections of that file as plain values."""
    sections = gateway_sections(gateway, surroundings)
    written_metrics = [metric_section(m) for m in metrics]
    written_plans = [plan_section(p, plan_document(p)) for p in plans]
    if written_metrics:
        sections["metrics"] = written_metrics
    if written_plans:
        sections["plans"] = written_plans
    return sections


D = TypeVar("D", bound=Document)


class _Reader:
    """Reads section by section, item by item, and keeps what is wrong."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self.faults: list[Reason] = []

    def read(self, values: Any) -> Catalog:
        sections = self._item(CatalogDocument, values, "")
        if sections is None:
            sections = self._what_is_well_formed(values)
        upstreams = self._named(sections.upstreams or {}, "upstreams", UPSTREAMS_MAX)
        routes = self._items(RouteDocument, sections.routes or [], "routes", ROUTES_MAX)
        metrics = self._items(MetricDocument, sections.metrics or [], "metrics", METRICS_MAX)
        plans = self._items(PlanDocument, sections.plans or [], "plans", PLANS_MAX)
        payments = self._item(PaymentsDocument, sections.payments or {}, "payments")
        server = self._item(ServerDocument, sections.server or {}, "server")

        metric_keys = self._surroundings.metric_keys | _keys_named(sections.metrics or [], "key")
        metric_values = self._metrics(metrics)
        plan_values = self._plans(plans, metric_keys)
        gateway = GatewayReader(
            {name: u for name, u in upstreams.items() if u is not None},
            frozenset(upstreams),
            routes,
            payments or PaymentsDocument(),
            server or ServerDocument(),
            self._surroundings,
        )
        catalog = gateway.catalog(metric_keys)
        if payments is not None:  # else a recipient may be named in what could not be read
            self.faults += gateway.faults
        features = self._surroundings.features | {
            e.feature_key
            for p in plan_values
            for e in p.entitlements
            if isinstance(e, BooleanEntitlement | LimitEntitlement)
        }
        read_routes = [(place, route) for place, route in enumerate(routes) if route is not None]
        return Catalog(
            gateway=catalog,
            metrics=metric_values,
            plans=plan_values,
            changelogs={p.id: p.changelog for p in plans if p is not None and p.changelog},
            warnings=(
                *unknown_features(read_routes, frozenset(features)),
                *routes_without_fare(read_routes),
                *left_to_the_edge(read_routes),
            ),
        )

    def _metrics(self, documents: list[MetricDocument | None]) -> tuple[Metric, ...]:
        values: list[Metric] = []
        seen: set[str] = set()
        for place, document in enumerate(documents):
            if document is None:
                continue
            if document.key in seen:
                self._fault(
                    "METRIC_DUPLICATE",
                    f"another metric has the key {document.key!r}: write it once",
                    f"metrics[{place}].key",
                )
            seen.add(document.key)
            value = document.value()
            self.faults += _within(metric_faults(value), f"metrics[{place}]")
            values.append(value)
        return tuple(values)

    def _plans(
        self, documents: list[PlanDocument | None], metric_keys: frozenset[str]
    ) -> tuple[PlanVersion, ...]:
        values: list[PlanVersion] = []
        seen: set[str] = set()
        for place, document in enumerate(documents):
            if document is None:
                continue
            if document.id in seen:
                self._fault(
                    "PLAN_DUPLICATE",
                    f"another plan has the id {document.id!r}: write it once",
                    f"plans[{place}].id",
                )
            seen.add(document.id)
            value = document.value()
            self.faults += _within(plan_faults(value, metric_keys), f"plans[{place}]")
            values.append(value)
        return tuple(values)

    def _what_is_well_formed(self, values: Any) -> CatalogDocument:
        """The sections that have the right form, where another one has not: their items are read all the same."""
        if not isinstance(values, dict):
            return CatalogDocument()
        kept: dict[str, Any] = {}
        for name in CatalogDocument.model_fields:
            wanted = dict if name in ("upstreams", "payments", "server") else list
            if isinstance(values.get(name), wanted):
                kept[name] = values[name]
        return CatalogDocument.model_construct(**kept)

    def _named(self, section: Mapping[str, Any], path: str, most: int) -> dict[str, UpstreamDocument | None]:
        if len(section) > most:
            self._fault("TOO_MANY", f"at most {most} {path}", path)
            return {}
        found: dict[str, UpstreamDocument | None] = {}
        for name, value in section.items():
            try:
                _ID.validate_python(name)
            except ValidationError as error:
                self.faults += reasons(error.errors(include_url=False), Id, f"{path}.{str(name)[:60]}")
            found[str(name)] = self._item(UpstreamDocument, value, f"{path}.{str(name)[:60]}")
        return found

    def _items(self, model: type[D], section: list[Any], path: str, most: int) -> list[D | None]:
        if len(section) > most:
            self._fault("TOO_MANY", f"at most {most} {path}", path)
            return []
        return [self._item(model, value, f"{path}[{place}]") for place, value in enumerate(section)]

    def _item(self, model: type[D], value: Any, path: str) -> D | None:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            self.faults += reasons(error.errors(include_url=False), model, path)
            return None

    def _fault(self, code: str, message: str, path: str) -> None:
        self.faults.append(Reason(code, message, path))


_ID: TypeAdapter[str] = TypeAdapter(Id)


def _within(faults: Iterable[Reason], path: str) -> list[Reason]:
    return [replace(f, field=f"{path}.{f.field}" if f.field else path) for f in faults]


def _keys_named(items: list[Any], key: str) -> frozenset[str]:
    """The keys that items give themselves, also those of items which are faulty otherwise."""
    return frozenset(i[key] for i in items if isinstance(i, dict) and isinstance(i.get(key), str))
