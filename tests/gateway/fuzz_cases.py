"""Random cases for the fuzzer (fuzz_conversations.py): lists of acts, made from a seed, always the same from the same seed."""

from __future__ import annotations

import random
from typing import Any, Final

from tests.gateway.test_smuggling import BAD_ANSWERS, BAD_CHUNKS, FRAMING, MALFORMED_HEADS

Act = tuple[Any, ...]

SPOILT_HEADS: Final = (*MALFORMED_HEADS.values(), *FRAMING.values())
SPOILT_CHUNKS: Final = tuple(c for c in BAD_CHUNKS.values() if len(c) < 500)
SPOILT_ANSWERS: Final = tuple(a for a in BAD_ANSWERS.values() if len(a) < 500)

#: The first segment of a request's path: which route takes it, and what the door says to it.
PLAIN_MODES: Final = ("yes", "no", "slow", "slowno", "whole", "settle", "unsettled", "raise")
MODES: Final = (
    *("yes",) * 5,
    *("metered",) * 3,
    *("many",) * 3,
    *("timed", "small", "strip", "set", "cond", "free"),
    *("no", "slow", "slowno", "whole", "settle", "unsettled", "raise", "page", "nowhere"),
)
#: Lines of a client who would like to be somebody else, to be somewhere else, or to hide what is ours.
EXTRA_LINES: Final = (
    *("",) * 6,
    "X-Original-URL: /paid",
    "X-Rewrite-URL: /paid",
    "X-Original-URI: /paid",
    "Farebox_Customer: mallory",
    "X-Forwarded-For: 192.0.2.66",
    "Forwarded: for=192.0.2.66",
    "X-Set: mallory",
    "X_Set: mallory",
    "X-Gone: 1",
    "Authorization: Bearer fbx_live_key",
    "Authorization: Bearer foreign",
    "Cookie: theirs=1",
    "PAYMENT-SIGNATURE: x",
    "HTTP2-Settings: AAMAAABkAAQAAP__",
    "X-Plan: gold",
    "X-Plan: silver",
    "X_Plan: gold",
    "x-plan: gold, silver",
)
CONNECTIONS: Final = (
    *("",) * 10,
    "close",
    "keep-alive",
    "X-Hop",
    "Farebox-Customer",
    "X-Set, X-Forwarded-For",
    "Host, Content-Length, Transfer-Encoding",
    "X-Plan",
)
QUERIES: Final = (
    *("",) * 8,
    "?a=1",
    "?a=1&drop=2",
    "?DROP[]=1&a=1;drop=3",
    "?plan=free&a=1",
    "?%70lan=free",
    "?format=full",
    "?format=full&format=brief",
    "?format=brief;format=full",
    "?Format=full",
)


def case(seed: int) -> list[Act]:
    """The acts of one case."""
    rng = random.Random(seed)
    acts: list[Act] = [("connect",)]
    spoils = rng.random() < 0.4
    for _ in range(rng.randrange(4, 40)):
        acts.extend(_some_acts(rng, spoils))
    return acts


