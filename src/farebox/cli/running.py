"""``farebox up`` and the single roles: from options to a running house, and what it prints meanwhile."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from farebox.base.errors import Reason, Refused, refuse
from farebox.config import Config
from farebox.wiring.environment import is_set, read_config
from farebox.wiring.logging import configure_logging
from farebox.wiring.up import ALL_ROLES, Plan, QuickShop, Role, Started, run


def settings(**given: Any) -> dict[str, str]:
    """Options of the command line as the variables they stand for; what was not given is left to the environment."""
    return {name: str(value) for name, value in given.items() if value is not None}


def up(
    *,
    url: str | None,
    price: str | None,
    shop_file: Path | None,
    sandbox: bool,
    ready_file: Path | None,
    settings: dict[str, str],
) -> None:
    """Run every role until told to stop."""
    quick = _quick_shop(url, price, shop_file, sandbox)
    if sandbox:
        settings = {**settings, "FAREBOX_MODE": "sandbox"}
    if quick is not None and sys.stderr.isatty():
        # Somebody tries it out in a terminal: the calls are the news, not our own goings-on.
        for name, quiet in (("FAREBOX_LOG_FORMAT", "console"), ("FAREBOX_LOG_LEVEL", "warning")):
            if not is_set(name):
                settings[name] = quiet
    config = read_config(**settings)
    configure_logging(config.log, "supervisor")
    plan = Plan(ALL_ROLES, quick or shop_file, ready_file, embedded=True)

    def say(started: Started) -> None:
        _print_addresses(config, started)
        if quick is not None:
            _print_lines_to_paste(started, quick)

    asyncio.run(_run(config, plan, say, quick))


def role(name: Role, ready_file: Path | None, settings: dict[str, str]) -> None:
    """Run one role of a production installation until told to stop.

    Each role has a directory of its own in the data directory, so that several can share a machine.
    """
    config = read_config(**settings)
    config = replace(config, data_directory=str(Path(config.data_directory) / name))
    configure_logging(config.log, name)
    asyncio.run(run(config, Plan(frozenset((name,)), None, ready_file), lambda started: None))


async def _run(config: Config, plan: Plan, say: Any, quick: QuickShop | None) -> None:
    tail: asyncio.Task[None] | None = None

    def on_ready(started: Started) -> None:
        nonlocal tail
        say(started)
        if quick is not None:
            from farebox.cli.call_log import print_calls

            tail = asyncio.get_running_loop().create_task(
                print_calls(started.running.database_url, quick.price)
            )

    try:
        await run(config, plan, on_ready)
    finally:
        if tail is not None:
            tail.cancel()
            await asyncio.gather(tail, return_exceptions=True)


def _quick_shop(
    url: str | None, price: str | None, shop_file: Path | None, sandbox: bool
) -> QuickShop | None:
    faults = []
    if url is None:
        if price is not None:
            faults.append(
                Reason(
                    "USAGE",
                    'needs a URL: farebox up --sandbox http://127.0.0.1:3000 --price "0.001 USDC"',
                    "--price",
                )
            )
    else:
        if not sandbox:
            faults.append(
                Reason(
                    "USAGE",
                    "a URL alone is sold in the sandbox only: add --sandbox, or write a farebox.yaml and use -f",
                    "URL",
                )
            )
        if price is None:
            faults.append(
                Reason(
                    "USAGE",
                    'is missing: what does one call cost? For example --price "0.001 USDC"',
                    "--price",
                )
            )
        if shop_file is not None:
            faults.append(
                Reason("USAGE", "takes the place of a URL and --price: give one or the other", "-f")
            )
        if not url.startswith(("http://", "https://")):
            faults.append(
                Reason("USAGE", f"{url[:80]!r} is not one: write it like http://127.0.0.1:3000", "URL")
            )
    if price is not None:
        try:
            _check_price(price)
        except Refused as refused:
            faults.append(Reason(refused.reason.code, refused.reason.message, "--price"))
    if faults:
        raise Refused(*faults)
    return QuickShop(url, price) if url is not None and price is not None else None


def _check_price(price: str) -> None:
    from farebox.base.money import Money

    money = Money.parse(price)
    if money.asset.code != "USDC":
        raise refuse("PRICE_ASSET", f"the sandbox is paid in USDC, not in {money.asset.code}")
    if not money:
        raise refuse("PRICE_ZERO", "a price of zero is no fare")


def _print_addresses(config: Config, started: Started) -> None:
    running = started.running
    for change in started.changes:
        print(f"  {change}")
    print(f"farebox is up ({config.mode})")
    print(f"  gateway  {running.gateway_url}")
    print(f"  api      {running.api_url}/v1   reference: {running.api_url}/docs")
    print(f"  ops      {running.ops_url}/ready")
    sys.stdout.flush()


def _print_lines_to_paste(started: Started, quick: QuickShop) -> None:
    gateway = started.running.gateway_url
    print(f"\nEvery call costs {quick.price}. Try:\n")
    print(
        f"  curl -H 'X-API-Key: {started.customer_key}' {gateway}/     # an account: metered, invoiced later"
    )
    print(f"  curl -i {gateway}/     # a stranger: 402, and how to pay")
    print(f"  farebox pay {gateway}/     # pays it with play money")
    print("\n`farebox export > farebox.yaml` turns this into a file. Ctrl-C stops. Calls:\n")
    sys.stdout.flush()
