"""What surrounds every call, whatever service it belongs to: one interceptor, and a list of rules.

A rule is an async context manager around the handler: what it does before may refuse the call by raising, what it
does afterwards sees how the handler ended. The request's bytes are parsed inside all of them, so that bytes nobody
vouches for are not parsed at all, and bytes that are no message are told as such.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from chromarpc_server.domain.errors import ChromaError, InternalError, InvalidParameter
from chromarpc_server.transport.status import code_of, trailing_metadata

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A call on its way to its handler."""

    method: str
    """`/package.Service/Method`, one that this server has."""
    context: Any
    """`grpc.aio.ServicerContext`."""
    streams: bool
    """Whether the answer is a stream."""

    @property
    def service(self) -> str:
        """`package.Service`."""
        return self.method.lstrip("/").partition("/")[0]


Rule = Callable[[Call], AbstractAsyncContextManager[None]]


class Rules(grpc.aio.ServerInterceptor):
    """Runs every handler inside the rules, the first one outermost."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """`rules`: in order; what any of them, or the handler, raises ends the call with its status."""
        self._rules = (errors_told, *rules)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps handlers that are coroutines, or async generators; this server has no others."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        if handler.unary_unary is not None and inspect.iscoroutinefunction(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(
                self._answer(handler.unary_unary, method, handler.request_deserializer),
                None,
                handler.response_serializer,
            )
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method, handler.request_deserializer),
                None,
                handler.response_serializer,
            )
        if handler.stream_stream is not None and inspect.isasyncgenfunction(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream, method, None),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise TypeError(f"{method} has a handler of a kind that no rule is applied to")

    @asynccontextmanager
    async def _within(self, call: Call) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for rule in self._rules:
                await stack.enter_async_context(rule(call))
            yield

    def _answer(self, answer: Callable[..., Awaitable[Any]], method: str, parse: Any) -> Any:
        async def ruled(request: bytes, context: Any) -> Any:
            async with self._within(Call(method, context, streams=False)):
                return await answer(_parsed(request, parse), context)

        return ruled

    def _stream(self, stream: Callable[..., AsyncGenerator[Any, None]], method: str, parse: Any) -> Any:
        async def ruled(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            async with self._within(Call(method, context, streams=True)):
                answers = stream(request if parse is None else _parsed(request, parse), context)
                try:
                    async for response in answers:
                        yield response
                finally:
                    await answers.aclose()

        return ruled


def _parsed(request: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(request)
    except DecodeError:
        raise InvalidParameter("the request's bytes are not a message of this method") from None


@asynccontextmanager
async def errors_told(call: Call) -> AsyncIterator[None]:
    """Ends the call with the error's status; one that nobody foresaw is INTERNAL, with an id that the log has."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except ChromaError as error:
        await _abort(call.context, error)
    except Exception:
        error_id = uuid.uuid4().hex[:12]
        log.exception("rpc.internal_error", extra={"method": call.method, "error_id": error_id})
        await _abort(call.context, InternalError(f"internal error {error_id}", metadata={"error_id": error_id}))


async def _abort(context: Any, error: ChromaError) -> None:
    await context.abort(code_of(error), error.message[:1000], trailing_metadata(error))
