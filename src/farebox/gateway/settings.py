"""Every limit and every wait of the gateway, by name and unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * 1024

_HEAD_END_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Defaults are meant for the open internet; tests shorten the waits."""

    sandbox: bool = False  # every answer says Farebox-Sandbox: 1

    # What a request may weigh.
    request_line_bytes_max: int = 8 * KIB  # 414
    head_bytes_max: int = 32 * KIB  # 431; a payment header alone may be 10,000 characters
    header_count_max: int = 100  # 431
    body_bytes_max: int = 1024 * MIB  # 413; streamed, never held
    paid_body_bytes_max: int = MIB  # 413; held in memory because an exact fare binds its digest
    site_body_bytes_max: int = 64 * KIB  # 413; bodies for /.farebox/*
    buffered_bytes_max: int = 64 * MIB  # 503; all such bodies of this process together
    buffered_bytes_per_client_max: int = 16 * MIB  # 429; those of one client address
    unread_body_bytes_max: int = 64 * KIB  # what is read off after a refusal to keep the connection
    ahead_bytes_max: int = (
        64 * KIB
    )  # what a client may send ahead (pipelining) before we stop reading; a head at least

    # What a connection may hold or wait for, as a client.
    connections_max: int = 20_000
    write_buffer_bytes: int = 256 * KIB  # above it the upstream is not read on: a slow reader holds < 1 MiB
    head_timeout_s: float = 10.0  # from the first byte of a head to its last (slowloris): 408
    idle_timeout_s: float = 75.0  # between two requests
    body_stall_timeout_s: float = 30.0  # between two pieces of a request body: 408
    paid_body_timeout_s: float = (
        60.0  # for the whole of a body that is held, however steadily it trickles: 408
    )
    write_stall_timeout_s: float = 60.0  # a client that takes nothing of its answer
    tunnel_idle_timeout_s: float = 300.0  # a WebSocket or another tunnel in which nothing moves either way
    linger_s: float = 2.0  # reading off what a refused client still sends, so that it sees the answer

    # What an upstream may hold or wait for. The wait for its first byte is the upstream's own timeout_s.
    connect_timeout_s: float = 5.0  # 504
    upstream_stall_timeout_s: float = 60.0  # between two pieces of an answer
    upstream_head_bytes_max: int = 64 * KIB
    upstream_connections_max: int = 1024  # per target
    upstream_waiting_max: int = 1024  # calls that wait for one of them; the next gets 503
    upstream_waiting_timeout_s: float = 10.0
    upstream_idle_timeout_s: float = (
        4.0  # shorter than the 5 s after which Node and uvicorn hang up: no stale reuse
    )
    attempts_max: int = 2  # targets that one call is taken to, when those before cannot be reached
    strikes_max: int = 3  # failures in a row after which a target is left out
    ejection_s: float = 5.0  # for so long at first, and twice as long each time again
    ejection_s_max: float = 60.0

    tick_s: float = 0.25  # how often deadlines are looked at, and so how exact they are

    def __post_init__(self) -> None:
        # Whoever sent more than may come ahead is not read until it is their turn: half a head would then wait for its rest.
        whole_head = self.head_bytes_max + _HEAD_END_BYTES
        object.__setattr__(self, "ahead_bytes_max", max(self.ahead_bytes_max, whole_head))
