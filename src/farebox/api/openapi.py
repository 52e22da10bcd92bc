"""The served OpenAPI 3.1 document: FastAPI's part, the raw endpoints, the one error shape, and how to sign in."""

from __future__ import annotations

import copy
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from farebox.api.entitlements import EntitlementAnswer
from farebox.api.resource import ErrorAnswer
from farebox.app.documents.scalars import DECIMAL_SCHEMA
from farebox.app.events import BATCH_EVENTS_MAX

_ABOUT: Final = """Metering, pricing, invoices, passes and payments of a Farebox installation.

Decimals are strings in answers and may be strings or numbers in requests; money is whole minor units beside its currency;
times are RFC 3339 with an offset. Every POST and PATCH takes an `Idempotency-Key` header (or `idempotency_key` in the
body, which wins): the same request again is answered as before, another one under the same key is refused with 409."""

_ERROR: Final = {
    "description": "Refused. docs/reference/errors.md lists the codes.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
}

_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "the same key and request again: the first answer again",
}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    # Made afresh: FastAPI keeps what it hands out.
    made = copy.deepcopy(
        get_openapi(
            title=app.title,
            version=app.version,
            description=_ABOUT,
            routes=app.routes,
            openapi_version="3.1.0",
        )
    )
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _add_schemas(schemas)
    for path, operations in _raw_paths().items():
        made["paths"].setdefault(path, {}).update(operations)
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation)
    components["securitySchemes"] = {
        "apiKey": {"type": "http", "scheme": "bearer", "description": "an API key `fbx_sk_…`"}
    }
    made["security"] = [{"apiKey": []}]
    made["paths"] = dict(sorted(made["paths"].items()))
    return made


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    if path.startswith("/v1/"):
        responses["default"] = _ERROR
    if method in ("post", "patch") and operation["operationId"] not in ("accept_event", "accept_events"):
        operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)


def _add_schemas(schemas: dict[str, Any]) -> None:
    for model in (ErrorAnswer, EntitlementAnswer):
        own = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(own.pop("$defs", {}))
        schemas[model.__name__] = own
    schemas["Event"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["customer_id", "metric_key", "idempotency_key"],
        "properties": {
            "customer_id": {"type": "string"},
            "metric_key": {"type": "string"},
            "value": {**DECIMAL_SCHEMA, "default": 1},
            "timestamp": {"type": "string", "format": "date-time", "description": "now, if left out"},
            "idempotency_key": {
                "type": "string",
                "minLength": 1,
                "maxLength": 255,
                "description": "the same key and event again: the first `event_id` again; another event: 409",
            },
            "properties": {"type": "object"},
        },
    }
    schemas["QueuedEvent"] = {
        "type": "object",
        "required": ["event_id", "status", "idempotency_key"],
        "properties": {
            "event_id": {"type": "string"},
            "status": {"const": "queued"},
            "idempotency_key": {"type": "string"},
        },
    }
    schemas["RejectedEvent"] = {
        "type": "object",
        "required": ["status", "http_status", "error"],
        "properties": {
            "status": {"const": "rejected"},
            "http_status": {"type": "integer", "description": "the status this event would have got alone"},
            "error": {"$ref": "#/components/schemas/Fault"},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _raw_paths() -> dict[str, Any]:
    batch = {
        "type": "object",
        "required": ["events"],
        "properties": {
            "events": {"type": "array", "minItems": 1, "maxItems": BATCH_EVENTS_MAX, "items": _ref("Event")}
        },
    }
    results = {
        "type": "object",
        "required": ["results"],
        "properties": {
            "results": {"type": "array", "items": {"oneOf": [_ref("QueuedEvent"), _ref("RejectedEvent")]}}
        },
    }
    status = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
    checks = {**status, "properties": {**status["properties"], "checks": {"type": "object"}}}  # type: ignore[dict-item]
    return {
        "/v1/events": {
            "post": {
                "tags": ["usage"],
                "operationId": "accept_event",
                "summary": "Accept Event",
                "description": "Durable before the answer. The key may also stand in an `Idempotency-Key` header.",
                "requestBody": {"required": True, "content": _json(_ref("Event"))},
                "responses": {"202": {"description": "Stored", "content": _json(_ref("QueuedEvent"))}},
            }
        },
        "/v1/events/batch": {
            "post": {
                "tags": ["usage"],
                "operationId": "accept_events",
                "summary": "Accept Events",
                "description": "One bad event never rejects the rest. Duplicate JSON keys are not looked for here: the last one counts.",
                "requestBody": {"required": True, "content": _json(batch)},
                "responses": {
                    "207": {"description": "A result for each event, in order", "content": _json(results)}
                },
            }
        },
        "/v1/entitlements/check": {
            "get": {
                "tags": ["entitlements"],
                "operationId": "check_entitlement",
                "summary": "Check Entitlement",
                "parameters": [
                    {"name": name, "in": "query", "required": True, "schema": {"type": "string"}}
                    for name in ("customer_id", "feature_key")
                ],
                "responses": {
                    "200": {"description": "The feature", "content": _json(_ref("EntitlementAnswer"))}
                },
            }
        },
        "/healthz": {
            "get": {
                "tags": ["health"],
                "operationId": "healthz",
                "summary": "Alive",
                "security": [],
                "responses": {"200": {"description": "Alive", "content": _json(status)}},
            }
        },
        "/ready": {
            "get": {
                "tags": ["health"],
                "operationId": "ready",
                "summary": "Ready",
                "security": [],
                "responses": {
                    "200": {"description": "Ready", "content": _json(checks)},
                    "503": {
                        "description": "Not ready: the checks name what is missing",
                        "content": _json(checks),
                    },
                },
            }
        },
    }
