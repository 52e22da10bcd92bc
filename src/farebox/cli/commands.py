"""The commands, their options and their help. What a command needs is imported when it runs, so that help stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="farebox",
    help="Gets an API paid: an exact fare per call, a prepaid pass, or an account with an invoice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
pass_app = typer.Typer(help="Buy a pass and look at it.", no_args_is_help=True, rich_markup_mode=None)
wallet_app = typer.Typer(
    help="The buyer's wallet: one key file.", no_args_is_help=True, rich_markup_mode=None
)
keys_app = typer.Typer(help="Keys of the control API.", no_args_is_help=True, rich_markup_mode=None)
invoice_app = typer.Typer(help="Invoices: preview, issue, show.", no_args_is_help=True, rich_markup_mode=None)
for group, name in ((pass_app, "pass"), (wallet_app, "wallet"), (keys_app, "keys"), (invoice_app, "invoice")):
    app.add_typer(group, name=name)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Data directory.  [default: FAREBOX_DATA, else .farebox]", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FileOption = Annotated[Path, typer.Option("-f", "--file", help="The farebox.yaml.")]
WalletOption = Annotated[
    Path | None,
    typer.Option("--wallet", help="Wallet file.  [default: ~/.farebox/wallet.json]", show_default=False),
]


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def up(
    url: Annotated[
        str | None, typer.Argument(help="An API to sell without any file (needs --sandbox and --price).")
    ] = None,
    price: Annotated[str | None, typer.Option(help='Price of one call, such as "0.001 USDC".')] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A farebox.yaml to apply at the start.")
    ] = None,
    data: DataOption = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Play money on real signatures, loopback only.")
    ] = False,
    gateways: Annotated[
        int | None, typer.Option(help="Gateway processes.  [default: 1]", show_default=False)
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(help="[default: 8402; 0 picks a free one]", show_default=False)
    ] = None,
    api_port: Annotated[
        int | None, typer.Option(help="[default: 8400; 0 picks a free one]", show_default=False)
    ] = None,
    ops_port: Annotated[
        int | None, typer.Option(help="[default: 8403; 0 picks a free one]", show_default=False)
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written (JSON) when everything answers.")] = None,
) -> None:
    """Run everything: database, gateways, API, worker. Without --sandbox it is live and needs a network, pay_to and keys."""
    from farebox.cli import running

    running.up(
        url=url,
        price=price,
        shop_file=file,
        sandbox=sandbox,
        ready_file=ready_file,
        settings=running.settings(
            FAREBOX_DATA=data,
            FAREBOX_GATEWAYS=gateways,
            FAREBOX_GATEWAY_PORT=gateway_port,
            FAREBOX_API_PORT=api_port,
            FAREBOX_OPS_PORT=ops_port,
        ),
    )


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Play the story and end.")] = False,
    data: DataOption = None,
) -> None:
    """A sandbox with a sample shop: watch an API being paid for in three ways."""
    from farebox.cli import demo as story

    story.play(once=once, data=data)


@app.command()
def gateway(data: DataOption = None, ready_file: Annotated[Path | None, typer.Option()] = None) -> None:
    """Run the gateways of this machine and their shipper (production; needs FAREBOX_DATABASE_URL)."""
    from farebox.cli import running

    running.role("gateway", ready_file, running.settings(FAREBOX_DATA=data))


@app.command()
def api(data: DataOption = None, ready_file: Annotated[Path | None, typer.Option()] = None) -> None:
    """Run the control API (production; needs FAREBOX_DATABASE_URL)."""
    from farebox.cli import running

    running.role("api", ready_file, running.settings(FAREBOX_DATA=data))


@app.command()
def worker(data: DataOption = None, ready_file: Annotated[Path | None, typer.Option()] = None) -> None:
    """Run the worker: rollups, periods, jobs (production; needs FAREBOX_DATABASE_URL)."""
    from farebox.cli import running

    running.role("worker", ready_file, running.settings(FAREBOX_DATA=data))


@app.command()
def migrate(
    pre: Annotated[
        bool, typer.Option("--pre", help="Only what must run before the new code starts.")
    ] = False,
    post: Annotated[bool, typer.Option("--post", help="What must run when the old code is gone.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 when something is missing.")
    ] = False,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="A sandbox database (stamped so for ever).")
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the database to the shape this version expects."""
    from farebox.cli import database

    database.migrate(pre=pre, post=post, check=check, sandbox=sandbox, data=data, as_json=json)


