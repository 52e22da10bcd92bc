"""Where money is settled: the chains of a configuration. In this release the sandbox has one and live mode none."""

from __future__ import annotations

from farebox.app.ports.chain import Chain
from farebox.config import Config
from farebox.rails.sandbox.chain import SandboxChain, seller_address
from farebox.store.pool import Database


def chains_of(config: Config, database: Database) -> list[Chain]:
    """The chains this installation settles on. The sandbox's seller account is derived from the master key."""
    if config.mode != "sandbox":
        return []
    return [SandboxChain(database, seller_address(config.derived_key("seller")))]
