"""The front desk of the control API: what every request meets before a resource does, and every answer after it.

Plain ASGI, so that the hot endpoints (events, the entitlement check) pay for nothing else. In this order: an id for the
request, who asks (``Authorization: Bearer fbx_sk_…``), how often, the body within its bound, strict JSON, and the
idempotency key, whose answer is kept in the very transaction of its effect.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import nacl.exceptions
import nacl.secret
import structlog

from farebox.api.errors import as_json, error_answer, error_document, retry_after, status_of
from farebox.api.rate_limits import Allowance, RateLimits
from farebox.app.idempotency import Idempotency, KeptAnswer, digest_of
from farebox.app.keys import ApiKey, ApiKeys
from farebox.base.errors import Reason, Refused, Unavailable, refuse
from farebox.base.ids import new_id
from farebox.base.secrets import key_hash
from farebox.protocols import strict_json
from farebox.store.pool import Tx

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES_MAX: Final = 1_000_000
#: 1,000 events with 8 kB of properties each.
BATCH_BODY_BYTES_MAX: Final = 10_000_000
BODY_TIMEOUT_S: Final = 30.0
QUERY_BYTES_MAX: Final = 8_000
#: How long a second request with the same idempotency key waits for the first one's answer before it is told to come back.
TWIN_WAIT_S: Final = 2.0
#: Wrong keys one address may try in a minute: each costs a look into the database.
UNKNOWN_KEYS_RPM: Final = 600
SEEN_KEYS_MAX: Final = 10_000

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}\Z")
_KEY = re.compile(rb"fbx_sk_[A-Za-z0-9]{10,100}\Z")
_JSON = re.compile(r"application/([a-z0-9.+-]+\+)?json\s*(;|\Z)", re.IGNORECASE)
_YAML = re.compile(r"(application/(x-)?yaml|text/yaml)\s*(;|\Z)", re.IGNORECASE)

log = structlog.get_logger("farebox.api")


@dataclass(slots=True)
class Caller:
    """Who asks, handed to every resource. ``within`` is the transaction an idempotent request runs in."""

    key: ApiKey
    request_id: str
    body: Any = None
    within: Tx | None = None

    @property
    def actor(self) -> str:
        return self.key.id

    def need(self, *scopes: str) -> None:
        """Return when the key has one of the scopes (``admin`` has all); ``Refused`` with ``SCOPE_MISSING`` otherwise."""
        if "admin" not in self.key.scopes and not set(scopes) & set(self.key.scopes):
            raise refuse(
                "SCOPE_MISSING", f"this API key lacks the scope {' or '.join(scopes)}", scopes=list(scopes)
            )


@dataclass(slots=True)
class HotRequest:
    """What a hot endpoint gets."""

    caller: Caller
    query: bytes
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(slots=True)
class Reply:
    """An answer before it is sent."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


Hot = Callable[[HotRequest], Awaitable[Reply]]
Page = Callable[[], Awaitable[Reply]]
#: Told of every answer: method, status, seconds.
Observe = Callable[[str, int, float], None]


