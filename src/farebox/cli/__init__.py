"""``farebox …``: the commands an operator and a buyer type. Thin: each finds its words here and its work elsewhere.

Exit codes: 0 done, 1 refused or failed (one clear line on standard error), 2 wrong usage.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The entry point of the ``farebox`` command."""
    if sys.argv[1:] in (
        ["version"],
        ["--version"],
    ):  # asked by scripts, often: answered before anything is loaded
        from farebox import __version__

        print(f"farebox {__version__}")
        return

    from farebox.base.errors import FareboxError, Refused, Unavailable
    from farebox.cli.commands import app

    exit_code = 1
    try:
        app()
    except Refused as refused:
        exit_code = 2 if refused.reason.code == "USAGE" else 1
        for reason in refused.reasons:
            _say(f"{reason.field}: {reason.message}" if reason.field else reason.message)
    except Unavailable as away:
        _say(away.what)
    except FareboxError as error:
        _say(str(error))
    except BrokenPipeError:  # `farebox export | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("FAREBOX_LOG_LEVEL", "").lower() == "debug":
            raise
        _say(f"a fault of ours: {type(error).__name__}: {error} (FAREBOX_LOG_LEVEL=debug shows where)")
    else:
        return
    sys.exit(exit_code)


def _say(line: str) -> None:
    print("farebox: " + " ".join(line.split()), file=sys.stderr)
