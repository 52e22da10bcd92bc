"""Who calls, as the app is told: a value in the scope, and headers that no client can have sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Headers = list[tuple[bytes, bytes]]

#: The route sets this one (``rewrite.set_headers``): by it the app knows the gateway. Never told to the app.
UPSTREAM: Final = b"x-farebox-upstream"
#: Stands in a call that was handed over: it comes back from the gateway, or the app is set up wrongly.
HANDED: Final = b"x-farebox-handed"

_FIELDS: Final = {
    b"farebox-customer": "customer",
    b"farebox-plan": "plan",
    b"farebox-pass": "pass_id",
    b"farebox-payer": "payer",
    b"farebox-route": "route",
    b"farebox-request-id": "request_id",
}
_OURS: Final = b"farebox-"
_PASS: Final = b"apicharge"
#: Of a client's headers: credentials of ours, money, and the two above. An Authorization that is the app's is said back.
_ENDS_HERE: Final = frozenset(
    {b"authorization", b"x-api-key", _PASS, b"payment-signature", b"x-payment", UPSTREAM, HANDED}
)
#: Of a yes: about the connection to the listener.
_OF_THE_LISTENER: Final = frozenset(
    {b"content-length", b"connection", b"keep-alive", b"cache-control", b"date", UPSTREAM, HANDED}
)
#: Of a yes: for the client.
_FOR_THE_CLIENT: Final = frozenset(
    {
        b"ratelimit-limit",
        b"ratelimit-remaining",
        b"ratelimit-reset",
        b"farebox-pass-remaining",
        b"farebox-sandbox",
        b"farebox-request-id",
    }
)
#: Of the app's own answer: what it says to a gateway stays between the two.
_TO_THE_GATEWAY: Final = frozenset({b"apicharge-credits", b"settlement-overrides"})


@dataclass(frozen=True, slots=True)
class Admission:
    """One call that may pass. ``customer`` and ``plan``: it goes to an account; ``pass_id``: by a pass; ``payer``: paid
    with this address's signature; none of them: the route is free."""

    route: str
    request_id: str
    customer: str | None = None
    plan: str | None = None
    pass_id: str | None = None
    payer: str | None = None


def canonical(name: bytes) -> bytes:
    """A lower-case name as frameworks after CGI read it: to them ``farebox_customer`` is ``farebox-customer``."""
    return name.replace(b"_", b"-")


def admission_of(headers: Iterable[tuple[bytes, bytes]]) -> Admission:
    """What the ``Farebox-*`` headers say; they must be the gateway's own."""
    said = {_FIELDS[name]: value.decode("utf-8", "replace") for name, value in headers if name in _FIELDS}
    return Admission(
        said.get("route", ""),
        said.get("request_id", ""),
        said.get("customer"),
        said.get("plan"),
        said.get("pass_id"),
        said.get("payer"),
    )


def for_the_app(headers: Iterable[tuple[bytes, bytes]], yes: Headers) -> Headers:
    """The call's headers after a yes: the client's without what is ours to say, then what the listener said."""
    said = [
        (name, value)
        for name, value in yes
        if name not in _OF_THE_LISTENER and (name not in _FOR_THE_CLIENT or name in _FIELDS)
    ]
    names = _ENDS_HERE.union([canonical(name) for name, _ in said])
    kept: Headers = []
    for name, value in headers:
        read = canonical(name)
        if read in names or read.startswith(_OURS):
            continue
        if name == b"cookie" and _PASS in value:
            value = _without_pass(value)
            if not value:
                continue
        kept.append((name, value))
    return kept + said


def for_the_client(yes: Headers) -> Headers:
    """What a yes adds to the app's answer."""
    return [field for field in yes if field[0] in _FOR_THE_CLIENT]


def told_with(headers: Iterable[tuple[bytes, bytes]], added: Headers) -> Headers:
    """The app's answer with ours added: its own headers of these names give way, and none of ``Farebox-*`` is believed."""
    names = _TO_THE_GATEWAY.union([name for name, _ in added])
    kept: Headers = []
    for name, value in headers:
        read = canonical(name.lower())
        if read not in names and not read.startswith(_OURS):
            kept.append((name, value))
    return kept + added


def by_the_gateway(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of a call that came from the gateway: the secret it came with is nobody else's."""
    return [field for field in headers if canonical(field[0]) not in (UPSTREAM, HANDED)]


def _without_pass(cookie: bytes) -> bytes:
    """A Cookie value (RFC 6265 §4.2.1) without the cookie that holds a pass."""
    parts = [p for p in cookie.split(b";") if p.partition(b"=")[0].strip(b" \t") != _PASS]
    return b";".join(parts).strip(b" \t")
