"""Metering: usage events come in once, and are read back per customer, metric and period.

An event is durable before it is answered. Its idempotency key is the promise: the same key and body gives the first
event's id again, another body is a conflict, in the same batch as well as a year later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Final

import msgspec

from farebox.app import event_rows
from farebox.app.customers import not_found
from farebox.app.events import BATCH_EVENTS_MAX, IncomingEvent
from farebox.app.ports.clock import BusinessClock, Clock
from farebox.base.errors import InvariantError, Reason, Refused, refuse
from farebox.base.money import EXACT
from farebox.base.time import Period, local_day
from farebox.domain.catalog import Metric
from farebox.domain.customer import Customer
from farebox.domain.usage import UsageEvent, event_faults
from farebox.store import customers, invoices, plans, usage
from farebox.store.gather import Gatherer
from farebox.store.pool import Database, Tx

__all__ = ["Accepted", "IncomingEvent", "Metering", "UsageDayTotal", "UsageExact", "UsageSummary"]

RETENTION_DAYS_DEFAULT: Final = 400
AHEAD_MAX: Final = timedelta(hours=1)
#: Single events that share a commit. One such write is under way at a time: a second would halve them both.
GATHERED_EVENTS_MAX: Final = 512
GATHERED_WRITERS: Final = 1

#: From this many events on they are copied, and inserted only when one of their keys exists.
COPIED_EVENTS_MIN: Final = 100

_ZERO: Final = Decimal(0)
_ONE: Final = Decimal(1)


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """The event is stored durably. ``duplicate`` True: it was before, under this ``event_id``."""

    event_id: str
    idempotency_key: str
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class UsageDayTotal:
    """One day of the customer's zone; ``value`` is the metric's own aggregation."""

    day: date
    value: Decimal
    events: int


@dataclass(frozen=True, slots=True)
class UsageSummary:
    """From the rollup of days. ``lag_s`` is the age of the oldest stored usage that is not in it yet (0: all is)."""

    customer_id: str
    metric_key: str
    aggregation: str
    period: Period
    value: Decimal
    events: int
    days: tuple[UsageDayTotal, ...]
    lag_s: float


@dataclass(frozen=True, slots=True)
class UsageExact:
    """From every single event. ``late_events`` came in after their period was invoiced and are on no invoice."""

    customer_id: str
    metric_key: str
    aggregation: str
    period: Period
    value: Decimal
    events: int
    late_events: int


class Metering:
    """Takes events in, and says what they come to."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        business_date: BusinessClock,
        retention_days: int = RETENTION_DAYS_DEFAULT,
    ) -> None:
        self._database = database
        self._clock = clock
        self._business_date = business_date
        self._retention = timedelta(days=retention_days)
        self._singles: Gatherer[IncomingEvent, Accepted | Reason] = Gatherer(
            self._store,
            key=lambda event: event.idempotency_key,
            rows_max=GATHERED_EVENTS_MAX,
            writers=GATHERED_WRITERS,
            name="usage events",
        )

    async def close(self) -> None:
        """Take nothing more; return when what was gathered is stored."""
        await self._singles.close()

    async def accept_one(self, event: IncomingEvent) -> Accepted:
        """Store one event. Many at once share a commit; the answer comes after it.

        Refuses ``EVENT_CONFLICT`` (its key was used with another body), ``CUSTOMER_UNKNOWN``, ``METRIC_UNKNOWN``,
        ``METRIC_INACTIVE``, ``TIMESTAMP_TOO_OLD`` (before the retention), ``TIMESTAMP_IN_FUTURE`` (more than an hour
        ahead), ``VALUE_NOT_INTEGER``, ``PROPERTY_MISSING``, each with its field.
        """
        verdict = await self._singles.put(event)
        if isinstance(verdict, Reason):
            raise Refused(verdict)
        return verdict

    async def accept_batch(self, events: Sequence[IncomingEvent | Reason]) -> list[Accepted | Reason]:
        """Store up to 1,000 events in one transaction; the answers stand in the order of the events.

        A ``Reason`` in the input (an event that could not be read, see ``app.events.read_batch``) is passed through. One
        bad event never rejects the rest. Refuses ``BATCH_TOO_LARGE`` as a whole.
        """
        if len(events) > BATCH_EVENTS_MAX:
            raise refuse("BATCH_TOO_LARGE", f"a batch has at most {BATCH_EVENTS_MAX} events", "events")
        readable = [event for event in events if not isinstance(event, Reason)]
        if not readable:
            return [event for event in events if isinstance(event, Reason)]
        verdicts = await self._store(readable)
        if len(verdicts) == len(events):
            return verdicts
        remaining = iter(verdicts)
        return [event if isinstance(event, Reason) else next(remaining) for event in events]

    async def summary(self, customer_id: str, metric_key: str, period: Period) -> UsageSummary:
        """From the rollup: fast, and behind by what the worker has not folded. Days that the period touches count whole.

        Refuses ``CUSTOMER_NOT_FOUND``, ``METRIC_NOT_FOUND``, ``PERIOD_EMPTY``, and ``AGGREGATION_NOT_SUMMARIZED`` for
        metrics that do not add up over days (use compute).
        """
        async with self._database.connection() as tx:
            customer, metric = await _subject(tx, customer_id, metric_key, period)
            if metric.aggregation not in ("sum", "count", "max", "min"):
                raise refuse(
                    "AGGREGATION_NOT_SUMMARIZED",
                    f"{metric.aggregation} does not add up over days: use /v1/usage/compute",
                    "metric_key",
                )
            first = local_day(period.start, customer.timezone)
            last = local_day(period.end - timedelta(microseconds=1), customer.timezone)
            rows = await usage.days(tx, customer_id, metric_key, first, last)
            lag_s = await usage.lag_s(tx)
        days = tuple(UsageDayTotal(row.day, _of_day(metric, row), row.events) for row in rows)
        return UsageSummary(
            customer_id=customer_id,
            metric_key=metric_key,
            aggregation=metric.aggregation,
            period=period,
            value=_over_days(metric, days),
            events=sum(day.events for day in days),
            days=days,
            lag_s=lag_s,
        )

    async def compute(self, customer_id: str, metric_key: str, period: Period) -> UsageExact:
        """From the events, exact and complete. Refuses ``CUSTOMER_NOT_FOUND``, ``METRIC_NOT_FOUND``, ``PERIOD_EMPTY``."""
        async with self._database.connection() as tx:
            _, metric = await _subject(tx, customer_id, metric_key, period)
            used = await usage.used(tx, customer_id, metric, period.start, period.end)
            late = await invoices.late_events(tx, customer_id, metric_key, period.start, period.end)
        return UsageExact(
            customer_id=customer_id,
            metric_key=metric_key,
            aggregation=metric.aggregation,
            period=period,
            value=used.value,
            events=used.events,
            late_events=late,
        )

    # ── one ingest transaction ───────────────────────────────────────────────────────────────────────────────────────

    async def _store(self, events: Sequence[IncomingEvent]) -> list[Accepted | Reason]:
        """Store what can be stored; one verdict an event, in order."""
        business_now = await self._business_date.now()
        if len(events) >= COPIED_EVENTS_MIN:
            try:
                return await self._store_once(events, business_now, copied=True)
            except usage.KeyTaken:
                pass  # rolled back: some event of the batch was sent before
        return await self._store_once(events, business_now, copied=False)

    async def _store_once(
        self, events: Sequence[IncomingEvent], business_now: datetime, copied: bool
    ) -> list[Accepted | Reason]:
        verdicts: list[Accepted | Reason | None] = [None] * len(events)
        times = self._times(events, verdicts, business_now)
        timely = [at for at in times if at is not None]
        if not timely:
            return _complete(verdicts)
        customer_ids = sorted({event.customer_id for event in events})
        metric_keys = sorted({event.metric_key for event in events})
        async with self._database.transaction(pipelined=not copied) as tx:
            await usage.hold_customers(tx, customer_ids)
            known = await usage.known(tx, customer_ids, metric_keys, min(timely), max(timely))
            _judge(events, verdicts, known)
            fresh = await _claim(tx, events, verdicts, copied)
            if fresh:
                await _write(tx, events, times, verdicts, fresh, known.batch_id, copied)
                spent = _spent(events, times, fresh, known)
                await usage.close_batch(tx, known.batch_id, "api", len(fresh), spent)
        return _complete(verdicts)

    def _times(
        self,
        events: Sequence[IncomingEvent],
        verdicts: list[Accepted | Reason | None],
        business_now: datetime,
    ) -> list[datetime | None]:
        """Each event's instant; None and a verdict where it is out of bounds."""
        latest = max(business_now, self._clock.now()) + AHEAD_MAX
        earliest = min(business_now, self._clock.now()) - self._retention
        times: list[datetime | None] = []
        for index, event in enumerate(events):
            at = event.timestamp or business_now
            if earliest <= at <= latest:
                times.append(at)
                continue
            times.append(None)
            verdicts[index] = (
                Reason("TIMESTAMP_IN_FUTURE", "the timestamp is more than an hour ahead", "timestamp")
                if at > latest
                else Reason(
                    "TIMESTAMP_TOO_OLD",
                    f"the timestamp is older than the {self._retention.days} days that usage is kept",
                    "timestamp",
                )
            )
        return times


