"""Which paths are served at all: only those that every reader down the road reads in the same way.

The route is matched on exactly the string that is forwarded. What one server takes apart differently from another (dot
segments, doubled or encoded slashes, backslashes, NUL) is the way around a paid route, so it is refused, not cleaned.
"""

from __future__ import annotations

import re
from typing import Final

from farebox.gateway.problems import Fault

_CLEAN: Final = re.compile(rb"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)+/?\Z|/\Z")
_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TWO_WAYS: Final = re.compile(rb"%(?:2[fF]|5[cC]|00)")
_VISIBLE: Final = bytes(range(0x21, 0x7F))


def check_path(path: bytes) -> None:
    """Raises ``Fault`` for a path that could be read in two ways."""
    if _CLEAN.match(path):
        return
    if path.translate(None, _VISIBLE):
        raise Fault(
            "request_malformed",
            "The path holds a blank, a control character or a character beyond ASCII: escape it.",
        )
    if b"\\" in path or b"#" in path:
        raise Fault("request_malformed", "The path holds a backslash or a fragment.")
    if b"//" in path:
        raise Fault("request_malformed", "The path has an empty segment («//»).")
    if _ESCAPE.search(path):
        raise Fault("request_malformed", "The path has a percent sign without two hexadecimal digits.")
    if _TWO_WAYS.search(path):
        raise Fault("request_malformed", "The path has an escaped slash, backslash or NUL.")
    for segment in path.split(b"/"):
        # «..;x» is a dot segment to servers that drop path parameters, «%2e» to those that unescape first.
        bare = segment.replace(b"%2e", b".").replace(b"%2E", b".").partition(b";")[0]
        if bare in (b".", b".."):
            raise Fault("request_malformed", "The path has a dot segment («.» or «..»).")
