"""Passes an operator grants, looks at and takes back; the writing of a pass that a purchase shares."""

from __future__ import annotations

import builtins
from datetime import timedelta
from typing import Final

from farebox.app.joining import joined
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import BusinessClock
from farebox.base.errors import Refused, refuse
from farebox.base.ids import new_id
from farebox.domain.limits import LimitKind, PassLimits, limits_document
from farebox.domain.passes import Pass, counter_of, grant_of, limits_of, wrong_limit
from farebox.store import audit, gateway_catalog, grants, passes
from farebox.store import limits as limits_store
from farebox.store.pool import Database, Tx

DURATION_S_MAX: Final = 10 * 366 * 86_400
NAME_CHARACTERS_MAX: Final = 200


class Passes:
    """One transaction a use case; each writes the pass, its admission grant and its counters together and announces it."""

    def __init__(self, database: Database, tokens: PassTokens, business: BusinessClock) -> None:
        self._database = database
        self._tokens = tokens
        self._business = business

    async def grant(
        self,
        route_id: str,
        limits: PassLimits,
        duration_s: int,
        holder: str | None,
        actor: str,
        name: str = "",
        within: Tx | None = None,
    ) -> tuple[Pass, str]:
        """A pass given by the operator, and its token. ``Refused`` ``ROUTE_UNKNOWN``, ``PASS_INVALID``."""
        if (wrong := wrong_limit(limits)) is not None:
            raise Refused(wrong)
        if not 1 <= duration_s <= DURATION_S_MAX:
            raise refuse("PASS_INVALID", "a pass lasts from one second to ten years", "duration")
        for field, text in (("holder", holder or ""), ("name", name)):
            if len(text) > NAME_CHARACTERS_MAX or "\x00" in text:
                raise refuse(
                    "PASS_INVALID", f"{field} is a text of at most {NAME_CHARACTERS_MAX} characters", field
                )
        now = await self._business.now()
        granted = Pass(
            id=new_id("pas"),
            route_id=route_id,
            offer_id=None,
            name=name or f"Pass for {route_id}",
            holder=holder,
            status="active",
            limits=limits,
            starts_at=now,
            expires_at=now + timedelta(seconds=duration_s),
        )
        async with joined(self._database, within) as tx:
            if (await gateway_catalog.latest(tx)).route(route_id) is None:
                raise refuse("ROUTE_UNKNOWN", f"there is no route {route_id[:60]!r}", "route")
            await write(tx, granted)
            await audit.add(tx, actor, "pass.grant", granted.id, {"limits": limits_document(limits)})
        return granted, self._tokens.sign(granted)

    async def get(self, pass_id: str) -> tuple[Pass, dict[LimitKind, int]]:
        """A pass and what was used of each of its limits, as the gateways said last (they do once a second): amounts since its
        start, slots and requests at the moment; rates are not used up. ``Refused`` ``PASS_UNKNOWN``."""
        async with self._database.connection() as tx:
            found = await passes.get(tx, pass_id)
            if found is None:
                raise refuse("PASS_UNKNOWN", f"there is no pass {pass_id[:60]!r}")
            counters = {
                counter_of(pass_id, kind): kind
                for kind, _, _ in limits_of(found.limits)
                if kind not in ("upload_rate", "download_rate")
            }
            counted = await limits_store.counted(tx, list(counters))
            return found, {kind: int(counted[c].used) for c, kind in counters.items() if c in counted}

    async def list(
        self, limit: int = 100, before: str | None = None, route_id: str | None = None
    ) -> builtins.list[Pass]:
        """Latest first. ``before`` is the id of the last one already seen."""
        async with self._database.connection() as tx:
            return await passes.list_latest(tx, limit, before, route_id)

    async def revoke(self, pass_id: str, actor: str, within: Tx | None = None) -> Pass:
        """Take a pass back for good; every gateway hears of it. Revoking twice changes nothing. ``Refused`` ``PASS_UNKNOWN``."""
        now = await self._business.now()
        async with joined(self._database, within) as tx:
            if await passes.revoke(tx, pass_id, now):
                await grants.revoke(tx, "pass", pass_id)
                await audit.add(tx, actor, "pass.revoke", pass_id)
            found = await passes.get(tx, pass_id)
        if found is None:
            raise refuse("PASS_UNKNOWN", f"there is no pass {pass_id[:60]!r}")
        return found


async def write(tx: Tx, pass_: Pass) -> None:
    """A new pass with everything the gateway needs to admit it, in the caller's transaction."""
    await passes.add(tx, pass_)
    await grants.put(tx, grant_of(pass_, new_id("grn")))
