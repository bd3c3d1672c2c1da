"""The one table of errors: each reason's number, statuses, whether to try again, and what to do about it.

The transport takes status codes from it. `tools/code_tables.py` writes the enum `ErrorReason` of the contract and
the tables of the documentation from it; tests hold both clients' trees against it. To add an error: add a class to
`errors.py`, an entry with the next free number here, run `make protos`, and give the clients a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from chromarpc_server.domain import errors
from chromarpc_server.domain.errors import ChromaError


class Retry(StrEnum):
    """Whether the same request, sent again, may succeed."""

    NO = "no"
    """Not before something is changed."""
    IF_ADVISED = "with `RetryInfo`"
    """Where the error says when."""
    YES = "yes"
    """After a while, which the error names where the server knows it."""


@dataclass(frozen=True)
class ErrorEntry:
    """What there is to know of one reason."""

    number: int
    """In the enum `ErrorReason`; never changed, never used again."""
    kind: type[ChromaError]
    """The class, which holds the reason's name."""
    status: str
    """Name of the gRPC status code."""
    http_status: int
    """Of the HTTP API."""
    retry: Retry
    when: str
    """Sentences for people."""
    caller: str = ""
    """What the caller does about it; empty where there is nothing to do."""
    operator: str = ""
    """What the server's operator does about it; empty where it is none of theirs."""
    more: str = ""
    """Page and heading below docs/ that explain the subject; empty where the table is enough."""

    @property
    def reason(self) -> str:
        """Its name on the wire."""
        return self.kind.reason


