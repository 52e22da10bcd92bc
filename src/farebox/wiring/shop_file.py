"""What the supervisor itself must know of a farebox.yaml before anything starts. The whole check is app/documents'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farebox.base.errors import refuse


def read_text(path: Path) -> str:
    """The file's text; ``Refused`` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise refuse("FILE_UNREADABLE", f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise refuse("FILE_UNREADABLE", f"cannot read {path}: it is not UTF-8 text") from None


def payment_defaults(path: Path) -> tuple[str | None, str | None]:
    """(network, pay_to) of ``payments.defaults``, None where the file says nothing. A malformed file is refused."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = read_text(path)
    try:
        document: Any = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise refuse("YAML_MALFORMED", f"{path}: {' '.join(str(error).split())[:300]}") from None
    defaults: Any = document
    for step in ("payments", "defaults"):
        defaults = defaults.get(step) if isinstance(defaults, dict) else None
    if not isinstance(defaults, dict):
        return None, None
    network, pay_to = defaults.get("network"), defaults.get("pay_to")
    return (network if isinstance(network, str) else None), (pay_to if isinstance(pay_to, str) else None)
