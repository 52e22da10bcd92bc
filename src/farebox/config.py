"""Configuration: one frozen tree, parsed from a mapping (the environment). Nothing here reads the world by itself.

``Config.parse`` reports every fault at once, each with the variable's name and what to do. A secret may be given as
``NAME`` or as ``NAME_FILE=/path``; the file is read by the function passed in, never by this module.
``VARIABLES`` is the whole list: what is not in it is not read, and docs/configuration.md is tested against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, cast
from urllib.parse import urlsplit

from farebox.base.errors import Reason, Refused
from farebox.base.secrets import Secret, admin_key, derive_key

Mode = Literal["live", "sandbox"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]
OnFull = Literal["refuse", "drop_detail"]

MASTER_KEY_CHARACTERS_MIN: Final = 32
EDGE_SECRET_CHARACTERS_MIN: Final = 32


@dataclass(frozen=True, slots=True)
class Variable:
    """One name in the environment. ``default`` None: unset means the feature is off or the command says it is missing."""

    name: str
    meaning: str
    default: str | None = None
    aliases: tuple[str, ...] = ()
    secret: bool = False  # may come as NAME_FILE; never shown


VARIABLES: Final[tuple[Variable, ...]] = (
    Variable("FAREBOX_MODE", "`live` or `sandbox`; `farebox up --sandbox` and `farebox demo` set it for their processes", "live"),
    Variable("FAREBOX_DATA", "data directory: lock, state, spool and the embedded database", ".farebox"),
    Variable("FAREBOX_DATABASE_URL", "PostgreSQL 15 to 18; unset: `farebox up` starts the embedded one", None, ("DATABASE_URL",), True),
    Variable("FAREBOX_DATABASE_DIRECT_URL", "direct connection for the listener and migrations when a transaction pooler stands between", None, (), True),
    Variable("FAREBOX_DATABASE_POOL_SIZE_MAX", "connections a process", "8"),
    Variable("FAREBOX_MASTER_KEY", "root of the derived signing keys and of the first admin key; at least 32 characters", None, ("API_MASTER_KEY",), True),
    Variable("FAREBOX_KEY_QUOTES", "signs quotes, instead of the derived key; 64 hexadecimal digits", None, (), True),
    Variable("FAREBOX_KEY_TOKENS", "signs pass tokens, instead of the derived key; 64 hexadecimal digits", None, (), True),
    Variable("FAREBOX_PUBLIC_URL", "what buyers see, where farebox.yaml has no `server.public_url`: https://api.example.com"),
    Variable("FAREBOX_LOG_LEVEL", "`debug`, `info`, `warning` or `error`", "info", ("LOG_LEVEL",)),
    Variable("FAREBOX_LOG_FORMAT", "`json` or `console`", "json"),
    Variable("FAREBOX_GATEWAYS", "gateway processes on this machine", "1"),
    Variable("FAREBOX_GATEWAY_HOST", "address the gateway listens on", "127.0.0.1"),
    Variable("FAREBOX_GATEWAY_PORT", "port the gateway listens on; 0 picks a free one", "8402"),
    Variable("FAREBOX_AUTHORIZE_HOST", "address of the forward-auth listener, for nginx, Caddy or Envoy in front (docs/edges.md)", "127.0.0.1"),
    Variable("FAREBOX_AUTHORIZE_PORT", "port of the forward-auth listener; unset: there is none; 0 picks a free one"),
    Variable("FAREBOX_EDGE_SECRET", "what an edge proves itself with at the forward-auth listener; at least 32 characters", None, (), True),
    Variable("FAREBOX_API_HOST", "address the control API listens on", "127.0.0.1"),
    Variable("FAREBOX_API_PORT", "port the control API listens on; 0 picks a free one", "8400", ("PORT",)),
    Variable("FAREBOX_API_RATE_LIMIT_RPM", "requests a minute an admin key may make; 0: no limit", "6000", ("API_RATE_LIMIT_RPM",)),
    Variable("FAREBOX_OPS_HOST", "address of the health and metrics port", "127.0.0.1"),
    Variable("FAREBOX_OPS_PORT", "port of /healthz, /ready and /metrics; 0 picks a free one", "8403"),
    Variable("FAREBOX_HEADER_BYTES_MAX", "request line and headers of one request", "32kB"),
    Variable("FAREBOX_HEADER_COUNT_MAX", "headers of one request", "100"),
    Variable("FAREBOX_TARGET_BYTES_MAX", "request target (path and query)", "8kB"),
    Variable("FAREBOX_BODY_BYTES_MAX", "request body on its way to an upstream; 0: no limit", "1GB"),
    Variable("FAREBOX_PAID_BODY_BYTES_MAX", "request body of an exact fare, held in memory while it is paid", "1048576"),
    Variable("FAREBOX_BUFFERED_BYTES_MAX", "request bodies a gateway process holds in memory, of all its clients together; beyond it 503", "64MB"),
    Variable("FAREBOX_BUFFERED_BYTES_PER_CLIENT_MAX", "of these, bodies of one client address; beyond it 429", "16MB"),
    Variable("FAREBOX_PAID_BODY_TIMEOUT_S", "seconds for the whole of a body that is held, however steadily it comes", "60"),
    Variable("FAREBOX_CONNECTIONS_MAX", "client connections a gateway process holds open", "10000"),
    Variable("FAREBOX_HEADER_TIMEOUT_S", "seconds a client has to send a request's headers", "15"),
    Variable("FAREBOX_IDLE_TIMEOUT_S", "seconds an idle client connection is kept", "75"),
    Variable("FAREBOX_BODY_TIMEOUT_S", "seconds without a byte before a body or an answer is given up", "60"),
    Variable("FAREBOX_UPSTREAM_CONNECT_TIMEOUT_S", "seconds to reach an upstream", "5"),
    Variable("FAREBOX_UPSTREAM_IDLE_TIMEOUT_S", "seconds an idle upstream connection is kept; less than the upstream itself keeps it (Node: 5)", "4"),
    Variable("FAREBOX_UPSTREAM_CONNECTIONS_MAX", "connections a gateway process opens to one upstream", "512"),
    Variable("FAREBOX_UPSTREAM_ATTEMPTS_MAX", "targets of an upstream that one call is taken to, when those before cannot be reached", "2"),
    Variable("FAREBOX_TUNNEL_IDLE_TIMEOUT_S", "seconds a WebSocket or another tunnel is kept in which nothing moves", "300"),
    Variable("FAREBOX_DRAIN_TIMEOUT_S", "seconds a stopping process waits for calls in flight", "20"),
    Variable("FAREBOX_STALE_GRANT_S_MAX", "seconds a known key or pass serves while the database is away", "900"),
    Variable("FAREBOX_GRANT_TTL_S", "seconds a cached grant is used without looking again", "60"),
    Variable("FAREBOX_LEASE_S", "seconds a process may spend a slice of a limit; in a database outage known customers and passes with limits are served that long", "60"),
    Variable("FAREBOX_BUDGET_UNPAID_RPM", "unpaid 402 answers a minute for one client address; 0: no limit", "600"),
    Variable("FAREBOX_BUDGET_BAD_CREDENTIAL_RPM", "bad keys, tokens and payments a minute for one client address; 0: no limit", "120"),
    Variable("FAREBOX_BUDGET_QUOTES_RPM", "quotes and purchases a minute for one client address; 0: no limit", "600"),
    Variable("FAREBOX_SPOOL_DIR", "directory of the local spool; unset: `spool` in the data directory", None),
    Variable("FAREBOX_SPOOL_BYTES_MAX", "size of the spool on disk before `FAREBOX_SPOOL_ON_FULL` applies", "4GB"),
    Variable("FAREBOX_SPOOL_FILE_BYTES_MAX", "size at which a spool file is closed and a new one begun", "16MB"),
    Variable("FAREBOX_SPOOL_FSYNC_MS", "milliseconds between syncs to disk: what a power cut may lose", "100"),
    Variable("FAREBOX_SPOOL_ON_FULL", "`refuse` calls, or `drop_detail` and keep the counts", "refuse"),
    Variable("FAREBOX_SPOOL_SHIP_MS", "milliseconds between two shipments of the spool", "200"),
    Variable("FAREBOX_PAYMENT_NETWORK", "default of `payments.defaults.network`", None, ("T402_NETWORK",)),
    Variable("FAREBOX_PAYMENT_PAY_TO", "default of `payments.defaults.pay_to`", None, ("T402_PAY_TO",)),
)  # fmt: skip

_BY_NAME: Final = {v.name: v for v in VARIABLES}
_KNOWN: Final = frozenset(
    name
    for v in VARIABLES
    for given in (v.name, *v.aliases)
    for name in ((given, f"{given}_FILE") if v.secret else (given,))
)
#: Read by the command line itself, or passed on to an upstream's secrets: not settings of a role.
_OTHER_PREFIXES: Final = (
    "FAREBOX_SECRET_",
    "FAREBOX_CAMPAIGN",
    "FAREBOX_TEST_",
    "FAREBOX_API_KEY",
    "FAREBOX_API_URL",
    "FAREBOX_READY_FD",
)

_SIZE = re.compile(r"([0-9]{1,15})\s*(|B|kB|KB|MB|GB)\Z", re.ASCII)
_SIZE_UNITS: Final = {"": 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
_OF_THE_EDGE: Final = "FAREBOX_EDGE_SECRET"
_EDGE_SECRET = re.compile(
    r"[A-Za-z0-9+/=_.~-]+\Z"
)  # what no edge's configuration language gives a meaning to
_HEX_32 = re.compile(r"[0-9a-fA-F]{64}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Keys:
    """Signing keys, 32 bytes each, one per purpose; derived from the master key with the mode in the purpose."""

    quotes: bytes = field(repr=False)
    tokens: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    url: Secret | None
    direct_url: Secret | None
    pool_size_max: int


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: LogLevel
    format: LogFormat


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Limits of one gateway process. Bytes are bytes, ``_s`` are seconds; 0 means no limit where the name allows it."""

    processes: int
    host: str
    port: int
    header_bytes_max: int
    header_count_max: int
    target_bytes_max: int
    body_bytes_max: int
    paid_body_bytes_max: int
    buffered_bytes_max: int
    buffered_bytes_per_client_max: int
    paid_body_timeout_s: float
    connections_max: int
    header_timeout_s: float
    idle_timeout_s: float
    body_timeout_s: float
    upstream_connect_timeout_s: float
    upstream_idle_timeout_s: float
    upstream_connections_max: int
    upstream_attempts_max: int
    tunnel_idle_timeout_s: float
    drain_timeout_s: float


