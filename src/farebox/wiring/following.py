"""What a gateway process does when something changes elsewhere: forget at once, look after it soon.

The listener's callbacks here are plain functions, so that no revocation waits behind a catalog that is being read. What
must ask the database is done by one chore, which also makes up for whatever was missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, Protocol

import structlog

from farebox.app.grants import GrantCache
from farebox.app.leases import Leases
from farebox.app.ports.clock import BusinessDate
from farebox.base.errors import Refused, Unavailable
from farebox.store import grants
from farebox.store.pool import Database

#: Without any notice the premises and the calls under way are looked at this often.
LOOK_EVERY_S: Final = 10.0
#: After a look that failed, and between two looks while one notice follows the other.
LOOK_AGAIN_S: Final = 0.5
PAUSE_S: Final = 0.02
ANSWER_S: Final = 2.0
#: Ids of ended keys and subjects that wait to be looked at; beyond it all calls under way are looked at.
CHANGED_MAX: Final = 10_000

log = structlog.get_logger(__name__)


class Readable(Protocol):
    """The catalog and the business date (wiring/gateway.py's Premises)."""

    async def read(self, mode: str) -> None: ...


class RunningCalls(Protocol):
    """The calls that a gateway process serves now (gateway/server.py)."""

    def standing_ids(self) -> set[str]: ...

    def cut(self, ids: Collection[str]) -> object: ...


class Following:
    """Follows the changes that others make, for one gateway process."""

    def __init__(
        self,
        database: Database,
        mode: str,
        known: GrantCache,
        leases: Leases,
        business: BusinessDate,
        premises: Readable,
    ) -> None:
        self._database = database
        self._mode = mode
        self._known = known
        self._leases = leases
        self._business = business
        self._premises = premises
        self._news = asyncio.Event()
        self._premises_changed = True
        self._changed_ids: set[str] = set()
        self._all_changed = False

    # ── the listener's ───────────────────────────────────────────────────────────────────────────────────────────

    def changed(self, kind: str, changed_id: str) -> None:
        """A notice was heard."""
        match kind:
            case "key" | "grant":
                self._known.invalidate(changed_id)
                if len(self._changed_ids) >= CHANGED_MAX:
                    self._all_changed = True
                else:
                    self._changed_ids.add(changed_id)
            case "lease":
                self._leases.wanted_elsewhere(changed_id)
                return
            case "catalog":
                self._premises_changed = True
            case "clock":
                self._business.forget()
                self._premises_changed = True
        self._news.set()

    def listening(self) -> None:
        """Notices are heard again; any number was missed."""
        self._known.listening()
        self._business.forget()
        self._premises_changed = self._all_changed = True
        self._news.set()

    def lost(self) -> None:
        """Notices are not heard any more. What cut the listener off may have cut the other connections off as well."""
        self._known.deaf()
        self._database.distrust()

    # ── the chore ────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, calls: RunningCalls) -> None:
        """Look after what changed, until cancelled."""
        while True:
            try:
                await self._look(calls)
                await asyncio.sleep(PAUSE_S)
            except Unavailable as error:
                log.warning("following_waits", what=error.what)
                await asyncio.sleep(LOOK_AGAIN_S)
                continue
            except Refused as refused:
                log.error("following_refused", why=str(refused))
            except Exception:
                log.exception("following_failed")
            try:
                await asyncio.wait_for(self._news.wait(), LOOK_EVERY_S)
            except TimeoutError:
                self._premises_changed = self._all_changed = True

    async def _look(self, calls: RunningCalls) -> None:
        self._news.clear()
        await self._cut_revoked(calls)
        if self._premises_changed:
            self._premises_changed = False
            try:
                await self._premises.read(self._mode)
            except Unavailable:
                self._premises_changed = True
                raise

    async def _cut_revoked(self, calls: RunningCalls) -> None:
        """End the calls under way of keys and subjects that were revoked. A mere change of limits ends nothing."""
        if not self._changed_ids and not self._all_changed:
            return
        standing = calls.standing_ids()
        perhaps = standing if self._all_changed else standing & self._changed_ids
        self._changed_ids.clear()
        self._all_changed = False
        if not perhaps:
            return
        try:
            async with self._database.connection(within_s=ANSWER_S) as tx:
                revoked = await grants.revoked_among(tx, perhaps)
        except Unavailable:
            self._all_changed = True
            raise
        if revoked:
            calls.cut(revoked)
            log.info("calls_cut", revoked=sorted(revoked)[:10], count=len(revoked))
