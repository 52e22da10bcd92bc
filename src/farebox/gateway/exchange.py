"""One admitted call under way: the request goes up, the answer comes down, and the door hears exactly once how it ended.

Order of an answer: the upstream's head → ``before_release`` (an exact fare settles here, the upstream is not read on
meanwhile) → head and body to the client as they come → ``keep_answer`` with the whole of a small answer → ``finish`` →
the last bytes. What was answered is recorded before the client can have it.

A client that leaves ends its call, with one exception: a call that settles and is with the upstream goes on without it, up
to ``keep_answer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from farebox.app.admission import Admitted, Call, Headers, Refusal
from farebox.app.credentials import is_ours
from farebox.base.errors import InvariantError
from farebox.gateway.bodies import LAST_CHUNK, chunk
from farebox.gateway.fields import Kind, canonical
from farebox.gateway.forwarding import lines_for_proxy
from farebox.gateway.heads import AnswerHead, RequestHead
from farebox.gateway.problems import STATUS, refusal
from farebox.gateway.routing import Way
from farebox.gateway.upstream import Destination, UpstreamConnection

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
_HELD_BYTES_MAX: Final = 64 * 1024
_PASSES_TO_STORE: Final = (int(Kind.PASS), int(Kind.OURS_IF_SET))


class Exchange:
    """Implements ``upstream.Caller``. ``_client`` becomes None when the client is gone.

    What few calls change stands on the class as a default: making one of these is a part of every call's cost.
    """

    status = 0
    bytes_up = 0
    bytes_down = 0
    buffered_bytes = 0  # of the request's body, as long as they count against ``buffered_bytes_max``
    request_ended = False
    _connection: UpstreamConnection | None = None
    _again: bytes | None = None  # the whole request, as long as it may be sent once more
    _held: list[bytes] | None = None  # what waits for a connection
    _held_bytes = 0
    _held_ended = False
    _down_chunked = False
    _released = False  # the head went to the client
    _settling = False  # before_release or keep_answer runs: nothing moves
    _settled = False  # before_release said yes
    _full = False  # the client takes nothing for now
    _lost = False  # the upstream died while something was settled
    _finished = False
    _collected: list[bytes] | None = None
    _collected_bytes = 0
    _kept_head: AnswerHead | None = None

    def __init__(
        self,
        gateway: Gateway,
        client: ClientConnection,
        head: RequestHead,
        call: Call,
        way: Way,
        to: Destination,
        admitted: Admitted,
    ) -> None:
        self._gateway = gateway
        self._client: ClientConnection | None = client
        self._head = head
        self._way = way
        self._pool = to.pool
        self._timeout_s = to.timeout_s
        self.call = call
        self.admitted = admitted
        self.started = monotonic()

    @property
    def released(self) -> bool:
        """The head of an answer went to the client."""
        return self._released

    # ── up ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, payload: bytes, ended: bool) -> None:
        """Send the request with what is there of its body."""
        self.request_ended = ended
        self.bytes_up = len(payload)
        data = self._request(payload, ended)
        if ended and self.call.method in _IDEMPOTENT:
            self._again = data
        connection = self._pool.take()
        if connection is not None:
            self._connection = connection
            connection.send(self, data, ended, self._timeout_s, self.call.method == "HEAD")
        else:
            self._hold(data, ended)
            self._pool.wait(self)

    def more(self, payload: bytes, ended: bool) -> None:
        """More of the request's body."""
        self.bytes_up += len(payload)
        self.request_ended = ended
        data = payload
        if self._head.block.chunked:
            data = chunk(payload) + LAST_CHUNK if ended else chunk(payload)
        if self._connection is not None:
            self._connection.send_more(data, ended, self._timeout_s)
        elif self._held is not None:
            self._hold(data, ended)

    def _hold(self, data: bytes, ended: bool) -> None:
        if self._held is None:
            self._held = []
        self._held.append(data)
        self._held_bytes += len(data)
        self._held_ended = ended
        if self._held_bytes > _HELD_BYTES_MAX and self._client is not None:
            self._client.hold_upload()

    def _request(self, payload: bytes, ended: bool) -> bytes:
        head, way, pool, call, client = self._head, self._way, self._pool, self.call, self._client
        assert client is not None
        block = head.block
        lines = block.lines
        ours = way.our_names
        for name, _ in self.admitted.forward_headers:
            lower = self._gateway.forwarded_name(name)
            if lower and lower not in ours:
                ours |= {lower}
        if ours:
            lines = [line for line in lines if canonical(line.partition(b":")[0].lower()) not in ours]
        if way.strip_prefix or pool.base_path or not head.version_1_1:
            line = b"%b %b HTTP/1.1" % (call.method.encode(), self._target(head.target))
        else:
            line = head.line
        lines = [line, *lines]
        fare = self.admitted.fare
        if block.credentials and fare != "pass":
            # A call that is paid on the spot may carry a pass as well, which the payment went before.
            lines += block.credentials if fare == "account" else _not_ours(block.credentials)
        lines.append(pool.host_line)
        if client.trusted:
            lines += lines_for_proxy(client.peer, block.forwarded, block.host)
        else:
            lines.append(client.forwarded_lines)
            lines.append(block.forwarded_host_line)
        if call.body is not None:
            if payload or block.content_length >= 0 or block.chunked:
                lines.append(b"Content-Length: %d" % len(payload))
        elif block.chunked:
            lines.append(b"Transfer-Encoding: chunked")
            payload = chunk(payload) + LAST_CHUNK if ended else chunk(payload)
        elif block.content_length >= 0:
            lines.append(b"Content-Length: %d" % block.content_length)
        for name, value in self.admitted.forward_headers:
            if b"\n" in value or b"\r" in value:
                raise InvariantError(f"the value of {name!r} towards the upstream has a line end")
            lines.append(name + b": " + value)
        lines.append(b"")
        lines.append(payload)
        return b"\r\n".join(lines)

    def _target(self, target: bytes) -> bytes:
        prefix = self._way.strip_prefix
        if (
            prefix
            and target.startswith(prefix)
            and target[len(prefix) : len(prefix) + 1] in (b"/", b"", b"?")
        ):
            target = target[len(prefix) :]
            if not target.startswith(b"/"):
                target = b"/" + target
        return self._pool.base_path + target

    # ── from the upstream ───────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, connection: UpstreamConnection) -> None:
        held, self._held = self._held, None
        if held is None:
            self._pool.give_back(connection)
            return
        self._connection = connection
        data = held[0] if len(held) == 1 else b"".join(held)
        ended = self._held_ended
        if self._client is not None and self._held_bytes > _HELD_BYTES_MAX:
            self._client.release_upload()
        connection.send(self, data, ended, self._timeout_s, self.call.method == "HEAD")

    def not_connected(self, code: str, detail: str) -> None:
        self._held = None
        self.failed(code, detail, False)

    def interim(self, head: AnswerHead) -> None:
        # A call that settles first releases nothing first; HTTP/1.0 does not know interim answers.
        if self._client is not None and self._head.version_1_1 and self.admitted.before_release is None:
            self._client.write(b"\r\n".join([head.reason, *head.lines, b"", b""]))

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        self.status = head.status
        self._again = None
        if ended:
            self._connection = None
        admitted = self.admitted
        if admitted.before_release is None and admitted.keep_answer is None:
            try:
                self._release(head, payload, ended)
            except Exception:  # noqa: BLE001 - logged there
                self._break_off()
            return
        self._settling = True
        if self._connection is not None:
            self._connection.pause()
        self._gateway.spawn(self._settle(head, payload, ended))

    def answered_more(self, payload: bytes, ended: bool) -> None:
        if ended:
            self._connection = None
        if self._collected is not None:
            self._collect(payload)
            if ended and self._collected is not None:
                self._settling = True
                self._gateway.spawn(self._keep_then_end(payload))
                return
        try:
            self._send_more(payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()

    def failed(self, code: str, detail: str, unheard: bool) -> None:
        self._connection = None
        if unheard and self._again is not None and self._client is not None:
            data, self._again = self._again, None
            self._gateway.counters.retries += 1
            self._hold(data, True)
            self._pool.wait(self)
            return
        self._gateway.counters.upstream_error(code)
        if self._settling:
            self._lost = True
            return
        released = self._released
        self._finish_unanswered(code)
        if self._client is None:
            return
        if released:
            self._client.cut()
        else:
            self._client.refuse(refusal(code, detail, 1.0 if code == "upstream_busy" else None), self)

    def upstream_full(self) -> None:
        if self._client is not None:
            self._client.hold_upload()

    def upstream_drained(self) -> None:
        if self._client is not None:
            self._client.release_upload()

    # ── from the client ─────────────────────────────────────────────────────────────────────────────────────────────

    def client_full(self) -> None:
        self._full = True
        if self._connection is not None:
            self._connection.pause()

    def client_drained(self) -> None:
        self._full = False
        if self._connection is not None and not self._settling:
            self._connection.resume()

    def client_lost(self) -> None:
        """The client is gone. What the upstream does for a payment is settled and collected all the same, so that the
        payment can fetch it: a buyer who hangs up must not have the work and the money."""
        self._client = None
        was_full, self._full = self._full, False
        if self._owes_settlement:
            self.admitted.abandoned = True
            self._gateway.unattended.add(self)
            if was_full and not self._settling and self._connection is not None:
                self._connection.resume()
        elif self._settled and self._collected is not None and self._connection is not None:
            self._gateway.unattended.add(self)
            if not self._settling:
                self._connection.resume()
        elif not self._settling:
            self.abort()

    @property
    def _owes_settlement(self) -> bool:
        """The upstream has the whole of a request that is paid by its answer's head. Its time to answer runs on."""
        if self.admitted.before_release is None or self._settled or self._finished:
            return False
        return self._settling or (self.request_ended and self._connection is not None)

    def abort(self) -> None:
        """Give the call up: nothing more goes up or down."""
        if self._held is not None:
            self._held = None
            self._pool.leave(self)
        if self._connection is not None:
            self.admitted.abandoned = (
                True  # it was forwarded: what the door makes of it is the door's business
            )
            self._connection.drop()
            self._connection = None
        if not self._settling:
            self._finish_unanswered("client_gone")

    # ── down ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _release(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        """Head and first bytes in one write."""
        client = self._client
        if client is None:
            self._absent(payload, ended)
            return
        gateway = self._gateway
        lines = [head.reason, *head.lines]
        admitted = self.admitted
        if admitted.answer_headers:
            contested = head.contested
            for name, value in admitted.answer_headers:
                if name not in gateway.contested:
                    gateway.contest(name)
                    contested = True
                if b"\n" in value or b"\r" in value:
                    raise InvariantError(f"the value of {name!r} towards the client has a line end")
            if contested:
                ours = {name.lower() for name, _ in admitted.answer_headers}
                lines = [line for line in lines if line.partition(b":")[0].lower() not in ours]
            lines += [name + b": " + value for name, value in admitted.answer_headers]
        lines.append(client.request_id_line)
        bodiless = self.call.method == "HEAD" or head.status == 204 or head.status == 304
        if head.content_length >= 0:
            if head.status != 204:
                lines.append(b"Content-Length: %d" % head.content_length)
        elif not bodiless:
            if ended:
                lines.append(b"Content-Length: %d" % len(payload))
            elif self._head.version_1_1:
                self._down_chunked = True
                lines.append(b"Transfer-Encoding: chunked")
            else:
                client.keep_alive = False
        elif head.chunked and self._head.version_1_1 and head.status != 204:
            lines.append(b"Transfer-Encoding: chunked")
        if not self.request_ended or gateway.draining:
            client.keep_alive = False
        if not client.keep_alive:
            lines.append(b"Connection: close")
        elif not self._head.version_1_1:
            lines.append(b"Connection: keep-alive")
        lines.append(b"")
        size = len(payload)
        self.bytes_down = size
        lines.append(chunk(payload) if self._down_chunked and size else payload)
        self._released = True
        if ended:
            self._finish(self.status, None)
            client.write(b"\r\n".join(lines))
            client.exchange_ended()
        else:
            client.write(b"\r\n".join(lines))

    def _send_more(self, payload: bytes, ended: bool) -> None:
        client = self._client
        if client is None:
            self._absent(payload, ended)
            return
        self.bytes_down += len(payload)
        if self._down_chunked:
            payload = chunk(payload) + LAST_CHUNK if ended else chunk(payload)
        if ended:
            self._finish(self.status, None)
            if payload:
                client.write(payload)
            client.exchange_ended()
        elif payload:
            client.write(payload)

    def _absent(self, payload: bytes, ended: bool) -> None:
        """The client is gone while an answer is still collected for it."""
        if ended or self._collected is None:
            if self._connection is not None:
                self._connection.drop()
                self._connection = None
            self._finish_unanswered("client_gone")

    def _finish(self, status: int, code: str | None) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            self.admitted.finish(status, self.bytes_up, self.bytes_down)
        finally:
            self._gateway.call_ended(self, status, code)

    def _finish_unanswered(self, code: str) -> None:
        """The call failed; that it could not even be recorded changes nothing for the client."""
        try:
            self._finish(0, code)
        except Exception:
            log.exception("finish_failed", request_id=self.call.request_id)

    # ── settle, keep, then release ──────────────────────────────────────────────────────────────────────────────────

    async def _settle(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        admitted = self.admitted
        try:
            refused: Refusal | None = None
            if admitted.before_release is not None:
                refused = await admitted.before_release(head.status, [field[0] for field in head.fields()])
            if refused is None:
                self._settled = True
                if (
                    admitted.keep_answer is not None
                    and admitted.keep_answer_bytes_max > 0
                    and self.call.method != "HEAD"
                ):
                    self._collected = []
                    self._collect(payload)
                    if ended and self._collected is not None:
                        await self._keep(head)
        except Exception:
            log.exception("release_failed", request_id=self.call.request_id)
            refused = refusal(
                "internal_error", "The answer could not be released; quote the request id when you report it."
            )
        self._settling = False
        if refused is not None:
            if self._connection is not None:
                self._connection.drop()
                self._connection = None
            client = self._client
            if client is None:
                self._finish_unanswered(refused.reason.code)
            else:
                self._finish(STATUS.get(refused.reason.code, 500), refused.reason.code)
                client.refuse(refused, self)
            return
        try:
            if self._collected is not None and not ended:
                self._kept_head = head
            self._release(head, payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()
            return
        self._go_on()

    async def _keep_then_end(self, payload: bytes) -> None:
        assert self._kept_head is not None
        await self._keep(self._kept_head)
        self._settling = False
        try:
            self._send_more(payload, True)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()

    async def _keep(self, head: AnswerHead) -> None:
        """Hand the whole answer over before its end is released. That it could not be kept is no reason to hold it back."""
        assert self.admitted.keep_answer is not None
        assert self._collected is not None
        headers: Headers = [field[0] for field in head.fields() if field[1] in _PASSES_TO_STORE]
        headers += self.admitted.answer_headers
        body = b"".join(self._collected)
        self._collected = None
        try:
            await self.admitted.keep_answer(head.status, headers, body)
        except Exception:
            log.exception("answer_not_kept", request_id=self.call.request_id)

    def _collect(self, payload: bytes) -> None:
        assert self._collected is not None
        self._collected_bytes += len(payload)
        if self._collected_bytes > self.admitted.keep_answer_bytes_max:
            self._collected = None
        else:
            self._collected.append(payload)

    def _go_on(self) -> None:
        if self._lost:
            self._lost = False
            self.failed(
                "upstream_failed", "The upstream closed the connection before its answer was complete.", False
            )
        elif self._connection is not None and not self._full:
            self._connection.resume()

    def _break_off(self) -> None:
        """The end could not be recorded: then it must not be sent."""
        log.exception("answer_broken_off", request_id=self.call.request_id)
        if self._connection is not None:
            self._connection.drop()
            self._connection = None
        self._finish_unanswered("internal_error")
        if self._client is not None:
            self._client.cut()


def _not_ours(credentials: Sequence[bytes]) -> list[bytes]:
    return [line for line in credentials if not is_ours(line.partition(b":")[2].strip(b" \t"))]
