"""An https upstream is called when it proves itself in the way the seller asks for, and not at all otherwise."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from base64 import b64decode
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from farebox.base.errors import Refused
from farebox.domain.access import UpstreamTls
from farebox.gateway.upstream_tls import PinMismatch, key_digest
from tests.gateway.fleet import AGILE, open_fleet, until


@dataclass
class Paper:
    """A certificate and its key, in files."""

    certificate: Path
    key: Path

    @property
    def pin(self) -> bytes:
        """As openssl computes it."""
        key = openssl("x509", "-in", self.certificate, "-pubkey", "-noout")
        return sha256(b64decode(b"".join(key.splitlines()[1:-1]))).digest()

    def serving(
        self, *, asks_for: Path | None = None, newest: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        """What a server speaks with it. ``asks_for``: the authority of the clients it takes."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if newest is not None:
            context.maximum_version = newest
        if asks_for is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(asks_for)
        return context


def openssl(*arguments: object) -> bytes:
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Paper]:
    """``authority`` signed ``server`` (127.0.0.1, weather.test) and ``client``; ``stranger`` signed itself."""
    where = tmp_path_factory.mktemp("papers")
    papers = {
        name: Paper(where / f"{name}.pem", where / f"{name}.key")
        for name in ("authority", "server", "client", "stranger")
    }
    names = "subjectAltName=DNS:weather.test,IP:127.0.0.1"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("authority", "stranger"):
        paper = papers[name]
        extra = ("-addext", names) if name == "stranger" else ()
        openssl(
            "req",
            "-x509",
            *key,
            "-keyout",
            paper.key,
            "-out",
            paper.certificate,
            "-days",
            30,
            "-subj",
            f"/CN={name}",
            *extra,
        )
    authority = papers["authority"]
    (where / "names").write_text(names)
    for name in ("server", "client"):
        paper, request = papers[name], where / f"{name}.csr"
        openssl("req", *key, "-keyout", paper.key, "-out", request, "-subj", f"/CN={name}")
        openssl(
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            authority.certificate,
            "-CAkey",
            authority.key,
            "-CAcreateserial",
            "-out",
            paper.certificate,
            "-days",
            30,
            "-extfile",
            where / "names",
        )
    return papers  # fmt: skip


WRONG_PIN = b"\x00" * 32


async def test_an_upstream_that_proves_itself_is_called(papers: dict[str, Paper]):
    ca = str(papers["authority"].certificate)
    pin = papers["server"].pin
    for tls in (
        UpstreamTls(ca=ca),
        UpstreamTls(ca=ca, server_name="weather.test"),
        UpstreamTls(ca=ca, pins=(WRONG_PIN, pin)),
        UpstreamTls(pins=(pin,)),
        UpstreamTls(pins=(pin,), server_name="whatever.test"),
    ):
        async with open_fleet(1, tls=papers["server"].serving(), proof=tls) as fleet:
            assert (await fleet.get()).status == 200, tls
            assert (await fleet.get("/up", method="POST", body=b"x" * 200_000)).status == 200


@pytest.mark.parametrize(
    "wrong", ["authority", "name", "pin", "pin beside the right authority", "nothing said"]
)
async def test_one_that_does_not_is_never_sent_a_byte(papers: dict[str, Paper], wrong: str):
    ca = str(papers["authority"].certificate)
    tls = {
        "authority": UpstreamTls(ca=str(papers["stranger"].certificate)),
        "name": UpstreamTls(ca=ca, server_name="other.test"),
        "pin": UpstreamTls(pins=(WRONG_PIN,)),
        "pin beside the right authority": UpstreamTls(ca=ca, pins=(WRONG_PIN, papers["authority"].pin)),
        "nothing said": None,
    }[wrong]
    async with open_fleet(1, tls=papers["server"].serving(), proof=tls) as fleet:
        with capture_logs() as lines:
            said = await fleet.get()

        assert said.status == 502
        assert b"upstream_unreachable" in said.body
        assert fleet.servers[0].heard == []
        (line,) = [line for line in lines if line["event"] == "upstream_unreachable"]
        assert line["target"] == f"https://127.0.0.1:{fleet.servers[0].port}"
        assert ("not pinned" if "pin" in wrong else "certificate verify failed") in line["why"]
        assert fleet.gateway.pools.all()[0].connections == 0


async def test_a_self_signed_upstream_is_taken_by_its_certificate_or_its_key(papers: dict[str, Paper]):
    stranger = papers["stranger"]
    for tls in (UpstreamTls(ca=str(stranger.certificate)), UpstreamTls(pins=(stranger.pin,))):
        async with open_fleet(1, tls=stranger.serving(), proof=tls) as fleet:
            assert (await fleet.get()).status == 200


