"""Every posting moves an amount from one account to another, so the book sums to zero whatever is booked."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import InvariantError
from farebox.base.money import Asset, Money
from farebox.domain.ledger import (
    Posting,
    account_revenue,
    balances,
    exact_fare_settled,
    exact_revenue,
    invoice_issued,
    pass_revenue,
    pass_sold,
    receivable,
    wallet,
)

SEPOLIA, ADDRESS, ASSET = "eip155:84532", "0xAbCd000000000000000000000000000000000001", "sandbox:usdc"
NAMES = st.sampled_from(["a", "b", "c"])
AMOUNTS = st.integers(1, 10**78)

ENTRIES = st.one_of(
    st.builds(exact_fare_settled, NAMES, NAMES, st.just(SEPOLIA), st.just(ADDRESS), st.just(ASSET), AMOUNTS),
    st.builds(pass_sold, NAMES, NAMES, st.just(SEPOLIA), st.just(ADDRESS), st.just(ASSET), AMOUNTS, NAMES),
    st.builds(
        invoice_issued,
        NAMES,
        NAMES,
        st.builds(Money, st.integers(-(10**78), 10**78), st.just(Asset.named("USD"))),
    ),
)


@given(st.lists(ENTRIES, max_size=20))
def test_the_book_sums_to_zero_in_every_asset(entries: list[tuple[Posting, ...]]) -> None:
    totals: Counter[str] = Counter()
    for (_, asset), balance in balances(p for entry in entries for p in entry).items():
        totals[asset] += balance

    assert set(totals.values()) <= {0}


@given(st.lists(ENTRIES, max_size=20), st.randoms())
def test_the_order_of_booking_does_not_matter(entries: list[tuple[Posting, ...]], random: object) -> None:
    postings = [p for entry in entries for p in entry]
    shuffled = list(postings)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert balances(shuffled) == balances(postings)


def test_an_exact_fare_goes_from_the_routes_revenue_to_our_wallet() -> None:
    postings = exact_fare_settled("pay_1", "forecast", SEPOLIA, ADDRESS, ASSET, 1000)

    assert postings == (
        Posting(
            "payment:pay_1",
            1,
            "exact_fare",
            "revenue/exact/forecast",
            f"wallet/{SEPOLIA}/{ADDRESS.lower()}",
            ASSET,
            1000,
            "pay_1",
        ),
    )
    assert balances(postings) == {
        (exact_revenue("forecast"), ASSET): -1000,
        (wallet(SEPOLIA, ADDRESS), ASSET): 1000,
    }


def test_a_pass_is_booked_under_its_payment_and_refers_to_the_pass() -> None:
    (posting,) = pass_sold("pay_1", "forecast", SEPOLIA, ADDRESS, ASSET, 250_000, "pas_1")

    assert (posting.entry, posting.kind, posting.reference) == ("payment:pay_1", "pass_sale", "pas_1")
    assert posting.source == pass_revenue("forecast")


def test_an_invoice_makes_the_customer_owe_it() -> None:
    postings = invoice_issued("inv_1", "acme", Money(15775, Asset.named("USD")))

    assert balances(postings) == {
        (receivable("acme"), "USD"): 15775,
        (account_revenue("acme"), "USD"): -15775,
    }
    assert {(p.entry, p.kind, p.reference) for p in postings} == {("invoice:inv_1", "invoice", "inv_1")}


def test_an_invoice_that_gives_back_moves_the_other_way() -> None:
    usd = Asset.named("USD")
    postings = (
        *invoice_issued("inv_1", "acme", Money(500, usd)),
        *invoice_issued("inv_2", "acme", Money(-500, usd)),
    )

    assert set(balances(postings).values()) == {0}
    assert all(p.amount == 500 for p in postings)


def test_an_invoice_over_nothing_moves_nothing() -> None:
    assert invoice_issued("inv_1", "acme", Money(0, Asset.named("USD"))) == ()


def test_an_amount_that_is_not_positive_stops_the_line() -> None:
    with pytest.raises(InvariantError):
        exact_fare_settled("pay_1", "forecast", SEPOLIA, ADDRESS, ASSET, -1)
    with pytest.raises(InvariantError):
        Posting("e", 1, "invoice", "a", "b", "USD", 0, "r")


def test_an_account_cannot_pay_itself_and_needs_a_whole_name() -> None:
    with pytest.raises(InvariantError):
        Posting("e", 1, "invoice", "a", "a", "USD", 1, "r")
    with pytest.raises(InvariantError):
        receivable("")


def test_an_evm_wallet_is_one_account_however_its_address_is_written() -> None:
    assert wallet(SEPOLIA, ADDRESS) == wallet(SEPOLIA, ADDRESS.lower())
    assert wallet("stellar:testnet", "GABC") == "wallet/stellar:testnet/GABC"
