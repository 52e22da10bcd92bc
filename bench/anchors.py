"""What the benchmarks of HTTP share: nginx as the anchor and as the upstream, wrk as the load, cores to pin them to."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BODY = '{"city":"paris","temperature_c":21.5,"wind_kmh":11,"sky":"clear","source":"sample-88b"}\n'

NGINX = """
worker_processes 1;
daemon off;
pid {directory}/{name}.pid;
error_log {directory}/{name}.err warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/{name}-body;
    proxy_temp_path {directory}/{name}-proxy;
    fastcgi_temp_path {directory}/{name}-f;
    uwsgi_temp_path {directory}/{name}-u;
    scgi_temp_path {directory}/{name}-s;
    keepalive_requests 100000000;
    {http}
}}
"""
UPSTREAM = """
    server {{ listen 127.0.0.1:{port}; location / {{ default_type application/json; return 200 '{body}'; }} }}
"""
PROXY = """
    upstream target {{ server 127.0.0.1:{target}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://target;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $host;
            proxy_set_header Farebox-Request-Id $request_id;
            add_header Farebox-Request-Id $request_id;
        }}
    }}
"""


@dataclass(frozen=True)
class Run:
    """One run of wrk: requests a second, whole answers, latency in words."""

    rate: float
    answers: int
    latency: str


def missing_tools(*tools: str) -> str | None:
    """A sentence when a tool is not on this machine."""
    missing = [tool for tool in tools if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        return f"missing: {', '.join(missing)}; remedy: apt-get install nginx-light wrk util-linux"
    return None


def nginx(directory: Path, name: str, http: str, core: int) -> subprocess.Popen[str]:
    """One nginx with one worker, pinned to a core."""
    config = directory / f"{name}.conf"
    config.write_text(NGINX.format(directory=directory, name=name, http=http))
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    command = ["taskset", "-c", str(core), str(program), "-p", str(directory)]
    return subprocess.Popen([*command, "-e", f"{directory}/{name}.err", "-c", str(config)], text=True)


def only_child(pid: int) -> int:
    """nginx's worker, which does the work."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def cpu_us(pid: int) -> float:
    """Time on a CPU since the process began, all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1000


def wrk(
    port: int, path: str, seconds: int, connections: int, core: int, given: Mapping[str, str] | Path
) -> Run:
    """Load from one thread on one core; ``given`` are headers, or a script that writes the requests. Anything but whole 2xx
    and 3xx answers ends the benchmark."""
    if isinstance(given, Path):
        how = ["-s", str(given)]
    else:
        how = [part for name, value in given.items() for part in ("-H", f"{name}: {value}")]
    output = subprocess.run(
        ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", *how,
         f"http://127.0.0.1:{port}{path}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "Non-2xx" not in output, output
    assert "Socket errors" not in output, output
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    count = re.search(r"(\d+) requests in", output)
    p50, p99 = re.search(r"\n\s+50%\s+(\S+)", output), re.search(r"\n\s+99%\s+(\S+)", output)
    assert rate
    assert count
    assert p50
    assert p99
    return Run(float(rate[1]), int(count[1]), f"p50 {p50[1]} p99 {p99[1]}")


def serves(port: int, path: str, headers: Mapping[str, str]) -> None:
    """The anchor's body comes back through whatever listens there."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=dict(headers))
    body = urllib.request.urlopen(request).read()
    assert body == BODY.encode(), body


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")
