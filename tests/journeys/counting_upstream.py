"""A small real HTTP server that writes one line a request to a file: request id, method, path.

Run as ``python counting_upstream.py LOG``; prints its port. Each line is one ``write`` call, so it survives SIGKILL.
``/fail/…`` answers 500, ``/slow/…`` waits half a second, ``/hold/NAME`` until somebody calls ``/release/NAME``,
``/bytes/N`` answers with so many bytes, ``/credits/VALUE`` and ``/trailer/VALUE`` say what a call costs, in the head or after a
chunked body; everything else answers 200 with a short JSON body.
"""

from __future__ import annotations

import asyncio
import os
import sys


async def _special(path: bytes, writer: asyncio.StreamWriter, gates: dict[bytes, asyncio.Event]) -> bool:
    """Answers the paths that are answered in a way of their own; False: it is none of them."""
    _, kind, value, *_ = [*path.split(b"/"), b"", b""]
    if kind == b"bytes":
        left = int(value)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
        while left:
            writer.write(bytes(min(left, 16_384)))
            left -= min(left, 16_384)
            await writer.drain()
    elif kind == b"credits":
        writer.write(b"HTTP/1.1 200 OK\r\nFarebox-Credits: %b\r\nContent-Length: 2\r\n\r\nok" % value)
    elif kind == b"trailer":
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: apicharge_credits\r\n\r\n2\r\nok\r\n"
        )
        writer.write(b"0\r\napicharge_credits: %b\r\n\r\n" % value)
    elif kind in (b"hold", b"release"):
        gate = gates.setdefault(value, asyncio.Event())
        if kind == b"hold":
            await gate.wait()
        else:
            gate.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    else:
        return False
    await writer.drain()
    return True


async def serve(log_path: str) -> None:
    gates: dict[bytes, asyncio.Event] = {}
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.split(b"\r\n")
                method, path, _ = lines[0].split(b" ")
                headers = {
                    k.strip().lower(): v.strip()
                    for k, _, v in (line.partition(b":") for line in lines[1:])
                    if k
                }
                if length := int(headers.get(b"content-length", b"0")):
                    await reader.readexactly(length)
                os.write(log, b"%s %s %s\n" % (headers.get(b"farebox-request-id", b"-"), method, path))
                if await _special(path, writer, gates):
                    continue
                if path.startswith(b"/slow/"):
                    await asyncio.sleep(0.5)
                status = b"500 Internal Server Error" if path.startswith(b"/fail/") else b"200 OK"
                body = b'{"path":"%s"}' % path
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (status, len(body), body)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
