"""An app as its operator runs it: granian, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.journeys.house import House

SECRET = "replace-this-by-the-output-of-openssl-rand-hex-32"


@dataclass
class App:
    """A running app. ``log``: what it and its server wrote."""

    port: int
    house: House
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, request: bytes) -> bytes:
        """Everything the server says to these bytes, until it closes."""
        with socket.create_connection(("127.0.0.1", self.port), 30) as wire:
            wire.settimeout(30)
            wire.sendall(request)
            said = b""
            while data := wire.recv(65536):
                said += data
            return said


def gateway_key(house: House, name: str = "app") -> str:
    """A control key that may ask, as the operator makes it in the API."""
    return str(house.post("/v1/api-keys", {"name": name, "scopes": ["gateway"]})["key"])


@contextlib.contextmanager
def an_app(
    directory: Path, port: int, house: House, log: Path, workers: int = 1, **settings: str
) -> Iterator[App]:
    """``app:app`` of ``directory``, asking the house; ready when it accepts."""
    environment = {
        **os.environ,
        "FARE_AUTHORIZE_URL": house.ready["authorize_url"],
        "FARE_GATEWAY_URL": house.gateway_url,
        "FARE_UPSTREAM_SECRET": SECRET,
        **settings,
    }
    command = [
        str(Path(sys.executable).with_name("granian")), "--interface", "asgi", "--host", "127.0.0.1", "--port", str(port),
        "--workers", str(workers), "app:app",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=directory,
        )
    try:
        deadline = time.monotonic() + 60
        while not _accepts(port):
            assert process.poll() is None, f"granian ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the app does not listen after 60 s:\n{log.read_text()}"
            time.sleep(0.05)
        yield App(port, house, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
