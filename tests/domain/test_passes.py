"""What a pass holds, as it is written down, and what the gateway is told of it."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.domain.access import GatewayCatalog, Match, Money, PassOffer, Route, catalog_document
from farebox.domain.access import catalog_from_document as read_back
from farebox.domain.limits import PassLimits, Rate, RequestWindow, limits_document, limits_from_document
from farebox.domain.passes import LIMIT_MAX, Pass, grant_of, limits_of, wrong_limit
from farebox.protocols import strict_json

AMOUNTS = st.none() | st.integers(1, 10**12)
RATES = st.none() | st.builds(Rate, st.integers(1, 10**12), st.integers(1, 3600))
LIMITS = st.builds(
    PassLimits,
    calls=AMOUNTS,
    upload_bytes=AMOUNTS,
    download_bytes=AMOUNTS,
    credits=AMOUNTS,
    concurrency=st.none() | st.integers(1, 100_000),
    requests=st.none() | st.builds(RequestWindow, st.integers(1, 10**9), st.integers(1, 31 * 86_400)),
    upload_rate=RATES,
    download_rate=RATES,
)
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@given(LIMITS)
def test_limits_are_written_down_and_read_back_the_same(limits: PassLimits) -> None:
    written = limits_document(limits)

    assert limits_from_document(written) == limits
    assert limits_from_document(strict_json.loads(strict_json.dumps(written).encode(), "x")) == limits
    assert None not in written.values()
    assert wrong_limit(limits) is None


@given(LIMITS)
def test_an_offer_keeps_its_limits_in_the_gateways_catalog(limits: PassLimits) -> None:
    offer = PassOffer("hour", "One hour", Money.parse("0.25 USDC"), 3600, limits)
    catalog = GatewayCatalog(7, (), (Route("r", Match("/"), "u", passes=(offer,)),))

    stored = strict_json.loads(strict_json.dumps(catalog_document(catalog)).encode(), "x")

    assert read_back(7, stored) == catalog


def test_a_catalog_of_the_first_release_still_says_how_many_calls_a_pass_holds() -> None:
    offer = PassOffer("hour", "One hour", Money.parse("0.25 USDC"), 3600)
    stored = catalog_document(GatewayCatalog(7, (), (Route("r", Match("/"), "u", passes=(offer,)),)))
    [old] = stored["routes"][0]["passes"]
    del old["limits"]
    old["calls"] = 500

    assert read_back(7, stored).routes[0].passes[0].limits == PassLimits(calls=500)


@given(LIMITS)
def test_each_limit_of_a_pass_has_a_counter_of_its_own(limits: PassLimits) -> None:
    grant = grant_of(Pass("pas_1", "r", None, "", None, "active", limits, NOON, NOON), "grn_1")

    assert [(g.kind, g.limit, g.window_s) for g in grant.limits] == [
        (kind, Decimal(limit), window_s) for kind, limit, window_s in limits_of(limits)
    ]
    assert [g.counter_id for g in grant.limits] == [f"pass:pas_1:{g.kind}" for g in grant.limits]
    assert {g.kind for g in grant.limits} == limits_document(limits).keys()


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (PassLimits(calls=0), "limits.calls"),
        (PassLimits(credits=-1), "limits.credits"),
        (PassLimits(download_bytes=LIMIT_MAX["download_bytes"] + 1), "limits.download_bytes"),
        (PassLimits(requests=RequestWindow(5, 0)), "limits.requests.window"),
        (PassLimits(upload_rate=Rate(0)), "limits.upload_rate"),
        (PassLimits(upload_rate=Rate(5, 3601)), "limits.upload_rate.window"),
    ],
)
def test_a_limit_out_of_bounds_is_named(limits: PassLimits, field: str) -> None:
    wrong = wrong_limit(limits)

    assert wrong is not None
    assert (wrong.code, wrong.field) == ("PASS_INVALID", field)
