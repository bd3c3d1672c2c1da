# Generated from client/chromarpc/_async/serving.py by tools/unasync.py: do not edit.
"""Waits for a server."""

from __future__ import annotations

import time

import grpc
from grpc_health.v1 import health_pb2

from chromarpc._sync.calls import Calls
from chromarpc.errors import ServerUnavailable
from chromarpc.health import HealthStatus, health_status


def wait_until_serving(calls: Calls, timeout_s: float) -> None:
    """What `Client.wait_until_serving` documents."""
    stub = calls.health()
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        watch = calls.stream(stub.Watch, health_pb2.HealthCheckRequest(), left_s, wait_for_ready=True)
        try:
            for response in watch:
                if health_status(response) is HealthStatus.SERVING:
                    return
        except grpc.RpcError as rpc_error:
            error = calls.translated(rpc_error)
            if not isinstance(error, ServerUnavailable):  # else it stopped while we watched
                raise error from None
        finally:
            watch.cancel()
