"""An invoice adds up or does not exist; once issued it only moves along its table."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError, Refused
from farebox.base.ids import CustomerId, InvoiceId, SubscriptionId
from farebox.base.money import Asset, Money
from farebox.base.time import Period
from farebox.domain.catalog import Charge, FlatFee
from farebox.domain.invoice import TRANSITIONS, Event, Invoice, Status, after, draft, invoice_number, issue
from farebox.domain.rating import rate
from tests.domain.strategies import CURRENCIES, KEYS, QUANTITIES, charges

USD = Asset.named("USD")
NOVEMBER = Period(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC))
NOW = datetime(2026, 12, 1, 6, tzinfo=UTC)


def drafted(some: tuple[Charge, ...], usage: dict[str, Decimal], currency: Asset = USD) -> Invoice:
    rating = rate(currency, some, usage)
    rated = [(SubscriptionId("sub_1"), line) for line in rating.lines]
    return draft(InvoiceId("inv_1"), CustomerId("acme"), currency, NOVEMBER, rated, NOW)


@given(charges(), st.dictionaries(KEYS, QUANTITIES), CURRENCIES)
def test_the_invoice_of_a_rating_is_worth_what_the_rating_says(
    some: tuple[Charge, ...], usage: dict[str, Decimal], currency: Asset
) -> None:
    invoice = drafted(some, usage, currency)

    assert invoice.total == rate(currency, some, usage).total == invoice.subtotal
    assert [line.line for line in invoice.lines] == list(range(1, len(some) + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"subtotal": Money(1, USD)},
        {"total": Money(1, USD)},
        {"tax": Money(1, USD)},
        {"number": "FB-000001"},
        {"status": Status.ISSUED},
    ],
)
def test_an_invoice_that_does_not_add_up_stops_the_line(change: dict[str, object]) -> None:
    with pytest.raises(InvariantError):
        dataclasses.replace(drafted((), {}), **change)  # type: ignore[arg-type]


def test_an_invoice_with_a_lost_line_stops_the_line() -> None:
    invoice = drafted((Charge("a", None, FlatFee(Decimal(1))), Charge("b", None, FlatFee(Decimal(2)))), {})

    with pytest.raises(InvariantError):
        dataclasses.replace(invoice, lines=invoice.lines[:1])
    with pytest.raises(InvariantError):
        dataclasses.replace(invoice, lines=invoice.lines[::-1])


def test_issuing_gives_a_draft_its_number_once() -> None:
    issued = issue(drafted((), {}), "FB-000001", NOW)

    assert (issued.status, issued.number, issued.issued_at) == (Status.ISSUED, "FB-000001", NOW)
    with pytest.raises(Refused) as refused:
        issue(issued, "FB-000002", NOW)
    assert refused.value.reason.code == "INVOICE_STATE"


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("event", Event)
def test_what_the_table_lacks_is_refused(status: Status, event: Event) -> None:
    following = TRANSITIONS[status].get(event)
    if following is None:
        with pytest.raises(Refused):
            after(status, event)
    else:
        assert after(status, event) is following


def test_only_a_draft_is_issued_and_only_an_issued_invoice_ends() -> None:
    assert TRANSITIONS[Status.DRAFT] == {Event.ISSUE: Status.ISSUED}
    assert set(TRANSITIONS[Status.ISSUED].values()) == {Status.PAID, Status.ARCHIVED, Status.VOID}
    assert all(not TRANSITIONS[end] for end in (Status.PAID, Status.ARCHIVED, Status.VOID))


@pytest.mark.parametrize(
    ("series", "count", "number"),
    [
        ("FB", 1, "FB-000001"),
        ("FB", 999999, "FB-999999"),
        ("FB", 1000000, "FB-1000000"),
        ("2026A", 12, "2026A-000012"),
    ],
)
def test_a_number_is_its_series_and_its_place(series: str, count: int, number: str) -> None:
    assert invoice_number(series, count) == number


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_different_places_have_different_numbers(a: int, b: int) -> None:
    assert (invoice_number("FB", a) == invoice_number("FB", b)) == (a == b)


@pytest.mark.parametrize("series", ["", "fb", "F B", "F-B", "A" * 13])
def test_a_series_with_other_characters_is_refused(series: str) -> None:
    with pytest.raises(Refused):
        invoice_number(series, 1)


def test_numbers_count_from_one() -> None:
    with pytest.raises(InvariantError):
        invoice_number("FB", 0)
