"""402 payments: each payer's authorisation is one row, reserved before anything is done for it and ended once.

The hot statements are gathered: they take many rows as arrays sorted by key (so that two batches never wait for each
other in a circle) and give a verdict per row. A call costs two durable writes, the reservation and the end. Arrays go
over in binary (``%(…)b``): written as text they cost the driver 100 µs a row more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

from farebox.store.pool import Tx
from farebox.store.processes import GAP_S

#: A process that has not said a word for this long is taken for dead by those who meet its reservations and were listening.
OWNER_LOST_AFTER_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """One payment to hold for one request. ``request_digest`` binds it; ``amount`` in whole units of ``asset``."""

    payment_key: bytes
    payment_id: str
    flow: str
    fare: str
    network: str
    scheme: str
    asset: str
    book_asset: str
    amount: int
    payer: str
    recipient: str
    route_id: str
    resource_path: str
    request_digest: bytes
    owner: str
    owner_epoch: int
    valid_before: datetime


@dataclass(frozen=True, slots=True)
class Reserved:
    """The payment is ours to use. ``payment_id`` is the row's own when it had been released before."""

    payment_id: str


@dataclass(frozen=True, slots=True)
class StoredPayment:
    """A payment as it stands. ``answer_*`` are set while the answer is kept for a replay; ``recent``: settled so lately that its answer may still be on its way.

    ``expired``: its window is over, so that nobody can bring it again."""

    payment_key: bytes
    payment_id: str
    status: str
    fare: str
    network: str
    amount: int
    payer: str
    request_digest: bytes
    owner: str
    owner_epoch: int
    owner_lives: bool
    transaction_hash: str | None
    failure: str | None
    answer_status: int | None
    answer_head: bytes | None
    answer_body: bytes | None
    rerun: bool
    recent: bool
    expired: bool


Verdict = Reserved | StoredPayment


# A released payment took nothing, so the same request may use it again; everything else stays as it is and is read next.
# A payer may have signed the same nonce twice: what is signed now is what will be taken, so that is what the row says.
_RESERVE: LiteralString = """
    INSERT INTO payment AS held
           (payment_key, id, status, flow, fare, network, scheme, asset, book_asset, amount, payer_address,
            recipient_address, route_id, resource_path, request_digest, owner, owner_epoch, valid_before)
    SELECT w.payment_key, w.id, 'reserved', w.flow, w.fare, w.network, w.scheme, w.asset, w.book_asset, w.amount, w.payer,
           w.recipient, w.route_id, w.resource_path, w.request_digest, w.owner, w.owner_epoch, w.valid_before
      FROM unnest(%(payment_key)b::bytea[], %(payment_id)b::text[], %(flow)b::text[], %(fare)b::text[], %(network)b::text[],
                  %(scheme)b::text[], %(asset)b::text[], %(book_asset)b::text[], %(amount)b::numeric[], %(payer)b::text[],
                  %(recipient)b::text[], %(route_id)b::text[], %(resource_path)b::text[], %(request_digest)b::bytea[],
                  %(owner)b::text[], %(owner_epoch)b::bigint[], %(valid_before)b::timestamptz[])
           AS w (payment_key, id, flow, fare, network, scheme, asset, book_asset, amount, payer, recipient, route_id,
                 resource_path, request_digest, owner, owner_epoch, valid_before)
    ON CONFLICT (payment_key) DO UPDATE
       SET status = 'reserved', owner = excluded.owner, owner_epoch = excluded.owner_epoch, failure = NULL,
           amount = excluded.amount, recipient_address = excluded.recipient_address, valid_before = excluded.valid_before
     WHERE held.status = 'released' AND held.request_digest = excluded.request_digest
    RETURNING payment_key, id"""


async def reserve(tx: Tx, wanted: Sequence[Reservation]) -> list[Verdict]:
    """Hold each payment, or say what is there already; verdicts in the order asked.

    Of several reservations of one key in one batch the first is tried and the others meet it. On an autocommit
    connection this is one durable statement, and one read more when something was there already.
    """
    firsts: dict[bytes, Reservation] = {}
    for reservation in wanted:
        firsts.setdefault(reservation.payment_key, reservation)
    rows = sorted(firsts.values(), key=lambda r: r.payment_key)
    cursor = await tx.execute(_RESERVE, _columns(rows))
    taken = {bytes(key): payment_id for key, payment_id in await cursor.fetchall()}
    met = [r for r in wanted if r.payment_key not in taken or firsts[r.payment_key] is not r]
    stored = await find(tx, {r.payment_key for r in met}, met[0].owner) if met else {}
    return [
        Reserved(taken[r.payment_key])
        if r.payment_key in taken and firsts[r.payment_key] is r
        else stored[r.payment_key]
        for r in wanted
    ]


