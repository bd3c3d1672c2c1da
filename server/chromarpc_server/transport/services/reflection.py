"""Server reflection, under its present name and under the one that older tools ask for.

`grpc.reflection.v1` and `v1alpha` differ in their names alone: their messages are the same, field by field. So one
servicer, grpcio-reflection's, answers both.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA = reflection.SERVICE_NAME


def serve_reflection(service_names: Iterable[str], server: grpc.aio.Server) -> None:
    """Answers both services on `server`.

    Args:
        service_names: what they list besides themselves.
        server: one that has not been started.
    """
    _know_v1()
    servicer = reflection.aio.ReflectionServicer((*service_names, V1, V1ALPHA), pool=_Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(service, handlers) for service in (V1, V1ALPHA))
    )


class _Pool:
    """The process's files; finds the file of a method by its name too, which protobuf's own look-up does not."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 - protobuf's name
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def _know_v1() -> None:
    """Puts v1's file where reflection looks for files.

    There can be one file of that name in a process, and whoever brings a second one with other contents gets an
    error. So what another package has brought is left as it is, and a later grpcio-reflection comes first.
    """
    with contextlib.suppress(ImportError, TypeError):
        importlib.import_module("grpc_reflection.v1.reflection_pb2")
    try:
        descriptor_pool.Default().FindFileContainingSymbol(V1)
    except KeyError:
        importlib.import_module("chromarpc_server.transport.services.reflection_v1_pb2")
