"""Ordinary clients, unmodified."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import httpx
import pytest

from farebox.gateway.problems import refusal
from tests.gateway.kit import Heard, House
from tests.gateway.test_streaming import gives

MIB = 1024 * 1024
CURL = shutil.which("curl")


async def curl(*arguments: str) -> bytes:
    """What curl prints; an exit code other than 0 is an error."""
    assert CURL is not None
    process = await asyncio.create_subprocess_exec(
        CURL,
        "--silent",
        "--show-error",
        "--max-time",
        "20",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out


#: CI has curl, and says so by failing when it has not.
with_curl = pytest.mark.skipif(
    CURL is None and "CI" not in os.environ, reason="needs curl: apt-get install curl"
)


@with_curl
async def test_curl_gets_posts_uploads_and_downloads(house: House, tmp_path: Path):
    url = f"http://127.0.0.1:{house.port}"
    upload = tmp_path / "upload"
    upload.write_bytes(b"x" * 3 * MIB)

    assert await curl(f"{url}/a?b=c") == b"GET /a?b=c 0"
    assert await curl("-d", "hello", f"{url}/a") == b"POST /a 5"
    assert await curl("-T", str(upload), f"{url}/up") == b"PUT /up %d" % (3 * MIB), (
        "with Expect: 100-continue"
    )
    assert await curl("-T", str(upload), "-H", "Transfer-Encoding: chunked", f"{url}/up") == b"PUT /up %d" % (
        3 * MIB
    )
    assert await curl("-0", f"{url}/old") == b"GET /old 0"
    assert b"HTTP/1.1 200" in await curl("-I", f"{url}/head")
    assert await curl(f"{url}/1", f"{url}/2") == b"GET /1 0GET /2 0"
    assert await curl("--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", f"{url}/a/../b") == b"400"


@with_curl
async def test_curl_sees_why_its_upload_was_refused(house: House, tmp_path: Path):
    house.door.decide = lambda call: refusal("payment_required", "Pay first.")
    upload = tmp_path / "upload"
    # What is sent on after a refusal is read up to 1 MiB, then the line is cut.
    upload.write_bytes(b"x" * (MIB // 2))

    for more in ([], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"]):
        answer = await curl("-T", str(upload), *more, f"http://127.0.0.1:{house.port}/up")
        assert json.loads(answer)["code"] == "payment_required", more


async def test_httpx_on_many_connections(house: House):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}") as http:
        answers = await asyncio.gather(*(http.post(f"/{n}", content=b"x" * n) for n in range(200)))

    assert [a.text for a in answers] == [f"POST /{n} {n}" for n in range(200)]
    assert sorted(c.path for c in house.door.calls) == sorted(f"/{n}" for n in range(200))
    assert {f.status for f in house.door.finished} == {200}


async def test_httpx_streams_both_ways(house: House):
    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await gives(writer, 5 * MIB, chunked=True)

    async def body():  # type: ignore[no-untyped-def]
        for _ in range(50):
            yield b"x" * 100_000

    house.upstream.answer = pours
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}") as http,
        http.stream("POST", "/", content=body()) as answer,
    ):
        received = sum([len(piece) async for piece in answer.aiter_raw()])

    assert received == 5 * MIB
    assert len(house.upstream.heard[0].body) == 5_000_000


async def test_a_client_gets_no_answer_of_another(house: House):
    """Cross-talk: thousands of calls on shared upstream connections, each answer belongs to its call."""

    async def client(number: int) -> None:
        reader, writer = await house.connect()
        for n in range(100):
            body = b"y" * (n * 37 % 500)
            writer.write(
                b"POST /%d/%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
                % (number, n, len(body), body)
            )
            await reader.readuntil(b"\r\n\r\n")
            expected = b"POST /%d/%d %d" % (number, n, len(body))
            assert await reader.readexactly(len(expected)) == expected
        writer.close()

    await asyncio.gather(*(client(n) for n in range(40)))

    assert len(house.upstream.heard) == 4000
    assert len({f.request_id for f in house.door.finished}) == 4000
    assert house.upstream.connections <= 40
