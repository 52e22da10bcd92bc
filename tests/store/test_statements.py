"""Every statement of the store fits the schema, and the hot ones use the index that was made for them.

A statement is a module constant annotated ``LiteralString`` (or a mapping of such). To hold another one to its index, add
a line to ``HOT``.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import psycopg
import pytest

import farebox.store
from tests.database import a_database

_PREPARABLE = re.compile(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE|MERGE|VALUES)\b", re.IGNORECASE)
_COPY = re.compile(r"\s*COPY\b", re.IGNORECASE)
#: Run as they are, in a transaction that is rolled back.
_UTILITY = re.compile(r"\s*(CREATE|ALTER|DROP|LOCK|SET|LISTEN|NOTIFY|ANALYZE|TRUNCATE)\b", re.IGNORECASE)
_PARAMETER = re.compile(r"%(?:\((?P<name>\w+)\)[sbt]|(?P<positional>[sbt])|(?P<percent>%))")


@dataclass(frozen=True)
class Statement:
    """One constant. ``sql`` is what its module says."""

    module: str
    name: str
    sql: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def numbered(self) -> tuple[str, int]:
        """With ``$n`` for each parameter, as the server sees it, and how many there are."""
        numbers: dict[str, int] = {}
        positional = 0

        def number(found: re.Match[str]) -> str:
            nonlocal positional
            if found["percent"]:
                return "%"
            if found["name"]:
                return f"${numbers.setdefault(found['name'], len(numbers) + 1)}"
            positional += 1
            return f"${positional}"

        return _PARAMETER.sub(number, self.sql), len(numbers) + positional


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(farebox.store.__path__, "farebox.store."):
        yield importlib.import_module(found.name)


def statements() -> list[Statement]:
    """Every statement; pieces that others are put together from (they begin with no verb) are seen in those others."""
    found = []
    for module in modules():
        short = module.__name__.removeprefix("farebox.store.")
        for name, annotation in vars(module).get("__annotations__", {}).items():
            if "LiteralString" not in str(annotation):
                continue
            value = getattr(module, name, None)
            if isinstance(value, str):
                found.append(Statement(short, name, value))
            elif isinstance(value, Mapping):
                found += [Statement(short, f"{name}[{key}]", sql) for key, sql in value.items()]
    return [s for s in found if any(kind.match(s.sql) for kind in (_PREPARABLE, _COPY, _UTILITY))]


ALL = {str(statement): statement for statement in statements()}


@pytest.fixture(scope="module")
def schema_url(database_server: tuple[str, str]) -> Iterator[str]:
    """One migrated database for all of these: nothing here is committed."""
    with a_database(*database_server) as url:
        yield url


@pytest.mark.parametrize("name", ALL)
def test_every_statement_fits_the_schema(name: str, schema_url: str) -> None:
    statement = ALL[name]
    numbered, _ = statement.numbered()
    try:
        with psycopg.connect(schema_url) as connection:
            if _PREPARABLE.match(statement.sql):
                connection.execute(b"PREPARE statement AS " + numbered.encode())
            elif _COPY.match(statement.sql):
                with connection.cursor().copy(statement.sql.encode()):
                    pass
            else:
                connection.execute(statement.sql.encode())
            connection.rollback()
    except psycopg.Error as error:
        pytest.fail(f"farebox/store/{statement.module}.py, {statement.name}: {error}")


#: statement → the index (or a pattern of its name) that it must be able to use
HOT = {
    "jobs.CLAIM": "job_due",
    "jobs.COMPLETE": "job_pkey",
    "api_keys.BY_HASH": "api_key_hash_unique",
    "customers.LOCK": "customer_pkey",
    "entitlements.STANDING": "limit_counter_pkey",
    "idempotency.FORGET": "idempotent_answer_age",
    "idempotency.GET": "idempotent_answer_pkey",
    "invoices.COVERS": "invoiced_period_unique",
    "invoices.LATE": r"usage_event_\w*customer_id_metric_key_timestamp_idx|usage_event_read",
    "usage.CLAIM_KEYS": "usage_event_key_pkey",
    "usage.DAYS": "usage_day_pkey",
    "usage.FOLD": r"usage_event_\w*batch_id_idx|usage_event_batch",
    "usage.KNOWN": "limit_counter_metric",
    "usage.LAG": "ingest_batch_unfolded",
    "usage.OWNERS": "usage_event_key_pkey",
    "usage.SEED": r"usage_event_\w*customer_id_metric_key_timestamp_idx|usage_event_read",
    "usage.USED[sum]": r"usage_event_\w*customer_id_metric_key_timestamp_idx|usage_event_read",
    "grants._BY_CUSTOMER_KEY": "customer_key_hash_unique",
    "grants._BY_SUBJECT": "admission_grant_subject_unique",
    "limits._COUNTED": "limit_counter_pkey",
    "limits._FREE_ABANDONED": "lease_open_counter",
    "limits._GAIN": "lease_open_counter",
    "limits._KEEP": "lease_pkey",
    "limits._MINE": "lease_open_counter",
    "limits._OWE": "lease_open_counter",
    "limits._TAKE": "limit_counter_pkey",
    "limits._WHY_NOT": "lease_open_counter",
    "payments._FIND": "payment_pkey",
    "sandbox._LOCK": "sandbox_account_pkey",
    "spool._DELIVERED": "spool_batch_pkey",
    "subscriptions.OF_CUSTOMER": "subscription_customer",
}


@pytest.mark.parametrize("name", HOT)
def test_a_hot_statement_uses_its_index(name: str, schema_url: str) -> None:
    assert name in ALL, f"{name} is in HOT, but farebox.store has no such statement: was it renamed?"
    index = HOT[name]
    numbered, parameters = ALL[name].numbered()
    with psycopg.connect(schema_url) as connection:
        # The tables are empty, where reading them whole is best; forbidden to do so, the planner shows what it can do.
        # A generic plan is what a prepared statement gets, whatever the values.
        # Partitions stay in it, although no value (NULL) leads to one.
        connection.execute(
            "SET enable_seqscan = off; SET enable_partition_pruning = off; SET plan_cache_mode = force_generic_plan"
        )
        connection.execute(b"PREPARE statement AS " + numbered.encode())
        values = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
        plan = "\n".join(row[0] for row in connection.execute(f"EXPLAIN EXECUTE statement{values}".encode()))
        connection.rollback()

    assert re.search(rf"using ({index})\b|Index Scan on ({index})\b|Arbiter Indexes: ({index})\b", plan), (
        f"{name} does not use {index}:\n{plan}"
    )
