"""How an https upstream proves itself: by an authority and its name, by a pinned key, or by both. TLS 1.2 or later.

A pin is the SHA-256 of the leaf's public key (SubjectPublicKeyInfo, RFC 7469 §2.4). Other certificates of the chain are not
looked at: what a server sends along proves nothing, and an issuer is trusted by giving it as ``ca``.
"""

from __future__ import annotations

import os
import ssl
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from Crypto.Util.asn1 import DerSequence

from farebox.base.errors import refuse
from farebox.domain.access import Upstream, UpstreamTls

#: What files have to be for a connection made now to be like one made before: (path, changed, size, inode) of each.
Fingerprint = tuple[tuple[str, int, int, int], ...]

_SYSTEM: Final = UpstreamTls()
_SESSIONS_KEPT_MAX: Final = 1024


class PinMismatch(OSError):
    """The upstream holds another key than it should."""


class UpstreamTlsContext(ssl.SSLContext):
    """Takes up the last session with the same name again, which asyncio by itself has no way to ask for."""

    # ``ssl.SSLContext`` is made in ``__new__``; these are set in ``_context``.
    sessions: dict[str | None, ssl.SSLSession]
    pins: tuple[bytes, ...]
    server_name: str | None

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        name = server_hostname if isinstance(server_hostname, str) else None
        return super().wrap_bio(
            incoming, outgoing, server_side, server_hostname, session or self.sessions.get(name)
        )

    def keep_session(self, connection: ssl.SSLObject) -> None:
        """For the next connection. A TLS 1.3 server sends what is needed after the handshake: ask late."""
        session = connection.session
        if session is not None and (session.has_ticket or session.id):
            if len(self.sessions) >= _SESSIONS_KEPT_MAX:
                self.sessions.clear()
            self.sessions[connection.server_hostname] = session

    def check_pin(self, connection: ssl.SSLObject) -> None:
        """Raise ``PinMismatch`` unless the leaf's key is one of the pins, or there are none."""
        if not self.pins:
            return
        leaf = connection.getpeercert(binary_form=True)
        if leaf is None:
            raise PinMismatch("it showed no certificate")
        found = key_digest(leaf)
        if found not in self.pins:
            raise PinMismatch(f"its key is sha256/{b64encode(found).decode()}, which is not pinned")


class TlsContexts:
    """One context for each set of settings and files, shared by all targets: loading a machine's authorities takes
    milliseconds."""

    def __init__(self) -> None:
        self._known: dict[tuple[UpstreamTls, Fingerprint], UpstreamTlsContext] = {}

    def of(self, upstream: Upstream) -> UpstreamTlsContext:
        """Raises ``Refused`` when a file is missing or holds something else. Changed files are read anew."""
        tls = upstream.tls or _SYSTEM
        key = (tls, _fingerprint(upstream.id, tls))
        context = self._known.get(key)
        if context is None:
            context = self._known[key] = _context(upstream.id, tls)
        return context

    def keep_only(self, contexts: Sequence[UpstreamTlsContext]) -> None:
        """Forget those that no pool uses any more."""
        self._known = {key: context for key, context in self._known.items() if context in contexts}


@lru_cache(maxsize=1)
def system_context() -> UpstreamTlsContext:
    """For whoever has no wishes of its own: the machine's authorities and the name of the URL."""
    return _context("", _SYSTEM)


def key_digest(certificate: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of an X.509 certificate in DER (RFC 5280 §4.1)."""
    try:
        to_be_signed: Any = DerSequence().decode(certificate)[0]
        fields: Any = DerSequence().decode(to_be_signed)
        has_version = isinstance(fields[0], bytes) and fields[0][:1] == b"\xa0"
        key = fields[6 if has_version else 5]
    except (ValueError, IndexError, TypeError) as error:
        raise PinMismatch("its certificate cannot be read") from error
    return sha256(key).digest()


def _context(upstream_id: str, tls: UpstreamTls) -> UpstreamTlsContext:
    context = UpstreamTlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sessions = {}
    context.pins = tls.pins
    context.server_name = tls.server_name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    if tls.ca is None and tls.pins:
        # The pinned key is the whole proof: who signed it, for which name and until when says nothing beyond it.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca is None or tls.ca == "system":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        try:
            context.load_verify_locations(tls.ca)
        except (OSError, ValueError) as error:
            raise _unusable(upstream_id, tls.ca, "tls.ca", error) from None
    if tls.certificate is not None:
        try:
            # A key that is locked must not ask for its password on the terminal of a server.
            context.load_cert_chain(tls.certificate, tls.key, password="")
        except (OSError, ValueError) as error:
            raise _unusable(
                upstream_id, tls.certificate, "tls.client_certificate.certificate", error
            ) from None
    return context


def _fingerprint(upstream_id: str, tls: UpstreamTls) -> Fingerprint:
    found = []
    for path, field in (
        (tls.ca if tls.ca != "system" else None, "tls.ca"),
        (tls.certificate, "tls.client_certificate.certificate"),
        (tls.key, "tls.client_certificate.key"),
    ):
        if path is not None:
            try:
                status = os.stat(path)
            except (OSError, ValueError) as error:
                raise _unusable(upstream_id, path, field, error) from None
            found.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _unusable(upstream_id: str, path: str, field: str, error: Exception) -> Exception:
    why = "it does not hold what is needed, in PEM form"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        why = error.strerror or str(error)
    return refuse("UPSTREAM_TLS_UNUSABLE", f"upstream {upstream_id}: {path}: {why}", field)
