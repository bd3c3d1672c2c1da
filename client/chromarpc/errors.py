"""Every error of a call, as one tree.

ChromarpcError
├── StatusError                  the call ended with an error status
│   ├── InvalidRequest           INVALID_ARGUMENT, OUT_OF_RANGE         `violations` name the fields
│   │   └── LoraInvalid          LORA_INVALID                           not safetensors, truncated, hostile
│   ├── NotFound                 NOT_FOUND
│   │   ├── ModelNotFound        MODEL_NOT_FOUND                        no model has this id
│   │   ├── LoraNotFound         LORA_NOT_FOUND                         no such adapter on the server
│   │   ├── UploadNotFound       UPLOAD_NOT_FOUND                       the upload was dropped
│   │   ├── JobNotFound          JOB_NOT_FOUND                          no such job of yours, or forgotten
│   │   └── ImageNotFound        IMAGE_NOT_FOUND                        the job has no such image, or not yet
│   ├── AlreadyExists            ALREADY_EXISTS
│   │   └── RequestIdReused      REQUEST_ID_REUSED                      `metadata["job_id"]` is the other's job
│   ├── FailedPrecondition       FAILED_PRECONDITION
│   │   ├── LoraIncompatible     LORA_INCOMPATIBLE                      the adapter does not fit the model
│   │   ├── LoraContentChanged   LORA_CONTENT_CHANGED                   it is another one than expected
│   │   ├── LoraForbidden        LORA_FORBIDDEN                         its host wants a token, or another one
│   │   ├── LoraDownloadFailed   LORA_DOWNLOAD_FAILED                   its host did not give it
│   │   ├── UploadOutOfOrder     UPLOAD_OUT_OF_ORDER                    the bytes do not go on where it is
│   │   ├── LoraChanged          LORA_CHANGED                           not the bytes that were admitted
│   │   ├── NotKept              NOT_KEPT                               lost in a restart: a token, prompts
│   │   ├── JobNotEnded          JOB_NOT_ENDED                          it waits or runs; cancel it first
│   │   ├── WeightsMissing       WEIGHTS_MISSING                        the server lacks the model's files
│   │   └── WeightsInvalid       WEIGHTS_INVALID                        it has them and cannot use them
│   ├── ResourceExhausted        RESOURCE_EXHAUSTED
│   │   ├── QueueFull            QUEUE_FULL                             `retry_after_s` says when to retry
│   │   ├── QuotaExceeded        QUOTA_EXCEEDED                         `metadata` names the quota and the limit
│   │   ├── UploadsFull          UPLOADS_FULL                           the server keeps no more uploads
│   │   ├── DiskFull             DISK_FULL                              the server's disk; delete what you can
│   │   └── OutOfMemory          OUT_OF_MEMORY                          trying the same again will not help
│   ├── ServerUnavailable        UNAVAILABLE                            nobody listens, or it broke off
│   │   ├── Draining             DRAINING                               the server is starting or stopping
│   │   └── StoreUnavailable     STORE_UNAVAILABLE                      its disk is full, or fails
│   ├── DeadlineExceeded         DEADLINE_EXCEEDED                      `timeout_s` passed
│   │   └── QueueTimeExceeded    QUEUE_TIME_EXCEEDED                    waited longer than the request allows
│   ├── Cancelled                CANCELLED                              by this side or by the server
│   ├── AccessDenied             UNAUTHENTICATED, PERMISSION_DENIED     no token, or not the right one
│   └── ServerError              INTERNAL, UNKNOWN and all other codes  an error id, if any, is in `metadata`
│       ├── AttemptsExhausted    ATTEMPTS_EXHAUSTED                     stopped each time it ran the job
│       ├── DeviceHung           DEVICE_HUNG                            its last device does not answer
│       ├── DeviceLost           DEVICE_LOST                            its last device is gone
│       └── DataLoss             DATA_LOSS                              what was stored is damaged
│           ├── ImageDamaged     IMAGE_DAMAGED                          `redraw_job` draws it again
│           ├── JobDamaged       JOB_DAMAGED                            this job's record cannot be read
│           ├── LoraDamaged      LORA_DAMAGED                           uploading the file again heals it
│           └── StoreDamaged     STORE_DAMAGED                          the operator has to repair the store
└── ProtocolError                the stream broke its contract: bytes missing or changed, no last event

A request that cannot even be sent (a width of 2**40) raises `InvalidRequest` too, before anything is sent.
`CODE_ERRORS` and `REASON_ERRORS` are the whole table; only this module turns wire errors into these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from chromarpc.error_details import DOMAIN as DOMAIN  # noqa: PLC0414 - callers find it here
from chromarpc.error_details import read_details


@dataclass(frozen=True)
class FieldViolation:
    """One thing wrong with one field of a request."""

    field: str
    """Dotted path with list indices: `prompts.0.width`; empty where it is about no single field."""
    description: str
    """A sentence for people."""


class ChromarpcError(Exception):
    """Anything this package raises for a call.

    Attributes:
        message: one or two sentences for people.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ProtocolError(ChromarpcError):
    """The server's stream broke its contract; what it sent so far is not to be trusted."""


