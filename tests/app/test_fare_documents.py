"""What passes hold and what is free, in farebox.yaml: read with bounds, written back so that it reads the same."""

from __future__ import annotations

import pytest
from hypothesis import given

from farebox.app.documents import Surroundings, read_catalog, write_catalog
from farebox.app.documents.fares import PassLimitsDocument, pass_limits_document
from farebox.base.errors import Refused
from farebox.domain.access import FreeFare, Route
from farebox.domain.limits import PassLimits, Rate, RequestWindow
from tests.app.test_catalog_documents import SANDBOX
from tests.domain.test_passes import LIMITS


def a_shop(fares: str) -> str:
    return f"upstreams: {{a: {{url: http://a}}}}\nroutes: [{{id: r, match: {{path: /}}, upstream: a, fares: {fares}}}]"


def a_pass(limits: str) -> str:
    return f"{{passes: [{{id: h, name: H, price: 1 USDC, duration: 1h, limits: {limits}}}]}}"


def route(fares: str) -> Route:
    return read_catalog(a_shop(fares), SANDBOX).gateway.routes[0]


def limits(text: str) -> PassLimits:
    return route(a_pass(text)).passes[0].limits


def faults(fares: str) -> dict[str | None, str]:
    with pytest.raises(Refused) as refused:
        read_catalog(a_shop(fares), SANDBOX)
    return {reason.field: reason.code for reason in refused.value.reasons}


def test_a_pass_holds_what_the_file_says() -> None:
    text = """{calls: 1000, download_bytes: 50MB, upload_bytes: 1234, upload_rate: 100KB/s,
      download_rate: {bytes_per_second: 50000, window: 60s}, credits: 500, concurrency: 8, requests: {count: 100, window: 1m}}"""

    assert limits(text) == PassLimits(
        calls=1000,
        upload_bytes=1234,
        download_bytes=50_000_000,
        credits=500,
        concurrency=8,
        requests=RequestWindow(100, 60),
        upload_rate=Rate(100_000, 60),
        download_rate=Rate(50_000, 60),
    )


@pytest.mark.parametrize(
    ("written", "size"),
    [("1", 1), ("1 kB", 1000), ("1KB", 1000), ("1.5MB", 1_500_000), ("2GB", 2 * 10**9), ("7B", 7), ("1TB", 10**12)],
)  # fmt: skip
def test_sizes_are_powers_of_1000(written: str, size: int) -> None:
    assert limits(f"{{download_bytes: {written}}}").download_bytes == size


@given(LIMITS)
def test_limits_are_exported_so_that_they_read_back_the_same(held: PassLimits) -> None:
    assert PassLimitsDocument.model_validate(pass_limits_document(held)).value() == held


def test_the_export_of_a_shop_with_limits_and_free_calls_applies_back() -> None:
    text = a_shop(
        "{account: {}, free: {methods: [options, HEAD]}, passes: [{id: h, name: H, price: 1 USDC, duration: 1h,"
        " limits: {download_rate: 50kB/s, requests: {count: 5, window: 1m}, upload_bytes: 1500000}}]}"
    )
    catalog = read_catalog(text, SANDBOX)

    written = write_catalog(catalog.gateway, catalog.metrics, catalog.plans, SANDBOX)

    assert read_catalog(written, SANDBOX) == catalog
    assert "50kB/s" in written
    assert "1500kB" in written


@pytest.mark.parametrize(
    ("text", "field", "code"),
    [
        ("{calls: 0}", "calls", "FIELD_MALFORMED"),
        ("{credits: 1.5}", "credits", "FIELD_MALFORMED"),
        ("{concurrency: 100001}", "concurrency", "FIELD_MALFORMED"),
        ("{download_bytes: 0}", "download_bytes", "SIZE_MALFORMED"),
        ("{download_bytes: 1.5}", "download_bytes", "SIZE_MALFORMED"),
        ("{download_bytes: 0.5B}", "download_bytes", "SIZE_MALFORMED"),
        ("{download_bytes: 50MiB}", "download_bytes", "SIZE_MALFORMED"),
        ("{download_bytes: 1001TB}", "download_bytes", "SIZE_MALFORMED"),
        ("{upload_bytes: true}", "upload_bytes", "SIZE_MALFORMED"),
        ("{upload_rate: 100KB}", "upload_rate", "SIZE_MALFORMED"),
        ("{upload_rate: 100KB/h}", "upload_rate", "SIZE_MALFORMED"),
        ("{upload_rate: many/s}", "upload_rate.bytes_per_second", "SIZE_MALFORMED"),
        ("{upload_rate: {bytes_per_second: 5, window: 2h}}", "upload_rate.window", "DURATION_MALFORMED"),
        ("{upload_rate: {window: 5s}}", "upload_rate.bytes_per_second", "FIELD_MISSING"),
        ("{requests: 100}", "requests", "FIELD_MALFORMED"),
        ("{requests: {count: 1}}", "requests.window", "FIELD_MISSING"),
        ("{requests: {count: 1, window: 32d}}", "requests.window", "DURATION_MALFORMED"),
        ("{requests: {count: 1, window: 60}}", "requests.window", "DURATION_MALFORMED"),
        ("{seats: 8}", "seats", "FIELD_UNKNOWN"),
    ],
)
def test_a_limit_that_makes_no_sense_is_named_with_its_place(text: str, field: str, code: str) -> None:
    assert faults(a_pass(text)) == {f"routes[0].fares.passes[0].limits.{field}": code}


def test_all_calls_of_a_route_or_some_methods_may_be_free() -> None:
    assert route("{free: {}}").free == FreeFare()
    assert route("{account: {}, free: {methods: options}}").free == FreeFare(("OPTIONS",))
    assert read_catalog(a_shop("{free: {}}"), Surroundings("live")).warnings == ()


def test_fares_beside_a_route_that_is_free_altogether_are_a_mistake() -> None:
    assert faults("{free: {}, account: {}}") == {"routes[0].fares": "FARE_UNREACHABLE"}
    assert faults("{free: {methods: ['G T']}}") == {"routes[0].fares.free.methods[0]": "METHOD_MALFORMED"}
