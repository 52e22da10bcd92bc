"""One line a call with its price, below the lines to paste of ``up --sandbox URL --price``.

Read from the metered events, half a second behind: what is printed is what is billed. Refused calls (an unpaid 402, a
wrong key) are no events and are not shown.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any, Final, LiteralString

import psycopg

LOOK_EVERY_S: Final = 0.5
#: How late an event may come in and still be printed: a spool that could not be shipped for a while.
BEHIND_S_MAX: Final = 60
LINES_MAX: Final = 200

# A try-out's database is small: this reads one day's partition and no index.
RECENT: LiteralString = """
    SELECT event_id, "timestamp", customer_id, properties
      FROM usage_event
     WHERE "timestamp" > now() - make_interval(secs => %(behind)s)
       AND NOT event_id = ANY(%(seen)s)
     ORDER BY "timestamp"
     LIMIT %(most)s"""


async def print_calls(database_url: str, price: str) -> None:
    """Print until cancelled. A database that is away for a while is simply asked again."""
    seen: deque[str] = deque(maxlen=5_000)
    first = True
    while True:
        try:
            connection = await psycopg.AsyncConnection.connect(
                database_url, autocommit=True, application_name="farebox call log"
            )
            async with connection:
                while True:
                    values = {"behind": BEHIND_S_MAX, "seen": list(seen), "most": LINES_MAX}
                    rows = await (await connection.execute(RECENT, values)).fetchall()
                    seen.extend(row[0] for row in rows)
                    for row in () if first else rows:  # what an earlier life metered is no news
                        print(_line(row, price), flush=True)
                    first = False
                    await asyncio.sleep(LOOK_EVERY_S)
        except psycopg.OperationalError:
            await asyncio.sleep(LOOK_EVERY_S)


def _line(row: tuple[Any, ...], price: str) -> str:
    _, at, customer_id, properties = row
    facts: dict[str, Any] = properties if isinstance(properties, dict) else json.loads(properties)
    who = customer_id or facts.get("payer") or facts.get("pass") or "-"
    status = facts.get("status", "-")
    kind = facts.get("fare", "-")
    paid = price if kind in ("exact", "account") else "from the pass"
    return f"  {at:%H:%M:%S}  {status}  {kind:<8} {paid:<16} {who}  {facts.get('request_id', '')}"
