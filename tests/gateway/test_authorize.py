"""Forward-auth: an edge asks, in its own words, whether a call may pass; nobody else is told anything."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from farebox.app.admission import Answer, Call, Refusal, Standing
from farebox.base.errors import Reason, Unavailable
from farebox.base.money import Asset, Money
from farebox.domain.access import ExactFare, FreeFare, Match, Route
from farebox.gateway.authorize import Authorizer
from farebox.gateway.problems import refusal
from tests.gateway.kit import PATIENT, House, OpenDoor, Said, listening, open_house, setting_headers

SECRET = "s" * 40
KEY = "fbx_sk_" + "k" * 32

ROUTES = (
    Route("weather", Match("/weather/{city}"), "up0", forward_auth=True),
    Route("free", Match("/free/{*rest}"), "up0", forward_auth=True, free=FreeFare(("GET",))),
    Route(
        "sold",
        Match("/sold/{*rest}"),
        "up0",
        forward_auth=True,
        exact=ExactFare(Money(1000, Asset("usdc", 6)), (("eip155:84532", "0x0"),)),
    ),
    Route("whole", Match("/whole"), "up0"),
    Route("success", Match("/success"), "up0", forward_auth=True, charge_on="success"),
    Route("posted", Match("/posted", methods=("POST",)), "up0", forward_auth=True),
    Route("here", Match("/here", hosts=("api.example.com",)), "up0", forward_auth=True),
    Route("labelled", Match("/labelled"), "up0", setting_headers(("X-Plan", "gold")), forward_auth=True),
)


class Keyring:
    """Stands in for the keys of the database; ``slow`` ones must be looked up."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.slow: set[bytes] = set()
        self.away = False
        self.looked_up = 0

    def fresh(self, digest: bytes) -> bool:
        return digest in self.known

    async def find(self, digest: bytes) -> bool:
        self.looked_up += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("the database is away")
        return digest in self.slow


@dataclass
class Desk:
    """A gateway's forward-auth listener, and the two doors behind it."""

    house: House
    authorizer: Authorizer
    port: int
    keys: Keyring
    first_door: OpenDoor
    told: dict[str, str] = field(
        default_factory=lambda: {
            "Farebox-Edge-Secret": SECRET,
            "X-Forwarded-Method": "GET",
            "X-Forwarded-Uri": "/weather/paris",
            "X-Forwarded-Host": "api.example.com",
            "X-Forwarded-For": "203.0.113.7",
        }
    )

    @property
    def door(self) -> OpenDoor:
        return self.house.door

    async def asked(
        self,
        uri: str | None = None,
        *more: str,
        path: str = "/.farebox/authorize",
        method: str = "GET",
        without: tuple[str, ...] = (),
        **changed: str,
    ) -> Said:
        """One question on a connection of its own. ``changed``: X_Forwarded_Host="…"; ``more``: further header lines."""
        told = {**self.told, **{name.replace("_", "-"): value for name, value in changed.items()}}
        if uri is not None:
            told["X-Forwarded-Uri"] = uri
        lines = [f"{method} {path} HTTP/1.1", "Host: farebox"]
        lines += [f"{name}: {value}" for name, value in told.items() if name not in without]
        return (await self.talk("\r\n".join([*lines, *more, "", ""]).encode(), methods=(method,)))[0]

    async def talk(self, data: bytes, methods: tuple[str, ...] = ("GET",)) -> list[Said]:
        return (await replace(self.house, port=self.port).says(data, methods=methods)).said

    def question(self, uri: str, *more: str) -> bytes:
        lines = ["GET /.farebox/authorize HTTP/1.1", "Host: farebox"]
        lines += [f"{name}: {value}" for name, value in {**self.told, "X-Forwarded-Uri": uri}.items()]
        return "\r\n".join([*lines, *more, "", ""]).encode()


@contextlib.asynccontextmanager
async def open_desk(**more: Any) -> AsyncIterator[Desk]:
    async with open_house(PATIENT, ROUTES, **more) as house:
        keys, first_door = Keyring(), OpenDoor()
        authorizer = Authorizer(house.gateway, SECRET, keys, first_door)
        sock = listening()
        port = sock.getsockname()[1]
        await authorizer.serve(sock)
        try:
            yield Desk(house, authorizer, port, keys, first_door)
        finally:
            await authorizer.drain(0.5)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with open_desk() as opened:
        yield opened


def code(said: Said) -> str:
    assert said.headers["content-type"] == "application/problem+json"
    return str(json.loads(said.body)["code"])


