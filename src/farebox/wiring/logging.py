"""Structured logs on standard error: one JSON object a line, or a line for people. Bound context (``request_id``) rides along.

Names that may hold a secret are blanked here as a last line of defence; the first is that nobody logs one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

from farebox.base.secrets import ADMIN_KEY_PREFIX, CUSTOMER_KEY_PREFIX, Secret
from farebox.config import LogConfig

_BLANKED: Final = frozenset(
    ("authorization", "api_key", "key", "token", "master_key", "admin_key", "password", "secret", "database_url", "signature")
)  # fmt: skip


def configure_logging(config: LogConfig, process: str) -> None:
    """Set up structlog and the standard library's logging for this process; ``process`` is on every line (``gw0``)."""
    level = getattr(logging, config.level.upper())
    # Local variables in a traceback would show keys and payloads: frames only, in both forms.
    if config.format == "json":
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last: list[Any] = [
            structlog.processors.ExceptionRenderer(frames),
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Names(process),
        blank_secrets,
    ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # The stream is taken at each write, so that a redirected standard error is honoured.
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING) if config.level != "debug" else level)


class _Names:
    """Puts the process's name on every line."""

    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("process", self._process)
        return event


def blank_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace values that are secrets by name, by type or by their well-known beginning."""
    for name, value in event.items():
        if name in _BLANKED or isinstance(value, Secret):
            event[name] = "***"
        elif isinstance(value, str) and (ADMIN_KEY_PREFIX in value or CUSTOMER_KEY_PREFIX in value):
            event[name] = "*** (held a key)"
    return event
