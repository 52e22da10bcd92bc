"""The sandbox's own ledger of tokens: balances and transfers that only look like a chain's. Never used in live mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, LiteralString

from farebox.base.errors import InvariantError
from farebox.domain.ledger import Posting
from farebox.store.pool import Tx

#: What an address holds the first time it is seen, in whole units: 100 USDC. So an unmodified client can pay at once.
FIRST_BALANCE: Final = 100_000_000

#: (address, token address), both lower case.
Account = tuple[str, str]


# Sorted, so that two processes which meet the same new addresses do not wait for each other in a circle.
_OPEN: LiteralString = """
    INSERT INTO sandbox_account (address, asset, balance)
    SELECT address, asset, %(balance)s
      FROM unnest(%(addresses)b::text[], %(assets)b::text[]) AS w (address, asset)
     ORDER BY address, asset
    ON CONFLICT DO NOTHING"""


async def open_accounts(tx: Tx, accounts: Iterable[Account]) -> None:
    """Give every address that was never seen its first balance. Run it in a transaction of its own, before locking any."""
    rows = sorted(set(accounts))
    await tx.execute(
        _OPEN,
        {
            "addresses": [a for a, _ in rows],
            "assets": [t for _, t in rows],
            "balance": Decimal(FIRST_BALANCE),
        },
    )


_FUND: LiteralString = """
    UPDATE sandbox_account SET balance = balance + %(amount)s
     WHERE address = %(address)s AND asset = %(asset)s
    RETURNING balance"""


async def fund(tx: Tx, account: Account, amount: int) -> int:
    """Add to the balance of an open account; returns the new balance."""
    row = await (
        await tx.execute(_FUND, {"address": account[0], "asset": account[1], "amount": Decimal(amount)})
    ).fetchone()
    if row is None:
        raise InvariantError(f"the sandbox account {account} was not opened")
    return int(row[0])


_BALANCE: LiteralString = (
    "SELECT balance FROM sandbox_account WHERE address = %(address)s AND asset = %(asset)s"
)


async def balance(tx: Tx, account: Account) -> int:
    """What an address holds; one never seen holds its first balance already."""
    row = await (await tx.execute(_BALANCE, {"address": account[0], "asset": account[1]})).fetchone()
    return FIRST_BALANCE if row is None else int(row[0])


@dataclass(frozen=True, slots=True)
class Transfer:
    """A reserved payment to be made. Its postings and its new status are written with it or not at all."""

    payment_key: bytes
    owner: str
    owner_epoch: int
    asset: str
    payer: str
    recipient: str
    amount: int
    transaction_hash: str
    postings: tuple[Posting, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """The transfer is made; ``now`` False: it had been before."""

    transaction_hash: str
    now: bool


@dataclass(frozen=True, slots=True)
class NotMade:
    """Nothing moved. ``failure``: ``insufficient_funds``, or the status in which the payment was found instead of reserved."""

    failure: str


_LOCK: LiteralString = """
    SELECT a.address, a.asset, a.balance
      FROM sandbox_account a
      JOIN unnest(%(addresses)b::text[], %(assets)b::text[]) AS w (address, asset)
        ON a.address = w.address AND a.asset = w.asset
     ORDER BY a.address, a.asset
       FOR UPDATE OF a"""

# One statement for the payments' status, the transfers, the balances (one change per account, however many payments
# touch it) and the book. Only payments that are still reserved by their owner are settled.
_MAKE: LiteralString = """
    WITH asked AS (
        SELECT * FROM unnest(%(keys)b::bytea[], %(owners)b::text[], %(epochs)b::bigint[], %(hashes)b::text[], %(assets)b::text[],
                             %(payers)b::text[], %(recipients)b::text[], %(amounts)b::numeric[])
               AS w (key, owner, epoch, hash, asset, payer, recipient, amount)),
    claimed AS (
        UPDATE payment p
           SET status = 'settled', transaction_hash = a.hash, settled_at = now()
          FROM asked a
         WHERE p.payment_key = a.key AND p.status = 'reserved' AND p.owner = a.owner AND p.owner_epoch = a.epoch
        RETURNING p.payment_key, a.hash, a.asset, a.payer, a.recipient, a.amount),
    transferred AS (
        INSERT INTO sandbox_transfer (payment_key, transaction_hash, asset, payer, recipient, amount)
        SELECT payment_key, hash, asset, payer, recipient, amount FROM claimed),
    moved AS (
        UPDATE sandbox_account s
           SET balance = s.balance + m.amount
          FROM (SELECT address, asset, sum(amount) AS amount
                  FROM (SELECT payer AS address, asset, -amount AS amount FROM claimed
                        UNION ALL
                        SELECT recipient, asset, amount FROM claimed) AS legs
                 GROUP BY address, asset) AS m
         WHERE s.address = m.address AND s.asset = m.asset),
    booked AS (
        INSERT INTO posting (entry, leg, kind, source, destination, asset, amount, reference)
        SELECT b.entry, b.leg, b.kind, b.source, b.destination, b.asset, b.amount, b.reference
          FROM unnest(%(posting_keys)b::bytea[], %(entries)b::text[], %(legs)b::smallint[], %(kinds)b::text[],
                      %(sources)b::text[], %(destinations)b::text[], %(posting_assets)b::text[], %(posting_amounts)b::numeric[],
                      %(references)b::text[])
               AS b (key, entry, leg, kind, source, destination, asset, amount, reference)
          JOIN claimed c ON c.payment_key = b.key)
    SELECT payment_key FROM claimed"""

_FAIL: LiteralString = """
    UPDATE payment p
       SET status = 'failed', failure = 'insufficient_funds'
      FROM unnest(%(keys)b::bytea[], %(owners)b::text[], %(epochs)b::bigint[]) AS a (key, owner, epoch)
     WHERE p.payment_key = a.key AND p.status = 'reserved' AND p.owner = a.owner AND p.owner_epoch = a.epoch"""

_STATUS: LiteralString = (
    "SELECT payment_key, status, transaction_hash FROM payment WHERE payment_key = ANY(%(keys)s)"
)


async def make(tx: Tx, asked: Sequence[Transfer]) -> dict[bytes, Made | NotMade]:
    """Make reserved payments, inside the caller's transaction; a payer without the money fails alone.

    Every account must have been opened. Balances are locked in the order of their addresses and decided on in the
    order of the keys, so the verdicts do not depend on who else is paying.
    """
    transfers = sorted({t.payment_key: t for t in asked}.values(), key=lambda t: t.payment_key)
    balances = await _locked(tx, transfers)
    funded, short = [], []
    for t in transfers:
        if balances[t.payer, t.asset] >= t.amount:
            balances[t.payer, t.asset] -= t.amount
            balances[t.recipient, t.asset] += t.amount
            funded.append(t)
        else:
            short.append(t)
    verdicts: dict[bytes, Made | NotMade] = {}
    if funded:
        made = {bytes(row[0]) for row in await (await tx.execute(_MAKE, _columns(funded))).fetchall()}
        verdicts = {
            t.payment_key: Made(t.transaction_hash, now=True) for t in funded if t.payment_key in made
        }
    if short:
        await tx.execute(_FAIL, _columns(short))
    if rest := [t.payment_key for t in transfers if t.payment_key not in verdicts]:
        # Whether just failed or ended by an earlier attempt: the row says what is true.
        for key, status, transaction_hash in await (await tx.execute(_STATUS, {"keys": rest})).fetchall():
            if status in ("settled", "refunded"):
                verdicts[bytes(key)] = Made(transaction_hash, now=False)
            else:
                verdicts[bytes(key)] = NotMade("insufficient_funds" if status == "failed" else status)
    return verdicts


@dataclass(frozen=True, slots=True)
class TransferBack:
    """A settled payment to give back. ``reason`` is kept with it."""

    payment_key: bytes
    transfer_key: bytes  # of the transfer that gives it back
    asset: str
    payer: str
    recipient: str
    amount: int
    transaction_hash: str
    postings: tuple[Posting, ...]
    reason: str


# As _MAKE, turned round. A payment whose one re-run was claimed is being served again, so it is not given back as well.
_GIVE_BACK: LiteralString = """
    WITH claimed AS (
        UPDATE payment p
           SET status = 'refunded',
               metadata = p.metadata || jsonb_build_object('refund', jsonb_build_object(
                   'transaction', %(hash)s::text, 'reason', %(reason)s::text, 'refunded_at', now()))
         WHERE p.payment_key = %(key)s AND p.status = 'settled' AND NOT p.metadata ? 'rerun'
        RETURNING p.payment_key),
    transferred AS (
        INSERT INTO sandbox_transfer (payment_key, transaction_hash, asset, payer, recipient, amount)
        SELECT %(transfer_key)s, %(hash)s, %(asset)s, %(recipient)s, %(payer)s, %(amount)s FROM claimed),
    moved AS (
        UPDATE sandbox_account s
           SET balance = s.balance + m.amount
          FROM (SELECT address, sum(amount) AS amount
                  FROM (SELECT %(recipient)s::text AS address, -%(amount)s::numeric AS amount FROM claimed
                        UNION ALL
                        SELECT %(payer)s::text, %(amount)s::numeric FROM claimed) AS legs
                 GROUP BY address) AS m
         WHERE s.address = m.address AND s.asset = %(asset)s),
    booked AS (
        INSERT INTO posting (entry, leg, kind, source, destination, asset, amount, reference)
        SELECT b.entry, b.leg, b.kind, b.source, b.destination, b.asset, b.amount, b.reference
          FROM claimed, unnest(%(entries)s::text[], %(legs)s::smallint[], %(kinds)s::text[], %(sources)s::text[],
                               %(destinations)s::text[], %(posting_assets)s::text[], %(posting_amounts)s::numeric[],
                               %(references)s::text[])
               AS b (entry, leg, kind, source, destination, asset, amount, reference))
    SELECT payment_key FROM claimed"""

_REFUND_OF: LiteralString = (
    "SELECT status, metadata -> 'refund' ->> 'transaction' FROM payment WHERE payment_key = %(key)s"
)


async def give_back(tx: Tx, back: TransferBack) -> Made | NotMade:
    """Give a settled payment back, inside the caller's transaction. Both accounts were opened when it was made.

    ``NotMade``: ``insufficient_funds`` of the recipient, or the status in which the payment was found."""
    asked = Transfer(
        back.payment_key,
        "",
        0,
        back.asset,
        back.payer,
        back.recipient,
        back.amount,
        back.transaction_hash,
        (),
    )
    balances = await _locked(tx, [asked])
    status, refund = await _refund_of(tx, back.payment_key)
    if status == "refunded" and refund is not None:
        return Made(refund, now=False)
    if balances[back.recipient, back.asset] < back.amount:
        return NotMade("insufficient_funds")
    postings = back.postings
    cursor = await tx.execute(
        _GIVE_BACK,
        {
            "key": back.payment_key,
            "transfer_key": back.transfer_key,
            "hash": back.transaction_hash,
            "reason": back.reason,
            "asset": back.asset,
            "payer": back.payer,
            "recipient": back.recipient,
            "amount": Decimal(back.amount),
            "entries": [p.entry for p in postings],
            "legs": [p.leg for p in postings],
            "kinds": [p.kind for p in postings],
            "sources": [p.source for p in postings],
            "destinations": [p.destination for p in postings],
            "posting_assets": [p.asset for p in postings],
            "posting_amounts": [Decimal(p.amount) for p in postings],
            "references": [p.reference for p in postings],
        },
    )
    if await cursor.fetchone() is not None:
        return Made(back.transaction_hash, now=True)
    return NotMade(status)


async def _refund_of(tx: Tx, payment_key: bytes) -> tuple[str, str | None]:
    row = await (await tx.execute(_REFUND_OF, {"key": payment_key})).fetchone()
    if row is None:
        raise InvariantError("a payment to be given back is not there")
    return row[0], row[1]


async def _locked(tx: Tx, transfers: Sequence[Transfer]) -> dict[Account, int]:
    accounts = sorted({(t.payer, t.asset) for t in transfers} | {(t.recipient, t.asset) for t in transfers})
    cursor = await tx.execute(
        _LOCK, {"addresses": [a for a, _ in accounts], "assets": [t for _, t in accounts]}
    )
    balances = {(address, asset): int(amount) for address, asset, amount in await cursor.fetchall()}
    if len(balances) != len(accounts):
        raise InvariantError("a sandbox account was not opened before it was used")
    return balances


def _columns(transfers: Sequence[Transfer]) -> dict[str, list[object]]:
    booked = [(t.payment_key, posting) for t in transfers for posting in t.postings]
    return {
        "keys": [t.payment_key for t in transfers],
        "owners": [t.owner for t in transfers],
        "epochs": [t.owner_epoch for t in transfers],
        "hashes": [t.transaction_hash for t in transfers],
        "assets": [t.asset for t in transfers],
        "payers": [t.payer for t in transfers],
        "recipients": [t.recipient for t in transfers],
        "amounts": [t.amount for t in transfers],
        "posting_keys": [key for key, _ in booked],
        "entries": [p.entry for _, p in booked],
        "legs": [p.leg for _, p in booked],
        "kinds": [p.kind for _, p in booked],
        "sources": [p.source for _, p in booked],
        "destinations": [p.destination for _, p in booked],
        "posting_assets": [p.asset for _, p in booked],
        "posting_amounts": [p.amount for _, p in booked],
        "references": [p.reference for _, p in booked],
    }
