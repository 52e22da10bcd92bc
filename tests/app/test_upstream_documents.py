"""An upstream in farebox.yaml: one URL or several targets, how they are asked, and how they prove themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.app.documents import Surroundings, read_catalog, write_catalog
from farebox.app.documents.upstreams import UpstreamDocument, upstream_document
from farebox.base.errors import Refused
from farebox.domain.access import (
    GatewayCatalog,
    HealthCheck,
    Upstream,
    UpstreamTls,
    catalog_document,
    catalog_from_document,
)

LIVE = Surroundings("live")
PIN = "sha256/AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

WHOLE = f"""
upstreams:
  weather:
    targets: ["https://one.example.com/v1/", "https://two.example.com/v1"]
    balance: least_requests
    timeout: 10s
    total_timeout: 2h
    connect_timeout: 500ms
    idle_timeout: 2s
    connections_max: 64
    waiting_max: 0
    health: {{path: "/up?x=1", interval: 5s, timeout: 1s, healthy_after: 1, unhealthy_after: 4, statuses: [200, 204]}}
    tls:
      ca: /etc/farebox/ca.pem
      server_name: Weather.Example.com
      pins: ["{PIN}"]
      client_certificate: {{certificate: /etc/farebox/us.pem, key: /etc/farebox/us.key}}
  plain: {{url: "http://127.0.0.1:9000", health: /healthz}}
  single: {{targets: ["http://127.0.0.1:9001"], health: {{path: /}}}}
  pinned: {{url: "https://10.0.0.1", tls: {{pins: ["{PIN}"]}}}}
  public: {{url: "https://api.example.com", tls: {{ca: system}}}}
