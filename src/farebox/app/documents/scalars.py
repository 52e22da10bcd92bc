"""The small things that documents are made of, each with its bounds: decimals, prices, times, durations, sizes, names.

Numbers may be written as strings or as numbers; both are read digit by digit into ``Decimal`` (the readers of JSON and
YAML never make a float of them). Nothing here rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, StringConstraints, WithJsonSchema

from farebox.app.documents.faults import fault, from_refused
from farebox.base.errors import Refused
from farebox.base.money import EXACT, Asset, Money, parse_decimal
from farebox.base.time import Interval, parse_instant, zone_named
from farebox.domain.catalog import PERIOD_DAYS_MAX, PERIOD_NAMES, interval_from_document

#: Bounds of any number, as ``base.money.parse_decimal`` reads it; prices are bounded closer by domain/catalog.py.
INTEGER_DIGITS_MAX: Final = 40
FRACTION_DIGITS_MAX: Final = 30

_DURATION = re.compile(r"(?P<number>[0-9]{1,9})\s?(?P<unit>ms|s|m|h|d|w)\Z", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
DURATION_S_MAX: Final = 100 * 366 * 86_400

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def plain_decimal(value: Any) -> Decimal:
    """A finite decimal of bounded size from a string or a number; raises the fault of anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal | float):
        raise fault("DECIMAL_MALFORMED", f'{_shown(value)} is not a number: write it like 12.5 or "12.5"')
    if isinstance(value, str):
        try:
            number = parse_decimal(value)
        except Refused as refused:
            raise from_refused(refused) from None
    elif isinstance(value, int):
        if value.bit_length() > 256:
            raise fault("DECIMAL_OUT_OF_BOUNDS", f"the number has more than {INTEGER_DIGITS_MAX} digits")
        number = Decimal(value)
    else:
        number = value if isinstance(value, Decimal) else Decimal(repr(value))
    if not number.is_finite():
        raise fault("DECIMAL_MALFORMED", "the number must be finite: NaN and Infinity are not amounts")
    exponent = number.as_tuple().exponent
    if number.adjusted() >= INTEGER_DIGITS_MAX or (
        isinstance(exponent, int) and -exponent > FRACTION_DIGITS_MAX
    ):
        raise fault(
            "DECIMAL_OUT_OF_BOUNDS",
            f"the number may have {INTEGER_DIGITS_MAX} digits before and {FRACTION_DIGITS_MAX} after the point",
        )
    return EXACT.add(number, Decimal(0)) if number else Decimal(0)  # 1E+2 as 100, -0 as 0, every digit kept


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _not_negative(number: Decimal) -> Decimal:
    if number < 0:
        raise fault("AMOUNT_NEGATIVE", f"{number:f} is negative: write zero or more")
    return number


def _positive(number: Decimal) -> Decimal:
    if number <= 0:
        raise fault("AMOUNT_NOT_POSITIVE", f"{number:f} is not more than zero")
    return number


DECIMAL_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [{"type": "string", "pattern": r"^-?[0-9]{1,40}(\.[0-9]{1,30})?$"}, {"type": "number"}]
}
_NOT_NEGATIVE_SCHEMA: Final = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "pattern": r"^[0-9]{1,40}(\.[0-9]{1,30})?$"},
            {"type": "number", "minimum": 0},
        ]
    }
)

NotNegative = Annotated[
    Decimal, BeforeValidator(plain_decimal), AfterValidator(_not_negative), _NOT_NEGATIVE_SCHEMA
]
Positive = Annotated[Decimal, BeforeValidator(plain_decimal), AfterValidator(_positive), _NOT_NEGATIVE_SCHEMA]


def _or_fault(read: Callable[[str], Any], expected: str, code: str) -> Callable[[Any], Any]:
    def reader(value: Any) -> Any:
        if not isinstance(value, str):
            raise fault(code, f"{_shown(value)} is not {expected}")
        try:
            return read(value)
        except Refused as refused:
            raise from_refused(refused) from None

    return reader


def _instant(value: Any) -> datetime:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value
    read = _or_fault(parse_instant, "a time such as 2026-11-21T10:00:00Z", "TIMESTAMP_MALFORMED")
    return read(value)  # type: ignore[no-any-return]


#: An aware instant in UTC; a plain date means midnight UTC.
Instant = Annotated[
    datetime, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})
]

#: ``"0.001 USDC"``: an amount and its asset.
Price = Annotated[
    Money,
    BeforeValidator(_or_fault(Money.parse, 'a price: write text such as "0.001 USDC"', "PRICE_MALFORMED")),
    WithJsonSchema({"type": "string", "examples": ["0.001 USDC"]}),
]

#: The currency or token a plan or a customer is counted in.
Currency = Annotated[
    Asset,
    BeforeValidator(_or_fault(Asset.named, "a currency: write a code such as USD", "ASSET_UNKNOWN")),
    WithJsonSchema({"type": "string", "examples": ["USD", "USDC"]}),
]


def seconds_of(text: str) -> float:
    """``"250ms"``, ``"30s"``, ``"5m"``, ``"1h"``, ``"30d"``, ``"2w"`` in seconds."""
    found = _DURATION.match(text)
    if found is None:
        raise fault(
            "DURATION_MALFORMED",
            f"{text[:40]!r} is not a duration: write a number and ms, s, m, h, d or w, such as 30s",
        )
    if found["unit"] == "ms":
        return int(found["number"]) / 1000
    return float(int(found["number"]) * _SECONDS[found["unit"]])


