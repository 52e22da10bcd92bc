"""A real gRPC server without TLS: ``/weather.v1.Forecasts/Get`` (one answer) and ``/Watch`` (three). Messages are plain bytes.

Run as ``python grpc_upstream.py LOG`` with grpcio on the path; prints its port. Each call is one line of JSON: its metadata.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc


def main(log_path: str) -> None:
    def note(method: str, context: Any) -> None:
        with open(log_path, "a") as log:
            log.write(
                json.dumps(
                    {"method": method, "headers": [(k, str(v)) for k, v in context.invocation_metadata()]}
                )
                + "\n"
            )

    def get(request: bytes, context: Any) -> bytes:
        note("Get", context)
        return b"rain in " + request

    def watch(request: bytes, context: Any) -> Any:
        note("Watch", context)
        for n in range(3):
            yield b"%d in %b" % (n, request)

    server = grpc.server(ThreadPoolExecutor(4))
    methods = {
        "Get": grpc.unary_unary_rpc_method_handler(get),
        "Watch": grpc.unary_stream_rpc_method_handler(watch),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("weather.v1.Forecasts", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
