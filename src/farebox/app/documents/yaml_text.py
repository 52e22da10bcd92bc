"""YAML text to plain values and back, strictly: no duplicate key, no float, no date guessed from a string, no bomb.

Numbers with a point become ``Decimal`` digit by digit. Every fault names its line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from farebox.base.errors import refuse
from farebox.base.money import plain

DOCUMENT_BYTES_MAX: Final = 1_000_000
#: Counted through aliases, so that a few lines cannot unfold into gigabytes.
NODES_MAX: Final = 200_000
DEPTH_MAX: Final = 40
#: Escapes can write what no UTF-8 text and no PostgreSQL text can hold.
_UNWRITABLE: Final = re.compile("[\x00\ud800-\udfff]")


def read_yaml(text: str) -> Any:
    """The values of one YAML document (mappings with text keys); ``Refused`` (``YAML_MALFORMED``) with the line at fault."""
    if len(text.encode("utf-8", "surrogatepass")) > DOCUMENT_BYTES_MAX:
        raise refuse("YAML_MALFORMED", f"the document is larger than {DOCUMENT_BYTES_MAX} bytes")
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    reader.allow_duplicate_keys = False
    try:
        value = reader.load(io.StringIO(text))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        problem = str(error.problem).split(" with value")[0].removeprefix("found ")
        raise refuse("YAML_MALFORMED", f"line {line}: {problem}: write each key once") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise refuse("YAML_MALFORMED", f"{where}{error.problem or error.context}") from None
    except (YAMLError, ValueError, UnicodeError) as error:
        raise refuse("YAML_MALFORMED", f"this is not YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise refuse("YAML_MALFORMED", f"the document is nested deeper than {DEPTH_MAX} levels") from None
    _check_values(value)
    return value


def write_yaml(value: Any) -> str:
    """Plain values as block-style YAML that ``read_yaml`` reads back the same; ``Decimal`` as a plain number in quotes."""
    writer = YAML(typ="safe", pure=True)
    writer.Representer = _Representer
    writer.default_flow_style = False
    writer.width = 120
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    writer.dump(value, out)
    return out.getvalue()


class _Constructor(SafeConstructor):
    """Numbers keep their digits; what merely looks like a date stays text."""


def _float_as_decimal(constructor: SafeConstructor, node: ScalarNode) -> Decimal:
    written = str(constructor.construct_scalar(node)).replace("_", "")
    try:
        number = Decimal(written)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise refuse(
            "YAML_MALFORMED", f"line {node.start_mark.line + 1}: {written[:40]!r} is not a finite number"
        )
    return number


def _date_as_text(constructor: SafeConstructor, node: ScalarNode) -> str:
    return str(constructor.construct_scalar(node))


_Constructor.add_constructor("tag:yaml.org,2002:float", _float_as_decimal)
_Constructor.add_constructor("tag:yaml.org,2002:timestamp", _date_as_text)


class _Representer(SafeRepresenter):
    """Writes decimals as quoted plain numbers and never an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _decimal_as_text(representer: SafeRepresenter, number: Decimal) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:str", plain(number), style='"')


_Representer.add_representer(Decimal, _decimal_as_text)


def _check_values(value: Any) -> None:
    """Counts nodes level by level through shared parts: ends even for a structure that contains itself."""
    level, depth, nodes = [value], 0, 0
    while level:
        nodes += len(level)
        if nodes > NODES_MAX:
            raise refuse(
                "YAML_MALFORMED", f"the document unfolds to more than {NODES_MAX} values: use fewer aliases"
            )
        if depth > DEPTH_MAX:
            raise refuse("YAML_MALFORMED", f"the document is nested deeper than {DEPTH_MAX} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                _check_texts(item)
            elif isinstance(item, list):
                below.extend(item)
            else:
                _check_texts((item,))
            if len(below) > NODES_MAX:
                break
        level, depth = below, depth + 1


def _check_texts(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise refuse(
                "YAML_MALFORMED", f"{value[:60]!r} holds a NUL or half of a surrogate pair: remove it"
            )
