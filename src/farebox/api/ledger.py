"""The book: postings, and what they come to."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Admin,
    Answer,
    Cursor,
    Limit,
    Listed,
    Reader,
    listed,
    moment,
    router,
)
from farebox.app.books import AuditEntry, Balance, Books, StoredPosting


class PostingAnswer(Answer):
    """`amount` whole minor units of `asset` moved from `source` to `destination`."""

    id: int
    entry: str
    leg: int
    kind: str
    source: str
    destination: str
    asset: str
    amount: int
    reference: str
    booked_at: str


class BalanceAnswer(Answer):
    """What came into an account less what went out. Over all accounts each asset comes to zero."""

    account: str
    asset: str
    balance: int


def posting_answer(stored: StoredPosting) -> PostingAnswer:
    p = stored.posting
    return PostingAnswer(
        id=stored.id,
        entry=p.entry,
        leg=p.leg,
        kind=p.kind,
        source=p.source,
        destination=p.destination,
        asset=p.asset,
        amount=p.amount,
        reference=p.reference,
        booked_at=moment(stored.booked_at),
    )


def balance_answer(balance: Balance) -> BalanceAnswer:
    return BalanceAnswer(account=balance.account, asset=balance.asset, balance=balance.balance)


class AuditAnswer(Answer):
    """Who did what, when."""

    id: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    at: str


def audit_answer(entry: AuditEntry) -> AuditAnswer:
    return AuditAnswer(
        id=entry.id,
        actor=entry.actor,
        action=entry.action,
        subject=entry.subject,
        detail=entry.detail,
        at=moment(entry.at),
    )


def ledger(books: Books) -> APIRouter:
    """``/v1/ledger`` and ``/v1/audit``."""
    api = router("ledger")

    @api.get("/ledger/postings")
    async def list_postings(
        caller: Reader,
        reference: str | None = None,
        account: str | None = None,
        limit: Limit = LIMIT_DEFAULT,
        cursor: Cursor = None,
    ) -> Listed[PostingAnswer]:
        """Newest first; of one reference (a payment, pass or invoice) or one account, if asked."""
        return listed(
            await books.postings(reference=reference, account=account, limit=limit, cursor=cursor),
            posting_answer,
        )

    @api.get("/ledger/balances")
    async def list_balances(
        caller: Reader, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[BalanceAnswer]:
        """By account and asset."""
        return listed(await books.balances(limit=limit, cursor=cursor), balance_answer)

    @api.get("/audit")
    async def list_audit(
        caller: Admin, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[AuditAnswer]:
        """Who did what, newest first."""
        return listed(await books.audit(limit=limit, cursor=cursor), audit_answer)

    return api
