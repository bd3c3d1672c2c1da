"""What surrounds every call, whatever service it belongs to: one interceptor, and a list of middleware.

A middleware is an async context manager around the handler: before the handler it may end the call by raising,
afterwards it sees how the handler ended. Whatever is raised inside becomes the call's status here, and nowhere
else. The request's bytes are received and parsed inside all of them: so nothing is parsed of unknown callers, and
a call can be ended before its request's last byte has come, however slowly it comes.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from chromarpc_server.domain.errors import ChromaError, InternalError, InvalidParameter, JobDeadlineExceeded
from chromarpc_server.transport.messages.errors import code_of, status_message, trailing_metadata

log = logging.getLogger(__name__)

RECEIVE_TIMEOUT_S = 30.0
"""Between a call's begin and the last byte of its request."""
SEND_TIMEOUT_S = 1.0
"""How long a call that is ended early may take to send what it is sending; its reader may never read."""


@dataclass(eq=False)
class Call:
    """A call on its way to its handler, and in it. Belongs to the task that serves it."""

    method: str
    """`/package.Service/Method`, one that this server has."""
    context: Any
    """`grpc.aio.ServicerContext`."""
    streams: bool
    """Whether the answer is a stream."""
    peer: str = field(init=False)
    """Where it comes from, asked for once: when the caller is gone, gRPC's context has nothing left to look at."""
    on_request: Callable[[Any], None] | None = None
    """Called with the request once it is parsed; set by a middleware that needs to know it."""
    _task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task, repr=False)
    _is_sending: bool = False
    _early_end: ChromaError | None = None

    def __post_init__(self) -> None:
        self.peer = self.context.peer()

    @property
    def service(self) -> str:
        """`package.Service`."""
        return self.method.lstrip("/").partition("/")[0]

    def end(self, error: ChromaError) -> None:
        """Ends the call early with the status of an error; to its handler it looks like a lost connection.

        To be called from another task, while the call is within its middleware.
        """
        if self._early_end is not None or self._task is None:
            return
        self._early_end = error
        if self._is_sending:
            # Cancelled in the middle of a message, gRPC would end the call without a status.
            asyncio.get_running_loop().call_later(SEND_TIMEOUT_S, self._stop_sending)
        else:
            self._task.cancel()

    def begin_sending(self) -> None:
        """A message is given to gRPC."""
        self._is_sending = True

    def end_sending(self) -> None:
        """It is sent. Raises the error of an early end that came meanwhile."""
        self._is_sending = False
        if self._early_end is not None:
            raise self._early_end

    def _stop_sending(self) -> None:
        if self._is_sending and self._task is not None:
            self._task.cancel()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Around the handler: an early end's cancellation becomes its error."""
        try:
            yield
        except asyncio.CancelledError:
            if self._early_end is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._early_end from None


Middleware = Callable[[Call], AbstractAsyncContextManager[None]]


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs every handler inside the middleware, the first one outermost."""

    def __init__(self, middleware: Sequence[Middleware]) -> None:
        """`middleware`: what any of them, or the handler, raises ends the call with its status."""
        self._middleware = tuple(middleware)

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
            return grpc.stream_unary_rpc_method_handler(
                self._answer(handler.unary_unary, method, handler.request_deserializer),
                None,
                handler.response_serializer,
            )
        if handler.unary_stream is not None and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method, handler.request_deserializer),
                None,
                _unless_bytes(handler.response_serializer),
            )
        if handler.stream_stream is not None and inspect.isasyncgenfunction(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream, method, None),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise TypeError(f"{method} has a handler of a kind that is not intercepted")

    @asynccontextmanager
    async def _within(self, call: Call) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for middleware in self._middleware:
                await stack.enter_async_context(middleware(call))
            with call.handled():
                yield

    def _answer(self, answer: Callable[..., Awaitable[Any]], method: str, parse: Any) -> Any:
        async def intercepted(requests: AsyncIterator[bytes], context: Any) -> Any:
            call: Call | None = None
            try:
                call = Call(method, context, streams=False)
                async with self._within(call):
                    return await answer(await _single_request(call, requests, parse), context)
            except Exception as error:  # noqa: BLE001 - the last line of defence
                ending = _ending(method, error)
            try:
                return await _end(context, ending)
            finally:
                del ending, requests, context, call

        return intercepted

    def _stream(self, stream: Callable[..., AsyncGenerator[Any, None]], method: str, parse: Any) -> Any:
        async def intercepted(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
            call: Call | None = None
            try:
                call = Call(method, context, streams=True)
                async with self._within(call):
                    answers = stream(
                        requests if parse is None else await _single_request(call, requests, parse), context
                    )
                    try:
                        async for response in answers:
                            call.begin_sending()
                            yield response
                            call.end_sending()
                    finally:
                        await answers.aclose()
            except Exception as error:  # noqa: BLE001 - the last line of defence
                ending = _ending(method, error)
            else:
                return
            try:
                await _end(context, ending)
            finally:
                del ending, requests, context, call

        return intercepted


def _unless_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Lets through what was serialized before, for many readers at once."""

    def serialized(message: Any) -> bytes:
        return message if isinstance(message, bytes) else serialize(message)

    return serialized


async def _single_request(call: Call, requests: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> Any:
    """The one message of a request that is no stream.

    Raises:
        InvalidParameter: there is none, or its bytes are not one.
        JobDeadlineExceeded: it does not arrive.
    """
    messages = aiter(requests)
    try:
        async with asyncio.timeout(RECEIVE_TIMEOUT_S):
            request = await anext(messages)
    except StopAsyncIteration:
        raise InvalidParameter("the call carries no request") from None
    except TimeoutError:
        message = f"the request did not arrive within {RECEIVE_TIMEOUT_S:g} s"
        raise JobDeadlineExceeded(message) from None
    finally:
        if isinstance(messages, AsyncGenerator):
            # It and what made it hold each other until it ends.
            await messages.aclose()
    try:
        parsed = parse(request)
    except DecodeError:
        raise InvalidParameter("the request's bytes are not a message of this method") from None
    if call.on_request is not None:
        call.on_request(parsed)
    return parsed


_Ending = ChromaError | grpc.aio.AbortError


def _ending(method: str, error: Exception) -> _Ending:
    """What the call ends with; an error that nobody foresaw is INTERNAL, with an id that the log has.

    The frames that the error went through hold it, and it holds them, with the request in them: released here,
    they are freed at once rather than by a garbage collection that may be a hundred thousand calls away.
    """
    if not isinstance(error, _Ending):
        error_id = uuid.uuid4().hex[:12]
        log.error("rpc.internal_error", exc_info=error, extra={"method": method, "error_id": error_id})
        _release_frames(error)
        return InternalError(f"internal error {error_id}", metadata={"error_id": error_id})
    _release_frames(error)
    return error


def _release_frames(error: BaseException | None) -> None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__context__


async def _end(context: Any, ending: _Ending) -> None:
    """Ends the call with the status of an error, unless the handler has done so already."""
    try:
        if isinstance(ending, grpc.aio.AbortError):
            raise ending
        await context.abort(code_of(ending), status_message(ending), trailing_metadata(ending))
    finally:
        # gRPC keeps the error that ends the call, and the error keeps this frame.
        del ending, context
