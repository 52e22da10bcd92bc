"""farebox.yaml is read with every fault at once, each with its path, and written back so that it reads the same."""

from __future__ import annotations

from decimal import Decimal

import pytest

from farebox.app.documents import Catalog, Surroundings, read_catalog, write_catalog
from farebox.app.documents.scalars import plain_decimal
from farebox.base.errors import Refused
from farebox.base.money import Asset, Money
from farebox.base.time import Interval
from farebox.domain.access import Condition, HealthCheck, TokenAsset
from farebox.domain.catalog import LimitEntitlement, PerUnit, Tiered

SELLER = "0x1111111111111111111111111111111111111111"
OTHER = "0x2222222222222222222222222222222222222222"
NETWORK = "eip155:84532"
USDC = TokenAsset(NETWORK, "0x036CbD53842c5426634e7929541eC2318f3dCF7e", "USDC", 6, "USDC", "2")
SANDBOX = Surroundings("sandbox", frozenset({NETWORK}), (USDC,), {NETWORK: SELLER})
LIVE = Surroundings("live")

SHOP = """
upstreams:
  weather: {url: "http://127.0.0.1:9000/", timeout: 1500ms, health: /healthz}
  plain: {url: "https://api.example.com"}
routes:
  - id: forecast
    match: {path: "/v1/weather/{city}", methods: [get, POST], hosts: [API.example.com], headers: {X-Kind: fast}}
    upstream: weather
    description: What the sky will do
    rewrite: {strip_prefix: /v1, set_headers: {X-Plan: "{plan}", X-Who: "{customer}/{request_id}"}}
    metric: api_calls
    charge_on: success
    fares:
      exact: {price: "0.001 USDC"}
      passes:
        - {id: hour, name: "One hour", price: "0.25 USDC", duration: 1h, limits: {calls: 1000}}
        - {id: day, name: "One day", price: "2 USDC", duration: 24h}
      account: {required_feature: weather_api}
  - id: rest
    match: {path: "/{*rest}"}
    upstream: plain
    fares: {account: {}}
metrics:
  - {key: api_calls, display_name: "API calls", aggregation_type: sum}
  - {key: people, name: People, aggregation: unique_count, property: user, description: "Who came"}
plans:
  - id: starter
    name: Starter
    currency: USD
    billing_period: monthly
    changelog: The first one
    charges:
      - {pricing_model: flat_fee, properties: {amount: 49}}
      - metric_key: api_calls
        model: tiered
        properties: {tiers: [{up_to: 200000, unit_amount: 0}, {up_to: 1000000, unit_price: "0.00009", flat_price: 1.5}, {up_to: null, unit_price: 0.00004}]}
      - {metric_key: api_calls, pricing_model: package, properties: {package_size: 1000, package_price: 8, free_units: 10}}
    entitlements:
      weather_api: {type: boolean, granted: true}
      api_calls: {type: limit, metric_key: api_calls, limit: 10000, on_exceed: allow}
      sla: {type: custom, value: 4h}
  - id: volume
    name: By volume
    currency: EUR
    billing_period: {days: 30}
    charges:
      - {id: traffic, metric_key: people, pricing_model: volume, description: Guests, properties: {tiers: [{up_to: null, unit_price: 0.07}]}}
server: {public_url: "https://api.example.com/", trusted_proxies: ["10.0.0.0/8", "127.0.0.1"]}
"""  # fmt: skip


def shop() -> Catalog:
    return read_catalog(SHOP, SANDBOX)


def faults(text: str, surroundings: Surroundings = SANDBOX) -> dict[str | None, str]:
    """Path → code of everything that is wrong."""
    with pytest.raises(Refused) as caught:
        read_catalog(text, surroundings)
    for reason in caught.value.reasons:
        assert "\n" not in reason.message
        assert len(reason.message) < 400
    return {reason.field: reason.code for reason in caught.value.reasons}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_shop_is_read_into_values():
    catalog = shop()
    gateway = catalog.gateway
    weather, plain = gateway.upstreams
    assert (weather.url, weather.timeout_s, weather.health) == (
        "http://127.0.0.1:9000",
        1.5,
        HealthCheck("/healthz"),
    )
    assert plain.timeout_s == 30.0
    forecast = gateway.route("forecast")
    assert forecast is not None
    assert forecast.match.methods == ("GET", "POST")
    assert forecast.match.hosts == ("api.example.com",)
    assert forecast.match.headers == (Condition("x-kind", "exact", "fast"),)
    assert forecast.rewrite.set_headers == (("X-Plan", "{plan}"), ("X-Who", "{customer}/{request_id}"))
    assert forecast.charge_on == "success"
    assert forecast.exact is not None
    assert forecast.exact.price == Money(1000, Asset("USDC", 6))
    assert [(p.id, p.duration_s, p.limits.calls) for p in forecast.passes] == [
        ("hour", 3600, 1000),
        ("day", 86400, None),
    ]
    assert gateway.server.public_url == "https://api.example.com"
    assert gateway.server.trusted_proxies == ("10.0.0.0/8", "127.0.0.1/32")


