"""Work to do later, in the same transaction as the reason for it.

A job is one row: what kind, of which key, when. The same kind and key is queued once, and a second ``enqueue`` neither
fails nor disturbs the caller's transaction. A worker claims a batch under a lease; if it dies, the lease ends and another
worker takes over. A claim is known by (owner, attempt), so a worker that slept past its lease cannot complete, fail or
renew what is no longer its own. ``run_at`` is the only clock of a row: when it may be claimed next (while it runs, the end
of its lease), so the claim reads nothing but due rows.

Delivery is at least once. To make a job's effect happen once, ``complete`` it in the transaction of its effect and roll
back when it says False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from psycopg.types.json import Jsonb

from farebox.store.pool import Tx

LEASE_S: Final = 60.0
ATTEMPTS_MAX: Final = 12
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_S_MAX: Final = 3600.0
ERROR_CHARS_MAX: Final = 2000


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job. ``attempt`` counts from 1 and is, with ``owner``, the proof that it is ours."""

    id: int
    kind: str
    key: str
    payload: dict[str, Any]
    attempt: int
    owner: str


# No NOTIFY and no failure on a clash: this runs inside money transactions.
ENQUEUE: LiteralString = """
    INSERT INTO job (kind, key, payload, run_at)
    VALUES (%(kind)s, %(key)s, %(payload)s, coalesce(%(run_at)s::timestamptz, now()))
    ON CONFLICT (kind, key) DO NOTHING"""


async def enqueue(
    tx: Tx, kind: str, key: str, payload: dict[str, Any] | None = None, run_at: datetime | None = None
) -> bool:
    """Queue a job, due at ``run_at`` (default now). False: this kind and key waits, runs or is dead already."""
    cursor = await tx.execute(
        ENQUEUE, {"kind": kind, "key": key, "payload": Jsonb(payload or {}), "run_at": run_at}
    )
    return cursor.rowcount == 1


# A job whose workers died on it attempts_max times is not given to another one.
CLAIM: LiteralString = """
    WITH due AS (
        SELECT id
          FROM job
         WHERE run_at <= now() AND status <> 'dead' AND kind = ANY(%(kinds)s::text[])
         ORDER BY run_at
         LIMIT %(rows_max)s
           FOR UPDATE SKIP LOCKED)
    UPDATE job
       SET status      = CASE WHEN attempts < %(attempts_max)s THEN 'running' ELSE 'dead' END,
           last_error  = CASE WHEN attempts < %(attempts_max)s THEN last_error
                              ELSE coalesce(last_error, 'its workers died on it') END,
           attempts    = attempts + 1,
           lease_owner = %(owner)s,
           lease_until = now() + make_interval(secs => %(lease_s)s),
           run_at      = now() + make_interval(secs => %(lease_s)s)
      FROM due
     WHERE job.id = due.id
    RETURNING job.id, job.kind, job.key, job.payload, job.attempts, job.status"""


async def claim(
    tx: Tx,
    kinds: Sequence[str],
    owner: str,
    *,
    rows_max: int = 10,
    lease_s: float = LEASE_S,
    attempts_max: int = ATTEMPTS_MAX,
) -> list[Job]:
    """Take up to ``rows_max`` due jobs for ``lease_s``; those whose lease ended without an answer are due again."""
    cursor = await tx.execute(
        CLAIM,
        {
            "kinds": list(kinds),
            "owner": owner,
            "rows_max": rows_max,
            "lease_s": lease_s,
            "attempts_max": attempts_max,
        },
    )
    rows = await cursor.fetchall()
    return [Job(row[0], row[1], row[2], row[3], row[4], owner) for row in rows if row[5] == "running"]


RENEW: LiteralString = """
    UPDATE job
       SET lease_until = now() + make_interval(secs => %(lease_s)s),
           run_at      = now() + make_interval(secs => %(lease_s)s)
      FROM unnest(%(ids)s::bigint[], %(attempts)s::integer[]) AS mine (id, attempt)
     WHERE job.id = mine.id AND job.attempts = mine.attempt AND job.lease_owner = %(owner)s AND job.status = 'running'
    RETURNING job.id"""


async def renew(tx: Tx, jobs: Sequence[Job], owner: str, *, lease_s: float = LEASE_S) -> set[int]:
    """Extend the leases (every ``lease_s / 3`` is a good pace). Returns the ids still ours; stop work on the others."""
    values = {
        "ids": [job.id for job in jobs],
        "attempts": [job.attempt for job in jobs],
        "owner": owner,
        "lease_s": lease_s,
    }
    return {row[0] for row in await (await tx.execute(RENEW, values)).fetchall()}


COMPLETE: LiteralString = """
    DELETE FROM job WHERE id = %(id)s AND lease_owner = %(owner)s AND attempts = %(attempt)s AND status = 'running'"""


