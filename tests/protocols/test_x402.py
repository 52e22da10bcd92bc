"""x402 on the wire: what is written is read back, by us and by the published package; the rest is refused."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from x402.http import utils
from x402.schemas import PaymentPayload as TheirPayload

from farebox.base.errors import Refused
from farebox.protocols.evm import TransferAuthorization
from farebox.protocols.x402 import (
    HEADER_CHARACTERS_MAX,
    ExactEvmPayload,
    PaymentPayload,
    PaymentRequired,
    PaymentRequirements,
    Resource,
    SettlementResponse,
    decode_header,
    encode_header,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
NUMBERS = st.integers(0, 10**78 - 1)
ADDRESSES = st.binary(min_size=20, max_size=20)
REQUIREMENTS = st.builds(
    PaymentRequirements,
    scheme=st.sampled_from(["exact", "upto"]),
    network=st.sampled_from(["eip155:84532", "stellar:testnet", "solana:5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"]),
    amount=NUMBERS,
    asset=TEXTS,
    pay_to=TEXTS,
    max_timeout_s=st.integers(0, 10**9),
    extra=st.dictionaries(TEXTS, TEXTS | st.booleans() | st.integers(0, 99), max_size=3),
)
RESOURCES = st.builds(Resource, url=TEXTS, description=st.none() | TEXTS, mime_type=st.none() | TEXTS)
EVM_PAYLOADS = st.builds(
    ExactEvmPayload,
    st.builds(
        TransferAuthorization,
        ADDRESSES, ADDRESSES, NUMBERS, NUMBERS, NUMBERS, st.binary(min_size=32, max_size=32),
    ),
    st.binary(min_size=65, max_size=65),
)  # fmt: skip
PAYMENTS = st.builds(
    PaymentPayload,
    accepted=REQUIREMENTS,
    payload=EVM_PAYLOADS.map(ExactEvmPayload.to_wire),
    resource=st.none() | RESOURCES,
    extensions=st.dictionaries(TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=2), max_size=2),
)


@given(PAYMENTS)
@settings(deadline=None)
def test_a_payment_is_read_back_as_it_was_written(payment: PaymentPayload):
    assert PaymentPayload.from_wire(decode_header(encode_header(payment.to_wire()))) == payment
    evm = payment.exact_evm()
    assert ExactEvmPayload.to_wire(evm) == payment.payload


@given(
    st.builds(
        PaymentRequired,
        resource=st.none() | RESOURCES,
        accepts=st.lists(REQUIREMENTS, max_size=3).map(tuple),
        error=st.none() | TEXTS,
    )
)
@settings(deadline=None)
def test_a_challenge_is_read_back_as_it_was_written(required: PaymentRequired):
    header = encode_header(required.to_wire())
    assert PaymentRequired.from_wire(decode_header(header)) == required
    theirs = utils.decode_payment_required_header(header.decode())
    assert [o.amount for o in theirs.accepts] == [str(o.amount) for o in required.accepts]  # type: ignore[union-attr]


@given(
    st.builds(
        SettlementResponse,
        success=st.booleans(), network=st.just("eip155:84532"), transaction=st.just("") | TEXTS, payer=st.none() | TEXTS,
        amount=st.none() | NUMBERS, error_reason=st.none() | TEXTS, error_message=st.none() | TEXTS,
    )
)  # fmt: skip
def test_a_receipt_is_read_back_as_it_was_written_and_by_the_published_package(receipt: SettlementResponse):
    header = encode_header(receipt.to_wire())
    assert SettlementResponse.from_wire(decode_header(header)) == receipt
    theirs = utils.decode_payment_response_header(header.decode())
    assert (theirs.success, theirs.transaction, theirs.payer) == (
        receipt.success,
        receipt.transaction,
        receipt.payer,
    )


@given(PAYMENTS)
@settings(deadline=None, max_examples=30)
def test_the_published_package_writes_what_we_read(payment: PaymentPayload):
    theirs = TheirPayload.model_validate(payment.to_wire())
    ours = PaymentPayload.from_wire(decode_header(utils.encode_payment_signature_header(theirs)))
    assert ours.accepted == payment.accepted
    assert ours.exact_evm() == payment.exact_evm()


def test_headers_are_raw_utf_8_in_padded_standard_base64():
    header = encode_header({"name": "USD₮0", "bytes": "ÿ?>"})
    assert base64.b64decode(header, validate=True).decode() == '{"name":"USD₮0","bytes":"ÿ?>"}'


def test_an_offer_differs_in_the_field_that_differs():
    offer = PaymentRequirements("exact", "eip155:84532", 5, "0xAA", "0xBB", 60, {"name": "USDC"})
    same = PaymentRequirements("exact", "eip155:84532", 5, "0xaa", "0xbb", 60, {"name": "USDC"})
    assert offer.difference(same) is None
    assert offer.difference(PaymentRequirements("exact", "eip155:84532", 6, "0xaa", "0xbb", 60)) == "amount"
    assert offer.difference(PaymentRequirements("exact", "eip155:84532", 5, "0xaa", "0xbb", 60)) == "extra"


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_header_raises_anything_but_a_refusal(value: bytes):
    _only_refused(value)
    _only_refused(base64.b64encode(value))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda i: (
            st.lists(i, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "x402Version",
                        "accepted",
                        "payload",
                        "scheme",
                        "network",
                        "amount",
                        "extra",
                        "authorization",
                        "value",
                        "signature",
                        "asset",
                    ]
                ),
                i,
                max_size=6,
            )
        ),
        max_leaves=25,
    )
)
def test_no_message_raises_anything_but_a_refusal(message: Any):
    _only_refused(base64.b64encode(json.dumps(message).encode()))


@given(PAYMENTS, st.data())
@settings(deadline=None)
def test_no_damaged_payment_raises_anything_but_a_refusal(payment: PaymentPayload, data: st.DataObject):
    wire = payment.to_wire()
    holder = data.draw(
        st.sampled_from([wire, wire["accepted"], wire["payload"], wire["payload"]["authorization"]])
    )
    key = data.draw(st.sampled_from(sorted(holder)))
    holder[key] = data.draw(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=80)
        | st.just([])
        | st.just({})
    )
    _only_refused(base64.b64encode(json.dumps(wire).encode()))


def test_a_header_beyond_the_cap_is_refused_unread():
    with pytest.raises(Refused) as refused:
        decode_header(b"!" * (HEADER_CHARACTERS_MAX + 1))
    assert str(HEADER_CHARACTERS_MAX) in refused.value.reason.message


def _only_refused(header: bytes) -> None:
    with contextlib.suppress(Refused):
        PaymentPayload.from_wire(decode_header(header)).exact_evm()
