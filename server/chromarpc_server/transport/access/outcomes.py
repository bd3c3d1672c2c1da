"""With what status a call ended, judged by what went through its middleware."""

from __future__ import annotations

import grpc

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.transport.access.interceptor import Call
from chromarpc_server.transport.messages.errors import code_of


def outcome(call: Call, error: BaseException | None) -> grpc.StatusCode:
    """The status of a call that ended with an error, or without one."""
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, grpc.aio.AbortError):
        return _aborted_with(call)
    if isinstance(error, ChromaError):
        return code_of(error)
    if isinstance(error, Exception):
        return grpc.StatusCode.INTERNAL
    # The caller went away, cancelled, or its deadline passed: gRPC cancels the handler's task.
    remaining = call.context.time_remaining()
    is_late = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED


def _aborted_with(call: Call) -> grpc.StatusCode:
    found = call.context.code()
    if isinstance(found, grpc.StatusCode):
        return found
    return next((code for code in grpc.StatusCode if code.value[0] == found), grpc.StatusCode.UNKNOWN)