async def complete(tx: Tx, job: Job) -> bool:
    """It is done. False: the lease was lost, somebody else does it now; roll back what this attempt did."""
    return (await tx.execute(COMPLETE, _claim_of(job))).rowcount == 1


AGAIN: LiteralString = """
    UPDATE job
       SET status = 'queued', attempts = 0, last_error = NULL, lease_owner = NULL, lease_until = NULL, run_at = %(run_at)s
     WHERE id = %(id)s AND lease_owner = %(owner)s AND attempts = %(attempt)s AND status = 'running'"""


async def again(tx: Tx, job: Job, run_at: datetime) -> bool:
    """It went well and is wanted again at ``run_at`` (a recurring job). False: the lease was lost."""
    return (await tx.execute(AGAIN, {**_claim_of(job), "run_at": run_at})).rowcount == 1


# The jitter keeps jobs that failed together from coming back together.
FAIL: LiteralString = """
    UPDATE job
       SET status      = CASE WHEN attempts < %(attempts_max)s THEN 'queued' ELSE 'dead' END,
           last_error  = %(error)s,
           lease_owner = NULL,
           lease_until = NULL,
           run_at      = now() + make_interval(secs => %(delay_s)s * (0.75 + 0.5 * random()))
     WHERE id = %(id)s AND lease_owner = %(owner)s AND attempts = %(attempt)s AND status = 'running'"""


async def fail(
    tx: Tx, job: Job, error: str, *, attempts_max: int = ATTEMPTS_MAX, delay_s: float | None = None
) -> bool:
    """It did not work: due again after ``delay_s`` (default ``backoff_s``), or a dead letter after ``attempts_max``.

    False: the lease was lost, and the failure is not ours to record.
    """
    values = {
        **_claim_of(job),
        "error": error[:ERROR_CHARS_MAX],
        "attempts_max": attempts_max,
        "delay_s": backoff_s(job.attempt) if delay_s is None else delay_s,
    }
    return (await tx.execute(FAIL, values)).rowcount == 1


def backoff_s(attempt: int) -> float:
    """Seconds to wait after the n-th failed attempt: 1, 2, 4, … up to an hour."""
    return min(BACKOFF_S_MAX, BACKOFF_FIRST_S * 2.0 ** (min(attempt, 32) - 1))


RELEASE: LiteralString = """
    UPDATE job
       SET status = 'queued', attempts = attempts - 1, lease_owner = NULL, lease_until = NULL, run_at = now()
     WHERE id = %(id)s AND lease_owner = %(owner)s AND attempts = %(attempt)s AND status = 'running'"""


async def release(tx: Tx, job: Job) -> bool:
    """Give it back unworked (we are stopping): due now, and the attempt is not counted."""
    return (await tx.execute(RELEASE, _claim_of(job))).rowcount == 1


REVIVE: LiteralString = """
    UPDATE job SET status = 'queued', attempts = 0, run_at = now(), lease_owner = NULL, lease_until = NULL
     WHERE id = %(id)s AND status = 'dead'"""


async def revive(tx: Tx, job_id: int) -> bool:
    """Try a dead letter again from the start. False: there is no such dead letter."""
    return (await tx.execute(REVIVE, {"id": job_id})).rowcount == 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that was given up, and what it said last."""

    id: int
    kind: str
    key: str
    attempts: int
    error: str


DEAD_LETTERS: LiteralString = """
    SELECT id, kind, key, attempts, coalesce(last_error, '')
      FROM job WHERE status = 'dead' AND id > %(after)s ORDER BY id LIMIT %(rows_max)s"""


async def dead_letters(tx: Tx, *, after: int = 0, rows_max: int = 100) -> list[DeadLetter]:
    """What was given up, oldest first."""
    rows = await (await tx.execute(DEAD_LETTERS, {"after": after, "rows_max": rows_max})).fetchall()
    return [DeadLetter(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Backlog:
    """One kind's numbers. ``late_s`` is how long the oldest due job has been waiting for a worker."""

    kind: str
    queued: int
    running: int
    dead: int
    late_s: float


BACKLOG: LiteralString = """
    SELECT kind,
           count(*) FILTER (WHERE status = 'queued'),
           count(*) FILTER (WHERE status = 'running'),
           count(*) FILTER (WHERE status = 'dead'),
           greatest(0, coalesce(extract(epoch FROM now() - min(run_at) FILTER (WHERE status <> 'dead')), 0))::float8
      FROM job GROUP BY kind ORDER BY kind"""


async def backlog(tx: Tx) -> list[Backlog]:
    """How much of what there is to do: for metrics and ``doctor``."""
    return [Backlog(*row) for row in await (await tx.execute(BACKLOG)).fetchall()]


def _claim_of(job: Job) -> dict[str, Any]:
    return {"id": job.id, "owner": job.owner, "attempt": job.attempt}