# fmt: off
ENTRIES: Final[tuple[ErrorEntry, ...]] = (
    ErrorEntry(
        1, errors.InvalidParameter, "INVALID_ARGUMENT", 422, Retry.NO,
        when="A field is missing, out of range, too large, or an option that Chroma does not have.",
        caller="Correct the fields that the violations name.",
        operator="Raise the limit, where it is one.",
        more="api.md#request",
    ),
    ErrorEntry(
        2, errors.ModelNotFound, "NOT_FOUND", 400, Retry.NO,
        when="No model has this id. The metadata's `models` names those that are served.",
        caller="Name one of those.",
        operator="Add `--alias` where another model should serve it.",
    ),
    ErrorEntry(
        3, errors.LoraNotFound, "NOT_FOUND", 400, Retry.IF_ADVISED,
        when="No such adapter below the root; the same for a path that leaves it. With `RetryInfo` while files "
        "are still being hashed.",
        caller="Look at `ListLoras`, or upload the file. With `RetryInfo`, ask again, or name it by its path.",
        operator="Put the file below `--lora-root`.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        4, errors.LoraForbidden, "FAILED_PRECONDITION", 400, Retry.NO,
        when="The URL's host wants a token, or another one, or gives the adapter to nobody.",
        caller="Send an `hf_token` that may read the file.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        5, errors.LoraDownloadFailed, "FAILED_PRECONDITION", 400, Retry.YES,
        when="The URL's host cannot be reached, breaks off, fails or is too slow.",
        caller="Try again later; `RetryInfo` says when, where the host does.",
        operator="Check the way out to the host, and `--download-timeout-s`.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        6, errors.LoraInvalid, "INVALID_ARGUMENT", 400, Retry.NO,
        when="The adapter's file is not safetensors, is truncated, lies about its contents, or holds values that "
        "are not finite.",
        caller="Export the file again.",
    ),
    ErrorEntry(
        7, errors.LoraIncompatible, "FAILED_PRECONDITION", 400, Retry.NO,
        when="No key of the adapter matches the model, or shapes differ; the message names them.",
        caller="Use an adapter for this model; `InspectLora` says which keys match.",
        more="numerics.md#adapter-formats",
    ),
    ErrorEntry(
        8, errors.LoraContentChanged, "FAILED_PRECONDITION", 400, Retry.NO,
        when="The adapter is another one than `expected_sha256` says; the metadata names both.",
        caller="Name the adapter that was meant by its hash, or leave `expected_sha256` out, which gives another "
        "image.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        9, errors.UploadNotFound, "NOT_FOUND", 404, Retry.NO,
        when="There is no such upload, or it was dropped because no bytes came for too long.",
        caller="Begin the upload again.",
        operator="Raise `--upload-expiry-s` if callers are slow.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        10, errors.UploadOutOfOrder, "FAILED_PRECONDITION", 400, Retry.NO,
        when="The bytes do not continue the upload. The metadata's `expected_offset` says where it continues.",
        caller="Continue at `expected_offset`.",
        more="api.md#adapters",
    ),
    ErrorEntry(
        11, errors.UploadsFull, "RESOURCE_EXHAUSTED", 429, Retry.IF_ADVISED,
        when="The server has as many bytes of uploads, or as many unfinished uploads, as it keeps.",
        caller="Delete uploads, or wait.",
        operator="Raise `--max-uploads-bytes`.",
        more="operations.md#how-much",
    ),
    ErrorEntry(
        12, errors.JobNotFound, "NOT_FOUND", 404, Retry.NO,
        when="This caller has no such job, or the server has forgotten it.",
        caller="Check the id and the token; send the request again where the job is forgotten.",
        operator="Raise `--job-keep-s` and `--job-keep-bytes`.",
        more="api.md#jobs",
    ),
    ErrorEntry(
        13, errors.ImageNotFound, "NOT_FOUND", 404, Retry.NO,
        when="The job has no such image, or not yet.",
        caller="Wait for `image_header`, or ask for another index.",
    ),
    ErrorEntry(
        14, errors.JobNotEnded, "FAILED_PRECONDITION", 400, Retry.NO,
        when="The job waits or runs.",
        caller="Wait for the job's end, or cancel it first.",
    ),
    ErrorEntry(
        15, errors.RequestIdReused, "ALREADY_EXISTS", 409, Retry.NO,
        when="Another request was sent under this `request_id`; the metadata's `job_id` names its job.",
        caller="Use a new UUID for a new request.",
        more="api.md#jobs",
    ),
    ErrorEntry(
        16, errors.StoreUnavailable, "UNAVAILABLE", 503, Retry.YES,
        when="The job, or what came of it, cannot be stored: the disk is full, or fails.",
        caller="Try again after `RetryInfo`, under the same `request_id`.",
        operator="Free space on the disk of `--data-dir`; look for `store.failed` in the log.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        17, errors.AttemptsExhausted, "INTERNAL", 500, Retry.NO,
        when="Each time the job ran, the server was stopped or died, or the device was lost.",
        caller="Send the request again once the operator has looked.",
        operator="Look at what ended the server or its devices, which may be this job; `--job-attempts`.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        18, errors.LoraChanged, "FAILED_PRECONDITION", 400, Retry.YES,
        when="An adapter is not what it was when the job was admitted, or is gone.",
        caller="Send the request again: the image will be another one.",
        operator="Leave the adapters of waiting jobs as they are.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        19, errors.NotKept, "FAILED_PRECONDITION", 400, Retry.YES,
        when="After a restart, or to be drawn again, the job needs what is not stored: a token, or its prompts.",
        caller="Send the request again, with its token.",
        operator="Set `--store-prompts`; tokens are never stored.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        20, errors.QueueTimeExceeded, "DEADLINE_EXCEEDED", 504, Retry.YES,
        when="The job waited longer than its `max_queue_time`.",
        caller="Try again, or allow more time.",
        operator="Add replicas.",
        more="api.md#jobs",
    ),
    ErrorEntry(
        21, errors.WeightsMissing, "FAILED_PRECONDITION", 400, Retry.NO,
        when="Parts of the model are not on the server; the message names them and the command that fetches them.",
        operator="Run the command in the message; `chromarpc-server models` lists what is missing.",
    ),
    ErrorEntry(
        22, errors.WeightsInvalid, "FAILED_PRECONDITION", 400, Retry.NO,
        when="The model's files are damaged, or of another architecture.",
        operator="Fetch the weights again; `chromarpc-server models` says what is wrong with which part.",
    ),
    ErrorEntry(
        23, errors.Unauthenticated, "UNAUTHENTICATED", 401, Retry.NO,
        when="The call has no token or certificate that the server knows; it never says what was wrong.",
        caller="Send the right token.",
        operator="Check the callers file, and look for `callers.not_reloaded` in the log.",
        more="operations.md#who-may-call",
    ),
    ErrorEntry(
        24, errors.QuotaExceeded, "RESOURCE_EXHAUSTED", 429, Retry.IF_ADVISED,
        when="The caller, or all callers together, have as much as they may. The metadata's `quota`, `limit` and "
        "`subject` (`caller`, `server`) say of what.",
        caller="Have less of it at once; `RetryInfo` where waiting helps.",
        operator="Raise it for this caller in the callers file.",
        more="operations.md#how-much",
    ),
    ErrorEntry(
        25, errors.QueueFull, "RESOURCE_EXHAUSTED", 429, Retry.YES,
        when="The queue holds as many jobs as it may; with `QuotaFailure` and `RetryInfo`.",
        caller="Wait for as long as `RetryInfo` says.",
        operator="Add replicas, or raise `limits.max_queued_jobs`.",
        more="operations.md#how-much",
    ),
    ErrorEntry(
        26, errors.OutOfMemory, "RESOURCE_EXHAUSTED", 429, Retry.NO,
        when="The device had too little memory for this job; without `RetryInfo`. The server keeps serving.",
        caller="Ask for smaller images.",
        operator="Set `--device-memory`, `--tiling on`, `--weights float8`.",
        more="operations.md#sizing",
    ),
    ErrorEntry(
        27, errors.Draining, "UNAVAILABLE", 503, Retry.YES,
        when="The server is starting or stopping; with `RetryInfo`.",
        caller="Try again after `RetryInfo`, on another server at once.",
    ),
    ErrorEntry(
        28, errors.JobCancelled, "CANCELLED", 500, Retry.NO,
        when="The caller cancelled the job, or went away. The device is free within one step.",
        more="api.md#jobs",
    ),
    ErrorEntry(
        29, errors.JobDeadlineExceeded, "DEADLINE_EXCEEDED", 504, Retry.NO,
        when="The call's deadline passed. The device is free within one step.",
        caller="Allow more time, or detach the job.",
        operator="Look at the times of queue and steps.",
    ),
    ErrorEntry(
        30, errors.DeviceLost, "INTERNAL", 500, Retry.YES,
        when="The job's device cannot be used any more, and no other one is left for it (else the job goes on "
        "there: `restarted`). Without any device, health turns NOT_SERVING, and the process exits with 70.",
        caller="Come back after the restart: the job is kept and run again.",
        operator="Let the supervisor restart on exit code 70; look at the GPU's own log.",
        more="operations.md#faults",
    ),
    ErrorEntry(
        31, errors.DeviceHung, "INTERNAL", 500, Retry.YES,
        when="The job's device does not answer, and no other one is left for it (else the job goes on there: "
        "`restarted`). Without any device, health turns NOT_SERVING, and the process exits with 70.",
        caller="Come back after the restart: the job is kept and run again.",
        operator="Find every thread's stack in standard error; raise `--step-timeout-s` and `--load-timeout-s` "
        "where work is only slow.",
        more="operations.md#faults",
    ),
    ErrorEntry(
        32, errors.InternalError, "INTERNAL", 500, Retry.NO,
        when="Something went wrong that nobody foresaw; the metadata's `error_id` is in the server's log too.",
        caller="Report the `error_id`.",
        operator="Look the `error_id` up in the log.",
    ),
    ErrorEntry(
        33, errors.ImageDamaged, "DATA_LOSS", 500, Retry.NO,
        when="The stored image is gone, or holds other bytes than were stored; it is not sent.",
        caller="Call `RedrawJob`: plan, seeds and adapters are kept, so the image is the same, and it heals this "
        "one.",
        operator="Look for `store.image_damaged` in the log; run `chromarpc-server store check`; change the disk.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        34, errors.JobDamaged, "DATA_LOSS", 500, Retry.NO,
        when="What is stored of this job cannot be read; other jobs are not concerned.",
        caller="Send the request again under a new `request_id`.",
        operator="Look for `store.row_unreadable` in the log; run `chromarpc-server store check`.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        35, errors.LoraDamaged, "DATA_LOSS", 500, Retry.NO,
        when="The stored adapter no longer holds the bytes that its hash stands for; nothing is drawn with it.",
        caller="Upload the same file again, which heals it.",
        operator="Look for `adapter.damaged` in the log; run `chromarpc-server store check`; replace the disk.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        36, errors.StoreDamaged, "DATA_LOSS", 500, Retry.NO,
        when="The server's database is damaged where it had to be read; asking again does not help.",
        caller="Report it to the operator.",
        operator="Stop the server and run `chromarpc-server store repair`, or restore a backup.",
        more="operations.md#the-job-store",
    ),
    ErrorEntry(
        37, errors.DiskFull, "RESOURCE_EXHAUSTED", 429, Retry.YES,
        when="The server's disk has less room left than it keeps in reserve: it takes no new jobs and no uploads. "
        "What it has can be read, and deleted.",
        caller="Delete jobs and uploads that you need no longer, or try again after `RetryInfo`.",
        operator="Free space on the disk of `--data-dir`; lower `--job-keep-s` or `--job-keep-bytes`.",
        more="operations.md#the-job-store",
    ),
)
"""Every error, by number."""
# fmt: on