def _some_acts(rng: random.Random, spoils: bool) -> list[Act]:
    who = rng.randrange(8)
    roll = rng.random()
    if roll < 0.05:
        return [("connect",)]
    if roll < 0.34:
        said: list[Act] = [("say", who, _request(rng, spoils)) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        return [*said, *_sends("send", who, rng)]
    if roll < 0.66:
        return [("answer", who, _answer(rng, spoils)), *_sends("give", who, rng)]
    if roll < 0.74:
        side = rng.choice((("talk", "send"), ("utalk", "give")))
        return [(side[0], who, rng.choice((1, 5, 40, 900, 3000))), *_sends(side[1], who, rng)]
    if roll < 0.80:
        return _sends(rng.choice(("send", "give")), who, rng)
    if roll < 0.87:
        return [("wait", rng.choice((0.1, 0.3, 1.0, 1.5, 3.0, 5.0)))]
    if roll < 0.90:
        return [(rng.choice(("leave", "uleave")), who, rng.choice(("closes", "half_closes", "resets")))]
    if roll < 0.94:
        return [(rng.choice(("stop", "ustop", "take", "utake")), who)]
    if roll < 0.955:
        return [("catalog", rng.randrange(4))]
    if roll < 0.965:
        return [("network", rng.choice(("refuses", "hangs", "works", "works")))]
    if roll < 0.975:
        return [("target", rng.randrange(3), rng.choice(("dies", "dies", "lives")))]
    if roll < 0.985:
        return [("cut", who)]
    if roll < 0.997:
        return [("date", rng.choice((1.0, 5.0)))]
    return [("drain", rng.choice((0.5, 3.0)))]


def _sends(act: str, who: int, rng: random.Random) -> list[Act]:
    roll = rng.random()
    if roll < 0.6:
        return [(act, who, 1 << 20)]
    if roll < 0.75:
        return [(act, who, 1)] * rng.randrange(1, 30)
    return [(act, who, rng.choice((3, 17, 60, 200, 900))) for _ in range(rng.randrange(1, 6))]


def _request(rng: random.Random, spoils: bool) -> dict[str, Any]:
    method = rng.choice(
        ("GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PURGE")
    )
    framing = rng.choice(
        ("none", "length", "chunked") if method in ("POST", "PUT", "PATCH", "GET") else ("none",)
    )
    spec = {
        "mode": rng.choice(MODES),
        "method": method,
        "framing": framing,
        "size": rng.choice((0, 1, 5, 40, 61, 400, 1400, 2900, 3001, 5000)) if framing != "none" else 0,
        "version": rng.choice(("1.1",) * 6 + ("1.0",)),
        "connection": rng.choice(CONNECTIONS),
        "expect": rng.random() < 0.1,
        "chunk": rng.choice((1, 7, 100, 10_000)),
        "fill": rng.choice((0,) * 10 + (250, 1400, 2000)),
        "extra": [line for line in (rng.choice(EXTRA_LINES), rng.choice(EXTRA_LINES)) if line],
        "query": rng.choice(QUERIES),
        "te": rng.random() < 0.15,
        "trailers": rng.random() < 0.3,
        "upgrade": rng.random() < 0.2,
        "expires_s": rng.choice((None,) * 6 + (1.0, 4.0)),
        "up": _flow(rng),
        "down": _flow(rng),
    }
    if spec["version"] == "1.0" and framing == "chunked":
        spec["framing"] = "length"
    if spoils and rng.random() < 0.2:
        spec["spoil"] = rng.choice(("head", "chunk", "flip", "cut", "noise"))
        spec["at"] = rng.randrange(1 << 16)
        spec["byte"] = rng.randrange(256)
    return spec


def _flow(rng: random.Random) -> dict[str, Any] | None:
    """What a limit lets pass: so much at once, in steps, then more after waits, and how it ends."""
    if rng.random() < 0.3:
        return None
    return {
        "first": rng.choice((0, 1, 30, 500, 10_000)),
        "step": rng.choice((1 << 20, 1 << 20, 7, 300)),
        "more": [
            (rng.choice((0.0, 0.1, 0.7, 2.0)), rng.choice((0, 1, 50, 700, 10_000)))
            for _ in range(rng.randrange(4))
        ],
        "end": rng.choice(("never", "never", "raise", "all")),
    }


def _answer(rng: random.Random, spoils: bool) -> dict[str, Any]:
    spec = {
        "framing": rng.choice(("length",) * 4 + ("chunked",) * 3 + ("endless",)),
        "size": rng.choice((0, 1, 5, 40, 900, 2000, 6000)),
        "status": rng.choice((200,) * 8 + (201, 299, 204, 304, 402, 404, 413, 426, 500)),
        "chunk": rng.choice((1, 7, 300, 10_000)),
        "interim": rng.choice((0,) * 8 + (1, 3, 17)),
        "close": rng.random() < 0.1,
        "version": rng.choice(("1.1",) * 8 + ("1.0",)),
        "trailer": rng.random() < 0.3,
        "credits": rng.choice((None,) * 4 + ("0", "-5", "+3", "much")),
        "credits_after": rng.choice((None,) * 4 + ("-7", "2")),
        "switch": rng.choice(("yes",) * 5 + ("no", "other", "twice")),
        "ahead": rng.choice((0, 0, 10, 2000)),
    }
    if spoils and rng.random() < 0.3:
        spec["spoil"] = rng.choice(("malformed", "short", "reset", "more", "more"))
        spec["at"] = rng.randrange(1 << 16)
    return spec
