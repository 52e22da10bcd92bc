"""The shop as one document, for whoever applies or writes it: ``up``, the command line, the control API."""

from __future__ import annotations

import json

from farebox.app.catalog import CatalogFile, surroundings_of
from farebox.base.money import Money
from farebox.config import Config
from farebox.store.pool import Database
from farebox.wiring.chains import chains_of

QUICK_PLAN = "pay-per-call"


def catalog_file(config: Config, database: Database) -> CatalogFile:
    """The use case that applies, compares and exports, read against this installation's chains and payment defaults."""
    surroundings = surroundings_of(
        config.mode, chains_of(config, database), config.payments.network, config.payments.pay_to
    )
    return CatalogFile(database, surroundings)


def quick_shop_text(upstream_url: str, price: Money) -> str:
    """The farebox.yaml of ``up --sandbox URL --price``: one route for everything, a price a call and the same by invoice."""
    quoted = json.dumps
    return f"""\
upstreams:
  api: {{url: {quoted(upstream_url)}}}
routes:
  - id: everything
    match: {{path: "/{{*rest}}"}}
    upstream: api
    metric: api_calls
    fares:
      exact: {{price: {quoted(str(price))}}}
      account: {{}}
metrics:
  - {{key: api_calls, name: "API calls", aggregation: count}}
plans:
  - id: {QUICK_PLAN}
    name: Pay per call
    currency: USD
    billing_period: monthly
    charges:
      - {{metric_key: api_calls, pricing_model: per_unit, properties: {{unit_price: {quoted(f"{price.major:f}")}}}}}
"""
