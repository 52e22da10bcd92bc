"""A buyer's key: one secp256k1 account, kept in a file that only its owner may read."""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path

from farebox.base.errors import refuse
from farebox.protocols import strict_json
from farebox.protocols.evm import ORDER, address_of, checksum_address, sign
from farebox.protocols.strict_json import Fields

_CODE = "WALLET_INVALID"


class Wallet:
    """An account that signs. Its key never shows in a ``repr``."""

    def __init__(self, private_key: bytes) -> None:
        self._key = private_key
        self.address = checksum_address(address_of(private_key))

    def __repr__(self) -> str:
        return f"Wallet({self.address})"

    @classmethod
    def new(cls) -> Wallet:
        """A fresh account, in memory only."""
        return cls((secrets.randbelow(ORDER - 1) + 1).to_bytes(32, "big"))

    @classmethod
    def from_key(cls, private_key: str) -> Wallet:
        """The account of ``0x`` and 64 hexadecimal digits."""
        try:
            key = bytes.fromhex(private_key.removeprefix("0x"))
        except ValueError:
            key = b""
        if len(key) != 32:
            raise refuse("PRIVATE_KEY_INVALID", "a private key is 0x and 64 hexadecimal digits")
        return cls(key)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Wallet:
        """A fresh account in a new file of mode 0600. ``FileExistsError`` rather than overwriting a key."""
        wallet = cls.new()
        text = (
            json.dumps({"address": wallet.address, "private_key": "0x" + wallet._key.hex()}, indent=2) + "\n"
        )
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as out:
            out.write(text)
        return wallet

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Wallet:
        """The account in a wallet file. ``Refused`` when others may read the file, or it is not a wallet."""
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
            raise refuse(_CODE, f"{path} can be read by others: chmod 600 {path}")
        fields = Fields(strict_json.loads(Path(path).read_bytes(), _CODE), _CODE)
        wallet = cls.from_key(fields.text("private_key"))
        if (said := fields.optional_text("address")) is not None and said.lower() != wallet.address.lower():
            raise refuse(_CODE, f"{path}: the address is not that of the private key", "address")
        return wallet

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Wallet:
        try:
            return cls.load(path)
        except FileNotFoundError:
            return cls.create(path)

    def sign(self, digest: bytes) -> bytes:
        """65 bytes r, s, v over 32 bytes."""
        return sign(self._key, digest)