def test_both_spellings_of_a_field_mean_the_same():
    catalog = shop()
    assert catalog.metrics[0].name == "API calls"
    assert catalog.metrics[0].aggregation == "sum"
    tiered = catalog.plans[0].charges[1].pricing
    assert isinstance(tiered, Tiered)
    assert [t.unit_price for t in tiered.tiers] == [0, Decimal("0.00009"), Decimal("0.00004")]
    assert tiered.tiers[1].flat_price == Decimal("1.5")


def test_charges_without_an_id_are_called_after_their_metric_or_model():
    assert [c.id for c in shop().plans[0].charges] == ["flat_fee", "api_calls", "api_calls-2"]
    assert shop().plans[1].charges[0].id == "traffic"


def test_numbers_keep_every_digit_whether_quoted_or_not():
    text = """
metrics: [{key: m, name: M, aggregation: sum}]
plans:
  - {id: p, name: P, currency: USD, billing_period: annual, charges: [{metric_key: m, pricing_model: per_unit, properties: {unit_price: 0.123456789012345678}}]}
"""
    plan = read_catalog(text, SANDBOX).plans[0]
    assert plan.charges[0].pricing == PerUnit(Decimal("0.123456789012345678"))
    assert plan.interval == Interval(1, "year")


@pytest.mark.parametrize(
    "written", ["123456789012345.123456789012345678", "1234567890123456789012345678901234567.5", "-0.5", "0"]
)
def test_no_digit_of_a_number_is_rounded_away(written: str):
    assert plain_decimal(written) == plain_decimal(Decimal(written)) == Decimal(written)
    assert str(plain_decimal(Decimal("1E+2"))) == "100"


def test_in_the_sandbox_the_seller_made_from_the_master_key_is_paid():
    route = shop().gateway.route("forecast")
    assert route is not None
    assert route.exact is not None
    assert route.exact.pay_to == ((NETWORK, SELLER),)
    assert USDC in shop().gateway.assets


def test_a_route_pays_whom_it_names_then_the_files_default():
    head = "upstreams: {a: {url: http://a}}\nroutes:\n - {id: r, match: {path: /}, upstream: a, fares: {exact: {price: 1 USDC"
    named = read_catalog(f"{head}, pay_to: {{'{NETWORK}': '{OTHER}'}}}}}}}}", SANDBOX).gateway.routes[0]
    default = read_catalog(
        f"payments: {{defaults: {{pay_to: '{OTHER}'}}}}\n{head}}}}}}}", SANDBOX
    ).gateway.routes[0]
    assert named.exact is not None
    assert default.exact is not None
    assert named.exact.pay_to == default.exact.pay_to == ((NETWORK, OTHER),)


def test_an_empty_file_is_an_empty_catalog():
    for text in ("", "{}", "routes: []", "# nothing", "routes:\nplans:\n"):
        catalog = read_catalog(text, SANDBOX)
        assert (catalog.gateway.routes, catalog.metrics, catalog.plans) == ((), (), ())


def test_what_is_only_likely_a_mistake_is_a_warning():
    catalog = read_catalog(
        "upstreams: {a: {url: http://a}}\nroutes:\n"
        " - {id: x, match: {path: /x}, upstream: a, fares: {account: {required_feature: nobody_has}}}\n"
        " - {id: y, match: {path: /y}, upstream: a}",
        SANDBOX,
    )
    assert [(w.code, w.field) for w in catalog.warnings] == [
        ("FEATURE_UNKNOWN", "routes[0].fares.account.required_feature"),
        ("ROUTE_WITHOUT_FARE", "routes[1].fares"),
    ]


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_reads_back_the_same():
    first = shop()
    text = write_catalog(first.gateway, first.metrics, first.plans, SANDBOX)
    second = read_catalog(text, SANDBOX)
    assert (second.gateway, second.metrics, second.plans) == (first.gateway, first.metrics, first.plans)
    assert write_catalog(second.gateway, second.metrics, second.plans, SANDBOX) == text


def test_the_sandboxs_own_account_is_not_written_down():
    first = shop()
    assert SELLER not in write_catalog(first.gateway, first.metrics, first.plans, SANDBOX)


