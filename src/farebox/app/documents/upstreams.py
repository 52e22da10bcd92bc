"""The shape of an upstream in farebox.yaml: where admitted calls go."""

from __future__ import annotations

import base64
import contextlib
import re
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)

from farebox.app.documents.faults import Document, fault
from farebox.app.documents.scalars import TimeoutS, duration_text
from farebox.domain.access import Balance, HealthCheck, Upstream, UpstreamTls

TIMEOUT_S_MAX: Final = 3_600.0
TOTAL_TIMEOUT_S_MAX: Final = 86_400.0
PROBE_INTERVAL_S_MIN: Final = 0.1
TARGETS_MAX: Final = 100

_PLAIN: Final = Upstream("")
_CHECK: Final = HealthCheck("/")

_PROBE_PATH = re.compile(r"/[\x21\x22\x24-\x7e]*\Z", re.ASCII)  # no blanks, no line ends, no fragment
_SERVER_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z", re.ASCII)


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


def _up_to(bound_s: float) -> AfterValidator:
    def check(seconds: float) -> float:
        if not 0 < seconds <= bound_s:
            raise fault(
                "DURATION_MALFORMED", f"the wait must be above 0 and at most {duration_text(bound_s)}"
            )
        return seconds

    return AfterValidator(check)


Timeout = Annotated[TimeoutS, _up_to(TIMEOUT_S_MAX)]
TotalTimeout = Annotated[TimeoutS, _up_to(TOTAL_TIMEOUT_S_MAX)]


def path(path: str) -> str:
    if not path.startswith("/") or path.startswith("//"):
        raise fault("PATH_MALFORMED", f"{path[:80]!r} does not begin with one slash")
    return path


def _probe_path(value: str) -> str:
    path(value)
    if not _PROBE_PATH.match(value):
        raise fault(
            "PATH_MALFORMED", f"{value[:80]!r} holds characters that a request cannot carry: encode them"
        )
    return value


def _interval(seconds: float) -> float:
    if seconds < PROBE_INTERVAL_S_MIN:
        raise fault(
            "DURATION_MALFORMED", f"the interval must be {duration_text(PROBE_INTERVAL_S_MIN)} at least"
        )
    return seconds


def _within_interval(seconds: float, info: ValidationInfo) -> float:
    if seconds > info.data.get("interval", TIMEOUT_S_MAX):
        raise fault(
            "DURATION_MALFORMED",
            "the timeout is longer than the interval: a target is asked one question at a time",
        )
    return seconds


class HealthDocument(Document):
    """How targets are asked whether they are well. Plain text instead of a mapping is the path."""

    path: Annotated[str, StringConstraints(strict=True, max_length=2000), AfterValidator(_probe_path)]
    interval: Annotated[Timeout, AfterValidator(_interval)] = _CHECK.interval_s
    timeout: Annotated[Timeout, AfterValidator(_within_interval), Field(validate_default=True)] = "2s"  # type: ignore[assignment]
    healthy_after: Annotated[int, Field(strict=True, ge=1, le=100)] = _CHECK.healthy_after
    unhealthy_after: Annotated[int, Field(strict=True, ge=1, le=100)] = _CHECK.unhealthy_after
    statuses: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=200, le=599)], ...], Field(max_length=100)
    ] = ()

    def value(self) -> HealthCheck:
        return HealthCheck(
            self.path, self.interval, self.timeout, self.healthy_after, self.unhealthy_after, self.statuses
        )


def _health(value: Any) -> Any:
    return HealthDocument(path=_probe_path(value)) if isinstance(value, str) else value


