"""An answer that the client may not have yet: it is settled by its head, or stored with its end for whoever paid and lost it.

head ──before_release──▶ released with what came of the body ──the whole of a small one──▶ keep_answer ──▶ its end released
            └──refused──▶ a problem goes out in its place
"""

from __future__ import annotations

import structlog

from farebox.app.admission import Admitted, Call, Refusal
from farebox.gateway.heads import AnswerHead
from farebox.gateway.kept_answers import KeptAnswer
from farebox.gateway.problems import refusal
from farebox.gateway.routing import Way

log = structlog.get_logger(__name__)


class PendingAnswer:
    """While it ``waits`` the upstream is not read on and nothing goes to the client."""

    __slots__ = ("_admitted", "_call", "_head", "_kept", "_way", "lost", "settled", "waits")

    def __init__(self, admitted: Admitted, call: Call, head: AnswerHead, way: Way) -> None:
        self._admitted = admitted
        self._call = call
        self._head = head
        self._way = way
        self._kept: KeptAnswer | None = None
        self.waits = True
        self.settled = False  # before_release said yes
        self.lost = False  # the upstream died, or the call was cut, while it waited

    @property
    def collects(self) -> bool:
        """The answer is wanted whole, also when its client is gone."""
        return self._kept is not None

    async def settle(self, payload: bytes, ended: bool) -> Refusal | None:
        """The head may go, with the ``payload`` that came with it; None: yes."""
        admitted = self._admitted
        refused: Refusal | None = None
        try:
            if admitted.before_release is not None:
                fields = [field[0] for field in self._head.fields()]
                refused = await admitted.before_release(self._head.status, fields)
            if refused is None:
                self.settled = True
                if self._is_kept and (kept := KeptAnswer(admitted, self._head, self._way)).add(payload):
                    if ended:
                        await kept.keep(self._call.request_id)
                    else:
                        self._kept = kept
        except Exception:
            log.exception("release_failed", request_id=self._call.request_id)
            refused = refusal(
                "internal_error", "The answer could not be released; quote the request id when you report it."
            )
        self.waits = False
        return refused

    @property
    def _is_kept(self) -> bool:
        admitted = self._admitted
        return (
            admitted.keep_answer is not None
            and admitted.keep_answer_bytes_max > 0
            and self._call.method != "HEAD"
            and self._head.status != 101
        )

    def collect(self, payload: bytes, ended: bool) -> bool:
        """More of the body. True: it is whole and must be stored (``keep``) before its end may go."""
        if self._kept is None:
            return False
        if not self._kept.add(payload):
            self._kept = None
            return False
        self.waits = ended
        return ended

    async def keep(self) -> None:
        kept, self._kept = self._kept, None
        assert kept is not None
        await kept.keep(self._call.request_id)
        self.waits = False
