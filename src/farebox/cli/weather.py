"""The sample upstream of the demo: a small weather API that knows nothing of Farebox. ``python -m farebox.cli.weather``.

    GET /weather/{city}   {"city", "celsius", "sky", "served": how many answers so far, "told": {what Farebox said of the caller}}
    GET /                 {"try": "/weather/{city}"}
    GET /healthz          {"status": "ok"}

Prints its port on standard output. The weather is invented from the city's name, so that it is the same every time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import unquote, urlsplit

SKIES: Final = ("clear", "a few clouds", "overcast", "light rain", "showers", "snow", "fog", "a thunderstorm")
#: What Farebox tells an upstream about an admitted call, echoed so that the demo can show it.
TOLD: Final = ("Farebox-Customer", "Farebox-Plan", "Farebox-Pass", "Farebox-Payer", "Farebox-Request-Id")

_served = itertools.count(1)


class Weather(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "sample-weather"
    sys_version = ""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            self._answer(200, {"try": "/weather/{city}"})
        elif path == "/healthz":
            self._answer(200, {"status": "ok"})
        elif path.startswith("/weather/") and len(path) > len("/weather/"):
            self._answer(200, self._weather(unquote(path.removeprefix("/weather/"))))
        else:
            self._answer(404, {"error": "there is only /weather/{city}"})

    def _weather(self, city: str) -> dict[str, object]:
        seed = hashlib.sha256(city.lower().encode()).digest()
        return {
            "city": city,
            "celsius": seed[0] % 40 - 8,
            "sky": SKIES[seed[1] % len(SKIES)],
            "served": next(_served),
            "told": {name: value for name in TOLD if (value := self.headers.get(name))},
        }

    def _answer(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the demo tells the story."""


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Weather)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