# An owner is silent only to somebody who could have heard it all the while: after an outage of the database everybody was.
_FIND: LiteralString = """
    SELECT p.payment_key, p.id, p.status, p.fare, p.network, p.amount, p.payer_address, p.request_digest, p.owner, p.owner_epoch,
           EXISTS (SELECT FROM process o
                    WHERE o.id = p.owner AND o.stopped_at IS NULL
                      AND (o.heartbeat_at > now() - make_interval(secs => %(lost_after_s)s)
                           OR NOT EXISTS (SELECT FROM process w
                                           WHERE w.id = %(witness)s
                                             AND w.unbroken_since <= now() - make_interval(secs => %(lost_after_s)s)
                                             AND w.heartbeat_at > now() - make_interval(secs => %(gap_s)s)))),
           p.transaction_hash, p.failure, p.response_status,
           CASE WHEN p.replay_until > now() THEN p.response_head END,
           CASE WHEN p.replay_until > now() THEN p.response_body END,
           p.metadata ? 'rerun', coalesce(p.settled_at > now() - make_interval(secs => %(recent_s)s), false),
           p.valid_before < now()
      FROM payment p
     WHERE p.payment_key = ANY(%(keys)s)"""


async def find(
    tx: Tx,
    keys: Iterable[bytes],
    witness: str | None = None,
    lost_after_s: float = OWNER_LOST_AFTER_S,
    recent_s: float = 30.0,
) -> dict[bytes, StoredPayment]:
    """The payments of some keys, by key; keys that are not there are left out.

    ``witness`` is the process that judges whether an owner lives: one that said goodbye does not, and one that was silent for
    ``lost_after_s`` while the witness's own heartbeats came without a gap. Without a witness silence says nothing.
    """
    values = {
        "keys": sorted(keys),
        "witness": witness,
        "lost_after_s": lost_after_s,
        "recent_s": recent_s,
        "gap_s": GAP_S,
    }
    cursor = await tx.execute(_FIND, values)
    return {bytes(row[0]): _stored(row) for row in await cursor.fetchall()}


_RELEASE: LiteralString = """
    UPDATE payment p
       SET status = 'released'
      FROM (SELECT * FROM unnest(%(keys)b::bytea[], %(owners)b::text[], %(epochs)b::bigint[]) AS w (key, owner, epoch)) AS w
     WHERE p.payment_key = w.key AND p.status = 'reserved' AND p.owner = w.owner AND p.owner_epoch = w.epoch"""


async def release(tx: Tx, held: Sequence[tuple[bytes, str, int]]) -> int:
    """Give back reservations (key, owner, epoch): nothing was taken and the same request may use the payment again.

    Returns how many were still held as said."""
    rows = sorted(held)
    cursor = await tx.execute(
        _RELEASE,
        {"keys": [r[0] for r in rows], "owners": [r[1] for r in rows], "epochs": [r[2] for r in rows]},
    )
    return cursor.rowcount


_TAKE_OVER: LiteralString = """
    UPDATE payment
       SET owner = %(owner)s, owner_epoch = %(epoch)s
     WHERE payment_key = %(key)s AND status = 'reserved' AND owner = %(lost_owner)s AND owner_epoch = %(lost_epoch)s"""


async def take_over(tx: Tx, lost: StoredPayment, owner: str, owner_epoch: int) -> bool:
    """Become the owner of a reservation whose owner died. False: someone else was faster."""
    cursor = await tx.execute(
        _TAKE_OVER,
        {
            "key": lost.payment_key,
            "owner": owner,
            "epoch": owner_epoch,
            "lost_owner": lost.owner,
            "lost_epoch": lost.owner_epoch,
        },
    )
    return cursor.rowcount == 1


_MARK_UNKNOWN: LiteralString = """
    UPDATE payment
       SET status = 'unknown', failure = 'owner_lost'
     WHERE payment_key = %(key)s AND status = 'reserved' AND owner = %(owner)s AND owner_epoch = %(epoch)s"""


async def mark_unknown(tx: Tx, lost: StoredPayment) -> None:
    """Say that nobody knows what the upstream did for this reservation: it will never be settled."""
    await tx.execute(_MARK_UNKNOWN, {"key": lost.payment_key, "owner": lost.owner, "epoch": lost.owner_epoch})


