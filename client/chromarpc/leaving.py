"""Telling the server that its user left a generation.

A job with a request id waits for its caller to come back: the server cannot tell a call that was cancelled from a
connection that was cut. So who cancels says so, or the device would work on for nobody.
"""

from __future__ import annotations

from typing import Final

from chromarpc.v1 import generation_service_pb2, job_service_pb2

LEAVE_WAIT_S: Final = 2.0
"""How long leaving takes at most; a server that cannot be told ends the job by itself, only later."""


def must_be_told(request: generation_service_pb2.GenerateRequest) -> bool:
    """Whether the job would wait for its caller, rather than end with the call or go on for good."""
    policy = request.on_disconnect
    return request.HasField("request_id") and policy == generation_service_pb2.DISCONNECT_POLICY_UNSPECIFIED


def leave_request(request_id: str, job_id: str | None) -> job_service_pb2.CancelJobRequest:
    """What it is told. Others who hold on to the same job keep it."""
    if job_id is not None:
        return job_service_pb2.CancelJobRequest(job_id=job_id, when_unattended=True)
    return job_service_pb2.CancelJobRequest(request_id=request_id, when_unattended=True)