@app.command()
def doctor(
    write_off: Annotated[
        str | None,
        typer.Option(
            "--write-off",
            metavar="PROCESS",
            help="The spool of this gateway process is gone for good: count what it held as spent.",
        ),
    ] = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Check the database, migrations, clocks, keys, disk, spool and what is stranded; says what to do. Exit 1: a problem."""
    from farebox.cli import doctor as checks

    if write_off is not None:
        checks.write_off(write_off, data, as_json=json)
    else:
        checks.examine(data, as_json=json)


# ── the shop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def apply(file: FileOption, data: DataOption = None, json: JsonOption = False) -> None:
    """Make the shop be as the file says. Applying it again changes nothing; a bad file changes nothing."""
    from farebox.cli import shop

    shop.apply(file, data, as_json=json)


@app.command()
def diff(file: FileOption, data: DataOption = None, json: JsonOption = False) -> None:
    """What `apply` would change."""
    from farebox.cli import shop

    shop.diff(file, data, as_json=json)


@app.command()
def export(data: DataOption = None) -> None:
    """The shop as a farebox.yaml on standard output."""
    from farebox.cli import shop

    shop.export(data)


@app.command()
def price(
    file: Annotated[Path, typer.Option("-f", "--file", help="A YAML file with one plan, or with `plans`.")],
    usage: Annotated[list[str], typer.Option("--usage", help="metric=quantity; may be repeated.")],
    plan: Annotated[str | None, typer.Option("--plan", help="Which plan of the file.")] = None,
    json: JsonOption = False,
) -> None:
    """Rate usage under a plan without any database; prints lines and steps."""
    from farebox.cli import rating

    rating.price(file, usage, plan, as_json=json)


@keys_app.command("create")
def keys_create(
    name: str,
    scope: Annotated[list[str], typer.Option("--scope", help="admin, billing:read, …; may be repeated.")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key of the control API; it is shown once."""
    from farebox.cli import keys

    keys.create(name, scope, data, as_json=json)


@keys_app.command("list")
def keys_list(data: DataOption = None, json: JsonOption = False) -> None:
    """All keys, without their secrets."""
    from farebox.cli import keys

    keys.list_all(data, as_json=json)


@keys_app.command("rotate")
def keys_rotate(
    key_id: str,
    overlap_s: Annotated[int, typer.Option(help="Seconds the old key still works.")] = 0,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """A new key with the same name and scopes."""
    from farebox.cli import keys

    keys.rotate(key_id, overlap_s, data, as_json=json)


@keys_app.command("revoke")
def keys_revoke(key_id: str, data: DataOption = None) -> None:
    """End a key now."""
    from farebox.cli import keys

    keys.revoke(key_id, data)


@invoice_app.command("preview")
def invoice_preview(
    customer_id: str,
    period_start: Annotated[str, typer.Option(help="An instant, such as 2026-01-01T00:00:00Z.")],
    period_end: Annotated[str, typer.Option(help="The first instant after the period.")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """What a customer's usage of a period comes to."""
    from farebox.cli import invoices

    invoices.preview(customer_id, period_start, period_end, data, as_json=json)


@invoice_app.command("issue")
def invoice_issue(
    customer_id: str,
    cutoff_date: Annotated[str, typer.Option(help="Bill what lies before this instant.")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Issue a customer's invoice."""
    from farebox.cli import invoices

    invoices.issue(customer_id, cutoff_date, data, as_json=json)


@invoice_app.command("show")
def invoice_show(invoice_id: str, data: DataOption = None, json: JsonOption = False) -> None:
    """One invoice with its lines."""
    from farebox.cli import invoices

    invoices.show(invoice_id, data, as_json=json)


# ── buying ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def pay(
    url: str,
    wallet: WalletOption = None,
    most: Annotated[
        str | None,
        typer.Option(
            "--max", help='The most to pay, such as "0.01 USDC".  [default: 0.10 USDC]', show_default=False
        ),
    ] = None,
    method: Annotated[str, typer.Option("-X", "--request", help="HTTP method.")] = "GET",
    body: Annotated[str | None, typer.Option("-d", "--data-raw", help="Request body.")] = None,
    header: Annotated[
        list[str] | None,
        typer.Option("-H", "--header", help="Request header, `Name: value`; may be repeated."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Call a URL and pay for it; shows price, payment and receipt."""
    from farebox.cli import buying

    buying.pay(url, wallet, most, method, body, header or [], as_json=json)


@pass_app.command("buy")
def pass_buy(
    route: Annotated[str, typer.Argument(help="The route the pass is for.")],
    quote: Annotated[str, typer.Argument(help="The pass on sale, by its id (`hour`) or by its quote id.")],
    gateway_url: Annotated[
        str | None,
        typer.Option("--gateway", help="Where it is sold.  [default: what runs here]", show_default=False),
    ] = None,
    wallet: WalletOption = None,
    most: Annotated[
        str | None, typer.Option("--max", help="The most to pay.  [default: 1 USDC]", show_default=False)
    ] = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Buy a pass with an exact fare; keeps its token beside the wallet."""
    from farebox.cli import buying

    buying.buy_pass(route, quote, gateway_url, wallet, most, data, as_json=json)


@pass_app.command("show")
def pass_show(wallet: WalletOption = None, json: JsonOption = False) -> None:
    """The passes bought with this wallet."""
    from farebox.cli import buying

    buying.show_passes(wallet, as_json=json)


@wallet_app.command("new")
def wallet_new(wallet: WalletOption = None, json: JsonOption = False) -> None:
    """Make a wallet: a key file that only you can read."""
    from farebox.cli import buying

    buying.new_wallet(wallet, as_json=json)


@wallet_app.command("show")
def wallet_show(wallet: WalletOption = None, json: JsonOption = False) -> None:
    """The wallet's address."""
    from farebox.cli import buying

    buying.show_wallet(wallet, as_json=json)


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def openapi() -> None:
    """The control API's OpenAPI document on standard output."""
    from farebox.cli import reference

    reference.openapi()


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; none: list them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to it.")] = None,
) -> None:
    """Run a benchmark of bench/ (from a checkout)."""
    from farebox.cli import reference

    reference.bench(name, arguments or [])


@app.command()
def version(json: JsonOption = False) -> None:
    """The version."""
    from farebox.cli import reference

    reference.version(as_json=json)
