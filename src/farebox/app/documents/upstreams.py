"""The shape of an upstream in farebox.yaml: where admitted calls go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from farebox.app.documents.faults import Document, fault
from farebox.app.documents.scalars import TimeoutS, duration_text
from farebox.domain.access import Upstream

TIMEOUT_S_MAX: Final = 3_600.0


def _url(value: Any) -> str:
    if not isinstance(value, str):
        raise fault("URL_MALFORMED", f"{value!r} is not a URL: write it like http://127.0.0.1:9000")
    try:
        parts = urlsplit(value)
        port_is_good = parts.port is None or parts.port > 0
    except ValueError:
        raise fault(
            "URL_MALFORMED", f"{value[:80]!r} is not a URL: write it like http://127.0.0.1:9000"
        ) from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not port_is_good
        or re.search(r"[\s\x00-\x1f\\]", value)
    ):
        raise fault(
            "URL_MALFORMED",
            f"{value[:80]!r} is not an http or https URL: write it like http://127.0.0.1:9000",
        )
    if parts.username or parts.password:
        raise fault(
            "URL_MALFORMED",
            "the URL holds a user name or password: set a header in rewrite.set_headers instead",
        )
    if parts.query or parts.fragment or "?" in value or "#" in value:
        raise fault("URL_MALFORMED", f"{value[:80]!r} has a query or fragment: leave it out")
    return value.rstrip("/")


WebUrl = Annotated[str, BeforeValidator(_url), WithJsonSchema({"type": "string", "format": "uri"})]


def _timeout(seconds: float) -> float:
    if not 0 < seconds <= TIMEOUT_S_MAX:
        raise fault("DURATION_MALFORMED", "the timeout must be above 0 and at most 1h")
    return seconds


def path(path: str) -> str:
    if not path.startswith("/") or path.startswith("//"):
        raise fault("PATH_MALFORMED", f"{path[:80]!r} does not begin with one slash")
    return path


class UpstreamDocument(Document):
    """Where admitted calls go."""

    not_yet: ClassVar[Mapping[str, str]] = {
        "targets": "several targets of one upstream are",
        "balance": "balancing is",
    }

    url: WebUrl
    timeout: Annotated[TimeoutS, AfterValidator(_timeout)] = 30.0
    health: Annotated[str, AfterValidator(path)] | None = None

    def value(self, upstream_id: str) -> Upstream:
        return Upstream(upstream_id, self.url, self.timeout, self.health)


def upstream_document(upstream: Upstream) -> dict[str, Any]:
    document: dict[str, Any] = {"url": upstream.url, "timeout": duration_text(upstream.timeout_s)}
    if upstream.health:
        document["health"] = upstream.health
    return document
