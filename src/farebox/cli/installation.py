"""Which installation a command is about: what the environment names, else what runs in the data directory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from farebox.base.errors import refuse
from farebox.base.secrets import Secret
from farebox.config import Config
from farebox.wiring.data_directory import DataDirectory, Running
from farebox.wiring.environment import is_set, read_config

API_URL_VARIABLE: Final = "FAREBOX_API_URL"
API_KEY_VARIABLE: Final = "FAREBOX_API_KEY"


def config_of(data: Path | None) -> Config:
    """The configuration with its database: ``FAREBOX_DATABASE_URL``, else the one that runs here. Refused when neither is."""
    config = read_config(**({"FAREBOX_DATA": str(data)} if data else {}))
    directory = DataDirectory(Path(config.data_directory))
    running = directory.running()
    if config.database.url is None:
        if running is None:
            raise _nothing_running(directory, "FAREBOX_DATABASE_URL")
        config = replace(config, database=replace(config.database, url=Secret(running.database_url)))
    if running is not None and running.database_url == config.database_url and not is_set("FAREBOX_MODE"):
        config = replace(config, mode="sandbox" if running.mode == "sandbox" else "live")
    if config.mode == "sandbox" and config.master_key is None and directory.master_key.exists():
        config = replace(config, master_key=directory.sandbox_master_key())
    return config


def control_of(data: Path | None) -> tuple[str, str]:
    """(URL, key) of the control API: ``FAREBOX_API_URL`` and ``FAREBOX_API_KEY``, else what runs here."""
    url, key = os.environ.get(API_URL_VARIABLE), os.environ.get(API_KEY_VARIABLE)
    if url and key:
        return url.rstrip("/"), key
    running, directory = _running(data)
    if running is None or running.api_url is None or running.admin_key is None:
        raise _nothing_running(directory, f"{API_URL_VARIABLE} and {API_KEY_VARIABLE}")
    return url or running.api_url, key or running.admin_key


def gateway_url_of(data: Path | None) -> str:
    """The gateway that runs here."""
    running, directory = _running(data)
    if running is None or running.gateway_url is None:
        raise _nothing_running(directory, "--gateway")
    return running.gateway_url


def _running(data: Path | None) -> tuple[Running | None, DataDirectory]:
    directory = DataDirectory(data or Path(os.environ.get("FAREBOX_DATA") or ".farebox"))
    return directory.running(), directory


def _nothing_running(directory: DataDirectory, instead: str) -> Exception:
    return refuse(
        "NOTHING_RUNNING",
        f"nothing runs in {directory.path}: start `farebox up` there, name its directory with --data, or set {instead}",
    )
