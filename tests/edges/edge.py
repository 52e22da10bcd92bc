"""nginx, Caddy and Envoy as they are, with the configuration that is shipped: only ports, paths and the secret change."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.journeys.house import House
from tests.tools import TOOLS, tool

ROOT = Path(__file__).parents[2]
TLS = Path(__file__).parent / "tls"
CERTIFICATE, KEY = TLS / "fullchain.pem", TLS / "key.pem"
SECRET = "edge+secret/of=the.tests~0123456789-ABCDEF"

API, FAST = "api.example.com", "fast.example.com"


def python_with_grpc() -> dict[str, str]:
    """The environment of a Python that has grpcio."""
    assert (TOOLS / "python" / "grpc").exists(), (
        "grpcio is missing: run tests/tools/install.sh (or `make test`, which does)"
    )
    return {**os.environ, "PYTHONPATH": str(TOOLS / "python")}


@dataclass(frozen=True)
class Heard:
    """One request as the upstream got it; names in lower case."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: int

    def all(self, name: str) -> list[str]:
        return [v for k, v in self.headers if k == name]

    def one(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, f"{name} arrived {len(values)} times"
        return values[0] if values else None


@dataclass
class Upstream:
    """The API that is being sold."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def heard(self) -> list[Heard]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [
            Heard(d["method"], d.get("target", ""), [(k, v) for k, v in d["headers"]], d.get("body", 0))
            for d in map(json.loads, lines)
        ]


@contextlib.contextmanager
def an_upstream(script: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[Upstream]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), str(log)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        yield Upstream(int(process.stdout.readline()), log)
    finally:
        process.kill()
        process.wait()


@dataclass
class Said:
    """One answer as curl got it."""

    status: int
    version: str
    headers: dict[str, str]
    body: str

    @property
    def code(self) -> str:
        assert self.headers["content-type"] == "application/problem+json", (
            self.status,
            self.headers,
            self.body,
        )
        return str(json.loads(self.body)["code"])


@dataclass
class Edge:
    """A running edge in front of a house and an API."""

    name: str
    port: int
    house: House
    upstream: Upstream
    grpc_upstream: Upstream
    directory: Path
    process: subprocess.Popen[bytes] = field(repr=False, default=None)  # type: ignore[assignment]

    def curl(self, target: str, *options: str, host: str = FAST, http: str = "2") -> Said:
        """One call over TLS. ``target`` goes out as it is, dots, slashes and all. Headers: ``-H`` and so on in ``options``."""
        command = self.command(target, *options, host=host, http=http)
        with_parts = [
            *command,
            "-D",
            str(self.directory / "head"),
            "-o",
            str(self.directory / "body"),
            "-w",
            "%{http_version}",
        ]
        (self.directory / "body").write_bytes(b"")
        done = subprocess.run(with_parts, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, f"curl ended with {done.returncode}: {done.stderr}\n{self.output()}"
        head = (self.directory / "head").read_bytes().decode("latin-1").split("\r\n\r\n")[-2].split("\r\n")
        headers: dict[str, str] = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            assert name.lower() not in headers or name.lower() in ("vary", "set-cookie"), (
                f"{name} was said twice"
            )
            headers[name.lower()] = value.strip()
        return Said(
            int(head[0].split(" ")[1]), done.stdout, headers, (self.directory / "body").read_bytes().decode()
        )

    def command(self, target: str, *options: str, host: str = FAST, http: str = "2") -> list[str]:
        return [
            tool("curl"), "--silent", "--show-error", "--no-buffer", "--max-time", "60", "--path-as-is", "--globoff",
            "--http2" if http == "2" else "--http1.1", "--resolve", f"{host}:{self.port}:127.0.0.1", "--cacert", str(CERTIFICATE),
            *options, f"https://{host}:{self.port}{target}",
        ]  # fmt: skip

    def raw(self, data: bytes) -> None:
        """Bytes over TLS as they are; nothing is read but the end."""
        import ssl

        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=FAST) as talk,
        ):
            talk.sendall(data)
            with contextlib.suppress(OSError):
                while talk.recv(65536):
                    pass

    def transport(self) -> httpx.AsyncBaseTransport:
        """For httpx: every name is this edge."""
        return _ToLoopback(self.port)

    def output(self) -> str:
        return (self.directory / "edge.log").read_text(errors="replace")[-4000:]


class _ToLoopback(httpx.AsyncBaseTransport):
    def __init__(self, port: int) -> None:
        import ssl

        # A connection a request: nginx may close one whose upload it did not read, after an early answer that kept it open.
        self._inner = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context(cafile=str(CERTIFICATE)),
            limits=httpx.Limits(max_connections=200, max_keepalive_connections=0),
        )
        self._port = port

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        there = httpx.Request(
            request.method,
            request.url.copy_with(host="127.0.0.1", port=self._port),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": request.url.host},
        )
        return await self._inner.handle_async_request(there)

    async def aclose(self) -> None:
        await self._inner.aclose()


def nginx(edge: Edge) -> tuple[list[str], dict[str, str]]:
    shipped = (ROOT / "deploy/nginx/farebox.conf").read_text()
    settled = _replaced(
        shipped,
        ("listen 443 ", f"listen 127.0.0.1:{edge.port} "),
        ("/etc/nginx/tls", str(TLS)),
        ("127.0.0.1:8402", _address(edge.house.gateway_url)),
        ("127.0.0.1:8404", _address(edge.house.ready["authorize_url"])),
        ("127.0.0.1:9000", f"127.0.0.1:{edge.upstream.port}"),
        ("127.0.0.1:9001", f"127.0.0.1:{edge.grpc_upstream.port}"),
        ("REPLACE-WITH-FAREBOX_EDGE_SECRET", SECRET),
    )
    directory = edge.directory
    (directory / "farebox.conf").write_text(settled)
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\nworker_processes 2;\npid {directory}/pid;\n"
        f"error_log {directory}/edge.log warn;\nevents {{ worker_connections 512; }}\n"
        f"http {{ access_log off;\n{temporary}include {directory}/farebox.conf; }}\n"
    )
    return [
        tool("nginx"),
        "-p",
        str(directory),
        "-e",
        str(directory / "edge.log"),
        "-c",
        str(directory / "nginx.conf"),
    ], {}


def caddy(edge: Edge) -> tuple[list[str], dict[str, str]]:
    return [
        tool("caddy"),
        "run",
        "--adapter",
        "caddyfile",
        "--config",
        str(ROOT / "deploy/caddy/Caddyfile"),
    ], {
        "CADDY_AUTO_HTTPS": "off",
        "FAREBOX_SITE": f"https://{API}:{edge.port}",
        "FAREBOX_FAST_SITE": f"https://{FAST}:{edge.port}",
        "FAREBOX_TLS_CERTIFICATE": str(CERTIFICATE),
        "FAREBOX_TLS_KEY": str(KEY),
        "FAREBOX_GATEWAY": _address(edge.house.gateway_url),
        "FAREBOX_AUTHORIZE": _address(edge.house.ready["authorize_url"]),
        "FAREBOX_EDGE_SECRET": SECRET,
        "YOUR_API": f"127.0.0.1:{edge.upstream.port}",
        "HOME": str(edge.directory),
        "XDG_DATA_HOME": str(edge.directory),
        "XDG_CONFIG_HOME": str(edge.directory),
    }


def envoy(edge: Edge) -> tuple[list[str], dict[str, str]]:
    shipped = (ROOT / "deploy/envoy/envoy.yaml").read_text()
    settled = _replaced(
        shipped,
        ("address: 0.0.0.0, port_value: 443}", f"address: 127.0.0.1, port_value: {edge.port}}}"),
        ("/etc/envoy/tls", str(TLS)),
        ("port_value: 8402}", f"port_value: {_port(edge.house.gateway_url)}}}"),
        ("port_value: 8404}", f"port_value: {_port(edge.house.ready['authorize_url'])}}}"),
        ("port_value: 9000}", f"port_value: {edge.upstream.port}}}"),
        ("port_value: 9001}", f"port_value: {edge.grpc_upstream.port}}}"),
    )
    (edge.directory / "envoy.yaml").write_text(settled)
    command = [
        tool("envoy"),
        "-c",
        str(edge.directory / "envoy.yaml"),
        "--concurrency",
        "2",
        "--disable-hot-restart",
        "-l",
        "warning",
    ]
    return command, {"FAREBOX_EDGE_SECRET": SECRET}


EDGES: dict[str, Callable[[Edge], tuple[list[str], dict[str, str]]]] = {
    "nginx": nginx,
    "caddy": caddy,
    "envoy": envoy,
}


@contextlib.contextmanager
def an_edge(
    name: str, house: House, upstream: Upstream, grpc_upstream: Upstream, directory: Path
) -> Iterator[Edge]:
    """Start it and wait until it accepts."""
    directory.mkdir()
    edge = Edge(name, free_port(), house, upstream, grpc_upstream, directory)
    command, environment = EDGES[name](edge)
    with (directory / "edge.log").open("ab") as log:
        edge.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            cwd=directory,
        )
    try:
        deadline = time.monotonic() + 60
        while not _accepts(edge.port):
            assert edge.process.poll() is None, (
                f"{name} ended with {edge.process.returncode}:\n{edge.output()}"
            )
            assert time.monotonic() < deadline, f"{name} does not listen after 60 s:\n{edge.output()}"
            time.sleep(0.05)
        yield edge
    finally:
        edge.process.terminate()
        try:
            edge.process.wait(10)
        except subprocess.TimeoutExpired:
            edge.process.kill()
            edge.process.wait()


def free_port() -> int:
    """A port that nobody has now, and that no outgoing connection gets by chance: below the kernel's own range."""
    while True:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, f"the shipped configuration no longer says {old!r}"
        text = text.replace(old, new)
    return text


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _address(url: Any) -> str:
    return str(url).removeprefix("http://")


def _port(url: Any) -> str:
    return str(url).rpartition(":")[2]
