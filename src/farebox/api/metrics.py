"""Metrics: what is counted."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import AliasChoices, Field

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    NoBody,
    Reader,
    Writer,
    listed,
    moment,
    router,
)
from farebox.app.documents.billing import MetricDocument
from farebox.app.documents.scalars import Name, ShortText
from farebox.app.plans import Plans, StoredMetric


class NewMetric(MetricDocument, Body):
    """What a new metric counts. The key is its identity for ever."""


class MetricPatch(Body):
    """What may change of a metric."""

    name: Annotated[Name | None, Field(validation_alias=AliasChoices("name", "display_name"))] = None
    description: ShortText | None = None


class MetricAnswer(Answer):
    """A metric."""

    id: str
    key: str
    name: str
    aggregation: str
    property: str | None
    value_type: str
    description: str
    status: str
    created_at: str


def metric_answer(stored: StoredMetric) -> MetricAnswer:
    m = stored.metric
    return MetricAnswer(
        id=stored.id,
        key=m.key,
        name=m.name,
        aggregation=m.aggregation,
        property=m.property,
        value_type=m.value_type,
        description=m.description,
        status=m.status,
        created_at=moment(stored.created_at),
    )


def metrics(plans: Plans) -> APIRouter:
    """``/v1/metrics``."""
    api = router("metrics")

    @api.post("/metrics", status_code=201)
    async def create_metric(caller: Writer, body: NewMetric) -> MetricAnswer:
        return metric_answer(await plans.create_metric(caller.actor, body.value(), within=caller.within))

    @api.get("/metrics")
    async def list_metrics(
        caller: Reader, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[MetricAnswer]:
        return listed(await plans.list_metrics(limit, cursor), metric_answer)

    @api.get("/metrics/{key}")
    async def get_metric(caller: Reader, key: str) -> MetricAnswer:
        return metric_answer(await plans.get_metric(key))

    @api.patch("/metrics/{key}")
    async def patch_metric(caller: Writer, key: str, body: MetricPatch) -> MetricAnswer:
        stored = await plans.patch_metric(
            caller.actor, key, body.name, body.description, within=caller.within
        )
        return metric_answer(stored)

    @api.post("/metrics/{key}/deactivate")
    async def deactivate_metric(caller: Writer, key: str, body: NoBody | None = None) -> MetricAnswer:
        """Take no new events; history and the plans that price it stay."""
        return metric_answer(await plans.deactivate_metric(caller.actor, key, within=caller.within))

    return api
