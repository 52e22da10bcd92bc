"""The head of an upstream's answer where we have something to say in it: lines of decisions in place of the upstream's own."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from farebox.app.admission import LIMIT_NAMES, Admitted
from farebox.base.errors import InvariantError
from farebox.gateway.fields import canonical
from farebox.gateway.heads import AnswerHead
from farebox.gateway.routing import Way

if TYPE_CHECKING:
    from farebox.gateway.server import Gateway


def with_ours(lines: list[bytes], head: AnswerHead, admitted: Admitted, gateway: Gateway) -> list[bytes]:
    """With ``answer_headers``; an upstream's line of one of these names gives way.

    Raises ``InvariantError`` for a value that would begin another line.
    """
    contested = head.contested
    for name, value in admitted.answer_headers:
        if name not in gateway.contested:
            gateway.contest(name)
            contested = True
        if b"\n" in value or b"\r" in value:
            raise InvariantError(f"the value of {name!r} towards the client has a line end")
    if contested:
        lines = without(lines, {name.lower() for name, _ in admitted.answer_headers})
    return lines + [name + b": " + value for name, value in admitted.answer_headers]


def without(lines: list[bytes], lower_names: Collection[bytes]) -> list[bytes]:
    return [line for line in lines if line.partition(b":")[0].lower() not in lower_names]


def set_by_us(way: Way, admitted: Admitted) -> frozenset[bytes]:
    """Canonical names that we or the route set on the answer."""
    added = {canonical(name.lower()) for name, _ in admitted.answer_headers}
    return way.answer_names | added | (LIMIT_NAMES if admitted.answer_lines else frozenset())
