"""Where the limits of uploads are enforced: of one file, of one chunk, and of all uploads together."""

from __future__ import annotations

from collections.abc import Collection

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.uploads.unfinished import UnfinishedUpload
from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import InvalidParameter, QuotaExceeded, QuotaViolation, UploadsFull
from chromarpc_server.domain.limits import UploadLimits


def require_file_size(limits: UploadLimits, size_bytes: int) -> None:
    """Checks the announced size of one file.

    Raises:
        InvalidParameter: it is out of range, or this server takes no uploads.
    """
    if not limits.max_file_bytes:
        raise InvalidParameter("this server takes no uploads", field="size_bytes")
    if not 0 < size_bytes <= limits.max_file_bytes:
        raise InvalidParameter(
            f"must be between 1 and {limits.max_file_bytes}, got {size_bytes}", field="size_bytes"
        )


def require_chunk_size(limits: UploadLimits, count: int) -> None:
    """Checks the number of bytes of one chunk.

    Raises:
        InvalidParameter: it is out of range.
    """
    if not 0 < count <= limits.max_chunk_bytes:
        raise InvalidParameter(f"must have 1 to {limits.max_chunk_bytes} bytes, got {count}", field="chunk")


def require_room(
    limits: UploadLimits,
    size_bytes: int,
    caller: Caller,
    *,
    unfinished: Collection[UnfinishedUpload],
    store: ContentStore,
    now: float,
    replaced_bytes: int = 0,
) -> None:
    """Checks that one more upload fits within what its caller may have, and within what the server takes.

    The caller's own limits come first, so that no caller can use up what all share.

    Args:
        limits: the server's.
        size_bytes: of the new upload.
        caller: whose it is.
        unfinished: all uploads under way, everybody's.
        store: the uploads that were kept.
        now: on the clock that uploads expire by, in seconds.
        replaced_bytes: of the caller's own upload that the new one takes the place of.

    Raises:
        QuotaExceeded: the caller has as many bytes of uploads as it may.
        UploadsFull: too many uploads are under way, or the server keeps no more bytes.
    """
    own = [upload for upload in unfinished if upload.owner == caller.name]
    _require_fewer(own, limits.max_open, "caller", "you have", now)
    _require_fewer(unfinished, limits.max_open_in_all, "server", "the server has", now)
    own_bytes = store.total_bytes(caller.name) - replaced_bytes + _announced_bytes(own)
    quota = caller.limits.max_upload_bytes
    if own_bytes + size_bytes > quota:
        raise QuotaExceeded.of(
            "caller",
            "max_upload_bytes",
            quota,
            f"{size_bytes} bytes more than the {own_bytes} of your uploads exceed the {quota} that you may have: "
            "delete some",
        )
    if store.total_bytes() - replaced_bytes + _announced_bytes(unfinished) + size_bytes > limits.max_total_bytes:
        message = f"{size_bytes} bytes more exceed the {limits.max_total_bytes} of uploads that this server keeps"
        total = QuotaViolation("server", "max_uploads_bytes", limits.max_total_bytes, message)
        raise UploadsFull(f"{message}: delete some", quota=total)


def _require_fewer(
    uploads: Collection[UnfinishedUpload], limit: int, subject: str, whose: str, now: float
) -> None:
    if len(uploads) >= limit:
        first_expiry = min(upload.expires_at for upload in uploads)
        message = f"{whose} {limit} uploads under way, as many as may be at once"
        raise UploadsFull(
            message,
            retry_after_s=max(1.0, min(30.0, first_expiry - now)),
            quota=QuotaViolation(subject, "max_open_uploads", limit, message),
        )


def _announced_bytes(uploads: Collection[UnfinishedUpload]) -> int:
    return sum(upload.size_bytes for upload in uploads)
