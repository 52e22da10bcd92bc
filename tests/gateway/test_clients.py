"""Ordinary clients, unmodified."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import httpx
import pytest
import websockets.asyncio.client
import websockets.asyncio.server
import websockets.exceptions

from farebox.gateway.problems import refusal
from tests.gateway.kit import Heard, House, catalog
from tests.gateway.test_streaming import gives, until
from tests.tools import tool

MIB = 1024 * 1024


async def runs(program: str, *arguments: str) -> bytes:
    """What a program prints; an exit code other than 0 is an error, and so is a program that is not there."""
    process = await asyncio.create_subprocess_exec(
        tool(program), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out


async def curl(*arguments: str) -> bytes:
    return await runs("curl", "--silent", "--show-error", "--max-time", "20", *arguments)


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


async def test_curl_sees_why_its_upload_was_refused(house: House, tmp_path: Path):
    house.door.decide = lambda call: refusal("payment_required", "Pay first.")
    upload = tmp_path / "upload"
    # What is sent on after a refusal is read up to 1 MiB, then the line is cut.
    upload.write_bytes(b"x" * (MIB // 2))

    for more in ([], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked"]):
        answer = await curl("-T", str(upload), *more, f"http://127.0.0.1:{house.port}/up")
        assert json.loads(answer)["code"] == "payment_required", more


async def test_curl_sees_what_a_browser_would_of_a_refused_path(house: House):
    shown = await curl("--path-as-is", "-i", f"http://127.0.0.1:{house.port}/free/..%2fpaid/x")
    head, _, body = shown.partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Connection: close" in head
    assert json.loads(body)["code"] == "request_malformed"
    assert house.upstream.heard == []


async def test_httpx_on_many_connections(house: House):
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}", timeout=60) as http:
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
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{house.port}", timeout=60) as http,
        http.stream("POST", "/", content=body()) as answer,
    ):
        received = sum([len(piece) async for piece in answer.aiter_raw()])

    assert received == 5 * MIB
    assert len(house.upstream.heard[0].body) == 5_000_000


async def test_aiohttp_on_many_connections(house: House):
    async with aiohttp.ClientSession(f"http://127.0.0.1:{house.port}") as http:

        async def posts(n: int) -> str:
            async with http.post(f"/{n}", data=b"x" * n, expect100=n % 2 == 1) as answer:
                assert answer.status == 200
                return await answer.text()

        answers = await asyncio.gather(*(posts(n) for n in range(200)))

    assert answers == [f"POST /{n} {n}" for n in range(200)]
    assert {f.status for f in house.door.finished} == {200}


async def test_aiohttp_streams_both_ways(house: House):
    async def pours(heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await gives(writer, 5 * MIB, chunked=True)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 100_000

    house.upstream.answer = pours
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{house.port}") as http,
        http.post("/", data=body()) as answer,
    ):
        received = sum([len(piece) async for piece in answer.content.iter_any()])

    assert received == 5 * MIB
    assert len(house.upstream.heard[0].body) == 5_000_000


async def test_aiohttp_sees_why_it_was_refused_before_it_sent_its_body(house: House):
    house.door.decide = lambda call: refusal("payment_required", "Pay first.")
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{house.port}") as http,
        http.put("/up", data=b"x" * MIB, expect100=True) as answer,
    ):
        assert answer.status == 402
        assert (await answer.json(content_type="application/problem+json"))["code"] == "payment_required"


async def test_wrk_finds_nothing_to_complain_about(house: House):
    """A load generator reads each answer; it counts what is not HTTP, not 2xx or not there."""
    shown = (await runs("wrk", "-t1", "-c8", "-d1s", f"http://127.0.0.1:{house.port}/load")).decode()

    assert "Socket errors" not in shown
    assert "Non-2xx" not in shown
    counted = re.search(r"(\d+) requests in", shown)
    assert counted is not None, shown
    assert int(counted[1]) > 0
    assert len(house.upstream.heard) >= int(counted[1])
    assert {h.target for h in house.upstream.heard} == {"/load"}


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


async def test_a_websocket_client_talks_through_the_gateway(house: House):
    """Unmodified on both ends: what one side says the other hears, large or small, text or binary, and the close as well."""

    async def echoes(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with websockets.asyncio.server.serve(echoes, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        house.gateway.replace_catalog(catalog(f"http://127.0.0.1:{port}"))
        async with websockets.asyncio.client.connect(
            f"ws://127.0.0.1:{house.port}/chat", proxy=None, compression=None
        ) as connection:
            for message in ("hello", b"\x00" * 70_000, "x" * 300_000):
                await connection.send(message)
                assert await connection.recv() == message
        await until(lambda: house.door.finished)

    assert [f.status for f in house.door.finished] == [101]
    assert house.door.finished[0].bytes_down > 370_000
    assert house.door.finished[0].bytes_up > 370_000


async def test_aiohttps_websocket_talks_through_the_gateway(house: House):
    async def echoes(connection: websockets.asyncio.server.ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with websockets.asyncio.server.serve(echoes, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        house.gateway.replace_catalog(catalog(f"http://127.0.0.1:{port}"))
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{house.port}") as http,
            http.ws_connect("/chat") as connection,
        ):
            await connection.send_str("hello")
            assert (await connection.receive(10)).data == "hello"
            await connection.ping(b"there?")
            await connection.send_bytes(b"\x00" * 70_000)
            assert (await connection.receive(10)).data == b"\x00" * 70_000


async def test_a_websocket_client_that_must_pay_is_told_so_in_http(house: House):
    house.door.decide = lambda call: refusal("payment_required", "Pay first.")
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        await websockets.asyncio.client.connect(f"ws://127.0.0.1:{house.port}/chat", proxy=None)

    assert refused.value.response.status_code == 402
    assert json.loads(refused.value.response.body)["code"] == "payment_required"