def _judge(
    events: Sequence[IncomingEvent], verdicts: list[Accepted | Reason | None], known: usage.Known
) -> None:
    """Give a verdict to every event that its customer or its metric cannot take."""
    for index, event in enumerate(events):
        if verdicts[index] is not None:
            continue
        metric = known.metrics.get(event.metric_key)
        if event.customer_id not in known.customers:
            verdicts[index] = Reason("CUSTOMER_UNKNOWN", "there is no customer with this id", "customer_id")
        elif metric is None:
            verdicts[index] = Reason("METRIC_UNKNOWN", "there is no metric with this key", "metric_key")
        elif metric.status != "active" or metric.value_type != "decimal" or metric.property is not None:
            verdicts[index] = _metric_fault(metric, event)


def _metric_fault(metric: Metric, event: IncomingEvent) -> Reason | None:
    properties = msgspec.json.decode(event.properties) if metric.property is not None else {}
    looked_at = UsageEvent(
        "", event.customer_id, event.metric_key, event.value, datetime.now(UTC), None, properties
    )
    return next(iter(event_faults(metric, looked_at)), None)


async def _claim(
    tx: Tx, events: Sequence[IncomingEvent], verdicts: list[Accepted | Reason | None], copied: bool
) -> list[int]:
    """Take the keys of the events without a verdict, give all of these one, and return which are to be stored, in their
    order. With ``copied`` a key that exists raises ``KeyTaken``."""
    asked = [index for index, verdict in enumerate(verdicts) if verdict is None]
    if not asked:
        return []
    first_of = {events[index].idempotency_key: index for index in reversed(asked)}
    ids = event_rows.event_ids(len(events))
    digests = dict(zip(asked, event_rows.digests([events[index] for index in asked]), strict=True))
    keys = sorted(first_of)
    key_ids, key_digests = [ids[first_of[key]] for key in keys], [digests[first_of[key]] for key in keys]
    stored: dict[str, tuple[str, str]] = {}
    if copied:
        await usage.copy_keys(tx, event_rows.key_lines(keys, key_ids, key_digests))
    elif await usage.claim_keys(tx, keys, key_ids, key_digests) < len(keys):
        stored = await usage.owners(tx, keys)
    fresh = []
    for index in asked:
        key = events[index].idempotency_key
        first = first_of[key]
        event_id, digest = (
            stored.get(key, (ids[first], digests[first])) if stored else (ids[first], digests[first])
        )
        if event_id == ids[index]:
            fresh.append(index)
            verdicts[index] = Accepted(event_id, key)
        else:
            verdicts[index] = _known_key(event_id, key, digest == digests[index])
    return fresh


