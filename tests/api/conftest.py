"""The real control API in this process, on a database of its own, asked through its ASGI face."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from farebox.config import Config
from farebox.store.pool import Database
from farebox.wiring.api import ApiProcess, api_process, connections_max

MASTER_KEY = "a master key for the tests, longer than thirty-two"

SHOP: dict[str, Any] = {
    "upstreams": {"weather": {"url": "http://127.0.0.1:9000"}},
    "routes": [
        {
            "id": "forecast",
            "match": {"path": "/weather/{city}", "methods": ["GET"]},
            "upstream": "weather",
            "metric": "api_calls",
            "fares": {
                "exact": {"price": "0.001 USDC"},
                "passes": [{"id": "hour", "name": "One hour", "price": "0.25 USDC", "duration": "1h", "limits": {"calls": 1000}}],
                "account": {"required_feature": "weather_api"},
            },
        }
    ],
    "metrics": [{"key": "api_calls", "name": "API calls", "aggregation": "sum"}],
    "plans": [
        {
            "id": "starter",
            "name": "Starter",
            "currency": "USD",
            "billing_period": "monthly",
            "charges": [
                {"metric_key": "api_calls", "pricing_model": "per_unit", "properties": {"unit_price": "0.01"}},
                {"pricing_model": "flat_fee", "properties": {"amount": "49"}},
            ],
            "entitlements": {
                "weather_api": {"type": "boolean", "granted": True},
                "api_calls": {"type": "limit", "metric_key": "api_calls", "limit": 1000},
                "sla": {"type": "custom", "value": "4h"},
            },
        }
    ],
}  # fmt: skip


@dataclass
class Shop:
    """An operator with the first admin key."""

    http: httpx.AsyncClient
    database: Database
    process: ApiProcess
    config: Config

    async def post(
        self, path: str, body: Any = None, expect: int | None = None, **headers: str
    ) -> dict[str, Any]:
        """The answer's values; the status is ``expect``, or any below 300."""
        answer = await self.http.post(
            path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        wanted = answer.status_code < 300 if expect is None else answer.status_code == expect
        assert wanted, f"POST {path}: {answer.status_code} {answer.text}"
        return answer.json()  # type: ignore[no-any-return]

    async def get(self, path: str, expect: int = 200, **query: str) -> dict[str, Any]:
        answer = await self.http.get(path, params=query)
        assert answer.status_code == expect, f"GET {path}: {answer.status_code} {answer.text}"
        return answer.json()  # type: ignore[no-any-return]

    async def refusal(self, path: str, body: Any, expect: int) -> tuple[str, str | None]:
        """(code, field) of a refused POST."""
        error = (await self.post(path, body, expect))["error"]
        assert error["message"]
        assert error["request_id"].startswith("req_")
        return error["code"], error["field"]

    async def opens(self) -> None:
        """Apply the shop."""
        await self.post("/v1/catalog/apply", SHOP)

    async def has_customer(self, customer_id: str = "acme") -> str:
        """A company on the starter plan since the beginning of the year; returns its gateway key."""
        await self.post(
            "/v1/customers",
            {"id": customer_id, "name": customer_id.title(), "email": f"it@{customer_id}.example"},
        )
        start = {"customer_id": customer_id, "plan_id": "starter", "start_date": "2026-01-01T00:00:00Z"}
        await self.post("/v1/subscriptions", start)
        return str((await self.post(f"/v1/customers/{customer_id}/keys"))["key"])

    async def key_with(self, *scopes: str) -> dict[str, str]:
        """Headers of a fresh key with these scopes."""
        made = await self.post("/v1/api-keys", {"name": "limited", "scopes": scopes})
        return {"Authorization": f"Bearer {made['key']}"}


@pytest.fixture
def config(database_url: str) -> Config:
    return Config.parse(
        {
            "FAREBOX_MODE": "sandbox",
            "FAREBOX_DATABASE_URL": database_url,
            "FAREBOX_MASTER_KEY": MASTER_KEY,
            "FAREBOX_LOG_LEVEL": "error",
        }
    )


@pytest.fixture
async def shop(config: Config) -> AsyncIterator[Shop]:
    """The API of an empty installation."""
    database = await Database.open(config.database_url, size_max=connections_max(config), name="api")
    async with database, api_process(config, database) as process:
        transport = httpx.ASGITransport(app=process.app)
        headers = {"Authorization": f"Bearer {config.admin_key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://api", headers=headers, timeout=30
        ) as http:
            yield Shop(http, database, process, config)


@pytest.fixture
async def open_shop(shop: Shop) -> Shop:
    """With the shop's catalog applied."""
    await shop.opens()
    return shop
