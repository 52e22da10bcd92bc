"""A gRPC client over TLS: ``grpc_client.py PORT CERTIFICATE KEY``. Prints JSON: what each call got, or its status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc


def main(port: str, certificate: str, key: str) -> None:
    channel = grpc.secure_channel(
        f"127.0.0.1:{port}",
        grpc.ssl_channel_credentials(Path(certificate).read_bytes()),
        (
            ("grpc.ssl_target_name_override", "fast.example.com"),
            ("grpc.default_authority", "fast.example.com"),
        ),
    )
    get = channel.unary_unary("/weather.v1.Forecasts/Get")
    watch = channel.unary_stream("/weather.v1.Forecasts/Watch")
    mine = (("x-api-key", key), ("farebox-customer", "mallory"), ("x-plan", "gold"))

    def outcome(call: Any) -> Any:
        try:
            return call()
        except grpc.RpcError as error:
            return error.code().name  # type: ignore[attr-defined]

    print(
        json.dumps(
            {
                "unpaid": outcome(lambda: get(b"paris", timeout=30).decode()),
                "guessed": outcome(
                    lambda: get(
                        b"paris", timeout=30, metadata=(("x-api-key", "fbx_ck_" + "x" * 32),)
                    ).decode()
                ),
                "get": outcome(lambda: get(b"paris", timeout=30, metadata=mine).decode()),
                "watch": outcome(lambda: [m.decode() for m in watch(b"rome", timeout=30, metadata=mine)]),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
