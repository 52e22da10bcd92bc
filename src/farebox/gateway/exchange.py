"""One admitted call under way: the request goes up, the answer comes down, and the door hears exactly once how it ended.

Order of an answer: the upstream's head → what must happen before it may go (a ``PendingAnswer``: few have one) → head and body
to the client as they come → ``finish`` → the last bytes. What was answered is recorded before the client can have it.

A client that leaves ends its call, with one exception: a call that settles and is with the upstream goes on without it, up
to ``keep_answer``.

A request without a connection waits as a ``Dispatch``. Limits stand in a ``Metering``. A 101 that was asked for ends the talk of
HTTP: what follows is a ``Tunnel``, and the call lasts as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import structlog

from farebox.app.admission import Admitted, Call, Refusal
from farebox.base.errors import Reason
from farebox.gateway.answer_heads import field_lines, framed_lines, set_by_us
from farebox.gateway.bodies import LAST_CHUNK, chunk
from farebox.gateway.dispatch import Dispatch
from farebox.gateway.fields import canonical
from farebox.gateway.heads import AnswerHead, RequestHead
from farebox.gateway.held_bodies import HeldBody
from farebox.gateway.metering import Metering
from farebox.gateway.pending_answers import PendingAnswer
from farebox.gateway.pools import Destination
from farebox.gateway.problems import STATUS
from farebox.gateway.requests import request_bytes
from farebox.gateway.routing import Way
from farebox.gateway.trailers import last_chunk, passing
from farebox.gateway.tunnel import Tunnel, agreed
from farebox.gateway.upstream import NEVER, UpstreamConnection

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
_COME_BACK: Final = frozenset({"upstream_busy", "unavailable"})


class Exchange:
    """Implements ``upstream.Caller``. ``client`` becomes None when the client is gone.

    What few calls change stands on the class as a default: making one of these is a part of every call's cost.
    """

    status = 0
    bytes_up = 0
    bytes_down = 0
    held_body: HeldBody | None = None  # the request's, as long as it counts against ``buffered_bytes_max``
    request_ended = False
    connection: UpstreamConnection | None = None
    _again: bytes | None = None  # the whole request, as long as it may be sent once more
    _dispatch: Dispatch | None = None  # of a call that had to wait for a connection
    _down_chunked = False
    _end_up = LAST_CHUNK  # how a chunked body ends, with its trailers
    _end_down = LAST_CHUNK
    _released = False  # the head went to the client
    _full = False  # the client takes nothing for now
    _finished = False
    _pending: PendingAnswer | None = None
    _metering: Metering | None = None
    _tunnel: Tunnel | None = None
    ends_at = NEVER  # on the gateway's ticker

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
        self.client: ClientConnection | None = client
        self._head = head
        self._way = way
        self._to = to
        self._pool = to.pool if to.balancer is None else to.balancer.choose()
        route = way.route
        self._timeout_s = to.timeout_s if route.timeout_s is None else route.timeout_s
        self.call = call
        self.admitted = admitted
        self.started = monotonic()
        if admitted.meter is not None:
            self._metering = Metering(admitted.meter, self, gateway)
        if to.total_timeout_s is not None or route.total_timeout_s is not None:
            self._time(to.total_timeout_s, route.total_timeout_s)

    @property
    def released(self) -> bool:
        """The head of an answer went to the client."""
        return self._released

    # ── up ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, payload: bytes, ended: bool) -> None:
        """Send the request with what is there of its body."""
        if self._metering is not None and self._metering.up is not None:
            payload, ended = self._metering.up.admit(payload, ended)
        self.request_ended = ended
        self.bytes_up = len(payload)
        assert self.client is not None
        data = request_bytes(
            self.client,
            self._head,
            self.call,
            self._way,
            self._pool,
            self.admitted,
            payload,
            ended,
            self._end_up,
        )
        if ended and self.call.method in _IDEMPOTENT and not self._head.block.upgrade:
            self._again = data
        connection = self._pool.take()
        if connection is not None:
            self.connection = connection
            connection.send(self, data, ended, self._timeout_s, self.call.method == "HEAD")
        else:
            dispatch = self._take_to_line()
            self._hold(dispatch, data, ended)
            dispatch.wait()

    def more(self, payload: bytes, ended: bool) -> None:
        """More of the request's body."""
        if self._metering is not None and self._metering.up is not None:
            self._metering.up.push(payload, ended)
        else:
            self.send_up(payload, ended)

    def trailed_up(self, lines: Sequence[bytes]) -> None:
        """The request's trailers, told right before its end: those that its head announced go on."""
        names = self._head.block.trailer_names
        if names:
            ours = self._way.our_names | {canonical(n.lower()) for n, _ in self.admitted.forward_headers}
            going = passing(lines, self._gateway.request_book, ours)
            self._end_up = last_chunk([line for line in going if line.partition(b":")[0].lower() in names])

    def send_up(self, payload: bytes, ended: bool) -> None:
        self.bytes_up += len(payload)
        self.request_ended = ended
        data = payload
        if self._head.block.chunked:
            data = chunk(payload) + self._end_up if ended else chunk(payload)
        if self.connection is not None:
            self.connection.send_more(data, ended, self._timeout_s)
        elif self._dispatch is not None and self._dispatch.waits:
            self._hold(self._dispatch, data, ended)

    def _take_to_line(self) -> Dispatch:
        """To those who have no connection yet."""
        if self._dispatch is None:
            attempts_max = self._gateway.settings.attempts_max
            self._dispatch = Dispatch(self, self._to, self._pool, attempts_max)
        return self._dispatch

    def _hold(self, dispatch: Dispatch, data: bytes, ended: bool) -> None:
        if not dispatch.hold(data, ended) and self.client is not None:
            self.client.hold_upload()

    def _leave_line(self) -> None:
        if self._dispatch is not None:
            self._dispatch.leave()

    # ── from the upstream ───────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, connection: UpstreamConnection) -> None:
        dispatch = self._take_to_line()
        if not dispatch.accepts(connection):
            return
        self.connection = connection
        data, ended = dispatch.take()
        if not ended and self.client is not None:
            self.client.release_upload()
        connection.send(self, data, ended, self._timeout_s, self.call.method == "HEAD")

    def not_connected(self, code: str, detail: str) -> None:
        dispatch = self._take_to_line()
        if not dispatch.elsewhere():
            dispatch.drop()
            self.failed(code, detail, False)

    def interim(self, head: AnswerHead) -> None:
        # A call that settles first releases nothing first; HTTP/1.0 does not know interim answers.
        if self.client is not None and self._head.version_1_1 and self.admitted.before_release is None:
            lines = self._way.strip_answer(head.lines) if self._way.rewrites_answer else head.lines
            self.client.write(b"\r\n".join([head.reason, *lines, b"", b""]))

    def switches(self, head: AnswerHead) -> bool:
        """Only to a protocol that the client offered."""
        return agreed(self._head.upgrade, head.upgrade)

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        self.status = head.status
        self._again = None
        if self._metering is not None:
            self._metering.priced(head.credits)
        if ended:
            self._answered_whole()
        admitted = self.admitted
        if admitted.before_release is None and admitted.keep_answer is None:
            try:
                self._release(head, payload, ended)
            except Exception:  # noqa: BLE001 - logged there
                self._break_off()
            return
        pending = self._pending = PendingAnswer(admitted, self.call, head, self._way)
        if self.connection is not None:
            self.connection.pause()
        self._gateway.spawn(self._settle(pending, head, payload, ended))

    def answered_more(self, payload: bytes, ended: bool) -> None:
        if ended:
            self._answered_whole()
        if self._pending is not None and self._pending.collect(payload, ended):
            self._gateway.spawn(self._keep_then_end(self._pending, payload))
        else:
            self._come_down(payload, ended)

    def _answered_whole(self) -> None:
        """The upstream has said all. What an upload still waited to send goes nowhere, so none of it may count as passed."""
        self.connection = None
        if self._metering is not None and not self.request_ended:
            self._metering.end_upload()

    def trailed(self, lines: Sequence[bytes]) -> None:
        """What comes after a chunked answer goes on to a client that asked for it; what it costs goes to the meter."""
        book = self._gateway.answer_book
        if self._metering is not None:
            self._metering.priced_late(lines, book)
        if self._head.block.takes_trailers:
            self._end_down = last_chunk(passing(lines, book, set_by_us(self._way, self.admitted)))

    def failed(self, code: str, detail: str, unheard: bool) -> None:
        self.connection = None
        again = self._again
        if again is not None and self.client is not None and (unheard or code == "upstream_failed"):
            dispatch = self._take_to_line()
            if dispatch.again(again, unheard):
                self._gateway.counters.retries += 1
                return
        self._gateway.counters.upstream_error(code)
        pending = self._pending
        if pending is not None and pending.waits:
            pending.lost = True
            return
        if pending is not None and pending.settled and self.admitted.broken is not None:
            self.admitted.broken()
        self._finish_anyway(0, code)
        self._turn_away(code, detail)

    def upstream_full(self) -> None:
        if self.client is not None:
            self.client.hold_upload()

    def upstream_drained(self) -> None:
        if self.client is not None:
            self.client.release_upload()

    # ── from the client ─────────────────────────────────────────────────────────────────────────────────────────────

    def client_full(self) -> None:
        self._full = True
        if self.connection is not None:
            self.connection.pause()

    def client_drained(self) -> None:
        self._full = False
        self.read_on()

    def client_lost(self) -> None:
        """The client is gone. What the upstream does for a payment is settled and collected all the same, so that the
        payment can fetch it: a buyer who hangs up must not have the work and the money."""
        self.client = None
        was_full, self._full = self._full, False
        pending, connection = self._pending, self.connection
        waits = pending is not None and pending.waits
        if self._owes_settlement:
            self.admitted.abandoned = True
            self._gateway.unattended.add(self)
            if was_full and not waits and connection is not None:
                connection.resume()
        elif pending is not None and pending.settled and pending.collects and connection is not None:
            self._gateway.unattended.add(self)
            if not waits:
                connection.resume()
        elif not waits:
            self.abort()

    @property
    def _owes_settlement(self) -> bool:
        """The upstream has the whole of a request that is paid by its answer's head. Its time to answer runs on."""
        pending = self._pending
        if (
            self.admitted.before_release is None
            or self._finished
            or (pending is not None and pending.settled)
        ):
            return False
        return pending is not None or (self.request_ended and self.connection is not None)

    def abort(self) -> None:
        """Give the call up: nothing more goes up or down."""
        self._leave_line()
        self._abandon()
        if self._pending is None or not self._pending.waits:
            self._finish_anyway(0, "client_gone")

    def _abandon(self) -> None:
        """Let go of the upstream. The call was forwarded: what the door makes of that is the door's business."""
        if self.connection is not None or self.status:
            self.admitted.abandoned = True
        self._drop_upstream()

    # ── from the gateway and the limits ─────────────────────────────────────────────────────────────────────────────

    def cut(self, code: str, detail: str, **facts: str) -> None:
        """End it now, from our side: a problem with ``code`` when no answer was begun, else the end of the connection."""
        if self._tunnel is not None:
            self._tunnel.cut(code)
            return
        if self._finished:
            return
        self._leave_line()
        self._abandon()
        self._again = None
        if self._pending is not None and self._pending.waits:
            self._pending.lost = True
            return
        self._finish_anyway(0, code)
        if self.client is not None:
            self.client.end_upload()
        self._turn_away(code, detail, facts)

    def overdue(self) -> None:
        """The time for the whole exchange is over."""
        self.ends_at = NEVER
        self._leave_line()
        self._drop_upstream()
        self._again = None
        if not self._finished:
            self.failed("upstream_timeout", "The call took longer than it may.", False)

    def _time(self, upstream_s: float | None, route_s: float | None) -> None:
        total_s = route_s if route_s is not None else upstream_s
        assert total_s is not None
        self.ends_at = self._gateway.ticker.now + total_s
        self._gateway.timed.add(self)

    def cut_short(self, code: str) -> None:
        """The client has had all it may have: that much was an answer, and it must not look like a whole one."""
        self._drop_upstream()
        self._finish_anyway(self.status, code)
        if self.client is not None:
            self.client.cut()

    def read_on(self) -> None:
        """Go on reading the answer, unless something still stands against it."""
        if (
            self.connection is not None
            and not self._full
            and (self._pending is None or not self._pending.waits)
            and (self._metering is None or not self._metering.holds_answer)
        ):
            self.connection.resume()

    def _turn_away(self, code: str, detail: str, facts: Mapping[str, str] = MappingProxyType({})) -> None:
        if self.client is None:
            return
        if self._released:
            self.client.cut()
        else:
            reason = Reason(code, detail, None, dict(facts))
            self.client.refuse(Refusal(reason, retry_after_s=1.0 if code in _COME_BACK else None), self)

    # ── down ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _release(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        """Head and first bytes in one write."""
        client = self.client
        if client is None:
            self._absent(payload, ended)
            return
        if head.status == 101:
            self._switch(client, head, payload)
            return
        lines, self._down_chunked = framed_lines(
            self._gateway,
            client,
            self._head,
            head,
            self._way,
            self.admitted,
            len(payload) if ended and self._end_down is LAST_CHUNK else -1,
            not self.request_ended or self._gateway.draining,
        )
        lines.append(b"")
        self._released = True
        if self._metering is not None and self._metering.down is not None:
            payload, ended = self._metering.down.admit(payload, ended)
        size = len(payload)
        self.bytes_down = size
        if self._down_chunked:
            payload = chunk(payload) + self._end_down if ended else chunk(payload)
        lines.append(payload)
        if ended:
            self._finish(self.status, None)
            client.write(b"\r\n".join(lines))
            client.exchange_ended()
        else:
            client.write(b"\r\n".join(lines))

    def _switch(self, client: ClientConnection, head: AnswerHead, ahead: bytes) -> None:
        """The upstream changed the protocol, as it was asked to: nobody here knows what is said from now on."""
        lines = field_lines(self._gateway, client, head, self._way, self.admitted)
        connection, self.connection = self.connection, None
        if connection is None:  # it died while something was settled
            if self._pending is not None:
                self._pending.lost = False
            self.failed(
                "upstream_failed", "The upstream closed the connection as it changed protocols.", False
            )
            return
        self._released = True
        self.ends_at = NEVER
        lines += [b"Connection: Upgrade", b"Upgrade: " + head.upgrade, b"", b""]
        client.write(b"\r\n".join(lines))
        self._tunnel = Tunnel(self._gateway, client, connection, self.admitted.meter, self._tunnel_over)
        self._tunnel.begin(ahead)

    def _tunnel_over(self, code: str | None) -> None:
        assert self._tunnel is not None
        self.bytes_up, self.bytes_down = self._tunnel.bytes_up, self._tunnel.bytes_down
        self._finish_anyway(self.status, code)

    @property
    def tunnel(self) -> Tunnel | None:
        return self._tunnel

    def _come_down(self, payload: bytes, ended: bool) -> None:
        """More of the answer's body."""
        if self._metering is not None and self._metering.down is not None:
            self._metering.down.push(payload, ended)
        else:
            self.send_down(payload, ended)

    def send_down(self, payload: bytes, ended: bool) -> None:
        try:
            self._send_more(payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()

    def _send_more(self, payload: bytes, ended: bool) -> None:
        client = self.client
        if client is None:
            self._absent(payload, ended)
            return
        self.bytes_down += len(payload)
        if self._down_chunked:
            payload = chunk(payload) + self._end_down if ended else chunk(payload)
        if ended:
            self._finish(self.status, None)
            if payload:
                client.write(payload)
            client.exchange_ended()
        elif payload:
            client.write(payload)

    def _absent(self, payload: bytes, ended: bool) -> None:
        """The client is gone while an answer is still collected for it."""
        if ended or self._pending is None or not self._pending.collects:
            self._drop_upstream()
            self._finish_anyway(0, "client_gone")

    def _finish(self, status: int, code: str | None) -> None:
        if self._finished:
            return
        self._finished = True
        if self._metering is not None:
            self._metering.end()
        try:
            self.admitted.finish(status, self.bytes_up, self.bytes_down)
        finally:
            self._gateway.call_ended(self, status, code)

    def _finish_anyway(self, status: int, code: str | None) -> None:
        """The call failed; that it could not even be recorded changes nothing for the client."""
        try:
            self._finish(status, code)
        except Exception:
            log.exception("finish_failed", request_id=self.call.request_id)

    # ── settle, keep, then release ──────────────────────────────────────────────────────────────────────────────────

    async def _settle(self, pending: PendingAnswer, head: AnswerHead, payload: bytes, ended: bool) -> None:
        refused = await pending.settle(payload, ended)
        if refused is not None:
            self._refuse(refused)
            return
        try:
            self._release(head, payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()
            return
        if pending.lost:
            pending.lost = False
            self.failed(
                "upstream_failed", "The upstream closed the connection before its answer was complete.", False
            )
        else:
            self.read_on()

    async def _keep_then_end(self, pending: PendingAnswer, payload: bytes) -> None:
        await pending.keep()
        self._come_down(payload, True)

    def _refuse(self, refused: Refusal) -> None:
        """The upstream answered, and the client gets something else."""
        self._drop_upstream()
        client = self.client
        if client is None:
            self._finish_anyway(0, refused.reason.code)
        else:
            self._finish(STATUS.get(refused.reason.code, 500), refused.reason.code)
            client.refuse(refused, self)

    def _drop_upstream(self) -> None:
        if self.connection is not None:
            self.connection.drop()
            self.connection = None

    def _break_off(self) -> None:
        """The end could not be recorded: then it must not be sent."""
        log.exception("answer_broken_off", request_id=self.call.request_id)
        self._drop_upstream()
        self._finish_anyway(0, "internal_error")
        if self.client is not None:
            self.client.cut()
