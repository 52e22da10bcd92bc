"""A call that only the gateway can serve goes through it: to its public port, and its answer back, as it streams.

The gateway takes the payment or keeps the limit, calls this very app as its upstream (recognised by ``X-Farebox-Upstream``)
and answers. Nothing is held: bodies stream both ways at the pace of the slower side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, Final

from farebox.inapp.identity import HANDED, UPSTREAM, Headers, canonical
from farebox.inapp.questions import chain_of, target_of

if TYPE_CHECKING:
    import httpx

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CONNECT_TIMEOUT_S: Final = 5.0
_IDLE_CONNECTIONS_MAX: Final = 16
_IDLE_S: Final = 20.0

_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"http2-settings"}
)  # fmt: skip
#: Written anew, so that the gateway hears of the client what this app's server saw.
_WRITTEN: Final = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-real-ip", b"forwarded", UPSTREAM, HANDED}
)  # fmt: skip
#: Of the gateway's answer: this app's server writes its own.
_NOT_ANSWERED: Final = _HOP_BY_HOP | {b"date"}


class Broken(Exception):
    """The gateway was not reached or broke off before its answer began: nobody knows what became of the call."""


class _ClientLeft(Exception):
    """In the middle of its body."""


class HandOver:
    """The way through the gateway, for one event loop. At most ``calls_max`` calls at once; ``timeout_s`` is how long the
    gateway may be silent (a payment may take a settlement's time)."""

    def __init__(self, gateway_url: str, *, timeout_s: float, calls_max: int) -> None:
        import httpx  # only an app that hands over needs it

        self._url = httpx.URL(gateway_url)
        self._timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S).as_dict()
        self._calls_left = calls_max
        limits = httpx.Limits(
            max_connections=calls_max,
            max_keepalive_connections=_IDLE_CONNECTIONS_MAX,
            keepalive_expiry=_IDLE_S,
        )
        self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one http call. ``Broken``: nothing was sent to the client yet. A client that leaves ends the call."""
        if self._calls_left <= 0:
            raise Broken("too many calls are on their way through the gateway")
        self._calls_left -= 1
        body_ended = asyncio.Event()
        work = asyncio.ensure_future(self._carry(scope, receive, send, body_ended))
        watch = asyncio.ensure_future(_left(receive, body_ended))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._calls_left += 1
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def close(self) -> None:
        await self._transport.aclose()

    async def _carry(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, body_ended: asyncio.Event
    ) -> None:
        import httpx

        first = await receive()
        if first["type"] == "http.disconnect":
            return
        headers = _going(scope)
        if not first.get("more_body"):
            body_ended.set()
        if (first.get("more_body") or first.get("body")) and not _has(headers, b"content-length"):
            headers.append((b"transfer-encoding", b"chunked"))
        request = httpx.Request(
            scope["method"],
            self._url,
            headers=headers,
            stream=_body(first, receive, body_ended),
            extensions={"timeout": self._timeout, "target": target_of(scope)},
        )
        try:
            answer = await self._transport.handle_async_request(request)
        except _ClientLeft:
            return
        except httpx.HTTPError as exc:
            raise Broken(f"{type(exc).__name__}: {exc}") from None
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": _coming(answer.headers.raw),
                }
            )
            assert isinstance(answer.stream, httpx.AsyncByteStream)
            async for piece in answer.stream:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError:
            return  # no last piece: the server of this app cuts the answer as the gateway did
        finally:
            await answer.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(first: Message, receive: Receive, ended: asyncio.Event) -> httpx.AsyncByteStream:
    import httpx

    class Body(httpx.AsyncByteStream):
        """The client's body as it arrives."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            message = first
            while True:
                if message["type"] == "http.disconnect":
                    raise _ClientLeft
                if piece := message.get("body", b""):
                    yield piece
                if not message.get("more_body"):
                    ended.set()
                    return
                message = await receive()

    return Body()


async def _left(receive: Receive, body_ended: asyncio.Event) -> None:
    """Until the client leaves. Only whoever reads the body may call ``receive`` before its end."""
    await body_ended.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


def _going(scope: MutableMapping[str, Any]) -> Headers:
    """The client's headers as a proxy passes them on: credentials and payments go along, the gateway reads them."""
    named = {
        word.strip(b" \t").lower()
        for name, value in scope["headers"]
        if name == b"connection"
        for word in value.split(b",")
    }
    dropped = _HOP_BY_HOP | _WRITTEN | (named - {b"host", b"content-length"})
    kept: Headers = [(name, value) for name, value in scope["headers"] if canonical(name) not in dropped]
    told = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    host = next(value for name, value in kept if name == b"host")
    return [
        *kept,
        (b"x-forwarded-for", chain_of(scope, told)),
        (b"x-forwarded-proto", str(scope.get("scheme", "http")).encode("latin-1")),
        (b"x-forwarded-host", host),
        (HANDED, b"1"),
    ]


def _coming(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    lower = [(name.lower(), value) for name, value in headers]
    return [field for field in lower if field[0] not in _NOT_ANSWERED]


def _has(headers: Headers, wanted: bytes) -> bool:
    return any(name == wanted for name, _ in headers)
