"""`GenerationService`: a request in, a stream over its job's log out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from copy import copy

import grpc

from chromarpc.v1 import generation_service_pb2, generation_service_pb2_grpc
from chromarpc_server.domain.errors import ChromaError, JobCancelled, JobDeadlineExceeded
from chromarpc_server.domain.events import Cancelled, Failed
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.transport.messages.events import encoded_event, heartbeat
from chromarpc_server.transport.services.submit import submit

HEARTBEAT_S = 10.0

Request = generation_service_pb2.GenerateRequest
Response = generation_service_pb2.GenerateResponse
Context = grpc.aio.ServicerContext[Request, Response]


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """Runs generations on one engine."""

    def __init__(self, engine: Engine, serving: Serving) -> None:
        """`serving`: what the settings say about requests."""
        self._engine = engine
        self._serving = serving

    async def Generate(  # noqa: N802
        self, request: Request, context: Context
    ) -> AsyncIterator[Response]:
        """Queues one generation and streams its events until it ends."""
        job, _ = await submit(self._engine, self._serving, request, deadline_s=context.time_remaining())
        ending: ChromaError | None = None
        sequence = 0
        self._engine.attach(job)
        try:
            async for logged in job.log.follow(idle_s=HEARTBEAT_S):
                if logged is None:
                    yield Response(event=heartbeat(sequence))
                    continue
                sequence = logged.sequence
                if isinstance(logged.event, Failed | Cancelled):
                    ending = logged.event.error
                yield encoded_event(logged)
        finally:
            # Reached early when the caller cancels, its deadline passes, or it goes away, and when the server
            # stops and leaves the job to another process.
            self._engine.detach(job, _why_gone(context))
        if ending is not None:
            raise copy(ending)  # other callers of the job get the same error, each with frames of its own


def _why_gone(context: Context) -> ChromaError:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return JobDeadlineExceeded("the deadline passed before the job was done")
    return JobCancelled("the caller cancelled or went away")
