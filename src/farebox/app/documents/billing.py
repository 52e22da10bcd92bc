"""The shapes of metrics and price plans, the same in farebox.yaml and in the control API.

Shapes only: what a number or a list must be. The rules (tiers ascend, a flat fee has no metric, …) are the domain's
(``domain.catalog.plan_faults``), whose faults carry the same paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, Tag

from farebox.app.documents.faults import Document, branch, fault, not_available_yet
from farebox.app.documents.scalars import (
    BillingPeriod,
    Currency,
    Key,
    LongText,
    Name,
    NotNegative,
    ShortText,
)
from farebox.domain.catalog import (
    CHARGES_MAX,
    TIERS_MAX,
    Aggregation,
    BooleanEntitlement,
    Charge,
    CustomEntitlement,
    Entitlement,
    FlatFee,
    LimitEntitlement,
    Metric,
    OnExceed,
    Package,
    PerUnit,
    PlanVersion,
    Pricing,
    PricingModel,
    Tier,
    Tiered,
    ValueType,
    Volume,
    charge_document,
)

_AGGREGATIONS_LATER: Final = frozenset({"percentile", "average", "weighted_sum"})
_MODELS_LATER: Final = frozenset({"percentage", "graduated_percentage", "dynamic", "matrix"})


def _aggregation(value: Any) -> Any:
    if isinstance(value, str) and value in _AGGREGATIONS_LATER:
        raise not_available_yet(f"the aggregation {value!r} is")
    return value


class MetricDocument(Document):
    """What is counted."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "percentile": "percentiles are",
        "filters": "filters of a metric are",
        "group_by": "grouping is",
        "carry_over": "carrying a value over is",
    }

    key: Key
    name: Annotated[Name, Field(validation_alias=AliasChoices("name", "display_name"))]
    aggregation: Annotated[
        Aggregation,
        BeforeValidator(_aggregation),
        Field(validation_alias=AliasChoices("aggregation", "aggregation_type")),
    ]
    property: Name | None = None
    value_type: ValueType = "decimal"
    description: ShortText = ""

    def value(self) -> Metric:
        return Metric(self.key, self.name, self.aggregation, self.property, self.value_type, self.description)


# ── charges: one shape a pricing model ─────────────────────────────────────────────────────────────────────────────


class TierDocument(Document):
    """A band of quantity; ``up_to`` null is the open end."""

    up_to: NotNegative | None
    unit_price: Annotated[NotNegative, Field(validation_alias=AliasChoices("unit_price", "unit_amount"))]
    flat_price: NotNegative = Decimal(0)

    def value(self) -> Tier:
        return Tier(self.up_to, self.unit_price, self.flat_price)


class PerUnitProperties(Document):
    unit_price: Annotated[NotNegative, Field(validation_alias=AliasChoices("unit_price", "unit_amount"))]

    def value(self) -> Pricing:
        return PerUnit(self.unit_price)


class TieredProperties(Document):
    tiers: Annotated[tuple[TierDocument, ...], Field(max_length=TIERS_MAX)]

    def value(self) -> Pricing:
        return Tiered(tuple(t.value() for t in self.tiers))


class VolumeProperties(Document):
    tiers: Annotated[tuple[TierDocument, ...], Field(max_length=TIERS_MAX)]

    def value(self) -> Pricing:
        return Volume(tuple(t.value() for t in self.tiers))


class PackageProperties(Document):
    package_size: NotNegative
    package_price: NotNegative
    free_units: NotNegative = Decimal(0)

    def value(self) -> Pricing:
        return Package(self.package_size, self.package_price, self.free_units)


class FlatFeeProperties(Document):
    amount: NotNegative

    def value(self) -> Pricing:
        return FlatFee(self.amount)


def _timing(value: Any) -> Any:
    if value == "advance":
        raise not_available_yet("charging in advance is")
    return value


