"""The standard health check (`grpc.health.v1`), in this package's words."""

from __future__ import annotations

from enum import StrEnum

from grpc_health.v1 import health_pb2


class HealthStatus(StrEnum):
    """What a server says of itself or of one of its services."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    """It listens and takes no requests: it is starting, stopping, or has lost its device."""
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
    """It has no such service."""


_STATUSES = {
    health_pb2.HealthCheckResponse.SERVING: HealthStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: HealthStatus.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN: HealthStatus.SERVICE_UNKNOWN,
}


def health_status(response: health_pb2.HealthCheckResponse) -> HealthStatus:
    """The answer of a check; UNKNOWN for a status that this client does not know."""
    return _STATUSES.get(response.status, HealthStatus.UNKNOWN)
