"""The uploads under way: begun, continued chunk by chunk, kept when they are whole, dropped when they expire."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from chromarpc_server.adapters.content_store import ContentStore, room_on_disk
from chromarpc_server.adapters.names import display_name, require_hash
from chromarpc_server.adapters.process_folder import PART_SUFFIX
from chromarpc_server.adapters.stored_lora import StoredLora
from chromarpc_server.adapters.uploads.limits import require_chunk_size, require_file_size, require_room
from chromarpc_server.adapters.uploads.unfinished import UnfinishedUpload
from chromarpc_server.disk_room import DiskRoom
from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.errors import LoraNotFound, UploadNotFound
from chromarpc_server.domain.limits import UploadLimits

log = logging.getLogger(__name__)


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
    """When it is forgotten, on the clock that uploads expire by."""


class UploadRegistry:
    """Uploads by their ids. Each belongs to one caller, and to others does not exist.

    Touches the disk: call it from a thread; any thread will do.
    """

    def __init__(
        self,
        store: ContentStore,
        limits: UploadLimits | None = None,
        *,
        room: DiskRoom | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no file.

        Args:
            store: keeps the files of uploads that are whole.
            limits: of uploads.
            room: on the store's disk; None is not asked.
            clock: decides when uploads expire; in seconds, and never set back or forward.
            wall_clock: seconds since the epoch, to tell callers when that will be.
        """
        self._store = store
        self._limits = limits or UploadLimits()
        self._room = room
        self._clock = clock
        self._wall_clock = wall_clock
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
            UploadsFull: too many uploads are under way, or the server keeps no more bytes.
            DiskFull: its disk has no room for it.
        """
        require_file_size(self._limits, size_bytes)
        announced = None if sha256 is None else require_hash(sha256, "sha256")
        upload_id = secrets.token_urlsafe(24)
        replaced = None if announced is None else self._store.find(announced, caller.name)
        now = self._clock()
        with self._lock:
            self._drop_expired()
            unfinished = self._unfinished.values()
            require_room(
                self._limits,
                size_bytes,
                caller,
                unfinished=unfinished,
                store=self._store,
                now=now,
                replaced_bytes=0 if replaced is None else replaced.size_bytes,
            )
            if self._room is not None:
                missing = sum(upload.size_bytes - upload.received_bytes for upload in unfinished)
                self._room.require(size_bytes + missing, "this upload")
            with room_on_disk("this upload"):
                self._store.make_folder()
                folder = self._store.unfinished.path()
            upload = UnfinishedUpload(
                path=folder / f"{secrets.token_hex(16)}{PART_SUFFIX}",
                owner=caller.name,
                filename=display_name(filename),
                size_bytes=size_bytes,
                announced_sha256=announced,
                expires_at=now + self._limits.expiry_s,
            )
            upload.create_file()
            self._unfinished[upload_id] = upload
        return self._state(upload_id, upload)

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
            DiskFull: the disk has no room for it.
        """
        require_chunk_size(self._limits, len(chunk))
        with self._opened(upload_id, owner) as upload:
            upload.append(offset, chunk)
            upload.expires_at = self._clock() + self._limits.expiry_s
            return self._state(upload_id, upload)

    def finalize(self, upload_id: str, sha256: str, owner: str = NOBODY.name) -> StoredLora:
        """Ends an upload and keeps its file; asked again, gives the same answer.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
            UploadOutOfOrder: bytes are missing.
            InvalidParameter: not a hash.
            LoraInvalid: another hash, or not an adapter file; the upload is dropped.
            LoraNotFound: the adapter was deleted since.
            DiskFull: the disk has no room for it; the upload is dropped.
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
        """Drops the uploads that had no bytes for `limits.expiry_s`."""
        with self._lock:
            self._drop_expired()

    def _keep(self, upload_id: str, sha256: str, owner: str) -> None:
        """Moves a whole upload's file to the store; drops the upload also where that fails."""
        with self._opened(upload_id, owner) as upload:
            upload.require_all_bytes()
            try:
                upload.require_adapter(sha256)
                with room_on_disk("this upload"):
                    upload.sync()
                    self._store.add(upload.path, sha256, upload.owner, upload.filename)
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
        """Drops what has expired; the lock must be held."""
        now = self._clock()
        for upload_id, upload in list(self._unfinished.items()):
            if upload.expires_at <= now and upload.lock.acquire(blocking=False):
                try:
                    upload.drop()
                finally:
                    upload.lock.release()
                del self._unfinished[upload_id]
        self._finished = {key: value for key, value in self._finished.items() if value.expires_at > now}

    def _state(self, upload_id: str, upload: UnfinishedUpload) -> UploadState:
        left_s = upload.expires_at - self._clock()
        expires = datetime.fromtimestamp(self._wall_clock() + left_s, UTC)
        return UploadState(upload_id, upload.received_bytes, expires)
