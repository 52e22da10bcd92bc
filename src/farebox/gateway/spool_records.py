"""What stands in a spool file: the records as values, and how they are written and read.

Each record is framed as ``length u32 · crc32 u32 · type u8 · payload`` (little endian, the checksum covers type and payload)::

    ADMITTED  number u64, microseconds u64, request id, lease ids, stub        before the call is forwarded
    DONE      number u64, status u16, bytes up u64, bytes down u64, flags u8, credits i32, (lease id u64, used i64) …
                                              before the answer's last bytes go out
    CARRIED   as ADMITTED                     calls still open when the file was begun
    LEASES    (lease id u64, used i64) …      what was used of each open lease when the file was begun
    STUB      id u32, stub                    only where detail is dropped
    COUNTED   microseconds u64, stub id u32, lease ids
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from farebox.app.ports.spool import Rider
from farebox.base.errors import InvariantError
from farebox.domain.access import FareKind

_crc32 = zlib.crc32

MAGIC: Final = b"FBXSPL2\n"
RECORD_BYTES_MAX: Final = 65_536
LEASES_PER_RECORD: Final = 1_000

ADMITTED, DONE, CARRIED, LEASES, STUB, COUNTED = 1, 2, 3, 4, 5, 6

_FRAME = struct.Struct("<IIB")
_OPENING = struct.Struct("<QQB")
_DONE = struct.Struct("<QHQQBi")
_LEASE = struct.Struct("<Qq")
_COUNTED = struct.Struct("<QIB")
#: Flags of a done record, and of a rider.
_BILLED, _CREDITS_SAID = 1, 2
BILLED_WHEN_ORPHANED, _METERED = 1, 2
#: The checksum begins with the type.
_SEEDS = {kind: zlib.crc32(bytes((kind,))) for kind in range(ADMITTED, COUNTED + 1)}
_ADMITTED_SEED, _DONE_SEED = _SEEDS[ADMITTED], _SEEDS[DONE]
_LEASE_IDS = [struct.Struct(f"<{n}Q") for n in range(256)]


# ── records as values ────────────────────────────────────────────────────────────────────────────────────────────────


class AdmittedRecord(NamedTuple):
    """A call let through. ``carried``: noted before, repeated because it was still open when the file was begun."""

    number: int
    at_us: int
    request_id: str
    lease_ids: tuple[int, ...]
    stub: bytes
    carried: bool = False


class DoneRecord(NamedTuple):
    number: int
    status: int
    bytes_up: int
    bytes_down: int
    billed: bool
    used: tuple[tuple[int, int], ...] = ()
    credits: int | None = None


class LeasesRecord(NamedTuple):
    """Lease id → units used (in flight included) at this point of the file."""

    used: tuple[tuple[int, int], ...]


class StubRecord(NamedTuple):
    stub_id: int
    stub: bytes


class CountedRecord(NamedTuple):
    """A call billed as it stands, without id or details."""

    at_us: int
    stub_id: int
    lease_ids: tuple[int, ...]


Record = AdmittedRecord | DoneRecord | LeasesRecord | StubRecord | CountedRecord


def encode(record: Record) -> bytes:
    """One framed record."""
    match record:
        case AdmittedRecord():
            payload = _opening(record.number, record.at_us, record.request_id, record.lease_ids, record.stub)
            return _framed(CARRIED if record.carried else ADMITTED, payload)
        case DoneRecord():
            return _framed(DONE, _done(record))
        case LeasesRecord():
            return _framed(LEASES, b"".join(_LEASE.pack(*pair) for pair in record.used))
        case StubRecord():
            return _framed(STUB, record.stub_id.to_bytes(4, "little") + record.stub)
        case CountedRecord():
            return _framed(COUNTED, _counted(record.at_us, record.stub_id, record.lease_ids))


@dataclass(frozen=True, slots=True)
class Read:
    """The records of a stretch of a file, each with the offset behind it; ``end`` is behind the last whole one.

    ``damaged``: what stands at ``end`` is no record; otherwise the stretch ends there or within a record.
    """

    records: list[tuple[Record, int]]
    end: int
    damaged: bool


def decode(data: bytes, offset: int = 0, *, base: int = 0) -> Read:
    """Read the whole records of ``data[offset:]``. ``base`` is where ``data`` begins in the file."""
    records: list[tuple[Record, int]] = []
    size, frame, read_frame = len(data), _FRAME.size, _FRAME.unpack_from
    while offset + frame <= size:
        length, checksum, kind = read_frame(data, offset)
        if length > RECORD_BYTES_MAX or not ADMITTED <= kind <= COUNTED:
            return Read(records, base + offset, True)
        end = offset + frame + length
        if end > size:
            break
        if _crc32(data[offset + 8 : end]) != checksum:
            return Read(records, base + offset, True)
        try:
            record = _decoded(kind, data[offset + frame : end])
        except (struct.error, UnicodeDecodeError, IndexError):
            return Read(records, base + offset, True)
        offset = end
        records.append((record, base + offset))
    return Read(records, base + offset, False)


def _decoded(kind: int, payload: bytes) -> Record:
    if kind == DONE:
        number, status, up, down, flags, credits = _DONE.unpack_from(payload)
        return DoneRecord(
            number,
            status,
            up,
            down,
            bool(flags & _BILLED),
            tuple(_LEASE.iter_unpack(payload[_DONE.size :])) if len(payload) > _DONE.size else (),
            credits if flags & _CREDITS_SAID else None,
        )
    if kind in (ADMITTED, CARRIED):
        number, at_us, id_length = _OPENING.unpack_from(payload)
        at = _OPENING.size + id_length
        request_id = payload[_OPENING.size : at].decode("ascii")
        leases = _LEASE_IDS[payload[at]]
        lease_ids = leases.unpack_from(payload, at + 1)
        return AdmittedRecord(
            number, at_us, request_id, lease_ids, payload[at + 1 + leases.size :], kind == CARRIED
        )
    if kind == LEASES:
        return LeasesRecord(tuple(_LEASE.iter_unpack(payload)))
    if kind == STUB:
        return StubRecord(struct.unpack_from("<I", payload)[0], payload[4:])
    at_us, stub_id, count = _COUNTED.unpack_from(payload)
    leases = _LEASE_IDS[count]
    if len(payload) != _COUNTED.size + leases.size:
        raise struct.error("a counted record of a wrong length")
    return CountedRecord(at_us, stub_id, leases.unpack_from(payload, _COUNTED.size))


def _framed(kind: int, payload: bytes) -> bytes:
    if len(payload) > RECORD_BYTES_MAX:
        raise InvariantError(f"a spool record of {len(payload)} bytes is too large")
    return _FRAME.pack(len(payload), zlib.crc32(payload, _SEEDS[kind]), kind) + payload


def _opening(number: int, at_us: int, request_id: str, lease_ids: Sequence[int], stub: bytes) -> bytes:
    name = request_id.encode("ascii")
    leases = len(lease_ids)
    return b"%b%b%c%b%b" % (
        _OPENING.pack(number, at_us, len(name)),
        name,
        leases,
        _LEASE_IDS[leases].pack(*lease_ids),
        stub,
    )


def _done(record: DoneRecord) -> bytes:
    flags = _BILLED * record.billed | _CREDITS_SAID * (record.credits is not None)
    known = _DONE.pack(
        record.number, record.status, record.bytes_up, record.bytes_down, flags, record.credits or 0
    )
    return known + b"".join(_LEASE.pack(*pair) for pair in record.used) if record.used else known


def admission(
    number: int, at_us: int, request_id: str, lease_ids: Sequence[int], stub: bytes
) -> tuple[bytes, bytes]:
    """A framed admitted record, and its payload for ``carried``. Each call writes one, so it is framed in place."""
    payload = _opening(number, at_us, request_id, lease_ids, stub)
    return _FRAME.pack(len(payload), _crc32(payload, _ADMITTED_SEED), ADMITTED) + payload, payload


def carried(payload: bytes) -> bytes:
    """The admitted record again, in a later file."""
    return _framed(CARRIED, payload)


def ending(
    number: int,
    status: int,
    bytes_up: int,
    bytes_down: int,
    billed: bool,
    used: Sequence[tuple[int, int]] = (),
    credits: int | None = None,
) -> bytes:
    """A framed done record."""
    if used or credits is not None:
        return encode(DoneRecord(number, status, bytes_up, bytes_down, billed, tuple(used), credits))
    payload = _DONE.pack(number, status, bytes_up, bytes_down, billed, 0)
    return _FRAME.pack(_DONE.size, _crc32(payload, _DONE_SEED), DONE) + payload


def count(at_us: int, stub_id: int, lease_ids: Sequence[int]) -> bytes:
    """A framed counted record."""
    return _framed(COUNTED, _counted(at_us, stub_id, lease_ids))


def _counted(at_us: int, stub_id: int, lease_ids: Sequence[int]) -> bytes:
    count = len(lease_ids)
    return _COUNTED.pack(at_us, stub_id, count) + _LEASE_IDS[count].pack(*lease_ids)


def encode_rider(rider: Rider) -> bytes:
    """One flag byte, then each text as ``length u16 · UTF-8``."""
    texts = (
        rider.fare,
        rider.route_id,
        rider.metric_key,
        rider.value,
        rider.customer_id,
        rider.grant_id,
        rider.pass_id,
        rider.payer,
    )
    encoded = [text.encode() for text in texts]
    if sum(map(len, encoded)) > RECORD_BYTES_MAX // 2:
        raise InvariantError("a rider's names are too long for a spool record")
    flags = BILLED_WHEN_ORPHANED * rider.billed_when_orphaned | _METERED * rider.metered
    return bytes((flags,)) + b"".join(len(e).to_bytes(2, "little") + e for e in encoded)


def decode_rider(stub: bytes) -> Rider:
    """The inverse of ``encode_rider``; ``ValueError`` when it is none."""
    texts: list[str] = []
    at = 1
    while at < len(stub):
        length = int.from_bytes(stub[at : at + 2], "little")
        at += 2 + length
        if at > len(stub):
            raise ValueError("a rider ends too early")
        texts.append(stub[at - length : at].decode())
    if len(texts) != 8:
        raise ValueError(f"a rider has {len(texts)} texts instead of 8")
    fare, route_id, metric_key, value, customer_id, grant_id, pass_id, payer = texts
    return Rider(
        cast(FareKind, fare),
        route_id,
        metric_key,
        value,
        customer_id,
        grant_id,
        pass_id,
        payer,
        bool(stub[0] & BILLED_WHEN_ORPHANED),
        bool(stub[0] & _METERED),
    )
