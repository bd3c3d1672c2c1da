"""Every error that a client can get, as one tree.

ChromaError
├── InvalidParameter        INVALID_PARAMETER    a field is out of range, missing, too large, not for Chroma
├── ModelNotFound           MODEL_NOT_FOUND      no model has this id
├── LoraError
│   ├── LoraNotFound        LORA_NOT_FOUND       no such adapter below the root (or outside it)
│   ├── LoraForbidden       LORA_FORBIDDEN       the adapter's host wants another token, or refuses
│   ├── LoraDownloadFailed  LORA_DOWNLOAD_FAILED the adapter's host cannot be reached, fails, or is too slow
│   ├── LoraInvalid         LORA_INVALID         not safetensors, truncated, hostile
│   ├── LoraIncompatible    LORA_INCOMPATIBLE    no key matches the model, or shapes differ
│   └── LoraContentChanged  LORA_CONTENT_CHANGED the file is another one than the request expects
├── UploadNotFound          UPLOAD_NOT_FOUND     no such upload, or it was dropped
├── UploadOutOfOrder        UPLOAD_OUT_OF_ORDER  the bytes do not go on where the upload is
├── UploadsFull             UPLOADS_FULL         the server keeps no more uploads
├── JobNotFound             JOB_NOT_FOUND        no such job of this caller, or it was forgotten
├── ImageNotFound           IMAGE_NOT_FOUND      the job has no such image, or not yet
├── JobNotEnded             JOB_NOT_ENDED        the job waits or runs
├── RequestIdReused         REQUEST_ID_REUSED    another request was made under this request id
├── StoreError
│   ├── StoreUnavailable    STORE_UNAVAILABLE    the job, or what came of it, cannot be stored
│   └── StoreDamaged        STORE_DAMAGED        the database itself is damaged
├── DiskFull                DISK_FULL            the disk has less room than it keeps in reserve
├── StoredDamage
│   ├── ImageDamaged        IMAGE_DAMAGED        a stored image is gone, or has other bytes
│   ├── JobDamaged          JOB_DAMAGED          what is stored of a job cannot be read
│   └── LoraDamaged         LORA_DAMAGED         a stored adapter has other bytes than its hash says
├── RestartError
│   ├── AttemptsExhausted   ATTEMPTS_EXHAUSTED   the server was stopped each time it ran the job
│   ├── LoraChanged         LORA_CHANGED         an adapter is not what it was before the restart
│   └── NotKept             NOT_KEPT             the server does not store what the job needs to run again
├── QueueTimeExceeded       QUEUE_TIME_EXCEEDED  the job waited longer than its request allows
├── WeightsMissing          WEIGHTS_MISSING      the model's files are not on this machine
├── WeightsInvalid          WEIGHTS_INVALID      they are, and cannot be used
├── Unauthenticated         UNAUTHENTICATED      no token or certificate that this server knows
├── QueueFull               QUEUE_FULL           the admission queue is at its bound
├── QuotaExceeded           QUOTA_EXCEEDED       the caller, or all together, have as much as they may
├── OutOfMemory             OUT_OF_MEMORY        the device ran out of memory in this job
├── Draining                DRAINING             the server is starting or stopping
├── JobCancelled            CANCELLED            by the caller, or because it went away
├── JobDeadlineExceeded     DEADLINE_EXCEEDED    the caller's deadline passed
├── DeviceError
│   ├── DeviceLost          DEVICE_LOST          the device cannot be used any more
│   └── DeviceHung          DEVICE_HUNG          the device does not answer
└── InternalError           INTERNAL             anything else; the error id is in the log too

Messages are written for the client: they hold no server path, no token and no traceback. What else there is to
know of each, its gRPC status and what to do about it, is in `error_table.py`; a test proves that table total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

MAX_LISTED = 20
"""How many keys or violations an error names; the rest is a count."""


@dataclass(frozen=True)
class QuotaViolation:
    """A quota that a request would exceed."""

    subject: str
    """Whose quota: `caller` or `server`."""
    quota: str
    """Its name, as the setting's: `max_streams`."""
    limit: int
    description: str
    """A sentence for people."""


