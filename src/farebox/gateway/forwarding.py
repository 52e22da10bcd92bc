"""Who called, and what the upstream is told about it: X-Forwarded-For, -Proto, -Host and Forwarded.

From anyone but a trusted proxy these fields are dropped and written anew; a trusted proxy's are believed and extended.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from farebox.base.errors import refuse
from farebox.gateway.fields import canonical

Forwarded = Sequence[tuple[bytes, bytes]]

_CHAIN_MAX: Final = 32


class TrustedProxies:
    """The networks whose word on earlier hops is taken."""

    def __init__(self, networks: Sequence[str]) -> None:
        try:
            self._networks = [ipaddress.ip_network(n, strict=False) for n in networks]
        except ValueError as exc:
            raise refuse(
                "TRUSTED_PROXY_MALFORMED",
                f"{exc}: write networks such as 10.0.0.0/8",
                "server.trusted_proxies",
            ) from exc

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._networks)

    def client_of(self, peer: str, forwarded: Forwarded) -> str:
        """The nearest address in the chain that is not a trusted proxy; the peer when the chain says nothing usable."""
        client = peer
        for hop in reversed(_chain(forwarded)[-_CHAIN_MAX:]):
            address = _bare(hop)
            if address is None:
                break
            client = address
            if client not in self:
                break
        return client


def lines_for_stranger(peer: str) -> bytes:
    """The lines that stay the same for all requests of a connection that is not trusted."""
    return b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: http" % peer.encode()


def lines_for_proxy(peer: str, forwarded: Forwarded, host: str) -> list[bytes]:
    """The lines for one request that came through a trusted proxy: its own, extended by its address."""
    chain = b", ".join([*_chain(forwarded), peer.encode()])
    given = {canonical(name): value for name, value in forwarded}
    proto = given.get(b"x-forwarded-proto", b"http").lower()
    lines = [
        b"X-Forwarded-For: " + chain,
        b"X-Forwarded-Proto: " + (proto if proto in (b"http", b"https") else b"http"),
        b"X-Forwarded-Host: " + (given.get(b"x-forwarded-host") or host.encode()),
    ]
    elements = [value for name, value in forwarded if name == b"forwarded"]
    if elements:
        node = b'"[%b]"' % peer.encode() if ":" in peer else peer.encode()
        lines.append(b"Forwarded: " + b", ".join([*elements, b"for=" + node]))
    lines.extend(
        b"%b: %b" % pair
        for pair in forwarded
        if canonical(pair[0])
        not in (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded")
    )
    return lines


def _chain(forwarded: Forwarded) -> list[bytes]:
    return [
        hop.strip()
        for name, value in forwarded
        if name == b"x-forwarded-for"
        for hop in value.split(b",")
        if hop.strip()
    ]


def _bare(hop: bytes) -> str | None:
    """The address of one hop, without brackets and port."""
    text = hop.decode("latin-1")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
