"""Queued jobs: claimed under a lease, run, completed; a failure comes back later, and at last lies with the dead letters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from farebox.base.errors import Unavailable
from farebox.store import jobs
from farebox.store.jobs import Job
from farebox.store.pool import Database
from farebox.worker.loops import Chore

JOBS_AT_ONCE_MAX: Final = 4
POLL_S: Final = 0.5

#: Runs a job; the job is completed after it. It may run twice, so its effect is keyed by ``job.key``.
Handler = Callable[[Job], Awaitable[None]]

log = structlog.get_logger(__name__)


class JobRunner:
    """Runs the kinds of jobs it was given handlers for, and leaves the others to workers that know them."""

    def __init__(
        self, database: Database, owner: str, handlers: Mapping[str, Handler], lease_s: float = jobs.LEASE_S
    ) -> None:
        self._database = database
        self._owner = owner
        self._handlers = handlers
        self._lease_s = lease_s

    def chore(self) -> Chore:
        """The runner as a chore of the worker."""
        return Chore("jobs", POLL_S, 1, self.run_due)

    async def run_due(self) -> int:
        """Claim what is due, a few at once, and run it to its end; how many."""
        async with self._database.transaction() as tx:
            claimed = await jobs.claim(
                tx, sorted(self._handlers), self._owner, rows_max=JOBS_AT_ONCE_MAX, lease_s=self._lease_s
            )
        if not claimed:
            return 0
        heartbeat = asyncio.create_task(self._renew(claimed), name="job leases")
        try:
            await asyncio.gather(*(self._run(job) for job in claimed))
        except asyncio.CancelledError:
            async with self._database.transaction() as tx:
                for job in claimed:
                    await jobs.release(tx, job)
            raise
        finally:
            heartbeat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await heartbeat
        return len(claimed)

    async def _run(self, job: Job) -> None:
        try:
            await self._handlers[job.kind](job)
        except Exception as error:
            log.warning("job_failed", kind=job.kind, key=job.key, attempt=job.attempt, exc_info=True)
            async with self._database.transaction() as tx:
                await jobs.fail(tx, job, f"{type(error).__name__}: {error}")
            return
        async with self._database.transaction() as tx:
            if not await jobs.complete(tx, job):
                log.warning("job_lease_lost", kind=job.kind, key=job.key, attempt=job.attempt)

    async def _renew(self, claimed: list[Job]) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with contextlib.suppress(Unavailable):
                async with self._database.transaction() as tx:
                    await jobs.renew(tx, claimed, self._owner, lease_s=self._lease_s)