def test_an_unlimited_entitlement_survives_the_way_there_and_back():
    text = """
metrics: [{key: m, name: M, aggregation: sum}]
plans:
  - {id: p, name: P, currency: JPY, billing_period: weekly, entitlements: {m: {type: limit, metric_key: m, limit: null}}}
"""
    first = read_catalog(text, SANDBOX)
    second = read_catalog(write_catalog(first.gateway, first.metrics, first.plans, SANDBOX), SANDBOX)
    assert second.plans[0].entitlements == (LimitEntitlement("m", "m", None),)
    assert second == first


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_fault_of_a_file_is_told_at_once():
    found = faults("""
upstreams:
  a: {url: "ftp://x", timeuot: 3s}
  b: {url: "http://x", timeout: 30}
routes:
  - id: r
    match: {path: weather, methods: ["G T"]}
    upstream: a
    charge_on: never
    fares: {exact: {price: "0.0000001 USDC"}, passes: [{id: h, name: H, price: "1 USD", duration: 1y, limits: {calls: 0}}]}
  - {id: s, match: {path: "/{a}/{a}"}, upstream: b}
  - {id: t, match: {path: /t}, upstream: nowhere, metric: nothing}
  - 5
metrics:
  - {key: "no spaces", name: N, aggregation: median}
plans:
  - {id: p, name: P, currency: DOLLAR, billing_period: fortnightly, charges: [{metric_key: x, pricing_model: per_unit, properties: {unit_price: -1}}]}
  - {id: q, name: Q, currency: USD, billing_period: monthly, charges: [{metric_key: x, pricing_model: per_unit, properties: {unit_price: 1}}]}
cupons: []
""")  # fmt: skip
    assert found == {
        "cupons": "FIELD_UNKNOWN",
        "upstreams.a.url": "URL_MALFORMED",
        "upstreams.a.timeuot": "FIELD_UNKNOWN",
        "upstreams.b.timeout": "DURATION_MALFORMED",
        "routes[0].match.path": "PATH_MALFORMED",
        "routes[0].match.methods[0]": "METHOD_MALFORMED",
        "routes[0].charge_on": "FIELD_MALFORMED",
        "routes[0].fares.exact.price": "PRICE_TOO_FINE",
        "routes[0].fares.passes[0].duration": "DURATION_MALFORMED",
        "routes[0].fares.passes[0].limits.calls": "FIELD_MALFORMED",
        "routes[1].match.path": "PATH_MALFORMED",
        "routes[2].upstream": "UPSTREAM_UNKNOWN",
        "routes[2].metric": "METRIC_UNKNOWN",
        "routes[3]": "FIELD_MALFORMED",
        "metrics[0].key": "NAME_MALFORMED",
        "metrics[0].aggregation": "FIELD_MALFORMED",
        "plans[0].currency": "ASSET_UNKNOWN",
        "plans[0].billing_period": "PERIOD_UNKNOWN",
        "plans[0].charges[0].properties.unit_price": "AMOUNT_NEGATIVE",
        "plans[1].charges[0].metric_key": "METRIC_UNKNOWN",
    }


ROUTE = "upstreams: {{a: {{url: http://a}}}}\nroutes:\n - {{id: r, match: {{path: /}}, upstream: a, {}}}"
PLAN = "metrics: [{{key: m, name: M, aggregation: sum}}]\nplans:\n - {{id: p, name: P, currency: USD, billing_period: monthly, {}}}"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("coupons: []", "coupons"),
        ("tax_rates: []", "tax_rates"),
        (ROUTE.format("metric: {key: t, value: {from: bytes}}"), "routes[0].metric"),
        (ROUTE.format("fares: {exact: {price: 1 USDC, flow: deferred}}"), "routes[0].fares.exact.flow"),
        (ROUTE.format("fares: {exact: {price: 1 USDC, schemes: [exact, upto]}}"), "routes[0].fares.exact.schemes[1]"),
        (ROUTE.format("fares: {passes: [{id: h, name: H, price: 1 USDC, duration: 1h, splits: []}]}"), "routes[0].fares.passes[0].splits"),
        ("metrics: [{key: m, name: M, aggregation: percentile}]", "metrics[0].aggregation"),
        ("metrics: [{key: m, name: M, aggregation: sum, filters: []}]", "metrics[0].filters"),
        (PLAN.format("minimum_commitment: 5"), "plans[0].minimum_commitment"),
        (PLAN.format("conventions: lago"), "plans[0].conventions"),
        (PLAN.format("charges: [{metric_key: m, pricing_model: matrix}]"), "plans[0].charges[0]"),
        (PLAN.format("charges: [{pricing_model: flat_fee, properties: {amount: 1}, timing: advance}]"), "plans[0].charges[0].timing"),
        (PLAN.format("charges: [{pricing_model: flat_fee, properties: {amount: 1}, prorate: true}]"), "plans[0].charges[0].prorate"),
        (PLAN.format("entitlements: {m: {type: limit, metric_key: m, limit: 1, on_exceed: grace}}"), "plans[0].entitlements.m.on_exceed"),
        ("payments: {facilitators: []}", "payments.facilitators"),
        ("payments: {networks: []}", "payments.networks"),
        ("server: {compatibility: [apicharge]}", "server.compatibility"),
        ("server: {gateways: 2}", "server.gateways"),
    ],
)  # fmt: skip
def test_what_a_later_release_brings_is_refused_and_not_ignored(text: str, path: str):
    assert faults(text) == {path: "NOT_AVAILABLE_YET"}


