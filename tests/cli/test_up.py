"""``farebox up``: one command, every process; what falls is raised, what stops leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.test_commands import farebox, refused
from tests.journeys.house import House, Upstream, counting_upstream, farebox_up


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    with counting_upstream(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One house for the tests that do it no harm."""
    directory = tmp_path_factory.mktemp("shared")
    with counting_upstream(directory) as upstream, farebox_up(directory / "house", upstream) as running:
        yield running


def data_of(house: House) -> tuple[str, Path]:
    return ("--data", house.output.parent / "data")


def until(condition: Callable[[], Any], within_s: float = 30.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def every_pid(house: House) -> list[int]:
    pids = house.ready["pids"]
    return [pid for found in pids.values() for pid in ([found] if isinstance(found, int) else found)]


def ops(house: House, path: str) -> httpx.Response:
    return httpx.get(house.ready["ops_url"] + path, timeout=30)


def test_it_says_where_everything_is_and_stops_without_a_trace(tmp_path: Path, upstream: Upstream):
    with farebox_up(tmp_path / "house", upstream, gateways=2) as house:
        ready_file = tmp_path / "house" / "ready.json"
        assert {k: len(v) if isinstance(v, list) else 1 for k, v in house.ready["pids"].items()} == {
            "gateway": 2,
            "api": 1,
            "worker": 1,
            "shipper": 1,
            "postgres": 1,
        }
        assert house.ready["admin_key"].startswith("fbx_sk_")
        assert stat.S_IMODE(ready_file.stat().st_mode) == 0o600
        assert ops(house, "/healthz").json() == {"status": "ok"}
        assert ops(house, "/ready").json()["status"] == "ready"
        assert 'farebox_process_ready{kind="gateway",process="gw1"} 1.0' in ops(house, "/metrics").text
        assert ops(house, "/secrets").status_code == 404
        pids = every_pid(house)
        key = house.account_key()
        for _ in range(20):
            assert (
                httpx.get(f"{house.gateway_url}/w", headers={"X-API-Key": key}, timeout=30).status_code == 200
            )

        house.process.send_signal(signal.SIGTERM)

        assert house.process.wait(40) == 0
        assert not [pid for pid in pids if alive(pid)]
        assert not ready_file.exists()
        order = [line for line in house.output.read_text().splitlines() if '"event": "stopping"' in line]
        assert [json.loads(line)["children"] for line in order] == [
            ["gateway"],
            ["shipper"],
            ["api", "worker"],
            ["postgres"],
        ]

    with farebox_up(tmp_path / "house", upstream) as again:
        assert again.rows("SELECT count(*) FROM usage_event") == [(20,)], (
            "the spool was emptied before the end"
        )


@pytest.mark.parametrize("reached", ["lock", "database/postgres.lock", "spool"])
def test_it_can_be_stopped_while_it_starts(tmp_path: Path, reached: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "farebox", "up", "--sandbox", "--data", str(tmp_path / "data"),
         "--gateway-port", "0", "--api-port", "0", "--ops-port", "0"],
        cwd=tmp_path, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: (tmp_path / "data" / reached).exists() or process.poll() is not None)
    process.terminate()
    assert process.wait(60) == 0
    until(lambda: not [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in command_line(p)])


