"""Migrations: what is recorded, what is refused and with which remedy, and two that start at once."""

from __future__ import annotations

import threading
from datetime import UTC, date, datetime

import psycopg
import pytest

from farebox.base.errors import InvariantError, Refused, Unavailable
from farebox.store.migrate import (
    PARTITION_DAYS_AHEAD,
    PARTITION_DAYS_BACK,
    Migration,
    check,
    migrate,
    shipped,
)

HOUSE = shipped()


def extra(name: str, sql: str) -> Migration:
    return Migration.read(name, sql.encode())


def rows(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(statement).fetchall()  # type: ignore[call-overload, no-any-return]


def test_a_fresh_database_is_migrated_stamped_and_given_partitions(empty_database_url: str) -> None:
    report = migrate(empty_database_url, "sandbox")

    assert report.mode == "sandbox"
    assert report.applied == tuple(m.name for m in HOUSE)
    assert report.pending == ()
    assert report.partitions_made == PARTITION_DAYS_BACK + 1 + PARTITION_DAYS_AHEAD
    assert check(empty_database_url, "sandbox").pending == ()


def test_migrating_again_changes_nothing(database_url: str) -> None:
    report = migrate(database_url, "sandbox")

    assert report.applied == ()
    assert report.partitions_made == 0


@pytest.mark.parametrize("look", [migrate, check])
def test_a_sandbox_database_is_refused_in_live_mode(database_url: str, look: object) -> None:
    with pytest.raises(Refused) as refused:
        look(database_url, "live")  # type: ignore[operator]

    assert refused.value.reason.code == "MODE_MISMATCH"
    assert "start with --sandbox" in refused.value.reason.message


def test_a_live_database_is_refused_in_the_sandbox(live_database_url: str) -> None:
    with pytest.raises(Refused) as refused:
        migrate(live_database_url, "sandbox")

    assert refused.value.reason.code == "MODE_MISMATCH"
    assert rows(live_database_url, "SELECT mode FROM installation") == [("live",)]


def test_a_role_does_not_start_on_an_empty_database(empty_database_url: str) -> None:
    with pytest.raises(Refused) as refused:
        check(empty_database_url, "live")

    assert refused.value.reason.code == "DATABASE_NOT_MIGRATED"


def test_an_edited_migration_is_named(database_url: str) -> None:
    edited = [Migration.read(HOUSE[0].name, HOUSE[0].sql.encode() + b"\n-- a small change"), *HOUSE[1:]]

    for look in (migrate, check):
        with pytest.raises(Refused) as refused:
            look(database_url, "sandbox", migrations=edited)
        assert refused.value.reason.code == "MIGRATION_EDITED"
        assert HOUSE[0].name in refused.value.reason.message


def test_two_that_migrate_at_once_do_the_work_once(empty_database_url: str) -> None:
    slow = [*HOUSE, extra("9000_sleep_well.sql", "SELECT pg_sleep(0.3); CREATE TABLE well (slept boolean)")]
    reports = []

    def run() -> None:
        reports.append(migrate(empty_database_url, "sandbox", migrations=slow))

    both = [threading.Thread(target=run) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()

    assert sorted(len(report.applied) for report in reports) == [0, len(slow)]


def test_a_migration_that_fails_leaves_nothing_of_its_own(database_url: str) -> None:
    broken = [
        *HOUSE,
        extra("9000_add_shelf.sql", "CREATE TABLE shelf (id text)"),
        extra("9001_break_shelf.sql", "CREATE TABLE second_shelf (id text); SELECT 1 / 0"),
    ]

    with pytest.raises(Refused) as refused:
        migrate(database_url, "sandbox", migrations=broken)

    assert "9001_break_shelf.sql" in refused.value.reason.message
    assert rows(database_url, "SELECT to_regclass('shelf') IS NULL, to_regclass('second_shelf') IS NULL") == [
        (False, True)
    ]
    with pytest.raises(Refused) as behind:
        check(database_url, "sandbox", migrations=broken)
    assert behind.value.reason.code == "DATABASE_BEHIND"


def test_the_mode_is_stamped_with_the_first_tables_or_not_at_all(empty_database_url: str) -> None:
    broken = [extra("0001_create_house.sql", HOUSE[0].sql + "; SELECT 1 / 0")]

    with pytest.raises(Refused):
        migrate(empty_database_url, "live", migrations=broken)

    assert rows(empty_database_url, "SELECT to_regclass('installation')") == [(None,)]
    assert migrate(empty_database_url, "sandbox").mode == "sandbox"


def test_expanding_comes_before_the_new_code_and_contracting_after(database_url: str) -> None:
    release = [
        *HOUSE,
        extra("9000_pre_add_column.sql", "ALTER TABLE customer ADD COLUMN nickname text"),
        extra("9001_post_drop_column.sql", "ALTER TABLE customer DROP COLUMN metadata"),
        extra("9002_pre_add_other.sql", "ALTER TABLE customer ADD COLUMN other text"),
    ]

    before = migrate(database_url, "sandbox", "pre", migrations=release)
    after = migrate(database_url, "sandbox", "post", migrations=release)

    assert before.applied == ("9000_pre_add_column.sql",)
    assert before.pending == ("9001_post_drop_column.sql", "9002_pre_add_other.sql")
    assert after.applied == before.pending


def test_a_role_starts_while_only_contracting_is_left(database_url: str) -> None:
    release = [*HOUSE, extra("9000_post_drop_column.sql", "ALTER TABLE customer DROP COLUMN metadata")]

    assert check(database_url, "sandbox", migrations=release).pending == ("9000_post_drop_column.sql",)


def test_the_old_code_runs_on_while_the_new_has_expanded(database_url: str) -> None:
    migrate(
        database_url,
        "sandbox",
        migrations=[*HOUSE, extra("9000_pre_add_column.sql", "ALTER TABLE customer ADD x text")],
    )

    assert check(database_url, "sandbox").pending == ()


def test_a_number_that_was_overtaken_is_refused(database_url: str) -> None:
    later = extra("9001_add_shelf.sql", "CREATE TABLE shelf (id text)")
    migrate(database_url, "sandbox", migrations=[*HOUSE, later])

    with pytest.raises(Refused) as refused:
        migrate(database_url, "sandbox", migrations=[*HOUSE, extra("9000_add_rack.sql", "SELECT 1"), later])

    assert refused.value.reason.code == "MIGRATION_OUT_OF_ORDER"
    assert "9000_add_rack.sql" in refused.value.reason.message


@pytest.mark.parametrize(
    "name", ["1_create_house.sql", "0002create.sql", "0002_create.sql", "0002_Create_House.sql"]
)
def test_a_name_that_breaks_the_rule_is_ours_to_mend(name: str) -> None:
    with pytest.raises(InvariantError):
        Migration.read(name, b"")


def test_an_absent_database_is_the_worlds_fault() -> None:
    with pytest.raises(Unavailable):
        migrate("postgresql://nobody:x@127.0.0.1:1/none", "sandbox")


# ── what the schema itself promises ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    ["UPDATE posting SET amount = 2", "DELETE FROM posting", "TRUNCATE posting"],
    ids=["update", "delete", "truncate"],
)
def test_the_book_is_append_only(database_url: str, change: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO posting (entry, leg, kind, source, destination, asset, amount, reference) "
            "VALUES ('payment:1', 1, 'exact_fare', 'revenue/exact/forecast', 'wallet/x/y', 'USDC', 1, 'pay_1')"
        )
        with pytest.raises(psycopg.errors.RaiseException, match="reverse it instead"):
            connection.execute(change)  # type: ignore[call-overload]
        assert connection.execute("SELECT sum(balance) FROM ledger_balance").fetchone() == (0,)


def event_at(instant: datetime) -> tuple[str, datetime]:
    return (
        "INSERT INTO usage_event (event_id, customer_id, metric_key, value, timestamp, batch_id) "
        "VALUES ('evt_1', 'acme', 'api_calls', 1, %s, 1)",
        instant,
    )


def test_a_partition_takes_the_rows_that_came_before_it(database_url: str) -> None:
    """Otherwise a worker that slept for a month would leave a database in which no partition can be made."""
    noon = datetime(2031, 5, 17, 12, tzinfo=UTC)
    with psycopg.connect(database_url, autocommit=True) as connection:
        statement, instant = event_at(noon)
        connection.execute(statement, (instant,))  # type: ignore[call-overload]
        assert connection.execute("SELECT tableoid::regclass::text FROM usage_event").fetchall() == [
            ("usage_event_rest",)
        ]

        made = connection.execute(
            "SELECT ensure_usage_partitions(%s, %s)", (date(2031, 5, 16), date(2031, 5, 18))
        ).fetchone()
        again = connection.execute(
            "SELECT ensure_usage_partitions(%s, %s)", (date(2031, 5, 16), date(2031, 5, 18))
        ).fetchone()

        assert (made, again) == ((3,), (0,))
        assert connection.execute(
            "SELECT tableoid::regclass::text, event_id FROM usage_event"
        ).fetchall() == [("usage_event_20310517", "evt_1")]
        of_the_parent, of_the_partition = (
            connection.execute(
                "SELECT count(*) FROM pg_index WHERE indrelid = %s::regclass", (table,)
            ).fetchone()
            for table in ("usage_event", "usage_event_20310517")
        )
        assert of_the_partition == of_the_parent


def test_partition_bounds_are_utc_days_wherever_the_session_stands(database_url: str) -> None:
    with psycopg.connect(
        database_url, autocommit=True, options="-c TimeZone=Pacific/Kiritimati"
    ) as connection:
        connection.execute("SELECT ensure_usage_partitions('2032-02-29', '2032-02-29')")
        statement, instant = event_at(datetime(2032, 2, 29, 23, 59, 59, tzinfo=UTC))
        connection.execute(statement, (instant,))  # type: ignore[call-overload]

        assert connection.execute("SELECT tableoid::regclass::text FROM usage_event").fetchall() == [
            ("usage_event_20320229",)
        ]
