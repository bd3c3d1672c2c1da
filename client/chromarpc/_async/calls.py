"""Calls to one server: what is sent with each, how long each may take, and what its errors become."""

from __future__ import annotations

from typing import Any, TypeVar

import grpc
import grpc.aio  # async only
from grpc_health.v1 import health_pb2_grpc

from chromarpc._async.concurrency import AsyncChannel
from chromarpc.channel import DEFAULT_UNARY_TIMEOUT_S, Connection
from chromarpc.errors import StatusError, from_status
from chromarpc.leaving import LEAVE_WAIT_S
from chromarpc.v1 import (
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    lora_service_pb2_grpc,
    model_service_pb2_grpc,
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncCalls:
    """Makes the calls of one client, until it is closed."""

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        """Connects to nothing yet.

        Args:
            connection: to the server.
            timeout_s: deadline of calls that name none themselves.
        """
        self._connection = connection
        self._timeout_s = timeout_s
        self._channel = AsyncChannel(connection)
        self._ended = False

    def generation(self) -> generation_service_pb2_grpc.GenerationServiceAsyncStub:
        """The methods of `GenerationService`, to be given to `ask` and `stream`; so are those below.

        Raises:
            RuntimeError: the client is closed.
        """
        return generation_service_pb2_grpc.GenerationServiceStub(self._open_channel())

    def jobs(self) -> job_service_pb2_grpc.JobServiceAsyncStub:
        """Those of `JobService`."""
        return job_service_pb2_grpc.JobServiceStub(self._open_channel())

    def loras(self) -> lora_service_pb2_grpc.LoraServiceAsyncStub:
        """Those of `LoraService`."""
        return lora_service_pb2_grpc.LoraServiceStub(self._open_channel())

    def models(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        """Those of `ModelService`."""
        return model_service_pb2_grpc.ModelServiceStub(self._open_channel())

    def health(self) -> Any:
        """Those of gRPC's own health service, whose stubs have no types for asyncio."""
        return health_pb2_grpc.HealthStub(self._open_channel())

    def deadline_s(self, timeout_s: float | None) -> float | None:
        """What a call is given: its own deadline, else the client's, else none."""
        return self._timeout_s if timeout_s is None else timeout_s

    async def ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        usual_s: float = DEFAULT_UNARY_TIMEOUT_S,
    ) -> _Response:
        """Makes a call with one answer.

        Args:
            method: of a stub.
            request: to send.
            timeout_s: deadline, where the caller named one.
            usual_s: deadline where neither the caller nor the client named one.

        Raises:
            StatusError: see `chromarpc.errors`.
        """
        deadline_s = self.deadline_s(timeout_s)
        try:
            return await method(
                request,
                timeout=usual_s if deadline_s is None else deadline_s,
                metadata=self._connection.metadata,
            )
        except grpc.RpcError as error:
            raise self.translated(error) from None

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
        **options: Any,
    ) -> Any:
        """Begins a call with several answers; at once an iterator and a call, which the stubs cannot say."""
        return method(request, timeout=self.deadline_s(timeout_s), metadata=self._connection.metadata, **options)

    def translated(self, error: Any) -> StatusError:
        """What gRPC raised, as one of `chromarpc.errors`."""
        return status_error(error, self._connection.target)

    async def leave(self, request: job_service_pb2.CancelJobRequest) -> None:
        """Tells the server that a job is not wanted any more; also after `end`, until `close`."""
        stub = job_service_pb2_grpc.JobServiceStub(self._channel.get())
        await stub.CancelJob(request, timeout=LEAVE_WAIT_S, metadata=self._connection.metadata)

    def end(self) -> None:
        """Lets no further call begin."""
        self._ended = True

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        await self._channel.close()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._ended:
            raise RuntimeError("the client is closed")
        return self._channel.get()


def status_error(error: Any, target: str) -> StatusError:
    """What gRPC raised, as one of `chromarpc.errors`; `target` is named where it cannot be reached."""
    return from_status(error.code(), error.details(), error.trailing_metadata(), target=target)
