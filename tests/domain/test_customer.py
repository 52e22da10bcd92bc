"""A customer is checked as a whole, and can be forgotten while the books stay."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from farebox.base.errors import Refused
from farebox.base.ids import CustomerId
from farebox.domain.customer import Customer, check_customer, customer_faults, erase

ACME = Customer(
    CustomerId("acme"), "Acme GmbH", "billing@acme.example", "EUR", "Europe/Berlin", metadata={"crm": "4711"}
)


def test_a_good_customer_has_no_fault() -> None:
    check_customer(ACME)


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"id": ""}, "id", "CUSTOMER_ID_MALFORMED"),
        ({"id": "a/b"}, "id", "CUSTOMER_ID_MALFORMED"),
        ({"name": " "}, "name", "NAME_MALFORMED"),
        ({"name": "x" * 201}, "name", "NAME_MALFORMED"),
        ({"email": "nobody"}, "email", "EMAIL_MALFORMED"),
        ({"email": "a b@c"}, "email", "EMAIL_MALFORMED"),
        ({"email": "a@" + "b" * 260}, "email", "EMAIL_MALFORMED"),
        ({"currency": "UDS"}, "currency", "ASSET_UNKNOWN"),
        ({"timezone": "Berlin"}, "timezone", "TIMEZONE_UNKNOWN"),
        ({"metadata": {"k": 1}}, "metadata.k", "METADATA_MALFORMED"),
        ({"metadata": {"k": "\0"}}, "metadata.k", "METADATA_MALFORMED"),
        ({"metadata": {str(n): "" for n in range(51)}}, "metadata", "METADATA_TOO_LARGE"),
    ],
)
def test_a_fault_is_named_with_its_field(change: dict[str, Any], field: str, code: str) -> None:
    assert [(r.field, r.code) for r in customer_faults(dataclasses.replace(ACME, **change))] == [
        (field, code)
    ]


def test_all_faults_come_at_once() -> None:
    with pytest.raises(Refused) as refused:
        check_customer(dataclasses.replace(ACME, name="", email="x", timezone="Mars"))
    assert [r.field for r in refused.value.reasons] == ["name", "email", "timezone"]


def test_an_erased_customer_keeps_only_what_the_books_need() -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    erased = erase(dataclasses.replace(ACME, payment_method={"provider_customer_id": "cus_1"}), now)

    assert (erased.id, erased.currency, erased.timezone) == (ACME.id, "EUR", "Europe/Berlin")
    assert (erased.email, dict(erased.metadata), dict(erased.payment_method)) == (None, {}, {})
    assert "Acme" not in repr(erased)
    assert erased.erased_at == now
