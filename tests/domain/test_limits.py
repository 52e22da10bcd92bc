"""The limits as state machines: what was sold is what can be used, and not a unit more."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from farebox.domain.limits import (
    BURST_BYTES_MIN,
    BYTE_KINDS,
    CALL_KINDS,
    RATE_KINDS,
    Amount,
    Limit,
    Pace,
    Slots,
    Window,
    burst_bytes,
    take_all,
)

units = st.integers(1, 20)
capacities = st.integers(0, 100)
steps = st.lists(st.tuples(st.sampled_from(["take", "up_to", "back"]), units), max_size=40)


@given(capacities, steps)
def test_of_an_amount_never_more_is_taken_than_was_bought(
    capacity: int, story: list[tuple[str, int]]
) -> None:
    amount, mine = Amount(capacity), 0
    for what, count in story:
        if what == "take":
            mine += count * amount.take(count)
        elif what == "up_to":
            mine += amount.take_up_to(count)
        else:
            amount.give_back(back := min(mine, count))
            mine -= back
        assert 0 <= mine == amount.spent <= capacity
        assert amount.exhausted == (mine == capacity)


@given(capacities, st.lists(units))
def test_the_last_unit_of_an_amount_can_be_reached_and_the_next_cannot(
    capacity: int, pieces: list[int]
) -> None:
    amount = Amount(capacity)
    passed = sum(amount.take_up_to(piece) for piece in pieces)

    assert passed == min(capacity, sum(pieces))
    assert amount.take_up_to(capacity) == capacity - passed
    assert not amount.take()


@given(capacities, st.integers(0, 1000), st.integers(0, 2000))
def test_an_overdrawn_balance_is_below_zero_and_a_gain_never_lifts_it_above_what_was_bought(
    capacity: int, overdrawn: int, gained: int
) -> None:
    amount = Amount(capacity)
    amount.overdraw(overdrawn)
    assert amount.left == capacity - overdrawn
    assert amount.take() == (overdrawn < capacity)

    amount.give_back(gained)

    assert amount.left <= capacity


@given(st.integers(1, 8), st.lists(st.booleans(), max_size=60))
def test_of_slots_never_more_are_in_use_than_there_are(capacity: int, story: list[bool]) -> None:
    slots, running = Slots(capacity), 0
    for begins in story:
        if begins:
            running += slots.take()
        elif running:
            slots.give_back()
            running -= 1
        assert running == slots.taken <= capacity
    assert slots.allows() == (running < capacity)


@given(
    st.integers(1, 10),
    st.integers(1, 60),
    st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=60),
)
def test_in_no_window_more_is_counted_than_it_holds(
    capacity: int, window_s: int, story: list[tuple[float, bool]]
) -> None:
    window, now_s, counted = Window(capacity, window_s), 1_000_000.0, dict[int, int]()
    took_at: list[int] = []
    for later_s, gives_back in story:
        now_s += later_s
        window.turn_over(now_s)
        assert window.start_s <= now_s < window.end_s
        if gives_back and took_at:
            start_s = took_at.pop(0)
            window.give_back(1, start_s)
            counted[start_s] -= 1
        elif window.take():
            took_at.append(window.start_s)
            counted[window.start_s] = counted.get(window.start_s, 0) + 1
        assert counted.get(window.start_s, 0) == window.counted <= capacity


def test_a_clock_set_back_gives_no_window_twice() -> None:
    window = Window(1, 60)
    window.turn_over(120)
    assert window.take()

    window.turn_over(119)

    assert not window.take()


rates = st.integers(1, 10_000_000)


@given(
    rates,
    st.integers(1, 60),
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 100_000)), min_size=1, max_size=60),
)
def test_over_any_span_a_rate_lets_pass_no_more_than_its_bytes_and_one_burst(
    rate: int, window_s: int, story: list[tuple[float, int]]
) -> None:
    pace, now_s = Pace(rate, window_s, 0.0), 0.0
    passed: list[tuple[float, int]] = []
    for later_s, size in story:
        now_s += later_s
        passed.append((now_s, pace.take(now_s, size)))

    for first in range(len(passed)):
        total = 0
        for at_s, size in passed[first:]:
            total += size
            assert total <= rate * (at_s - passed[first][0]) + pace.burst + 1


def transferred(pace: Pace, seconds: float) -> int:
    """By a client that takes what it gets and sleeps as long as it is told."""
    now_s, total = 0.0, 0
    while True:
        total += pace.take(now_s, 65_536)
        now_s += pace.wait_s(now_s)
        if now_s > seconds:
            return total


@given(st.integers(40_000, 5_000_000))
def test_a_greedy_client_gets_its_rate_within_five_percent_over_ten_seconds(rate: int) -> None:
    total = transferred(Pace(rate, 60, 0.0), 10)

    assert 0.95 * rate * 10 <= total <= 1.05 * rate * 10


@given(st.integers(1, 39_999))
def test_a_slow_rate_is_kept_but_for_its_burst(rate: int) -> None:
    total = transferred(Pace(rate, 60, 0.0), 10)

    assert 0.95 * rate * 10 - 1 <= total <= rate * 10 + BURST_BYTES_MIN


@given(st.lists(st.tuples(st.sampled_from([0, 10_000, 100_000, 1_000_000]), st.floats(0, 0.5)), max_size=30))
def test_turning_a_share_up_and_down_gains_nothing(turns: list[tuple[int, float]]) -> None:
    pace, now_s, passed, due = Pace(1_000_000, 60, 0.0), 0.0, 0, 0.0
    for rate, seconds in turns:
        pace.turn_to(rate, now_s)
        passed += pace.take(now_s, 10_000_000)
        now_s += seconds
        due += rate * seconds
        passed += pace.take(now_s, 10_000_000)

    assert passed <= due + burst_bytes(1_000_000, 60) + 1


def test_a_rate_without_a_share_waits_for_one() -> None:
    pace = Pace(1000, 1, 0.0)
    pace.take(0.0, 100_000)
    pace.turn_to(0, 0.0)

    assert pace.take(100.0, 1) == 0
    assert pace.wait_s(100.0) == math.inf


@given(
    st.lists(st.tuples(st.sampled_from([Amount, Slots]), st.integers(0, 5)), max_size=5), st.integers(1, 3)
)
def test_all_limits_are_taken_from_or_none(made: list[tuple[type, int]], count: int) -> None:
    limits: list[Limit] = [kind(capacity) for kind, capacity in made]
    allowed = all(capacity >= count for _, capacity in made)

    assert take_all(limits, count) == allowed

    for limit, (_, capacity) in zip(limits, made, strict=True):
        assert limit.allows(capacity) == (not allowed or count == 0)
        assert limit.allows(capacity - count * allowed)


def test_every_kind_is_taken_by_the_call_by_the_byte_or_by_the_second() -> None:
    assert not CALL_KINDS & BYTE_KINDS
    assert not RATE_KINDS & (CALL_KINDS | BYTE_KINDS)
    assert len(CALL_KINDS | BYTE_KINDS | RATE_KINDS) == 9
