"""The answer of a paid call, collected while it streams, for the one who paid and lost it."""

from __future__ import annotations

from typing import Final

import structlog

from farebox.app.admission import Admitted, Headers
from farebox.gateway.fields import Kind
from farebox.gateway.heads import AnswerHead
from farebox.gateway.routing import Way

log = structlog.get_logger(__name__)

_PASSES_TO_STORE: Final = (int(Kind.PASS), int(Kind.OURS_IF_SET))


class KeptAnswer:
    """A head and a body of at most ``keep_answer_bytes_max`` bytes."""

    __slots__ = ("_admitted", "_head", "_payloads", "_size", "_way")

    def __init__(self, admitted: Admitted, head: AnswerHead, way: Way) -> None:
        self._admitted = admitted
        self._head = head
        self._way = way
        self._payloads: list[bytes] = []
        self._size = 0

    def add(self, payload: bytes) -> bool:
        """More of the body. False: it has become too large to be kept."""
        self._size += len(payload)
        if self._size > self._admitted.keep_answer_bytes_max:
            self._payloads.clear()
            return False
        self._payloads.append(payload)
        return True

    async def keep(self, request_id: str) -> None:
        """Hand the whole answer over, before its end is released. That it could not be kept is no reason to hold it back."""
        assert self._admitted.keep_answer is not None
        headers: Headers = [field[0] for field in self._head.fields() if field[1] in _PASSES_TO_STORE]
        if self._way.rewrites_answer:
            headers = self._way.rewrite_fields(headers)
        headers += self._admitted.told_client()
        try:
            await self._admitted.keep_answer(self._head.status, headers, b"".join(self._payloads))
        except Exception:
            log.exception("answer_not_kept", request_id=request_id)
