"""`grpc.health.v1.Health`: readiness under every service's name, liveness under its own.

The library's servicer forgets all watchers of a name when one of them leaves; this one does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"
"""SERVING from the first moment until the device is lost, draining included."""
READINESS = "readiness"
"""SERVING while requests are taken; the empty name and every service's name say the same."""

_Status = health_pb2.HealthCheckResponse.ServingStatus
_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers probes. Lives on the event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        """`services`: names that say whether requests are taken, beside `""` and `readiness`."""
        self._ready = dict.fromkeys(("", READINESS, *services), _NOT_SERVING)
        self._alive = _SERVING
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._ready[READINESS] == _SERVING

    @property
    def is_alive(self) -> bool:
        """Whether the process is of any use, even if not now."""
        return self._alive == _SERVING

    def set_ready(self, ready: bool) -> None:
        """Sets whether requests are taken."""
        self._ready = dict.fromkeys(self._ready, _SERVING if ready else _NOT_SERVING)
        self._notify()

    def set_dead(self) -> None:
        """Reports that only a restart helps."""
        self._alive = _NOT_SERVING
        self.set_ready(False)

    def close(self) -> None:
        """Ends every watch after the status that it sends last."""
        self._closed = True
        self._notify()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: N802
        """Answers one status."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=_Status.Name(status))

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Any,  # noqa: ARG002 - gRPC's signature
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Streams one status and its changes."""
        sent: int | None = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=_Status.Name(status))
                continue
            if self._closed:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        return self._alive if service == LIVENESS else self._ready.get(service, _UNKNOWN)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
