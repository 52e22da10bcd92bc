"""Which credential a call carries. Read in the order of API.md §4: payment, pass token, API key; anything else is the upstream's.

A pass token comes as ``Authorization: Bearer``, in the header ``apicharge`` or in the cookie of that name, the first of
these counts. A foreign Bearer is the upstream's; a header or cookie of our name is ours whatever it holds: it is read or
refused, and never passed on.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from farebox.app.admission import Headers
from farebox.app.pass_tokens import is_pass_token
from farebox.base.secrets import ADMIN_KEY_PREFIX, CUSTOMER_KEY_PREFIX

_CUSTOMER: Final = CUSTOMER_KEY_PREFIX.encode()
_ADMIN: Final = ADMIN_KEY_PREFIX.encode()
_ALL_OURS: Final = b"fbx_"
#: A key has 32 characters after its prefix; whatever is longer was never issued.
_KEY_BYTES: Final = len(_CUSTOMER) + 32

#: First segment of a token → whether its header says that it is a pass. Our own tokens share one segment.
_token_heads: dict[bytes, bool] = {}
_TOKEN_HEADS_MAX: Final = 256
_TOKEN_HEAD_BYTES_MAX: Final = 512
#: Longer ones are not ours: a pass token has a few hundred bytes.
TOKEN_BYTES_MAX: Final = 4096


#: The header, and the cookie, that a pass token may come in.
PASS_NAME: Final = b"apicharge"


class Kind(IntEnum):
    NONE = 0
    PAYMENT = 1
    PASS = 2
    KEY = 3
    MALFORMED = 4  # a header or cookie for pass tokens that holds none, or more than one


_PAYMENT, _BEARER, _KEY, _PASS, _COOKIE = 1, 2, 3, 4, 5
_NAMES: Final = {
    b"payment-signature": _PAYMENT,
    b"x-payment": _PAYMENT,
    b"authorization": _BEARER,
    b"x-api-key": _KEY,
    PASS_NAME: _PASS,
    b"cookie": _COOKIE,
}


def credential(headers: Headers) -> tuple[Kind, bytes]:
    """The credential that counts, and its value: the payment header, the token, or the key."""
    token = key = rare = None
    named = _NAMES.get
    for name, value in headers:
        kind = named(name)
        if kind is None:
            continue
        if kind == _BEARER:
            if value[:7].lower() == b"bearer ":
                bearer = value[7:].strip()
                if bearer.startswith(_ALL_OURS):
                    key = key or bearer
                elif token is None and _is_pass(bearer):
                    token = bearer
        elif kind == _KEY:
            if value.startswith(_ALL_OURS):
                key = key or value
        elif kind == _PAYMENT:
            return Kind.PAYMENT, value
        elif kind == _PASS or PASS_NAME in value:
            rare = headers
    if token is not None:
        return Kind.PASS, token
    if rare is not None:
        found = _named(rare)
        if found[0] != Kind.NONE:
            return found
    if key is not None:
        return Kind.KEY, key
    return Kind.NONE, b""


def _named(headers: Headers) -> tuple[Kind, bytes]:
    """The one token in the header of our name; without it, in the cookie of our name."""
    values = [value for name, value in headers if name == PASS_NAME]
    if not values:
        values = [held for name, value in headers if name == b"cookie" for held in parted_cookie(value)[1]]
    if not values:
        return Kind.NONE, b""
    return (Kind.PASS, values[0]) if len(values) == 1 and _is_pass(values[0]) else (Kind.MALFORMED, b"")


def parted_cookie(value: bytes) -> tuple[bytes, list[bytes]]:
    """A Cookie value (RFC 6265 §4.2.1): what is the upstream's of it, and the values of the cookies of our name."""
    theirs: list[bytes] = []
    ours: list[bytes] = []
    for part in value.split(b";"):
        name, equals, held = part.strip(b" \t").partition(b"=")
        if equals and name.rstrip(b" \t") == PASS_NAME:
            ours.append(held)
        else:
            theirs.append(part)
    return b";".join(theirs).strip(b" \t"), ours


def is_ours(value: bytes) -> bool:
    """Whether an Authorization or X-API-Key value is a key or a pass token of this house: no upstream may see those."""
    bare = value[7:].strip() if value[:7].lower() == b"bearer " else value
    return bare.startswith(_ALL_OURS) or _is_pass(bare)


def is_customer_key(key: bytes) -> bool:
    """Whether a key has the form of one: nothing else is worth a question to the database."""
    return len(key) == _KEY_BYTES and key.startswith(_CUSTOMER)


def is_admin_key(key: bytes) -> bool:
    return key.startswith(_ADMIN)


def _is_pass(bearer: bytes) -> bool:
    head, dot, rest = bearer.partition(b".")
    if not dot or len(bearer) > TOKEN_BYTES_MAX or len(head) > _TOKEN_HEAD_BYTES_MAX:
        return False
    # Only what follows from the head may be remembered of it: everybody's token begins with the same one.
    if rest.count(b".") != 1 or not bearer.isascii():
        return False
    known = _token_heads.get(head)
    if known is None:
        known = is_pass_token(bearer.decode("ascii"))
        if len(_token_heads) >= _TOKEN_HEADS_MAX:
            _token_heads.clear()
        _token_heads[head] = known
    return known
