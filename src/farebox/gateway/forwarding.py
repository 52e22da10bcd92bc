"""Who called, and what the upstream is told about it: X-Forwarded-For, -Proto, -Host, -Prefix and Forwarded.

From anyone but a trusted proxy these fields are dropped and written anew; a trusted proxy's are believed and extended.
Each proxy adds itself at the right, so a chain is read from the right, and only as far as the word of trusted proxies goes.
A proxy writes either X-Forwarded-For or Forwarded (RFC 7239): X-Forwarded-For counts where there is one, and a proxy that
writes the other has to take it off what its clients send.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from farebox.base.errors import refuse
from farebox.gateway.fields import canonical
from farebox.gateway.problems import Fault
from farebox.gateway.targets import check_path

Forwarded = Sequence[tuple[bytes, bytes]]

_CHAIN_MAX: Final = 32

_PAIR: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+=(?:[!#$%&'*+.^_`|~0-9A-Za-z:\[\]-]+|\"(?:[^\"\\]|\\.)*\")"
#: One forwarded-element (RFC 7239 §4); blanks around «;» are forgiven, so are bare colons and brackets.
_ELEMENT: Final = re.compile(rf"{_PAIR}(?:[ \t]*;[ \t]*(?:{_PAIR})?)*\Z", re.ASCII)
_PAIRS: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^;\" \t]+))", re.ASCII)
#: node [":" port], where the port may be obfuscated (§6); an IPv6 address without brackets is forgiven.
_NODE: Final = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?\Z|(?P<bare>[0-9A-Fa-f:.]+)\Z",
    re.ASCII,
)
_HOST: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]{1,261}\Z")


class Hop(NamedTuple):
    """One hop of a chain: an address (None: hidden, unknown or malformed), and what was said of the request there."""

    address: str | None
    proto: bytes = b""
    host: bytes = b""


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
        """The nearest address in the chain that is not a trusted proxy; when the chain ends in something that is no
        address, the last one before."""
        client = peer
        for hop in _nearest_first(forwarded):
            if hop.address is None:
                break
            client = hop.address
            if client not in self:
                break
        return client


def lines_for_stranger(peer: str) -> bytes:
    """The lines that stay the same for all requests of a connection that is not trusted."""
    return b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: http" % peer.encode()


def lines_for_proxy(
    peer: str, forwarded: Forwarded, client: str, host: str, prefix: bytes = b""
) -> list[bytes]:
    """The lines for one request that came through a trusted proxy: its own, extended by its address and by the ``prefix``
    that was taken off the path. ``client`` is what ``client_of`` found."""
    given = {canonical(name): value for name, value in forwarded}
    chain, said = _chain(forwarded), Hop(None)
    if not chain:
        for hop in _nearest_first(forwarded):
            if hop.address is None:
                break
            chain.insert(0, hop.address.encode())
            if hop.address == client:
                said = hop  # what the proxy saw that the client came to
                break
    proto = (given.get(b"x-forwarded-proto") or said.proto or b"http").lower()
    lines = [
        b"X-Forwarded-For: " + b", ".join([*chain, peer.encode()]),
        b"X-Forwarded-Proto: " + (proto if proto in (b"http", b"https") else b"http"),
        b"X-Forwarded-Host: " + (given.get(b"x-forwarded-host") or said.host or host.encode()),
    ]
    if outer := given.get(b"x-forwarded-prefix", b"").rstrip(b"/"):
        prefix = (outer if _is_path(outer) else b"") + prefix
    if prefix:
        lines.append(b"X-Forwarded-Prefix: " + prefix)
    elements = [value for name, value in forwarded if name == b"forwarded"]
    if elements:
        node = b'"[%b]"' % peer.encode() if ":" in peer else peer.encode()
        lines.append(b"Forwarded: " + b", ".join([*elements, b"for=" + node]))
    lines.extend(b"%b: %b" % pair for pair in forwarded if canonical(pair[0]) not in _WRITTEN)
    return lines


_WRITTEN: Final = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-prefix", b"forwarded"}
)


def _is_path(path: bytes) -> bool:
    try:
        check_path(path)
    except Fault:
        return False
    return path.startswith(b"/")


def _nearest_first(forwarded: Forwarded) -> list[Hop]:
    """The chain from our side on, at most ``_CHAIN_MAX`` hops, ended by the first that is no address."""
    chain = _chain(forwarded)
    hops: list[Hop] = []
    if chain:
        read = (Hop(_address(hop.decode("latin-1"))) for hop in reversed(chain[-_CHAIN_MAX:]))
    else:
        said = b",".join(value for name, value in forwarded if name == b"forwarded")
        # From the right, so that a quotation mark which a client left open reaches no element of a proxy.
        read = (
            _element(piece)
            for piece in reversed(said.rsplit(b",", _CHAIN_MAX)[-_CHAIN_MAX:])
            if piece.strip()
        )
    for hop in read:
        hops.append(hop)
        if hop.address is None:
            break
    return hops


def _chain(forwarded: Forwarded) -> list[bytes]:
    return [
        hop.strip()
        for name, value in forwarded
        if name == b"x-forwarded-for"
        for hop in value.split(b",")
        if hop.strip()
    ]


def _element(piece: bytes) -> Hop:
    text = piece.decode("latin-1").strip(" \t")
    if not _ELEMENT.match(text):
        return Hop(None)
    said: dict[str, str] = {}
    for name, quoted, bare in _PAIRS.findall(text):
        key = name.lower()
        if key in said:  # each once (§4)
            return Hop(None)
        said[key] = re.sub(r"\\(.)", r"\1", quoted) if quoted else bare
    host = said.get("host", "").encode("latin-1")
    return Hop(
        _address(said.get("for", "")),
        said.get("proto", "").encode("latin-1"),
        host if _HOST.match(host) else b"",
    )


def _address(node: str) -> str | None:
    """The address of one hop, without brackets and port; an IPv4 address in IPv6 clothes as itself."""
    found = _NODE.match(node)
    if found is None:
        return None
    try:
        address = ipaddress.ip_address(found["six"] or found["four"] or found["bare"])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
