"""The command line without a running Farebox: clear refusals, exit codes, JSON where data is printed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "src" / "farebox" / "cli" / "sample" / "farebox.yaml"


def farebox(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a directory of its own, with nothing of ours in its environment."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("FAREBOX_", "T402_", "DATABASE_", "API_", "PORT"))
    }
    return subprocess.run(
        [sys.executable, "-m", "farebox", *map(str, arguments)],
        cwd=cwd,
        env={**clean, "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("farebox: "), done.stderr
    return done.stderr


def test_version_is_quick_and_says_the_version(tmp_path: Path):
    from farebox import __version__

    assert farebox("version", cwd=tmp_path).stdout == f"farebox {__version__}\n"
    assert json.loads(farebox("version", "--json", cwd=tmp_path).stdout)["version"] == __version__


def test_asking_for_the_version_loads_next_to_nothing():
    program = (
        "import sys; sys.argv = ['farebox', 'version']; import farebox.cli; farebox.cli.main(); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'typer', 'pydantic', 'fastapi', 'psycopg', 'httpx', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_names_every_command_and_starts_without_the_heavy_libraries(tmp_path: Path):
    done = farebox("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "up",
        "demo",
        "gateway",
        "api",
        "worker",
        "migrate",
        "apply",
        "diff",
        "export",
        "pay",
        "price",
    ):
        assert f"\n  {command} " in done.stdout
    program = (
        "import sys, farebox.cli.commands; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'pydantic', 'fastapi', 'psycopg', 'httpx', 'coincurve'}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_wrong_usage_is_exit_code_2(tmp_path: Path):
    for wrong in (["nonsense"], ["up", "--nonsense"], ["price"], ["keys", "create"]):
        assert farebox(*wrong, cwd=tmp_path).returncode == 2, wrong
    assert "needs a URL" in refused(farebox("up", "--price", "0.001 USDC", cwd=tmp_path), 2)
    assert "add --sandbox" in refused(
        farebox("up", "http://127.0.0.1:1", "--price", "0.001 USDC", cwd=tmp_path), 2
    )
    assert "write it like" in refused(farebox("pay", "weather", cwd=tmp_path), 2)


@pytest.mark.parametrize("price", ["0.0000001 USDC", "0 USDC", "1 EUR", "-1 USDC", "cheap"])
def test_a_price_that_is_none_is_refused(tmp_path: Path, price: str):
    done = farebox("up", "--sandbox", "http://127.0.0.1:1", "--price", price, cwd=tmp_path)
    assert "--price: " in refused(done)
    assert list(tmp_path.iterdir()) == [], "nothing was started and nothing written"


def test_live_mode_names_everything_that_is_missing(tmp_path: Path):
    said = refused(farebox("up", cwd=tmp_path))
    for name in ("FAREBOX_MASTER_KEY", "FAREBOX_PAYMENT_NETWORK", "FAREBOX_PAYMENT_PAY_TO"):
        assert f"farebox: {name}: is not set" in said
    assert "openssl rand" in said
    assert list(tmp_path.iterdir()) == []


def test_live_mode_takes_network_and_recipient_from_the_file(tmp_path: Path):
    (tmp_path / "farebox.yaml").write_text(
        'payments: {defaults: {network: "eip155:8453", pay_to: "0x0000000000000000000000000000000000000001"}}\n'
    )
    said = refused(farebox("up", "-f", "farebox.yaml", cwd=tmp_path))
    assert "FAREBOX_MASTER_KEY" in said
    assert "PAYMENT" not in said


@pytest.mark.parametrize("role", ["gateway", "api", "worker"])
def test_a_single_role_needs_a_database_and_a_master_key(tmp_path: Path, role: str):
    said = refused(farebox(role, cwd=tmp_path))
    assert "FAREBOX_DATABASE_URL (nor DATABASE_URL)" in said.replace(": is not set (nor", " (nor")
    assert "FAREBOX_MASTER_KEY" in said


def test_the_sandbox_listens_on_loopback_only(tmp_path: Path):
    done = farebox(
        "up", "--sandbox", cwd=tmp_path, FAREBOX_GATEWAY_HOST="0.0.0.0", FAREBOX_API_HOST="192.0.2.1"
    )
    said = refused(done)
    assert "FAREBOX_GATEWAY_HOST" in said
    assert "FAREBOX_API_HOST" in said


def test_bad_configuration_names_every_variable(tmp_path: Path):
    done = farebox("up", "--sandbox", cwd=tmp_path, FAREBOX_GATEWAYS="many", FAREBOX_LOG_LEVEL="loud")
    said = refused(done)
    assert "FAREBOX_GATEWAYS: " in said
    assert "FAREBOX_LOG_LEVEL: " in said


@pytest.mark.parametrize(
    "command", [["export"], ["apply", "-f", "x.yaml"], ["keys", "list"], ["invoice", "show", "inv_1"]]
)
def test_commands_that_need_a_running_farebox_say_so(tmp_path: Path, command: list[str]):
    (tmp_path / "x.yaml").write_text("{}\n")
    assert "nothing runs in" in refused(farebox(*command, cwd=tmp_path))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    assert "cannot read nowhere.yaml" in refused(
        farebox("price", "-f", "nowhere.yaml", "--usage", "a=1", cwd=tmp_path)
    )


# ── price ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_price_shows_lines_and_steps(tmp_path: Path):
    done = farebox("price", "-f", SAMPLE, "--usage", "api_calls=1374923", cwd=tmp_path)
    assert done.returncode == 0
    assert "total  2770.01 USD" in done.stdout
    assert "tier 3: 1,374,823 × 0.002 = 2,749.646" in done.stdout


def test_a_price_as_json_is_in_minor_units(tmp_path: Path):
    done = farebox("price", "-f", SAMPLE, "--usage", "api_calls=25", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["total_amount"] == 2006
    assert sum(line["amount"] for line in document["line_items"]) == 2006


def test_one_plan_may_stand_alone_in_its_file(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(
        "id: p\nname: P\ncurrency: EUR\nbilling_period: monthly\n"
        'charges: [{metric_key: tokens, pricing_model: per_unit, properties: {unit_price: "0.00002"}}]\n'
    )
    done = farebox("price", "-f", "plan.yaml", "--usage", "tokens=1000000", cwd=tmp_path)
    assert "total  20.00 EUR" in done.stdout, done


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        ("api_calls=-1", "negative"),
        ("api_calls=1e9", "not a plain decimal"),
        ("api_calls", "write metric=quantity"),
        ("api_calls=NaN", "not a plain decimal"),
        ("storage=1", "no charge for storage"),
    ],
)
def test_usage_that_cannot_be_priced_is_refused(tmp_path: Path, usage: str, said: str):
    assert said in refused(farebox("price", "-f", SAMPLE, "--usage", usage, cwd=tmp_path))


def test_a_bad_plan_is_refused_with_every_fault(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(
        "id: p\nname: P\ncurrency: EURO\nbilling_period: fortnight\ncharges: []\n"
    )
    said = refused(farebox("price", "-f", "plan.yaml", "--usage", "a=1", cwd=tmp_path))
    assert "plans[0].currency" in said
    assert "plans[0].billing_period" in said


# ── wallets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wallet_is_made_once_and_for_its_owner_alone(tmp_path: Path):
    made = json.loads(farebox("wallet", "new", "--json", cwd=tmp_path).stdout)
    file = Path(made["file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(farebox("wallet", "show", "--json", cwd=tmp_path).stdout) == made
    assert "exists and is kept" in refused(farebox("wallet", "new", cwd=tmp_path))
    key = json.loads(file.read_text())["private_key"]
    assert key not in farebox("wallet", "show", cwd=tmp_path).stdout


def test_a_wallet_that_others_can_read_is_not_used(tmp_path: Path):
    farebox("wallet", "new", "--wallet", "w.json", cwd=tmp_path)
    (tmp_path / "w.json").chmod(0o644)
    assert "chmod 600" in refused(farebox("pay", "http://127.0.0.1:1/", "--wallet", "w.json", cwd=tmp_path))


def test_a_seller_that_does_not_answer_is_one_line(tmp_path: Path):
    farebox("wallet", "new", cwd=tmp_path)
    assert "does not answer" in refused(farebox("pay", "http://127.0.0.1:1/", cwd=tmp_path))


def test_the_openapi_document_is_printed_without_a_database(tmp_path: Path):
    document = json.loads(farebox("openapi", cwd=tmp_path).stdout)
    assert document["openapi"].startswith("3.1")
    assert "/v1/invoices" in document["paths"]