# ── a yes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_good_call_is_a_200_that_says_who_calls_and_is_billed_at_once(desk: Desk):
    said = await desk.asked("/weather/paris?day=1", X_Forwarded_Method="POST")

    assert (said.status, said.body) == (200, b"")
    assert said.headers["farebox-customer"] == "acme"
    [call] = desk.door.calls
    assert (call.method, call.host, call.path, call.query) == (
        "POST",
        "api.example.com",
        "/weather/paris",
        "day=1",
    )
    assert call.client_address == "203.0.113.7"
    assert call.params == {"city": "paris"}
    assert said.headers["farebox-request-id"] == call.request_id
    [finish] = desk.door.finished
    assert (finish.request_id, finish.status, finish.bytes_up, finish.bytes_down) == (
        call.request_id,
        200,
        0,
        0,
    )
    assert desk.house.upstream.heard == []


async def test_what_the_route_sets_and_what_is_left_of_a_limit_come_along(desk: Desk):
    def decide(call: Call) -> Any:
        admitted = desk.door.admitted(call)
        admitted.forward_headers.append((b"X-Plan", b"gold"))
        admitted.answer_headers.append((b"RateLimit-Remaining", b"41"))
        return admitted

    desk.door.decide = decide
    said = await desk.asked("/labelled")

    assert said.headers["x-plan"] == "gold"
    assert said.headers["ratelimit-remaining"] == "41"
    assert said.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/.farebox/authorize", "/.farebox/authorize?edge=nginx"])
async def test_a_credential_of_ours_ends_here_and_a_foreign_one_is_said_back(desk: Desk, path: str):
    ours = "fbx_ck_" + "c" * 32

    keyed = await desk.asked(None, f"Authorization: Bearer {ours}", "X-API-Key: theirs", path=path)
    foreign = await desk.asked(None, "Authorization: Basic dTpw", f"X-API-Key: {ours}", path=path)

    assert "authorization" not in keyed.headers
    assert keyed.headers["x-api-key"] == "theirs"
    assert foreign.headers["authorization"] == "Basic dTpw"
    assert "x-api-key" not in foreign.headers


async def test_many_questions_on_one_connection_are_answered_in_order(desk: Desk):
    data = b"".join(desk.question(f"/weather/{n}") for n in range(50))

    said = await desk.talk(data, ("GET",) * 50)

    assert [s.status for s in said] == [200] * 50
    assert [c.path for c in desk.door.calls] == [f"/weather/{n}" for n in range(50)]
    assert [s.headers["farebox-request-id"] for s in said] == [c.request_id for c in desk.door.calls]


async def test_a_decision_that_takes_its_time_holds_the_next_question_back(desk: Desk):
    async def later(call: Call) -> Any:
        for _ in range(5):
            await asyncio.sleep(0)
        return desk.door.admitted(call)

    desk.door.decide = lambda call: later(call) if call.path == "/weather/1" else desk.door.admitted(call)
    said = await desk.talk(b"".join(desk.question(f"/weather/{n}") for n in (1, 2, 1, 1)), ("GET",) * 4)

    assert [s.status for s in said] == [200] * 4
    assert [f.request_id for f in desk.door.finished] == [s.headers["farebox-request-id"] for s in said]


async def test_an_edge_that_left_before_the_decision_is_not_billed(desk: Desk):
    asked, go = asyncio.Event(), asyncio.Event()

    async def later(call: Call) -> Any:
        asked.set()
        await go.wait()
        return desk.door.admitted(call)

    desk.door.decide = later
    _, writer = await asyncio.open_connection("127.0.0.1", desk.port)
    writer.write(desk.question("/weather/paris"))
    await asked.wait()
    writer.transport.abort()
    async with asyncio.timeout(10):
        while desk.authorizer.connections:
            await asyncio.sleep(0.01)
    go.set()
    async with asyncio.timeout(10):
        while not desk.door.finished:
            await asyncio.sleep(0.01)

    assert [f.status for f in desk.door.finished] == [0]


async def test_envoy_asks_with_the_calls_own_method_host_and_path(desk: Desk):
    ours = "fbx_ck_" + "c" * 32
    said = (
        await desk.talk(
            b"PUT /.farebox/authorize/envoy/weather/rome?a=b HTTP/1.1\r\nHost: api.example.com:8443\r\n"
            b"Farebox-Edge-Secret: " + SECRET.encode() + b"\r\nX-Real-IP: 203.0.113.9\r\n"
            b"X-Forwarded-Uri: /free/x\r\nX-Forwarded-For: 1.1.1.1\r\nContent-Length: 0\r\n"
            b"Authorization: Bearer " + ours.encode() + b"\r\n\r\n",
            ("PUT",),
        )
    )[0]

    assert said.status == 200
    [call] = desk.door.calls
    assert (call.method, call.host, call.path, call.query) == (
        "PUT",
        "api.example.com:8443",
        "/weather/rome",
        "a=b",
    )
    assert call.client_address == "203.0.113.9"
    assert said.headers["x-envoy-auth-headers-to-remove"] == "authorization"


