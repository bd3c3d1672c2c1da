"""The `google.rpc` details that a status carries beside its code and its message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "chromarpc"
"""`google.rpc.ErrorInfo.domain` of this service; a proxy's own reasons are not ours to interpret."""
_DETAILS_KEY: Final = "grpc-status-details-bin"


@dataclass(frozen=True)
class Details:
    """What the details say; what is not there is empty."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[tuple[str, str]] = ()
    """Fields, each with what is wrong with it."""
    retry_after_s: float | None = None


def read_details(trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> Details:
    """The details in a call's trailing metadata; those that cannot be read are left out."""
    info = error_details_pb2.ErrorInfo()
    violations: list[tuple[str, str]] = []
    retry_after_s: float | None = None
    for detail in _details(trailing_metadata):
        try:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                found = error_details_pb2.ErrorInfo.FromString(detail.value)
                info = found if found.domain == DOMAIN else info
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations += [
                    (violation.field, violation.description)
                    for violation in error_details_pb2.BadRequest.FromString(detail.value).field_violations
                ]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after_s = max(0.0, delay.seconds + delay.nanos / 1e9)
        except DecodeError:
            continue
    return Details(info.reason, dict(info.metadata), violations, retry_after_s)


def _details(trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> Sequence[any_pb2.Any]:
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return tuple(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return ()
    return ()
