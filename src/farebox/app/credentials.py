"""Which credential a call carries. Read in the order of API.md §4: payment, pass token, API key; anything else is the upstream's."""

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


class Kind(IntEnum):
    NONE = 0
    PAYMENT = 1
    PASS = 2
    KEY = 3


_PAYMENT, _BEARER, _KEY = 1, 2, 3
_NAMES: Final = {
    b"payment-signature": _PAYMENT,
    b"x-payment": _PAYMENT,
    b"authorization": _BEARER,
    b"x-api-key": _KEY,
}


def credential(headers: Headers) -> tuple[Kind, bytes]:
    """The credential that counts, and its value: the payment header, the token, or the key."""
    token = key = None
    named = _NAMES.get
    for name, value in headers:
        kind = named(name)
        if kind is None:
            continue
        if kind == _PAYMENT:
            return Kind.PAYMENT, value
        if kind == _KEY:
            if value.startswith(_ALL_OURS):
                key = key or value
        elif value[:7].lower() == b"bearer ":
            bearer = value[7:].strip()
            if bearer.startswith(_ALL_OURS):
                key = key or bearer
            elif token is None and _is_pass(bearer):
                token = bearer
    if token is not None:
        return Kind.PASS, token
    if key is not None:
        return Kind.KEY, key
    return Kind.NONE, b""


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
