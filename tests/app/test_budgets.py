"""What one address may ask for."""

from __future__ import annotations

from farebox.app.admission import Answer, Headers, Refusal
from farebox.app.budgets import ADDRESSES_MAX, Budget, BudgetedPages, Budgets


class Time:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def answered(budget: Budget, address: str, asks: int) -> int:
    return sum(budget.spend(address) is None for _ in range(asks))


def test_a_minutes_worth_at_once_and_then_the_steady_rate() -> None:
    time = Time()
    budget = Budget(60, "asks", time)

    assert answered(budget, "a", 100) == 60
    time.now += 10
    assert answered(budget, "a", 100) == 10
    time.now += 600
    assert answered(budget, "a", 100) == 60


def test_the_refusal_says_when_to_come_back_and_asking_meanwhile_does_not_put_it_off() -> None:
    time = Time()
    budget = Budget(6, "asks", time)
    answered(budget, "a", 6)

    refused = [budget.spend("a") for _ in range(50)][-1]

    assert isinstance(refused, Refusal)
    assert refused.retry_after_s == 10.0
    assert dict(refused.answer_headers)[b"RateLimit-Limit"] == b"6"
    time.now += 10
    assert budget.spend("a") is None


def test_looking_costs_nothing_and_addresses_do_not_share() -> None:
    budget = Budget(2, "asks", Time())

    assert all(budget.empty("a") is None for _ in range(10))
    assert answered(budget, "a", 5) == 2
    assert budget.empty("a") is not None
    assert budget.empty("b") is None
    assert answered(budget, "b", 5) == 2


def test_an_ipv6_customer_is_one_address_however_many_it_has() -> None:
    budget = Budget(3, "asks", Time())

    assert sum(budget.spend(f"2001:db8:1:2::{n:x}") is None for n in range(10)) == 3
    assert budget.spend("2001:db8:1:3::1") is None
    assert budget.spend("::ffff:192.0.2.1") is None
    assert answered(budget, "192.0.2.1", 5) == 2


def test_no_limit_is_no_limit_and_the_table_is_bounded() -> None:
    budget = Budget(1, "asks", Time())
    for n in range(ADDRESSES_MAX + 10):
        budget.spend(f"a{n}")

    assert answered(Budget(0, "asks"), "a", 1000) == 1000
    assert len(budget._whole_at) == ADDRESSES_MAX


class Pages:
    def owns(self, path: str) -> bool:
        return path.startswith("/.")

    async def answer(
        self, method: str, path: str, query: str, headers: Headers, body: bytes, client_address: str
    ) -> Answer | Refusal:
        return Answer(200, [], b"")


async def test_quotes_have_a_budget_and_token_keys_do_not() -> None:
    pages = BudgetedPages(Pages(), Budgets.per_minute(1, 1, 2))

    async def ask(path: str) -> bool:
        return isinstance(await pages.answer("GET", path, "", [], b"", "192.0.2.1"), Answer)

    assert [await ask("/.farebox/quotes") for _ in range(3)] == [True, True, False]
    assert all([await ask("/.well-known/jwks.json") for _ in range(5)])
