"""JSON with one meaning or none."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farebox.base.errors import Refused
from farebox.protocols import strict_json
from farebox.protocols.strict_json import Fields

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=4
        )
    ),
    max_leaves=20,
)


def test_a_text_that_is_all_quotes_is_walked_once():
    """In a process of its own with a second's worth of work granted many times over: walked again from each quote it
    would take hours, during which a gateway would answer nobody."""
    program = """
import resource
from farebox.base.errors import Refused
from farebox.protocols import strict_json
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
for string in ('\\\\"' * 500_000, '\\\\"' * 500_000 + '\\\\', '\\"' * 500_000):
    try:
        strict_json.loads("[" * 33 + '"' + string)
    except Refused as refused:
        print(refused.reason.code)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert said.stdout.split() == ["JSON_MALFORMED"] * 3, said.stderr


@given(JSON)
def test_what_is_written_is_read_back(value: Any):
    assert strict_json.loads(strict_json.dumps(value)) == value
    assert strict_json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a":1,"a":2}',
        b'{"b":[{"a":1,"a":1}]}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400000",
        b"9" * 5000,
        b"1" * 21,
        b"[" * 33 + b"]" * 33,
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'"\\ud800"',
        b'["\\u0000"]',
        b'{"\\udfff":1}',
        b"\xff",
        b"'a'",
        b"{a:1}",
        b"[1,]",
        b"1 2",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_everything_else_is_refused(text: bytes):
    with pytest.raises(Refused) as refused:
        strict_json.loads(text, "CODE")
    assert refused.value.reason.code == "CODE"


def test_brackets_inside_strings_are_not_depth():
    assert strict_json.loads(json.dumps(["[{" * 100, '\\"[' * 50]))


def test_nesting_up_to_the_limit_is_read():
    assert strict_json.loads("[" * 32 + "]" * 32)
    assert len(strict_json.loads("[" + ",".join(["[]"] * 100) + "]")) == 100


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes):
    with contextlib.suppress(Refused):
        strict_json.loads(data)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        ("whole_text", v)
        for v in (
            None,
            1,
            1.0,
            True,
            "",
            "-1",
            "+1",
            "01",
            "1.0",
            "1e3",
            " 1",
            "1 ",
            "1\n",
            "0x1",
            "٣",
            "1" * 79,
            [],
        )
    ]
    + [("text", v) for v in (None, 1, "", "x" * 257, ["x"])]
    + [("fields", v) for v in (None, [], "x", 1)]
    + [("flag", v) for v in (None, 1, "true")],
)
def test_a_field_of_the_wrong_shape_is_named_with_its_path(read: str, value: Any):
    outer = Fields({"inside": {"field": value}}).fields("inside")
    with pytest.raises(Refused) as refused:
        getattr(outer, read)("field")
    assert refused.value.reason.field == "inside.field"


def test_whole_numbers_have_bounds_and_true_is_not_one():
    fields = Fields({"a": 5, "b": True, "c": "5", "d": 5.0})
    assert fields.whole("a", 0, 5) == 5
    for key, highest in (("a", 4), ("b", 5), ("c", 5), ("d", 5), ("e", 5)):
        with pytest.raises(Refused):
            fields.whole(key, 0, highest)
    assert Fields({"n": "0"}).whole_text("n") == 0
    assert Fields({"n": "9" * 78}).whole_text("n") == 10**78 - 1
