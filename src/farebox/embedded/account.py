"""Under whom the database server runs. PostgreSQL refuses to run as root, and so do we."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farebox.base.errors import Unavailable

_PREFERRED: Final = ("farebox", "postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    """A uid that the password database knows (``initdb`` asks it), and whether we have to change into it."""

    name: str
    uid: int
    gid: int
    foreign: bool

    def may_read(self, path: Path) -> bool:
        """Whether the file's mode lets this account read it (and run it, when it is a program)."""
        found = path.stat()
        wanted = 0o5 if found.st_mode & 0o111 else 0o4
        return self._granted(found) & wanted == wanted

    def may_enter(self, directory: Path) -> bool:
        """Whether the directory's mode lets this account pass through it."""
        return bool(self._granted(directory.stat()) & 0o1)

    def _granted(self, found: os.stat_result) -> int:
        if self.uid == 0:
            return 0o7
        if found.st_uid == self.uid:
            return found.st_mode >> 6 & 0o7
        groups = {self.gid} if self.foreign else {self.gid, *os.getgroups()}
        if found.st_gid in groups:
            return found.st_mode >> 3 & 0o7
        return found.st_mode & 0o7


def server_account() -> Account:
    """Ourselves, or when we are root the first of farebox, postgres, nobody that exists."""
    if os.geteuid() != 0:
        uid = os.geteuid()
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError as error:
            raise Unavailable(
                f"the user id {uid} has no name on this machine, and the embedded database needs one: "
                "add it to /etc/passwd, or set FAREBOX_DATABASE_URL"
            ) from error
        return Account(name, uid, os.getegid(), foreign=False)
    for name in _PREFERRED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid, foreign=True)
    raise Unavailable(
        "the embedded database never runs as root and this machine has none of the users farebox, postgres, nobody: "
        "add one, run as an ordinary user, or set FAREBOX_DATABASE_URL"
    )


def blocking_directory(directory: Path, account: Account) -> Path | None:
    """The outermost directory on the way that the account cannot pass; None when the way is open."""
    whole = directory.resolve()
    for step in (*reversed(whole.parents), whole):
        if not account.may_enter(step):
            return step
    return None