def test_whoever_is_told_to_stop_again_and_again_stops_all_the_same(tmp_path: Path):
    """Also in its last moments, when the loop that heard the first signal is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "farebox", "up", "--sandbox", "--data", str(tmp_path / "data"),
         "--gateway-port", "0", "--api-port", "0", "--ops-port", "0", "--ready-file", str(tmp_path / "ready.json")],
        cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: (tmp_path / "ready.json").exists() or process.poll() is not None, within_s=60)
    while process.poll() is None:
        process.terminate()
        time.sleep(0.001)
    assert process.returncode == 0
    until(lambda: not [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in command_line(p)])


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_what_falls_is_raised_on_the_same_address(tmp_path: Path, upstream: Upstream):
    with farebox_up(tmp_path / "house", upstream) as house:
        key = house.account_key()
        for role in ("gateway", "api", "worker", "shipper"):
            os.kill(house.ready["pids"][role][0], signal.SIGKILL)
        # No pause: the call waits in the socket's queue for the gateway's successor.
        assert httpx.get(f"{house.gateway_url}/w", headers={"X-API-Key": key}, timeout=30).status_code == 200
        until(lambda: ops(house, "/ready").status_code == 200)
        assert house.get("/v1/customers/acme")["id"] == "acme"
        assert "farebox_process_restarts_total" in ops(house, "/metrics").text

        os.kill(house.ready["pids"]["postgres"], signal.SIGKILL)
        # Its own word, not a look at /ready meanwhile: it may be back before anyone has looked.
        until(lambda: "the embedded database is back" in house.output.read_text())
        until(lambda: ops(house, "/ready").status_code == 200)
        assert house.get("/v1/customers/acme")["id"] == "acme", "the same data"


def test_after_a_sigkill_nothing_is_left_and_the_next_start_works(tmp_path: Path, upstream: Upstream):
    with farebox_up(tmp_path / "house", upstream) as house:
        key = house.account_key()
        for _ in range(5):
            assert (
                httpx.get(f"{house.gateway_url}/w", headers={"X-API-Key": key}, timeout=30).status_code == 200
            )
        pids = every_pid(house)
        house.process.kill()
        house.process.wait()
        until(lambda: not [pid for pid in pids if alive(pid)])

    (tmp_path / "house" / "ready.json").unlink()
    with farebox_up(tmp_path / "house", upstream) as again:
        until(lambda: again.rows("SELECT count(*) FROM usage_event") == [(5,)])
        answer = httpx.get(f"{again.gateway_url}/w", headers={"X-API-Key": key}, timeout=30)
        assert answer.status_code == 200, "the same data, the same key"


def test_sighup_renews_the_gateways_without_dropping_a_request(tmp_path: Path, upstream: Upstream):
    with farebox_up(tmp_path / "house", upstream, gateways=2) as house:
        key = house.account_key()
        before = house.gateway_pids
        house.process.send_signal(signal.SIGHUP)
        calls = 0
        while any(alive(pid) for pid in before):
            # One connection a call, as a client behind a load balancer: none may be refused or broken.
            assert (
                httpx.get(f"{house.gateway_url}/w", headers={"X-API-Key": key}, timeout=30).status_code == 200
            )
            calls += 1
        assert calls
        assert len(upstream.calls()) == calls
        assert ops(house, "/ready").status_code == 200


def test_one_data_directory_has_one_supervisor_and_a_taken_port_is_said(tmp_path: Path, shared: House):
    second = farebox("up", "--sandbox", *data_of(shared), cwd=tmp_path)
    assert f"already runs in {data_of(shared)[1]} (process {shared.process.pid})" in refused(second)

    port = shared.gateway_url.rsplit(":", 1)[1]
    elsewhere = farebox("up", "--sandbox", "--data", "other", "--gateway-port", port, cwd=tmp_path)
    assert f"cannot listen on 127.0.0.1:{port}" in elsewhere.stderr
    assert "--gateway-port" in elsewhere.stderr
    assert httpx.get(shared.gateway_url + "/w", timeout=30).status_code == 402, "it goes on undisturbed"


def test_a_sandbox_database_is_refused_in_live_mode(tmp_path: Path, database_url: str):
    live = {
        "FAREBOX_DATABASE_URL": database_url,
        "FAREBOX_MASTER_KEY": "0123456789abcdef0123456789abcdef",
        "T402_NETWORK": "eip155:8453",
        "T402_PAY_TO": "0x0000000000000000000000000000000000000001",
        "FAREBOX_LOG_LEVEL": "warning",
    }
    ports = ("--gateway-port", "0", "--api-port", "0", "--ops-port", "0")
    said = refused(farebox("up", *ports, cwd=tmp_path, **live))
    assert "this database was made for sandbox mode and is asked for in live mode" in said
    assert "made for sandbox mode" in refused(farebox("migrate", cwd=tmp_path, **live))


def test_live_mode_serves_accounts_and_sells_nothing_it_cannot_settle(
    tmp_path: Path, upstream: Upstream, empty_database_url: str
):
    shop = tmp_path / "farebox.yaml"
    route = f'upstreams: {{a: {{url: "{upstream.url}"}}}}\nroutes: [{{id: r, match: {{path: "/{{*rest}}"}}, upstream: a, fares: {{%s}}}}]\n'
    shop.write_text(route % 'exact: {price: "0.001 USDC"}')
    live = {
        "FAREBOX_DATABASE_URL": empty_database_url,
        "FAREBOX_MASTER_KEY": "0123456789abcdef0123456789abcdef",
        "T402_NETWORK": "eip155:8453",
        "T402_PAY_TO": "0x0000000000000000000000000000000000000001",
        "FAREBOX_LOG_LEVEL": "warning",
    }
    command = ("up", "-f", shop, "--gateway-port", "0", "--api-port", "0", "--ops-port", "0")
    assert "routes[0].fares.exact" in refused(farebox(*command, cwd=tmp_path, **live))

    shop.write_text(route % "account: {}")
    environment = {**os.environ, **live}
    process = subprocess.Popen(
        [sys.executable, "-m", "farebox", *map(str, command), "--ready-file", "ready.json"],
        cwd=tmp_path,
        env=environment,
    )
    try:
        ready_file = tmp_path / "ready.json"
        until(lambda: ready_file.exists() or process.poll() is not None, within_s=60)
        ready = json.loads(ready_file.read_text())
        answer = httpx.get(ready["gateway_url"] + "/w", timeout=30)
        assert answer.status_code == 401
        assert "farebox-sandbox" not in answer.headers
    finally:
        process.terminate()
        assert process.wait(40) == 0


def test_the_shop_is_applied_compared_and_written_while_it_runs(tmp_path: Path, shared: House):
    data = data_of(shared)
    exported = farebox("export", *data, cwd=tmp_path)
    shop = tmp_path / "farebox.yaml"
    shop.write_text(exported.stdout)
    assert farebox("diff", "-f", shop, *data, cwd=tmp_path).stdout == "no difference\n"
    assert farebox("apply", "-f", shop, *data, cwd=tmp_path).stdout == "nothing to change\n"

    shop.write_text(exported.stdout.replace("0.001 USDC", "0.002 USDC"))
    told = json.loads(farebox("diff", "-f", shop, *data, "--json", cwd=tmp_path).stdout)
    assert told["changed"]
    assert "0.002" in farebox("apply", "-f", shop, *data, cwd=tmp_path).stdout
    until(lambda: "0.002" in httpx.get(shared.gateway_url + "/w", timeout=30).text)

    shop.write_text(exported.stdout.replace("0.001 USDC", "cheap").replace("api_calls", "unheard_of", 1))
    said = refused(farebox("apply", "-f", shop, *data, cwd=tmp_path))
    assert "routes[0].fares.exact.price" in said
    assert "0.002" in httpx.get(shared.gateway_url + "/w", timeout=30).text, "a bad file changes nothing"


def test_keys_of_the_control_api_are_made_rotated_and_revoked(tmp_path: Path, shared: House):
    data = data_of(shared)

    def status(key: str) -> int:
        url = shared.api_url + "/v1/metrics"
        return httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=30).status_code

    made = json.loads(
        farebox("keys", "create", "reader", "--scope", "admin", *data, "--json", cwd=tmp_path).stdout
    )
    assert status(made["key"]) == 200
    rotated = json.loads(farebox("keys", "rotate", made["key_id"], *data, "--json", cwd=tmp_path).stdout)
    until(lambda: status(made["key"]) == 401)
    assert status(rotated["key"]) == 200
    farebox("keys", "revoke", rotated["key_id"], *data, cwd=tmp_path)
    until(lambda: status(rotated["key"]) == 401)
    listed = farebox("keys", "list", *data, cwd=tmp_path).stdout
    assert listed.count("revoked") == 2
    assert made["key"] not in listed
    assert "scopes" in refused(farebox("keys", "create", "x", "--scope", "everything", *data, cwd=tmp_path))


def test_an_api_is_sold_without_a_file_and_a_stranger_pays_it(tmp_path: Path, upstream: Upstream):
    process = subprocess.Popen(
        [sys.executable, "-m", "farebox", "up", "--sandbox", upstream.url, "--price", "0.001 USDC", "--data", "data",
         "--gateway-port", "0", "--api-port", "0", "--ops-port", "0", "--ready-file", "ready.json"],
        cwd=tmp_path, stdout=(tmp_path / "up.out").open("wb"), stderr=subprocess.DEVNULL,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")},
            "FAREBOX_PUBLIC_URL": "https://api.example.com",
        },
    )  # fmt: skip
    try:
        said = tmp_path / "up.out"
        until(lambda: "Calls:" in said.read_text() or process.poll() is not None, within_s=60)
        lines = [line.strip().split("   ")[0].strip() for line in said.read_text().splitlines()]
        with_key = next(line for line in lines if line.startswith("curl -H"))
        shows_402 = next(line for line in lines if line.startswith("curl -i"))
        pays = next(line for line in lines if line.startswith("farebox pay"))

        key, url = with_key.split("'")[1].removeprefix("X-API-Key: "), shows_402.split()[-1]
        assert httpx.get(url, headers={"X-API-Key": key}, timeout=30).status_code == 200
        unpaid = httpx.get(url, timeout=30)
        assert unpaid.status_code == 402
        offers = json.loads(base64.b64decode(unpaid.headers["payment-required"]))
        assert offers["resource"]["url"] == "https://api.example.com/", "buyers see the public address"
        paid = farebox("pay", pays.split()[-1], "--json", cwd=tmp_path)
        receipt = json.loads(paid.stdout)["receipt"]
        assert receipt["price"] == "0.001 USDC"
        assert receipt["transaction"].startswith("0x")
        assert len(upstream.calls()) == 2

        # One line a call with its price; the refused call is none.
        until(lambda: said.read_text().count("req_") == 2)
        tail = [line for line in said.read_text().splitlines() if "req_" in line]
        assert all("0.001 USDC" in line for line in tail)

        too_dear = farebox("pay", url, "--max", "0.0005 USDC", cwd=tmp_path)
        assert "it costs 0.001" in refused(too_dear)
        assert len(upstream.calls()) == 2
    finally:
        process.terminate()
        assert process.wait(40) == 0


def test_a_pass_is_bought_and_kept_beside_the_wallet(tmp_path: Path, shared: House):
    gateway = ("--gateway", shared.gateway_url)
    bought = farebox("pass", "buy", "forecast", "five", *gateway, "--json", cwd=tmp_path)
    token = json.loads(bought.stdout)["token"]
    answer = httpx.get(shared.gateway_url + "/w", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    assert answer.status_code == 200
    shown = json.loads(farebox("pass", "show", "--json", cwd=tmp_path).stdout)["data"]
    assert [row["token"] for row in shown] == [token]
    assert stat.S_IMODE((tmp_path / ".farebox" / "wallet.passes.json").stat().st_mode) == 0o600
    said = refused(farebox("pass", "buy", "forecast", "ten", *gateway, cwd=tmp_path))
    assert "these are: five" in said


def test_an_invoice_is_previewed_issued_and_shown(tmp_path: Path, shared: House):
    data = data_of(shared)
    shared.post("/v1/customers", {"id": "acme", "name": "Acme"})
    shared.post(
        "/v1/subscriptions",
        {
            "customer_id": "acme",
            "plan_id": "starter",
            "start_date": "2026-01-01T00:00:00Z",
            "end_date": "2026-02-01T00:00:00Z",
        },
    )
    shared.post(
        "/v1/events",
        {
            "customer_id": "acme",
            "metric_key": "api_calls",
            "value": 150,
            "timestamp": "2026-01-15T00:00:00Z",
            "idempotency_key": "e1",
        },
    )
    period = ("--period-start", "2026-01-01T00:00:00Z", "--period-end", "2026-02-01T00:00:00Z")
    assert "total  1.50 USD" in farebox("invoice", "preview", "acme", *period, *data, cwd=tmp_path).stdout
    issued = farebox(
        "invoice", "issue", "acme", "--cutoff-date", "2026-02-01T00:00:00Z", *data, "--json", cwd=tmp_path
    )
    invoice = json.loads(issued.stdout)
    assert invoice["total_amount"] == 150
    shown = farebox("invoice", "show", invoice["id"], *data, cwd=tmp_path).stdout
    assert "issued" in shown
    assert re.search(r"2026-01-01T00:00:00Z +2026-02-01T00:00:00Z +150 +1\.50$", shown, re.MULTILINE)
    assert "total  1.50 USD" in shown
    again = farebox("invoice", "issue", "acme", "--cutoff-date", "2026-02-01T00:00:00Z", *data, cwd=tmp_path)
    assert "PERIOD_ALREADY_INVOICED" in refused(again)


def test_the_roles_run_one_by_one_on_a_database_that_was_migrated(tmp_path: Path, empty_database_url: str):
    environment = {
        "FAREBOX_DATABASE_URL": empty_database_url,
        "FAREBOX_MASTER_KEY": "0123456789abcdef0123456789abcdef",
        "FAREBOX_GATEWAY_PORT": "0",
        "FAREBOX_API_PORT": "0",
        "FAREBOX_OPS_PORT": "0",
        "FAREBOX_LOG_LEVEL": "warning",
    }
    assert "run `farebox migrate` first" in refused(farebox("api", cwd=tmp_path, **environment))
    assert "run `farebox migrate` first" in refused(
        farebox("migrate", "--check", cwd=tmp_path, **environment)
    )
    assert "applied 0001" in farebox("migrate", cwd=tmp_path, **environment).stdout
    assert farebox("migrate", "--check", cwd=tmp_path, **environment).stdout == "up to date (live)\n"

    running = {
        role: subprocess.Popen(
            [sys.executable, "-m", "farebox", role, "--ready-file", f"{role}.json"],
            cwd=tmp_path,
            env={**os.environ, **environment},
        )
        for role in ("gateway", "api", "worker")
    }
    try:
        for role, process in running.items():
            file = tmp_path / f"{role}.json"
            until(lambda file=file, process=process: file.exists() or process.poll() is not None, within_s=60)
            ready = json.loads(file.read_text())
            assert httpx.get(ready["ops_url"] + "/ready", timeout=30).json()["status"] == "ready"
            assert role in ready["pids"]
        api = json.loads((tmp_path / "api.json").read_text())
        answer = httpx.get(
            api["api_url"] + "/v1/metrics",
            headers={"Authorization": f"Bearer {api['admin_key']}"},
            timeout=30,
        )
        assert answer.status_code == 200
    finally:
        for process in running.values():
            process.terminate()
        assert [process.wait(40) for process in running.values()] == [0, 0, 0]
