"""The uploads under way: begun, continued chunk by chunk, kept when they are whole, dropped when they expire."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from chromarpc_server.adapters.content_store import ContentStore, entries_of
from chromarpc_server.adapters.names import display_name, require_hash
from chromarpc_server.adapters.stored_lora import StoredLora
from chromarpc_server.adapters.uploads.limits import require_chunk_size, require_file_size, require_room
from chromarpc_server.adapters.uploads.unfinished import UnfinishedUpload, room_on_disk
from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.errors import LoraNotFound, UploadNotFound
from chromarpc_server.domain.limits import UploadLimits

log = logging.getLogger(__name__)

PART_SUFFIX = ".part"


@dataclass(frozen=True)
class UploadState:
    """How far an upload is."""

    upload_id: str = field(repr=False)
    next_offset: int
    """Bytes received; where the next chunk begins."""
    expires: datetime
    """When it is dropped, unless more bytes come."""


@dataclass(frozen=True)
class _Finished:
    """An upload that was kept, remembered so that its end can be asked for again."""

    owner: str
    sha256: str
    expires_at: float
    """Seconds since the epoch, when it is forgotten."""


class UploadRegistry:
    """Uploads by their ids. Each belongs to one caller, and to others does not exist.

    Touches the disk: call it from a thread; any thread will do.
    """

    def __init__(
        self,
        store: ContentStore,
        folder: Path,
        limits: UploadLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no file; `drop_expired` and the first upload do.

        Args:
            store: keeps the files of uploads that are whole.
            folder: for the files of unfinished uploads, on the same file system; is made with the first upload.
            limits: of uploads.
            clock: seconds since the epoch.
        """
        self._store = store
        self._folder = folder
        self._limits = limits or UploadLimits()
        self._clock = clock
        self._lock = threading.Lock()
        """Held while `_unfinished` or `_finished` is changed."""
        self._unfinished: dict[str, UnfinishedUpload] = {}
        self._finished: dict[str, _Finished] = {}

    @property
    def store(self) -> ContentStore:
        """The uploads that were kept."""
        return self._store

    @property
    def limits(self) -> UploadLimits:
        """What uploads may take."""
        return self._limits

    def create(
        self, filename: str, size_bytes: int, sha256: str | None = None, caller: Caller = NOBODY
    ) -> UploadState:
        """Begins an upload.

        Args:
            filename: what people call it.
            size_bytes: of the whole file.
            sha256: its hash, where the sender knows it; a file with another one is not kept.
            caller: whose it is.

        Raises:
            InvalidParameter: too large, or not a hash.
            QuotaExceeded: the caller has as many bytes of uploads as it may.
            UploadsFull: too many uploads are under way, the server keeps no more bytes, or its disk is full.
        """
        require_file_size(self._limits, size_bytes)
        announced = None if sha256 is None else require_hash(sha256, "sha256")
        upload_id = secrets.token_urlsafe(24)
        now = self._clock()
        with self._lock:
            self._drop_expired()
            unfinished = self._unfinished.values()
            require_room(self._limits, size_bytes, caller, unfinished=unfinished, store=self._store, now=now)
            self._make_folders()
            upload = UnfinishedUpload(
                path=self._folder / f"{secrets.token_hex(16)}{PART_SUFFIX}",
                owner=caller.name,
                filename=display_name(filename),
                size_bytes=size_bytes,
                announced_sha256=announced,
                expires_at=now + self._limits.expiry_s,
            )
            upload.create_file()
            self._unfinished[upload_id] = upload
        return _state(upload_id, upload)

    def append(self, upload_id: str, offset: int, chunk: bytes, owner: str = NOBODY.name) -> UploadState:
        """Takes the next bytes of an upload, or the same ones again, and puts off its expiry.

        Args:
            upload_id: as `create` gave it.
            offset: of the chunk's first byte in the whole file.
            chunk: 1 to `limits.max_chunk_bytes` bytes.
            owner: who sends them.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
            UploadOutOfOrder: the bytes neither go on where the upload is nor repeat what it has.
            InvalidParameter: no bytes, too many at once, or more than was announced.
            UploadsFull: the disk is full.
        """
        require_chunk_size(self._limits, len(chunk))
        with self._opened(upload_id, owner) as upload:
            upload.append(offset, chunk)
            upload.expires_at = self._clock() + self._limits.expiry_s
            return _state(upload_id, upload)

    def finalize(self, upload_id: str, sha256: str, owner: str = NOBODY.name) -> StoredLora:
        """Ends an upload and keeps its file; asked again, gives the same answer.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
            UploadOutOfOrder: bytes are missing.
            InvalidParameter: not a hash.
            LoraInvalid: another hash, or not an adapter file; the upload is dropped.
            LoraNotFound: the adapter was deleted since.
            UploadsFull: the disk is full; the upload is dropped.
        """
        wanted = require_hash(sha256, "sha256")
        try:
            self._keep(upload_id, wanted, owner)
        except UploadNotFound:
            with self._lock:
                finished = self._finished.get(upload_id)
            if finished is None or (finished.owner, finished.sha256) != (owner, wanted):
                raise
        found = self._store.find(wanted, owner)
        if found is None:
            raise LoraNotFound("the adapter was deleted after it was uploaded", field="upload_id")
        return found

    def drop_expired(self) -> None:
        """Drops the uploads that had no bytes for `limits.expiry_s`, of this process and of earlier ones."""
        with self._lock:
            self._drop_expired()

    def _keep(self, upload_id: str, sha256: str, owner: str) -> None:
        """Moves a whole upload's file to the store; drops the upload also where that fails."""
        with self._opened(upload_id, owner) as upload:
            upload.require_all_bytes()
            try:
                upload.require_adapter(sha256)
                with room_on_disk():
                    upload.sync()
                    self._store.add(upload.path, sha256, upload.size_bytes, upload.owner, upload.filename)
                with self._lock:
                    expires_at = self._clock() + self._limits.expiry_s
                    self._finished[upload_id] = _Finished(owner, sha256, expires_at)
            finally:
                upload.drop()
                with self._lock:
                    self._unfinished.pop(upload_id, None)
        log.info("adapter.uploaded", extra={"sha256": sha256, "size_bytes": upload.size_bytes})

    @contextmanager
    def _opened(self, upload_id: str, owner: str) -> Iterator[UnfinishedUpload]:
        """The owner's upload, which no other thread touches meanwhile.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
        """
        missing = UploadNotFound(
            "no such upload: it was dropped, or never begun; begin it anew", field="upload_id"
        )
        with self._lock:
            upload = self._unfinished.get(upload_id)
        if upload is None or upload.owner != owner:
            raise missing
        with upload.lock:
            if upload.is_dropped or upload.expires_at <= self._clock():
                raise missing
            yield upload

    def _drop_expired(self) -> None:
        """Drops what has expired, and deletes old files of uploads that are not known; the lock must be held."""
        now = self._clock()
        for upload_id, upload in list(self._unfinished.items()):
            if upload.expires_at <= now and upload.lock.acquire(blocking=False):
                try:
                    upload.drop()
                finally:
                    upload.lock.release()
                del self._unfinished[upload_id]
        self._finished = {key: value for key, value in self._finished.items() if value.expires_at > now}
        known = {upload.path.name for upload in self._unfinished.values()}
        for entry in entries_of(self._folder):
            # Another server's uploads may lie here too: their files are as old as their last chunk.
            with suppress(OSError):
                last_chunk_at = entry.stat(follow_symlinks=False).st_mtime
                if entry.name not in known and last_chunk_at <= now - self._limits.expiry_s:
                    Path(entry.path).unlink()

    def _make_folders(self) -> None:
        with room_on_disk():
            self._store.make_folder()
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _state(upload_id: str, upload: UnfinishedUpload) -> UploadState:
    return UploadState(upload_id, upload.received_bytes, datetime.fromtimestamp(upload.expires_at, UTC))
