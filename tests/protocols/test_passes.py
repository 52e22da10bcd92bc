"""Tokens of ours: one algorithm, our own keys, nothing a token says about itself believed."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from farebox.base.errors import Refused
from farebox.protocols.passes import PASS_TYP, QUOTE_TYP, Keyring, read_typ

SEED = b"k" * 32
KEYS = Keyring(SEED)
CLAIMS = {"aud": "farebox/sandbox", "jti": "pas_1", "exp": 1}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed_by_hand(header: Any, claims: Any = CLAIMS, seed: bytes = SEED) -> str:
    text = b64(json.dumps(header).encode()) + "." + b64(json.dumps(claims).encode())
    return text + "." + b64(SigningKey(seed).sign(text.encode()).signature)


def good_header() -> dict[str, Any]:
    return {"alg": "EdDSA", "kid": KEYS.jwks()[0]["kid"], "typ": PASS_TYP}


def refused(token: str, typ: str = PASS_TYP, audience: str = "farebox/sandbox") -> None:
    with pytest.raises(Refused) as caught:
        KEYS.verify(token, typ, audience)
    assert caught.value.reason.code == "token_invalid"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
        st.integers(0, 10**9) | st.booleans(),
        max_size=5,
    )
)
def test_a_token_is_read_back_as_it_was_written(claims: dict[str, Any]):
    claims |= CLAIMS
    token = KEYS.sign(PASS_TYP, claims)
    assert KEYS.verify(token, PASS_TYP, "farebox/sandbox").all() == claims
    assert read_typ(token) == PASS_TYP
    assert KEYS.sign(PASS_TYP, claims) == token


def test_a_token_written_by_the_book_is_read():
    assert KEYS.verify(signed_by_hand(good_header()), PASS_TYP, "farebox/sandbox").text("jti") == "pas_1"


@pytest.mark.parametrize(
    "change",
    [
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "ES256"},
        {"alg": None},
        {"kid": "other"},
        {"kid": None},
        {"typ": QUOTE_TYP},
        {"typ": None},
        {"jwk": {"kty": "OKP"}},
        {"jku": "http://127.0.0.1/keys"},
        {"x5u": "http://127.0.0.1/cert"},
        {"crit": ["exp"]},
        {"b64": False},
    ],
    ids=str,
)
def test_a_header_that_says_how_it_wants_to_be_checked_is_refused(change: dict[str, Any]):
    refused(signed_by_hand(good_header() | change))


def test_what_we_signed_for_another_purpose_is_refused():
    token = KEYS.sign(QUOTE_TYP, CLAIMS)
    refused(token)
    refused(KEYS.sign(PASS_TYP, CLAIMS), audience="farebox/live")
    refused(KEYS.sign(PASS_TYP, CLAIMS | {"aud": None}))
    refused(Keyring(b"x" * 32).sign(PASS_TYP, CLAIMS))
    refused(signed_by_hand(good_header(), seed=b"x" * 32))


def test_one_token_has_one_spelling():
    token = KEYS.sign(PASS_TYP, CLAIMS)
    head, claims, signature = token.split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = signature[:-1] + last[last.index(signature[-1]) ^ 1]
    for other in (
        f"{head}.{claims}.{twin}",
        f"{head}.{claims}.{signature}==",
        token + ".",
        token + "\n",
        " " + token,
        f"{head}.{claims}",
        f"{head}.{claims}.",
        "",
    ):
        refused(other)


def test_duplicate_claims_are_refused():
    text = (
        b64(json.dumps(good_header()).encode())
        + "."
        + b64(b'{"aud":"farebox/sandbox","aud":"farebox/sandbox"}')
    )
    refused(text + "." + b64(SigningKey(SEED).sign(text.encode()).signature))


@given(st.text(max_size=80) | st.binary(max_size=60).map(lambda b: f"{b64(b)}.{b64(b)}.{b64(b)}"))
def test_no_token_raises_anything_but_a_refusal(token: str):
    read_typ(token)
    with contextlib.suppress(Refused):
        KEYS.verify(token, PASS_TYP, "farebox/sandbox")


def test_keys_are_published_as_rfc_8037_says():
    # RFC 8037, appendix A: the seed, its public key and the key's thumbprint
    seed = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    published = Keyring(seed, older_seeds=[SEED]).jwks()
    assert published[0]["x"] == "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
    assert "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k".startswith(published[0]["kid"])
    assert published[0]["kty"] == "OKP"
    assert len(published) == 2
