"""How a usage event is written on the wire, and the bounds that need no database.

The shape is read by msgspec (under a microsecond an event), and what it would let pass is refused here: numbers that are
not plain, times without an offset, texts and properties that PostgreSQL could not store. Event batches are the one place
where duplicate JSON keys are not looked for; the last one counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from farebox.base.errors import Reason, Refused, refuse
from farebox.base.money import parse_decimal
from farebox.base.time import parse_instant
from farebox.domain.catalog import QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX, decimal_faults

BATCH_EVENTS_MAX: Final = 1_000
IDEMPOTENCY_KEY_CHARS_MAX: Final = 255
NAME_CHARS_MAX: Final = 100
PROPERTIES_BYTES_MAX: Final = 8_192
PROPERTIES_DEPTH_MAX: Final = 16

_EMPTY: Final = msgspec.Raw(b"{}")
_ONE: Final = Decimal(1)

# A number with an exponent of three digits: jsonb takes some of these and not others, so none is taken.
_VAST_NUMBER = re.compile(rb"[0-9][eE][+-]?[0-9]{3}")
#: Every digit as 0 and E as e: "0e" is then where an exponent may be, found ten times faster than by the expression.
_EXPONENTS_SHOWN: Final = bytes.maketrans(b"123456789E", b"000000000e")


class IncomingEvent(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One event as sent. ``value`` defaults to 1, ``timestamp`` to now (the business date).

    Make one by ``read_event``, ``read_batch`` or ``event_from``: they check the bounds.
    """

    customer_id: str
    metric_key: str
    idempotency_key: str
    value: Decimal = _ONE
    timestamp: datetime | None = None
    properties: msgspec.Raw = _EMPTY  # a JSON object, kept as it was written


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[IncomingEvent]


class _LooseBatch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[msgspec.Raw]


_event_decoder: Final = msgspec.json.Decoder(IncomingEvent)
_batch_decoder: Final = msgspec.json.Decoder(_Batch)
_loose_batch_decoder: Final = msgspec.json.Decoder(_LooseBatch)
_properties_decoder: Final = msgspec.json.Decoder(dict[str, Any])


def read_event(body: bytes) -> IncomingEvent:
    """One event from JSON. Refuses ``EVENT_MALFORMED`` and the faults of ``event_faults``, each with its field."""
    read = _read(body)
    if isinstance(read, Reason):
        raise Refused(read)
    return read


def read_batch(body: bytes) -> list[IncomingEvent | Reason]:
    """``{"events": [...]}``. An event that cannot be taken is its ``Reason``, in its place.

    Refuses as a whole what is no such object (``BATCH_MALFORMED``), ``BATCH_EMPTY`` and ``BATCH_TOO_LARGE``.
    """
    try:
        events = _batch_decoder.decode(body).events
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            loose = _loose_batch_decoder.decode(body).events
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise refuse("BATCH_MALFORMED", f'send {{"events": [...]}}: {_first_line(error)}') from error
        _check_size(len(loose))
        return [_read(bytes(raw)) for raw in loose]
    _check_size(len(events))
    return list(events) if _all_fine(events) else [_fault(event) or event for event in events]


def event_from(document: dict[str, Any]) -> IncomingEvent:
    """One event from plain values that were read elsewhere (a CSV row, a command line): texts and a properties dict.

    Refuses as ``read_event``.
    """
    known = {"customer_id", "metric_key", "idempotency_key", "value", "timestamp", "properties"}
    if unknown := sorted(set(document) - known):
        raise refuse("EVENT_MALFORMED", "an event has no such field", unknown[0])
    for name in ("customer_id", "metric_key", "idempotency_key"):
        if not isinstance(document.get(name), str):
            raise refuse("EVENT_MALFORMED", "a text is needed", name)
    value, timestamp = document.get("value"), document.get("timestamp")
    event = IncomingEvent(
        customer_id=document["customer_id"],
        metric_key=document["metric_key"],
        idempotency_key=document["idempotency_key"],
        value=_ONE if value is None else parse_decimal(str(value), "value"),
        timestamp=None if timestamp is None else parse_instant(str(timestamp), "timestamp"),
        properties=msgspec.Raw(json.dumps(document.get("properties") or {}).encode()),
    )
    if fault := _fault(event):
        raise Refused(fault)
    return event


def _read(body: bytes) -> IncomingEvent | Reason:
    try:
        event = _event_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Reason("EVENT_MALFORMED", _first_line(error), _field_of(error))
    return _fault(event) or event


def _fault(event: IncomingEvent) -> Reason | None:
    """The first thing wrong with an event that needs no database to see. Runs for every event: the common case is quick."""
    key, value, timestamp, properties = event.idempotency_key, event.value, event.timestamp, event.properties
    if not 0 < len(key) <= IDEMPOTENCY_KEY_CHARS_MAX or not key.isprintable():
        return Reason(
            "IDEMPOTENCY_KEY_INVALID",
            f"an event needs a key of 1 to {IDEMPOTENCY_KEY_CHARS_MAX} printable characters",
            "idempotency_key",
        )
    if value is not _ONE and not _plainly_fine(value):
        for fault in decimal_faults(value, "value", QUANTITY_DIGITS_MAX, QUANTITY_PLACES_MAX):
            return fault
    if timestamp is not None and timestamp.tzinfo is None:
        return Reason("TIMESTAMP_MALFORMED", "a time needs an offset: 2026-11-21T10:00:00Z", "timestamp")
    if not (event.customer_id.isprintable() and 0 < len(event.customer_id) <= NAME_CHARS_MAX):
        return _name_fault("customer_id")
    if not (event.metric_key.isprintable() and 0 < len(event.metric_key) <= NAME_CHARS_MAX):
        return _name_fault("metric_key")
    if properties is not _EMPTY:
        raw = bytes(properties)
        # The decoder has checked the syntax of what it kept raw, but neither its text nor the size of its numbers.
        simple = len(raw) <= PROPERTIES_BYTES_MAX and raw.isascii() and b"\\u" not in raw and raw[:1] == b"{"
        if not simple or raw.count(b"{") + raw.count(b"[") > PROPERTIES_DEPTH_MAX or _VAST_NUMBER.search(raw):
            return _properties_fault(raw)
    return None


