"""``Fare`` by itself: a listener that says what the test wants, and ASGI messages by hand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from farebox.inapp import Admission, Fare

KEY = "fbx_sk_" + "k" * 32
SECRET = "s" * 40
YES = (
    b"HTTP/1.1 200 OK\r\nFarebox-Sandbox: 1\r\nFarebox-Request-Id: req_1\r\nFarebox-Customer: acme\r\n"
    b"Farebox-Plan: starter\r\nFarebox-Route: r\r\nRateLimit-Remaining: 4\r\nX-Plan: \r\n"
    b"X-Farebox-Upstream: " + SECRET.encode() + b"\r\nCache-Control: no-store\r\nContent-Length: 0\r\n\r\n"
)
NO = b"HTTP/1.1 402 Payment Required\r\nPAYMENT-REQUIRED: e30=\r\nContent-Type: application/problem+json\r\nContent-Length: 4\r\nDate: x\r\n\r\nno!!"
HAND_OVER = b'HTTP/1.1 421 Misdirected Request\r\nContent-Type: application/problem+json\r\nContent-Length: 20\r\n\r\n{"code":"hand_over"}'

Message = dict[str, Any]


@dataclass
class Desk:
    """Stands in for the listener. ``answer``: what a question gets; None: silence; empty: the connection ends."""

    answer: Callable[[bytes], bytes | None] = lambda question: YES
    questions: list[bytes] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0
    close_after: int = 10**9  # questions a connection
    hold: asyncio.Event | None = None
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for _ in range(self.close_after):
                question = await reader.readuntil(b"\r\n\r\n")
                self.questions.append(question)
                if self.hold is not None:
                    await self.hold.wait()
                said = self.answer(question)
                if said is None:
                    await reader.read()  # until whoever asks gives up
                    break
                if not said:
                    break
                for at in range(0, len(said), 37):  # in pieces, as networks do
                    writer.write(said[at : at + 37])
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    def asked(self, place: int = -1) -> list[str]:
        return self.questions[place].decode("latin-1").split("\r\n")[:-2]


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    standing = Desk()
    tasks: set[asyncio.Task[None]] = set()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await standing.serve(reader, writer)

    server = await asyncio.start_server(joined, "127.0.0.1", 0)
    standing.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield standing
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Served:
    """The app behind, and what it was told."""

    scopes: list[Message] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            return
        if scope["type"] == "lifespan":
            return
        headers = [(b"RateLimit-Remaining", b"999"), (b"apicharge_credits", b"3"), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"served"})


def a_fare(desk: Desk, app: Any = None, **more: Any) -> Fare:
    return Fare(app or Served(), authorize_url=desk.url, key=KEY, **more)


def a_scope(path: str = "/x", *headers: tuple[str, str], **more: Any) -> Message:
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "client": ("203.0.113.9", 5000),
        "headers": [(b"host", b"shop"), *((n.encode(), v.encode()) for n, v in headers)],
        **more,
    }


@dataclass
class Said:
    messages: list[Message]

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return {name.lower(): value for name, value in self.messages[0]["headers"]}


async def call(fare: Fare, scope: Message, *messages: Message) -> Said:
    said: list[Message] = []
    coming = list(
        messages or ({"type": "websocket.connect" if scope["type"] == "websocket" else "http.request"},)
    )

    async def receive() -> Message:
        if coming:
            return coming.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        said.append(message)

    await asyncio.wait_for(fare(scope, receive, send), 60)
    return Said(said)


async def test_the_question_says_the_call_as_it_came_and_who_asks_first_of_all(desk: Desk):
    scope = a_scope(
        "/a b",
        ("authorization", "Bearer fbx_ck_theirs"),
        ("x-forwarded-for", "198.51.100.1"),
        ("connection", "keep-alive"),
        ("content-length", "7"),
        ("transfer-encoding", "chunked"),
        ("x-forwarded-uri", "/free"),
        ("x-other", "1"),
        method="PUT",
        raw_path=b"/a%20b",
        query_string=b"c=%2F",
    )

    await call(a_fare(desk), scope)

    assert desk.asked()[0] == "GET /.farebox/authorize HTTP/1.1"
    assert desk.asked()[2:] == [
        f"Authorization: Bearer {KEY}",
        "X-Forwarded-Method: PUT",
        "X-Forwarded-Uri: /a%20b?c=%2F",
        "X-Forwarded-Host: shop",
        "X-Forwarded-For: 198.51.100.1, 203.0.113.9",
        "authorization: Bearer fbx_ck_theirs",
        "x-other: 1",
    ]


async def test_a_yes_tells_the_app_who_calls_and_the_client_what_is_left(desk: Desk):
    app = Served()
    scope = a_scope("/x", ("farebox-customer", "mallory"), ("x-plan", "gold"), state={"pool": 1})

    said = await call(a_fare(desk, app), scope)

    [heard] = app.scopes
    assert heard["farebox"] == Admission("r", "req_1", "acme", "starter")
    assert heard["state"] == {"pool": 1, "farebox": heard["farebox"]}
    assert [h for h in heard["headers"] if h[0] != b"host"] == [
        (b"farebox-request-id", b"req_1"),
        (b"farebox-customer", b"acme"),
        (b"farebox-plan", b"starter"),
        (b"farebox-route", b"r"),
        (b"x-plan", b""),
    ]
    assert scope["state"] == {"pool": 1}
    assert said.messages[0]["headers"] == [
        (b"x-own", b"1"),
        (b"farebox-sandbox", b"1"),
        (b"farebox-request-id", b"req_1"),
        (b"ratelimit-remaining", b"4"),
    ]


async def test_a_no_is_the_listeners_own(desk: Desk):
    desk.answer = lambda question: NO

    said = await call(a_fare(desk), a_scope())
    head = await call(a_fare(desk), a_scope(method="HEAD"))

    assert said.status == head.status == 402
    assert said.headers[b"payment-required"] == b"e30="
    assert said.messages[1]["body"] == b"no!!"
    assert (head.messages[1]["body"], head.headers[b"content-length"]) == (b"", b"4")


async def test_questions_share_connections_that_stay_open_and_never_more_than_allowed(desk: Desk):
    fare = a_fare(desk, connections_max=3)
    for _ in range(5):
        assert (await call(fare, a_scope())).status == 200
    assert desk.connections == 1

    said = await asyncio.gather(*(call(fare, a_scope(f"/{n}")) for n in range(40)))

    assert {s.status for s in said} == {200}
    assert desk.most_open <= 3
    assert len(desk.questions) == 45


async def test_each_call_gets_its_own_answer(desk: Desk):
    def echo(question: bytes) -> bytes:
        uri = question.partition(b"X-Forwarded-Uri: ")[2].partition(b"\r\n")[0]
        return YES.replace(b"acme", uri)

    desk.answer = echo
    app = Served()
    fare = a_fare(desk, app, connections_max=4)

    await asyncio.gather(*(call(fare, a_scope(f"/{n}")) for n in range(60)))

    assert len(app.scopes) == 60
    assert all(s["farebox"].customer == s["path"] for s in app.scopes)


async def test_more_questions_than_may_wait_are_turned_away_at_once(desk: Desk):
    desk.hold = asyncio.Event()
    fare = a_fare(desk, connections_max=1, waiting_max=1, timeout_s=60)
    waiting = [asyncio.ensure_future(call(fare, a_scope())) for _ in range(2)]
    async with asyncio.timeout(30):
        while not desk.questions:
            await asyncio.sleep(0.01)

    turned_away = await call(fare, a_scope())
    desk.hold.set()

    assert (turned_away.status, turned_away.headers[b"retry-after"]) == (503, b"2")
    assert [(await w).status for w in waiting] == [200, 200]


async def test_a_connection_that_ended_while_idle_costs_no_call(desk: Desk):
    desk.close_after = 1
    fare = a_fare(desk)

    assert [(await call(fare, a_scope())).status for _ in range(20)] == [200] * 20


async def test_a_question_that_was_lost_on_a_fresh_connection_is_not_asked_again(desk: Desk):
    desk.answer = lambda question: b""
    app = Served()

    said = await call(a_fare(desk, app), a_scope())

    assert said.status == 503
    assert (len(desk.questions), app.scopes) == (1, [])


@pytest.mark.parametrize(
    "answer",
    [
        None,
        YES[:-4],
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        YES + YES,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_whatever_goes_wrong_with_the_listener_nothing_is_free(desk: Desk, answer: bytes | None):
    desk.answer = lambda question: answer
    app = Served()

    said = await call(a_fare(desk, app, timeout_s=0.5), a_scope())

    assert (said.status, said.headers[b"retry-after"]) == (503, b"2")
    assert app.scopes == []


async def test_an_outage_is_logged_once_until_something_goes_well(
    desk: Desk, caplog: pytest.LogCaptureFixture
):
    desk.answer = lambda question: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    fare = a_fare(desk)

    with caplog.at_level(logging.INFO, "farebox.inapp"):
        for _ in range(9):
            assert (await call(fare, a_scope())).status == 503

    [record] = caplog.records
    assert "does not know the key" in record.getMessage()
    assert KEY not in caplog.text


async def test_what_cannot_be_asked_about_is_refused_without_a_question(desk: Desk):
    app = Served()
    fare = a_fare(desk, app)
    bad = [
        a_scope("/a", raw_path=b"/b"),
        a_scope("/a", raw_path=b"/%61"),
        a_scope("/a b", raw_path=b"/a b"),
        a_scope("/a\r\nX: y", raw_path=b"/a\r\nX: y"),
        a_scope("/a", query_string=b"a\r\nX-Forwarded-Uri: /free"),
        a_scope("/a", ("x", "1\r\nX-Forwarded-Method: OPTIONS")),
        a_scope("/a", ("x y", "1")),
        a_scope("/a", ("", "1")),
        a_scope("/a", ("host", "other")),
        a_scope("/a", headers=[]),
        a_scope("/a", method="GET /free HTTP/1.1\r\nX: "),
        a_scope("/a", client=("1.2.3.4\r\nX: y", 1)),
    ]

    said = [await call(fare, scope) for scope in bad]
    unknown = await call(fare, a_scope("/a", raw_path=None))

    assert [s.status for s in said] == [400] * len(bad)
    assert {s.headers[b"content-type"] for s in said} == {b"application/problem+json"}
    assert unknown.status == 503
    assert (desk.questions, app.scopes) == ([], [])


async def test_a_websocket_is_asked_about_as_a_get_and_refused_before_it_is_accepted(desk: Desk):
    scope = {**a_scope("/ws"), "type": "websocket", "extensions": {"websocket.http.response": {}}}
    del scope["method"]
    yes = await call(a_fare(desk), scope)
    desk.answer = lambda question: NO
    no = await call(a_fare(desk), scope)
    plain = await call(a_fare(desk), {**scope, "extensions": {}})

    assert "X-Forwarded-Method: GET" in desk.asked()
    assert yes.messages[0]["type"] == "websocket.accept"
    assert (b"ratelimit-remaining", b"4") in yes.messages[0]["headers"]
    assert [m["type"] for m in no.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert no.status == 402
    assert plain.messages == [{"type": "websocket.close", "code": 1008}]


async def test_the_gateways_own_calls_pass_by_their_secret_only(desk: Desk):
    app = Served()
    fare = a_fare(desk, app, gateway_url="http://127.0.0.1:1", upstream_secret=SECRET)
    marked = ("x-farebox-upstream", SECRET)
    desk.answer = lambda question: NO

    passed = await call(
        fare,
        a_scope("/x", marked, ("farebox-payer", "0x1"), ("farebox-route", "r"), ("x-farebox-handed", "1")),
    )
    guessed = await call(fare, a_scope("/x", ("x-farebox-upstream", SECRET[:-1] + "t")))
    without = await call(a_fare(desk, app), a_scope("/x", marked))

    assert passed.status == 200
    assert (b"apicharge_credits", b"3") in passed.messages[0]["headers"]  # the gateway reads it
    assert app.scopes[0]["farebox"] == Admission("r", "", payer="0x1")
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"farebox-payer", b"farebox-route"]
    assert (guessed.status, without.status, len(app.scopes)) == (402, 402, 1)
    assert SECRET.encode() not in b"".join(desk.questions)


async def test_what_is_to_be_handed_over_to_nobody_is_answered_with_421(desk: Desk):
    desk.answer = lambda question: HAND_OVER

    assert (await call(a_fare(desk), a_scope())).status == 421


async def test_a_gateway_that_is_away_is_a_503_and_the_same_payment_may_come_again(desk: Desk):
    desk.answer = lambda question: HAND_OVER
    fare = a_fare(desk, gateway_url="http://127.0.0.1:1", upstream_secret=SECRET)

    said = await call(fare, a_scope("/x", ("payment-signature", "x")))

    assert (said.status, said.headers[b"retry-after"]) == (503, b"2")
    await fare.close()


async def test_a_client_that_leaves_ends_what_was_handed_over(desk: Desk):
    desk.answer = lambda question: HAND_OVER
    gateway = Desk(answer=lambda question: None)
    server = await asyncio.start_server(gateway.serve, "127.0.0.1", 0)
    fare = a_fare(
        desk,
        gateway_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        upstream_secret=SECRET,
    )
    left = asyncio.Event()

    first = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if first:
            return first.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nothing is said to who has left")

    running = asyncio.ensure_future(fare(a_scope("/x"), receive, send))
    async with asyncio.timeout(30):
        while not gateway.questions:
            await asyncio.sleep(0.01)
        left.set()
        await running
        while gateway.open:
            await asyncio.sleep(0.01)
    await fare.close()
    server.close()


async def test_the_end_of_the_lifespan_closes_the_connections(desk: Desk):
    fare = a_fare(desk)
    await call(fare, a_scope())
    assert desk.open == 1

    await call(fare, {"type": "lifespan"})

    async with asyncio.timeout(30):
        while desk.open:
            await asyncio.sleep(0.01)


async def test_another_event_loop_gets_connections_of_its_own(desk: Desk):
    fare = a_fare(desk)
    await call(fare, a_scope())

    said = await asyncio.to_thread(lambda: asyncio.run(call(fare, a_scope())))

    assert said.status == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"authorize_url": "https://127.0.0.1:8404"},
        {"authorize_url": "http://127.0.0.1:8404/.farebox/authorize"},
        {"authorize_url": "127.0.0.1:8404"},
        {"authorize_url": "http://127.0.0.1:port"},
        {"key": "fbx_ck_" + "c" * 32},
        {"key": KEY + "\r\nX: y"},
        {"gateway_url": "http://127.0.0.1:8402"},
        {"gateway_url": "unix:/x", "upstream_secret": SECRET},
        {"upstream_secret": "short"},
        {"upstream_secret": "s " * 40},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once_and_show_no_secret(wrong: dict[str, str]):
    with pytest.raises(ValueError) as refused:
        Fare(Served(), **{"authorize_url": "http://127.0.0.1:8404", "key": KEY, **wrong})  # type: ignore[arg-type]

    assert "k" * 32 not in str(refused.value)
    assert "c" * 32 not in str(refused.value)


def test_nothing_heavy_is_imported_into_the_app():
    program = "import sys, farebox.inapp; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        .stdout.split()
    )  # fmt: skip

    assert not loaded & {"httpx", "pydantic", "fastapi", "starlette", "psycopg", "structlog", "nacl"}
    rooms = {m.split(".")[1] for m in loaded if m.startswith("farebox.")}
    assert rooms == {"base", "inapp"}
