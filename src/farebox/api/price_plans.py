"""Price plans: immutable versions under one id."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response

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
    moment_or_none,
    router,
)
from farebox.app.documents.billing import PlanDocument
from farebox.app.plans import Plans, StoredPlan
from farebox.domain.catalog import plan_document


class NewPlanVersion(PlanDocument, Body):
    """A price plan. The same id again makes the next version; the same content again changes nothing."""


class PlanAnswer(Answer):
    """One version of a price plan."""

    id: str
    version: int
    name: str
    currency: str
    billing_period: str | dict[str, int]
    charges: list[dict[str, Any]]
    entitlements: dict[str, dict[str, Any]]
    changelog: str
    status: str
    effective_from: str
    deprecated_at: str | None
    created_at: str


def plan_answer(stored: StoredPlan) -> PlanAnswer:
    return PlanAnswer(
        id=stored.plan.plan_id,
        version=stored.plan.version,
        **plan_document(stored.plan),
        changelog=stored.changelog,
        status="active" if stored.deprecated_at is None else "deprecated",
        effective_from=moment(stored.effective_from),
        deprecated_at=moment_or_none(stored.deprecated_at),
        created_at=moment(stored.created_at),
    )


Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


def price_plans(plans: Plans) -> APIRouter:
    """``/v1/price-plans``."""
    api = router("price plans")

    @api.post("/price-plans", status_code=201)
    async def create_price_plan(caller: Writer, body: NewPlanVersion, response: Response) -> PlanAnswer:
        """201 for a new plan or version; 200 when the newest version says the same already."""
        put = await plans.put_plan(caller.actor, body.value(), body.changelog, within=caller.within)
        if put.outcome == "unchanged":
            response.status_code = 200
        return plan_answer(put.stored)

    @api.get("/price-plans")
    async def list_price_plans(
        caller: Reader, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[PlanAnswer]:
        """The newest version of each plan."""
        return listed(await plans.list_plans(limit, cursor), plan_answer)

    @api.get("/price-plans/{plan_id}")
    async def get_price_plan(caller: Reader, plan_id: str) -> PlanAnswer:
        """The newest version."""
        return plan_answer(await plans.get_plan(plan_id))

    @api.get("/price-plans/{plan_id}/versions")
    async def list_price_plan_versions(
        caller: Reader, plan_id: str, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[PlanAnswer]:
        """Newest first."""
        return listed(await plans.list_versions(plan_id, limit, cursor), plan_answer)

    @api.get("/price-plans/{plan_id}/versions/{version}")
    async def get_price_plan_version(caller: Reader, plan_id: str, version: Version) -> PlanAnswer:
        return plan_answer(await plans.get_plan(plan_id, version))

    @api.post("/price-plans/{plan_id}/versions/{version}/deprecate")
    async def deprecate_price_plan_version(
        caller: Writer, plan_id: str, version: Version, body: NoBody | None = None
    ) -> PlanAnswer:
        """Close a version to new subscriptions; running ones keep it."""
        return plan_answer(await plans.deprecate(caller.actor, plan_id, version, within=caller.within))

    return api
