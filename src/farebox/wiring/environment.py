"""The only place that reads the process's environment, and the only one that writes a child's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from farebox.base.secrets import Secret
from farebox.config import VARIABLES, Config, unknown_variables


def read_config(**overrides: str) -> Config:
    """The configuration of this process: its environment, with ``overrides`` (from the command line) on top.

    Raises ``Refused`` with every fault at once.
    """
    return Config.parse({**os.environ, **overrides}, lambda path: Path(path).read_text())


def child_environment(config: Config, **settings: str) -> dict[str, str]:
    """What a child process gets: our environment, the secrets resolved from their files, and ``settings``.

    A child never reads ``NAME_FILE`` again: a secret that is rotated on disk reaches all processes at the same restart.
    """
    resolved: dict[str, Secret | None] = {
        "FAREBOX_DATABASE_URL": config.database.url,
        "FAREBOX_DATABASE_DIRECT_URL": config.database.direct_url,
        "FAREBOX_MASTER_KEY": config.master_key,
        "FAREBOX_EDGE_SECRET": config.authorize.secret,
        **{f"FAREBOX_KEY_{name}": key for name, key in config.own_keys.items()},
    }
    environment = _without_files(os.environ)
    environment.update({name: secret.reveal() for name, secret in resolved.items() if secret is not None})
    environment["FAREBOX_MODE"] = config.mode
    environment.update(settings)
    return environment


def misspelt_variables() -> list[str]:
    """Names in our environment that begin with ``FAREBOX_`` and mean nothing."""
    return unknown_variables(os.environ)


def _without_files(values: Mapping[str, str]) -> dict[str, str]:
    files = {f"{given}_FILE" for v in VARIABLES if v.secret for given in (v.name, *v.aliases)}
    return {name: value for name, value in values.items() if name not in files}


def is_set(name: str) -> bool:
    """Whether the operator said anything about a variable, under its own name or an alias."""
    aliases = next(v.aliases for v in VARIABLES if v.name == name)
    return any(os.environ.get(given) for given in (name, *aliases))
