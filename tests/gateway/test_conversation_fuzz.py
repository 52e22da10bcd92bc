"""The short form of the fuzzer (fuzz_conversations.py): as many cases as a test may take, always the same ones; and the long one."""

from __future__ import annotations

import os
import time

import pytest

from tests.gateway.fuzz_cases import case
from tests.gateway.fuzz_conversations import failure_of, report, shrunk
from tests.gateway.stage import Stage

_BATCH = 60
_CAMPAIGN_S = 600.0


@pytest.mark.parametrize("batch", range(10))
def test_random_conversations_break_no_rule(batch: int):
    for seed in range(batch * _BATCH, (batch + 1) * _BATCH):
        story = report(seed)
        assert story is None, story


@pytest.mark.skipif(not os.environ.get("FAREBOX_CAMPAIGN"), reason="ten minutes: make campaign")
def test_ten_minutes_of_random_conversations_break_no_rule():
    first = seed = time.time_ns() // 1000
    ends = time.monotonic() + _CAMPAIGN_S
    while time.monotonic() < ends:
        story = report(seed)
        assert story is None, story
        seed += 1
    print(f"{seed - first} cases from seed {first}")


def test_a_case_is_the_same_each_time():
    assert case(7) == case(7) != case(8)


def test_the_fuzzer_finds_what_is_broken_and_says_so_briefly(monkeypatch: pytest.MonkeyPatch):
    """Guards it against rules that nothing can break: a gateway that loses count of one connection in three is found."""
    closed = 0
    opened_and_closed = Stage.check_empty

    def loses_count(stage: Stage) -> None:
        nonlocal closed
        if len(stage.clients) > 2:
            stage.gateway.counters.connections_open += 1
        opened_and_closed(stage)

    monkeypatch.setattr(Stage, "check_empty", loses_count)
    seed = next(n for n in range(1000) if failure_of(case(n)))
    acts = shrunk(case(seed))

    assert [act[0] for act in acts].count("connect") == len(acts) == 3
