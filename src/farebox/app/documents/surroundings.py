"""What a farebox.yaml is read against: the mode, where money can be settled, and what the database already knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from farebox.domain.access import TokenAsset


@dataclass(frozen=True, slots=True)
class Surroundings:
    """``networks`` are those this installation can settle on; ``tokens`` are always offered; ``pay_to`` is filled in
    where a file names no recipient (network → address); ``metric_keys`` exist already, beside those of the file, and
    ``features`` are granted by plans that exist already."""

    mode: Literal["live", "sandbox"]
    networks: frozenset[str] = frozenset()
    tokens: tuple[TokenAsset, ...] = ()
    pay_to: Mapping[str, str] = field(default_factory=dict)
    metric_keys: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