async def _write(
    tx: Tx,
    events: Sequence[IncomingEvent],
    times: Sequence[datetime | None],
    verdicts: Sequence[Accepted | Reason | None],
    fresh: Sequence[int],
    batch_id: int,
    copied: bool,
) -> None:
    """Write the events at the indexes ``fresh``, whose keys are taken."""
    ids = [verdict.event_id for index in fresh if isinstance(verdict := verdicts[index], Accepted)]
    at = [time for index in fresh if (time := times[index]) is not None]
    if not len(ids) == len(at) == len(fresh):
        raise InvariantError("an event that was refused is about to be stored")
    stored = [events[index] for index in fresh]
    if copied:
        await usage.copy_events(tx, event_rows.event_lines(stored, ids, at, batch_id))
    else:
        await usage.insert_events(tx, event_rows.event_columns(stored, ids, at), batch_id)


def _known_key(event_id: str, key: str, same_body: bool) -> Accepted | Reason:
    if same_body:
        return Accepted(event_id, key, duplicate=True)
    return Reason(
        "EVENT_CONFLICT",
        "this idempotency key was used for an event with another body",
        "idempotency_key",
        {"event_id": event_id},
    )


def _spent(
    events: Sequence[IncomingEvent],
    times: Sequence[datetime | None],
    fresh: Sequence[int],
    known: usage.Known,
) -> dict[str, Decimal]:
    """What the stored events spend of each quota counter: their number for a count, else their values."""
    if not known.counters:
        return {}
    counters: dict[tuple[str, str], list[usage.Counter]] = {}
    for counter in known.counters:
        counters.setdefault((counter.customer_id, counter.metric_key), []).append(counter)
    spent: dict[str, Decimal] = {}
    for index in fresh:
        event, at = events[index], times[index]
        for counter in counters.get((event.customer_id, event.metric_key), ()):
            if at is not None and counter.period_start <= at < counter.period_end:
                amount = _ONE if known.metrics[event.metric_key].aggregation == "count" else event.value
                spent[counter.id] = EXACT.add(spent.get(counter.id, _ZERO), amount)
    return spent


