"""File descriptors of a gateway process: each connection is one, and what a shell grants is often 1024."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Final

import structlog

from farebox.gateway.settings import GatewaySettings

log = structlog.get_logger(__name__)

#: Database connections, spool files, sockets that are listened on, logs.
_OTHERS: Final = 64


def make_room(settings: GatewaySettings, of_targets: Iterable[GatewaySettings]) -> int:
    """As many descriptors as this process may have (the soft limit becomes the hard one); how many that is.

    Says so when they are fewer than the connections that the settings allow, of clients and to each target. Beyond the limit
    clients wait in the accept queue and upstreams count as unreachable.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS refuses «unlimited»
            log.debug("descriptors_not_raised", soft=soft, hard=hard)
    to_upstreams = sum(target.upstream_connections_max for target in of_targets)
    wanted = settings.connections_max + to_upstreams + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        log.warning(
            "descriptors_too_few",
            allowed=soft,
            wanted=wanted,
            connections_max=settings.connections_max,
            upstream_connections_max=to_upstreams,
        )
    return soft
