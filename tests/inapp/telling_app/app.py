"""Tells in its answer what it heard of the call. What it does is said by the path's end."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from farebox.inapp import Fare


async def api(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    size, digest = 0, hashlib.sha256()
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        digest.update(message.get("body", b""))
        if not message.get("more_body"):
            break
    path = scope["path"]
    headers = [(b"content-type", b"application/json"), (b"farebox-customer", b"said by the app")]
    if path.endswith("/fails"):
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if path.endswith("/breaks"):
        await send({"type": "http.response.body", "body": b"the first half", "more_body": True})
        return
    heard = {
        "method": scope["method"],
        "path": path,
        "query": scope["query_string"].decode(),
        "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
        "admission": dataclasses.asdict(scope["farebox"]),
        "same_in_state": scope["state"]["farebox"] is scope["farebox"],
        "size": size,
        "sha256": digest.hexdigest(),
    }
    body = json.dumps(heard).encode()
    await send({"type": "http.response.body", "body": body[:10], "more_body": True})
    await send({"type": "http.response.body", "body": body[10:]})


app = Fare(
    api,
    authorize_url=os.environ["FARE_AUTHORIZE_URL"],
    gateway_url=os.environ.get("FARE_GATEWAY_URL"),
    key=os.environ["FARE_KEY"],
    upstream_secret=os.environ["FARE_UPSTREAM_SECRET"],
)
