"""The image and the compose file name only what exists: commands, variables, ports, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from ruamel.yaml import YAML

from farebox.cli.commands import app
from farebox.config import VARIABLES, Config

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = YAML(typ="safe").load((ROOT / "deploy" / "compose.yaml").read_text())
KNOWN = {n for v in VARIABLES for g in (v.name, *v.aliases) for n in ((g, f"{g}_FILE") if v.secret else (g,))}
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "farebox"}


def commands() -> set[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    return set(group.commands)


def test_compose_runs_every_role_by_a_command_that_exists():
    assert {service["command"][0] for service in OURS.values()} == {"migrate", "gateway", "api", "worker"}
    for service in OURS.values():
        assert service["command"][0] in commands()


def test_compose_and_image_set_only_variables_that_are_read():
    named = {name for service in OURS.values() for name in service["environment"]}
    named |= set(re.findall(r"\b(FAREBOX_[A-Z_]+)=", DOCKERFILE))
    assert named <= KNOWN
    assert {"FAREBOX_DATABASE_URL_FILE", "FAREBOX_MASTER_KEY_FILE", "FAREBOX_DATA"} <= named


def test_the_images_settings_parse():
    settings = dict(re.findall(r"\b(FAREBOX_[A-Z_]+)=(\S+)", DOCKERFILE))
    config = Config.parse(settings)
    assert config.gateway.host == "0.0.0.0"
    assert config.ops.host == "127.0.0.1"
    assert f"EXPOSE {config.api.port} {config.gateway.port}" in DOCKERFILE
    assert f"'FAREBOX_OPS_PORT', '{config.ops.port}'" in DOCKERFILE


def test_the_image_runs_as_an_ordinary_user_and_asks_for_its_health():
    user = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert user
    assert user[-1] not in ("0", "root")
    assert "HEALTHCHECK" in DOCKERFILE
    assert 'ENTRYPOINT ["farebox"]' in DOCKERFILE


@pytest.mark.parametrize("copied", re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE))
def test_what_the_image_copies_is_there_and_not_ignored(copied: str):
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in shlex.split(copied):
        assert (ROOT / name).exists()
        assert name.split("/")[0] in let_in


def test_every_secret_and_volume_of_compose_is_declared():
    for service in COMPOSE["services"].values():
        for secret in service.get("secrets", ()):
            assert secret in COMPOSE["secrets"]
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in COMPOSE["volumes"]
    # A container's files are read only, so that everything it keeps lies on a volume.
    assert {n for n, s in OURS.items() if "volumes" not in s} == {"migrate"}


def test_the_versions_are_pinned_without_addresses():
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line) for line in lines)


def test_the_readmes_commands_exist():
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].endswith("farebox"):
                assert words[1] in commands(), line
            elif words and words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