class ChargeDocument(Document):
    """One line of a future invoice. Without an ``id`` it is called after its metric or its model."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "prorate": "proration is",
        "minimum": "minimums are",
        "maximum": "maximums are",
        "free_units": "free units outside a package are",
        "filters": "filters of a charge are",
        "unit_config": "unit conversion is",
    }

    id: Key | None = None
    metric_key: Key | None = None
    description: ShortText = ""
    timing: Annotated[Literal["arrears"], BeforeValidator(_timing)] = "arrears"


def _model_field(model: PricingModel) -> Any:
    return Field(validation_alias=AliasChoices("pricing_model", "model"))


class PerUnitCharge(ChargeDocument):
    """Every unit costs the same."""

    pricing_model: Annotated[Literal["per_unit"], _model_field("per_unit")]
    properties: PerUnitProperties


class TieredCharge(ChargeDocument):
    """Each slice of the quantity costs what the tier it falls in says."""

    pricing_model: Annotated[Literal["tiered"], _model_field("tiered")]
    properties: TieredProperties


class VolumeCharge(ChargeDocument):
    """All units cost what the one tier says that the quantity falls in."""

    pricing_model: Annotated[Literal["volume"], _model_field("volume")]
    properties: VolumeProperties


class PackageCharge(ChargeDocument):
    """Units are sold in packages."""

    pricing_model: Annotated[Literal["package"], _model_field("package")]
    properties: PackageProperties


class FlatFeeCharge(ChargeDocument):
    """A fixed amount a period."""

    pricing_model: Annotated[Literal["flat_fee"], _model_field("flat_fee")]
    properties: FlatFeeProperties


def _charge_branch(value: Any) -> str | None:
    model = value.get("pricing_model", value.get("model")) if isinstance(value, dict) else None
    return branch(model) if isinstance(model, str) else None


def _known_model(value: Any) -> Any:
    if not isinstance(value, dict):
        raise fault("FIELD_MALFORMED", "a charge is a mapping with pricing_model and properties")
    model = value.get("pricing_model", value.get("model"))
    if model is None:
        raise fault("FIELD_MISSING", "pricing_model is missing: add it")
    if isinstance(model, str) and model in _MODELS_LATER:
        raise not_available_yet(f"the pricing model {model!r} is")
    if not isinstance(model, str) or model not in ("per_unit", "tiered", "volume", "package", "flat_fee"):
        raise fault(
            "PRICING_MODEL_UNKNOWN",
            f"{str(model)[:40]!r} is not a pricing model: write per_unit, tiered, volume, package or flat_fee",
        )
    return value


AnyCharge = Annotated[
    Annotated[PerUnitCharge, Tag(branch("per_unit"))]
    | Annotated[TieredCharge, Tag(branch("tiered"))]
    | Annotated[VolumeCharge, Tag(branch("volume"))]
    | Annotated[PackageCharge, Tag(branch("package"))]
    | Annotated[FlatFeeCharge, Tag(branch("flat_fee"))],
    Discriminator(_charge_branch),
    BeforeValidator(_known_model),
]

Charges = Annotated[tuple[AnyCharge, ...], Field(max_length=CHARGES_MAX)]


def charges_of(documents: Iterable[AnyCharge]) -> tuple[Charge, ...]:
    """The charges of a plan, each with an id: its own, else its metric's key or its model's name, counted when repeated."""
    charges: list[Charge] = []
    taken = {d.id for d in documents if d.id}
    for document in documents:
        charge_id = document.id
        if charge_id is None:
            wanted = document.metric_key or document.pricing_model
            number, charge_id = 1, wanted
            while charge_id in taken:
                number += 1
                charge_id = f"{wanted}-{number}"
            taken.add(charge_id)
        charges.append(
            Charge(
                charge_id,
                document.metric_key,
                document.properties.value(),
                document.description,
                document.timing,
            )
        )
    return tuple(charges)


# ── entitlements ───────────────────────────────────────────────────────────────────────────────────────────────────


class BooleanEntitlementDocument(Document):
    """A feature that a plan grants or not."""

    type: Literal["boolean"]
    granted: Annotated[bool, Field(strict=True)] = True

    def value(self, feature_key: str) -> Entitlement:
        return BooleanEntitlement(feature_key, self.granted)


def _on_exceed(value: Any) -> Any:
    if value == "grace":
        raise not_available_yet("a grace period is")
    return value


class LimitEntitlementDocument(Document):
    """So much of a metric a period; ``limit`` null is unlimited."""

    not_yet: ClassVar[Mapping[str, str]] = {"grace": "a grace period is"}

    type: Literal["limit"]
    metric_key: Key
    limit: NotNegative | None
    on_exceed: Annotated[OnExceed, BeforeValidator(_on_exceed)] = "block"

    def value(self, feature_key: str) -> Entitlement:
        return LimitEntitlement(feature_key, self.metric_key, self.limit, self.on_exceed)


class CustomEntitlementDocument(Document):
    """A value that the seller's own software reads."""

    type: Literal["custom"]
    value_: Annotated[LongText, Field(validation_alias="value", serialization_alias="value")]

    def value(self, feature_key: str) -> Entitlement:
        return CustomEntitlement(feature_key, self.value_)


