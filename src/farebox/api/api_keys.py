"""Keys of this API."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Admin,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    listed,
    moment,
    moment_or_none,
    router,
)
from farebox.app.documents.scalars import Instant, Name
from farebox.app.keys import ApiKey, ApiKeys, NewApiKey


class NewKey(Body):
    """A key and what it may do: `admin`, `billing:read`, `billing:write`, `events:write`, `entitlements:read`, `gateway`."""

    name: Name
    scopes: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)]
    expires_at: Instant | None = None


class RotateKey(Body):
    """The old key lives on for `overlap_s` seconds."""

    overlap_s: Annotated[int, Field(strict=True, ge=0)] = 0


class ApiKeyAnswer(Answer):
    """A key without its secret."""

    key_id: str
    name: str
    hint: str
    scopes: list[str]
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class NewApiKeyAnswer(ApiKeyAnswer):
    """The only answer that shows the key."""

    key: str


def key_answer(key: ApiKey) -> ApiKeyAnswer:
    return ApiKeyAnswer(
        key_id=key.id,
        name=key.name,
        hint=key.hint,
        scopes=list(key.scopes),
        created_at=moment(key.created_at),
        expires_at=moment_or_none(key.expires_at),
        revoked_at=moment_or_none(key.revoked_at),
    )


def _new(made: NewApiKey) -> NewApiKeyAnswer:
    return NewApiKeyAnswer(**key_answer(made.record).model_dump(), key=made.key)


def api_keys(keys: ApiKeys) -> APIRouter:
    """``/v1/api-keys``."""
    api = router("api keys")

    @api.post("/api-keys", status_code=201)
    async def create_api_key(caller: Admin, body: NewKey) -> NewApiKeyAnswer:
        return _new(
            await keys.create(caller.actor, body.name, body.scopes, body.expires_at, within=caller.within)
        )

    @api.get("/api-keys")
    async def list_api_keys(
        caller: Admin, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[ApiKeyAnswer]:
        return listed(await keys.list(limit, cursor), key_answer)

    @api.post("/api-keys/{key_id}/rotate", status_code=201)
    async def rotate_api_key(caller: Admin, key_id: str, body: RotateKey | None = None) -> NewApiKeyAnswer:
        """A new key with the same name and scopes."""
        overlap_s = body.overlap_s if body else 0
        return _new(await keys.rotate(caller.actor, key_id, overlap_s, within=caller.within))

    @api.delete("/api-keys/{key_id}", status_code=204)
    async def revoke_api_key(caller: Admin, key_id: str) -> None:
        """End a key now. The last living key with scope `admin` stays."""
        await keys.revoke(caller.actor, key_id, within=caller.within)

    return api
