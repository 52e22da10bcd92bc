"""The shipper of a node: ``python -m farebox.wiring.shipper --spool DIR``. SIGTERM: ship what is there, then end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import uvloop

from farebox.base.errors import Refused
from farebox.config import Config
from farebox.gateway.shipper import Shipper
from farebox.wiring.environment import read_config
from farebox.wiring.gateway import an_open_database, stop_on_signals
from farebox.wiring.logging import configure_logging
from farebox.wiring.readiness import say_ready

#: Added to its niceness: where cores are short, calls go before their delivery. The spool is there to wait.
NICENESS: Final = 10

log = structlog.get_logger(__name__)


async def _main(config: Config, spool_directory: Path) -> None:
    stop = stop_on_signals()
    async with an_open_database(config, "shipper", stop) as database:
        if database is None:
            return
        shipper = Shipper(database, spool_directory)
        while not shipper.lock():
            log.warning("another_shipper_is_at_work", directory=str(spool_directory))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.5)
            if stop.is_set():
                return
        say_ready()
        await shipper.run(stop, config.spool.ship_ms / 1000)
        shipper.unlock()
        log.info("shipper_ended", events=shipper.counts.events, orphans=shipper.counts.orphans_billed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="farebox.wiring.shipper")
    parser.add_argument("--spool", type=Path, required=True, help="directory of the spool")
    given = parser.parse_args(arguments)
    try:
        config = read_config()
        configure_logging(config.log, "shipper")
        os.nice(NICENESS)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(config, given.spool))
    except Refused as refused:
        print(f"shipper: {refused}", file=sys.stderr)  # noqa: T201 - before anything else can speak
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