def _entitlement_branch(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return branch(kind) if isinstance(kind, str) else None


def _known_entitlement(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("boolean", "limit", "custom"):
        raise fault("FIELD_MALFORMED", "an entitlement is a mapping whose type is boolean, limit or custom")
    return value


AnyEntitlement = Annotated[
    Annotated[BooleanEntitlementDocument, Tag(branch("boolean"))]
    | Annotated[LimitEntitlementDocument, Tag(branch("limit"))]
    | Annotated[CustomEntitlementDocument, Tag(branch("custom"))],
    Discriminator(_entitlement_branch),
    BeforeValidator(_known_entitlement),
]


# ── plans ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _conventions(value: Any) -> Any:
    if value is not None and value != "farebox":
        raise not_available_yet("choosing conventions other than 'farebox' is")
    return value


class PlanDocument(Document):
    """A price plan. The same id again is a new version."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "minimum_commitment": "commitments are",
        "trial_days": "trials are",
    }

    id: Key
    name: Name
    currency: Currency
    billing_period: BillingPeriod
    charges: Charges = ()
    entitlements: dict[Key, AnyEntitlement] = Field(default_factory=dict)
    conventions: Annotated[Literal["farebox"] | None, BeforeValidator(_conventions)] = None
    changelog: LongText = ""

    def value(self) -> PlanVersion:
        """The plan, as version 1: which version it becomes is decided where it is stored."""
        return PlanVersion(
            plan_id=self.id,
            version=1,
            name=self.name,
            currency=self.currency,
            interval=self.billing_period,
            charges=charges_of(self.charges),
            entitlements=tuple(e.value(key) for key, e in self.entitlements.items()),
        )


# ── back to documents ──────────────────────────────────────────────────────────────────────────────────────────────


def metric_section(metric: Metric) -> dict[str, Any]:
    """A metric as it stands in a farebox.yaml; what has its default is left out."""
    document: dict[str, Any] = {"key": metric.key, "name": metric.name, "aggregation": metric.aggregation}
    if metric.property is not None:
        document["property"] = metric.property
    if metric.value_type != "decimal":
        document["value_type"] = metric.value_type
    if metric.description:
        document["description"] = metric.description
    return document


def plan_section(plan: PlanVersion, document: Mapping[str, Any]) -> dict[str, Any]:
    """A plan (and its ``plan_document``) as it stands in a farebox.yaml."""
    section: dict[str, Any] = {"id": plan.plan_id, **document}
    section["charges"] = [_charge_section(charge) for charge in plan.charges]
    return {name: value for name, value in section.items() if value not in ([], {}, "")}


def _charge_section(charge: Charge) -> dict[str, Any]:
    section = charge_document(charge)
    if not section["description"]:
        del section["description"]
    if section["metric_key"] is None:
        del section["metric_key"]
    del section["timing"]
    return section
