"""What the worker does by itself, each in bounded rounds; safe with any number of workers at once."""

from __future__ import annotations

from datetime import UTC, date, timedelta
from typing import Final

from farebox.app.entitlements import Entitlements
from farebox.app.ports.clock import BusinessClock, Clock
from farebox.app.subscriptions import Subscriptions
from farebox.store import idempotency, payments, usage
from farebox.store.pool import Database
from farebox.worker.loops import Chore

#: Usage may be stamped an hour ahead; the rest is for a worker that does not run for a while.
PARTITION_DAYS_AHEAD: Final = 7
IDEMPOTENCY_RETENTION: Final = timedelta(days=7)
ROWS_MAX: Final = 1_000
CUSTOMERS_MAX: Final = 100


class Chores:
    """The worker's chores over one database."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        business_date: BusinessClock,
        entitlements: Entitlements,
        subscriptions: Subscriptions,
    ) -> None:
        self._database = database
        self._clock = clock
        self._business_date = business_date
        self._entitlements = entitlements
        self._subscriptions = subscriptions

    def all(self) -> tuple[Chore, ...]:
        """Every chore with its pace."""
        return (
            Chore("fold usage", 0.5, usage.FOLD_BATCHES_MAX, self.fold_usage),
            Chore("end subscriptions", 5.0, CUSTOMERS_MAX, self.end_subscriptions),
            Chore("turn grants over", 5.0, CUSTOMERS_MAX, self.turn_grants_over),
            Chore("make partitions", 3600.0, 1, self.make_partitions),
            Chore("forget answers", 60.0, ROWS_MAX, self.forget_answers),
            Chore("forget paid answers", 60.0, ROWS_MAX, self.forget_paid_answers),
        )

    async def fold_usage(self) -> int:
        """Add what came in to the days; how many batches."""
        async with self._database.transaction() as tx:
            batches, _ = await usage.fold(tx)
        return batches

    async def end_subscriptions(self) -> int:
        """Mark the ends that have come, and take away what those subscriptions granted."""
        return await self._subscriptions.end_due(CUSTOMERS_MAX)

    async def turn_grants_over(self) -> int:
        """Give customers whose quota period has turned their new counters."""
        return await self._entitlements.refresh_due(CUSTOMERS_MAX)

    async def make_partitions(self) -> int:
        """Make the days ahead of both clocks. Events of a day that came before its partition move into it.

        Always 0: what was missing is there after one round. A day a transaction: its locks keep ingests waiting.
        """
        today = self._clock.now().astimezone(UTC).date()
        business_day = (await self._business_date.now()).astimezone(UTC).date()
        for day in sorted({*_days_from(today), *_days_from(business_day)}):
            async with self._database.transaction() as tx:
                await usage.ensure_partitions(tx, day, day)
        return 0

    async def forget_answers(self) -> int:
        """Drop answers kept for idempotency keys past their retention."""
        async with self._database.transaction() as tx:
            return await idempotency.forget(tx, IDEMPOTENCY_RETENTION, ROWS_MAX)

    async def forget_paid_answers(self) -> int:
        """Drop answers kept for replays of paid calls past their time."""
        async with self._database.transaction() as tx:
            return await payments.forget_answers(tx, ROWS_MAX)


def _days_from(day: date) -> list[date]:
    return [day + timedelta(days=n) for n in range(PARTITION_DAYS_AHEAD + 1)]
