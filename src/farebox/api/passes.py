"""Passes: granted by the operator, looked at, taken back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

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
from farebox.app.documents.fares import PassLimitsDocument
from farebox.app.documents.scalars import DurationS, ShortText
from farebox.app.pages import decode_cursor, page_of, rows_wanted
from farebox.app.passes import Passes
from farebox.domain.limits import limits_document
from farebox.domain.passes import Pass


class NewPass(Body):
    """A pass given by the operator. No `limits`: bounded by time alone."""

    route: Annotated[str, Field(min_length=1, max_length=200)]
    limits: PassLimitsDocument = PassLimitsDocument()
    duration: DurationS
    holder: ShortText | None = None
    name: ShortText = ""


class PassAnswer(Answer):
    """A pass. Its token is only its receipt; this is the authority."""

    pass_id: str
    route: str
    offer_id: str | None
    name: str
    holder: str | None
    status: str
    limits: dict[str, Any]
    starts_at: str
    expires_at: str
    purchase_id: str | None
    revoked_at: str | None


class SpentPassAnswer(PassAnswer):
    """A pass and what was spent of each of its limits, as the gateways said last (once a second)."""

    spent: dict[str, int]


class GrantedPassAnswer(PassAnswer):
    """A new pass with its token."""

    token: str


def pass_answer(held: Pass) -> PassAnswer:
    return PassAnswer(
        pass_id=held.id,
        route=held.route_id,
        offer_id=held.offer_id,
        name=held.name,
        holder=held.holder,
        status=held.status,
        limits=limits_document(held.limits),
        starts_at=moment(held.starts_at),
        expires_at=moment(held.expires_at),
        purchase_id=held.purchase_id,
        revoked_at=moment_or_none(held.revoked_at),
    )


def passes(passes: Passes) -> APIRouter:
    """``/v1/passes``."""
    api = router("passes")

    @api.post("/passes", status_code=201)
    async def grant_pass(caller: Writer, body: NewPass) -> GrantedPassAnswer:
        """A pass for nothing, with its token."""
        granted, token = await passes.grant(
            body.route,
            body.limits.value(),
            body.duration,
            body.holder,
            caller.actor,
            body.name,
            within=caller.within,
        )
        return GrantedPassAnswer(**pass_answer(granted).model_dump(), token=token)

    @api.get("/passes")
    async def list_passes(
        caller: Reader, route: str | None = None, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[PassAnswer]:
        """Latest first."""
        rows = await passes.list(rows_wanted(limit), decode_cursor(cursor), route)
        return listed(page_of(rows, limit, lambda held: held.id), pass_answer)

    @api.get("/passes/{pass_id}")
    async def get_pass(caller: Reader, pass_id: str) -> SpentPassAnswer:
        held, spent = await passes.get(pass_id)
        return SpentPassAnswer(
            **pass_answer(held).model_dump(), spent={str(kind): units for kind, units in spent.items()}
        )

    @api.post("/passes/{pass_id}/revoke")
    async def revoke_pass(caller: Writer, pass_id: str, body: NoBody | None = None) -> PassAnswer:
        """Take a pass back for good, at every gateway."""
        return pass_answer(await passes.revoke(pass_id, caller.actor, within=caller.within))

    return api
