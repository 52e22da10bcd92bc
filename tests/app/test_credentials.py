"""Which credential of a call counts: payment, pass token (Bearer, header, cookie), API key; anything else is the upstream's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from farebox.app.credentials import Kind, credential, parted_cookie
from farebox.app.pass_tokens import PassTokens
from farebox.app.ports.clock import WallClock
from farebox.domain.limits import PassLimits
from farebox.domain.passes import Pass

_NOW = datetime.now(UTC)
TOKEN = (
    PassTokens(b"t" * 32, "sandbox", WallClock())
    .sign(Pass("pas_1", "r", None, "", None, "active", PassLimits(5), _NOW, _NOW + timedelta(hours=1)))
    .encode()
)
OTHER = TOKEN[:-4] + b"AAAA"
KEY = b"fbx_ck_" + b"a" * 32
FOREIGN = b"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxIn0.c2ln"


@pytest.mark.parametrize(
    ("headers", "kind", "value"),
    [
        ([(b"authorization", b"Bearer " + TOKEN)], Kind.PASS, TOKEN),
        ([(b"apicharge", TOKEN)], Kind.PASS, TOKEN),
        ([(b"cookie", b"a=b; apicharge=" + TOKEN + b"; c=d")], Kind.PASS, TOKEN),
        ([(b"cookie", b"a=b"), (b"cookie", b"apicharge=" + TOKEN)], Kind.PASS, TOKEN),
        # what comes first in the order, whatever came first on the wire
        ([(b"x-api-key", KEY), (b"cookie", b"apicharge=" + TOKEN)], Kind.PASS, TOKEN),
        ([(b"cookie", b"apicharge=" + OTHER), (b"apicharge", TOKEN)], Kind.PASS, TOKEN),
        ([(b"apicharge", OTHER), (b"authorization", b"bearer " + TOKEN)], Kind.PASS, TOKEN),
        ([(b"apicharge", TOKEN), (b"x-payment", b"paid")], Kind.PAYMENT, b"paid"),
        ([(b"apicharge", b"{}"), (b"payment-signature", b"paid")], Kind.PAYMENT, b"paid"),
        # a foreign Bearer is the upstream's, beside ours too
        ([(b"authorization", b"Bearer " + FOREIGN)], Kind.NONE, b""),
        ([(b"authorization", b"Bearer " + FOREIGN), (b"apicharge", TOKEN)], Kind.PASS, TOKEN),
        ([(b"authorization", b"Bearer " + FOREIGN), (b"x-api-key", KEY)], Kind.KEY, KEY),
        ([(b"authorization", b"Bearer " + KEY)], Kind.KEY, KEY),
        # cookies that only look like it
        ([(b"cookie", b"xapicharge=1; apicharge2=2; note=apicharge")], Kind.NONE, b""),
        ([(b"cookie", b"note=apicharge"), (b"x-api-key", KEY)], Kind.KEY, KEY),
        ([(b"cookie", b"APICHARGE=" + TOKEN)], Kind.NONE, b""),
        # a name of ours that holds no token, or two
        ([(b"apicharge", b"%7B%22accessToken%22%7D"), (b"x-api-key", KEY)], Kind.MALFORMED, b""),
        ([(b"apicharge", TOKEN), (b"apicharge", TOKEN)], Kind.MALFORMED, b""),
        ([(b"cookie", b"apicharge=" + TOKEN + b"; apicharge=" + OTHER)], Kind.MALFORMED, b""),
        ([(b"cookie", b"apicharge=" + TOKEN), (b"cookie", b"apicharge=" + TOKEN)], Kind.MALFORMED, b""),
        ([(b"cookie", b'apicharge="' + TOKEN + b'"')], Kind.MALFORMED, b""),
        ([(b"cookie", b"apicharge=")], Kind.MALFORMED, b""),
        ([(b"apicharge", TOKEN + b"." + b"a" * 5000)], Kind.MALFORMED, b""),
        ([(b"apicharge", FOREIGN)], Kind.MALFORMED, b""),
    ],
)
def test_the_order_of_credentials(headers: list[tuple[bytes, bytes]], kind: Kind, value: bytes) -> None:
    assert credential(headers) == (kind, value)


@pytest.mark.parametrize(
    ("value", "theirs", "ours"),
    [
        (b"a=b; apicharge=x; c=d", b"a=b; c=d", [b"x"]),
        (b"apicharge=x", b"", [b"x"]),
        (b"apicharge=x; a=b", b"a=b", [b"x"]),
        (b"a=b;apicharge=x=y;  c=d", b"a=b;  c=d", [b"x=y"]),
        (b"a=b; apicharge; c", b"a=b; apicharge; c", []),
        (b"apicharge =x", b"", [b"x"]),
    ],
)
def test_only_our_cookie_is_taken_out(value: bytes, theirs: bytes, ours: list[bytes]) -> None:
    assert parted_cookie(value) == (theirs, ours)
