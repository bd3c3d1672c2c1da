"""The grpc.aio server: services, health, reflection, channel options, and the interceptor around every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from chromarpc.compat.v1 import inference_service_pb2, inference_service_pb2_grpc
from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    lora_service_pb2,
    lora_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from chromarpc_server.transport.access.audit import CallAudit
from chromarpc_server.transport.access.authentication import Authentication
from chromarpc_server.transport.access.interceptor import Interceptor, Middleware
from chromarpc_server.transport.access.quotas import CallQuotas
from chromarpc_server.transport.access.rates import CallRates
from chromarpc_server.transport.access.tls import ServerTls
from chromarpc_server.transport.addresses import is_unix, room_for
from chromarpc_server.transport.services.generation import GenerationServicer
from chromarpc_server.transport.services.health import HealthServicer
from chromarpc_server.transport.services.inference import InferenceServicer
from chromarpc_server.transport.services.jobs import JobServicer
from chromarpc_server.transport.services.loras import LoraServicer
from chromarpc_server.transport.services.models import ModelServicer
from chromarpc_server.transport.services.reflection import serve_reflection

SERVICES = (
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    job_service_pb2.DESCRIPTOR.services_by_name["JobService"],
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
    lora_service_pb2.DESCRIPTOR.services_by_name["LoraService"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
MAX_STREAMS_PER_CONNECTION = 2048
"""HTTP/2 makes clients wait for a stream rather than fail; callers' quotas come first."""


def channel_options(max_request_bytes: int, max_connections: int) -> list[tuple[str, int]]:
    """Options that keep quiet streams alive and bound what a client may send.

    Without the keepalive ones a client that pings every 10 s on a quiet stream is cut with `too_many_pings`.
    """
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        # Up to 16 KiB is read, between that and 32 KiB it may be refused, beyond it always is.
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 32 * 1024),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Connections that never say anything, or stop half-way through a handshake, do not stay.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.http2.settings_timeout", 10_000),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        # Streams that are opened and reset at once pile up here; beyond it anybody's call may be cancelled.
        ("grpc.server.max_pending_requests", 8_192),
        ("grpc.server.max_pending_requests_hard_limit", 16_384),
        ("grpc.so_reuseport", 0),
    ]


@dataclass(frozen=True)
class Listening:
    """A server that listens, and its health."""

    server: grpc.aio.Server
    health: HealthServicer
    port: int

    def set_serving(self, serving: bool) -> None:
        """Lets health checks know whether requests are taken."""
        self.health.set_ready(serving)


@dataclass(frozen=True)
class Access:
    """Who may call, over what, how often, and how much at once."""

    authentication: Authentication
    rates: CallRates
    quotas: CallQuotas
    max_request_bytes: int
    max_connections: int
    tls: ServerTls | None = None
    audit: CallAudit = field(default_factory=CallAudit)


@dataclass(frozen=True)
class Services:
    """What is served, besides health and reflection; the HTTP API asks `jobs` and `models`."""

    generation: GenerationServicer
    jobs: JobServicer
    models: ModelServicer
    loras: LoraServicer

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers all of them on a server that has not been started."""
        inference = InferenceServicer(self.jobs, self.models)
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self.generation, server)
        job_service_pb2_grpc.add_JobServiceServicer_to_server(self.jobs, server)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self.models, server)
        lora_service_pb2_grpc.add_LoraServiceServicer_to_server(self.loras, server)


async def listen(
    address: str,
    services: Services,
    *,
    access: Access,
    middleware: Sequence[Middleware] = (),
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> Listening:
    """Starts a server that is NOT_SERVING until `Listening.set_serving`.

    Args:
        address: where to listen, as `joined` writes it; port 0 picks one.
        services: what is served.
        access: who may call.
        middleware: around that of `access`.
        interceptors: around all middleware.

    Raises:
        OSError: the address cannot be bound.
    """
    inner = (access.authentication.middleware, access.rates.middleware, access.quotas.middleware)
    interceptor = Interceptor((*middleware, access.audit.middleware, *inner))
    server = grpc.aio.server(
        interceptors=(*interceptors, interceptor),
        options=channel_options(access.max_request_bytes, access.max_connections),
    )
    services.add_to(server)
    health_servicer = HealthServicer(SERVICE_NAMES)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    serve_reflection((*SERVICE_NAMES, health.SERVICE_NAME), server)
    try:
        with room_for(address):
            port = (
                server.add_insecure_port(address)
                if access.tls is None
                else server.add_secure_port(address, access.tls.credentials())
            )
    except RuntimeError as error:
        doubt = "" if is_unix(address) else ": is the port in use?"
        raise OSError(f"cannot listen on {address}{doubt}") from error
    await server.start()
    return Listening(server, health_servicer, port)