async def _subject(tx: Tx, customer_id: str, metric_key: str, period: Period) -> tuple[Customer, Metric]:
    if period.start == period.end:
        raise refuse("PERIOD_EMPTY", "the period ends where it starts", "period_end")
    customer = await customers.get(tx, customer_id)
    if customer is None:
        raise not_found("customer_id")
    metric = await plans.get_metric(tx, metric_key)
    if metric is None:
        raise refuse("METRIC_NOT_FOUND", "there is no metric with this key", "metric_key")
    return customer, metric.metric


def _of_day(metric: Metric, day: usage.UsageDay) -> Decimal:
    return {"sum": day.total, "count": Decimal(day.events), "max": day.highest, "min": day.lowest}[
        metric.aggregation
    ]


def _over_days(metric: Metric, days: Sequence[UsageDayTotal]) -> Decimal:
    values = [day.value for day in days]
    match metric.aggregation:
        case "max":
            return max(values, default=_ZERO)
        case "min":
            return min(values, default=_ZERO)
        case _:
            with localcontext(EXACT):
                return sum(values, _ZERO)


def _complete(verdicts: Sequence[Accepted | Reason | None]) -> list[Accepted | Reason]:
    complete = [verdict for verdict in verdicts if verdict is not None]
    if len(complete) != len(verdicts):
        raise InvariantError("an event was given no verdict")
    return complete