def _all_fine(events: Sequence[IncomingEvent]) -> bool:
    """Whether a short look at whole columns finds all events without a fault. If not, ``_fault`` says which has one, if any.

    A batch of a thousand takes a third of the time that ``_fault`` takes for each: what runs here runs in C.
    """
    keys = [event.idempotency_key for event in events]
    names = [event.customer_id for event in events] + [event.metric_key for event in events]
    lengths = [*map(len, keys)]
    if not (min(lengths) > 0 and max(lengths) <= IDEMPOTENCY_KEY_CHARS_MAX and "".join(keys).isprintable()):
        return False
    lengths = [*map(len, names)]
    if not (min(lengths) > 0 and max(lengths) <= NAME_CHARS_MAX and "".join(names).isprintable()):
        return False
    if not all(event.timestamp is None or event.timestamp.tzinfo is not None for event in events):
        return False
    values = msgspec.json.encode([event.value for event in events]).strip(b"[]").split(b",")
    if max(map(len, values)) > QUANTITY_PLACES_MAX or b"".join(values).translate(None, b'0123456789."'):
        return False
    properties = [event.properties for event in events if event.properties is not _EMPTY]
    return not properties or _all_properties_fine(properties)


def _all_properties_fine(properties: Sequence[msgspec.Raw]) -> bool:
    """As ``_all_fine``: flat ASCII objects on one line each, with no escaped character and nothing like a vast number."""
    lines = b"\n" + b"\n".join(properties)
    count = len(properties)
    return (
        lines.isascii()
        and lines.count(b"\n") == lines.count(b"\n{") == lines.count(b"{") == count
        and b"[" not in lines
        and b"\\u" not in lines
        and max(map(len, lines.split(b"\n"))) <= PROPERTIES_BYTES_MAX
        and (b"0e" not in lines.translate(_EXPONENTS_SHOWN) or not _VAST_NUMBER.search(lines))
    )


def _name_fault(field: str) -> Reason:
    return Reason("EVENT_MALFORMED", f"1 to {NAME_CHARS_MAX} printable characters are needed", field)


def _properties_fault(raw: bytes) -> Reason | None:
    if len(raw) > PROPERTIES_BYTES_MAX:
        return Reason("PROPERTIES_TOO_LARGE", f"at most {PROPERTIES_BYTES_MAX} bytes", "properties")
    if raw[:1] != b"{":
        return Reason("EVENT_MALFORMED", "properties is an object", "properties")
    try:
        properties = _properties_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Reason("EVENT_MALFORMED", _first_line(error), "properties")
    if _too_deep(properties):
        return Reason(
            "PROPERTIES_MALFORMED", f"at most {PROPERTIES_DEPTH_MAX} levels are taken", "properties"
        )
    if b"\\u" in raw and not _all_storable(properties):
        return Reason("PROPERTIES_MALFORMED", "U+0000 and lone surrogates cannot be stored", "properties")
    if _VAST_NUMBER.search(raw) and _has_vast_number(raw):
        return Reason("PROPERTIES_MALFORMED", "a number's exponent has at most two digits", "properties")
    return None


def _plainly_fine(value: Decimal) -> bool:
    """Whether a short look is enough: digits with at most one point, far within the bounds."""
    text = str(value)
    return len(text) <= QUANTITY_PLACES_MAX and text.isascii() and text.replace(".", "", 1).isdecimal()


def _all_storable(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return all(_all_storable(k) and _all_storable(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_all_storable(v) for v in value)
    return True


def _has_vast_number(raw: bytes) -> bool:
    found = False

    def note(text: str) -> float:
        nonlocal found
        found = found or _VAST_NUMBER.search(text.encode()) is not None
        return 0.0

    json.loads(raw, parse_float=note)
    return found


def _too_deep(properties: Any) -> bool:
    """Level by level, so that no depth can exhaust the stack."""
    level = [properties]
    for _ in range(PROPERTIES_DEPTH_MAX):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)


def _check_size(events: int) -> None:
    if events == 0:
        raise refuse("BATCH_EMPTY", "a batch has at least one event", "events")
    if events > BATCH_EVENTS_MAX:
        raise refuse("BATCH_TOO_LARGE", f"a batch has at most {BATCH_EVENTS_MAX} events", "events")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]


def _field_of(error: Exception) -> str | None:
    """msgspec says where: "Expected `str`, got `int` - at `$.metric_key`" or "… missing required field `metric_key`"."""
    found = re.search(r"`\$\.([A-Za-z0-9_.\[\]]+)`|field `([A-Za-z0-9_]+)`", str(error))
    return found and (found[1] or found[2])