async def test_an_upstream_that_asks_who_calls_is_shown_a_certificate(papers: dict[str, Paper]):
    ca, client = str(papers["authority"].certificate), papers["client"]
    serving = papers["server"].serving(asks_for=papers["authority"].certificate)
    shown = UpstreamTls(ca=ca, certificate=str(client.certificate), key=str(client.key))
    for tls, status in ((UpstreamTls(ca=ca), 502), (shown, 200)):
        async with open_fleet(1, tls=serving, proof=tls) as fleet:
            assert (await fleet.get()).status == status


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_nothing_older_than_tls_1_2_is_spoken(papers: dict[str, Paper]):
    tls = UpstreamTls(ca=str(papers["authority"].certificate))
    old = papers["server"].serving()
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    async with open_fleet(1, tls=old, proof=tls) as fleet:
        assert (await fleet.get()).status == 502
        less_careful = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        less_careful.check_hostname, less_careful.verify_mode = False, ssl.CERT_NONE
        less_careful.minimum_version = ssl.TLSVersion.TLSv1_1
        less_careful.set_ciphers("DEFAULT:@SECLEVEL=0")
        _, writer = await asyncio.open_connection("127.0.0.1", fleet.servers[0].port, ssl=less_careful)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.1"
        writer.close()


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_taken_up_again(papers: dict[str, Paper], newest: ssl.TLSVersion):
    serving = papers["server"].serving(newest=newest)
    tls = UpstreamTls(ca=str(papers["authority"].certificate), pins=(papers["server"].pin,))
    settings = replace(AGILE, upstream_idle_timeout_s=0.05)
    async with open_fleet(1, settings, tls=serving, proof=tls) as fleet:
        for _ in range(3):
            assert (await fleet.get()).status == 200
            await until(lambda: fleet.servers[0].open == 0)

        assert fleet.servers[0].connections == 3
        assert serving.session_stats()["hits"] == 2


async def test_a_file_that_is_missing_or_no_certificate_changes_nothing(
    papers: dict[str, Paper], tmp_path: Path
):
    good = UpstreamTls(ca=str(papers["authority"].certificate))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing to see here")
    server = papers["server"]
    async with open_fleet(1, tls=server.serving(), proof=good) as fleet:
        for tls, field in (
            (UpstreamTls(ca=str(tmp_path / "nowhere.pem")), "tls.ca"),
            (UpstreamTls(ca=str(nonsense)), "tls.ca"),
            (UpstreamTls(ca=str(tmp_path)), "tls.ca"),
            (
                UpstreamTls(certificate=str(server.certificate), key=str(tmp_path / "nowhere.key")),
                "tls.client_certificate.key",
            ),
            (
                UpstreamTls(certificate=str(server.certificate), key=str(papers["client"].key)),
                "tls.client_certificate.certificate",
            ),
        ):
            with pytest.raises(Refused) as refused:
                fleet.applies(tls=tls)
            assert refused.value.reason.code == "UPSTREAM_TLS_UNUSABLE"
            assert refused.value.reason.field == field
            assert (await fleet.get()).status == 200


async def test_a_locked_key_is_refused_and_not_asked_for_on_the_terminal(
    papers: dict[str, Paper], tmp_path: Path
):
    locked, client = tmp_path / "locked.key", papers["client"]
    openssl("pkey", "-in", client.key, "-aes128", "-passout", "pass:secret", "-out", locked)
    async with open_fleet(1) as fleet:
        with pytest.raises(Refused):
            fleet.applies(
                url="https://127.0.0.1:1",
                tls=UpstreamTls(certificate=str(client.certificate), key=str(locked)),
            )


async def test_a_file_that_has_changed_is_read_with_the_next_catalog(
    papers: dict[str, Paper], tmp_path: Path
):
    """Authorities are renewed in place; targets whose files are as before keep their connections."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(papers["stranger"].certificate.read_bytes())
    async with open_fleet(1, tls=papers["server"].serving(), proof=UpstreamTls(ca=str(ca))) as fleet:
        assert (await fleet.get()).status == 502
        ca.write_bytes("# Behörde\n".encode() + papers["authority"].certificate.read_bytes())
        fleet.applies()
        assert (await fleet.get()).status == 200
        fleet.applies()
        assert (await fleet.get()).status == 200
        assert len({h.connection for h in fleet.servers[0].heard}) == 1


async def test_targets_with_a_wrong_key_are_passed_over(papers: dict[str, Paper]):
    tls = UpstreamTls(pins=(papers["server"].pin,))
    async with (
        open_fleet(1, tls=papers["stranger"].serving()) as impostor,
        open_fleet(1, tls=papers["server"].serving(), proof=tls) as fleet,
    ):
        fleet.applies(url="", targets=(impostor.upstream_value.url, fleet.upstream_value.url))

        assert {(await fleet.get()).status for _ in range(6)} == {200}
        assert impostor.servers[0].heard == []


def test_a_pin_is_what_openssl_says_it_is(papers: dict[str, Paper]):
    for paper in papers.values():
        der = ssl.PEM_cert_to_DER_cert(paper.certificate.read_text())
        assert key_digest(der) == paper.pin


@pytest.mark.parametrize("junk", [b"", b"\x30\x00", b"\x30\x02\x30\x00", b"\x30\x80\x00\x00", b"\xff" * 40])
def test_what_is_no_certificate_matches_no_pin(junk: bytes):
    with pytest.raises(PinMismatch):
        key_digest(junk)