class StatusError(ChromarpcError):
    """The call ended with an error status.

    Attributes:
        code: the gRPC status code.
        reason: stable name such as `LORA_NOT_FOUND`; empty where the status carries none.
        violations: the fields at fault, where the request is.
        metadata: further facts for programs.
        retry_after_s: when trying again makes sense, in seconds; None when the server gives no advice.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidRequest(StatusError):
    """A field is out of range, missing, too large, or cannot be honoured; `violations` name it."""


class LoraInvalid(InvalidRequest):
    """The adapter's file is not safetensors, is truncated, or lies about its contents."""


class NotFound(StatusError):
    """What the request names does not exist on the server."""


class ModelNotFound(NotFound):
    """No model is served under this id."""


class LoraNotFound(NotFound):
    """No such adapter below the server's adapter root."""


class UploadNotFound(NotFound):
    """The server knows no such upload; it may have dropped it because no bytes came for too long."""


class JobNotFound(NotFound):
    """The server knows no such job, or not of this caller, or it has forgotten it."""


class ImageNotFound(NotFound):
    """The job has no such image, or not yet."""


class AlreadyExists(StatusError):
    """What the request would make is there already."""


class RequestIdReused(AlreadyExists):
    """Another request was made under this request id; `metadata["job_id"]` is its job."""


class FailedPrecondition(StatusError):
    """The request is right and the server is in no state to serve it."""


class LoraIncompatible(FailedPrecondition):
    """The adapter is well formed and does not fit this model."""


class LoraContentChanged(FailedPrecondition):
    """The adapter is another one than the request expects; `metadata["sha256_now"]` says which it is."""


class UploadOutOfOrder(FailedPrecondition):
    """The bytes do not go on where the upload is; `metadata["expected_offset"]` says where that is."""


class LoraForbidden(FailedPrecondition):
    """The host that the adapter's URL names gives it to nobody, or not without a token, or not for this one."""


class LoraDownloadFailed(FailedPrecondition):
    """The host that the adapter's URL names cannot be reached, breaks off, fails, or is too slow."""


class LoraChanged(FailedPrecondition):
    """The adapter has other bytes than when the job was admitted, or is gone."""


class NotKept(FailedPrecondition):
    """After a restart the job needs what the server does not store: a token, or its prompts."""


class JobNotEnded(FailedPrecondition):
    """The job waits or runs; cancel it first."""


class WeightsMissing(FailedPrecondition):
    """The model's files are not on the server; the message gives the command that fetches them."""


class WeightsInvalid(FailedPrecondition):
    """The model's files are damaged, or of another architecture."""


class ResourceExhausted(StatusError):
    """The server has no room for this request now, or at all."""


class QueueFull(ResourceExhausted):
    """The server's queue is at its bound; try again after `retry_after_s`."""


class QuotaExceeded(ResourceExhausted):
    """The caller, or all callers together, have as much as they may; `metadata["quota"]` says of what."""


class UploadsFull(ResourceExhausted):
    """The server keeps no more uploads: delete some, or try again once unfinished ones are over."""


class DiskFull(ResourceExhausted):
    """The server's disk has no room for anything new; what it has can be read, and deleted."""


class OutOfMemory(ResourceExhausted):
    """The server's device had too little memory for this job."""


class ServerUnavailable(StatusError):
    """Nobody answers at the target, or the connection broke."""


class Draining(ServerUnavailable):
    """The server is starting or stopping and takes no work."""


class StoreUnavailable(ServerUnavailable):
    """The server answers, and cannot store the job or what came of it: its disk is full, or fails."""


class DeadlineExceeded(StatusError):
    """`timeout_s` passed; the server has stopped the job."""


class QueueTimeExceeded(DeadlineExceeded):
    """The job waited in the queue longer than its request allows."""


class Cancelled(StatusError):
    """The call was cancelled, by this side or by the server."""


class AccessDenied(StatusError):
    """The server wants a token, or another one."""


class ServerError(StatusError):
    """The server, or something between, failed in a way it did not foresee."""


class AttemptsExhausted(ServerError):
    """The server was stopped, or died, each time it ran the job."""


class DeviceHung(ServerError):
    """The job's device does not answer, and the server has no other one for it."""


class DeviceLost(ServerError):
    """The job's device cannot be used any more, and the server has no other one for it."""


class DataLoss(ServerError):
    """What the server stored is not there as it was stored; asking again does not help."""