# A lost answer costs a replay, not money: these writes ride on the next flush of the log instead of causing one.
_KEEP_ANSWERS: LiteralString = """
    WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
    UPDATE payment p
       SET response_status = w.status, response_head = w.head, response_body = w.body,
           replay_until = now() + make_interval(secs => w.ttl_s)
      FROM quick, unnest(%(keys)b::bytea[], %(statuses)b::int[], %(heads)b::bytea[], %(bodies)b::bytea[], %(ttls)b::float8[])
           AS w (key, status, head, body, ttl_s)
     WHERE p.payment_key = w.key AND p.status = 'settled'"""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer for a replay. ``body`` None: it was too large or never finished; then one re-run is left instead."""

    payment_key: bytes
    status: int
    head: bytes | None
    body: bytes | None
    ttl_s: float


async def keep_answers(tx: Tx, answers: Sequence[KeptAnswer]) -> None:
    """Store answers of settled payments for their time to live."""
    rows = sorted({a.payment_key: a for a in answers}.values(), key=lambda a: a.payment_key)
    await tx.execute(
        _KEEP_ANSWERS,
        {
            "keys": [a.payment_key for a in rows],
            "statuses": [a.status for a in rows],
            "heads": [a.head for a in rows],
            "bodies": [a.body for a in rows],
            "ttls": [a.ttl_s for a in rows],
        },
    )


_CLAIM_RERUN: LiteralString = """
    UPDATE payment
       SET metadata = metadata || '{"rerun": true}'
     WHERE payment_key = %(key)s AND status = 'settled' AND response_body IS NULL AND NOT metadata ? 'rerun'"""


async def claim_rerun(tx: Tx, payment_key: bytes) -> bool:
    """Use up the one re-run of a settled payment whose answer was not kept. False: it was used before."""
    return (await tx.execute(_CLAIM_RERUN, {"key": payment_key})).rowcount == 1


_OWE_RERUN: LiteralString = """
    UPDATE payment
       SET metadata = metadata - 'rerun'
     WHERE payment_key = %(key)s AND status = 'settled' AND response_body IS NULL"""


async def owe_rerun(tx: Tx, payment_key: bytes) -> None:
    """Give a claimed re-run back: it came to nothing."""
    await tx.execute(_OWE_RERUN, {"key": payment_key})


# An answer that was kept was what the payment bought: once it is gone a receipt is left, and no second call.
_FORGET_ANSWERS: LiteralString = """
    WITH due AS (SELECT payment_key FROM payment WHERE replay_until < now() AND response_body IS NOT NULL
                  ORDER BY replay_until LIMIT %(rows_max)s FOR UPDATE SKIP LOCKED)
    UPDATE payment p
       SET response_head = NULL, response_body = NULL, metadata = p.metadata || '{"rerun": true}'
      FROM due
     WHERE p.payment_key = due.payment_key"""


async def forget_answers(tx: Tx, rows_max: int = 1000) -> int:
    """Drop answers past their time to live; returns how many."""
    return (await tx.execute(_FORGET_ANSWERS, {"rows_max": rows_max})).rowcount


def _columns(rows: Sequence[Reservation]) -> dict[str, list[Any]]:
    return {
        "payment_key": [r.payment_key for r in rows],
        "payment_id": [r.payment_id for r in rows],
        "flow": [r.flow for r in rows],
        "fare": [r.fare for r in rows],
        "network": [r.network for r in rows],
        "scheme": [r.scheme for r in rows],
        "asset": [r.asset for r in rows],
        "book_asset": [r.book_asset for r in rows],
        "amount": [r.amount for r in rows],
        "payer": [r.payer for r in rows],
        "recipient": [r.recipient for r in rows],
        "route_id": [r.route_id for r in rows],
        "resource_path": [r.resource_path for r in rows],
        "request_digest": [r.request_digest for r in rows],
        "owner": [r.owner for r in rows],
        "owner_epoch": [r.owner_epoch for r in rows],
        "valid_before": [r.valid_before for r in rows],
    }


def _stored(row: tuple[Any, ...]) -> StoredPayment:
    return StoredPayment(
        payment_key=bytes(row[0]),
        payment_id=row[1],
        status=row[2],
        fare=row[3],
        network=row[4],
        amount=int(row[5]),
        payer=row[6],
        request_digest=bytes(row[7]),
        owner=row[8],
        owner_epoch=row[9],
        owner_lives=row[10],
        transaction_hash=row[11],
        failure=row[12],
        answer_status=row[13],
        answer_head=None if row[14] is None else bytes(row[14]),
        answer_body=None if row[15] is None else bytes(row[15]),
        rerun=row[16],
        recent=row[17],
        expired=row[18],
    )
