"""A weather API made with Litestar that takes the fare by itself. How to try it: docs/inapp.md."""

import os
from typing import Any

from litestar import Litestar, Request, WebSocket, get, websocket

from farebox.inapp import Fare


@get("/weather/{city:str}")
async def weather(city: str, request: Request[Any, Any, Any]) -> dict[str, Any]:
    caller = request.state.farebox
    return {"city": city, "sky": "clear", "customer": caller.customer, "payer": caller.payer}


@websocket("/alerts")
async def alerts(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    await socket.send_json({"alert": "storm", "customer": socket.state.farebox.customer})
    await socket.close()


app = Fare(
    Litestar([weather, alerts]),
    authorize_url=os.environ.get("FARE_AUTHORIZE_URL", "http://127.0.0.1:8404"),
    gateway_url=os.environ.get("FARE_GATEWAY_URL", "http://127.0.0.1:8402"),
    key=os.environ["FARE_KEY"],
    upstream_secret=os.environ["FARE_UPSTREAM_SECRET"],
)