class FrontDesk:
    """The whole API as one ASGI application. ``hot`` are raw endpoints by (method, path), ``pages`` those without a key."""

    def __init__(
        self,
        resources: AsgiApp,
        api_keys: ApiKeys,
        idempotency: Idempotency,
        hot: Mapping[tuple[str, str], Hot],
        pages: Mapping[str, Page],
        *,
        rate_limit_rpm: int,
        concurrent_effects_max: int,
        sandbox: bool,
        observe: Observe = lambda method, status, seconds: None,
    ) -> None:
        self._resources = resources
        self._api_keys = api_keys
        self._idempotency = idempotency
        self._hot = hot
        self._pages = pages
        self._limits = RateLimits(rate_limit_rpm)
        self._event_limits = RateLimits(rate_limit_rpm)
        self._unknown_keys = RateLimits(UNKNOWN_KEYS_RPM)
        self._seen: dict[bytes, None] = {}
        # An idempotent request holds one connection and may ask for a second: never may all be held by the first ask.
        self._effects = asyncio.Semaphore(concurrent_effects_max)
        self._sandbox = sandbox
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this is an HTTP API, not {scope['type']}")
        started = time.monotonic()
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        request_id = _request_id(headers)
        visit = _Visit(scope, receive, headers, request_id)
        reply = await self._answered(visit)
        head = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"farebox-request-id", request_id.encode()),
            *reply.headers,
            *_limit_headers(visit.allowance),
        ]
        if self._sandbox:
            head.append((b"farebox-sandbox", b"1"))
        if visit.unread:
            head.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})
        self._tell(visit, reply, time.monotonic() - started)

    def _tell(self, visit: _Visit, reply: Reply, seconds: float) -> None:
        """Count and log an answer. Thousands of good events a second, and probes, are not for the log."""
        self._observe(visit.method, reply.status, seconds)
        is_quiet = visit.path in self._pages or (visit.method, visit.path) in self._hot
        (log.debug if is_quiet and reply.status < 400 else log.info)(
            "answered",
            request_id=visit.request_id,
            method=visit.method,
            path=visit.path,
            status=reply.status,
            ms=round(seconds * 1000, 1),
            actor=visit.caller.actor if visit.caller else None,
        )

    async def _answered(self, visit: _Visit) -> Reply:
        """The reply, whatever happens: a refusal and an outage have their answers, anything else is ours and is logged."""
        try:
            return await self._served(visit)
        except (Refused, Unavailable) as error:
            if isinstance(error, Unavailable):
                log.warning("unavailable", request_id=visit.request_id, what=error.what)
            status, body, retry_after_s = error_answer(error, visit.request_id)
            reply = Reply(status, body)
            if retry_after_s is not None:
                reply.headers.append((b"retry-after", retry_after(retry_after_s).encode()))
            if status == 401:
                reply.headers.append((b"www-authenticate", b'Bearer realm="farebox"'))
            return reply
        except Exception:
            log.exception("failed", request_id=visit.request_id, method=visit.method, path=visit.path)
            return internal_error(visit.request_id)

    async def _served(self, visit: _Visit) -> Reply:
        page = self._pages.get(visit.path)
        if page is not None and visit.method in ("GET", "HEAD"):
            return await page()
        _refuse_odd_targets(visit)
        visit.caller = caller = await self._recognised(visit)
        hot = self._hot.get((visit.method, visit.path))
        self._count(visit, caller, is_event=hot is not None and visit.path.startswith("/v1/events"))
        if hot is not None:
            return await hot(
                HotRequest(caller, visit.query, visit.headers, await self._body(visit, BATCH_BODY_BYTES_MAX))
            )
        raw = await self._body(visit, BODY_BYTES_MAX)
        caller.body = _values(raw, visit) if raw else None
        key = _idempotency_key(visit, caller.body) if visit.method in ("POST", "PATCH") else None
        if key is None:
            return await self._resource(visit, caller, raw)
        return await self._once(visit, caller, raw, key)

    # ── who asks, and how often ──────────────────────────────────────────────────────────────────────────────────────

    async def _recognised(self, visit: _Visit) -> Caller:
        scheme, _, token = visit.headers.get(b"authorization", b"").partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            raise refuse("API_KEY_MISSING", "send your API key as Authorization: Bearer fbx_sk_…")
        digest = key_hash(token.decode("latin-1"))
        if digest not in self._seen:
            self._count_unknown(visit, spend=False)
        known: ApiKey | Reason = Reason(
            "API_KEY_UNKNOWN", "this API key does not exist: send Authorization: Bearer fbx_sk_…"
        )
        if _KEY.match(token):
            known = await self._api_keys.authenticate(digest)
        if isinstance(known, Reason):
            self._seen.pop(digest, None)
            self._count_unknown(visit, spend=True)
            raise Refused(known)
        if len(self._seen) > SEEN_KEYS_MAX:
            self._seen.clear()
        self._seen[digest] = None
        visit.token = token
        return Caller(known, visit.request_id)

    def _count_unknown(self, visit: _Visit, *, spend: bool) -> None:
        """Slow down who tries keys. Keys that were good before are not held up by a neighbour's tries."""
        address = visit.scope["client"][0] if visit.scope.get("client") else "unknown"
        allowance = self._unknown_keys.take(address) if spend else self._unknown_keys.look(address)
        if allowance is not None and allowance.retry_after_s:
            raise refuse(
                "RATE_LIMITED",
                "too many unknown API keys from this address",
                retry_after_s=allowance.retry_after_s,
            )

    def _count(self, visit: _Visit, caller: Caller, *, is_event: bool) -> None:
        if is_event:
            if "events:write" in caller.key.scopes:
                return
            visit.allowance = self._event_limits.take(caller.key.id)
        else:
            visit.allowance = self._limits.take(caller.key.id)
        if visit.allowance is not None and visit.allowance.retry_after_s:
            raise refuse(
                "RATE_LIMITED",
                f"more than {visit.allowance.limit} requests a minute: slow down",
                retry_after_s=visit.allowance.retry_after_s,
            )

    # ── the body ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _body(self, visit: _Visit, most: int) -> bytes:
        if visit.path not in ("/v1/events/batch",):
            most = BODY_BYTES_MAX
        length = visit.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            visit.unread = True
            raise _too_large(most)
        visit.unread = True
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await visit.receive()
                    if message["type"] == "http.disconnect":
                        raise refuse("BODY_MALFORMED", "the connection ended before the body did")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > most:
                        raise _too_large(most)
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise refuse("BODY_TIMEOUT", f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        visit.unread = False
        return b"".join(chunks)

    # ── resources ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _resource(self, visit: _Visit, caller: Caller, raw: bytes) -> Reply:
        """Hand the request to FastAPI with the body read already, and take its whole answer."""
        delivered = False

        async def receive() -> Message:
            nonlocal delivered
            if delivered:
                return {"type": "http.disconnect"}
            delivered = True
            return {"type": "http.request", "body": raw, "more_body": False}

        reply = Reply(500, b"")
        parts: list[bytes] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                for name, value in message.get("headers", ()):
                    if name == b"content-type":
                        reply.content_type = value
                    elif name in (b"allow", b"retry-after"):
                        reply.headers.append((name, value))
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._resources({**visit.scope, "farebox.caller": caller}, receive, send)
        reply.body = b"".join(parts)
        return reply

    async def _once(self, visit: _Visit, caller: Caller, raw: bytes, key: str) -> Reply:
        """One key, one effect. The kept answer is sealed with the caller's own API key, as it may hold a secret."""
        digest = digest_of(visit.method, f"{visit.path}?{visit.query.decode('latin-1')}", raw)
        seal = _Seal(visit.token, caller.actor, key)
        fresh: list[Reply] = []

        async def effect(tx: Tx) -> KeptAnswer:
            reply = await self._resource(visit, Caller(caller.key, caller.request_id, caller.body, tx), raw)
            if reply.status >= 400:
                raise _NotDone(reply)
            fresh.append(reply)
            return KeptAnswer(reply.status, seal.close(reply.body))

        try:
            async with self._effects:
                kept = await self._kept_or_made(caller.actor, key, digest, effect)
        except _NotDone as refused:
            return refused.reply
        if not kept.replayed:
            return fresh[-1]
        return Reply(kept.status, seal.open(kept.body), headers=[(b"idempotency-replayed", b"true")])

    async def _kept_or_made(
        self, actor: str, key: str, digest: bytes, effect: Callable[[Tx], Awaitable[KeptAnswer]]
    ) -> KeptAnswer:
        deadline, pause_s = time.monotonic() + TWIN_WAIT_S, 0.01
        while True:
            try:
                return await self._idempotency.once(actor, key, digest, effect)
            except Refused as refused:
                if refused.reason.code != "IDEMPOTENCY_IN_PROGRESS" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.25)