def _file(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise fault(
            "FILE_MALFORMED", f"{value[:80]!r} is not the absolute path of a file, such as /etc/ca.pem"
        )
    return value


def _authority(value: str) -> str:
    return value if value == "system" else _file(value)


def _server_name(value: str) -> str:
    if not _SERVER_NAME.match(value):
        raise fault("HOST_MALFORMED", f"{value[:80]!r} is not a host name: write it like api.example.com")
    return value.lower()


def _pin(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("sha256/"):
        with contextlib.suppress(ValueError):
            digest = base64.b64decode(value.removeprefix("sha256/"), validate=True)
            if len(digest) == 32:
                return digest
    raise fault(
        "PIN_MALFORMED",
        f"{str(value)[:80]!r} is not a pin: write sha256/ and the Base64 of the SHA-256 of the public key (SPKI)",
    )


FilePath = Annotated[str, StringConstraints(strict=True, max_length=4000), AfterValidator(_file)]
Pin = Annotated[
    bytes,
    BeforeValidator(_pin),
    WithJsonSchema({"type": "string", "pattern": "^sha256/[A-Za-z0-9+/]{43}=$"}),
]


class ClientCertificateDocument(Document):
    """What the gateway shows of itself: PEM files of its machine."""

    certificate: FilePath
    key: FilePath


class TlsDocument(Document):
    """How an https upstream proves itself, and we to it. Files are those of the gateways' machines."""

    ca: Annotated[str, StringConstraints(strict=True, max_length=4000), AfterValidator(_authority)] | None = (
        None
    )
    server_name: Annotated[str, StringConstraints(strict=True), AfterValidator(_server_name)] | None = None
    pins: Annotated[tuple[Pin, ...], Field(max_length=20)] = ()
    client_certificate: ClientCertificateDocument | None = None

    def value(self) -> UpstreamTls:
        ours = self.client_certificate
        return UpstreamTls(
            self.ca,
            self.server_name,
            self.pins,
            ours.certificate if ours else None,
            ours.key if ours else None,
        )


def _targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    if not targets:
        raise fault("TARGETS_MISSING", "there is no target: write one URL at least")
    for place, target in enumerate(targets):
        if target in targets[:place]:
            raise fault("TARGET_DUPLICATE", f"{target} stands there twice: write each target once")
    return targets


def _one_of_both(url: str | None, info: ValidationInfo) -> str | None:
    if "targets" not in info.data:
        return url  # unreadable, and said so
    if url is None and info.data["targets"] is None:
        raise fault("FIELD_MISSING", "url is missing: say where calls go, or give targets that share them")
    if url is not None and info.data["targets"] is not None:
        raise fault("TARGETS_AND_URL", "targets are there as well: move the url among them")
    return url


def _needs_targets(balance: str | None, info: ValidationInfo) -> str | None:
    if balance is not None and info.data.get("targets", ()) is None:
        raise fault(
            "BALANCE_WITHOUT_TARGETS", "there are no targets to share calls: give them, or leave it out"
        )
    return balance


def _needs_https(tls: TlsDocument | None, info: ValidationInfo) -> TlsDocument | None:
    urls = info.data.get("targets") or (info.data.get("url"),)
    if tls is not None and all(url is not None and not url.startswith("https:") for url in urls):
        raise fault(
            "TLS_WITHOUT_HTTPS", "no URL of this upstream begins with https: write it so, or leave tls out"
        )
    return tls


class UpstreamDocument(Document):
    """Where admitted calls go: one ``url``, or several ``targets`` that share the calls."""

    targets: Annotated[tuple[WebUrl, ...], Field(max_length=TARGETS_MAX), AfterValidator(_targets)] | None = (
        None
    )
    url: Annotated[WebUrl | None, AfterValidator(_one_of_both), Field(validate_default=True)] = None
    balance: Annotated[Balance | None, AfterValidator(_needs_targets)] = None
    timeout: Timeout = _PLAIN.timeout_s
    total_timeout: TotalTimeout | None = None
    connect_timeout: Timeout | None = None
    idle_timeout: Timeout | None = None
    connections_max: Annotated[int, Field(strict=True, ge=1, le=65_535)] | None = None
    waiting_max: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] | None = None
    health: Annotated[HealthDocument | None, BeforeValidator(_health)] = None
    tls: Annotated[TlsDocument | None, AfterValidator(_needs_https)] = None

    def value(self, upstream_id: str) -> Upstream:
        return Upstream(
            id=upstream_id,
            url=self.url or "",
            timeout_s=self.timeout,
            health=self.health.value() if self.health else None,
            targets=self.targets or (),
            balance=self.balance or _PLAIN.balance,
            tls=self.tls.value() if self.tls else None,
            connections_max=self.connections_max,
            waiting_max=self.waiting_max,
            connect_timeout_s=self.connect_timeout,
            idle_timeout_s=self.idle_timeout,
            total_timeout_s=self.total_timeout,
        )


def upstream_document(upstream: Upstream) -> dict[str, Any]:
    """The inverse of ``UpstreamDocument.value``; what is at its default is left out."""
    document: dict[str, Any] = (
        {"targets": list(upstream.targets)} if upstream.targets else {"url": upstream.url}
    )
    if upstream.targets and upstream.balance != "round_robin":
        document["balance"] = upstream.balance
    document["timeout"] = duration_text(upstream.timeout_s)
    for name, wait_s in (
        ("total_timeout", upstream.total_timeout_s),
        ("connect_timeout", upstream.connect_timeout_s),
        ("idle_timeout", upstream.idle_timeout_s),
    ):
        if wait_s is not None:
            document[name] = duration_text(wait_s)
    for name, count in (
        ("connections_max", upstream.connections_max),
        ("waiting_max", upstream.waiting_max),
    ):
        if count is not None:
            document[name] = count
    if upstream.health:
        document["health"] = _health_document(upstream.health)
    if upstream.tls:
        document["tls"] = _tls_document(upstream.tls)
    return document


def _health_document(check: HealthCheck) -> str | dict[str, Any]:
    plain = HealthCheck(check.path)
    document: dict[str, Any] = {"path": check.path}
    if check.interval_s != plain.interval_s:
        document["interval"] = duration_text(check.interval_s)
    if check.timeout_s != plain.timeout_s:
        document["timeout"] = duration_text(check.timeout_s)
    if check.healthy_after != plain.healthy_after:
        document["healthy_after"] = check.healthy_after
    if check.unhealthy_after != plain.unhealthy_after:
        document["unhealthy_after"] = check.unhealthy_after
    if check.statuses:
        document["statuses"] = list(check.statuses)
    return document if len(document) > 1 else check.path


def _tls_document(tls: UpstreamTls) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if tls.ca:
        document["ca"] = tls.ca
    if tls.server_name:
        document["server_name"] = tls.server_name
    if tls.pins:
        document["pins"] = [f"sha256/{base64.b64encode(pin).decode()}" for pin in tls.pins]
    if tls.certificate:
        document["client_certificate"] = {"certificate": tls.certificate, "key": tls.key}
    return document