@dataclass(frozen=True)
class FieldViolation:
    """One thing wrong with one field of a request."""

    field: str
    """Dotted path with list indices, as in the request's JSON: `prompts.0.width`."""
    description: str


def first_named(names: Sequence[str], limit: int = MAX_LISTED) -> str:
    """The first `limit` names joined by commas, and a count of the rest: `a, b and 3 more`."""
    listed = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{listed} and {rest} more" if rest > 0 else listed


class ChromaError(Exception):
    """Base of the tree.

    Attributes:
        reason: stable machine-readable name, `google.rpc.ErrorInfo.reason` on the wire.
        message: one or two sentences for the person who sent the request.
        violations: the fields at fault, when the request is.
        metadata: further facts for programs (`google.rpc.ErrorInfo.metadata`), small.
        retry_after_s: when trying again makes sense, in seconds; None when it does not.
        quota: the quota that the request would exceed, where that is what is wrong.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        quota: QuotaViolation | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        own = (FieldViolation(field, message),) if field is not None else ()
        self.violations: tuple[FieldViolation, ...] = own + tuple(violations)
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.quota = quota

    def at(self, field: str) -> Self:
        """The same error, blaming `field`: for layers that know the file but not the request."""
        self.violations = (FieldViolation(field, self.message), *self.violations)
        return self


class InvalidParameter(ChromaError):
    """A field is out of range, missing, too large, or cannot be honoured by Chroma."""

    reason = "INVALID_PARAMETER"


class ModelNotFound(ChromaError):
    """No model is served under this id; `metadata["models"]` names those that are."""

    reason = "MODEL_NOT_FOUND"


class LoraError(ChromaError):
    """An adapter cannot be used."""


class LoraNotFound(LoraError):
    """No such file below the adapter root; the same answer for a path that leaves the root."""

    reason = "LORA_NOT_FOUND"


class LoraForbidden(LoraError):
    """The host that a URL names gives the adapter to nobody, or not without a token, or not for this one."""

    reason = "LORA_FORBIDDEN"


class LoraDownloadFailed(LoraError):
    """The host that a URL names cannot be reached, breaks off, answers with an error, or is too slow."""

    reason = "LORA_DOWNLOAD_FAILED"


class LoraInvalid(LoraError):
    """The file is not safetensors, is truncated, or lies about its contents."""

    reason = "LORA_INVALID"


class LoraIncompatible(LoraError):
    """A well-formed file that does not fit this model: nothing matches, or shapes differ."""

    reason = "LORA_INCOMPATIBLE"


class LoraContentChanged(LoraError):
    """The adapter's file is another one than the request expects."""

    reason = "LORA_CONTENT_CHANGED"


class UploadNotFound(ChromaError):
    """No upload has this id; it may have been dropped because no bytes came for too long."""

    reason = "UPLOAD_NOT_FOUND"


class UploadOutOfOrder(ChromaError):
    """The bytes do not go on where the upload is; `metadata["expected_offset"]` says where that is."""

    reason = "UPLOAD_OUT_OF_ORDER"


class UploadsFull(ChromaError):
    """As many bytes, or as many unfinished uploads, as the server keeps."""

    reason = "UPLOADS_FULL"


class JobNotFound(ChromaError):
    """No such job of this caller, or it was forgotten."""

    reason = "JOB_NOT_FOUND"


class ImageNotFound(ChromaError):
    """The job has no such image, or not yet."""

    reason = "IMAGE_NOT_FOUND"


class JobNotEnded(ChromaError):
    """The job waits or runs."""

    reason = "JOB_NOT_ENDED"


class RequestIdReused(ChromaError):
    """Another request was made under this request id."""

    reason = "REQUEST_ID_REUSED"


class StoreError(ChromaError):
    """The store cannot do what was asked."""


