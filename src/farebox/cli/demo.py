"""``farebox demo``: a sample shop in the sandbox, and a buyer's story told with real requests.

Three processes of its own: this one (the teller), ``farebox up --sandbox`` (the house, exactly as an operator runs it)
and the sample upstream. Data lives in ``<data>/demo``: a second run meets the first one's customers and book, and adds
to them; a run that was killed half way is simply followed by another.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from farebox.base.errors import FareboxError, Unavailable
from farebox.base.ids import sortable_token
from farebox.base.money import Asset, Money
from farebox.cli import sample
from farebox.cli.printing import price_text
from farebox.client import Farebox, PayingClient, Wallet, receipt_of
from farebox.wiring.data_directory import write_private
from farebox.wiring.environment import read_config

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0
METERED_TIMEOUT_S: Final = 20.0

ACCOUNT_CALLS: Final = 25
#: Long enough for the calls of the demo on a slow machine, short enough to wait for.
WEEK_LEFT_S: Final = 3

_PR_SET_PDEATHSIG: Final = 1


def play(*, once: bool, data: Path | None) -> None:
    """Start everything, tell the story, then stay up until Ctrl-C (``once``: end)."""
    config = read_config(**({"FAREBOX_DATA": str(data)} if data else {}))
    home = Path(config.data_directory).absolute() / "demo"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _weather() as upstream_url, _house(home, upstream_url) as ready:
            story = Story(console, ready, upstream_url)
            story.tell()
            console.print(f"\n[dim]Told in {time.monotonic() - began:.1f} s, start included.[/dim]")
            if not once:
                story.invite(home)
                _stay(ready)
    except httpx.TransportError as error:
        raise Unavailable(
            f"no answer: {str(error) or type(error).__name__} (see {home / 'farebox.log'})"
        ) from None
    except KeyboardInterrupt:
        console.print("\n[dim]stopped[/dim]")


class Story:
    """What is printed. Each chapter makes real requests and shows what came back; a wrong answer ends the demo with 1."""

    def __init__(self, console: Console, ready: dict[str, Any], upstream_url: str) -> None:
        self._console = console
        self._gateway = str(ready["gateway_url"])
        self._api = str(ready["api_url"])
        self._admin_key = str(ready["admin_key"])
        self._upstream_url = upstream_url
        self._wallet = Wallet.new()
        self._control = Farebox(self._api, self._admin_key)
        self._customer_key = ""

    def tell(self) -> None:
        self._title("Farebox", "one API, paid for three ways, on real signatures and a real PostgreSQL")
        self._fact(
            "the API that is sold",
            f"{self._upstream_url}   (the sample weather API; it knows nothing of money)",
        )
        self._fact("the gate in front of it", self._gateway)
        with httpx.Client(base_url=self._gateway, timeout=30) as http:
            self._stranger(http)
            self._regular(http)
            self._company(http)
        self._book()
        self._control.close()

    # ── 1 ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stranger(self, http: httpx.Client) -> None:
        self._title("1. A stranger pays one call", "an exact fare: no account, a signature in a header")
        path = "/weather/paris"
        self._request(f"GET {path}")
        refused = self._expect(http.get(path), 402)
        offer = _decoded(refused.headers["PAYMENT-REQUIRED"])["accepts"][0]
        price = Money(int(offer["amount"]), Asset("USDC", 6))
        self._answer(refused, refused.json()["detail"])
        self._fact("price", price_text(price))
        self._fact("pay to", f"{offer['payTo']} on {offer['network']}")

        self._request(f"GET {path}   with PAYMENT-SIGNATURE, signed by {self._wallet.address}")
        with PayingClient(self._wallet, max_price="0.01 USDC") as buyer:
            paid = self._expect(buyer.get(self._gateway + path), 200)
        receipt = receipt_of(paid)
        if receipt is None:
            raise FareboxError("a paid answer came without a receipt")
        self._answer(paid, _weather_line(paid))
        self._fact("settled", f"{price_text(receipt.price)} in transaction {receipt.transaction}")

    # ── 2 ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _regular(self, http: httpx.Client) -> None:
        self._title(
            "2. A regular buys a pass",
            "many calls at once, paid with an exact fare, used with a signed token",
        )
        self._request("GET /.farebox/quotes?route=forecast")
        quotes = self._expect(http.get("/.farebox/quotes", params={"route": "forecast"}), 200).json()[
            "quotes"
        ]
        quote = quotes[0]
        self._fact("on sale", f"{quote['name']} for {quote['price']}, limits {json.dumps(quote['limits'])}")

        self._request("POST /.farebox/purchases   paid like any 402")
        with PayingClient(self._wallet, max_price="0.10 USDC") as buyer:
            bought = buyer.buy_pass(self._gateway, "forecast", quote["pass"])
        self._fact("pass", bought.pass_id)
        self._fact("token", f"{bought.token[:28]}…   (a JWS; its keys are at /.well-known/jwks.json)")
        answer = None
        for city in ("rome", "oslo", "lima"):
            self._request(f"GET /weather/{city}   with the token")
            answer = self._expect(http.get(f"/weather/{city}", headers=bought.headers), 200)
            self._answer(answer, _weather_line(answer))
        assert answer is not None
        self._fact("left on the pass", answer.headers["Farebox-Pass-Remaining"])

    # ── 3 ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _company(self, http: httpx.Client) -> None:
        self._title("3. A company gets an invoice", "a plan, an API key, metered calls")
        customer_id = f"acme-{sortable_token()[-8:]}"
        # The plan is billed weekly and the first week is about to end: its calls are made now, its invoice is due right after.
        week_ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=WEEK_LEFT_S)
        week = {"period_start": _text(week_ends - timedelta(days=7)), "period_end": _text(week_ends)}
        post = self._control.post
        post("/customers", {"id": customer_id, "name": "Acme GmbH", "email": "billing@acme.example"})
        post(
            "/subscriptions",
            {"customer_id": customer_id, "plan_id": "business", "start_date": week["period_start"]},
        )
        self._customer_key = str(post(f"/customers/{customer_id}/keys")["key"])
        self._fact("customer", f"{customer_id}, on the plan business since {week['period_start']}")
        self._fact("key", f"{self._customer_key[:12]}…   (shown once, kept as a hash)")

        self._request(f"GET /weather/{{city}} × {ACCOUNT_CALLS}   with X-API-Key")
        for n in range(ACCOUNT_CALLS):
            self._expect(http.get(f"/weather/city-{n}", headers={"X-API-Key": self._customer_key}), 200)
        metered = self._wait_until_metered(customer_id, week)
        self._fact("metered", f"{metered} calls of api_calls")

        while datetime.now(UTC) < week_ends:
            time.sleep(0.05)
        self._request("POST /v1/invoices   the week has ended")
        self._invoice(post("/invoices", {"customer_id": customer_id, "cutoff_date": week["period_end"]}))

    def _wait_until_metered(self, customer_id: str, week: dict[str, str]) -> int:
        """The spool is shipped every fraction of a second; the exact count reads the events themselves."""
        deadline = time.monotonic() + METERED_TIMEOUT_S
        while True:
            usage = self._control.post(
                "/usage/compute", {"customer_id": customer_id, "metric_key": "api_calls", **week}
            )
            count = int(Decimal(str(usage["value"])))
            if count >= ACCOUNT_CALLS:
                return count
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{count} of {ACCOUNT_CALLS} calls were metered after {METERED_TIMEOUT_S:g} s"
                )
            time.sleep(0.1)

    def _invoice(self, invoice: dict[str, Any]) -> None:
        asset = Asset.named(invoice["currency"])
        table = Table(title=f"Invoice {invoice['number']} ({invoice['status']})", title_justify="left")
        for column in ("line", "quantity", f"amount {asset.code}"):
            table.add_column(column, justify="left" if column == "line" else "right")
        total = Money(0, asset)
        for line in invoice["line_items"]:
            amount = Money(int(line["amount"]), asset)
            total = total + amount
            table.add_row(line["description"], str(line["quantity"]), f"{amount.major:f}")
        stated = Money(int(invoice["total_amount"]), asset)
        table.add_section()
        table.add_row("total", "", f"{stated.major:f}")
        self._console.print(table)
        if total != stated:
            raise FareboxError(f"the invoice's lines come to {total}, its total says {stated}")
        self._fact("the lines add up", f"{total} = {stated}")

    # ── 4 ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _book(self) -> None:
        self._title("4. All three are in one book", "double entry: every asset sums to zero")
        rows = list(self._control.each("/ledger/balances"))
        table = Table()
        for column in ("account", "asset", "balance"):
            table.add_column(column, justify="right" if column == "balance" else "left", overflow="fold")
        sums: dict[str, int] = {}
        for row in rows:
            units = int(row["balance"])
            sums[row["asset"]] = sums.get(row["asset"], 0) + units
            table.add_row(row["account"], row["asset"], f"{units:,}")
        self._console.print(table)
        self._fact("sum per asset", ", ".join(f"{asset}: {units}" for asset, units in sorted(sums.items())))
        if any(sums.values()):
            raise FareboxError(f"the book does not sum to zero: {sums}")

    def invite(self, home: Path) -> None:
        """What to try while it stays up."""
        self._title("It stays up", "Ctrl-C stops everything")
        self._fact(
            "a company's call", f"curl -H 'X-API-Key: {self._customer_key}' {self._gateway}/weather/tokyo"
        )
        self._fact("a stranger's call", f"curl -i {self._gateway}/weather/tokyo")
        self._fact("pay it", f"farebox pay {self._gateway}/weather/tokyo")
        self._fact("the shop as a file", f"farebox export --data {home}")
        self._fact("the control API", f"{self._api}/docs   (its admin key is in {home}/running.json)")

    # ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _title(self, title: str, what: str) -> None:
        self._console.print()
        self._console.print(Text(title, style="bold"), Text(f"– {what}", style="dim"))

    def _request(self, line: str) -> None:
        self._console.print(Text(f"  → {line}", style="cyan"))

    def _answer(self, answer: httpx.Response, line: str) -> None:
        style = "green" if answer.status_code < 400 else "yellow"
        self._console.print(
            Text(f"  ← {answer.status_code} {answer.reason_phrase}", style=style),
            Text(line, style="dim"),
            soft_wrap=True,
        )

    def _fact(self, name: str, value: str) -> None:
        self._console.print(Text(f"    {name}: ", style="bold"), Text(value), sep="", soft_wrap=True)

    def _expect(self, answer: httpx.Response, status: int) -> httpx.Response:
        if answer.status_code != status:
            raise FareboxError(
                f"{answer.request.method} {answer.request.url.path} was answered {answer.status_code}, "
                f"not {status}: {answer.text[:500]}"
            )
        return answer


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _weather() -> Iterator[str]:
    """The sample upstream; its URL."""
    process = subprocess.Popen(
        (sys.executable, "-P", "-m", "farebox.cli.weather"), stdout=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_ends_with_us(signal.SIGKILL),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise Unavailable("the sample upstream did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _house(home: Path, upstream_url: str) -> Iterator[dict[str, Any]]:
    """``farebox up --sandbox`` on free ports with the sample shop; what its ready file says."""
    shop_file, ready_file, log_file = home / "farebox.yaml", home / "ready.json", home / "farebox.log"
    shop = (
        (resources.files(sample) / "farebox.yaml").read_text().replace("http://127.0.0.1:9000", upstream_url)
    )
    write_private(shop_file, shop)
    with contextlib.suppress(FileNotFoundError):  # of a run that was killed
        ready_file.unlink()
    command = (
        sys.executable, "-P", "-m", "farebox", "up", "--sandbox", "-f", str(shop_file), "--data", str(home),
        "--gateway-port", "0", "--api-port", "0", "--ops-port", "0", "--ready-file", str(ready_file),
    )  # fmt: skip
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_own_environment(),
            start_new_session=True, preexec_fn=_ends_with_us(signal.SIGTERM),
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready_file.exists():
            if process.poll() is not None:
                raise Unavailable(
                    f"farebox up ended with {process.returncode}: {_last_line(log_file)} (all of it: {log_file})"
                )
            if time.monotonic() > deadline:
                raise Unavailable(f"farebox up was not ready after {START_TIMEOUT_S:g} s: see {log_file}")
            time.sleep(0.02)
        yield json.loads(ready_file.read_text())
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _own_environment() -> dict[str, str]:
    """The demo is on its own: neither a real database nor real keys of the caller's environment reach it."""
    kept = ("FAREBOX_LOG_LEVEL", "FAREBOX_LOG_FORMAT")
    strange = ("FAREBOX_", "T402_", "API_", "DATABASE_URL", "LOG_", "PORT")
    return {k: v for k, v in os.environ.items() if k in kept or not k.startswith(strange)}


def _ends_with_us(how: signal.Signals) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _stay(ready: dict[str, Any]) -> None:
    while True:
        signal.pause()


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _weather_line(answer: httpx.Response) -> str:
    weather = answer.json()
    told = ", ".join(f"{name}: {value}" for name, value in weather["told"].items())
    return f"{weather['city']}: {weather['celsius']} °C, {weather['sky']}   (the API was told {told})"


def _decoded(header: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(header))
    return found


def _text(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%dT%H:%M:%SZ")
