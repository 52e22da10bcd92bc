"""What the benchmarks of a whole house share: `farebox up --sandbox` as an operator runs it, its control API, its rows."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

#: Requests to the control API at once while a house is furnished.
_WRITERS = 8


@dataclass(frozen=True)
class House:
    """A running ``farebox up``. ``ready`` is its ready file."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def gateway_port(self) -> int:
        return int(self.ready["gateway_url"].rpartition(":")[2])

    @property
    def gateway_pids(self) -> list[int]:
        return list(self.ready["pids"]["gateway"])

    def pin_gateways(self, core: int) -> None:
        """The gateways on a core of their own; the rest of the house stays where it was started."""
        for pid in self.gateway_pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), {core})

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the control API; its answer."""
        return self.post_all([(path, body)])[0]

    def post_all(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Many, over a few connections; the answers stand in the order of the requests."""
        shares = [list(range(n, len(requests), _WRITERS)) for n in range(min(_WRITERS, len(requests)))]
        answers: list[dict[str, Any]] = [{}] * len(requests)

        def write(share: list[int]) -> None:
            connection = http.client.HTTPConnection(urlsplit(self.ready["api_url"]).netloc, timeout=60)
            for index in share:
                path, body = requests[index]
                headers = {
                    "Authorization": f"Bearer {self.ready['admin_key']}",
                    "Content-Type": "application/json",
                }
                while True:
                    connection.request("POST", path, json.dumps(body), headers)
                    answer = connection.getresponse()
                    content = answer.read()
                    if answer.status != 429:
                        break
                    time.sleep(float(answer.headers.get("Retry-After", "1")))
                if answer.status >= 300:
                    raise SystemExit(f"POST {path}: {answer.status} {content[:300]!r}")
                answers[index] = json.loads(content)

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, shares))
        return answers

    def settled_rows(self, metric_key: str) -> int:
        """The number of metered events once it has stood still for three seconds."""
        with psycopg.connect(self.ready["database_url"], autocommit=True) as connection:
            last, since = -1, time.monotonic()
            while True:
                row = connection.execute(
                    "SELECT count(*) FROM usage_event WHERE metric_key = %s", (metric_key,)
                ).fetchone()
                assert row
                if row[0] != last:
                    last, since = int(row[0]), time.monotonic()
                    _show(f"  shipped {last} rows")
                elif time.monotonic() - since > 3:
                    _show("")
                    return last
                time.sleep(0.25)


def a_house(
    directory: Path, shop: str, core: int | None, *, options: Sequence[str] = (), **settings: str
) -> House:
    """Start one in ``directory`` (on ``core``, if one is named) and wait until it answers. ``settings`` are FAREBOX_* variables."""
    file, ready = directory / "farebox.yaml", directory / "ready.json"
    file.write_text(shop)
    command = ["taskset", "-c", str(core)] if core is not None else []
    command += [str(Path(sys.executable).with_name("farebox")), "up", "--sandbox", "-f", str(file)]
    command += ["--data", str(directory / "data"), "--ready-file", str(ready), *options]
    command += ["--gateway-port", "0", "--api-port", "0", "--ops-port", "0"]
    with (directory / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, **settings})
    deadline = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"farebox up did not start:\n{(directory / 'up.log').read_text()[-2000:]}")
        time.sleep(0.05)
    return House(process, json.loads(ready.read_text()))


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {within_s:.0f} s")
        time.sleep(0.1)


def _show(text: str) -> None:
    if sys.stdout.isatty():
        print(text.ljust(40), end="\r", flush=True)
