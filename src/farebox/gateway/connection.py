"""One client's connection: reads requests one after the other, asks the door, and writes the answers in order.

    READS_HEAD ──a good head──▶ DECIDES ──admitted──▶ STREAMS ──answer ended──▶ READS_HEAD
        │                          │                   └──101──▶ TUNNELS (tunnel.py has both connections) ──▶ CLOSED
        │                          └──refused, answered──▶ READS_OFF (what is left of the body) ──▶ READS_HEAD
        └──a bad head──▶ LINGERS (the answer must be seen) ──▶ CLOSED

What arrives ahead of its turn stays raw in ``_inbox``; beyond ``ahead_bytes_max`` the socket is not read on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final, cast

import structlog

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal, Standing
from farebox.gateway.answers import refusal_of, too_large, unrouted, written
from farebox.gateway.bodies import Body, LengthBody
from farebox.gateway.exchange import Exchange
from farebox.gateway.forwarding import lines_for_stranger
from farebox.gateway.heads import HEAD_END, HeaderBlock, RequestHead, check_unfinished, read_request_head
from farebox.gateway.held_bodies import HeldBody
from farebox.gateway.pools import Destination
from farebox.gateway.problems import Fault, problem, refusal
from farebox.gateway.routing import Found, Way, choose
from farebox.gateway.upstream import NEVER

if TYPE_CHECKING:
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

#: Why the socket is not read for now.
_AHEAD, _UPLOAD, _PACED = 1, 2, 4

READS_HEAD, DECIDES, STREAMS, READS_OFF, LINGERS, TUNNELS, CLOSED = range(7)

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BLOCK_KEPT_BYTES_MAX: Final = 1024
_LINGER_BYTES_MAX: Final = 1024 * 1024


class ClientConnection(asyncio.Protocol):
    """The server's side of one TCP connection."""

    __slots__ = (
        "_block", "_body", "_body_bytes", "_body_bytes_max", "_broken", "_collected", "_exchange", "_expects_continue", "_forgave", "_found",
        "_full", "_gateway", "_head", "_held", "_held_body", "_inbox", "_reading_on", "_scanned", "_state", "_taken_off", "_to", "_transport",
        "_unflushed", "_way", "call", "deadline", "forwarded_lines", "keep_alive", "peer", "request_id", "request_id_line", "trusted",
    )  # fmt: skip

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._transport: asyncio.Transport | None = None
        self._state = READS_HEAD
        self._inbox = b""
        self._scanned = 0  # so far no end of a head in the inbox
        self._forgave = False  # an empty line before this request
        self._reading_on = False
        self._held = 0  # _AHEAD | _UPLOAD | _PACED
        self._head: RequestHead | None = None
        self._block: HeaderBlock | None = None  # the header lines of the request before
        self._body: Body | None = None  # what is still to come of the request's body
        self._exchange: Exchange | None = None
        self._broken = False  # a rule was broken: what still comes cannot be told apart
        self._expects_continue = False
        self._collected: HeldBody | None = None  # the body, while it is collected
        self._held_body: HeldBody | None = None  # it counts until the call is over
        self._body_bytes = 0  # of a body that streams
        self._body_bytes_max = 0
        self._taken_off = 0
        self._full = False  # the client does not keep up with its answer
        self._unflushed = 0  # what it had not taken when we last looked
        self._way: Way | None = None
        self._to: Destination | None = None
        self._found: Found | None = None
        self.call: Call | None = None
        self.deadline = NEVER
        self.keep_alive = True
        self.request_id = ""
        self.request_id_line = b""

    # ── from the event loop ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gateway = self._gateway
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(gateway.settings.write_buffer_bytes)
        name = transport.get_extra_info("peername")
        self.peer = name[0].removeprefix("::ffff:") if isinstance(name, tuple) and name else ""
        self.trusted = self.peer in gateway.trusted_proxies
        self.forwarded_lines = lines_for_stranger(self.peer)
        settings = gateway.settings
        self.deadline = gateway.ticker.now + (
            settings.linger_s if gateway.draining else settings.head_timeout_s
        )
        if not gateway.connection_opened(self):
            self._refuse_fault(Fault("unavailable", "This gateway has as many connections as it may have."))

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == READS_HEAD:
            self._inbox = self._inbox + data if self._inbox else data
            self._read_on()
            if self._full and len(self._inbox) > self._gateway.settings.ahead_bytes_max:
                self._hold(_AHEAD)
        elif self._body is not None and (state in (STREAMS, READS_OFF) or self._collected is not None):
            self._feed(data)
        elif state == LINGERS:
            self._taken_off += len(data)
            if self._taken_off > _LINGER_BYTES_MAX:
                self._abort()
        elif state != CLOSED:
            self._inbox += data
            if len(self._inbox) > self._gateway.settings.ahead_bytes_max:
                self._hold(_AHEAD)

    def eof_received(self) -> bool:
        """The client closed, or at least says no more; the two look the same from here. Its call is given up, as nginx and
        Envoy do: an upstream should not work for a buyer who left. What it works on for a payment is settled first, and its
        answer kept (exchange.py)."""
        if self._state in (DECIDES, STREAMS):
            self._abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._state = CLOSED
        self.deadline = NEVER
        self._gateway.connection_closed(self)
        if self._collected is not None:
            self._collected = None
            self._give_back_body()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_lost()

    def pause_writing(self) -> None:
        transport = self._transport
        if transport is None:
            return
        self._full = True
        self._unflushed = transport.get_write_buffer_size()
        self.deadline = self._gateway.ticker.now + self._gateway.settings.write_stall_timeout_s
        if self._exchange is not None:
            self._exchange.client_full()

    def resume_writing(self) -> None:
        self._full = False
        now, settings = self._gateway.ticker.now, self._gateway.settings
        if self._body is not None and (self._state == STREAMS or self._collected is not None):
            self._await_body()
        elif self._state == READS_HEAD:
            self.deadline = now + settings.idle_timeout_s
        elif self._state in (DECIDES, STREAMS):
            self.deadline = NEVER
        if self._exchange is not None:
            self._exchange.client_drained()
        elif self._state == READS_HEAD:
            self._read_on()

    def expire(self) -> None:
        """The deadline passed."""
        transport = self._transport
        if transport is None:
            self.deadline = NEVER
        elif self._state == TUNNELS:
            assert self._exchange is not None
            assert self._exchange.tunnel is not None
            self._exchange.tunnel.expire()
        elif self._full:
            left = transport.get_write_buffer_size()
            if left < self._unflushed:
                self._unflushed = left
                self.deadline = self._gateway.ticker.now + self._gateway.settings.write_stall_timeout_s
            else:
                self._abort()
        elif self._state == READS_HEAD and not self._inbox:
            self._close()
        elif self._state in (LINGERS, READS_OFF):
            self._abort()
        else:
            self._break_request(Fault("request_timeout", "The request did not arrive in time."))

    # ── for the exchange ────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def hold_upload(self) -> None:
        """The upstream takes no more of the body for now."""
        self._hold(_UPLOAD)
        if not self._full:
            self.deadline = NEVER

    def release_upload(self) -> None:
        self._release(_UPLOAD)
        if not self._full and self._body is not None:
            self._await_body()

    def pace_upload(self) -> None:
        """No more of the body may pass for now. A client that has sent all of it is still listened to: it may leave."""
        if self._body is not None:
            self._hold(_PACED)
            if not self._full:
                self.deadline = NEVER

    def unpace_upload(self) -> None:
        self._release(_PACED)
        if not self._full and self._body is not None:
            self._await_body()

    def _await_body(self) -> None:
        """More of the request's body has to come by then, unless it is us who hold it up."""
        if self._held & (_UPLOAD | _PACED):
            self.deadline = NEVER
            return
        self.deadline = self._gateway.ticker.now + self._gateway.settings.body_stall_timeout_s
        if self._collected is not None:
            self.deadline = min(self.deadline, self._collected.ends_at)

    @property
    def full(self) -> bool:
        """The client does not keep up with what is written."""
        return self._full

    def hand_over(self, protocol: asyncio.Protocol) -> tuple[asyncio.Transport, bytes]:
        """From now on ``protocol`` hears what comes; it also gets what came ahead. Told of the connection's loss it tells us."""
        transport = self._transport
        assert transport is not None
        self._state = TUNNELS
        self.keep_alive = False
        self._release(_AHEAD | _UPLOAD | _PACED)
        ahead, self._inbox = self._inbox, b""
        transport.set_protocol(protocol)
        return transport, ahead

    def exchange_ended(self) -> None:
        """The whole answer is written."""
        self._exchange = None
        self.call = None
        if self._body is not None or not self.keep_alive:
            self._leave()
        else:
            self._next()

    def refuse(self, refused: Refusal, exchange: Exchange) -> None:
        """The exchange ended without an answer of the upstream: say why."""
        if self._exchange is exchange:
            self._exchange = None
            self._reply_refusal(refused, told=True)

    def cut(self) -> None:
        """The answer broke off: close without an end, so that the client cannot take it for whole."""
        self._exchange = None
        self._close()

    # ── for the gateway ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def standing(self) -> Standing | None:
        """What the running call stands on."""
        return self._exchange.admitted.standing if self._exchange is not None else None

    @property
    def stands_until_s(self) -> float:
        """By the business date; never over when no call runs."""
        exchange = self._exchange
        if exchange is None or exchange.admitted.standing is None:
            return math.inf
        return exchange.admitted.standing.expires_s

    def cut_call(self, code: str, detail: str) -> None:
        """End the running call from our side."""
        if self._exchange is not None:
            self._exchange.cut(code, detail)

    # ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_on(self) -> None:
        """Read heads for as long as each is answered at once (a loop: clients may pipeline thousands)."""
        if self._reading_on:
            return
        self._reading_on = True
        try:
            while self._inbox and self._state == READS_HEAD and not self._full and self._read_head():
                pass
        finally:
            self._reading_on = False
        if self._held & _AHEAD and len(self._inbox) <= self._gateway.settings.ahead_bytes_max:
            self._release(_AHEAD)

    def _read_head(self) -> bool:
        settings = self._gateway.settings
        data = self._inbox
        try:
            if not self._forgave and data.startswith(b"\r\n"):
                self._forgave = True  # one empty line before a request (RFC 9112 §2.2)
                self._inbox = data[2:]
                return True
            end = data.find(HEAD_END, self._scanned)
            if end < 0 or end > settings.head_bytes_max:
                check_unfinished(
                    data if end < 0 else data[: end + 2],
                    settings.request_line_bytes_max,
                    settings.head_bytes_max,
                )
                if self._scanned == 0:
                    self.deadline = self._gateway.ticker.now + settings.head_timeout_s
                self._scanned = max(1, len(data) - 3)
                return False
            head = read_request_head(
                data[:end],
                self._gateway.request_book,
                settings.request_line_bytes_max,
                settings.header_count_max,
                self._block,
            )
        except Fault as fault:
            self._refuse_fault(fault)
            return False
        self._scanned = 0
        self._forgave = False
        self._inbox = data[end + 4 :]
        self.deadline = NEVER
        try:
            self._begin(head)
        except Fault as fault:
            self._refuse_fault(fault)
        except Exception as exc:  # noqa: BLE001 - one call's fault is not the connection's
            self._reply_exception(exc)
        return True

    def _begin(self, head: RequestHead) -> None:
        """A good head: find its route and ask the door, all at once when nothing has to be waited for."""
        gateway = self._gateway
        self._head = head
        self._block = head.block if len(head.block.raw) <= _BLOCK_KEPT_BYTES_MAX else None
        self.keep_alive = head.keep_alive
        self._body = head.block.body()
        self._state = DECIDES
        self._expects_continue = head.block.expects_continue and head.version_1_1 and self._body is not None
        self.request_id = request_id = gateway.next_request_id()
        self.request_id_line = gateway.answer_lines + request_id.encode()
        if self._body is not None:
            self._bound_body(head, None)

        layout = gateway.layout
        found = layout.table.known.get(head.path)
        if found is None:
            found = layout.table.find(head.path)
        if found.ours:
            self._found = found
            self._collect(gateway.settings.site_body_bytes_max)
            return
        if found.only is not None:
            way, params = found.only, found.only_params
        else:
            chosen = choose(found, head.method, head.block.host, head.block.headers, head.query)
            if isinstance(chosen, frozenset):
                self._reply_refusal(unrouted(chosen))
                return
            way, params = chosen
        client = (
            self.peer
            if not self.trusted
            else gateway.trusted_proxies.client_of(self.peer, head.block.forwarded)
        )
        self._way = way
        self._to = layout.destinations[way.route.upstream]
        self._found = None
        self.call = call = Call(
            request_id,
            head.method,
            head.block.host,
            found.path,
            head.query.decode("ascii"),
            head.block.headers,
            client,
            way.route,
            params,
        )
        if way.route.body_bytes_max is not None and self._body is not None:
            self._bound_body(head, way.route.body_bytes_max)
        if gateway.door.needs_body(call):
            self._collect(gateway.settings.paid_body_bytes_max)
        else:
            self._ask(call)

    def _ask(self, call: Call) -> None:
        decision = self._gateway.door.admit(call)
        if isinstance(decision, Admitted):
            self._open(decision)
        elif isinstance(decision, (Refusal, Answer)):
            self._act(decision)
        else:
            self._gateway.spawn(self._wait_for(decision))

    async def _wait_for(self, decision: Awaitable[Decision]) -> None:
        try:
            decided = await decision
        except Exception as exc:  # noqa: BLE001 - one call's fault is not the connection's
            self._reply_exception(exc)
            return
        if self._state != DECIDES:
            self._give_back_body()
            if isinstance(decided, Admitted):
                decided.finish(0, 0, 0)  # admitted, but nobody is left to serve
            return
        try:
            self._act(decided)
        except Exception as exc:  # noqa: BLE001 - one call's fault is not the connection's
            self._reply_exception(exc)

    def _act(self, decision: Decision) -> None:
        if isinstance(decision, Admitted):
            self._open(decision)
        elif isinstance(decision, Refusal):
            self._reply_refusal(decision)
        else:
            self._reply(decision.status, decision.headers, decision.body)

    def _open(self, admitted: Admitted) -> None:
        """Send the call on its way."""
        gateway, head, call, way, to = self._gateway, self._head, self.call, self._way, self._to
        assert head is not None
        assert call is not None
        assert way is not None
        assert to is not None
        exchange = Exchange(gateway, self, head, call, way, to, admitted)
        self._exchange = exchange
        self._state = STREAMS
        if self._held_body is not None:
            exchange.held_body, self._held_body = self._held_body, None
        payload, ended = b"", True
        if call.body is not None:
            payload = call.body
        elif self._body is not None:
            ended = False
            if self._inbox:
                data, self._inbox = self._inbox, b""
                try:
                    payload, ended, self._inbox = self._body.feed(data)
                    self._count_body(payload)
                except Fault as fault:
                    self._break_request(fault)
                    return
            if ended:
                if self._body.trailers:
                    exchange.trailed_up(self._body.trailers)
                self._body = None
            else:
                self._continue()
                self.deadline = gateway.ticker.now + gateway.settings.body_stall_timeout_s
        if self._held and len(self._inbox) <= gateway.settings.ahead_bytes_max:
            self._release(_AHEAD)
        exchange.begin(payload, ended)

    # ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _bound_body(self, head: RequestHead, route_bytes_max: int | None) -> None:
        """How large the body may be: here, and on its route when that says less."""
        if head.block.upgrade and head.version_1_1:
            raise Fault("upgrade_unsupported", "A request that asks for an upgrade must not have a body.")
        bytes_max = self._gateway.settings.body_bytes_max
        if route_bytes_max is not None:
            bytes_max = min(bytes_max, route_bytes_max)
        self._body_bytes, self._body_bytes_max = 0, bytes_max
        if head.block.content_length > bytes_max:
            raise too_large(bytes_max)

    def _count_body(self, payload: bytes) -> None:
        self._body_bytes += len(payload)
        if self._body_bytes > self._body_bytes_max:
            raise too_large(self._body_bytes_max)

    def _collect(self, bytes_max: int) -> None:
        """Hold the whole body before going on: the door binds it, or one of our pages reads it."""
        gateway, body = self._gateway, self._body
        call, head = self.call, self._head
        assert head is not None
        if call is not None:
            address = call.client_address
            if body is not None:
                bytes_max = min(bytes_max, self._body_bytes_max)
        else:
            address = (
                self.peer
                if not self.trusted
                else gateway.trusted_proxies.client_of(self.peer, head.block.forwarded)
            )
        ends_at = gateway.ticker.now + gateway.settings.paid_body_timeout_s
        self._collected = self._held_body = HeldBody(gateway.held_bodies, address, bytes_max, ends_at)
        if body is None:
            self._collected_all()
            return
        if isinstance(body, LengthBody):
            self._collected.expect(body.left)
        self._await_body()
        if self._inbox:
            data, self._inbox = self._inbox, b""
            self._feed(data)
        if self._body is not None and self._state == DECIDES:
            self._continue()

    def _continue(self) -> None:
        if self._expects_continue:
            self._expects_continue = False
            self.write(_CONTINUE)

    def _feed(self, data: bytes) -> None:
        """More of the body of the request at hand."""
        body = self._body
        assert body is not None
        gateway = self._gateway
        try:
            payload, ended, rest = body.feed(data)
        except Fault as fault:
            self._break_request(fault)
            return
        if ended:
            self._body = None
            self._inbox = rest
        if not self._full:
            if ended:
                self.deadline = NEVER
            else:
                self._await_body()
        exchange = self._exchange
        if exchange is not None:
            try:
                self._count_body(payload)
            except Fault as fault:
                self._break_request(fault)
                return
            if ended and body.trailers:
                exchange.trailed_up(body.trailers)
            if payload or ended:
                exchange.more(payload, ended)
        elif self._state == READS_OFF:
            self._taken_off += len(payload)
            if ended:
                self._next()
            elif self._taken_off > gateway.settings.unread_body_bytes_max:
                self._leave()
        elif self._collected is not None:
            try:
                self._collected.add(payload)
            except Fault as fault:
                self._break_request(fault)
                return
            if ended:
                self._collected_all()

    def _collected_all(self) -> None:
        assert self._collected is not None
        body, self._collected = self._collected.take(), None
        self._expects_continue = False
        try:
            if self._found is not None:
                self._gateway.spawn(self._show(self._found, body))
            elif self.call is not None:
                self.call.body = body
                self._ask(self.call)
        except Exception as exc:  # noqa: BLE001 - one call's fault is not the connection's
            self._reply_exception(exc)

    def _give_back_body(self) -> None:
        """The body is held no longer."""
        if self._held_body is not None:
            self._held_body.give_back()
            self._held_body = None

    async def _show(self, found: Found, body: bytes) -> None:
        """One of our own pages."""
        head, gateway = self._head, self._gateway
        assert head is not None
        assert gateway.site is not None
        client = (
            self.peer
            if not self.trusted
            else gateway.trusted_proxies.client_of(self.peer, head.block.forwarded)
        )
        try:
            answer = await gateway.site.answer(
                head.method, found.path, head.query.decode("ascii"), head.block.headers, body, client
            )
        except Exception as exc:  # noqa: BLE001 - one call's fault is not the connection's
            self._reply_exception(exc)
            return
        self._act(answer)

    def _break_request(self, fault: Fault) -> None:
        """The request at hand went wrong on its way in."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            answered = exchange.released
            exchange.client_lost()
            if answered:
                self._close()
                return
        self._refuse_fault(fault)

    # ── answers of our own ──────────────────────────────────────────────────────────────────────────────────────────

    def _refuse_fault(self, fault: Fault) -> None:
        """A request that broke a rule: its end cannot be trusted, so the connection closes."""
        self.keep_alive = False
        if not self.request_id:
            self.request_id = self._gateway.next_request_id()
            self.request_id_line = self._gateway.answer_lines + self.request_id.encode()
        self._body = None
        self._broken = True
        self._reply_refusal(refusal(fault.code, fault.detail, fault.retry_after_s))

    def _reply_exception(self, exc: Exception) -> None:
        """Something was raised where a decision was expected."""
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.client_lost()
        self._reply_refusal(refusal_of(exc, self.request_id))

    def _reply_refusal(self, refused: Refusal, told: bool = False) -> None:
        """``told``: the call was admitted, and its end was reported with its fare."""
        status, headers, body = problem(refused, self.request_id)
        if not told:
            self._gateway.refused(self, refused, status)
        self._reply(status, headers, body)

    def _reply(self, status: int, headers: Headers, body: bytes) -> None:
        self._collected = None
        if self._held_body is not None:
            self._give_back_body()
        if self._transport is None or self._state in (CLOSED, LINGERS):
            return
        unread = self._body
        if unread is not None and (
            self._expects_continue
            or (
                isinstance(unread, LengthBody)
                and unread.left - len(self._inbox) > self._gateway.settings.unread_body_bytes_max
            )
        ):
            self.keep_alive = False
        if self._gateway.draining:
            self.keep_alive = False
        self._transport.write(
            written(
                status,
                headers,
                body,
                to=self._head,
                date=self._gateway.date,
                request_id_line=self.request_id_line,
                keep_alive=self.keep_alive,
            )
        )
        self.call = None
        if not self.keep_alive:
            self._leave()
        elif unread is None:
            self._next()
        else:
            self._read_off()

    def _read_off(self) -> None:
        """Take what is left of a refused request's body off the connection, to use it again."""
        self._state = READS_OFF
        self._taken_off = 0
        self._release(_AHEAD | _UPLOAD | _PACED)
        self._await_body()
        if self._inbox:
            data, self._inbox = self._inbox, b""
            self._feed(data)

    # ── the connection itself ───────────────────────────────────────────────────────────────────────────────────────

    def _next(self) -> None:
        """Ready for another request on this connection."""
        if self._state == CLOSED:
            return
        self._state = READS_HEAD
        self._head = None
        self.request_id = ""
        self._scanned = 0
        settings = self._gateway.settings
        if not self._full:
            wait_s = settings.linger_s if self._gateway.draining else settings.idle_timeout_s
            self.deadline = self._gateway.ticker.now + wait_s
        if self._held:
            self._release(_UPLOAD | _PACED)
        if self._inbox:
            self._read_on()

    def _leave(self) -> None:
        """Close in a way that lets the client read what was written, even while it is still sending."""
        transport = self._transport
        if transport is None or self._state in (CLOSED, LINGERS):
            return
        if self._body is None and not self._inbox and not self._broken:
            self._close()
            return
        self._state = LINGERS
        self._inbox = b""
        self._taken_off = 0
        self.deadline = self._gateway.ticker.now + self._gateway.settings.linger_s
        self._release(_AHEAD | _UPLOAD | _PACED)
        if transport.can_write_eof():
            transport.write_eof()

    def _close(self) -> None:
        """Close once everything written has gone out."""
        if self._transport is not None:
            self._state = CLOSED
            self.deadline = self._gateway.ticker.now + self._gateway.settings.write_stall_timeout_s
            self._unflushed, self._full = self._transport.get_write_buffer_size(), True
            self._transport.close()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def leave_when_idle(self) -> None:
        """The gateway drains: an idle connection gets a moment for a request that is on its way, then it is closed."""
        if self._state == READS_HEAD and not self._inbox:
            self.deadline = min(self.deadline, self._gateway.ticker.now + self._gateway.settings.linger_s)
        elif self._state in (LINGERS, READS_OFF):
            self._abort()

    def abort(self) -> None:
        """The gateway stops now."""
        self._abort()

    def _hold(self, why: int) -> None:
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._held |= why

    def _release(self, why: int) -> None:
        if not self._held:
            return
        self._held &= ~why
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
