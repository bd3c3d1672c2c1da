"""What Envoy adds to an event's way: the same stream, straight from the server and through the gateway.

A server plays previews at its own pace, each stamped as it leaves; the client reads the stamp as it arrives. Both
run in this process, so that the clocks are one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from chromarpc.v1 import generation_service_pb2, generation_service_pb2_grpc, job_event_pb2
from chromarpc_server.gateway.configuration import Gateway
from chromarpc_server.gateway.envoy import Envoy
from chromarpc_server.transport.services.health import HealthServicer

EVENTS = 500
PACE_S = 0.004
PREVIEW_BYTES = 60_000
"""As large as a preview; small events are faster."""


class Player(generation_service_pb2_grpc.GenerationServiceServicer):
    """Sends events whose sequence is the nanosecond at which they left."""

    async def Generate(  # noqa: N802
        self,
        request: Any,  # noqa: ARG002 - gRPC's signature
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[Any]:
        """Plays them."""
        preview = job_event_pb2.Preview(data=bytes(PREVIEW_BYTES))
        for _ in range(EVENTS):
            await asyncio.sleep(PACE_S)
            event = job_event_pb2.JobEvent(sequence=time.monotonic_ns(), preview=preview)
            yield generation_service_pb2.GenerateResponse(event=event)


async def delays_ms(target: str) -> list[float]:
    """How long each event was on its way."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        responses = stub.Generate(generation_service_pb2.GenerateRequest(), wait_for_ready=True)
        return [(time.monotonic_ns() - response.event.sequence) / 1e6 async for response in responses]


def summary(delays: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    cuts = statistics.quantiles(delays, n=100)
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


async def main() -> None:
    """Prints one JSON object."""
    server = grpc.aio.server()
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(Player(), server)
    health = HealthServicer(())
    health.set_ready(True)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        web_port = listener.getsockname()[1]
    envoy = Envoy(Gateway("127.0.0.1", web_port, "127.0.0.1", port))
    await envoy.start()
    await asyncio.sleep(2)  # the gateway's first look at the server's health
    try:
        direct = summary(await delays_ms(f"127.0.0.1:{port}"))
        through = summary(await delays_ms(f"127.0.0.1:{web_port}"))
    finally:
        await envoy.stop()
        await server.stop(0)
    added = {name: round(through[name] - direct[name], 3) for name in direct}
    print(
        json.dumps({"event_bytes": PREVIEW_BYTES, "direct": direct, "gateway": through, "added": added}, indent=2)
    )


if __name__ == "__main__":
    asyncio.run(main())
