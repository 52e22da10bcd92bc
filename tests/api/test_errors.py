"""Each error code in the source is documented, with the status that it really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import farebox
from farebox.api.errors import error_answer, error_document, status_of, status_of_all
from farebox.base.errors import Reason, Unavailable, refuse
from farebox.gateway.problems import STATUS

SOURCE = Path(farebox.__file__).parent
PAGE = SOURCE.parents[1] / "docs" / "reference" / "errors.md"
_MAKERS = frozenset({"refuse", "Reason", "fault", "_fault", "PydanticCustomError"})
_CODE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*\Z|[a-z]+(_[a-z]+)+\Z")
_ROW = re.compile(r"\| `([A-Za-z0-9_]+)` \|(?: (\d{3}) \|)? .+ \|\Z")


def codes_in(path: Path) -> set[str]:
    """The codes that a module raises: constants as the first argument of what makes a reason, and defaults of ``code``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args:
            maker = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            first = node.args[0]
            if maker in _MAKERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = node.args.defaults
            for argument, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True):
                if (
                    argument.arg == "code"
                    and isinstance(default, ast.Constant)
                    and isinstance(default.value, str)
                ):
                    found.add(default.value)
    return {code for code in found if _CODE.match(code)}


def documented() -> dict[str, int | None]:
    rows = (_ROW.match(line) for line in PAGE.read_text().splitlines())
    return {row[1]: int(row[2]) if row[2] else None for row in rows if row}


def test_every_code_of_the_source_is_documented():
    page = documented()
    missing = {
        code: path.name for path in SOURCE.rglob("*.py") for code in codes_in(path) if code not in page
    }
    assert missing == {}


def test_the_documented_status_is_the_real_one():
    for code, status in documented().items():
        if status is not None:
            assert status == (STATUS[code] if code in STATUS else status_of(code)), code
    assert set(STATUS) <= set(documented())


def test_no_code_is_documented_that_nobody_raises():
    raised = {code for path in SOURCE.rglob("*.py") for code in codes_in(path)}
    words = " ".join(path.read_text() for path in SOURCE.rglob("*.py"))
    assert [
        code
        for code in documented()
        if code not in raised and code not in STATUS and f'"{code}"' not in words
    ] == []


def test_several_reasons_are_told_together_and_a_malformed_one_decides():
    malformed, ruled = Reason("FIELD_MALFORMED", "a", "x"), Reason("METRIC_UNKNOWN", "b", "y")
    assert status_of_all([ruled]) == 422
    assert status_of_all([ruled, malformed]) == 400
    error = error_document([ruled, malformed], "req_1")["error"]
    assert (error["code"], error["field"], error["request_id"]) == ("METRIC_UNKNOWN", "y", "req_1")
    assert [f["code"] for f in error["faults"]] == ["METRIC_UNKNOWN", "FIELD_MALFORMED"]


def test_an_outage_says_when_to_come_back_and_not_what_broke():
    status, body, retry_after_s = error_answer(
        Unavailable("host db.internal refused user farebox", 7.0), "req_1"
    )
    assert (status, retry_after_s) == (503, 7.0)
    assert b"db.internal" not in body


@pytest.mark.parametrize(
    ("code", "status"), [("NEW_THING_NOT_FOUND", 404), ("NEW_MALFORMED", 400), ("NEW_RULE", 422)]
)
def test_a_new_code_has_a_sensible_status(code: str, status: int):
    assert status_of(refuse(code, "x").reason.code) == status
