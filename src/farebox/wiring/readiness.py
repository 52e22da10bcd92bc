"""How a child process tells its supervisor that it answers: one line down an inherited pipe.

Standard library only: every role imports this.
"""

from __future__ import annotations

import os
from typing import Final

#: Names the inherited file descriptor. Unset: nobody waits (the role was started by hand).
READY_FD_VARIABLE: Final = "FAREBOX_READY_FD"


def say_ready() -> None:
    """Called once by a role when it accepts work. Harmless when nobody listens."""
    number = os.environ.pop(READY_FD_VARIABLE, None)
    if number is None:
        return
    try:
        os.write(int(number), b"ready\n")
        os.close(int(number))
    except (
        OSError,
        ValueError,
    ):  # the supervisor went away or the number is stale: being ready is still true
        return