async def test_a_head_call_of_envoy_gets_no_body_with_its_no(desk: Desk):
    desk.door.decide = lambda call: refusal("payment_required", "pay")
    said = (
        await desk.talk(
            b"HEAD /.farebox/authorize/envoy/weather/rome HTTP/1.1\r\nHost: a\r\nX-Real-IP: 203.0.113.9\r\n"
            b"Farebox-Edge-Secret: " + SECRET.encode() + b"\r\n\r\n",
            ("HEAD",),
        )
    )[0]

    assert (said.status, said.body, said.whole) == (402, b"", True)


# ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Farebox-Edge-Secret: " + "t" * 40,),
        ("Farebox-Edge-Secret: " + SECRET[:-1],),
        ("Farebox-Edge-Secret:",),
        ("Farebox-Edge-Secret: " + SECRET, "Farebox-Edge-Secret: " + SECRET),
        ("Farebox_Edge_Secret: " + SECRET,),
        ("Authorization: Bearer fbx_ck_" + "c" * 32,),
        ("Authorization: Bearer " + SECRET,),
        ("Authorization: Basic dTpw", "Authorization: Bearer " + KEY),
        ("Authorization: Bearer fbx_sk_" + "u" * 32,),
        ("Farebox-Edge-Secret: wrong", "Authorization: Bearer " + KEY),
    ],
)
async def test_who_does_not_prove_itself_gets_a_bare_403_and_learns_nothing(
    desk: Desk, lines: tuple[str, ...]
):
    desk.keys.known.add(hashlib.sha256(KEY.encode()).digest())

    said = await desk.asked("/weather/paris", *lines, without=("Farebox-Edge-Secret",))
    nowhere = await desk.asked("//", *lines, without=("Farebox-Edge-Secret",), path="/other")

    assert (said.status, said.body, said.headers) == (
        403,
        b"",
        {"content-length": "0", "connection": "close"},
    )
    assert (nowhere.status, nowhere.body, nowhere.headers) == (said.status, said.body, said.headers)
    assert desk.door.calls == []


@pytest.mark.parametrize("remembered", [True, False])
async def test_a_key_of_scope_gateway_may_ask_too_and_is_no_part_of_the_call(desk: Desk, remembered: bool):
    (desk.keys.known if remembered else desk.keys.slow).add(hashlib.sha256(KEY.encode()).digest())

    said = await desk.asked(
        None, f"Authorization: Bearer {KEY}", "Authorization: Basic dTpw", without=("Farebox-Edge-Secret",)
    )

    assert said.status == 200
    assert [v for n, v in desk.door.calls[0].headers if n == b"authorization"] == [b"Basic dTpw"]
    assert said.headers["authorization"] == "Basic dTpw"
    assert desk.keys.looked_up == (0 if remembered else 1)


async def test_a_key_that_cannot_be_looked_up_is_a_bare_503(desk: Desk):
    desk.keys.away = True

    said = await desk.asked(None, f"Authorization: Bearer {KEY}", without=("Farebox-Edge-Secret",))

    assert (said.status, said.body) == (503, b"")


# ── what is asked must be said once, and well ────────────────────────────────────────────────────────────────────────

FOUR = ("X-Forwarded-Method", "X-Forwarded-Uri", "X-Forwarded-Host", "X-Forwarded-For")


@pytest.mark.parametrize("name", FOUR)
async def test_each_of_the_four_headers_is_said_once(desk: Desk, name: str):
    missing = await desk.asked(None, without=(name,))
    doubled = await desk.asked(None, f"{name}: {desk.told[name]}")
    empty = await desk.asked(None, f"{name}:", without=(name,))

    for said in (missing, doubled, empty):
        assert said.status == 400
        assert code(said) == "request_malformed"
    assert desk.door.calls == []


@pytest.mark.parametrize(
    "uri",
    [
        "//weather/paris", "/weather//paris", "/free/../weather/paris", "/free/..%2fweather/paris", "/free/%2e%2e/weather/paris",
        "/free/..;x/weather/paris", "/weather/./paris", "/weather\\paris", "/weather/%5cparis", "/weather/paris%00", "/weather/par is",
        "/weather/paris#x", "http://api.example.com/weather/paris", "weather/paris", "*", "/weather/paris?a b", "/weather/%zz",
        "/weather/pa\tris", "/weather/par\u00efs", "/weather/paris HTTP/1.1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/.farebox/authorize", "/.farebox/authorize?edge=nginx"])
