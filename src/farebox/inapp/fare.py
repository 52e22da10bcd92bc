"""``Fare``: the fare is taken in front of an ASGI app, by asking a gateway's forward-auth listener (docs/inapp.md).

    app = Fare(api, authorize_url="http://127.0.0.1:8404", key=os.environ["FAREBOX_KEY"])

Every http call and every WebSocket handshake is asked about once; nothing of an app is free by its path here, but by its
route in farebox.yaml. A yes is billed when it is given. A no is answered as the gateway would. What only the gateway can
serve (a signed payment, limits of bytes and credits, its own pages) is handed over to it, where ``gateway_url`` says so;
the gateway then calls this app as its upstream and is known by ``X-Farebox-Upstream``. Without an answer nothing is free:
503.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from farebox.base.secrets import ADMIN_KEY_PREFIX, Secret
from farebox.inapp.hand_over import Broken, HandOver, Message, Receive, Send
from farebox.inapp.identity import (
    HANDED,
    UPSTREAM,
    Headers,
    admission_of,
    by_the_gateway,
    for_the_app,
    for_the_client,
    told_with,
)
from farebox.inapp.listener import Away, Listener
from farebox.inapp.questions import Asking, Said, Unreadable

log = logging.getLogger("farebox.inapp")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SECRET_CHARACTERS_MIN: Final = 32
_WORD: Final = re.compile(r"[!-~]+\Z")
#: What is wrong is logged when it begins, and not more often than this.
_COMPLAIN_EVERY_S: Final = 10.0
_RETRY_AFTER_S: Final = 2
_REFUSED: Final = frozenset({b"connection", b"keep-alive", b"date"})
_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class Fare:
    """Takes the fare in front of ``app``. Wrap the outermost app: what stands outside of it is not paid for.

    ``authorize_url``: a gateway's forward-auth listener; ``key``: ``fbx_sk_…`` of scope ``gateway``.
    ``gateway_url``, ``upstream_secret``: the gateway's public port, and what its routes set as ``X-Farebox-Upstream``
    (at least 32 visible characters); without them a call that only the gateway can serve is answered with 421.
    ``timeout_s``: for one question, all in all; of more than ``connections_max`` at once ``waiting_max`` wait.
    ``hand_over_timeout_s``: how long the gateway may be silent; ``hand_overs_max``: calls on their way through it.

    Raises ``ValueError`` for settings that cannot work. An admitted call finds an ``Admission`` in ``scope["farebox"]``
    and ``scope["state"]["farebox"]`` (Starlette, FastAPI, Litestar: ``request.state.farebox``).
    """

    def __init__(
        self,
        app: App,
        *,
        authorize_url: str,
        key: str,
        gateway_url: str | None = None,
        upstream_secret: str | None = None,
        timeout_s: float = 5.0,
        connections_max: int = 64,
        waiting_max: int = 1024,
        hand_over_timeout_s: float = 90.0,
        hand_overs_max: int = 256,
    ) -> None:
        self._app = app
        self._host, self._port, netloc = _http_address(authorize_url, "authorize_url")
        if not key.startswith(ADMIN_KEY_PREFIX) or not _WORD.match(key):
            raise ValueError(f"key: expected one of scope gateway, {ADMIN_KEY_PREFIX}… (farebox keys create)")
        self._asking = Asking(netloc, key)
        if gateway_url is not None:
            _http_address(gateway_url, "gateway_url")
            if upstream_secret is None:
                raise ValueError("upstream_secret: by it the app knows the gateway that calls it back")
        if upstream_secret is not None and (
            len(upstream_secret) < SECRET_CHARACTERS_MIN or not _WORD.match(upstream_secret)
        ):
            raise ValueError(
                f"upstream_secret: at least {SECRET_CHARACTERS_MIN} visible characters (openssl rand -hex 32)"
            )
        self._gateway_url = gateway_url
        self._secret = Secret(upstream_secret) if upstream_secret is not None else None
        self._timeout_s = timeout_s
        self._connections_max = connections_max
        self._waiting_max = waiting_max
        self._hand_over_timeout_s = hand_over_timeout_s
        self._hand_overs_max = hand_overs_max
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        self._hand_over: HandOver | None = None
        self._complaint = ""
        self._silent_until_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http" or kind == "websocket":
            await self._serve(scope, receive, send)
        elif kind == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                await self.close()
        else:
            raise ValueError(f"Fare does not know calls of type {kind!r}")

    async def close(self) -> None:
        """End the connections. The end of the server's lifespan does this."""
        listener, self._listener = self._listener, None
        hand_over, self._hand_over = self._hand_over, None
        if listener is not None:
            listener.close()
        if hand_over is not None:
            await hand_over.close()

    # ── one call ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        handed = False
        for name, value in scope["headers"]:
            if name == UPSTREAM:
                if self._secret is not None and hmac.compare_digest(value, self._secret.reveal().encode()):
                    headers = by_the_gateway(scope["headers"])
                    await self._app(_admitted(scope, headers, headers), receive, send)
                    return
            elif name == HANDED:
                handed = True
        if handed:
            self._complain(
                "a call came back from the gateway without the secret: the route has to set X-Farebox-Upstream"
                " (rewrite.set_headers), and upstream_secret has to be the same"
            )
            await _refuse(
                scope, receive, send, *_problem(508, "hand_over", "The call went round in a circle.")
            )
            return
        try:
            said = await self._here().ask(self._asking.question(scope))
        except Unreadable as exc:
            if exc.status == 503:
                self._complain(str(exc))
                await self._unavailable(scope, receive, send)
            else:
                await _refuse(scope, receive, send, *_problem(exc.status, "request_malformed", str(exc)))
            return
        except Away as exc:
            self._complain(f"the forward-auth listener is away: {exc}")
            await self._unavailable(scope, receive, send)
            return
        if said.status == 200:
            self._complaint = ""
            added = for_the_client(said.headers)

            async def told(message: Message) -> None:
                if message["type"] in _STARTS:
                    message = {**message, "headers": told_with(message.get("headers", ()), added)}
                await send(message)

            headers = for_the_app(scope["headers"], said.headers)
            await self._app(_admitted(scope, headers, said.headers), receive, told)
        elif said.bare:
            await self._bare(said, scope, receive, send)
        elif said.status == 421:
            self._complaint = ""
            await self._give(said, scope, receive, send)
        else:
            self._complaint = ""
            await _refuse(scope, receive, send, said.status, said.headers, said.body)

    async def _give(self, said: Said, scope: Scope, receive: Receive, send: Send) -> None:
        """To the gateway. A WebSocket is not handed over: its client is told to go there by itself."""
        if self._gateway_url is None or scope["type"] != "http":
            await _refuse(scope, receive, send, said.status, said.headers, said.body)
            return
        self._here()
        if self._hand_over is None:
            self._hand_over = HandOver(
                self._gateway_url, timeout_s=self._hand_over_timeout_s, calls_max=self._hand_overs_max
            )
        try:
            await self._hand_over.serve(scope, receive, send)
        except Broken as exc:
            self._complain(f"the gateway is away: {exc}")
            await self._unavailable(scope, receive, send)

    async def _bare(self, said: Said, scope: Scope, receive: Receive, send: Send) -> None:
        """An answer to the question, not to the call."""
        if said.status == 400:
            detail = "The head of this call is malformed or longer than the gateway takes."
            await _refuse(scope, receive, send, *_problem(400, "request_malformed", detail))
            return
        if said.status == 403:
            self._complain("the forward-auth listener does not know the key, or it lacks the scope gateway")
        else:
            self._complain(f"the forward-auth listener has no answer ({said.status})")
        await self._unavailable(scope, receive, send)

    async def _unavailable(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing is known of the call. The same payment may be sent again: it buys one call at most."""
        detail = "Whether this call may pass cannot be found out now; send the same again in a moment."
        status, headers, body = _problem(503, "unavailable", detail)
        headers.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
        await _refuse(scope, receive, send, status, headers, body)

    def _here(self) -> Listener:
        """The connections of the running event loop. Those of another one (a test client makes several) are left to it."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop or self._listener is None:
            if self._loop is not loop:
                self._hand_over = None
            self._loop = loop
            self._listener = Listener(
                self._host,
                self._port,
                timeout_s=self._timeout_s,
                connections_max=self._connections_max,
                waiting_max=self._waiting_max,
            )
        return self._listener

    def _complain(self, what: str) -> None:
        """In the log once, until something goes well."""
        now_s = asyncio.get_running_loop().time()
        if what != self._complaint and now_s >= self._silent_until_s:
            self._complaint = what
            self._silent_until_s = now_s + _COMPLAIN_EVERY_S
            log.error("%s", what)


def _admitted(scope: Scope, headers: Headers, told: Headers) -> Scope:
    """The scope for the app; the server's own stays as it was."""
    admission = admission_of(told)
    state = {**(scope.get("state") or {}), "farebox": admission}
    return {**scope, "headers": headers, "farebox": admission, "state": state}


async def _refuse(
    scope: Scope, receive: Receive, send: Send, status: int, headers: Headers, body: bytes
) -> None:
    """Answer in the app's place. A WebSocket is refused before it is accepted: 403, where the server can say no more."""
    kept = [field for field in headers if field[0] not in _REFUSED]
    prefix = "http.response"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        prefix = "websocket.http.response"
    await send({"type": f"{prefix}.start", "status": status, "headers": kept})
    await send({"type": f"{prefix}.body", "body": b"" if scope.get("method") == "HEAD" else body})


def _problem(status: int, code: str, detail: str) -> tuple[int, Headers, bytes]:
    """A refusal of our own (RFC 9457), in the form of the gateway's."""
    document = {
        "type": f"urn:farebox:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    body = json.dumps(document).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"cache-control", b"no-store"),
        (b"content-length", b"%d" % len(body)),
    ]
    return status, headers, body


def _http_address(url: str, name: str) -> tuple[str, int, str]:
    """Host, port, and both as a Host header says them."""
    parts = urlsplit(url)
    if (
        parts.scheme != "http"
        or not parts.hostname
        or parts.username is not None
        or parts.path not in ("", "/")
        or parts.query
    ):
        raise ValueError(f"{name}: expected http://host:port of a gateway in reach, without a path")
    return parts.hostname, parts.port or 80, parts.netloc
