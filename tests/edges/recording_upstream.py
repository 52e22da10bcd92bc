"""A real HTTP/1.1 server that writes what it hears, one JSON object a line: method, target, headers.

Run as ``python recording_upstream.py LOG``; prints its port. ``…/x/stream`` sends one line at once and the other one after
somebody has called ``…/x/release``; ``…/401`` answers 401; everything else answers 200 with a short body.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import defaultdict


async def serve(log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                pairs = [
                    (k.lower(), v.strip()) for k, _, v in (line.partition(":") for line in head[1:]) if k
                ]
                headers = dict(pairs)
                body = await read_body(headers, reader)
                heard = {"method": method, "target": target, "headers": pairs, "body": len(body)}
                os.write(log, json.dumps(heard).encode() + b"\n")
                whose, _, what = target.rpartition("/")
                if what == "release":
                    released[whose].set()
                if what == "stream":
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                    )
                    writer.write(b"9\r\ndata: 1\n\n\r\n")
                    await writer.drain()
                    await released[whose].wait()
                    writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
                    continue
                status = b"401 Unauthorized" if target.endswith("/401") else b"200 OK"
                said = b"%s %s" % (method.encode(), target.encode("latin-1"))
                writer.write(
                    b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nFarebox-Credits: 3\r\nContent-Length: %d\r\n\r\n"
                    % (status, len(said))
                )
                writer.write(b"" if method == "HEAD" else said)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def read_body(headers: dict[str, str], reader: asyncio.StreamReader) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
