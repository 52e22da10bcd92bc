"""Request bodies held whole, because a payment binds them or one of our pages reads them: each bounded in size and time, all of
them together bounded, and no client address with more than its share."""

from __future__ import annotations

from farebox.gateway.answers import no_room, too_large, too_much_held
from farebox.gateway.settings import GatewaySettings


class HeldBodies:
    """What all of them weigh in this process, in bytes."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._by_address: dict[str, int] = {}
        self.bytes = 0

    def check(self, address: str, size: int) -> None:
        """Raises ``Fault`` when ``size`` more would be too much."""
        if self._by_address.get(address, 0) + size > self._settings.buffered_bytes_per_client_max:
            raise too_much_held()
        if self.bytes + size > self._settings.buffered_bytes_max:
            raise no_room()

    def add(self, address: str, size: int) -> None:
        self.bytes += size
        self._by_address[address] = self._by_address.get(address, 0) + size

    def give_back(self, address: str, size: int) -> None:
        self.bytes -= size
        left = self._by_address.get(address, 0) - size
        if left > 0:
            self._by_address[address] = left
        else:
            self._by_address.pop(address, None)


class HeldBody:
    """One body on its way in. It counts until ``give_back``, also after it was taken.

    One buffer: a list would let tiny pieces weigh many times their bytes.
    """

    __slots__ = ("_address", "_among", "_bytes_max", "_counted", "_data", "ends_at")

    def __init__(self, among: HeldBodies, address: str, bytes_max: int, ends_at: float) -> None:
        self._among = among
        self._address = address
        self._bytes_max = bytes_max
        self._data = bytearray()
        self._counted = 0
        self.ends_at = ends_at  # on the gateway's ticker: it must be whole by then

    def expect(self, size: int) -> None:
        """So much is said to come. Raises ``Fault``."""
        if size > self._bytes_max:
            raise too_large(self._bytes_max)
        self._among.check(self._address, size)

    def add(self, payload: bytes) -> None:
        """Raises ``Fault``, and then does not hold it."""
        size = len(payload)
        if len(self._data) + size > self._bytes_max:
            raise too_large(self._bytes_max)
        self._among.check(self._address, size)
        self._among.add(self._address, size)
        self._counted += size
        self._data += payload

    def take(self) -> bytes:
        """The whole body."""
        data, self._data = bytes(self._data), bytearray()
        return data

    def give_back(self) -> None:
        """It is held no longer."""
        self._data = bytearray()
        if self._counted:
            self._among.give_back(self._address, self._counted)
            self._counted = 0