BY_KIND: Final[Mapping[type[ChromaError], ErrorEntry]] = {entry.kind: entry for entry in ENTRIES}
BY_REASON: Final[Mapping[str, ErrorEntry]] = {entry.reason: entry for entry in ENTRIES}


class HttpErrorCode(StrEnum):
    """Codes that only HTTP answers have, beside the reasons: the reference's own, and the gateway's."""

    http_status: int
    source: str
    """Who answers it: `server` or `gateway`."""
    when: str
    caller: str
    """What the caller does about it."""

    def __new__(cls, code: str, http_status: int, source: str, when: str, caller: str) -> Self:
        """A code and what there is to know of it."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.http_status = http_status
        member.source = source
        member.when = when
        member.caller = caller
        return member

    # fmt: off
    MOE_FORMAT_NOT_SUPPORTED = (
        "MOE_FORMAT_NOT_SUPPORTED", 400, "server",
        "An adapter is for one of two transformers (`loras[].transformer`); Chroma has one.",
        "Use an adapter for Chroma.",
    )
    REQUEST_NOT_FOUND = (
        "REQUEST_NOT_FOUND", 404, "server",
        "There is no such request of this caller, or no such image of it yet.",
        "Check the id and the token.",
    )
    UNSUPPORTED_MEDIA_TYPE = (
        "UNSUPPORTED_MEDIA_TYPE", 415, "server, gateway",
        "The body is not JSON, or a call is of a protocol that is not spoken here.",
        "Send `content-type: application/json`, or a protocol that `details.accepted` names.",
    )
    PERMISSION_DENIED = (
        "PERMISSION_DENIED", 403, "gateway",
        "Something between the gateway and the server does not let the call through.",
        "Ask the operator.",
    )
    ORIGIN_NOT_ALLOWED = (
        "ORIGIN_NOT_ALLOWED", 403, "gateway",
        "The page that calls is of another origin.",
        "Ask the operator for `--web-origin`.",
    )
    NOT_FOUND = (
        "NOT_FOUND", 404, "gateway",
        "There is nothing at this path.",
        "Look at `/openapi.json`.",
    )
    METHOD_NOT_ALLOWED = (
        "METHOD_NOT_ALLOWED", 405, "gateway",
        "The path has no such method; the header `allow` names those that it has.",
        "Use one of those.",
    )
    BODY_TOO_LARGE = (
        "BODY_TOO_LARGE", 413, "gateway",
        "The body is larger than 1 MiB.",
        "Send a smaller one.",
    )
    HOST_NOT_SERVED = (
        "HOST_NOT_SERVED", 421, "gateway",
        "The gateway is not reached by this host name.",
        "Ask the operator for `--web-name`.",
    )
    RESOURCE_EXHAUSTED = (
        "RESOURCE_EXHAUSTED", 429, "gateway",
        "The caller has as many calls in progress as it may, or what it sends is too large.",
        "Try again once others have ended, or send less.",
    )
    UNAVAILABLE = (
        "UNAVAILABLE", 503, "gateway",
        "The server is starting, stopping or down.",
        "Try again soon.",
    )
    # fmt: on
