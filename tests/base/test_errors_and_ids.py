"""Whose fault it is can be told from the type; ids are unique, readable and sort by age."""

from __future__ import annotations

import time

import pytest

from farebox.base.errors import FareboxError, InvariantError, Reason, Refused, Unavailable, refuse
from farebox.base.ids import new_id, sortable_token


def test_a_refusal_carries_every_reason_with_its_field() -> None:
    refused = Refused(Reason("A", "too long", "name"), Reason("B", "no such metric"))

    assert str(refused) == "name: too long; no such metric"
    assert refused.reason.code == "A"
    assert [r.code for r in refused.reasons] == ["A", "B"]


def test_a_refusal_without_a_reason_is_our_own_fault() -> None:
    with pytest.raises(InvariantError):
        Refused()


def test_facts_travel_with_the_reason() -> None:
    assert refuse("LIMIT", "used up", "calls", limit=5).reason.facts == {"limit": 5}


def test_an_outage_says_when_to_come_back() -> None:
    assert Unavailable("database").retry_after_s > 0
    assert issubclass(Unavailable, FareboxError)


def test_ids_say_what_they_are_and_are_all_different() -> None:
    ids = {new_id("inv") for _ in range(10_000)}

    assert len(ids) == 10_000
    assert all(i.startswith("inv_") and len(i) == 30 for i in ids)


def test_an_id_begins_with_the_millisecond_it_was_made_in_so_that_later_ones_sort_after() -> None:
    before = int(time.time() * 1000)
    token = sortable_token()
    after = int(time.time() * 1000)

    assert before <= _number(token) >> 80 <= after
    assert sorted("0123456789abcdefghjkmnpqrstvwxyz") == list("0123456789abcdefghjkmnpqrstvwxyz")


def _number(token: str) -> int:
    number = 0
    for character in token:
        number = number * 32 + "0123456789abcdefghjkmnpqrstvwxyz".index(character)
    return number
