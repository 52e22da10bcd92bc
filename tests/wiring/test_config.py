"""Configuration: every fault at once, with the variable's name and a remedy; secrets that stay secret."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from farebox.base.errors import Refused
from farebox.config import VARIABLES, Config, unknown_variables
from farebox.wiring.gateway import gateway_settings

ROOT = Path(__file__).parents[2]
MASTER = "0123456789abcdef0123456789abcdef"


def no_file(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory")


def faults_of(values: dict[str, str]) -> dict[str, str]:
    with pytest.raises(Refused) as refused:
        Config.parse(values, no_file)
    return {str(r.field): r.message for r in refused.value.reasons}


def test_an_empty_environment_is_a_configuration():
    config = Config.parse({})
    assert config.mode == "live"
    assert config.gateway.port == 8402
    assert config.gateway.paid_body_bytes_max == 1024 * 1024
    assert config.admission.stale_grant_s_max == 900


def test_every_fault_is_named_at_once():
    found = faults_of(
        {
            "FAREBOX_MODE": "test",
            "FAREBOX_DATABASE_URL": "mysql://root:hunter2@db/farebox",
            "FAREBOX_MASTER_KEY": "short",
            "FAREBOX_GATEWAY_PORT": "99999",
            "FAREBOX_GATEWAYS": "-1",
            "FAREBOX_BODY_BYTES_MAX": "1GiB",
            "FAREBOX_LEASE_S": "soon",
            "FAREBOX_PUBLIC_URL": "api.example.com",
            "FAREBOX_KEY_TOKENS": "abc",
            "FAREBOX_SPOOL_ON_FULL": "panic",
        }
    )
    assert set(found) == {
        "FAREBOX_MODE", "FAREBOX_DATABASE_URL", "FAREBOX_MASTER_KEY", "FAREBOX_GATEWAY_PORT", "FAREBOX_GATEWAYS",
        "FAREBOX_BODY_BYTES_MAX", "FAREBOX_LEASE_S", "FAREBOX_PUBLIC_URL", "FAREBOX_KEY_TOKENS", "FAREBOX_SPOOL_ON_FULL",
    }  # fmt: skip
    assert "write live or sandbox" in found["FAREBOX_MODE"]
    assert "openssl rand" in found["FAREBOX_MASTER_KEY"]
    assert "hunter2" not in str(found)


def test_a_forward_auth_listener_needs_a_secret_that_fits_into_every_edges_configuration():
    off = Config.parse({}).authorize
    on = Config.parse({"FAREBOX_AUTHORIZE_PORT": "0", "FAREBOX_EDGE_SECRET": MASTER}).authorize

    assert (off.port, off.secret) == (None, None)
    assert (on.host, on.port) == ("127.0.0.1", 0)
    assert str(on.secret) == "***"
    assert "openssl rand" in faults_of({"FAREBOX_AUTHORIZE_PORT": "8404"})["FAREBOX_EDGE_SECRET"]
    for secret in (
        "short",
        MASTER + '"; return 200',
        MASTER + "$x",
        MASTER + "%x",
        MASTER + " x",
        MASTER + "é",
    ):
        assert "letters, digits" in faults_of({"FAREBOX_EDGE_SECRET": secret})["FAREBOX_EDGE_SECRET"]


@pytest.mark.parametrize("value", ["", "1e3", "0x10", "１", " 5", "5 ", "NaN", "1" * 400])
def test_whole_numbers_are_plain_digits(value: str):
    if value == "":
        assert Config.parse({"FAREBOX_GATEWAYS": value}).gateway.processes == 1, "empty means unset"
    else:
        assert "FAREBOX_GATEWAYS" in faults_of({"FAREBOX_GATEWAYS": value})


@pytest.mark.parametrize(
    ("written", "bytes_"), [("65536", 65_536), ("64kB", 64_000), ("1MB", 1_000_000), ("2GB", 2_000_000_000)]
)
def test_sizes_are_powers_of_a_thousand(written: str, bytes_: int):
    assert Config.parse({"FAREBOX_BODY_BYTES_MAX": written}).gateway.body_bytes_max == bytes_


def test_what_an_operator_sets_is_what_a_gateway_keeps():
    settings = gateway_settings(
        Config.parse(
            {
                "FAREBOX_BUFFERED_BYTES_PER_CLIENT_MAX": "2MB",
                "FAREBOX_PAID_BODY_TIMEOUT_S": "7",
                "FAREBOX_TUNNEL_IDLE_TIMEOUT_S": "8",
                "FAREBOX_UPSTREAM_ATTEMPTS_MAX": "5",
            }
        )
    )

    assert settings.buffered_bytes_per_client_max == 2_000_000
    assert settings.paid_body_timeout_s == 7
    assert settings.tunnel_idle_timeout_s == 8
    assert settings.attempts_max == 5


def test_an_alias_is_read_and_the_own_name_wins():
    config = Config.parse(
        {
            "PORT": "9000",
            "API_RATE_LIMIT_RPM": "5",
            "API_MASTER_KEY": MASTER,
            "LOG_LEVEL": "debug",
            "FAREBOX_LOG_LEVEL": "error",
        }
    )
    assert (config.api.port, config.api.rate_limit_rpm, config.log.level) == (9000, 5, "error")
    assert config.admin_key.startswith("fbx_sk_")


def test_a_fault_names_the_alias_under_which_the_value_came():
    assert set(faults_of({"PORT": "http", "DATABASE_URL": "x"})) == {"PORT", "DATABASE_URL"}


def test_a_secret_may_come_from_a_file():
    files = {"/run/secrets/master": MASTER + "\n", "/run/secrets/db": "postgresql://u:p@h/d\n"}
    config = Config.parse(
        {"FAREBOX_MASTER_KEY_FILE": "/run/secrets/master", "DATABASE_URL_FILE": "/run/secrets/db"},
        files.__getitem__,
    )
    assert config.master_key is not None
    assert config.master_key.reveal() == MASTER
    assert config.database_url == "postgresql://u:p@h/d"


def test_a_file_that_cannot_be_read_is_a_fault_and_so_is_giving_both():
    assert (
        "cannot read /nowhere"
        in faults_of({"FAREBOX_MASTER_KEY_FILE": "/nowhere"})["FAREBOX_MASTER_KEY_FILE"]
    )
    assert "FAREBOX_MASTER_KEY" in faults_of(
        {"FAREBOX_MASTER_KEY_FILE": "/nowhere", "FAREBOX_MASTER_KEY": MASTER}
    )


def test_secrets_never_show_in_the_tree():
    config = Config.parse(
        {
            "FAREBOX_MASTER_KEY": MASTER,
            "FAREBOX_DATABASE_URL": "postgresql://u:hunter2@h/d",
            "FAREBOX_KEY_TOKENS": "ab" * 32,
        }
    )
    for shown in (repr(config), str(config), repr(config.keys)):
        assert MASTER not in shown
        assert "hunter2" not in shown
        assert "abab" not in shown


def test_keys_differ_by_purpose_and_mode_and_may_be_given_separately():
    live = Config.parse({"FAREBOX_MASTER_KEY": MASTER}).keys
    sandbox = Config.parse({"FAREBOX_MASTER_KEY": MASTER, "FAREBOX_MODE": "sandbox"}).keys
    assert len({live.quotes, live.tokens, sandbox.quotes, sandbox.tokens}) == 4
    own = Config.parse({"FAREBOX_MASTER_KEY": MASTER, "FAREBOX_KEY_TOKENS": "ab" * 32}).keys
    assert own.tokens == b"\xab" * 32
    assert own.quotes == live.quotes


def test_what_is_needed_and_missing_is_refused_when_asked_for():
    with pytest.raises(Refused, match="FAREBOX_DATABASE_URL: is not set"):
        _ = Config.parse({}).database_url
    with pytest.raises(Refused, match="FAREBOX_MASTER_KEY: is not set"):
        _ = Config.parse({}).keys


def test_a_misspelt_variable_is_noticed():
    assert unknown_variables(
        {
            "FAREBOX_MASTERKEY": "",
            "FAREBOX_MODE": "",
            "FAREBOX_SECRET_FAC1": "",
            "FAREBOX_MASTER_KEY_FILE": "",
            "PATH": "",
        }
    ) == ["FAREBOX_MASTERKEY"]


def test_every_variable_is_in_the_reference_and_nothing_else_is():
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| ([^|]*) \|", page, re.MULTILINE))
    assert set(rows) == {v.name for v in VARIABLES}
    for variable in VARIABLES:
        assert rows[variable.name].strip(" `") == (variable.default or "unset"), variable.name
        for alias in variable.aliases:
            assert f"`{alias}`" in page
