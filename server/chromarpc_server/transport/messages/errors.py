"""Errors as the wire has them: a call's status with `google.rpc` details, and a job's `Failed`.

The one translation to gRPC; the codes are those of `domain/error_table.py`, which `http_errors.py` reads for the
reference's HTTP API. Handlers raise errors, and the interceptor ends their calls; `Check` of health, whose answer
to an unknown service is gRPC's own, ends its call itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from chromarpc.v1 import job_event_pb2
from chromarpc_server.domain.error_table import BY_REASON, ENTRIES
from chromarpc_server.domain.errors import MAX_LISTED, ChromaError, FieldViolation
from chromarpc_server.transport.messages.values import MAX_TEXT, duration, shorten

DOMAIN = "chromarpc"
DETAILS_KEY = "grpc-status-details-bin"
MAX_DETAILS_BYTES = 4096
"""Clients answer large trailing metadata with RESOURCE_EXHAUSTED; 12 KB of it is known to be too much."""
MAX_MESSAGE_BYTES = 1000
"""Of a status's message, as gRPC writes it: percent-encoded."""
MIN_TEXT = 20
"""Texts are not cut below about half of so many characters."""

CODES: Mapping[type[ChromaError], grpc.StatusCode] = {
    entry.kind: grpc.StatusCode[entry.status] for entry in ENTRIES
}


def code_of(error: ChromaError) -> grpc.StatusCode:
    """The gRPC status code of an error, by its reason: finer kinds of an error have that of the error."""
    return CODES[BY_REASON[error.reason].kind]


def _code_number(error: ChromaError) -> int:
    number: int = code_of(error).value[0]
    return number


def status_message(error: ChromaError) -> str:
    """The error's message, cut so that it fits into a call's trailers in any script."""
    text, room = error.message, MAX_MESSAGE_BYTES
    for index, character in enumerate(text):
        room -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode(errors="replace"))
        if room < 0:
            return text[:index].rstrip() + "…"
    return text


def _listed(violations: tuple[FieldViolation, ...]) -> list[FieldViolation]:
    """The first violations, and one that counts the rest."""
    shown = [FieldViolation(shorten(v.field, 100), shorten(v.description)) for v in violations[:MAX_LISTED]]
    rest = len(violations) - len(shown)
    return [*shown, FieldViolation("", f"and {rest} more")] if rest > 0 else shown


def rich_status(error: ChromaError) -> status_pb2.Status:
    """The error as `google.rpc.Status`: ErrorInfo always; BadRequest, QuotaFailure, RetryInfo where they apply.

    To stay under `MAX_DETAILS_BYTES`, violations are dropped from the end, and then texts are cut, as far as
    `MIN_TEXT` allows.
    """
    violations, limit = _listed(error.violations), MAX_TEXT
    while True:
        status = _status(error, violations, limit)
        if status.ByteSize() <= MAX_DETAILS_BYTES or limit <= MIN_TEXT:
            return status
        if len(violations) > 1:
            violations = violations[: len(violations) // 2]
        else:
            limit //= 2
            violations = [FieldViolation(v.field, shorten(v.description, limit)) for v in violations]


def _status(error: ChromaError, violations: list[FieldViolation], limit: int) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: shorten(value, limit) for key, value in error.metadata.items()},
    )
    details: list[Message] = [info]
    if violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in violations
                ]
            )
        )
    if error.quota is not None:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.quota.subject,
            description=f"{error.quota.quota}={error.quota.limit}: {shorten(error.quota.description, limit)}",
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=_code_number(error), message=status_message(error), details=packed)


def trailing_metadata(error: ChromaError) -> tuple[tuple[str, bytes], ...]:
    """What carries the details beside the status."""
    return ((DETAILS_KEY, rich_status(error).SerializeToString()),)


def failed_message(error: ChromaError) -> job_event_pb2.Failed:
    """Why a job failed, as its last event and its description say."""
    message = job_event_pb2.Failed(
        code=_code_number(error),
        reason=error.reason,
        message=shorten(error.message, 1000),
        violations=[
            job_event_pb2.FieldViolation(field=violation.field, description=violation.description)
            for violation in _listed(error.violations)
        ],
        metadata={key: shorten(value) for key, value in error.metadata.items()},
    )
    if error.retry_after_s is not None:
        message.retry_after.CopyFrom(duration(error.retry_after_s))
    return message