async def test_a_target_that_the_gateway_refuses_is_refused_here(desk: Desk, uri: str, path: str):
    said = await desk.asked(uri, path=path)

    assert said.status == (401 if "nginx" in path else 400)
    assert desk.door.calls == []
    assert desk.first_door.calls == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-Method", "GET POST"), ("X-Forwarded-Method", "G(T"), ("X-Forwarded-Method", "CONNECT"),
        ("X-Forwarded-Host", "a b"), ("X-Forwarded-Host", "a/b"), ("X-Forwarded-Host", "a@b"), ("X-Forwarded-For", "unknown"),
        ("X-Forwarded-For", "203.0.113.7, not an address"), ("X-Forwarded-For", ","),
    ],
)  # fmt: skip
async def test_what_cannot_be_of_a_request_is_refused(desk: Desk, name: str, value: str):
    said = await desk.asked(None, f"{name}: {value}", without=(name,))

    assert said.status in (400, 501)
    assert desk.door.calls == []


async def test_the_client_is_the_last_address_that_no_trusted_proxy_has(desk: Desk):
    await desk.asked(X_Forwarded_For="1.1.1.1, 203.0.113.7")
    async with open_desk(trusted_proxies=("10.0.0.0/8",)) as behind:
        await behind.asked(X_Forwarded_For="1.1.1.1, 203.0.113.8, 10.0.0.1")
        [call] = behind.door.calls

    assert desk.door.calls[0].client_address == "203.0.113.7"
    assert call.client_address == "203.0.113.8"


async def test_what_a_client_says_of_an_original_target_is_not_heard(desk: Desk):
    await desk.asked(
        "/weather/paris", "X-Original-URI: /free/x", "X-Original-URL: /free/x", "X_Forwarded_Uri: /free/x", "Farebox-Customer: mallory"
    )  # fmt: skip

    assert [c.path for c in desk.door.calls] == ["/weather/paris"]


@pytest.mark.parametrize("framing", [("Content-Length: 4",), ("Transfer-Encoding: chunked",)])
async def test_a_question_with_a_body_is_refused_and_hung_up_on(desk: Desk, framing: tuple[str, ...]):
    said = await desk.talk(desk.question("/weather/paris", *framing) + b"body" + desk.question("/weather/2"))

    assert [s.status for s in said] == [400]
    assert said[0].headers["connection"] == "close"
    assert desk.door.calls == []


@pytest.mark.parametrize(
    "path", ["/.farebox/authorize?edge=apache", "/.farebox/authorize/", "/.farebox/authorize/envoy", "/weather/paris", "/.farebox/authorizes"]
)  # fmt: skip
async def test_other_questions_are_refused(desk: Desk, path: str):
    assert (await desk.asked(path=path)).status in (400, 404)
    assert desk.door.calls == []


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
             b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"G" * 100_000]
)  # fmt: skip
async def test_what_is_no_request_is_a_bare_400(desk: Desk, data: bytes):
    [said] = await desk.talk(data)

    assert (said.status, said.body) == (400, b"")


# ── a no ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_no_is_the_gateways_own_answer_word_for_word(desk: Desk):
    refused = Refusal(
        Reason("payment_required", "this call costs 0.001 USDC"), [(b"PAYMENT-REQUIRED", b"e30=")]
    )
    desk.door.decide = lambda call: refused

    said = await desk.asked("/sold/x")
    desk.door.decide = lambda call: refusal("quota_exceeded", "used up", 17.2)
    limited = await desk.asked()

    assert said.status == 402
    assert said.headers["payment-required"] == "e30="
    assert code(said) == "payment_required"
    assert (limited.status, limited.headers["retry-after"]) == (429, "18")
    assert desk.door.finished == []


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("credential_unknown", 401),
        ("pass_exhausted", 401),
        ("quota_exceeded", 401),
        ("unavailable", 401),
        ("not_covered", 403),
    ],
)
async def test_nginx_hears_401_or_403_and_no_more_than_the_id(desk: Desk, reason: str, status: int):
    desk.first_door.decide = lambda call: Refusal(
        Reason(reason, "no"), [(b"WWW-Authenticate", b"Bearer")], 5.0
    )

    said = await desk.asked(None, "X-API-Key: fbx_ck_" + "c" * 32, path="/.farebox/authorize?edge=nginx")

    assert (said.status, said.body) == (status, b"")
    assert said.headers["farebox-refusal"].startswith("req_")
    assert "www-authenticate" not in said.headers
    assert desk.door.calls == []  # the door that counts is asked by the gateway


