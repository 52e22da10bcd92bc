"""What one client address may ask for before anything costs us crypto, a chain or the database.

Each budget is a rate with a burst of one minute. Only what costs without paying is counted: unpaid 402s, bad credentials
and payments, quotes and purchases. A caller with a good key never meets a budget.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from farebox.app.admission import Answer, Headers, Refusal
from farebox.base.errors import Reason

#: Addresses remembered per budget. Past it the one seen longest ago is forgotten.
ADDRESSES_MAX: Final = 65_536


class Budget:
    """``per_minute`` asks a minute for each address, all at once or spread; 0: no limit."""

    def __init__(self, per_minute: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._what = what
        self._clock = clock
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        # Address → when its budget will be whole again: one number is the whole bucket.
        self._whole_at: dict[str, float] = {}

    def spend(self, address: str) -> Refusal | None:
        """Count one ask. The refusal, if the budget is empty; then nothing is counted."""
        if not self.per_minute:
            return None
        name, now = _network(address), self._clock()
        # Taken out and put back: the dict stays ordered by when an address was last seen.
        whole_at = max(self._whole_at.pop(name, now), now)
        after = whole_at + self._interval_s
        empty = after - now > 60.0 + 1e-6
        self._whole_at[name] = whole_at if empty else after
        if len(self._whole_at) > ADDRESSES_MAX:
            del self._whole_at[next(iter(self._whole_at))]
        return self._refusal(whole_at - now) if empty else None

    def empty(self, address: str) -> Refusal | None:
        """The refusal, if nothing is left; nothing is counted."""
        if not self._whole_at:
            return None
        whole_at = self._whole_at.get(_network(address))
        if whole_at is None:
            return None
        debt_s = whole_at - self._clock()
        return self._refusal(debt_s) if debt_s + self._interval_s > 60.0 + 1e-6 else None

    def headers(self, address: str) -> Headers:
        """RateLimit headers as things stand for an address."""
        debt_s = max(0.0, self._whole_at.get(_network(address), 0.0) - self._clock())
        left = int((60.0 - debt_s) / self._interval_s + 1e-6) if self._interval_s else 0
        return rate_limit_headers(self.per_minute, left, debt_s)

    def _refusal(self, debt_s: float) -> Refusal:
        wait_s = max(1.0, debt_s + self._interval_s - 60.0)
        reason = Reason(
            "budget_exceeded",
            f"too many {self._what} from this address: {self.per_minute} a minute are answered; try again in {wait_s:.0f} s",
        )
        return Refusal(reason, rate_limit_headers(self.per_minute, 0, debt_s), retry_after_s=wait_s)


class _LookedAt(Budget):
    """Another budget, seen and never spent."""

    def __init__(self, budget: Budget) -> None:
        self.per_minute = budget.per_minute
        self._budget = budget

    def spend(self, address: str) -> Refusal | None:
        return self._budget.empty(address)

    def empty(self, address: str) -> Refusal | None:
        return self._budget.empty(address)

    def headers(self, address: str) -> Headers:
        return self._budget.headers(address)


def rate_limit_headers(limit: int, remaining: int, reset_s: float) -> Headers:
    """``RateLimit-Limit``, ``-Remaining`` and ``-Reset`` (seconds)."""
    return [
        (b"RateLimit-Limit", b"%d" % limit),
        (b"RateLimit-Remaining", b"%d" % max(0, remaining)),
        (b"RateLimit-Reset", b"%d" % max(0, round(reset_s))),
    ]


@dataclass(frozen=True, slots=True)
class Budgets:
    """One budget a kind of ask."""

    unpaid: Budget
    bad_credentials: Budget
    quotes: Budget

    @classmethod
    def per_minute(cls, unpaid: int, bad_credentials: int, quotes: int) -> Budgets:
        return cls(
            Budget(unpaid, "unpaid calls"),
            Budget(bad_credentials, "bad credentials or payments"),
            Budget(quotes, "quotes and purchases"),
        )

    def looked_at(self) -> Budgets:
        """The same budgets for who asks first and is refused by another: an edge hands what it refuses to the gateway,
        which counts it. An empty budget refuses all the same."""
        return Budgets(_LookedAt(self.unpaid), _LookedAt(self.bad_credentials), _LookedAt(self.quotes))


class Pages(Protocol):
    """The gateway's own pages (app/site.py)."""

    def owns(self, path: str) -> bool: ...

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal: ...


#: Answered from memory for everyone: keys must be readable when nothing else is.
_FREE_PATHS: Final = frozenset({"/.well-known/jwks.json"})


class BudgetedPages:
    """The same pages, within the budget for quotes and purchases."""

    def __init__(self, pages: Pages, budgets: Budgets) -> None:
        self._pages = pages
        self._budgets = budgets

    def owns(self, path: str) -> bool:
        return self._pages.owns(path)

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal:
        if path not in _FREE_PATHS:
            refused = self._budgets.quotes.spend(client_address)
            if refused is not None:
                return refused
        return await self._pages.answer(method, path, query, headers, body, client_address)


def _network(address: str) -> str:
    """An IPv4 address as it is; of an IPv6 address its /64, which is what one customer of a provider gets."""
    if ":" not in address:
        return address
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return whole.exploded[:19]