class StoreUnavailable(StoreError):
    """The store cannot take the job, or what came of it: a full disk, or one that fails."""

    reason = "STORE_UNAVAILABLE"


class StoreDamaged(StoreError):
    """The database itself is damaged: asking again gives the same answer."""

    reason = "STORE_DAMAGED"


class DiskFull(ChromaError):
    """The server's disk has less room left than it keeps in reserve, so it takes nothing new."""

    reason = "DISK_FULL"


class StoredDamage(ChromaError):
    """What was stored is not there as it was stored: asking again gives the same answer."""


class ImageDamaged(StoredDamage):
    """An image's file is gone, cut short or unreadable, or holds other bytes than were stored."""

    reason = "IMAGE_DAMAGED"


class JobDamaged(StoredDamage):
    """What is stored of a job cannot be read."""

    reason = "JOB_DAMAGED"


class LoraDamaged(StoredDamage):
    """An uploaded or downloaded adapter's file no longer holds the bytes that its hash stands for."""

    reason = "LORA_DAMAGED"


class RestartError(ChromaError):
    """A job cannot be run as it was accepted: after a restart, or where it is to be drawn again."""


class AttemptsExhausted(RestartError):
    """The server was stopped, or died, each time it ran the job."""

    reason = "ATTEMPTS_EXHAUSTED"


class LoraChanged(RestartError):
    """An adapter has other bytes than when the job was admitted, or is gone: the image would be another one."""

    reason = "LORA_CHANGED"


class NotKept(RestartError):
    """The job needs something that the server does not store: a token, or its prompts."""

    reason = "NOT_KEPT"


class QueueTimeExceeded(ChromaError):
    """The job waited longer than its request allows."""

    reason = "QUEUE_TIME_EXCEEDED"


class WeightsMissing(ChromaError):
    """The model is known and its files are not here; the message gives the command that fetches them."""

    reason = "WEIGHTS_MISSING"


class WeightsInvalid(ChromaError):
    """The model's files are here and cannot be used: damaged, or of another architecture."""

    reason = "WEIGHTS_INVALID"


class Unauthenticated(ChromaError):
    """The call carries nothing that proves who makes it. Never says which part was wrong."""

    reason = "UNAUTHENTICATED"


class QuotaExceeded(ChromaError):
    """The caller, or all callers together, have as much of something as they may."""

    reason = "QUOTA_EXCEEDED"

    @classmethod
    def of(
        cls, subject: str, quota: str, limit: int, description: str, *, retry_after_s: float | None = None
    ) -> Self:
        """The error for one quota; `retry_after_s` None where waiting does not help."""
        return cls(
            description,
            metadata={"subject": subject, "quota": quota, "limit": str(limit)},
            retry_after_s=retry_after_s,
            quota=QuotaViolation(subject, quota, limit, description),
        )


class QueueFull(ChromaError):
    """The admission queue holds as many jobs as it may."""

    reason = "QUEUE_FULL"


class OutOfMemory(ChromaError):
    """The device had too little memory for this job; the server keeps serving."""

    reason = "OUT_OF_MEMORY"


class Draining(ChromaError):
    """The server takes no new work: it is starting or stopping."""

    reason = "DRAINING"


class JobCancelled(ChromaError):
    """The job was cancelled, or its caller went away."""

    reason = "CANCELLED"


class JobDeadlineExceeded(ChromaError):
    """The caller's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class DeviceError(ChromaError):
    """A device can compute nothing any more; without another one the process must be restarted."""


class DeviceHung(DeviceError):
    """The device, or the thread that owns it, does not answer."""

    reason = "DEVICE_HUNG"


class DeviceLost(DeviceError):
    """The device's context is poisoned, or the thread that owns it died."""

    reason = "DEVICE_LOST"


class InternalError(ChromaError):
    """Something unforeseen; `metadata["error_id"]` is in the server's log too."""

    reason = "INTERNAL"
