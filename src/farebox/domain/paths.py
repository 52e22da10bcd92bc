"""Which paths are served at all: only those that every reader down the road reads in the same way.

The route is matched on exactly the string that is forwarded. What one server takes apart differently from another (dot
segments, doubled or encoded slashes, backslashes, NUL) is the way around a paid route, so it is refused, not cleaned: in
what clients ask for, and in what a catalog would make of it.
"""

from __future__ import annotations

import re
from typing import Final

_CLEAN: Final = re.compile(rb"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)+/?\Z|/\Z")
_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TWO_WAYS: Final = re.compile(rb"%(?:2[fF]|5[cC]|00)")
#: One character of ASCII in more bytes than it needs (RFC 3629 §3): careless decoders make «/» and «.» of these.
_OVERLONG: Final = re.compile(rb"%(?:[cC][01]%[89abAB]|[eE]0%[89]|[fF]0%8)")
_VISIBLE: Final = bytes(range(0x21, 0x7F))


def ambiguity(path: bytes) -> str | None:
    """Why a path that begins with a slash could be read in two ways, in a sentence; None: it cannot."""
    if _CLEAN.match(path):
        return None
    if path.translate(None, _VISIBLE):
        return "The path holds a blank, a control character or a character beyond ASCII: escape it."
    if b"\\" in path or b"#" in path:
        return "The path holds a backslash or a fragment."
    if b"//" in path:
        return "The path has an empty segment («//»)."
    if _ESCAPE.search(path):
        return "The path has a percent sign without two hexadecimal digits."
    if _TWO_WAYS.search(path):
        return "The path has an escaped slash, backslash or NUL."
    if _OVERLONG.search(path):
        return "The path has an escaped character in an overlong form of UTF-8."
    for segment in path.split(b"/"):
        # «..;x» is a dot segment and «;x» an empty one to servers that drop path parameters; «%2e» is a dot to those that
        # unescape first.
        bare = segment.replace(b"%2e", b".").replace(b"%2E", b".").partition(b";")[0]
        if bare in (b".", b".."):
            return "The path has a dot segment («.» or «..»)."
        if segment.startswith(b";"):
            return "The path has a segment of parameters only («/;x»)."
    return None
