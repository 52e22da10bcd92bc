"""Forward-auth: an edge that proxies by itself asks here whether a call may pass (DESIGN §8, docs/edges.md).

    /.farebox/authorize              the original call is told by X-Forwarded-Method, -Uri, -Host and -For, once each
    /.farebox/authorize?edge=nginx   the same; auth_request knows 401 and 403 only, so every no is one of these two
    /.farebox/authorize/envoy/…      Envoy's ext_authz: the original method, host, path and headers; X-Real-IP is the client

Whoever asks proves itself first: ``Farebox-Edge-Secret``, or ``Authorization: Bearer fbx_sk_…`` of scope ``gateway`` as the
first Authorization (a later one is the call's own). Without that proof the answer is a bare 403.

The original call is read by the gateway's own rules and matched by its own routes, then asked of the same door. A yes is
a 200 whose headers the edge copies: who calls, what the route sets, which foreign credential goes on, the RateLimit. The
call is billed with that yes: what the edge makes of it is not heard here any more. A no is the gateway's own refusal.

What cannot be kept from here (a payment, a limit of bytes, credits or concurrency, a charge by the upstream's status,
a route that is not ``forward_auth``, our own pages) is refused as ``hand_over``: the edge gives the whole call to the
gateway's public port, which serves it. Nothing is counted here then.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Final, Protocol, cast

import structlog

from farebox.app.admission import Admitted, Call, Decision, Door, Refusal
from farebox.app.credentials import Kind, credential, is_admin_key, is_ours
from farebox.base.errors import InvariantError, Unavailable
from farebox.domain.access import Route
from farebox.gateway.answers import refusal_of, unrouted, written
from farebox.gateway.fields import request_fields
from farebox.gateway.forwarding import TrustedProxies
from farebox.gateway.heads import HEAD_END, HeaderBlock, RequestHead, check_unfinished, read_request_head
from farebox.gateway.problems import Fault, problem, refusal
from farebox.gateway.routing import choose
from farebox.gateway.server import Gateway

log = structlog.get_logger(__name__)

_PATH: Final = b"/.farebox/authorize"
_NGINX: Final = b"edge=nginx"
_ENVOY: Final = b"/.farebox/authorize/envoy"

_SECRET: Final = b"farebox-edge-secret"
_METHOD: Final = b"x-forwarded-method"
_URI: Final = b"x-forwarded-uri"
_HOST: Final = b"x-forwarded-host"
_FOR: Final = b"x-forwarded-for"
_ADDRESS: Final = b"x-real-ip"
_TOLD: Final = frozenset({_SECRET, _METHOD, _URI, _HOST, _FOR, _ADDRESS})
_CREDENTIALS: Final = {b"authorization": b"Authorization", b"x-api-key": b"X-API-Key"}

#: What an edge adds to a client's head: our five headers (the target among them) and a few of its own.
_EDGE_HEADERS_MAX: Final = 20
_EDGE_HEAD_BYTES_MAX: Final = 4096
_ADDRESSES_KEPT_MAX: Final = 4096
_ADDRESS_KEPT_BYTES_MAX: Final = 64
_LOOK_EVERY_S: Final = 0.5
#: A wrong secret is logged at most this often: an edge that is configured wrongly asks thousands of times a second.
_WARN_EVERY_S: Final = 60.0

_BARE_403: Final = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_BARE_400: Final = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_BARE_503: Final = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_REQUEST_ID: Final = b"Farebox-Request-Id"


class Keys(Protocol):
    """Which API keys may ask (app/edge_keys.py), by SHA-256."""

    def fresh(self, digest: bytes) -> bool: ...

    async def find(self, digest: bytes) -> bool: ...


class Authorizer:
    """The forward-auth listener of one gateway process. ``gateway`` lends its routes, door, counters and clock.

    ``first_door`` is asked for an edge that hands refused calls to the gateway: the same door, but it spends no budget of
    an address, for the gateway is asked the same once more.
    """

    def __init__(self, gateway: Gateway, secret: str, keys: Keys, first_door: Door) -> None:
        settings = gateway.settings
        self.gateway = gateway
        self.secret = secret.encode("ascii")
        self.keys = keys
        self.first_door = first_door
        self.book = request_fields()  # not the gateway's: its lines are others
        self.header_count_max = settings.header_count_max + _EDGE_HEADERS_MAX
        self.request_line_bytes_max = settings.request_line_bytes_max + len(_ENVOY)
        self.head_bytes_max = settings.head_bytes_max + settings.request_line_bytes_max + _EDGE_HEAD_BYTES_MAX
        self.draining = False
        self.connections: set[EdgeConnection] = set()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._addresses: dict[bytes, str] = {}
        self._addresses_by: TrustedProxies | None = None
        self._warned_at = -_WARN_EVERY_S

    async def serve(self, sock: socket.socket) -> None:
        """Begin to accept on a listening socket, and return. May be called for several sockets."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._look()
        self._servers.append(await loop.create_server(lambda: EdgeConnection(self), sock=sock, backlog=4096))

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Answer what was asked, at most for ``timeout_s``; then close everything."""
        self.draining = True
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self.connections):
            connection.leave_when_idle()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while self.connections and loop.time() < end:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.1, end - loop.time()))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def proven(self, said: bytes) -> bool:
        """Whether this is the edge's secret; takes the same time for every wrong one of its length."""
        if hmac.compare_digest(said, self.secret):
            return True
        self.unproven("another Farebox-Edge-Secret than FAREBOX_EDGE_SECRET")
        return False

    def unproven(self, what: str) -> None:
        """Somebody asked without proof: said in the log now and then."""
        self.gateway.counters.refusal("edge_unproven")
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            log.warning("edge_unproven", what=what)

    def client_of(self, chain: bytes) -> str:
        """The client's address from X-Forwarded-For: the nearest that is not a trusted proxy. ``Fault`` if there is none."""
        trusted = self.gateway.trusted_proxies
        if self._addresses_by is not trusted:
            self._addresses_by = trusted
            self._addresses.clear()
        known = self._addresses.get(chain)
        if known is None:
            known = trusted.client_of("", ((_FOR, chain),))
            if not known:
                raise Fault("request_malformed", "X-Forwarded-For does not end in the client's address.")
            if len(chain) <= _ADDRESS_KEPT_BYTES_MAX:
                if len(self._addresses) >= _ADDRESSES_KEPT_MAX:
                    self._addresses.clear()
                self._addresses[chain] = known
        return known

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LOOK_EVERY_S, self._look)
        now = loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.abort()


