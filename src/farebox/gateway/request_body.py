"""The body of one request on its way in: where it ends, how large it may be, and whether its client waits to be asked for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from farebox.gateway.answers import too_large
from farebox.gateway.bodies import Body, LengthBody
from farebox.gateway.heads import RequestHead
from farebox.gateway.problems import Fault


class RequestBody:
    """``feed`` is the reader's own (bodies.py); what may be too much of it is for ``count`` to say."""

    __slots__ = ("_bytes", "_bytes_max", "_reader", "awaited", "feed")

    feed: Callable[[bytes], tuple[bytes, bool, bytes]]

    def __init__(self, head: RequestHead, reader: Body, bytes_max: int) -> None:
        """Raises ``Fault``."""
        if head.block.upgrade and head.version_1_1:
            raise Fault("upgrade_unsupported", "A request that asks for an upgrade must not have a body.")
        self._reader = reader
        self._bytes = 0
        self._bytes_max = bytes_max
        self.feed = reader.feed
        self.awaited = head.block.expects_continue and head.version_1_1  # no byte comes before our 100
        if head.block.content_length > bytes_max:
            raise too_large(bytes_max)

    def bound(self, bytes_max: int) -> None:
        """Its route takes less. Raises ``Fault``."""
        if bytes_max < self._bytes_max:
            self._bytes_max = bytes_max
            if (self.left or 0) > bytes_max:
                raise too_large(bytes_max)

    def count(self, payload: bytes) -> None:
        """So much went on. Raises ``Fault``."""
        self._bytes += len(payload)
        if self._bytes > self._bytes_max:
            raise too_large(self._bytes_max)

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    @property
    def left(self) -> int | None:
        """How many bytes are still to come; None: nobody can say."""
        return self._reader.left if isinstance(self._reader, LengthBody) else None

    @property
    def trailers(self) -> Sequence[bytes]:
        return self._reader.trailers
