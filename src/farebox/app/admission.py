"""What a call is, and what may be said to it. The gateway asks; a ``Door`` answers.

The fast path never waits: a known key or token with an open lease is answered at once. Only what must ask the
database (a first sight, an empty lease, a payment) returns an awaitable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from farebox.base.errors import Reason
from farebox.domain.access import FareKind, Route

Headers = list[tuple[bytes, bytes]]

#: What may stand in ``Admitted.answer_lines``, in lower case: an upstream's own lines of these names give way.
LIMIT_NAMES: Final = frozenset(
    {b"ratelimit-limit", b"ratelimit-remaining", b"ratelimit-reset", b"farebox-pass-remaining"}
)


@dataclass(slots=True)
class Call:
    """One request as the gateway will forward it. Header names are lower case; values are as received."""

    request_id: str
    method: str
    host: str
    path: str  # exactly the string that will be forwarded and was matched
    query: str  # without the question mark
    headers: Headers
    client_address: str
    route: Route
    params: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # buffered only where the door asked for it (exact fares)

    def header(self, name: bytes) -> bytes | None:
        """The first value of a lower-case header name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Flow(Protocol):
    """One direction of one call's body bytes under limits. Bytes are taken before they are sent on."""

    def take(self, size: int) -> int:
        """How many of the next ``size`` bytes may pass now (0 to ``size``); these count as passed. Never waits."""
        ...

    async def more(self) -> bool:
        """After ``take`` gave less than was asked: wait until some more may pass (a slice was leased, the rate has paced).
        False: nothing more may ever pass; the transfer is cut exactly there."""
        ...


class Meter(Protocol):
    """What limits the bytes and the credits of one call. Made only for calls that have such limits."""

    upload: Flow | None
    download: Flow | None

    def credits(self, value: bytes) -> None:
        """The upstream said (header or trailer, stripped) what the call costs; a value that is no good is logged and ignored."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """On what an admitted call stands for as long as it lasts; one object a grant and route, shared by its calls.

    The gateway cuts a call whose ``expires_s`` (seconds since the epoch, business date) has passed, and one whose
    ``subject_id`` (customer or pass) or ``key_id`` was revoked. ``holds_slot``: something is held until the call ends, so
    that nobody can serve it who does not see its end (forward-auth).
    """

    subject_id: str
    expires_s: float
    key_id: str = ""
    holds_slot: bool = False


@dataclass(slots=True)
class Admitted:
    """Pass. The gateway sets ``forward_headers`` towards the upstream and ``answer_headers`` towards the client.

    ``before_release`` (exact fares) is awaited once the upstream's head is known and before a byte of it is sent on:
    it returns None to release the answer (it may have added to ``answer_headers``), or a Refusal that replaces it.
    ``finish`` is called exactly once, when the answer has gone out or failed: (status or 0, bytes up, bytes down).
    It must be called *before* the last bytes are handed to the client's socket, so that what was answered is recorded.
    """

    fare: FareKind
    forward_headers: Headers
    answer_headers: Headers
    finish: Callable[[int, int, int], None]
    before_release: Callable[[int, Headers], Awaitable[Refusal | None]] | None = None
    # exact fares keep small answers for a replay of the same payment; None: do not collect
    keep_answer_bytes_max: int = 0
    keep_answer: Callable[[int, Headers, bytes], Awaitable[None]] | None = None
    # set by the gateway before ``finish``: the client left (or was cut off) after the call had been forwarded; one with
    # ``before_release`` is settled and kept all the same
    abandoned: bool = False
    standing: Standing | None = None  # None: nothing that could end before the call does
    meter: Meter | None = None  # None: no limit of bytes or credits
    # Header lines ready to be sent as they are (CRLF between them, none at the end), for what is the same in call after
    # call: towards the upstream only Farebox-* and names that the route sets, towards the client only LIMIT_NAMES.
    forward_lines: bytes = b""
    answer_lines: bytes = b""
    # called at most once, before ``finish``: the upstream broke off an answer that was settled and released
    broken: Callable[[], None] | None = None

    def told_upstream(self) -> Headers:
        """All that is added towards the upstream, as headers."""
        return _headers_of(self.forward_lines) + self.forward_headers

    def told_client(self) -> Headers:
        """All that is added towards the client, as headers."""
        return _headers_of(self.answer_lines) + self.answer_headers


@dataclass(slots=True)
class Refusal:
    """No. ``reason.code`` decides the status (gateway/problems.py). ``body`` and ``content_type`` replace the problem."""

    reason: Reason
    answer_headers: Headers = field(default_factory=list)
    retry_after_s: float | None = None


@dataclass(slots=True)
class Answer:
    """The stored answer of an earlier identical paid request, or one of our own pages."""

    status: int
    headers: Headers
    body: bytes


Decision = Admitted | Refusal | Answer


class Door(Protocol):
    """Answers calls. ``needs_body`` says whether the body must be buffered first (exact fares bind its digest)."""

    def needs_body(self, call: Call) -> bool: ...

    def admit(self, call: Call) -> Decision | Awaitable[Decision]: ...


def _headers_of(lines: bytes) -> Headers:
    read: Headers = []
    for line in lines.split(b"\r\n") if lines else ():
        name, _, value = line.partition(b": ")
        read.append((name, value))
    return read