class EdgeConnection(asyncio.Protocol):
    """One connection of an edge: one question after the other, each answered before the next is read."""

    __slots__ = (
        "_authorizer", "_block", "_call_block", "_envoy", "_gateway", "_head", "_inbox", "_loop", "_nginx", "_request_id", "_scanned",
        "_started", "_transport", "_waits", "deadline",
    )  # fmt: skip

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer
        self._gateway = authorizer.gateway
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inbox = b""
        self._scanned = 0
        self._block: HeaderBlock | None = None  # header lines of the question before
        self._call_block: HeaderBlock | None = None  # of the call before: its Host
        self._head: RequestHead | None = None  # the question at hand
        self._waits = False  # for a decision
        self._nginx = False
        self._envoy = False
        self._request_id = ""
        self._started = 0.0
        self.deadline = self._loop.time() + self._gateway.settings.head_timeout_s

    # ── from the event loop ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connections = self._authorizer.connections
        connections.add(self)
        if len(connections) > self._gateway.settings.connections_max:
            self._end(_BARE_503)

    def data_received(self, data: bytes) -> None:
        self._inbox = self._inbox + data if self._inbox else data
        while self._inbox and not self._waits and self._transport is not None:
            if not self._read():
                return
        if self._waits and len(self._inbox) > self._authorizer.head_bytes_max and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._authorizer.connections.discard(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def leave_when_idle(self) -> None:
        """The gateway drains. What is asked is answered; an idle connection may close."""
        if not self._waits and not self._inbox and self._transport is not None:
            self._transport.close()

    # ── the question ────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> bool:
        """Read one question, if it is there. False: nothing more to do for now."""
        authorizer, data = self._authorizer, self._inbox
        end = data.find(HEAD_END, self._scanned)
        try:
            if end < 0 or end > authorizer.head_bytes_max:
                check_unfinished(
                    data if end < 0 else data[: end + 2],
                    authorizer.request_line_bytes_max,
                    authorizer.head_bytes_max,
                )
                if self._scanned == 0:
                    self.deadline = self._loop.time() + self._gateway.settings.head_timeout_s
                self._scanned = max(1, len(data) - 3)
                return False
            head = read_request_head(
                data[:end],
                authorizer.book,
                authorizer.request_line_bytes_max,
                authorizer.header_count_max,
                self._block,
            )
        except Fault:
            self._end(_BARE_400)
            return False
        self._inbox = data[end + 4 :]
        self._scanned = 0
        self._head, self._block = head, head.block
        self._started = time.perf_counter()
        self.deadline = self._loop.time() + self._gateway.settings.idle_timeout_s
        try:
            self._prove(head)
        except Fault as fault:
            self._refuse(refusal(fault.code, fault.detail, fault.retry_after_s))
        except Exception as exc:  # noqa: BLE001 - one question's fault is not the connection's
            self._refuse(refusal_of(exc, self._request_id))
        return True

    def _prove(self, head: RequestHead) -> None:
        """Who asks? Nothing is read of the question before that is known."""
        said: dict[bytes, bytes] = {}
        doubled: set[bytes] = set()
        for name, value in head.block.headers:
            if name in _TOLD:
                if name in said:
                    doubled.add(name)
                said[name] = value
        secret = said.get(_SECRET)
        if secret is not None:
            if _SECRET in doubled or not self._authorizer.proven(secret):
                self._end(_BARE_403)
            else:
                self._take(head, head.block.headers, said, doubled)
            return
        key = _key_of(head.block.headers)
        if key is None:
            self._authorizer.unproven("neither Farebox-Edge-Secret nor a key")
            self._end(_BARE_403)
            return
        digest = hashlib.sha256(key).digest()
        if self._authorizer.keys.fresh(digest):
            self._take(head, _without_key(head.block.headers), said, doubled)
        else:
            self._wait(self._find_key(digest, head, said, doubled))

    async def _find_key(
        self, digest: bytes, head: RequestHead, said: dict[bytes, bytes], doubled: set[bytes]
    ) -> None:
        try:
            good = await self._authorizer.keys.find(digest)
        except Unavailable:
            self._end(_BARE_503)
            return
        if good:
            self._waits = False
            self._take(head, _without_key(head.block.headers), said, doubled)
        else:
            self._authorizer.unproven("a key that is not known or lacks the scope gateway")
            self._end(_BARE_403)

    def _take(
        self,
        head: RequestHead,
        headers: list[tuple[bytes, bytes]],
        said: dict[bytes, bytes],
        doubled: set[bytes],
    ) -> None:
        """The original call, read as strictly as if it had come to the gateway itself."""
        gateway, authorizer = self._gateway, self._authorizer
        self._request_id = gateway.next_request_id()
        self._nginx = self._envoy = False
        if head.block.content_length > 0 or head.block.chunked:
            self._inbox = b""
            head.keep_alive = False
            raise Fault("request_malformed", "A question has no body: leave the call's own body at the edge.")
        if head.path == _PATH:
            if head.query == _NGINX:
                self._nginx = True
            elif head.query:
                raise Fault("request_malformed", "The only query taken here is edge=nginx.")
            method, uri = _once(_METHOD, said, doubled), _once(_URI, said, doubled)
            host, chain = _once(_HOST, said, doubled), _once(_FOR, said, doubled)
        elif head.path.startswith(_ENVOY + b"/"):
            self._envoy = True
            method, uri = head.method.encode(), head.target[len(_ENVOY) :]
            host, chain = head.block.host.encode(), _once(_ADDRESS, said, doubled)
        else:
            raise Fault("not_found", "Edges ask at /.farebox/authorize; see docs/edges.md.")
        original = read_request_head(
            b"%b %b HTTP/1.1\r\nHost: %b" % (method, uri, host),
            authorizer.book,
            gateway.settings.request_line_bytes_max,
            1,
            self._call_block,
        )
        self._call_block = original.block
        client = authorizer.client_of(chain)

        table = gateway.layout.table
        found = table.known.get(original.path) or table.find(original.path)
        if found.ours:
            self._hand_over("This is a page of the gateway's own.")
            return
        if found.only is not None:
            way, params = found.only, found.only_params
        else:
            chosen = choose(found, original.method, original.block.host, headers, original.query)
            if isinstance(chosen, frozenset):
                self._refuse(unrouted(chosen))
                return
            way, params = chosen
        route = way.route
        if not route.forward_auth or route.charge_on != "always":  # the latter is refused by `apply`
            self._hand_over(f"The route {route.id} is not served by forward-auth.")
            return
        call = Call(
            self._request_id,
            original.method,
            original.block.host,
            found.path,
            original.query.decode("ascii"),
            headers,
            client,
            route,
            params,
        )
        kind, _ = credential(headers)
        # With nginx the gateway is asked after every no, so that it may as well be asked for the price at once.
        unpaid = kind is Kind.PAYMENT or (kind is Kind.NONE and self._nginx)
        if unpaid and not _is_free(route, call.method):
            self._hand_over("A payment is taken at the gateway.")
            return
        decision = (authorizer.first_door if self._nginx else gateway.door).admit(call)
        if isinstance(decision, Awaitable):
            self._wait(self._decide(call, decision))
        else:
            self._act(call, decision)

    async def _decide(self, call: Call, decision: Awaitable[Decision]) -> None:
        decided = await decision
        self._waits = False
        self._act(call, decided)

    def _act(self, call: Call, decision: Decision) -> None:
        if isinstance(decision, Admitted):
            self._admit(call, decision)
        elif isinstance(decision, Refusal):
            self._refuse(decision)
        else:
            self._hand_over("The answer to this call is kept at the gateway.")

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        """Something must be asked of the database. The next question waits; that the edge leaves is still seen."""
        self._waits = True
        self._authorizer.spawn(self._waited(work))

    async def _waited(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Fault as fault:
            self._refuse(refusal(fault.code, fault.detail, fault.retry_after_s))
        except Exception as exc:  # noqa: BLE001 - one question's fault is not the connection's
            self._refuse(refusal_of(exc, self._request_id))
        if self._waits:  # a key was found and the door waits by itself
            return
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()
            self.data_received(b"")

    # ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, call: Call, admitted: Admitted) -> None:
        gateway, standing = self._gateway, admitted.standing
        if (
            admitted.before_release is not None
            or admitted.keep_answer is not None
            or admitted.meter is not None
            or (standing is not None and standing.holds_slot)
        ):
            admitted.finish(0, 0, 0)
            self._hand_over("A limit or a payment of this call can only be kept where its answer passes.")
            return
        if self._transport is None or self._transport.is_closing():
            admitted.finish(0, 0, 0)  # the edge has left: nobody will serve this call
            return
        lines = [b"HTTP/1.1 200 OK", gateway.answer_lines + call.request_id.encode()]
        names = set()
        for name, value in admitted.told_upstream():
            if name != _REQUEST_ID:
                lines.append(_line(name, value))
                names.add(name.lower())
        for name, value in admitted.told_client():
            lines.append(_line(name, value))
        lines.extend(self._credentials(call, names))
        admitted.finish(200, 0, 0)  # billed before the edge hears of it
        gateway.counters.call(call.route.id, admitted.fare, 200, 0, 0, time.perf_counter() - self._started)
        lines.append(b"Cache-Control: no-store\r\nContent-Length: 0")
        self._write(lines)

    def _credentials(self, call: Call, names: set[bytes]) -> list[bytes]:
        """The client's Authorization and X-API-Key for the upstream: what is ours ends here. Envoy keeps what it has and is
        told what to drop; the others drop what they have and copy what is said here."""
        lines: list[bytes] = []
        ours: list[bytes] = []
        for name, value in call.headers:
            if name not in _CREDENTIALS or name in names:
                continue
            if is_ours(value):
                ours.append(name)
            elif not self._envoy:
                names.add(name)
                lines.append(_line(_CREDENTIALS[name], value))
        if ours and self._envoy:
            lines.append(b"X-Envoy-Auth-Headers-To-Remove: " + b",".join(ours))
        return lines

    def _write(self, lines: list[bytes]) -> None:
        """A yes, as it goes out."""
        head, transport = self._head, self._transport
        assert head is not None
        assert transport is not None
        keep_alive = head.keep_alive and not self._authorizer.draining
        if not keep_alive:
            lines.append(b"Connection: close")
        elif not head.version_1_1:
            lines.append(b"Connection: keep-alive")
        lines.append(b"\r\n")
        transport.write(b"\r\n".join(lines))
        if not keep_alive:
            self._close()

    def _hand_over(self, why: str) -> None:
        self._refuse(refusal("hand_over", f"{why} Hand the whole request to the gateway (docs/edges.md)."))

    def _refuse(self, refused: Refusal) -> None:
        self._waits = False
        head, transport, gateway = self._head, self._transport, self._gateway
        if transport is None or transport.is_closing():
            return
        assert head is not None
        status, headers, body = problem(refused, self._request_id)
        if self._nginx:
            # The gateway gives the true answer, and counts it.
            status, body = (403 if status == 403 else 401), b""
            headers = [(b"Farebox-Refusal", self._request_id.encode()), (b"Cache-Control", b"no-store")]
        else:
            gateway.counters.refusal(refused.reason.code)
        keep_alive = head.keep_alive and not self._authorizer.draining
        transport.write(
            written(
                status,
                headers,
                body,
                to=head,
                date=gateway.date,
                request_id_line=gateway.answer_lines + self._request_id.encode(),
                keep_alive=keep_alive,
            )
        )
        if not keep_alive:
            self._close()

    def _end(self, answer: bytes) -> None:
        """A bare answer, and no more of this connection."""
        self._waits = False
        self._inbox = b""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(answer)
            self._close()

    def _close(self) -> None:
        self._inbox = b""
        if self._transport is not None:
            self._transport.close()


def _key_of(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """The asker's key: a control key in the first Authorization."""
    for name, value in headers:
        if name == b"authorization":
            bearer = value[7:].strip() if value[:7].lower() == b"bearer " else b""
            return bearer if is_admin_key(bearer) else None
    return None


def _without_key(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The call's own headers: without the first Authorization, which was the asker's."""
    place = next(n for n, (name, _) in enumerate(headers) if name == b"authorization")
    return [*headers[:place], *headers[place + 1 :]]


def _once(name: bytes, said: dict[bytes, bytes], doubled: set[bytes]) -> bytes:
    value = said.get(name)
    if not value or name in doubled:
        raise Fault("request_malformed", f"An edge says {name.decode()} once, and says something with it.")
    return value


def _is_free(route: Route, method: str) -> bool:
    return route.free is not None and (not route.free.methods or method in route.free.methods)


def _line(name: bytes, value: bytes) -> bytes:
    if b"\n" in value or b"\r" in value:
        raise InvariantError(f"the value of {name!r} towards the edge has a line end")
    return name + b": " + value
