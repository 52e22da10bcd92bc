"""``farebox keys``: keys of the control API, straight in the database (whoever reaches it is the operator)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from farebox.app.keys import ApiKey, ApiKeys, NewApiKey
from farebox.app.ports.clock import WallClock
from farebox.cli.installation import config_of
from farebox.cli.printing import print_facts, print_json, print_table
from farebox.store.pool import Database

ACTOR = "farebox keys"

T = TypeVar("T")


def create(name: str, scopes: list[str], data: Path | None, *, as_json: bool) -> None:
    """Make a key and show it, once."""
    made = _with_keys(data, lambda keys: keys.create(ACTOR, name, tuple(scopes)))
    _print_new(made, as_json)


def list_all(data: Path | None, *, as_json: bool) -> None:
    """All keys, oldest first."""

    async def collect(keys: ApiKeys) -> list[ApiKey]:
        found: list[ApiKey] = []
        cursor: str | None = None
        while True:
            page = await keys.list(200, cursor)
            found += page.data
            cursor = page.next_cursor
            if cursor is None:
                return found

    rows = [_row(key) for key in _with_keys(data, collect)]
    if as_json:
        print_json({"data": rows})
    else:
        print_table(rows, ("key_id", "name", "hint", "scopes", "state", "created_at"), "no keys")


def rotate(key_id: str, overlap_s: int, data: Path | None, *, as_json: bool) -> None:
    """A new key in the place of an old one."""
    made = _with_keys(data, lambda keys: keys.rotate(ACTOR, key_id, overlap_s))
    _print_new(made, as_json)


def revoke(key_id: str, data: Path | None) -> None:
    """End a key now."""
    _with_keys(data, lambda keys: keys.revoke(ACTOR, key_id))
    print(f"{key_id} is revoked")


def _with_keys(data: Path | None, work: Callable[[ApiKeys], Awaitable[T]]) -> T:
    config = config_of(data)

    async def run() -> T:
        async with await Database.open(config.database_url, name="cli", size_max=2) as database:
            return await work(ApiKeys(database, WallClock()))

    return asyncio.run(run())


def _print_new(made: NewApiKey, as_json: bool) -> None:
    facts = {"key_id": made.key_id, "key": made.key, "name": made.record.name, "scopes": made.record.scopes}
    if as_json:
        print_json(facts)
        return
    print_facts(facts)
    print("Keep the key: it is not shown again.")


def _row(key: ApiKey) -> dict[str, Any]:
    state = "revoked" if key.revoked_at else "expires" if key.expires_at else "active"
    return {
        "key_id": key.id,
        "name": key.name,
        "hint": f"…{key.hint}",
        "scopes": key.scopes,
        "state": state,
        "created_at": key.created_at.isoformat(timespec="seconds"),
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }
