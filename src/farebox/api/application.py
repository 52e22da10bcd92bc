"""The control API put together: resources in FastAPI, hot endpoints beside it, the front desk before both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from farebox import __version__
from farebox.api.api_keys import api_keys
from farebox.api.catalog import catalog
from farebox.api.customers import customers
from farebox.api.docs import PAGE, PAGE_HEADERS
from farebox.api.entitlements import entitlement_endpoints, entitlements
from farebox.api.errors import as_json, error_answer, retry_after
from farebox.api.front import Caller, FrontDesk, Observe, Page, Reply, internal_error
from farebox.api.invoices import invoices
from farebox.api.ledger import ledger
from farebox.api.metrics import metrics
from farebox.api.openapi import document
from farebox.api.passes import passes
from farebox.api.payments import payments
from farebox.api.price_plans import price_plans
from farebox.api.pricing import pricing
from farebox.api.sandbox import sandbox
from farebox.api.subscriptions import subscriptions
from farebox.api.usage import event_endpoints, usage
from farebox.app.billing import Billing
from farebox.app.books import Books
from farebox.app.catalog import CatalogFile
from farebox.app.customers import Customers
from farebox.app.documents.faults import reasons
from farebox.app.entitlements import Entitlements
from farebox.app.event_log import EventLog
from farebox.app.idempotency import Idempotency
from farebox.app.keys import ApiKeys
from farebox.app.metering import Metering
from farebox.app.passes import Passes
from farebox.app.plans import Plans
from farebox.app.sandbox import Faucet
from farebox.app.subscriptions import Subscriptions
from farebox.app.test_clock import TestClock
from farebox.base.errors import Reason, Refused, Unavailable

READY_TIMEOUT_S: Final = 2.0

#: Says what is well and what is not: name → ``"ok"`` or a few words. Everything ``"ok"`` is ready.
Checks = Callable[[], Awaitable[dict[str, str]]]


@dataclass(frozen=True, slots=True)
class UseCases:
    """What the resources call."""

    api_keys: ApiKeys
    idempotency: Idempotency
    plans: Plans
    customers: Customers
    subscriptions: Subscriptions
    metering: Metering
    event_log: EventLog
    billing: Billing
    entitlements: Entitlements
    passes: Passes
    books: Books
    catalog: CatalogFile
    test_clock: TestClock
    faucet: Faucet


def control_api(
    cases: UseCases,
    checks: Checks,
    *,
    rate_limit_rpm: int,
    concurrent_effects_max: int,
    is_sandbox: bool,
    observe: Observe,
) -> FrontDesk:
    """The ASGI application. ``concurrent_effects_max`` is the number of connections idempotent requests may hold."""
    app = resources(cases)
    hot = {**event_endpoints(cases.metering), **entitlement_endpoints(cases.entitlements)}
    return FrontDesk(
        app,
        cases.api_keys,
        cases.idempotency,
        hot,
        _pages(app, checks),
        rate_limit_rpm=rate_limit_rpm,
        concurrent_effects_max=concurrent_effects_max,
        sandbox=is_sandbox,
        observe=observe,
    )


def resources(cases: UseCases) -> FastAPI:
    """Every resource but the hot ones."""
    routes: list[Route] = []

    async def unknown_path(request: Request, error: Exception) -> Response:
        return await _unknown_path(request, error, routes)

    app = FastAPI(
        title="Farebox",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        strict_content_type=False,  # the front desk has seen to it
        exception_handlers={
            Refused: _refused,
            Unavailable: _refused,
            RequestValidationError: _malformed,
            HTTPException: unknown_path,
            Exception: _failed,
        },
    )
    for router in (
        metrics(cases.plans),
        price_plans(cases.plans),
        customers(cases.customers),
        subscriptions(cases.subscriptions),
        usage(cases.metering, cases.event_log),
        pricing(cases.billing),
        invoices(cases.billing),
        entitlements(cases.entitlements),
        passes(cases.passes),
        payments(cases.books),
        ledger(cases.books),
        catalog(cases.catalog),
        api_keys(cases.api_keys),
        sandbox(cases.test_clock, cases.faucet),
    ):
        app.include_router(router)
        routes += [route for route in router.routes if isinstance(route, Route)]
    return app


# ── pages without a key ──────────────────────────────────────────────────────────────────────────────────────────────


def _pages(app: FastAPI, checks: Checks) -> dict[str, Page]:
    written: list[bytes] = []

    async def healthz() -> Reply:
        return Reply(200, b'{"status":"ok"}')

    async def ready() -> Reply:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                found = await checks()
        except TimeoutError:
            found = {"database": f"no answer within {READY_TIMEOUT_S:g} s"}
        is_ready = all(word == "ok" for word in found.values())
        body = {"status": "ready" if is_ready else "not ready", "checks": found}
        return Reply(200 if is_ready else 503, as_json(body))

    async def openapi() -> Reply:
        if not written:  # made at the first question: 50 ms that a start need not take
            written.append(as_json(document(app)))
        return Reply(200, written[0])

    async def docs() -> Reply:
        return Reply(200, PAGE, b"text/html; charset=utf-8", list(PAGE_HEADERS))

    return {"/healthz": healthz, "/ready": ready, "/openapi.json": openapi, "/docs": docs}


# ── what is not an answer of a resource ──────────────────────────────────────────────────────────────────────────────


def _request_id(request: Request) -> str:
    caller: Caller = request.scope["farebox.caller"]
    return caller.request_id


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused | Unavailable):
        raise error
    status, body, retry_after_s = error_answer(error, _request_id(request))
    headers = {} if retry_after_s is None else {"Retry-After": retry_after(retry_after_s)}
    return Response(body, status, headers, "application/json")


async def _malformed(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    body_field = getattr(request.scope.get("route"), "body_field", None)
    body_type = body_field.field_info.annotation if body_field is not None else None
    found: list[Reason] = []
    for fault in error.errors():
        place, *location = fault["loc"]
        if place == "body" and not location and fault["type"] == "missing":
            found.append(Reason("BODY_MALFORMED", "a JSON body is missing: send one"))
            continue
        found += reasons([{**fault, "loc": tuple(location)}], body_type if place == "body" else None)
    return await _refused(request, Refused(*found))


async def _unknown_path(request: Request, error: Exception, routes: list[Route]) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 405:
        allowed = ", ".join(
            sorted({m for r in routes if r.path_regex.match(request.url.path) for m in r.methods or ()})
        )
        reason = Reason("METHOD_NOT_ALLOWED", f"{request.method} is not possible here: use {allowed}")
        answer = await _refused(request, Refused(reason))
        answer.headers["Allow"] = allowed
        return answer
    if error.status_code == 404:
        reason = Reason("PATH_UNKNOWN", f"there is nothing at {request.url.path[:200]}: see /docs")
    else:
        reason = Reason("BODY_MALFORMED", "the request could not be read")
    return await _refused(request, Refused(reason))


async def _failed(request: Request, error: Exception) -> Response:
    """The front desk logs it: Starlette raises it again after this answer."""
    reply: Any = internal_error(_request_id(request))
    return Response(reply.body, reply.status, media_type="application/json")
