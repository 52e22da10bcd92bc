"""Usage events as rows: their ids, the digests of their bodies, and the lines that COPY takes.

A batch is a thousand events and there are many batches, so everything here works on whole columns: one call into C for a
thousand values where one for each would cost more than PostgreSQL takes to store them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from farebox.app.events import IncomingEvent
from farebox.base.money import plain

__all__ = ["digests", "event_columns", "event_ids", "event_lines", "key_lines"]

_BASE_32: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS: Final = [a + b for a in _BASE_32 for b in _BASE_32]

_canonical: Final = msgspec.json.Encoder(order="sorted")
_objects: Final = msgspec.json.Decoder(list[dict[str, Any]])


def event_ids(count: int) -> list[str]:
    """Ids in the layout of ``base.ids.new_id``: one random head a batch (62 bits), then consecutive numbers."""
    start = int.from_bytes(os.urandom(2)) << 3
    number = (int(time.time() * 1000) << 62) | (int.from_bytes(os.urandom(8)) >> 2)
    head = "evt_" + "".join([_PAIRS[(number >> shift) & 0x3FF] for shift in range(100, -1, -10)])
    return [f"{head}{_PAIRS[n >> 10]}{_PAIRS[n & 0x3FF]}" for n in range(start, start + count)]


def digests(events: Sequence[IncomingEvent]) -> list[str]:
    """One a body as sent, in hexadecimal. Two ways of writing the same properties, value or instant are the same body, and
    an event without a timestamp is the same one whenever it is sent again."""
    properties = _objects.decode(b"[" + b",".join([event.properties for event in events]) + b"]")
    quantities: dict[Decimal, str] = {event.value: "" for event in events}
    for value in quantities:
        quantities[value] = plain(value)
    bodies = _canonical.encode_lines(
        [
            (
                e.customer_id,
                e.metric_key,
                quantities[e.value],
                e.timestamp and _utc(e.timestamp),
                its_properties,
            )
            for e, its_properties in zip(events, properties, strict=True)
        ]
    )
    # JSON has no line end within it. The last line is followed by one, too.
    return [hashlib.blake2b(body, digest_size=16).hexdigest() for body in bodies.split(b"\n")[:-1]]


def key_lines(keys: Sequence[str], ids: Iterable[str], digests: Iterable[str]) -> str:
    """Keys, ids and digests as ``store.usage.COPY_KEYS`` takes them."""
    rows = zip(_escaped(keys), ids, digests, strict=True)
    return "".join([f"{key}\t{event_id}\t\\\\x{digest}\n" for key, event_id, digest in rows])


def event_lines(
    events: Sequence[IncomingEvent], ids: Sequence[str], times: Sequence[datetime], batch_id: int
) -> str:
    """Events as ``store.usage.COPY_EVENTS`` takes them. Customers and metrics are known keys and hold nothing to escape."""
    c = event_columns(events, ids, times)
    rows = zip(
        ids,
        c["customers"],
        c["metrics"],
        c["values"],
        c["times"],
        _escaped(c["keys"]),
        _escaped(c["properties"]),
        strict=True,
    )
    end = f"\t{batch_id}\n"
    return end.join(map("\t".join, rows)) + end


def event_columns(
    events: Sequence[IncomingEvent], ids: Sequence[str], times: Sequence[datetime]
) -> dict[str, Sequence[str]]:
    """Events as ``store.usage.insert_events`` takes them. A line end in properties stands between values, never in one."""
    return {
        "event_ids": ids,
        "customers": [event.customer_id for event in events],
        "metrics": [event.metric_key for event in events],
        "values": _texts([event.value for event in events]),
        "times": _texts(times),
        "keys": [event.idempotency_key for event in events],
        "properties": [str(event.properties, "utf-8").replace("\n", " ") for event in events],
    }


def _texts(values: Sequence[Decimal] | Sequence[datetime]) -> list[str]:
    """Each as JSON writes it, which PostgreSQL reads as well: ``1E+2``, ``2026-11-21T10:00:00.5+01:00``."""
    return msgspec.json.encode(values).decode()[2:-2].split('","')


def _escaped(texts: Sequence[str]) -> Sequence[str]:
    """For COPY's text format. What has none of its special characters, as almost every batch, is returned as it is."""
    whole = "".join(texts)
    if not any(special in whole for special in "\\\t\n\r"):
        return texts
    return [
        text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
        for text in texts
    ]


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo is UTC else at.astimezone(UTC)
