"""Who pays. Personal data can be erased; the books stay."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from farebox.base.errors import Reason, Refused
from farebox.base.ids import CustomerId
from farebox.base.money import Asset
from farebox.base.time import zone_named

NAME_CHARACTERS_MAX: Final = 200
EMAIL_CHARACTERS_MAX: Final = 254
METADATA_KEYS_MAX: Final = 50
METADATA_VALUE_CHARACTERS_MAX: Final = 500

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,99}\Z", re.ASCII)
_EMAIL = re.compile(r"[^@\s\x00]+@[^@\s\x00]+\Z")


@dataclass(frozen=True, slots=True)
class Customer:
    """``currency`` None takes the plan's; ``timezone`` is an IANA name and decides where billing days begin.

    ``billing`` is ``{provider}``, ``payment_method`` the provider's references; Farebox holds no card data.
    """

    id: CustomerId
    name: str
    email: str | None = None
    currency: str | None = None
    timezone: str = "UTC"
    billing: Mapping[str, Any] = field(default_factory=dict)
    payment_method: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime | None = None
    updated_at: datetime | None = None
    erased_at: datetime | None = None


def check_customer(customer: Customer) -> None:
    """Raise ``Refused`` with every fault of ``customer_faults``, or return."""
    if faults := customer_faults(customer):
        raise Refused(*faults)


def customer_faults(customer: Customer) -> list[Reason]:
    """Everything wrong with what was said about a customer."""
    return list(_faults(customer))


def erase(customer: Customer, at: datetime) -> Customer:
    """The customer without personal data. The id stays, because postings and invoices name it."""
    return dataclasses.replace(
        customer,
        name="erased",
        email=None,
        billing={},
        payment_method={},
        metadata={},
        updated_at=at,
        erased_at=at,
    )


def _faults(customer: Customer) -> Iterator[Reason]:
    if not _ID.match(customer.id):
        yield Reason(
            "CUSTOMER_ID_MALFORMED",
            "an id has 1 to 100 letters, digits or _ . : @ - and begins with a letter or digit",
            "id",
        )
    if not customer.name.strip() or len(customer.name) > NAME_CHARACTERS_MAX or "\x00" in customer.name:
        yield Reason("NAME_MALFORMED", f"a name of 1 to {NAME_CHARACTERS_MAX} characters is needed", "name")
    if customer.email is not None and not _plausible_email(customer.email):
        yield Reason("EMAIL_MALFORMED", "this is not an e-mail address", "email")
    if customer.currency is not None:
        yield from _refusal(Asset.named, customer.currency, "currency")
    yield from _refusal(zone_named, customer.timezone, "timezone")
    yield from _metadata_faults(customer.metadata)


def _plausible_email(email: str) -> bool:
    return len(email) <= EMAIL_CHARACTERS_MAX and _EMAIL.match(email) is not None


def _refusal(read: Any, text: str, path: str) -> Iterator[Reason]:
    try:
        read(text)
    except Refused as refused:
        yield dataclasses.replace(refused.reason, field=path)


def _metadata_faults(metadata: Mapping[str, str]) -> Iterator[Reason]:
    if len(metadata) > METADATA_KEYS_MAX:
        yield Reason("METADATA_TOO_LARGE", f"at most {METADATA_KEYS_MAX} keys", "metadata")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(value) > METADATA_VALUE_CHARACTERS_MAX or "\x00" in key + value:
            yield Reason(
                "METADATA_MALFORMED",
                f"a text of at most {METADATA_VALUE_CHARACTERS_MAX} characters",
                f"metadata.{key}",
            )
