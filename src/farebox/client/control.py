"""A thin client of the control API: paths, JSON, the key, and errors with their code."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Self

import httpx

from farebox.base.errors import FareboxError

Json = dict[str, Any]


class ApiError(FareboxError):
    """The API refused. ``code`` is stable; ``field`` names the input at fault."""

    def __init__(self, status: int, code: str, message: str, field: str | None, document: Json) -> None:
        super().__init__(f"{status} {code}: {message}" + (f" ({field})" if field else ""))
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.document = document


class Farebox:
    """``Farebox("http://127.0.0.1:8400", "fbx_sk_…")``. Paths are those of the reference, without ``/v1``."""

    def __init__(
        self, api_url: str, key: str, *, transport: httpx.BaseTransport | None = None, timeout_s: float = 30.0
    ) -> None:
        self._http = httpx.Client(
            base_url=api_url.rstrip("/") + "/v1",
            headers={"Authorization": f"Bearer {key}"},
            timeout=timeout_s,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> Json:
        """``farebox.get("/customers/acme")``."""
        return self._read(self._http.get(path, params=query))

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, idempotency_key: str | None = None
    ) -> Json:
        """Write. Without a key of yours a fresh one is sent: then only this very call is safe to repeat."""
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(16)}
        return self._read(self._http.post(path, json=dict(body or {}), headers=headers))

    def patch(self, path: str, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> Json:
        headers = {"Idempotency-Key": idempotency_key or secrets.token_urlsafe(16)}
        return self._read(self._http.patch(path, json=dict(body), headers=headers))

    def delete(self, path: str) -> Json:
        return self._read(self._http.delete(path))

    def each(self, path: str, **query: str | int) -> Iterator[Json]:
        """Every row of a list, page by page."""
        cursor: str | None = None
        while True:
            page = self.get(path, **query, **({"cursor": cursor} if cursor else {}))
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def record(self, customer_id: str, metric_key: str, idempotency_key: str, **event: Any) -> Json:
        """One usage event; ``value``, ``timestamp`` and ``properties`` as in the reference."""
        return self.post(
            "/events",
            {
                "customer_id": customer_id,
                "metric_key": metric_key,
                "idempotency_key": idempotency_key,
                **event,
            },
            idempotency_key=idempotency_key,
        )

    def _read(self, answer: httpx.Response) -> Json:
        try:
            document = answer.json() if answer.content else {}
        except ValueError:
            document = {}
        if answer.is_success:
            return document if isinstance(document, dict) else {"data": document}
        error = document.get("error") if isinstance(document, dict) else None
        said: Json = error if isinstance(error, dict) else {}
        raise ApiError(
            answer.status_code,
            str(said.get("code", "HTTP_ERROR")),
            str(said.get("message", answer.reason_phrase)),
            said.get("field"),
            document if isinstance(document, dict) else {},
        )