"""

WEATHER = Upstream(
    id="weather",
    targets=("https://one.example.com/v1", "https://two.example.com/v1"),
    balance="least_requests",
    timeout_s=10.0,
    total_timeout_s=7200.0,
    connect_timeout_s=0.5,
    idle_timeout_s=2.0,
    connections_max=64,
    waiting_max=0,
    health=HealthCheck("/up?x=1", 5.0, 1.0, 1, 4, (200, 204)),
    tls=UpstreamTls(
        "/etc/farebox/ca.pem", "weather.example.com", (bytes(range(32)),), "/etc/farebox/us.pem", "/etc/farebox/us.key"
    ),
)  # fmt: skip


def faults(upstream: str) -> dict[str, str]:
    """Path within the upstream → code of everything that is wrong."""
    with pytest.raises(Refused) as caught:
        read_catalog(f"upstreams: {{a: {upstream}}}", LIVE)
    for reason in caught.value.reasons:
        assert len(reason.message) < 300
    return {str(r.field).removeprefix("upstreams.a").lstrip("."): r.code for r in caught.value.reasons}


def test_everything_that_can_be_said_of_an_upstream_is_read():
    weather, plain, single, pinned, public = read_catalog(WHOLE, LIVE).gateway.upstreams
    assert weather == WEATHER
    assert plain.health == HealthCheck("/healthz", 10.0, 2.0, 2, 3)
    assert plain.target_urls == ("http://127.0.0.1:9000",)
    assert (plain.balance, plain.connections_max, plain.tls) == ("round_robin", None, None)
    assert single.target_urls == ("http://127.0.0.1:9001",)
    assert pinned.tls == UpstreamTls(pins=(bytes(range(32)),))
    assert public.tls == UpstreamTls(ca="system")


def test_what_is_written_reads_back_the_same():
    catalog = read_catalog(WHOLE, LIVE)
    assert read_catalog(write_catalog(catalog.gateway, (), (), LIVE), LIVE).gateway == catalog.gateway


def test_what_a_gateway_reads_from_the_database_is_what_was_applied():
    upstreams = read_catalog(WHOLE, LIVE).gateway.upstreams
    stored = json.loads(json.dumps(catalog_document(GatewayCatalog(3, upstreams))))
    assert catalog_from_document(3, stored) == GatewayCatalog(3, upstreams)


def test_a_catalog_from_before_targets_is_still_read():
    stored: dict[str, Any] = {
        "upstreams": [
            {"id": "a", "url": "http://a", "timeout_s": 3.0, "health": "/up"},
            {"id": "b", "url": "http://b", "timeout_s": 30.0, "health": None},
        ]
    }
    assert catalog_from_document(1, stored).upstreams == (
        Upstream("a", "http://a", 3.0, HealthCheck("/up")),
        Upstream("b", "http://b"),
    )


@pytest.mark.parametrize(
    ("upstream", "path", "code"),
    [
        ("{}", "url", "FIELD_MISSING"),
        ("{url: 'http://a', targets: ['http://b']}", "url", "TARGETS_AND_URL"),
        ("{targets: []}", "targets", "TARGETS_MISSING"),
        ("{targets: 'http://a'}", "targets", "FIELD_MALFORMED"),
        ("{targets: ['http://a', 'http://b', 'http://a/']}", "targets", "TARGET_DUPLICATE"),
        ("{targets: ['http://a', 'ftp://b']}", "targets[1]", "URL_MALFORMED"),
        ("{targets: ['http://u:p@a']}", "targets[0]", "URL_MALFORMED"),
        ("{url: 'http://a', balance: random}", "balance", "BALANCE_WITHOUT_TARGETS"),
        ("{targets: ['http://a'], balance: fastest}", "balance", "FIELD_MALFORMED"),
        ("{url: 'http://a', timeout: 0s}", "timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', timeout: 30}", "timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', connect_timeout: 2h}", "connect_timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', idle_timeout: 0s}", "idle_timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', total_timeout: 2d}", "total_timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', connections_max: 0}", "connections_max", "FIELD_MALFORMED"),
        ("{url: 'http://a', connections_max: '8'}", "connections_max", "FIELD_MALFORMED"),
        ("{url: 'http://a', waiting_max: -1}", "waiting_max", "FIELD_MALFORMED"),
        ("{url: 'http://a', health: healthz}", "health", "PATH_MALFORMED"),
        ('{url: "http://a", health: "/a HTTP/1.1\\r\\nX: y"}', "health", "PATH_MALFORMED"),
        ("{url: 'http://a', health: {}}", "health.path", "FIELD_MISSING"),
        ("{url: 'http://a', health: {path: '/a#b'}}", "health.path", "PATH_MALFORMED"),
        ("{url: 'http://a', health: {path: /, interval: 10ms, timeout: 1ms}}", "health.interval", "DURATION_MALFORMED"),
        ("{url: 'http://a', health: {path: /, interval: 1s}}", "health.timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', health: {path: /, timeout: 1m}}", "health.timeout", "DURATION_MALFORMED"),
        ("{url: 'http://a', health: {path: /, healthy_after: 0}}", "health.healthy_after", "FIELD_MALFORMED"),
        ("{url: 'http://a', health: {path: /, statuses: [101]}}", "health.statuses[0]", "FIELD_MALFORMED"),
        ("{url: 'http://a', health: {path: /, evry: 1s}}", "health.evry", "FIELD_UNKNOWN"),
        ("{url: 'http://a', tls: {}}", "tls", "TLS_WITHOUT_HTTPS"),
        ("{url: 'https://a', tls: {verify: false}}", "tls.verify", "FIELD_UNKNOWN"),
        ("{url: 'https://a', tls: {ca: ca.pem}}", "tls.ca", "FILE_MALFORMED"),
        ("{url: 'https://a', tls: {server_name: 'a b'}}", "tls.server_name", "HOST_MALFORMED"),
        ("{url: 'https://a', tls: {pins: ['sha256/AAAA']}}", "tls.pins[0]", "PIN_MALFORMED"),
        ("{url: 'https://a', tls: {pins: ['sha1/AAAA']}}", "tls.pins[0]", "PIN_MALFORMED"),
        ("{url: 'https://a', tls: {pins: [7]}}", "tls.pins[0]", "PIN_MALFORMED"),
        ("{url: 'https://a', tls: {client_certificate: {certificate: /c.pem}}}", "tls.client_certificate.key", "FIELD_MISSING"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_path(upstream: str, path: str, code: str):
    assert faults(upstream) == {path: code}


def test_all_faults_come_at_once():
    found = faults("{targets: ['x', 'http://b'], balance: worst, health: up, tls: {ca: ca.pem, pins: [x]}}")
    assert set(found) == {"targets[0]", "balance", "health", "tls.ca", "tls.pins[0]"}


urls = st.sampled_from(["http://a", "https://b:8443/base", "http://10.0.0.1:1", "https://[::1]:9000"])
waits_s = st.sampled_from([0.25, 1.0, 90.0, 3600.0])
files = st.sampled_from(["/etc/ca.pem", "/run/secrets/a b.pem"])


@given(
    st.builds(
        Upstream,
        id=st.just("a"),
        targets=st.lists(urls, min_size=1, unique=True).map(
            lambda urls: (*urls, "https://always.example.com")
        ),
        timeout_s=waits_s,
        balance=st.sampled_from(["round_robin", "least_requests", "random"]),
        health=st.none()
        | st.builds(
            HealthCheck,
            path=st.sampled_from(["/", "/up?x=1"]),
            interval_s=st.just(3600.0) | waits_s.filter(lambda s: s > 1),
            timeout_s=st.sampled_from([0.25, 1.0, 2.0]),
            healthy_after=st.integers(1, 100),
            unhealthy_after=st.integers(1, 100),
            statuses=st.lists(st.integers(200, 599), max_size=4).map(tuple),
        ),
        tls=st.none()
        | st.builds(
            UpstreamTls,
            ca=st.none() | st.just("system") | files,
            server_name=st.none() | st.just("a.example.com"),
            pins=st.lists(st.binary(min_size=32, max_size=32), max_size=3).map(tuple),
        ),
        connections_max=st.none() | st.integers(1, 65535),
        waiting_max=st.none() | st.integers(0, 1_000_000),
        connect_timeout_s=st.none() | waits_s,
        idle_timeout_s=st.none() | waits_s,
        total_timeout_s=st.none() | waits_s,
    )
)
def test_document_and_value_are_inverse(upstream: Upstream):
    assert UpstreamDocument(**upstream_document(upstream)).value("a") == upstream
    stored = json.loads(json.dumps(catalog_document(GatewayCatalog(1, (upstream,)))))
    assert catalog_from_document(1, stored).upstreams == (upstream,)
