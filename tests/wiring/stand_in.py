"""A role for supervisor tests: a real process that does as its arguments say and writes what happens to a file.

``stand_in.py serve FD LOG NAME``  answers HTTP on an inherited socket with its pid; SIGTERM: drains and ends
``stand_in.py idle LOG NAME``      waits; SIGTERM: says so and ends
``stand_in.py fall``               ends at once with code 3
``stand_in.py silent``             never says that it is ready
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time

from farebox.wiring.readiness import say_ready


def note(log: str, line: str) -> None:
    with open(log, "a") as file:
        file.write(line + "\n")


async def serve(fd: int, log: str, name: str) -> None:
    open_calls = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_calls
        open_calls += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /slow"):
                await asyncio.sleep(0.5)
            body = str(os.getpid()).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            open_calls -= 1

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(talk, sock=socket.socket(fileno=fd))
    note(log, f"{name} began {os.getpid()}")
    say_ready()
    await stop.wait()
    note(log, f"{name} drains")
    server.close()
    await asyncio.sleep(0.1)  # what was accepted a moment ago is a connection before it is a call
    while open_calls:
        await asyncio.sleep(0.01)
    note(log, f"{name} ended")


def idle(log: str, name: str) -> None:
    def end(*_: object) -> None:
        note(log, f"{name} ended")
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    note(log, f"{name} began {os.getpid()}")
    say_ready()
    while True:
        signal.pause()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", fd, log, name]:
            asyncio.run(serve(int(fd), log, name))
        case ["idle", log, name]:
            idle(log, name)
        case ["fall"]:
            sys.exit(3)
        case ["silent"]:
            time.sleep(60)
        case other:
            sys.exit(f"unknown: {other}")
