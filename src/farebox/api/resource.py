"""What the resources share: who asks, pages of lists, how answers are shaped, and how faults of a request are told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, StringConstraints

from farebox.api.front import Caller
from farebox.app.documents.faults import Document
from farebox.app.pages import PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX, Page
from farebox.base.errors import Reason, Refused
from farebox.base.money import plain
from farebox.base.time import to_rfc3339

T = TypeVar("T")
R = TypeVar("R")


class _ReadRequest(Request):
    """A request whose body the front desk has read strictly already."""

    async def json(self) -> Any:
        return self.scope["farebox.caller"].body


class ResourceRoute(APIRoute):
    """Hands FastAPI the values that were read strictly, instead of letting it read the body once more, loosely."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def with_read_body(request: Request) -> Response:
            if unknown := [name for name in request.query_params if name not in known]:
                raise Refused(*(_unknown_parameter(name, known) for name in unknown))
            return await handler(_ReadRequest(request.scope, request.receive))

        return with_read_body


def _unknown_parameter(name: str, known: set[str]) -> Reason:
    """A parameter that is not understood is a fault, not something to leave out in silence."""
    there = f"known here: {', '.join(sorted(known))}" if known else "none is known here"
    return Reason("FIELD_UNKNOWN", f"there is no query parameter {name[:60]!r} ({there})", name[:60])


def router(tag: str) -> APIRouter:
    """The router of one resource."""
    return APIRouter(prefix="/v1", tags=[tag], route_class=ResourceRoute)


def needs(*scopes: str) -> Any:
    """The caller, when the key has one of the scopes (``admin`` has all)."""

    async def caller(request: Request) -> Caller:  # async: plain functions would go to a thread
        found: Caller = request.scope["farebox.caller"]
        found.need(*scopes)
        return found

    return Depends(caller)


#: Reading what was billed and sold; changing it.
Reader = Annotated[Caller, needs("billing:read", "billing:write")]
Writer = Annotated[Caller, needs("billing:write")]
Admin = Annotated[Caller, needs("admin")]

Limit = Annotated[int, Query(ge=1, le=PAGE_ROWS_MAX, description="rows a page")]
Cursor = Annotated[str | None, Query(max_length=1000, description="`next_cursor` of the page before")]
LIMIT_DEFAULT = PAGE_ROWS_DEFAULT


class Body(Document):
    """The base of request bodies: ``idempotency_key`` may stand in each and wins over the header."""

    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None


class NoBody(Body):
    """Of requests that say nothing more."""


class Answer(BaseModel):
    """The base of answers. Decimals are written as strings, money as whole minor units beside its currency."""

    model_config = ConfigDict(frozen=True)


class Listed(Answer, Generic[R]):
    """A page of a list."""

    data: list[R]
    next_cursor: str | None


def listed(page: Page[T], answer: Callable[[T], R]) -> Listed[R]:
    """The page with each row as it is answered."""
    return Listed(data=[answer(row) for row in page.data], next_cursor=page.next_cursor)


class Fault(Answer):
    """One thing wrong with a request."""

    code: str
    message: str
    field: str | None


class Failure(Fault):
    """What went wrong. ``facts`` are values to act on, ``faults`` all faults where there are several."""

    request_id: str
    facts: dict[str, Any] | None = None
    faults: list[Fault] | None = None


class ErrorAnswer(Answer):
    """Every answer of status 400 and above."""

    error: Failure


def moment(instant: datetime) -> str:
    """RFC 3339 in UTC."""
    return to_rfc3339(instant)


def moment_or_none(instant: datetime | None) -> str | None:
    return None if instant is None else to_rfc3339(instant)


def number(value: Decimal) -> str:
    """A decimal as plain text."""
    return plain(value)


def number_or_none(value: Decimal | None) -> str | None:
    return None if value is None else plain(value)
