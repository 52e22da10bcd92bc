"""Log lines are structured, carry the request id, and never a secret."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
import structlog
from farebox.base.secrets import Secret
from farebox.config import LogConfig
from farebox.wiring.logging import configure_logging
configure_logging(LogConfig("info", sys.argv[1]), "gw0")
structlog.contextvars.bind_contextvars(request_id="req_1")
log = structlog.get_logger()
log.info("admitted", customer="acme", master_key="hunter2-master", said="Bearer fbx_ck_abcdefgh", held=Secret("hunter2-held"))
log.debug("not shown")
logging.getLogger("library").warning("from a library")
def falls(password):
    raise ValueError("it fell")
try:
    falls("hunter2-local")
except ValueError:
    log.exception("fell")
"""


def said(format_: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, format_], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("format_", ["json", "console"])
def test_no_secret_reaches_the_log(format_: str):
    text = said(format_)
    assert "hunter2" not in text
    assert "fbx_ck_" not in text
    assert "it fell" in text
    assert "not shown" not in text


def test_every_line_is_one_json_object_with_process_and_request():
    lines = [json.loads(line) for line in said("json").splitlines()]
    assert [line["event"] for line in lines] == ["admitted", "from a library", "fell"]
    assert {line["process"] for line in lines} == {"gw0"}
    assert {line["request_id"] for line in lines} == {"req_1"}
    assert lines[0]["customer"] == "acme"