@dataclass(frozen=True, slots=True)
class AuthorizeConfig:
    """The forward-auth listener. ``port`` None: there is none; 0: a free one."""

    host: str
    port: int | None
    secret: Secret | None


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """How long cached knowledge may open the gate, and what one client address may ask for."""

    stale_grant_s_max: float
    grant_ttl_s: float
    lease_s: float
    unpaid_rpm: int
    bad_credential_rpm: int
    quotes_rpm: int


@dataclass(frozen=True, slots=True)
class SpoolConfig:
    """``directory`` None: the role's ``--spool`` argument decides."""

    directory: str | None
    bytes_max: int
    file_bytes_max: int
    fsync_ms: int
    on_full: OnFull
    ship_ms: int


@dataclass(frozen=True, slots=True)
class ApiConfig:
    host: str
    port: int
    rate_limit_rpm: int


@dataclass(frozen=True, slots=True)
class OpsConfig:
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class PaymentDefaults:
    """What a farebox.yaml leaves out: ``payments.defaults`` in the file wins over these."""

    network: str | None
    pay_to: str | None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a role needs to know before it opens its first connection."""

    mode: Mode
    data_directory: str
    database: DatabaseConfig
    master_key: Secret | None
    own_keys: Mapping[str, Secret] = field(repr=False)
    public_url: str | None
    log: LogConfig
    gateway: GatewayConfig
    authorize: AuthorizeConfig
    admission: AdmissionConfig
    spool: SpoolConfig
    api: ApiConfig
    ops: OpsConfig
    payments: PaymentDefaults

    @classmethod
    def parse(cls, values: Mapping[str, str], read_file: Callable[[str], str] | None = None) -> Config:
        """The tree for these variables. ``read_file`` resolves ``NAME_FILE`` (path → text; OSError when it cannot).

        Raises ``Refused`` with one reason per fault; ``field`` is the variable's name.
        """
        reader = _Reader(values, read_file)
        config = cls(
            mode=cast(Mode, reader.choice("FAREBOX_MODE", "live", "sandbox")),
            data_directory=reader.required("FAREBOX_DATA"),
            database=DatabaseConfig(
                url=reader.database_url("FAREBOX_DATABASE_URL"),
                direct_url=reader.database_url("FAREBOX_DATABASE_DIRECT_URL"),
                pool_size_max=reader.whole("FAREBOX_DATABASE_POOL_SIZE_MAX", 1, 1000),
            ),
            master_key=reader.master_key("FAREBOX_MASTER_KEY"),
            own_keys=reader.keys("QUOTES", "TOKENS"),
            public_url=reader.web_url("FAREBOX_PUBLIC_URL"),
            log=LogConfig(
                level=cast(LogLevel, reader.choice("FAREBOX_LOG_LEVEL", "debug", "info", "warning", "error")),
                format=cast(LogFormat, reader.choice("FAREBOX_LOG_FORMAT", "json", "console")),
            ),
            gateway=GatewayConfig(
                processes=reader.whole("FAREBOX_GATEWAYS", 1, 256),
                host=reader.required("FAREBOX_GATEWAY_HOST"),
                port=reader.whole("FAREBOX_GATEWAY_PORT", 0, 65535),
                header_bytes_max=reader.size("FAREBOX_HEADER_BYTES_MAX", 1024, 1_000_000),
                header_count_max=reader.whole("FAREBOX_HEADER_COUNT_MAX", 10, 10_000),
                target_bytes_max=reader.size("FAREBOX_TARGET_BYTES_MAX", 256, 1_000_000),
                body_bytes_max=reader.size("FAREBOX_BODY_BYTES_MAX", 0, 10**15),
                paid_body_bytes_max=reader.size("FAREBOX_PAID_BODY_BYTES_MAX", 0, 10**9),
                buffered_bytes_max=reader.size("FAREBOX_BUFFERED_BYTES_MAX", 65_536, 10**12),
                buffered_bytes_per_client_max=reader.size(
                    "FAREBOX_BUFFERED_BYTES_PER_CLIENT_MAX", 65_536, 10**12
                ),
                paid_body_timeout_s=reader.seconds("FAREBOX_PAID_BODY_TIMEOUT_S"),
                connections_max=reader.whole("FAREBOX_CONNECTIONS_MAX", 1, 1_000_000),
                header_timeout_s=reader.seconds("FAREBOX_HEADER_TIMEOUT_S"),
                idle_timeout_s=reader.seconds("FAREBOX_IDLE_TIMEOUT_S"),
                body_timeout_s=reader.seconds("FAREBOX_BODY_TIMEOUT_S"),
                upstream_connect_timeout_s=reader.seconds("FAREBOX_UPSTREAM_CONNECT_TIMEOUT_S"),
                upstream_idle_timeout_s=reader.seconds("FAREBOX_UPSTREAM_IDLE_TIMEOUT_S"),
                upstream_connections_max=reader.whole("FAREBOX_UPSTREAM_CONNECTIONS_MAX", 1, 65535),
                upstream_attempts_max=reader.whole("FAREBOX_UPSTREAM_ATTEMPTS_MAX", 1, 100),
                tunnel_idle_timeout_s=reader.seconds("FAREBOX_TUNNEL_IDLE_TIMEOUT_S"),
                drain_timeout_s=reader.seconds("FAREBOX_DRAIN_TIMEOUT_S"),
            ),
            authorize=reader.authorize(),
            admission=AdmissionConfig(
                stale_grant_s_max=reader.seconds("FAREBOX_STALE_GRANT_S_MAX"),
                grant_ttl_s=reader.seconds("FAREBOX_GRANT_TTL_S"),
                lease_s=reader.seconds("FAREBOX_LEASE_S"),
                unpaid_rpm=reader.whole("FAREBOX_BUDGET_UNPAID_RPM", 0, 10**9),
                bad_credential_rpm=reader.whole("FAREBOX_BUDGET_BAD_CREDENTIAL_RPM", 0, 10**9),
                quotes_rpm=reader.whole("FAREBOX_BUDGET_QUOTES_RPM", 0, 10**9),
            ),
            spool=SpoolConfig(
                directory=reader.text("FAREBOX_SPOOL_DIR"),
                bytes_max=reader.size("FAREBOX_SPOOL_BYTES_MAX", 1_000_000, 10**15),
                file_bytes_max=reader.size("FAREBOX_SPOOL_FILE_BYTES_MAX", 65_536, 10**10),
                fsync_ms=reader.whole("FAREBOX_SPOOL_FSYNC_MS", 0, 60_000),
                on_full=cast(OnFull, reader.choice("FAREBOX_SPOOL_ON_FULL", "refuse", "drop_detail")),
                ship_ms=reader.whole("FAREBOX_SPOOL_SHIP_MS", 1, 60_000),
            ),
            api=ApiConfig(
                host=reader.required("FAREBOX_API_HOST"),
                port=reader.whole("FAREBOX_API_PORT", 0, 65535),
                rate_limit_rpm=reader.whole("FAREBOX_API_RATE_LIMIT_RPM", 0, 10**9),
            ),
            ops=OpsConfig(
                host=reader.required("FAREBOX_OPS_HOST"), port=reader.whole("FAREBOX_OPS_PORT", 0, 65535)
            ),
            payments=PaymentDefaults(
                network=reader.text("FAREBOX_PAYMENT_NETWORK"),
                pay_to=reader.text("FAREBOX_PAYMENT_PAY_TO"),
            ),
        )
        if reader.faults:
            raise Refused(*reader.faults)
        return config

    @property
    def database_url(self) -> str:
        """Where PostgreSQL is, password included: never log it. Refused when it is not configured."""
        return self._needed(self.database.url, "FAREBOX_DATABASE_URL").reveal()

    @property
    def database_direct_url(self) -> str:
        """For LISTEN and migrations: the direct URL where a pooler stands between, else the same as ``database_url``."""
        return self.database.direct_url.reveal() if self.database.direct_url else self.database_url

    @property
    def admin_key(self) -> str:
        """The first admin key, derived from the master key."""
        return admin_key(self._needed(self.master_key, "FAREBOX_MASTER_KEY"))

    @property
    def keys(self) -> Keys:
        """The signing keys of this mode: given separately, else derived from the master key."""
        return Keys(quotes=self._key("quotes"), tokens=self._key("tokens"))

    def derived_key(self, purpose: str) -> bytes:
        """32 bytes for a purpose of this mode, e.g. ``seller``: the purpose string given to HMAC is ``seller/<mode>``."""
        return derive_key(self._needed(self.master_key, "FAREBOX_MASTER_KEY"), f"{purpose}/{self.mode}")

    def _key(self, name: str) -> bytes:
        own = self.own_keys.get(name.upper())
        return bytes.fromhex(own.reveal()) if own else self.derived_key(name)

    @staticmethod
    def _needed(secret: Secret | None, name: str) -> Secret:
        if secret is None:
            raise Refused(missing(name))
        return secret


_REMEDIES: Final = {
    "FAREBOX_DATABASE_URL": "set it to postgresql://user:password@host/database, or let `farebox up` start the embedded one",
    "FAREBOX_MASTER_KEY": "set it to a random text of at least 32 characters, for example the output of `openssl rand -base64 32`",
    "FAREBOX_EDGE_SECRET": "set it to a random text of at least 32 characters, for example the output of `openssl rand -base64 32`; the edge sends it as Farebox-Edge-Secret",
    "FAREBOX_PAYMENT_NETWORK": "set it, or `payments.defaults.network` in farebox.yaml, to a network such as eip155:8453",
    "FAREBOX_PAYMENT_PAY_TO": "set it, or `payments.defaults.pay_to` in farebox.yaml, to the address that receives payments",
}


def missing(name: str) -> Reason:
    """The fault of a variable that is needed here and not set."""
    remedy = _REMEDIES.get(name, "set it")
    also = "".join(f" (nor {alias})" for alias in _BY_NAME[name].aliases)
    return Reason("CONFIG_MISSING", f"is not set{also}: {remedy}", name)


def unknown_variables(values: Mapping[str, str]) -> list[str]:
    """Names that begin with ``FAREBOX_`` and mean nothing here: probably misspelt. For a warning at start."""
    return sorted(
        n
        for n in values
        if n.startswith("FAREBOX_") and n not in _KNOWN and not n.startswith(_OTHER_PREFIXES)
    )


class _Reader:
    """Reads typed values and collects what is wrong with them. A faulty value yields a harmless stand-in."""

    def __init__(self, values: Mapping[str, str], read_file: Callable[[str], str] | None) -> None:
        self._values = values
        self._read_file = read_file
        self._said: dict[str, str] = {}  # variable → the name it was given under
        self.faults: list[Reason] = []

    def text(self, name: str) -> str | None:
        """The variable, the first of its aliases that is set, or its default. Empty means unset."""
        self._said[name] = name
        variable = _BY_NAME[name]
        for given in (name, *variable.aliases):
            value, path = self._values.get(given) or None, self._values.get(f"{given}_FILE") or None
            if value is not None or path is not None:
                self._said[name] = given
            if variable.secret and path is not None:
                if value is not None:
                    self._fault(given, f"is set, and so is {given}_FILE: keep one")
                return self._from_file(f"{given}_FILE", path)
            if value is not None:
                return value
        return variable.default

    def required(self, name: str) -> str:
        return self.text(name) or ""

    def choice(self, name: str, *allowed: str) -> str:
        value = (self.text(name) or "").lower()
        if value not in allowed:
            self._fault(name, f"is {value[:40]!r}: write {' or '.join(allowed)}")
            return allowed[0]
        return value

    def whole(self, name: str, least: int, most: int) -> int:
        value = self.required(name)
        if not re.match(r"[0-9]{1,15}\Z", value, re.ASCII) or not least <= int(value) <= most:
            self._fault(name, f"is {value[:40]!r}: write a whole number from {least} to {most}")
            return least
        return int(value)

    def size(self, name: str, least: int, most: int) -> int:
        value = self.required(name)
        found = _SIZE.match(value)
        amount = int(found[1]) * _SIZE_UNITS[found[2]] if found else -1
        if not least <= amount <= most:
            self._fault(
                name,
                f"is {value[:40]!r}: write bytes, such as 65536, 64kB or 1MB, from {least} to {most}",
            )
            return least
        return amount

    def seconds(self, name: str) -> float:
        value = self.required(name)
        if not re.match(r"[0-9]{1,7}(\.[0-9]{1,6})?\Z", value, re.ASCII) or float(value) <= 0:
            self._fault(name, f"is {value[:40]!r}: write seconds above zero, such as 30 or 0.5")
            return 1.0
        return float(value)

    def web_url(self, name: str) -> str | None:
        value = self.text(name)
        if value is None:
            return None
        if not _is_url(value, ("http", "https")) or urlsplit(value).query or urlsplit(value).fragment:
            self._fault(name, f"is {value[:80]!r}: write it like https://api.example.com")
        return value.rstrip("/")

    def database_url(self, name: str) -> Secret | None:
        value = self.text(name)
        if value is None:
            return None
        # The value holds a password: the fault does not repeat it.
        if not _is_url(value, ("postgresql", "postgres"), host_required=False):
            self._fault(
                name,
                "is not a PostgreSQL URL: write it like postgresql://user:password@host:5432/database",
            )
        return Secret(value)

    def master_key(self, name: str) -> Secret | None:
        value = self.text(name)
        if value is None:
            return None
        if len(value) < MASTER_KEY_CHARACTERS_MIN:
            self._fault(
                name,
                f"has {len(value)} characters, at least {MASTER_KEY_CHARACTERS_MIN} are needed: {_REMEDIES[name]}",
            )
        return Secret(value)

    def authorize(self) -> AuthorizeConfig:
        """The forward-auth listener: with a port there must be a secret."""
        host = self.required("FAREBOX_AUTHORIZE_HOST")
        port = self.whole("FAREBOX_AUTHORIZE_PORT", 0, 65535) if self.text("FAREBOX_AUTHORIZE_PORT") else None
        secret = self.text(_OF_THE_EDGE)
        if secret is None and port is not None:
            self.faults.append(missing(_OF_THE_EDGE))
        if secret is not None and (
            len(secret) < EDGE_SECRET_CHARACTERS_MIN or not _EDGE_SECRET.match(secret)
        ):
            self._fault(
                _OF_THE_EDGE,
                f"is not one word of at least {EDGE_SECRET_CHARACTERS_MIN} letters, digits or + / = _ . ~ -: `openssl rand -base64 32` makes one",
            )
        return AuthorizeConfig(host, port, Secret(secret) if secret is not None else None)

    def keys(self, *names: str) -> dict[str, Secret]:
        given: dict[str, Secret] = {}
        for name in names:
            value = self.text(f"FAREBOX_KEY_{name}")
            if value is None:
                continue
            if not _HEX_32.match(value):
                self._fault(
                    f"FAREBOX_KEY_{name}",
                    "is not 64 hexadecimal digits: `openssl rand -hex 32` makes one",
                )
            given[name] = Secret(value)
        return given

    def _from_file(self, name: str, path: str) -> str | None:
        if self._read_file is None:
            self._fault(name, "files are not read here: set the value itself")
            return None
        try:
            return self._read_file(path).strip() or None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            self._fault(name, f"cannot read {path}: {why}")
            return None

    def _fault(self, name: str, message: str) -> None:
        self.faults.append(Reason("CONFIG_MALFORMED", message, self._said.get(name, name)))


def _is_url(value: str, schemes: tuple[str, ...], host_required: bool = True) -> bool:
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in schemes
        and (bool(parts.hostname) or not host_required)
        and not re.search(r"\s", value)
    )