class _NotDone(Exception):
    """A resource refused: its transaction is rolled back and its answer is not kept."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


class _Seal:
    """Closes kept answers (some hold a key that is shown once) so that the database alone cannot open them."""

    def __init__(self, token: bytes, actor: str, key: str) -> None:
        derived = hmac.new(token, f"farebox/kept-answer/{actor}/{key}".encode(), hashlib.sha256).digest()
        self._box = nacl.secret.SecretBox(derived)

    def close(self, body: bytes) -> bytes:
        return bytes(self._box.encrypt(body))

    def open(self, sealed: bytes) -> bytes:
        try:
            return self._box.decrypt(sealed)
        except nacl.exceptions.CryptoError:
            raise refuse(
                "IDEMPOTENCY_CONFLICT",
                "the answer kept under this key was given to another API key",
                "idempotency_key",
            ) from None


class _Visit:
    """One request on its way through."""

    __slots__ = (
        "allowance",
        "caller",
        "headers",
        "method",
        "path",
        "query",
        "receive",
        "request_id",
        "scope",
        "token",
        "unread",
    )

    def __init__(
        self, scope: Scope, receive: Receive, headers: Mapping[bytes, bytes], request_id: str
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.headers = headers
        self.request_id = request_id
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.token = b""
        self.caller: Caller | None = None
        self.allowance: Allowance | None = None
        self.unread = False  # part of the body is still on the wire: the connection cannot be used again


def internal_error(request_id: str) -> Reply:
    """Our fault: the caller gets an id to name, and nothing else."""
    reason = Reason(
        "INTERNAL", f"Farebox failed to do this and has logged why: name {request_id} when you ask"
    )
    return Reply(status_of("INTERNAL"), as_json(error_document([reason], request_id)))


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.match(given) else new_id("req")


def _refuse_odd_targets(visit: _Visit) -> None:
    if "\x00" in visit.path or b"%00" in visit.query or len(visit.query) > QUERY_BYTES_MAX:
        raise refuse(
            "TARGET_MALFORMED",
            f"the path or query holds a NUL, or the query is longer than {QUERY_BYTES_MAX} bytes",
        )


def _values(raw: bytes, visit: _Visit) -> Any:
    """The body's values: strict JSON whose numbers keep every digit, or the text of a YAML document."""
    content_type = visit.headers.get(b"content-type", b"application/json").decode("latin-1")
    if _YAML.match(content_type) and visit.path.startswith("/v1/catalog"):
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise refuse("YAML_MALFORMED", "the document is not UTF-8") from None
    if not _JSON.match(content_type):
        raise refuse(
            "CONTENT_TYPE_UNSUPPORTED", f"{content_type[:60]!r} is not understood here: send application/json"
        )
    value = strict_json.loads(raw)
    # The first reading has refused what must not pass; where there are fractions, the second keeps their digits.
    return json.loads(raw, parse_float=Decimal) if b"." in raw or b"e" in raw or b"E" in raw else value


def _idempotency_key(visit: _Visit, body: Any) -> str | None:
    if isinstance(body, dict) and body.get("idempotency_key") is not None:
        key = body["idempotency_key"]
        if not isinstance(key, str):
            raise refuse("IDEMPOTENCY_KEY_INVALID", "an idempotency key is text", "idempotency_key")
        return key
    header = visit.headers.get(b"idempotency-key")
    return header.decode("latin-1").strip() if header is not None else None


def _too_large(most: int) -> Refused:
    return refuse("BODY_TOO_LARGE", f"the body may have {most:,} bytes", bytes_max=most)


def _limit_headers(allowance: Allowance | None) -> list[tuple[bytes, bytes]]:
    if allowance is None:
        return []
    return [
        (b"ratelimit-limit", b"%d" % allowance.limit),
        (b"ratelimit-remaining", b"%d" % allowance.remaining),
        (b"ratelimit-reset", retry_after(allowance.reset_s).encode()),
    ]
