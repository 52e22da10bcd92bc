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
from typing import TYPE_CHECKING, Final

import structlog

from farebox.app.admission import Admitted, Answer, Call, Decision, Headers, Refusal, Standing
from farebox.gateway.answers import refusal_of, unrouted, written
from farebox.gateway.client_socket import AHEAD, PACED, UPLOAD, ClientSocket
from farebox.gateway.exchange import Exchange
from farebox.gateway.heads import HEAD_END, HeaderBlock, RequestHead, check_unfinished, read_request_head
from farebox.gateway.held_bodies import HeldBody
from farebox.gateway.pools import Destination
from farebox.gateway.problems import Fault, problem, refusal
from farebox.gateway.request_body import RequestBody
from farebox.gateway.routing import Found, Way, choose
from farebox.gateway.upstream import NEVER

if TYPE_CHECKING:
    from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

READS_HEAD, DECIDES, STREAMS, READS_OFF, LINGERS, TUNNELS, CLOSED = range(7)

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BLOCK_KEPT_BYTES_MAX: Final = 1024


class ClientConnection(ClientSocket):
    """The server's side of one TCP connection."""

    __slots__ = (
        "_block", "_body", "_broken", "_collected", "_exchange", "_forgave", "_found", "_head", "_held_body", "_inbox", "_reading_on", "_scanned",
        "_state", "_to", "_way", "call", "keep_alive", "request_id", "request_id_line",
    )  # fmt: skip

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway)
        self._state = READS_HEAD
        self._inbox = b""
        self._scanned = 0  # so far no end of a head in the inbox
        self._forgave = False  # an empty line before this request
        self._reading_on = False
        self._head: RequestHead | None = None
        self._block: HeaderBlock | None = None  # the header lines of the request before
        self._body: RequestBody | None = None  # what is still to come of the request's body
        self._exchange: Exchange | None = None
        self._broken = False  # a rule was broken: what still comes cannot be told apart
        self._collected: HeldBody | None = None  # the body, while it is collected
        self._held_body: HeldBody | None = None  # it counts until the call is over
        self._way: Way | None = None
        self._to: Destination | None = None
        self._found: Found | None = None
        self.call: Call | None = None
        self.keep_alive = True
        self.request_id = ""
        self.request_id_line = b""

    # ── from the event loop ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        gateway, settings = self._gateway, self._settings
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
            if self._full and len(self._inbox) > self._settings.ahead_bytes_max:
                self._hold(AHEAD)
        elif self._body is not None and (state in (STREAMS, READS_OFF) or self._collected is not None):
            self._feed(data)
        elif state == LINGERS:
            self._linger_on(len(data))
        elif state != CLOSED:
            self._inbox += data
            if len(self._inbox) > self._settings.ahead_bytes_max:
                self._hold(AHEAD)

    def eof_received(self) -> bool:
        """The client closed, or at least says no more; the two look the same from here. Its call is given up, as nginx and
        Envoy do: an upstream should not work for a buyer who left. What it works on for a payment is settled first, and its
        answer kept (exchange.py)."""
        if self._state in (DECIDES, STREAMS):
            self.abort()
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
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.client_full()

    def resume_writing(self) -> None:
        self._full = False
        if self._body is not None and (self._state == STREAMS or self._collected is not None):
            self._await_body()
        elif self._state == READS_HEAD:
            self.deadline = self._gateway.ticker.now + self._settings.idle_timeout_s
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
            if not self._still_takes(transport):
                self.abort()
        elif self._state == READS_HEAD and not self._inbox:
            self._close()
        elif self._state in (LINGERS, READS_OFF):
            self.abort()
        else:
            self._break_request(Fault("request_timeout", "The request did not arrive in time."))

    # ── for the exchange ────────────────────────────────────────────────────────────────────────────────────────────

    def hold_upload(self) -> None:
        """The upstream takes no more of the body for now."""
        self._hold(UPLOAD)
        if not self._full:
            self.deadline = NEVER

    def release_upload(self) -> None:
        self._release(UPLOAD)
        if not self._full and self._body is not None:
            self._await_body()

    def pace_upload(self) -> None:
        """No more of the body may pass for now. A client that has sent all of it is still listened to: it may leave."""
        if self._body is not None:
            self._hold(PACED)
            if not self._full:
                self.deadline = NEVER

    def unpace_upload(self) -> None:
        self._release(PACED)
        if not self._full and self._body is not None:
            self._await_body()

    def _await_body(self) -> None:
        """More of the request's body has to come by then, unless it is us who hold it up."""
        if self._held & (UPLOAD | PACED):
            self.deadline = NEVER
            return
        self.deadline = self._gateway.ticker.now + self._settings.body_stall_timeout_s
        if self._collected is not None:
            self.deadline = min(self.deadline, self._collected.ends_at)

    def hand_over(self, protocol: asyncio.Protocol) -> tuple[asyncio.Transport, bytes]:
        """From now on ``protocol`` hears what comes; it also gets what came ahead. Told of the connection's loss it tells us."""
        transport = self._transport
        assert transport is not None
        self._state = TUNNELS
        self.keep_alive = False
        self._release(AHEAD | UPLOAD | PACED)
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

    def end_upload(self) -> None:
        """No more of the body is wanted: a little that is left is read off after the answer, else the connection closes with it."""
        body = self._body
        if body is not None and (body.left is None or self._much_is_left(body)):
            self.keep_alive = False

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
        if self._held & AHEAD and len(self._inbox) <= self._settings.ahead_bytes_max:
            self._release(AHEAD)

    def _read_head(self) -> bool:
        settings = self._settings
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
        reader = head.block.body()
        self._body = None
        self._state = DECIDES
        self.request_id = request_id = gateway.next_request_id()
        self.request_id_line = gateway.answer_lines + request_id.encode()
        if reader is not None:
            self._body = RequestBody(head, reader, self._settings.body_bytes_max)

        layout = gateway.layout
        found = layout.table.known.get(head.path)
        if found is None:
            found = layout.table.find(head.path)
        if found.ours:
            self._found = found
            self._collect(self._settings.site_body_bytes_max)
            return
        if found.only is not None:
            way, params = found.only, found.only_params
        else:
            chosen = choose(found, head.method, head.block.host, head.block.headers, head.query)
            if isinstance(chosen, frozenset):
                self._reply_refusal(unrouted(chosen))
                return
            way, params = chosen
        client = self.peer if not self.trusted else self.address(head.block.forwarded)
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
            self._body.bound(way.route.body_bytes_max)
        if gateway.door.needs_body(call):
            self._collect(self._settings.paid_body_bytes_max)
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
                    self._body.count(payload)
                except Fault as fault:
                    self._break_request(fault)
                    return
            if ended:
                if self._body.trailers:
                    exchange.trailed_up(self._body.trailers)
                self._body = None
            else:
                self._continue()
                self.deadline = gateway.ticker.now + self._settings.body_stall_timeout_s
        if self._held and len(self._inbox) <= self._settings.ahead_bytes_max:
            self._release(AHEAD)
        exchange.begin(payload, ended)

    # ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _collect(self, bytes_max: int) -> None:
        """Hold the whole body before going on: the door binds it, or one of our pages reads it."""
        gateway, body, head = self._gateway, self._body, self._head
        assert head is not None
        if self.call is None:
            address = self.address(head.block.forwarded)
        else:
            address = self.call.client_address
            if body is not None:
                bytes_max = min(bytes_max, body.bytes_max)
        ends_at = gateway.ticker.now + self._settings.paid_body_timeout_s
        self._collected = self._held_body = HeldBody(gateway.held_bodies, address, bytes_max, ends_at)
        if body is None:
            self._collected_all()
            return
        if body.left is not None:
            self._collected.expect(body.left)
        self._await_body()
        if self._inbox:
            data, self._inbox = self._inbox, b""
            self._feed(data)
        if self._state == DECIDES:
            self._continue()

    def _continue(self) -> None:
        if self._body is not None and self._body.awaited:
            self._body.awaited = False
            self.write(_CONTINUE)

    def _feed(self, data: bytes) -> None:
        """More of the body of the request at hand."""
        body = self._body
        assert body is not None
        exchange, collected = self._exchange, self._collected
        try:
            payload, ended, rest = body.feed(data)
            if exchange is not None:
                body.count(payload)
            elif collected is not None:
                collected.add(payload)
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
        if exchange is not None:
            if ended and body.trailers:
                exchange.trailed_up(body.trailers)
            if payload or ended:
                exchange.more(payload, ended)
        elif collected is not None:
            if ended:
                self._collected_all()
        elif self._state == READS_OFF:
            self._taken_off += len(payload)
            if ended:
                self._next()
            elif self._taken_off > self._settings.unread_body_bytes_max:
                self._leave()

    def _collected_all(self) -> None:
        assert self._collected is not None
        body, self._collected = self._collected.take(), None
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
        try:
            answer = await gateway.site.answer(
                head.method,
                found.path,
                head.query.decode("ascii"),
                head.block.headers,
                body,
                self.address(head.block.forwarded),
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
        if unread is not None and (unread.awaited or self._much_is_left(unread)):
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

    def _much_is_left(self, unread: RequestBody) -> bool:
        """More than we read off to be able to use the connection again."""
        left = unread.left
        return left is not None and left - len(self._inbox) > self._settings.unread_body_bytes_max

    def _read_off(self) -> None:
        """Take what is left of a refused request's body off the connection, to use it again."""
        self._state = READS_OFF
        self._taken_off = 0
        self._release(AHEAD | UPLOAD | PACED)
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
        settings = self._settings
        if not self._full:
            wait_s = settings.linger_s if self._gateway.draining else settings.idle_timeout_s
            self.deadline = self._gateway.ticker.now + wait_s
        if self._held:
            self._release(UPLOAD | PACED)
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
        self._linger(transport)

    def _close(self) -> None:
        """Close once everything written has gone out."""
        if self._transport is not None:
            self._state = CLOSED
            self._close_written(self._transport)

    def leave_when_idle(self) -> None:
        """The gateway drains: an idle connection gets a moment for a request that is on its way, then it is closed."""
        if self._state == READS_HEAD and not self._inbox:
            self.deadline = min(self.deadline, self._gateway.ticker.now + self._settings.linger_s)
        elif self._state in (LINGERS, READS_OFF):
            self.abort()