@pytest.mark.parametrize(
    ("text", "path", "code"),
    [
        ("upstreams: {a: {}}", "upstreams.a.url", "FIELD_MISSING"),
        ("upstreams: {a: {url: 'http://u:p@a'}}", "upstreams.a.url", "URL_MALFORMED"),
        ("upstreams: {a: {url: 'http://a?x=1'}}", "upstreams.a.url", "URL_MALFORMED"),
        ("upstreams: {a: {url: 'http://a:99999'}}", "upstreams.a.url", "URL_MALFORMED"),
        ("upstreams: {a: {url: http://a, timeout: 0s}}", "upstreams.a.timeout", "DURATION_MALFORMED"),
        ("upstreams: {a: {url: http://a, timeout: 2h}}", "upstreams.a.timeout", "DURATION_MALFORMED"),
        ("upstreams: {'a b': {url: http://a}}", "upstreams.a b", "NAME_MALFORMED"),
        ("upstreams: []", "upstreams", "FIELD_MALFORMED"),
        ("routes: {}", "routes", "FIELD_MALFORMED"),
        ("5", None, "FIELD_MALFORMED"),
        (ROUTE.format("rewrite: {set_headers: {Host: x}}"), "routes[0].rewrite.set_headers", "HEADER_RESERVED"),
        (ROUTE.format("rewrite: {set_headers: {Farebox-Plan: x}}"), "routes[0].rewrite.set_headers", "HEADER_RESERVED"),
        (ROUTE.format('rewrite: {set_headers: {X-A: "a\\r\\nB: c"}}'), "routes[0].rewrite.set_headers", "HEADER_MALFORMED"),
        (ROUTE.format("rewrite: {set_headers: {X-A: '{secret}'}}"), "routes[0].rewrite.set_headers", "VARIABLE_UNKNOWN"),
        (ROUTE.format("fares: {exact: {price: 0 USDC}}"), "routes[0].fares.exact.price", "PRICE_ZERO"),
        (ROUTE.format("fares: {exact: {price: -1 USDC}}"), "routes[0].fares.exact.price", "PRICE_MALFORMED"),
        (ROUTE.format("fares: {exact: {price: 0.001}}"), "routes[0].fares.exact.price", "PRICE_MALFORMED"),
        (ROUTE.format("fares: {exact: {price: 1e400 USDC}}"), "routes[0].fares.exact.price", "PRICE_MALFORMED"),
        (ROUTE.format("fares: {exact: {price: 1 USD}}"), "routes[0].fares.exact.price", "ASSET_WITHOUT_TOKEN"),
        (ROUTE.format("fares: {exact: {price: 1 USDC, schemes: []}}"), "routes[0].fares.exact.schemes", "FIELD_MALFORMED"),
        (ROUTE.format("fares: {exact: {price: 1 USDC, pay_to: {'eip155:84532': '0x12'}}}"), "routes[0].fares.exact.pay_to.eip155:84532", "ADDRESS_MALFORMED"),
        (ROUTE.format("fares: {exact: {price: 1 USDC, pay_to: {'eip155:8453': '" + OTHER + "'}}}"), "routes[0].fares.exact.pay_to.eip155:8453", "NETWORK_UNAVAILABLE"),
        (ROUTE.format("fares: {passes: [{id: h, name: H, price: 1 EURC, duration: 1h}]}"), "routes[0].fares.passes[0].price", "ASSET_WITHOUT_TOKEN"),
        (
            ROUTE.format("fares: {passes: [{id: h, name: H, price: 1 USDC, duration: 1h}, {id: h, name: H, price: 1 USDC, duration: 1h}]}"),
            "routes[0].fares.passes[1].id",
            "PASS_DUPLICATE",
        ),
        (ROUTE.format("fares: {}") + "\n - {id: r, match: {path: /x}, upstream: a}", "routes[1].id", "ROUTE_DUPLICATE"),
        (ROUTE.format("metric: nothing"), "routes[0].metric", "METRIC_UNKNOWN"),
        ("metrics: [{key: m, name: M, aggregation: sum}, {key: m, name: M, aggregation: sum}]", "metrics[1].key", "METRIC_DUPLICATE"),
        ("metrics: [{key: m, name: M, aggregation: unique_count}]", "metrics[0].property", "PROPERTY_REQUIRED"),
        (PLAN.format("charges: [{pricing_model: barter, properties: {}}]"), "plans[0].charges[0]", "PRICING_MODEL_UNKNOWN"),
        (PLAN.format("charges: [{metric_key: m, pricing_model: per_unit, properties: {unit_price: .nan}}]"), None, "YAML_MALFORMED"),
        (PLAN.format("charges: [{metric_key: m, pricing_model: per_unit, properties: {unit_price: '1e5'}}]"), "plans[0].charges[0].properties.unit_price", "DECIMAL_MALFORMED"),
        (PLAN.format("charges: [{metric_key: m, pricing_model: per_unit, properties: {unit_price: 1e400}}]"), "plans[0].charges[0].properties.unit_price", "DECIMAL_OUT_OF_BOUNDS"),
        (PLAN.format("charges: [{metric_key: m, pricing_model: per_unit, properties: {unit_price: true}}]"), "plans[0].charges[0].properties.unit_price", "DECIMAL_MALFORMED"),
        (
            PLAN.format("charges: [{metric_key: m, pricing_model: tiered, properties: {tiers: [{up_to: 5, unit_price: 1}, {up_to: 3, unit_price: 1}, {up_to: null, unit_price: 0}]}}]"),
            "plans[0].charges[0].properties.tiers[1].up_to",
            "TIERS_NOT_ASCENDING",
        ),
        (PLAN.format("entitlements: {m: {type: limit, metric_key: zz, limit: 1}}"), "plans[0].entitlements.m.metric_key", "METRIC_UNKNOWN"),
        (PLAN.format("entitlements: {m: {typ: limit}}"), "plans[0].entitlements.m", "FIELD_MALFORMED"),
        ("payments: {defaults: {network: base}}", "payments.defaults.network", "NETWORK_MALFORMED"),
        ("server: {trusted_proxies: [everyone]}", "server.trusted_proxies[0]", "ADDRESS_MALFORMED"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_path(text: str, path: str | None, code: str):
    assert faults(text) == {path: code}


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "a: [", "\t- x", "[" * 5000, "a: &a [*a]", "x: !!python/object:os.system {}", "\x00", "a: 1_\n b: 2", "- a\nb: c",
     'upstreams: {"\\uD800": {url: "http://a"}}', 'metrics: [{key: "a\\0"}]', '"\\uDFFF"'],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused(text: str):
    with pytest.raises(Refused) as caught:
        read_catalog(text, SANDBOX)
    assert caught.value.reason.code == "YAML_MALFORMED"


def test_aliases_may_not_unfold_into_gigabytes():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(Refused) as caught:
        read_catalog("\n".join(lines), SANDBOX)
    assert caught.value.reason.code == "YAML_MALFORMED"


def test_a_duplicate_key_is_named_with_its_line():
    with pytest.raises(Refused, match=r'line 3: duplicate key "r"'):
        read_catalog("upstreams:\n  r: {url: http://a}\n  r: {url: http://b}", SANDBOX)


# ── live mode ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_live_mode_somebody_must_be_named_to_be_paid():
    found = faults(ROUTE.format("fares: {exact: {price: 1 USDC}}"), LIVE)
    assert found == {"routes[0].fares.exact.pay_to": "PAY_TO_MISSING"}


def test_in_live_mode_a_network_without_a_rail_is_refused():
    text = (
        "payments: {defaults: {network: 'eip155:8453', pay_to: '"
        + OTHER
        + "'}}\n"
        + ROUTE.format("fares: {exact: {price: 1 USDC}}")
    )
    assert faults(text, LIVE)["payments.defaults.network"] == "NETWORK_UNAVAILABLE"


def test_a_live_shop_that_sells_by_account_alone_is_fine():
    catalog = read_catalog(ROUTE.format("fares: {account: {}}"), LIVE)
    assert catalog.gateway.assets == ()
