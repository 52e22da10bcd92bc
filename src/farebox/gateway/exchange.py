"""One admitted call under way: the request goes up, the answer comes down, and the door hears exactly once how it ended.

Order of an answer: the upstream's head → ``before_release`` (an exact fare settles here, the upstream is not read on
meanwhile) → head and body to the client as they come → ``keep_answer`` with the whole of a small answer → ``finish`` →
the last bytes. What was answered is recorded before the client can have it.

A client that leaves ends its call, with one exception: a call that settles and is with the upstream goes on without it, up
to ``keep_answer``.

Under a meter each direction's bytes go through a ``Passage``. A 101 that was asked for ends the talk of HTTP: what follows is
a ``Tunnel``, and the call lasts as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import structlog

from farebox.app.admission import LIMIT_NAMES, Admitted, Call, Meter, Refusal
from farebox.base.errors import InvariantError, Reason
from farebox.gateway.bodies import LAST_CHUNK, chunk
from farebox.gateway.fields import canonical
from farebox.gateway.heads import AnswerHead, RequestHead
from farebox.gateway.held_bodies import HeldBody
from farebox.gateway.kept_answers import KeptAnswer
from farebox.gateway.passage import Passage
from farebox.gateway.pools import Destination, UpstreamPool, readdressed
from farebox.gateway.problems import STATUS, refusal
from farebox.gateway.requests import request_bytes
from farebox.gateway.routing import Way
from farebox.gateway.trailers import announced, credits_in, last_chunk, passing
from farebox.gateway.tunnel import Tunnel
from farebox.gateway.upstream import NEVER, UpstreamConnection

if TYPE_CHECKING:
    from farebox.gateway.connection import ClientConnection
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
_HELD_BYTES_MAX: Final = 64 * 1024
_COME_BACK: Final = frozenset({"upstream_busy", "unavailable"})
_UPLOAD_USED_UP: Final = "this pass has no bytes left to upload: the body was cut; buy another one"
_CANNOT_SAY: Final = "What is left to upload cannot be found out right now; try again in a moment."


class Exchange:
    """Implements ``upstream.Caller``. ``_client`` becomes None when the client is gone.

    What few calls change stands on the class as a default: making one of these is a part of every call's cost.
    """

    status = 0
    bytes_up = 0
    bytes_down = 0
    held_body: HeldBody | None = None  # the request's, as long as it counts against ``buffered_bytes_max``
    request_ended = False
    _connection: UpstreamConnection | None = None
    _again: bytes | None = None  # the whole request, as long as it may be sent once more
    _held: list[bytes] | None = None  # what waits for a connection
    _held_bytes = 0
    _held_ended = False
    _tried: tuple[UpstreamPool, ...] = ()  # targets that could not be reached for this call
    _down_chunked = False
    _end_up = LAST_CHUNK  # how a chunked body ends, with its trailers
    _end_down = LAST_CHUNK
    _released = False  # the head went to the client
    _settling = False  # before_release or keep_answer runs: nothing moves
    _settled = False  # before_release said yes
    _full = False  # the client takes nothing for now
    _lost = False  # the upstream died while something was settled
    _finished = False
    _kept: KeptAnswer | None = None
    _meter: Meter | None = None
    _up: Passage | None = None  # what limits hold back of the request's body
    _down: Passage | None = None  # and of the answer's
    _credits: bytes | None = None  # what the upstream said the call costs
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
        self._client: ClientConnection | None = client
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
            self._limit(admitted.meter)
        if to.total_timeout_s is not None or route.total_timeout_s is not None:
            self._time(to.total_timeout_s, route.total_timeout_s)

    @property
    def released(self) -> bool:
        """The head of an answer went to the client."""
        return self._released

    # ── up ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, payload: bytes, ended: bool) -> None:
        """Send the request with what is there of its body."""
        if self._up is not None:
            payload, ended = self._up.admit(payload, ended)
        self.request_ended = ended
        self.bytes_up = len(payload)
        assert self._client is not None
        data = request_bytes(
            self._client,
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
            self._connection = connection
            connection.send(self, data, ended, self._timeout_s, self.call.method == "HEAD")
        else:
            self._hold(data, ended)
            self._pool.wait(self)

    def more(self, payload: bytes, ended: bool) -> None:
        """More of the request's body."""
        if self._up is None:
            self._send_up(payload, ended)
        else:
            self._up.push(payload, ended)

    def trailed_up(self, lines: Sequence[bytes]) -> None:
        """The request's trailers, told right before its end: those that its head announced go on."""
        announced = self._head.block.trailer_names
        if announced:
            book = self._gateway.request_book
            ours = self._way.our_names | {canonical(n.lower()) for n, _ in self.admitted.forward_headers}
            self._end_up = last_chunk(
                [line for line in passing(lines, book, ours) if line.partition(b":")[0].lower() in announced]
            )

    def _send_up(self, payload: bytes, ended: bool) -> None:
        self.bytes_up += len(payload)
        self.request_ended = ended
        data = payload
        if self._head.block.chunked:
            data = chunk(payload) + self._end_up if ended else chunk(payload)
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
        if self._to.balancer is not None and self._turn_elsewhere():
            self._pool.wait(self)
            return
        self._held = None
        self.failed(code, detail, False)

    def interim(self, head: AnswerHead) -> None:
        # A call that settles first releases nothing first; HTTP/1.0 does not know interim answers.
        if self._client is not None and self._head.version_1_1 and self.admitted.before_release is None:
            lines = self._way.strip_answer(head.lines) if self._way.rewrites_answer else head.lines
            self._client.write(b"\r\n".join([head.reason, *lines, b"", b""]))

    def switches(self, head: AnswerHead) -> bool:
        """Only to a protocol that the client offered."""
        offered = {p.strip().lower() for p in self._head.upgrade.split(b",")} - {b""}
        taken = {p.strip().lower() for p in head.upgrade.split(b",")} - {b""}
        return bool(taken) and taken <= offered

    def answered(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        self.status = head.status
        self._again = None
        if self._meter is not None and head.credits is not None and self._credits is None:
            self._credits = head.credits
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
        if self._kept is not None:
            if not self._kept.add(payload):
                self._kept = None
            elif ended:
                self._settling = True
                self._gateway.spawn(self._keep_then_end(self._kept, payload))
                return
        self._come_down(payload, ended)

    def trailed(self, lines: Sequence[bytes]) -> None:
        """What comes after a chunked answer goes on to a client that asked for it; what it costs goes to the meter."""
        book = self._gateway.answer_book
        if self._meter is not None:
            self._credits = credits_in(lines, book) or self._credits
        if self._head.block.takes_trailers:
            self._end_down = last_chunk(passing(lines, book, self._answer_names))

    @property
    def _answer_names(self) -> frozenset[bytes]:
        """Canonical names that we or the route set on the answer."""
        added = {canonical(name.lower()) for name, _ in self.admitted.answer_headers}
        return self._way.answer_names | added | (LIMIT_NAMES if self.admitted.answer_lines else frozenset())

    def failed(self, code: str, detail: str, unheard: bool) -> None:
        self._connection = None
        if self._again is not None and self._client is not None and self._sends_again(code, unheard):
            self._gateway.counters.retries += 1
            self._pool.wait(self)
            return
        self._gateway.counters.upstream_error(code)
        if self._settling:
            self._lost = True
            return
        if self._settled and self.admitted.broken is not None:
            self.admitted.broken()
        self._finish_unanswered(code)
        self._turn_away(code, detail)

    def _sends_again(self, code: str, unheard: bool) -> bool:
        """Whether a request that may be sent twice waits once more: on a stale connection's target or another one."""
        data, self._again = self._again, None
        several = self._to.balancer is not None
        if data is None or not (unheard or (several and code == "upstream_failed")):
            return False
        self._hold(data, True)
        if (several and self._turn_elsewhere()) or unheard:
            return True
        self._held = None
        return False

    def _turn_elsewhere(self) -> bool:
        """To another target, if there is one left to try: it has seen no byte yet of what waits for a connection."""
        balancer, before, held = self._to.balancer, self._pool, self._held
        if balancer is None or not held or len(self._tried) + 2 > self._gateway.settings.attempts_max:
            return False
        self._tried = (*self._tried, before)
        other = balancer.choose_other(self._tried)
        if other is None:
            return False
        self._pool = other
        held[0] = readdressed(held[0], before, other)
        if self._again is not None:
            self._again = held[0]
        return True

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
        self._read_upstream()

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
        elif self._settled and self._kept is not None and self._connection is not None:
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
        self._abandon()
        if not self._settling:
            self._finish_unanswered("client_gone")

    def _abandon(self) -> None:
        """Let go of the upstream. The call was forwarded: what the door makes of that is the door's business."""
        if self._connection is not None or self.status:
            self.admitted.abandoned = True
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    # ── from the gateway and the limits ─────────────────────────────────────────────────────────────────────────────

    def cut(self, code: str, detail: str, **facts: str) -> None:
        """End it now, from our side: a problem with ``code`` when no answer was begun, else the end of the connection."""
        if self._tunnel is not None:
            self._tunnel.cut(code)
            return
        if self._finished:
            return
        if self._held is not None:
            self._held = None
            self._pool.leave(self)
        self._abandon()
        self._again = None
        if self._settling:
            self._lost = True
            return
        self._finish_unanswered(code)
        self._turn_away(code, detail, facts)

    def overdue(self) -> None:
        """The time for the whole exchange is over."""
        self.ends_at = NEVER
        if self._held is not None:
            self._held = None
            self._pool.leave(self)
        if self._connection is not None:
            self._connection.drop()
        self._again = None
        if not self._finished:
            self.failed("upstream_timeout", "The call took longer than it may.", False)

    def _time(self, upstream_s: float | None, route_s: float | None) -> None:
        total_s = route_s if route_s is not None else upstream_s
        assert total_s is not None
        self.ends_at = self._gateway.ticker.now + total_s
        self._gateway.timed.add(self)

    def _limit(self, meter: Meter) -> None:
        self._meter = meter
        if meter.upload is not None:
            self._up = Passage(
                meter.upload,
                onward=self._send_up,
                hold=self._pace_upload,
                release=self._unpace_upload,
                cut=self._upload_used_up,
                spawn=self._gateway.spawn,
            )
        if meter.download is not None:
            self._down = Passage(
                meter.download,
                onward=self._send_down,
                hold=self._pace_download,
                release=self._read_upstream,
                cut=self._download_used_up,
                spawn=self._gateway.spawn,
            )

    def _pace_upload(self) -> None:
        if self._client is not None:
            self._client.pace_upload()

    def _unpace_upload(self) -> None:
        if self._client is not None:
            self._client.unpace_upload()

    def _upload_used_up(self, code: str) -> None:
        if code == "pass_exhausted":
            quotes = f"/.farebox/quotes?route={self.call.route.id}"
            self.cut(code, _UPLOAD_USED_UP, limit="upload_bytes", quotes=quotes)
        else:
            self.cut(code, _CANNOT_SAY)

    def _pace_download(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def _download_used_up(self, code: str) -> None:
        """The client has had all it may have: that much was an answer, and it must not look like a whole one."""
        if self._connection is not None:
            self._connection.drop()
            self._connection = None
        try:
            self._finish(self.status, code)
        except Exception:
            log.exception("finish_failed", request_id=self.call.request_id)
        if self._client is not None:
            self._client.cut()

    def _read_upstream(self) -> None:
        """Go on reading the answer, unless something still stands against it."""
        if (
            self._connection is not None
            and not self._settling
            and not self._full
            and (self._down is None or not self._down.waits)
        ):
            self._connection.resume()

    def _turn_away(self, code: str, detail: str, facts: Mapping[str, str] = MappingProxyType({})) -> None:
        if self._client is None:
            return
        if self._released:
            self._client.cut()
        else:
            reason = Reason(code, detail, None, dict(facts))
            self._client.refuse(Refusal(reason, retry_after_s=1.0 if code in _COME_BACK else None), self)

    # ── down ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _release(self, head: AnswerHead, payload: bytes, ended: bool) -> None:
        """Head and first bytes in one write."""
        client = self._client
        if client is None:
            self._absent(payload, ended)
            return
        gateway = self._gateway
        lines = [head.reason, *head.lines]
        if self._way.rewrites_answer:
            lines = [head.reason, *self._way.rewrite_answer(head.lines)]
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
        if admitted.answer_lines:
            if head.contested:
                lines = [line for line in lines if line.partition(b":")[0].lower() not in LIMIT_NAMES]
            lines.append(admitted.answer_lines)
        lines.append(client.request_id_line)
        if head.status == 101:
            self._switch(client, head, lines, payload)
            return
        bodiless = self.call.method == "HEAD" or head.status == 204 or head.status == 304
        if head.content_length >= 0:
            if head.status != 204:
                lines.append(b"Content-Length: %d" % head.content_length)
        elif not bodiless:
            if ended and self._end_down is LAST_CHUNK:
                lines.append(b"Content-Length: %d" % len(payload))
            elif self._head.version_1_1:
                self._down_chunked = True
                if head.trailer and self._head.block.takes_trailers:
                    lines += announced(head.trailer, gateway.answer_book, self._answer_names)
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
        self._released = True
        if self._down is not None:
            payload, ended = self._down.admit(payload, ended)
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

    def _switch(self, client: ClientConnection, head: AnswerHead, lines: list[bytes], ahead: bytes) -> None:
        """The upstream changed the protocol, as it was asked to: nobody here knows what is said from now on."""
        connection, self._connection = self._connection, None
        if connection is None:  # it died while something was settled
            self._lost = False
            self.failed(
                "upstream_failed", "The upstream closed the connection as it changed protocols.", False
            )
            return
        self._released = True
        self.ends_at = NEVER
        client.write(b"\r\n".join([*lines, b"Connection: Upgrade", b"Upgrade: " + head.upgrade, b"", b""]))
        self._tunnel = Tunnel(self._gateway, client, connection, self._meter, self._tunnel_over)
        self._tunnel.begin(ahead)

    def _tunnel_over(self, code: str | None) -> None:
        assert self._tunnel is not None
        self.bytes_up, self.bytes_down = self._tunnel.bytes_up, self._tunnel.bytes_down
        try:
            self._finish(self.status, code)
        except Exception:
            log.exception("finish_failed", request_id=self.call.request_id)

    @property
    def tunnel(self) -> Tunnel | None:
        return self._tunnel

    def _come_down(self, payload: bytes, ended: bool) -> None:
        """More of the answer's body."""
        if self._down is not None:
            self._down.push(payload, ended)
        else:
            self._send_down(payload, ended)

    def _send_down(self, payload: bytes, ended: bool) -> None:
        try:
            self._send_more(payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()

    def _send_more(self, payload: bytes, ended: bool) -> None:
        client = self._client
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
        if ended or self._kept is None:
            if self._connection is not None:
                self._connection.drop()
                self._connection = None
            self._finish_unanswered("client_gone")

    def _finish(self, status: int, code: str | None) -> None:
        if self._finished:
            return
        self._finished = True
        if self._meter is not None:
            self._end_limits(self._meter)
        try:
            self.admitted.finish(status, self.bytes_up, self.bytes_down)
        finally:
            self._gateway.call_ended(self, status, code)

    def _end_limits(self, meter: Meter) -> None:
        for passage in (self._up, self._down):
            if passage is not None:
                passage.stop()
        if self._credits is not None:
            try:
                meter.credits(self._credits)
            except Exception:
                log.exception("credits_failed", request_id=self.call.request_id)

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
                    and head.status != 101
                ):
                    kept = KeptAnswer(admitted, head, self._way)
                    if not kept.add(payload):
                        pass
                    elif ended:
                        await kept.keep(self.call.request_id)
                    else:
                        self._kept = kept
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
            self._release(head, payload, ended)
        except Exception:  # noqa: BLE001 - logged there
            self._break_off()
            return
        self._go_on()

    async def _keep_then_end(self, kept: KeptAnswer, payload: bytes) -> None:
        self._kept = None
        await kept.keep(self.call.request_id)
        self._settling = False
        self._come_down(payload, True)

    def _go_on(self) -> None:
        if self._lost:
            self._lost = False
            self.failed(
                "upstream_failed", "The upstream closed the connection before its answer was complete.", False
            )
        else:
            self._read_upstream()

    def _break_off(self) -> None:
        """The end could not be recorded: then it must not be sent."""
        log.exception("answer_broken_off", request_id=self.call.request_id)
        if self._connection is not None:
            self._connection.drop()
            self._connection = None
        self._finish_unanswered("internal_error")
        if self._client is not None:
            self._client.cut()
