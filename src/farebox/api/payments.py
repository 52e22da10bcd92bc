"""402 payments, to read."""

from __future__ import annotations

from fastapi import APIRouter

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Cursor,
    Limit,
    Listed,
    Reader,
    listed,
    moment,
    moment_or_none,
    router,
)
from farebox.app.books import Books, ListedPayment


class PaymentAnswer(Answer):
    """A payment. `amount` is in minor units of `asset` (the token on the wire); `book_asset` is its name in the book."""

    id: str
    status: str
    flow: str
    fare: str
    network: str
    scheme: str
    asset: str
    book_asset: str
    amount: int
    payer_address: str
    recipient_address: str
    route: str
    resource_path: str
    transaction_hash: str | None
    failure: str | None
    created_at: str
    settled_at: str | None


def payment_answer(payment: ListedPayment) -> PaymentAnswer:
    return PaymentAnswer(
        id=payment.id,
        status=payment.status,
        flow=payment.flow,
        fare=payment.fare,
        network=payment.network,
        scheme=payment.scheme,
        asset=payment.asset,
        book_asset=payment.book_asset,
        amount=payment.amount,
        payer_address=payment.payer_address,
        recipient_address=payment.recipient_address,
        route=payment.route_id,
        resource_path=payment.resource_path,
        transaction_hash=payment.transaction_hash,
        failure=payment.failure,
        created_at=moment(payment.created_at),
        settled_at=moment_or_none(payment.settled_at),
    )


def payments(books: Books) -> APIRouter:
    """``/v1/payments``."""
    api = router("payments")

    @api.get("/payments")
    async def list_payments(
        caller: Reader,
        payer: str | None = None,
        status: str | None = None,
        limit: Limit = LIMIT_DEFAULT,
        cursor: Cursor = None,
    ) -> Listed[PaymentAnswer]:
        """Newest first."""
        return listed(
            await books.payments(payer=payer, status=status, limit=limit, cursor=cursor), payment_answer
        )

    @api.get("/payments/{payment_id}")
    async def get_payment(caller: Reader, payment_id: str) -> PaymentAnswer:
        return payment_answer(await books.payment(payment_id))

    return api
