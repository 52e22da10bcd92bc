"""The buyer's tools: ``farebox pay``, ``pass buy|show``, ``wallet new|show``."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx

from farebox.base.errors import FareboxError, Reason, Refused, Unavailable, refuse
from farebox.base.money import Money
from farebox.base.time import parse_instant
from farebox.cli.installation import gateway_url_of
from farebox.cli.printing import price_text, print_facts, print_json, print_table
from farebox.client import PayingClient, Wallet, receipt_of
from farebox.wiring.data_directory import write_private

CALL_PRICE_MAX: Final = "0.10 USDC"
OFFER_PRICE_MAX: Final = "1 USDC"
TIMEOUT_S: Final = 60.0


def pay(
    url: str,
    wallet: Path | None,
    most: str | None,
    method: str,
    body: str | None,
    headers: list[str],
    *,
    as_json: bool,
) -> None:
    """Call, pay if asked to, and show what it cost. The answer's body goes to standard output, the story to standard error."""
    if not url.startswith(("http://", "https://")):
        raise Refused(
            Reason(
                "USAGE", f"{url[:80]!r} is not one: write it like https://api.example.com/weather/rome", "URL"
            )
        )
    sent = _headers(headers)
    account = _wallet(wallet)
    if body is not None and method == "GET":
        method = "POST"  # as curl does
    with PayingClient(account, _price(most or CALL_PRICE_MAX), timeout=TIMEOUT_S) as http:
        try:
            answer = http.request(method, url, content=body, headers=sent)
        except httpx.InvalidURL as error:
            raise Refused(Reason("USAGE", f"is not one: {error}", "URL")) from None
        except httpx.TransportError as error:
            raise Unavailable(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    receipt = receipt_of(answer)
    if as_json:
        paid = None if receipt is None else {**asdict(receipt), "price": price_text(receipt.price)}
        print_json(
            {
                "url": url,
                "status": answer.status_code,
                "receipt": paid,
                "headers": dict(answer.headers),
                "body": answer.text,
            }
        )
    else:
        for line in _story(answer):
            print(line, file=sys.stderr)
        sys.stdout.write(answer.text if answer.text.endswith("\n") or not answer.text else answer.text + "\n")
    if answer.is_error:
        raise FareboxError(f"{method} {url} was answered {answer.status_code} {answer.reason_phrase}")


def buy_pass(
    route: str,
    offer: str,
    gateway_url: str | None,
    wallet: Path | None,
    most: str | None,
    data: Path | None,
    *,
    as_json: bool,
) -> None:
    """Buy, keep the token beside the wallet, and say how to use it."""
    gateway = gateway_url or gateway_url_of(data)
    account = _wallet(wallet)
    with PayingClient(account, _price(most or OFFER_PRICE_MAX), timeout=TIMEOUT_S) as http:
        try:
            bought = http.buy_pass(gateway, route, offer)
        except httpx.TransportError as error:
            raise Unavailable(f"{gateway} does not answer: {str(error) or type(error).__name__}") from None
    kept = {
        "pass_id": bought.pass_id,
        "route": bought.route,
        "gateway": gateway,
        "expires_at": bought.expires_at.isoformat(timespec="seconds"),
        "purchase_id": bought.purchase_id,
        "token": bought.token,
    }
    file = _passes_file(wallet)
    write_private(file, json.dumps([*_passes(file), kept], indent=2) + "\n")
    if as_json:
        print_json(kept)
        return
    print_facts({name: kept[name] for name in ("pass_id", "route", "expires_at")})
    print(f"\nUse it:\n  {_curl(kept)}")


def show_passes(wallet: Path | None, *, as_json: bool) -> None:
    """The passes bought with this wallet on this machine."""
    rows = _passes(_passes_file(wallet))
    if as_json:
        print_json({"data": rows})
        return
    now = datetime.now(UTC)
    table = [
        {**row, "state": "good" if now < parse_instant(row["expires_at"]) else "expired"} for row in rows
    ]
    print_table(
        table,
        ("pass_id", "route", "gateway", "expires_at", "state"),
        "no passes yet: farebox pass buy ROUTE QUOTE",
    )
    good = [row for row in table if row["state"] == "good"]
    if good:
        print(f"\nUse the last one:\n  {_curl(good[-1])}")


def new_wallet(wallet: Path | None, *, as_json: bool) -> None:
    """A fresh account in a new file; an existing one is never overwritten."""
    path = _wallet_file(wallet)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Wallet.create(path)
    except FileExistsError:
        raise refuse("WALLET_EXISTS", f"{path} exists and is kept: give another name with --wallet") from None
    except OSError as error:
        raise refuse("WALLET_UNWRITABLE", f"cannot write {path}: {error.strerror}") from None
    _print_wallet(made, path, as_json)


def show_wallet(wallet: Path | None, *, as_json: bool) -> None:
    """The address; the key stays in the file."""
    path = _wallet_file(wallet)
    if not path.exists():
        raise refuse("WALLET_UNKNOWN", f"there is no {path}: `farebox wallet new` makes one")
    _print_wallet(_load(path), path, as_json)


def _story(answer: httpx.Response) -> list[str]:
    receipt = receipt_of(answer)
    first = f"{answer.status_code} {answer.reason_phrase}"
    if receipt is None:
        return [f"{first}, nothing was paid"]
    return [
        first,
        f"price    {price_text(receipt.price)}",
        f"paid by  {receipt.payer} on {receipt.network}",
        f"receipt  {receipt.transaction}",
    ]


def _price(text: str) -> str:
    try:
        Money.parse(text)
    except Refused as refused:
        raise Refused(Reason(refused.reason.code, refused.reason.message, "--max")) from None
    return text


def _headers(given: list[str]) -> dict[str, str]:
    found = {}
    for header in given:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise Refused(Reason("USAGE", f"{header[:80]!r}: write `Name: value`", "-H"))
        found[name.strip()] = value.strip()
    return found


def _wallet_file(wallet: Path | None) -> Path:
    return wallet or Path.home() / ".farebox" / "wallet.json"


def _wallet(wallet: Path | None) -> Wallet:
    path = _wallet_file(wallet)
    if path.exists():
        return _load(path)
    if wallet is not None:
        raise refuse("WALLET_UNKNOWN", f"there is no {path}: `farebox wallet new --wallet {path}` makes one")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = Wallet.load_or_create(path)
    print(f"made a wallet: {made.address} in {path}", file=sys.stderr)
    return made


def _load(path: Path) -> Wallet:
    try:
        return Wallet.load(path)
    except OSError as error:
        raise refuse("WALLET_UNREADABLE", f"cannot read {path}: {error.strerror}") from None


def _print_wallet(wallet: Wallet, path: Path, as_json: bool) -> None:
    facts = {"address": wallet.address, "file": str(path)}
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def _passes_file(wallet: Path | None) -> Path:
    return _wallet_file(wallet).with_suffix(".passes.json")


def _passes(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise refuse("PASSES_UNREADABLE", f"cannot read {file}: {error}") from None
    return list(rows)


def _curl(kept: dict[str, Any]) -> str:
    return f"curl -H {shlex.quote('Authorization: Bearer ' + kept['token'])} {kept['gateway']}/PATH"
