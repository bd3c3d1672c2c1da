"""The grpc.aio server: services, health, reflection, channel options, and the last line of defence."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from chromarpc.v1 import (
    generation_service_pb2,
    generation_service_pb2_grpc,
    lora_service_pb2,
    lora_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from chromarpc_server.domain.errors import InternalError
from chromarpc_server.transport.generation import GenerationServicer
from chromarpc_server.transport.loras import LoraServicer
from chromarpc_server.transport.models import ModelServicer
from chromarpc_server.transport.status import code_of, trailing_metadata

log = logging.getLogger(__name__)

SERVICE_NAMES = (
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    lora_service_pb2.DESCRIPTOR.services_by_name["LoraService"].full_name,
)


def channel_options(max_request_bytes: int) -> list[tuple[str, int]]:
    """Options that keep quiet streams alive and bound what a client may send.

    Without the keepalive ones a client that pings every 10 s on a quiet stream is cut with `too_many_pings`.
    """
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]


class UnforeseenErrors(grpc.aio.ServerInterceptor):
    """Turns an exception that nobody foresaw into INTERNAL with an id that the log has too."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps this package's handlers: coroutines for single answers, async generators for streams."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        if handler.unary_unary is not None and inspect.iscoroutinefunction(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(
                _guarded_answer(handler.unary_unary, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(
                _guarded_stream(handler.unary_stream, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return handler


def _guarded_answer(answer: Callable[..., Awaitable[Any]], method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await answer(request, context)
        except Exception as error:  # noqa: BLE001 - the last line of defence
            await _abort_unforeseen(context, method, error)

    return guarded


def _guarded_stream(stream: Callable[..., AsyncGenerator[Any, None]], method: str) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        answers = stream(request, context)
        try:
            async for response in answers:
                yield response
        except Exception as error:  # noqa: BLE001 - the last line of defence
            await _abort_unforeseen(context, method, error)
        finally:
            await answers.aclose()

    return guarded


async def _abort_unforeseen(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    error_id = uuid.uuid4().hex[:12]
    log.error("rpc.internal_error", exc_info=error, extra={"method": method, "error_id": error_id})
    answer = InternalError(f"internal error {error_id}", metadata={"error_id": error_id})
    await context.abort(code_of(answer), answer.message, trailing_metadata(answer))


@dataclass(frozen=True)
class Listening:
    """A server that listens, and its health."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    port: int

    async def set_serving(self, serving: bool) -> None:
        """Tells health checkers whether requests are taken: for every service and for the server."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            await self.health.set(name, status)


async def listen(
    address: str,
    generation: GenerationServicer,
    models: ModelServicer,
    loras: LoraServicer,
    *,
    max_request_bytes: int,
) -> Listening:
    """Starts a server on `address` (`host:port`, port 0 picks one), NOT_SERVING until told otherwise.

    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(interceptors=(UnforeseenErrors(),), options=channel_options(max_request_bytes))
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
    lora_service_pb2_grpc.add_LoraServiceServicer_to_server(loras, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is the port in use?") from error
    listening = Listening(server, health_servicer, port)
    await listening.set_serving(False)
    await server.start()
    return listening
