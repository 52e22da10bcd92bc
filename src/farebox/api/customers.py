"""Customers and their gateway keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field

from farebox.api.resource import (
    LIMIT_DEFAULT,
    Answer,
    Body,
    Cursor,
    Limit,
    Listed,
    NoBody,
    Reader,
    Writer,
    listed,
    moment,
    moment_or_none,
    router,
)
from farebox.app.customers import Customer, CustomerKey, Customers
from farebox.app.documents.faults import Document
from farebox.app.documents.scalars import Currency, Name, ShortText, TimeZone
from farebox.base.ids import CustomerId


class BillingDocument(Document):
    """Who charges this customer."""

    provider: Name | None = None


class PaymentMethodDocument(Document):
    """The card provider's references; Farebox holds no card data."""

    provider_customer_id: Name | None = None
    provider_payment_method: Name | None = None


class CustomerFields(Body):
    """What may be said of a customer."""

    not_yet: ClassVar[Mapping[str, str]] = {"tax_rates": "tax rates are"}

    email: ShortText | None = None
    currency: Currency | None = None
    billing: BillingDocument = BillingDocument()
    payment_method: PaymentMethodDocument = PaymentMethodDocument()
    metadata: Annotated[dict[str, str], Field(default_factory=dict)]

    def values(self) -> dict[str, Any]:
        """The fields that were given, as the use case takes them."""
        given: dict[str, Any] = {}
        for name in self.model_fields_set - {"idempotency_key", "id"}:
            value = getattr(self, name)
            if isinstance(value, Document):
                value = value.model_dump(exclude_none=True)
            elif name == "currency" and value is not None:
                value = value.code
            given[name] = value
        return given


class NewCustomer(CustomerFields):
    """A customer under an id of your choice."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    name: Name
    timezone: TimeZone = "UTC"


class CustomerPatch(CustomerFields):
    """What is given replaces what was; what is not stays."""

    name: Name = ""
    timezone: TimeZone = ""


class CustomerAnswer(Answer):
    """A customer."""

    id: str
    name: str
    email: str | None
    currency: str | None
    timezone: str
    billing: dict[str, Any]
    payment_method: dict[str, Any]
    metadata: dict[str, str]
    created_at: str | None
    updated_at: str | None
    erased_at: str | None


class NewKeyAnswer(Answer):
    """The only answer that shows the key."""

    key_id: str
    key: str
    customer_id: str
    created_at: str


class CustomerKeyAnswer(Answer):
    """A key without its secret; ``hint`` are its last characters."""

    key_id: str
    customer_id: str
    hint: str
    created_at: str
    revoked_at: str | None


def customer_answer(customer: Customer) -> CustomerAnswer:
    return CustomerAnswer(
        id=customer.id,
        name=customer.name,
        email=customer.email,
        currency=customer.currency,
        timezone=customer.timezone,
        billing=dict(customer.billing),
        payment_method=dict(customer.payment_method),
        metadata=dict(customer.metadata),
        created_at=moment_or_none(customer.created_at),
        updated_at=moment_or_none(customer.updated_at),
        erased_at=moment_or_none(customer.erased_at),
    )


def key_answer(key: CustomerKey) -> CustomerKeyAnswer:
    return CustomerKeyAnswer(
        key_id=key.id,
        customer_id=key.customer_id,
        hint=key.hint,
        created_at=moment(key.created_at),
        revoked_at=moment_or_none(key.revoked_at),
    )


def customers(customers: Customers) -> APIRouter:
    """``/v1/customers``."""
    api = router("customers")

    @api.post("/customers", status_code=201)
    async def create_customer(caller: Writer, body: NewCustomer) -> CustomerAnswer:
        customer = Customer(CustomerId(body.id), **body.values())
        return customer_answer(await customers.create(caller.actor, customer, within=caller.within))

    @api.get("/customers")
    async def list_customers(
        caller: Reader, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[CustomerAnswer]:
        return listed(await customers.list(limit, cursor), customer_answer)

    @api.get("/customers/{customer_id}")
    async def get_customer(caller: Reader, customer_id: str) -> CustomerAnswer:
        return customer_answer(await customers.get(customer_id))

    @api.patch("/customers/{customer_id}")
    async def patch_customer(caller: Writer, customer_id: str, body: CustomerPatch) -> CustomerAnswer:
        return customer_answer(
            await customers.patch(caller.actor, customer_id, body.values(), within=caller.within)
        )

    @api.delete("/customers/{customer_id}")
    async def erase_customer(caller: Writer, customer_id: str) -> CustomerAnswer:
        """Erase the personal data, end every key, keep the books."""
        return customer_answer(await customers.erase(caller.actor, customer_id, within=caller.within))

    @api.post("/customers/{customer_id}/keys", status_code=201)
    async def create_customer_key(
        caller: Writer, customer_id: str, body: NoBody | None = None
    ) -> NewKeyAnswer:
        """A gateway key `fbx_ck_…`, shown this once."""
        made = await customers.create_key(caller.actor, customer_id, within=caller.within)
        return NewKeyAnswer(
            key_id=made.key_id,
            key=made.key,
            customer_id=customer_id,
            created_at=moment(made.record.created_at),
        )

    @api.get("/customers/{customer_id}/keys")
    async def list_customer_keys(
        caller: Reader, customer_id: str, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
    ) -> Listed[CustomerKeyAnswer]:
        return listed(await customers.list_keys(customer_id, limit, cursor), key_answer)

    @api.delete("/customers/{customer_id}/keys/{key_id}", status_code=204)
    async def revoke_customer_key(caller: Writer, customer_id: str, key_id: str) -> None:
        """End a key now, at every gateway."""
        await customers.revoke_key(caller.actor, customer_id, key_id, within=caller.within)

    return api
