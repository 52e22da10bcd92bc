"""Usage is priced, frozen and invoiced once: also while events are held open, invoices race and processes die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from farebox.app.billing import Billing, InvoiceView
from farebox.base.errors import Reason, Refused
from farebox.base.money import Asset
from farebox.base.time import Interval, Period
from farebox.domain.catalog import Charge, FlatFee, Package, PerUnit, Tier, Tiered, Volume
from farebox.domain.invoice import invoice_number
from farebox.store.pool import Database
from tests.app.office import USD, Office, at, period

NOVEMBER = period("2026-11-01", "2026-12-01")
HOLDER = Path(__file__).with_name("invoice_holder.py")


@pytest.fixture
async def office(database_url: str) -> AsyncIterator[Office]:
    async with await Database.open(database_url, size_max=24, name="test") as database:
        opened = Office(database, today="2026-12-02")
        yield opened
        await opened.close()


async def refusal(coroutine: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await coroutine  # type: ignore[misc]
    return caught.value.reason


def amounts(view: InvoiceView) -> list[tuple[str, str]]:
    return [(line.rated.charge_id, str(line.amount)) for line in view.invoice.lines]


async def test_a_month_is_calculated_issued_and_booked(office: Office):
    await office.opened()
    for value, day in (("1000", "02"), ("374", "30")):
        await office.used(value, f"2026-11-{day}T23:59")
    await office.used("5", "2026-12-01")
    await office.used("5", "2026-10-31")

    calculated = await office.billing.calculate("acme", NOVEMBER)
    issued = await office.billing.issue("test", "acme", at("2026-12-01"), calculated.id)

    assert [(line.rated.quantity, line.amount.units) for line in calculated.lines] == [
        (1374, 1374),
        (1, 4900),
    ]
    assert [line.rated for line in issued.invoice.lines] == [line.rated for line in calculated.lines]
    assert issued.invoice.number == invoice_number("FB", 1) == "FB-000001"
    assert (issued.invoice.total.units, issued.invoice.period) == (6274, NOVEMBER)
    assert issued.late_event_count == 0
    assert (await office.billing.get(issued.invoice.id)) == issued
    balances = {b.account: b.balance for b in (await office.books.balances()).data}
    assert balances == {"receivable/acme": 6274, "revenue/account/acme": -6274}
    [entry] = (await office.billing.audit(issued.invoice.id)).data
    assert (entry.actor, entry.action) == ("test", "invoice.issue")


async def test_the_calculation_is_what_is_issued_although_more_came_since(office: Office):
    await office.opened()
    await office.used("10", "2026-11-10")
    calculated = await office.billing.calculate("acme", NOVEMBER)
    await office.used("7", "2026-11-11")
    await office.used("8", "2026-11-12")

    issued = await office.billing.issue("test", "acme", at("2026-12-01"), calculated.id)

    assert amounts(issued) == [("calls", "0.10 USD"), ("base", "49.00 USD")]
    got = await office.billing.get(issued.invoice.id)
    assert [(late.metric_key, late.events, late.value) for late in got.late_usage] == [("api_calls", 2, 15)]
    exact = await office.metering.compute("acme", "api_calls", NOVEMBER)
    assert (exact.value, exact.late_events) == (25, 2)


@pytest.mark.parametrize("with_calculation", [True, False], ids=["calculated", "issued at once"])
async def test_an_event_held_open_while_a_thousand_commit_is_billed_once_or_reported_late(
    office: Office, database_url: str, with_calculation: bool
):
    await office.opened()
    async with await psycopg.AsyncConnection.connect(database_url) as held:
        await held.execute("INSERT INTO ingest_batch (source, row_count) VALUES ('held', 1)")
        await held.execute(
            """INSERT INTO usage_event (event_id, customer_id, metric_key, value, timestamp, batch_id)
               SELECT 'evt_held', 'acme', 'api_calls', 1, '2026-11-15T00:00:00Z', max(id) FROM ingest_batch"""
        )
        events = [office.event("1", "2026-11-20") for _ in range(1000)]
        await asyncio.gather(*(office.metering.accept_one(event) for event in events))
        await office.folded()
        calculated = await office.billing.calculate("acme", NOVEMBER)
        assert calculated.lines[0].rated.quantity == 1000, (
            "what is committed is billed, whoever holds what open"
        )
        if not with_calculation:
            early = await office.billing.issue("test", "acme", at("2026-12-01"))
            assert early.invoice.lines[0].rated.quantity == 1000
        await held.commit()

    if with_calculation:
        await office.billing.issue("test", "acme", at("2026-12-01"), calculated.id)
    await office.folded()

    [listed] = (await office.billing.list("acme")).data
    got = await office.billing.get(listed.invoice.id)
    billed = got.invoice.lines[0].rated.quantity
    assert (billed, got.late_event_count) == (1000, 1)
    assert (
        await office.metering.compute("acme", "api_calls", NOVEMBER)
    ).events == billed + got.late_event_count
    assert (await office.metering.summary("acme", "api_calls", NOVEMBER)).value == 1001


async def test_an_event_committed_before_an_issue_without_calculation_is_in_it(
    office: Office, database_url: str
):
    await office.opened()
    async with await psycopg.AsyncConnection.connect(database_url) as held:
        await held.execute("INSERT INTO ingest_batch (source, row_count) VALUES ('held', 1)")
        await held.execute(
            """INSERT INTO usage_event (event_id, customer_id, metric_key, value, timestamp, batch_id)
               SELECT 'evt_held', 'acme', 'api_calls', 1, '2026-11-15T00:00:00Z', max(id) FROM ingest_batch"""
        )
        for _ in range(20):
            await office.metering.accept_batch([office.event("1", "2026-11-20") for _ in range(50)])
        await office.folded()
        await office.billing.calculate("acme", NOVEMBER)
        await held.commit()

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    assert issued.invoice.lines[0].rated.quantity == 1001
    assert (await office.billing.get(issued.invoice.id)).late_event_count == 0


async def test_events_that_stream_in_while_invoices_are_issued_are_each_billed_once_or_late(office: Office):
    await office.opened()
    stop = asyncio.Event()
    sent = 0

    async def stream() -> None:
        nonlocal sent
        while not stop.is_set():
            await office.metering.accept_batch([office.event("1", "2026-11-20") for _ in range(7)])
            sent += 7

    streams = [asyncio.create_task(stream()) for _ in range(3)]
    await asyncio.sleep(0.1)
    issued = await office.billing.issue("test", "acme", at("2026-12-01"))
    await asyncio.sleep(0.1)
    stop.set()
    await asyncio.gather(*streams)

    got = await office.billing.get(issued.invoice.id)
    assert got.invoice.lines[0].rated.quantity + got.late_event_count == sent
    assert sum(late.value for late in got.late_usage) == got.late_event_count


async def test_twenty_issues_of_one_period_at_once_make_one_invoice_and_no_gap(office: Office):
    await office.opened()
    await office.customer("beta")
    await office.subscribed("beta")
    await office.used("100", "2026-11-10")

    outcomes = await asyncio.gather(
        *(office.billing.issue("test", "acme", at("2026-12-01")) for _ in range(20)), return_exceptions=True
    )
    after = await office.billing.issue("test", "beta", at("2026-12-01"))

    made = [o for o in outcomes if isinstance(o, InvoiceView)]
    refused = [o.reason for o in outcomes if isinstance(o, Refused)]
    assert (len(made), len(refused)) == (1, 19), [
        o for o in outcomes if not isinstance(o, InvoiceView | Refused)
    ]
    assert {(r.code, r.facts["invoice_id"]) for r in refused} == {
        ("PERIOD_ALREADY_INVOICED", made[0].invoice.id)
    }
    assert [made[0].invoice.number, after.invoice.number] == ["FB-000001", "FB-000002"]


async def test_twenty_uses_of_one_calculation_at_once_make_one_invoice(office: Office):
    await office.opened()
    calculated = await office.billing.calculate("acme", NOVEMBER)

    outcomes = await asyncio.gather(
        *(office.billing.issue("test", "acme", at("2026-12-01"), calculated.id) for _ in range(20)),
        return_exceptions=True,
    )

    assert sum(isinstance(o, InvoiceView) for o in outcomes) == 1
    assert {o.reason.code for o in outcomes if isinstance(o, Refused)} == {"PERIOD_ALREADY_INVOICED"}


async def test_numbers_have_no_gap_when_many_customers_are_invoiced_and_some_fail(office: Office):
    await office.metric()
    await office.plan()
    for n in range(12):
        await office.customer(f"c{n}")
        await office.subscribed(f"c{n}")

    async def issue(n: int) -> None:
        try:
            async with office.database.transaction() as tx:
                await office.billing.issue("test", f"c{n}", at("2026-12-01"), within=tx)
                if n % 3 == 0:
                    raise ZeroDivisionError("a fault between the number and the commit")
        except ZeroDivisionError:
            pass

    await asyncio.gather(*(issue(n) for n in range(12)))
    await asyncio.gather(*(office.billing.issue("test", f"c{n}", at("2026-12-01")) for n in (0, 3, 6, 9)))

    numbers = sorted(row[0] for row in await office.rows("SELECT number FROM invoice"))
    assert numbers == [invoice_number("FB", n) for n in range(1, 13)]


async def test_a_process_killed_in_the_middle_of_an_issue_leaves_no_gap_and_no_lock(
    office: Office, database_url: str
):
    await office.opened()
    await office.used("100", "2026-11-10")
    holder = await asyncio.create_subprocess_exec(
        sys.executable, str(HOLDER), database_url, stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert (await holder.stdout.readline()).strip() == b"FB-000001"  # written, not committed
    os.kill(holder.pid, signal.SIGKILL)
    await holder.wait()

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    assert issued.invoice.number == "FB-000001"
    assert len((await office.billing.list()).data) == 1
    assert [p.posting.amount for p in (await office.books.postings()).data] == [5000]


async def test_several_subscriptions_go_into_one_invoice_with_lines_of_each(office: Office):
    await office.opened()
    await office.plan("support", (Charge("support", None, FlatFee(Decimal(10))),))
    second = await office.subscribed(plan_id="support", start="2026-10-15")

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    by_subscription = [
        (
            line.subscription_id == second.subscription.id,
            line.rated.charge_id,
            str(issued.line_periods[line.line].start)[:10],
        )
        for line in issued.invoice.lines
    ]
    assert by_subscription == [
        (False, "calls", "2026-11-01"),
        (False, "base", "2026-11-01"),
        (True, "support", "2026-10-15"),
    ]
    assert issued.invoice.total.units == 4900 + 1000
    assert issued.invoice.period == period("2026-10-15", "2026-12-01")


async def test_the_next_issue_takes_up_where_the_last_one_stopped(office: Office):
    await office.opened()
    await office.used("100", "2026-11-10")
    await office.billing.issue("test", "acme", at("2026-12-01"))
    office.today_is("2027-02-05")
    await office.used("30", "2026-12-10")
    await office.used("40", "2027-01-10")

    issued = await office.billing.issue("test", "acme", at("2027-02-01"))

    assert amounts(issued) == [
        ("calls", "0.30 USD"), ("base", "49.00 USD"), ("calls", "0.40 USD"), ("base", "49.00 USD"),
    ]  # fmt: skip
    assert issued.invoice.number == "FB-000002"


TIERS = (Tier(Decimal(100), Decimal("0.10")), Tier(None, Decimal("0.01")))


@pytest.mark.parametrize(
    "pricing",
    [PerUnit(Decimal("0.033")), Tiered(TIERS), Volume(TIERS), Package(Decimal(50), Decimal(5))],
    ids=lambda pricing: pricing.model,
)
async def test_interim_invoices_and_the_last_one_come_to_what_the_period_costs(
    office: Office, pricing: PerUnit
):
    await office.opened(
        charges=(Charge("calls", "api_calls", pricing), Charge("base", None, FlatFee(Decimal(49))))
    )
    views = []
    for day, value in (("2026-11-10", "90"), ("2026-11-20", "37"), ("2026-12-02", "333")):
        office.today_is(day)
        await office.used(value, "2026-11-09")
        views.append(await office.billing.issue("test", "acme", at("2026-12-15")))

    whole = office.billing.preview(
        USD,
        [Charge("calls", "api_calls", pricing), Charge("base", None, FlatFee(Decimal(49)))],
        {"api_calls": Decimal(460)},
    )
    assert sum(v.invoice.total.units for v in views) == whole.total.units
    assert [v.invoice.period and v.invoice.period.end for v in views][2] == NOVEMBER.end
    assert [v.invoice.lines[1].amount.units for v in views] == [4900, 0, 0]
    assert [(await office.billing.get(v.invoice.id)).late_event_count for v in views] == [0, 0, 0]
    booked = {b.account: b.balance for b in (await office.books.balances()).data}
    assert booked["receivable/acme"] == sum(v.invoice.total.units for v in views)


async def test_a_cutoff_in_the_future_charges_nothing_beyond_the_present(office: Office):
    office.today_is("2026-11-21")
    await office.opened()
    await office.used("10")

    issued = await office.billing.issue("test", "acme", at("2099-01-01"))
    refused = await refusal(office.billing.issue("test", "acme", at("2099-01-01")))

    present = at("2026-11-21") + timedelta(microseconds=1)
    assert issued.invoice.period == Period(at("2026-11-01"), present)
    assert issued.invoice.lines[0].rated.quantity == 10
    assert refused.code == "PERIOD_ALREADY_INVOICED"


async def test_an_invoice_over_nothing_is_issued_when_asked_for_and_moves_nothing(office: Office):
    await office.opened(charges=(Charge("calls", "api_calls", PerUnit(Decimal("0.01"))),))

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    assert (issued.invoice.total.units, issued.invoice.number) == (0, "FB-000001")
    assert (await office.books.postings()).data == ()


async def test_a_stale_calculation_is_refused(office: Office):
    await office.opened()
    calculated = await office.billing.calculate("acme", NOVEMBER)
    await office.plan("extra", (Charge("extra", None, FlatFee(Decimal(1))),))
    await office.subscribed(plan_id="extra", start="2026-11-15")

    reason = await refusal(office.billing.issue("test", "acme", at("2026-12-01"), calculated.id))

    assert reason.code == "CALCULATION_STALE"
    assert (await office.billing.list()).data == ()


async def test_a_new_plan_version_does_not_touch_who_is_pinned_to_the_old_one(office: Office):
    await office.opened()
    await office.used("100", "2026-11-10")
    calculated = await office.billing.calculate("acme", NOVEMBER)
    assert await office.plan(charges=(Charge("calls", "api_calls", PerUnit(Decimal(1))),)) == 2

    issued = await office.billing.issue("test", "acme", at("2026-12-01"), calculated.id)

    assert amounts(issued) == [("calls", "1.00 USD"), ("base", "49.00 USD")]


async def test_calculations_expire_belong_to_one_customer_and_stay_below_the_cutoff(office: Office):
    await office.opened()
    await office.customer("beta")
    await office.subscribed("beta")
    calculated = await office.billing.calculate("acme", NOVEMBER)

    async def refused(
        customer: str = "acme", cutoff: str = "2026-12-01", calculation: str = calculated.id
    ) -> str:
        return (await refusal(office.billing.issue("test", customer, at(cutoff), calculation))).code

    assert await refused(customer="beta") == "CALCULATION_MISMATCH"
    assert await refused(cutoff="2026-11-30") == "CALCULATION_MISMATCH"
    assert await refused(calculation="calc_unknown") == "CALCULATION_NOT_FOUND"
    assert (
        await refused(
            calculation=(await office.billing.calculate("acme", period("2026-11-10", "2026-12-01"))).id
        )
        == "CALCULATION_MISMATCH"
    )
    office.clock.instant += timedelta(hours=24)
    assert await refused() == "CALCULATION_EXPIRED"


async def test_who_has_nothing_to_invoice_is_told_why(office: Office):
    await office.metric()
    await office.plan()
    await office.customer()

    assert (
        await refusal(office.billing.issue("test", "nobody", at("2026-12-01")))
    ).code == "CUSTOMER_NOT_FOUND"
    assert (await refusal(office.billing.issue("test", "acme", at("2026-12-01")))).code == "NO_SUBSCRIPTION"
    assert (await refusal(office.billing.calculate("acme", NOVEMBER))).code == "NO_SUBSCRIPTION"
    await office.subscribed(start="2027-01-01")
    assert (await refusal(office.billing.issue("test", "acme", at("2027-12-01")))).code == "NO_SUBSCRIPTION"
    assert (
        await refusal(office.billing.calculate("acme", period("2027-01-01", "2027-02-01")))
    ).code == "PERIOD_NOT_STARTED"
    assert (
        await refusal(office.billing.calculate("acme", period("2027-01-01", "2027-01-01")))
    ).code == "PERIOD_EMPTY"
    assert (await refusal(office.billing.get("inv_none"))).code == "INVOICE_NOT_FOUND"


async def test_a_subscription_that_ended_is_charged_to_its_end_and_no_further(office: Office):
    await office.metric()
    await office.plan()
    await office.customer()
    await office.subscribed(end=at("2026-11-20"))
    await office.used("10", "2026-11-19")
    await office.used("10", "2026-11-21")

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    assert issued.invoice.period == period("2026-11-01", "2026-11-20")
    assert issued.invoice.lines[0].rated.quantity == 10
    assert (
        await refusal(office.billing.issue("test", "acme", at("2026-12-02")))
    ).code == "PERIOD_ALREADY_INVOICED"


async def test_boundaries_follow_the_zone_the_customer_had_when_it_began(office: Office):
    await office.metric()
    await office.plan(interval=Interval(1, "month"))
    await office.customer(timezone="Europe/Warsaw")
    subscribed = await office.subscriptions.create("test", "acme", "starter", at("2026-09-30T22:00"))
    await office.customers.patch("test", "acme", {"timezone": "Asia/Tokyo"})

    issued = await office.billing.issue("test", "acme", at("2026-11-01"))

    assert subscribed.subscription.timezone == "Europe/Warsaw"
    assert issued.invoice.period == period("2026-09-30T22:00", "2026-10-31T23:00")


async def test_a_period_that_has_ended_is_invoiced_without_the_hours_of_the_next_one(office: Office):
    await office.opened()
    await office.used("10", "2026-11-10")
    await office.used("20", "2026-12-01")

    issued = await office.billing.issue("test", "acme", at("2026-12-01T23:00"))
    interim = await office.billing.issue("test", "acme", at("2026-12-01T23:00"))

    assert (issued.invoice.period, issued.invoice.lines[0].rated.quantity) == (NOVEMBER, 10)
    assert interim.invoice.period == period("2026-12-01", "2026-12-01T23:00")
    assert interim.invoice.lines[0].rated.quantity == 20


async def test_amounts_of_a_currency_without_cents(office: Office):
    yen = Asset("JPY", 0)
    await office.metric()
    await office.plan(charges=(Charge("calls", "api_calls", PerUnit(Decimal("0.5"))),), currency=yen)
    await office.customer()
    await office.subscribed()
    await office.used("2047", "2026-11-10")

    issued = await office.billing.issue("test", "acme", at("2026-12-01"))

    assert (issued.invoice.total.units, str(issued.invoice.total)) == (1024, "1024 JPY")
    assert (await office.customers.get("acme")).currency == "JPY"
    await office.plan("dollars", (), currency=USD)
    assert (await refusal(office.subscribed(plan_id="dollars"))).code == "CURRENCY_MISMATCH"


async def test_preview_needs_no_database_and_names_every_fault():
    charges = [Charge("a", None, PerUnit(Decimal(-1))), Charge("b", "m", FlatFee(Decimal(1)))]
    with pytest.raises(Refused) as caught:
        Billing.preview(USD, charges, {})

    assert [r.field for r in caught.value.reasons] == [
        "charges[0].metric_key", "charges[0].properties.unit_price", "charges[1].metric_key",
    ]  # fmt: skip


async def test_what_is_invoiced_is_paged_newest_first(office: Office):
    await office.opened()
    ids = []
    for month in (1, 2, 3):
        office.today_is(f"2027-0{month}-02")
        ids.append((await office.billing.issue("test", "acme", at(f"2027-0{month}-01"))).invoice.id)
        await asyncio.sleep(0.002)

    first = await office.billing.list("acme", limit=2)
    second = await office.billing.list("acme", limit=2, cursor=first.next_cursor)

    assert [s.invoice.id for s in first.data + second.data] == ids[::-1]
    whole = await office.billing.get(ids[-1])
    assert (first.data[0].invoice, first.data[0].line_periods) == (whole.invoice, whole.line_periods)
    assert second.next_cursor is None
    assert (await refusal(office.billing.list("acme", cursor="%%%"))).code == "CURSOR_INVALID"
    assert (await refusal(office.billing.list("acme", limit=0))).code == "LIMIT_OUT_OF_RANGE"


async def test_many_subscriptions_are_calculated_together_when_their_lines_are_few(office: Office):
    await office.opened()
    await office.plan("wide", tuple(Charge(f"fee-{n}", None, FlatFee(Decimal(1))) for n in range(20)))
    for _ in range(25):
        await office.subscribed(plan_id="wide")

    calculated = await office.billing.calculate("acme", NOVEMBER)

    assert len(calculated.lines) == 25 * 20 + 2


async def test_the_last_period_of_an_erased_customer_is_still_invoiced(office: Office):
    await office.opened()
    await office.customer("beta", email="b@beta.example")
    await office.subscribed("beta", end=at("2026-12-01"))
    await office.used("100", "2026-11-15", customer_id="beta")
    await office.subscriptions.end_due()
    await office.customers.erase("test", "beta")

    issued = await office.billing.issue("test", "beta", at("2026-12-01"))

    assert (issued.invoice.total.units, issued.invoice.status) == (5000, "issued")


async def test_an_invoice_is_issued_on_the_business_date(office: Office):
    await office.opened()
    office.date.instant = at("2027-03-01")

    issued = await office.billing.issue("test", "acme", at("2027-03-01"))

    assert issued.invoice.issued_at == at("2027-03-01")
    assert issued.invoice.created_at == office.clock.instant
    assert await office.billing.get(issued.invoice.id) == issued