class ImageDamaged(DataLoss):
    """A stored image is gone or damaged: `redraw_job` draws it again."""


class JobDamaged(DataLoss):
    """What is stored of the job cannot be read."""


class LoraDamaged(DataLoss):
    """A stored adapter is damaged: uploading the same file again heals it."""


class StoreDamaged(DataLoss):
    """The server's database is damaged; its operator has to repair it."""


CODE_ERRORS: Final[Mapping[grpc.StatusCode, type[StatusError]]] = {
    grpc.StatusCode.OK: ServerError,  # an error that claims to be none
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}
"""What each status code becomes."""

REASON_ERRORS: Final[Mapping[str, type[StatusError]]] = {
    "INVALID_PARAMETER": InvalidRequest,
    "LORA_INVALID": LoraInvalid,
    "MODEL_NOT_FOUND": ModelNotFound,
    "LORA_NOT_FOUND": LoraNotFound,
    "UPLOAD_NOT_FOUND": UploadNotFound,
    "JOB_NOT_FOUND": JobNotFound,
    "IMAGE_NOT_FOUND": ImageNotFound,
    "REQUEST_ID_REUSED": RequestIdReused,
    "LORA_INCOMPATIBLE": LoraIncompatible,
    "LORA_CONTENT_CHANGED": LoraContentChanged,
    "LORA_FORBIDDEN": LoraForbidden,
    "LORA_DOWNLOAD_FAILED": LoraDownloadFailed,
    "LORA_CHANGED": LoraChanged,
    "UPLOAD_OUT_OF_ORDER": UploadOutOfOrder,
    "NOT_KEPT": NotKept,
    "JOB_NOT_ENDED": JobNotEnded,
    "WEIGHTS_MISSING": WeightsMissing,
    "WEIGHTS_INVALID": WeightsInvalid,
    "UPLOADS_FULL": UploadsFull,
    "QUEUE_FULL": QueueFull,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "OUT_OF_MEMORY": OutOfMemory,
    "DISK_FULL": DiskFull,
    "DRAINING": Draining,
    "STORE_UNAVAILABLE": StoreUnavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "QUEUE_TIME_EXCEEDED": QueueTimeExceeded,
    "CANCELLED": Cancelled,
    "UNAUTHENTICATED": AccessDenied,
    "ATTEMPTS_EXHAUSTED": AttemptsExhausted,
    "DEVICE_HUNG": DeviceHung,
    "DEVICE_LOST": DeviceLost,
    "IMAGE_DAMAGED": ImageDamaged,
    "JOB_DAMAGED": JobDamaged,
    "LORA_DAMAGED": LoraDamaged,
    "STORE_DAMAGED": StoreDamaged,
    "INTERNAL": ServerError,
}
"""What a reason narrows it to, where the status code agrees: all that the server gives."""

_PLAIN_WORDS: Final[Mapping[str, str]] = {
    "Deadline Exceeded": "the time limit passed before the server was done",
    "Locally cancelled by application!": "cancelled by this side",
}
"""What grpc's own words mean, in whatever sentence it puts them, where this side ended the call."""
_CODES_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


def error_type(code: grpc.StatusCode, reason: str) -> type[StatusError]:
    """The class for a status; the code rules, the reason refines."""
    by_code = CODE_ERRORS[code]
    by_reason = REASON_ERRORS.get(reason, by_code)
    return by_reason if issubclass(by_reason, by_code) else by_code


def status_code(number: int) -> grpc.StatusCode:
    """The code of a number; UNKNOWN for one that does not exist."""
    return _CODES_BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def invalid_request(path: str, description: str) -> InvalidRequest:
    """A request that cannot be sent, blaming one field."""
    return InvalidRequest(
        f"{path}: {description}" if path else description,
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_PARAMETER",
        violations=(FieldViolation(path, description),),
    )


def from_status(
    code: grpc.StatusCode | None,
    message: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    *,
    target: str,
) -> StatusError:
    """The error of a call's status and of the `google.rpc` details beside it.

    Details that cannot be read are left out: an error must never hide behind a decoding error.
    `target` is named where the server could not be reached.
    """
    code = code or grpc.StatusCode.UNKNOWN
    message = next((plain for words, plain in _PLAIN_WORDS.items() if words in (message or "")), message or "")
    details = read_details(trailing_metadata)
    kind = error_type(code, details.reason)
    if kind is ServerUnavailable and not details.reason:  # with a reason, it was reached
        message = f"cannot reach {target}: {message or 'no reason given'}"
    return kind(
        message or f"the call ended with {code.name}",
        code=code,
        reason=details.reason,
        violations=[FieldViolation(field, description) for field, description in details.violations],
        metadata=details.metadata,
        retry_after_s=details.retry_after_s,
    )