async def test_nginx_is_sent_to_the_gateway_for_the_price_without_asking_twice(desk: Desk):
    said = await desk.asked("/sold/x", path="/.farebox/authorize?edge=nginx")

    assert said.status == 401
    assert desk.first_door.calls == desk.door.calls == []


@pytest.mark.parametrize(
    "uri",
    ["/whole", "/success", "/.farebox/quotes"],
    ids=["not for edges", "by status", "our page"],
)
async def test_what_an_edge_cannot_serve_is_handed_over(uri: str):
    class Pages:
        def owns(self, path: str) -> bool:
            return path.startswith("/.farebox/")

    async with open_desk(site=Pages()) as desk:
        said = await desk.asked(uri)
        nginx = await desk.asked(uri, path="/.farebox/authorize?edge=nginx")

    assert (said.status, code(said)) == (421, "hand_over")
    assert nginx.status == 401
    assert desk.door.calls == []


@pytest.mark.parametrize("name", ["PAYMENT-SIGNATURE", "X-PAYMENT"])
async def test_a_payment_is_not_even_looked_at_here(desk: Desk, name: str):
    said = await desk.asked("/sold/x", f"{name}: e30=", "X-API-Key: fbx_ck_" + "c" * 32)

    assert (said.status, code(said)) == (421, "hand_over")
    assert desk.door.calls == []


async def test_a_free_call_passes_whatever_it_carries(desk: Desk):
    plain = await desk.asked("/free/x", path="/.farebox/authorize?edge=nginx")
    paying = await desk.asked("/free/x", "X-PAYMENT: e30=")
    not_free = await desk.asked("/free/x", "X-PAYMENT: e30=", X_Forwarded_Method="POST")

    assert [plain.status, paying.status, not_free.status] == [200, 200, 421]


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("before_release", object()),
        ("keep_answer", object()),
        ("meter", object()),
        ("standing", Standing("pass_1", math.inf, holds_slot=True)),
    ],
    ids=["payment", "kept answer", "bytes or credits", "concurrency"],
)
async def test_what_must_be_kept_up_to_the_calls_end_is_given_back_and_handed_over(
    desk: Desk, what: str, value: Any
):
    desk.door.decide = lambda call: desk.door.admitted(call, **{what: value})

    said = await desk.asked()

    assert (said.status, code(said)) == (421, "hand_over")
    assert [f.status for f in desk.door.finished] == [0]


async def test_a_kept_answer_is_the_gateways_to_give(desk: Desk):
    desk.door.decide = lambda call: Answer(200, [], b"bought before")

    assert code(await desk.asked()) == "hand_over"


async def test_paths_methods_and_hosts_are_matched_as_at_the_gateway(desk: Desk):
    unknown = await desk.asked("/nowhere")
    method = await desk.asked("/posted")
    here = await desk.asked("/here")
    elsewhere = await desk.asked("/here", X_Forwarded_Host="other.example.com")

    assert (unknown.status, code(unknown)) == (404, "route_unknown")
    assert (method.status, method.headers["allow"]) == (405, "POST")
    assert here.status == 200
    assert elsewhere.status == 404


async def test_a_fault_of_ours_is_a_500_and_bills_nothing(desk: Desk):
    def broken(call: Call) -> Any:
        raise RuntimeError("a fault")

    desk.door.decide = broken
    said = await desk.asked()

    assert (said.status, code(said)) == (500, "internal_error")
    assert desk.door.finished == []


# ── its life ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_question_under_way_is_answered_when_the_gateway_drains(desk: Desk):
    asked, go = asyncio.Event(), asyncio.Event()

    async def later(call: Call) -> Any:
        asked.set()
        await go.wait()
        return desk.door.admitted(call)

    desk.door.decide = later
    question = asyncio.create_task(desk.asked())
    idle_reader, idle = await asyncio.open_connection("127.0.0.1", desk.port)
    await asked.wait()
    draining = asyncio.create_task(desk.authorizer.drain(10))
    assert await idle_reader.read() == b""
    go.set()

    said = await question
    await draining
    idle.close()

    assert said.status == 200
    assert said.headers["connection"] == "close"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", desk.port)


async def test_who_begins_a_question_and_stops_is_hung_up_on():
    async with open_house(replace(PATIENT, head_timeout_s=0.2), ROUTES) as house:
        authorizer = Authorizer(house.gateway, SECRET, Keyring(), OpenDoor())
        sock = listening()
        port = sock.getsockname()[1]
        await authorizer.serve(sock)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /.farebox/authorize HTTP/1.1\r\n")
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await authorizer.drain(0.5)