def _duration_s(value: Any) -> int:
    seconds = _timeout_s(value)
    if seconds < 1 or seconds != int(seconds):
        raise fault("DURATION_MALFORMED", f"{value!r} is not a whole number of seconds: write at least 1s")
    if seconds > DURATION_S_MAX:
        raise fault("DURATION_MALFORMED", f"{value!r} is longer than 100 years")
    return int(seconds)


def _timeout_s(value: Any) -> float:
    if not isinstance(value, str):
        raise fault(
            "DURATION_MALFORMED", f"{_shown(value)} has no unit: write a duration such as 30s, 1h or 30d"
        )
    return seconds_of(value)


_DURATION_SCHEMA: Final = WithJsonSchema(
    {"type": "string", "pattern": "^[0-9]{1,9} ?(ms|s|m|h|d|w)$", "examples": ["30s", "1h", "30d"]}
)

#: Whole seconds, at least one: how long a pass lasts.
DurationS = Annotated[int, BeforeValidator(_duration_s), _DURATION_SCHEMA]
#: Seconds, fractions allowed: how long something is waited for.
TimeoutS = Annotated[float, BeforeValidator(_timeout_s), _DURATION_SCHEMA]


def duration_text(seconds: float) -> str:
    """The shortest spelling that reads back the same: 3600 → ``1h``, 0.25 → ``250ms``."""
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    for unit in ("d", "h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds) // _SECONDS[unit]}{unit}"
    return f"{int(seconds)}s"


_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?)\s?(?P<unit>B|[kK]B|MB|GB|TB)\Z", re.ASCII)
_BYTES: Final = {
    "B": 1,
    "kB": 1_000,
    "KB": 1_000,
    "MB": 1_000_000,
    "GB": 1_000_000_000,
    "TB": 1_000_000_000_000,
}
SIZE_BYTES_MAX: Final = 10**15


def bytes_of(value: Any) -> int:
    """``50000``, ``"50kB"``, ``"1.5MB"`` in bytes; kB, MB, GB and TB are powers of 1000 (KB is taken for kB)."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := _SIZE.match(value)):
        exact = EXACT.multiply(Decimal(found["number"]), Decimal(_BYTES[found["unit"]]))
        size = int(exact)
        if size != exact:
            raise fault("SIZE_MALFORMED", f"{value!r} is not a whole number of bytes")
    else:
        raise fault(
            "SIZE_MALFORMED",
            f"{_shown(value)} is not a size: write whole bytes, or a number and kB, MB, GB or TB (powers of 1000)",
        )
    if not 1 <= size <= SIZE_BYTES_MAX:
        raise fault("SIZE_MALFORMED", f"{_shown(value)} is out of bounds: write from 1 byte to 1000TB")
    return size


#: Bytes, at least one.
SizeBytes = Annotated[
    int,
    BeforeValidator(bytes_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": SIZE_BYTES_MAX},
                {"type": "string", "pattern": r"^[0-9]{1,15}(\.[0-9]{1,9})? ?(B|kB|KB|MB|GB|TB)$"},
            ],
            "examples": ["50MB", 1_000_000],
        }
    ),
]


def size_text(size_bytes: int) -> str | int:
    """The shortest spelling that reads back the same: 50000000 → ``50MB``, 1234 → 1234."""
    for unit in ("TB", "GB", "MB", "kB"):
        if size_bytes and size_bytes % _BYTES[unit] == 0:
            return f"{size_bytes // _BYTES[unit]}{unit}"
    return size_bytes


def _no_control_characters(text: str) -> str:
    if _CONTROL.search(text):
        raise fault("TEXT_MALFORMED", "the text holds control characters: remove them")
    return text


def _identifier(pattern: str, what: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern, re.ASCII)

    def check(value: Any) -> str:
        if not isinstance(value, str) or not compiled.match(value):
            raise fault("NAME_MALFORMED", f"{_shown(value)} is not {what}")
        return value

    return check


_ID = r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,127}\Z"
_KEY = r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}\Z"

#: Names chosen by people for customers, plans, routes, upstreams, passes.
Id = Annotated[
    str,
    BeforeValidator(
        _identifier(
            _ID, "a name: use letters, digits and _ . : @ + -, at most 128, beginning with a letter or digit"
        )
    ),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,127}$"}),
]
#: Keys of metrics, features, plans and charges, as domain/catalog.py has them.
Key = Annotated[
    str,
    BeforeValidator(
        _identifier(
            _KEY, "a key: use letters, digits and _ . : -, at most 100, beginning with a letter or digit"
        )
    ),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}$"}),
]

ShortText = Annotated[
    str, StringConstraints(strict=True, max_length=200), AfterValidator(_no_control_characters)
]
Name = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=200), AfterValidator(_no_control_characters)
]
LongText = Annotated[
    str, StringConstraints(strict=True, max_length=4000), AfterValidator(_no_control_characters)
]


def _zone(value: Any) -> str:
    read = _or_fault(
        lambda text: zone_named(text) and text, "a time zone such as Europe/Warsaw", "TIMEZONE_UNKNOWN"
    )
    return read(value)  # type: ignore[no-any-return]


TimeZone = Annotated[
    str, BeforeValidator(_zone), WithJsonSchema({"type": "string", "examples": ["Europe/Warsaw"]})
]


def _interval(value: Any) -> Interval:
    try:
        return interval_from_document(value)
    except Refused as refused:
        raise from_refused(refused) from None


#: How long a plan's billing period is.
BillingPeriod = Annotated[
    Interval,
    BeforeValidator(_interval),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(PERIOD_NAMES)},
                {
                    "type": "object",
                    "properties": {"days": {"type": "integer", "minimum": 1, "maximum": PERIOD_DAYS_MAX}},
                    "required": ["days"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
