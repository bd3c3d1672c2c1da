"""The adapters that requests can name: below the root, uploaded, downloaded.

All can be named by what they hold, `sha256:` and the file's hash; uploaded and downloaded ones lie in folders of
`<hash>.safetensors`. An upload grows in a file of its own and moves there, whole, at its end. Each belongs to the
callers that sent or fetched its bytes, and to others does not exist. Everything here touches the disk: call it
from a thread; but `look_up`, which lives on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.owners import note_owners, owners_of
from chromarpc_server.adapters.root import HASH_PREFIX, SUFFIX, AdapterRoot
from chromarpc_server.adapters.root_hashes import WAIT_S, RootHashes, StillHashing
from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.errors import (
    InvalidParameter,
    LoraInvalid,
    LoraNotFound,
    QuotaExceeded,
    QuotaViolation,
    UploadNotFound,
    UploadOutOfOrder,
    UploadsFull,
)
from chromarpc_server.domain.limits import UploadLimits
from chromarpc_server.pipeline.adapters import require_adapter_file

log = logging.getLogger(__name__)

PART_SUFFIX = ".part"
RETRY_HASHING_S = 1.0
"""When to ask again for a hash that is not known yet: soon, as hashing goes on while somebody asks."""
MAX_FILENAME = 200
"""Characters of what an upload is called."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class LoraSource(StrEnum):
    """Where an adapter comes from."""

    ROOT = "root"
    UPLOAD = "upload"
    DOWNLOAD = "download"


@dataclass(frozen=True)
class StoredLora:
    """An adapter that requests can name."""

    path: str
    """As requests name it."""
    source: LoraSource
    size_bytes: int
    sha256: str
    """Hexadecimal; empty where the name does not tell it."""
    modified: datetime
    filename: str = ""
    """What whoever uploaded it called it; printable, for people only."""


@dataclass(frozen=True)
class Listing:
    """All of them: the root's, then uploads, then downloads, each sorted by path."""

    loras: tuple[StoredLora, ...]
    truncated: bool
    """Whether the root holds more than is looked at."""


@dataclass(frozen=True)
class UploadState:
    """How far an upload is."""

    upload_id: str = field(repr=False)
    next_offset: int
    expires: datetime


@dataclass
class _Upload:
    """An unfinished upload; `lock` guards all of it."""

    path: Path
    owner: str
    filename: str
    size_bytes: int
    sha256: str | None
    expires_at: float
    received_bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256, repr=False)
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class AdapterLibrary(AdapterRoot):
    """The root, two folders of files named by their hash, and the uploads under way.

    Safe to call from any thread.
    """

    def __init__(
        self,
        root: Path | None,
        data_dir: Path,
        limits: UploadLimits | None = None,
        *,
        downloads: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Touches no file; `clean` and the first upload do.

        Args:
            root: folder that plain paths are relative to; None serves none.
            data_dir: gets the folders `loras` and `uploads` once they are needed.
            limits: of uploads.
            downloads: another folder of `<hash>.safetensors`, which is only read.
            clock: seconds since the epoch.
        """
        super().__init__(root)
        self._loras = data_dir / "loras"
        self._parts = data_dir / "uploads"
        self._downloads = downloads
        self._limits = limits or UploadLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._uploads: dict[str, _Upload] = {}
        self._finished: dict[str, tuple[str, str, float]] = {}
        """Upload id to owner, hash and expiry, so that the end of an upload can be asked for again."""
        self._root_hashes = RootHashes(self._root_files)
        self._noting = threading.Lock()
        """Held while owners are changed."""

    @property
    def limits(self) -> UploadLimits:
        """What it takes."""
        return self._limits

    def locate(self, path: str, field: str, owner: str = NOBODY.name) -> AdapterFile:
        """The file that a request of `owner` names, as far as that can be told at once.

        Raises:
            LoraNotFound: blaming `field`; the same answer for whatever lies outside the library.
        """
        if not path.startswith(HASH_PREFIX):
            return super().locate(path, field)
        sha256 = _hash_in(path)
        for folder in (self._loras, self._downloads):
            if sha256 is not None and folder is not None:
                with suppress(LoraNotFound):
                    file = AdapterFile.of(folder / f"{sha256}{SUFFIX}", field)
                    if owner in owners_of(file.path):
                        return file
        raise LoraNotFound("the server has no adapter with this hash", field=field)

    async def look_up(
        self, path: str, field: str, owner: str = NOBODY.name, *, wait_s: float = WAIT_S
    ) -> AdapterFile:
        """The file that a request of `owner` names; waits while files below the root are hashed for it.

        Raises:
            LoraNotFound: blaming `field`; as for `locate`, or the hash is not among those known by then.
        """
        sha256 = _hash_in(path)
        try:
            return await asyncio.to_thread(self.locate, path, field, owner)
        except LoraNotFound as error:
            if sha256 is None or self._root is None:
                raise
            missing = error
        try:
            found = await self._root_hashes.find(sha256, wait_s=wait_s)
        except StillHashing:
            raise LoraNotFound(
                "the server has no adapter with this hash among those it knows; it has not hashed all files below "
                "its root yet, which goes on when it is asked again",
                field=field,
                retry_after_s=RETRY_HASHING_S,
            ) from None
        if found is None:
            raise missing
        return found

    def recall(self, path: str, is_it: Callable[[AdapterFile], bool]) -> None:
        """Takes the hash that a path names for that of the root's files that an earlier process found by it."""
        sha256 = _hash_in(path)
        if sha256 is not None and not _is_plain_file(self._loras / f"{sha256}{SUFFIX}"):
            for file in self._root_files():
                if is_it(file):
                    self._root_hashes.learn(file, sha256)

    def stop_hashing(self) -> None:
        """Lets nobody wait for files to be hashed any longer; any thread may call this."""
        self._root_hashes.close()

    def learn(self, file: AdapterFile, sha256: str) -> None:
        """Takes the hash of a file that was read; one below the root can be named by it from now on."""
        if file.folder == self._root:
            self._root_hashes.learn(file, sha256)

    def known_hash(self, path: str, file: AdapterFile) -> str | None:
        """The hash of the file that `locate` found for `path`, where that costs no reading."""
        return _hash_in(path) or self._root_hashes.of(file) or None

    def listing(self, owner: str = NOBODY.name) -> Listing:
        """Every adapter that a request of `owner` could name now, as far as the bounds on looking allow."""
        below, truncated = self._below_root()
        kept = {lora.path: lora for lora in self._by_hash(self._downloads, LoraSource.DOWNLOAD, owner)}
        kept |= {lora.path: lora for lora in self._by_hash(self._loras, LoraSource.UPLOAD, owner)}
        by_hash = sorted(kept.values(), key=lambda lora: (lora.source is LoraSource.DOWNLOAD, lora.path))
        return Listing((*sorted(below, key=lambda lora: lora.path), *by_hash), truncated)

    def find(self, sha256: str, owner: str = NOBODY.name) -> StoredLora | None:
        """The upload or download of `owner` with this hash.

        Raises:
            InvalidParameter: not a hash.
        """
        sha256 = require_hash(sha256, "sha256")
        for folder, source in ((self._loras, LoraSource.UPLOAD), (self._downloads, LoraSource.DOWNLOAD)):
            if folder is not None and (found := _stored(folder / f"{sha256}{SUFFIX}", source, owner)):
                return found
        return None

    def hidden_from(self, owner: str) -> frozenset[str]:
        """Hashes of the uploads and downloads that are others'."""
        hidden = set()
        for folder in (self._loras, self._downloads):
            for entry in _entries(folder):
                file = Path(entry.path)
                if file.suffix == SUFFIX and owner not in owners_of(file):
                    hidden.add(file.stem)
        return frozenset(hidden)

    def fetched(self, sha256: str, owner: str) -> None:
        """Notes that `owner` has downloaded the adapter with this hash.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._downloads is None:
            return
        file = self._downloads / f"{sha256}{SUFFIX}"
        with self._noting:
            owners = owners_of(file) if file.with_suffix(".json").exists() else {}
            if owner not in owners:
                note_owners(file, {**owners, owner: ""})

    def delete(self, path: str, owner: str = NOBODY.name) -> None:
        """Deletes an upload, as far as it is the owner's; jobs that have read it already go on.

        Raises:
            InvalidParameter: the path is not an upload's.
            LoraNotFound: the owner has no such upload.
        """
        sha256 = _hash_in(path)
        if sha256 is None:
            raise InvalidParameter("only uploads, which are named sha256:…, can be deleted", field="path")
        file = self._loras / f"{sha256}{SUFFIX}"
        with self._noting:
            owners = owners_of(file) if _is_plain_file(file) else {}
            if owner not in owners:
                if self.find(sha256, owner) is not None:
                    raise InvalidParameter("a download cannot be deleted, only uploads can", field="path")
                raise LoraNotFound("the server has no upload with this hash", field="path")
            del owners[owner]
            if owners:
                note_owners(file, owners)
            else:
                file.unlink(missing_ok=True)
                file.with_suffix(".json").unlink(missing_ok=True)
            _sync_folder(self._loras)
        log.info("adapter.deleted", extra={"sha256": sha256})

    def clean(self) -> None:
        """Removes what abandoned uploads left, of this process and of earlier ones."""
        with self._lock:
            self._drop_expired()

    def create_upload(
        self, filename: str, size_bytes: int, sha256: str | None = None, caller: Caller = NOBODY
    ) -> UploadState:
        """Begins an upload.

        Args:
            filename: what to call it.
            size_bytes: of the whole file.
            sha256: its hash, where the sender knows it; another one at the end is refused.
            caller: whose it is.

        Raises:
            InvalidParameter: too large, or not a hash.
            QuotaExceeded: the caller has as many bytes of uploads as it may.
            UploadsFull: the server keeps no more.
        """
        limits = self._limits
        if not limits.max_file_bytes:
            raise InvalidParameter("this server takes no uploads", field="size_bytes")
        if not 0 < size_bytes <= limits.max_file_bytes:
            raise InvalidParameter(
                f"must be between 1 and {limits.max_file_bytes}, got {size_bytes}", field="size_bytes"
            )
        expected = None if sha256 is None else require_hash(sha256, "sha256")
        upload_id = secrets.token_urlsafe(24)
        now = self._clock()
        with self._lock:
            self._drop_expired()
            self._require_room(size_bytes, now, caller)
            self._make_folders()
            part = self._parts / f"{secrets.token_hex(16)}{PART_SUFFIX}"
            with _room_on_disk():
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            expires_at = now + limits.expiry_s
            upload = _Upload(part, caller.name, display_name(filename), size_bytes, expected, expires_at)
            self._uploads[upload_id] = upload
        return _state(upload_id, upload)

    def append(self, upload_id: str, offset: int, chunk: bytes, owner: str = NOBODY.name) -> UploadState:
        """Takes the next bytes of an upload, or the same ones again.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
            UploadOutOfOrder: the bytes neither go on where the upload is nor repeat what it has.
            InvalidParameter: no bytes, too many at once, or more than was announced.
            UploadsFull: the disk is full.
        """
        if not 0 < len(chunk) <= self._limits.max_chunk_bytes:
            raise InvalidParameter(
                f"must have 1 to {self._limits.max_chunk_bytes} bytes, got {len(chunk)}", field="chunk"
            )
        with self._open_upload(upload_id, owner) as upload:
            end = offset + len(chunk)
            if end > upload.size_bytes:
                raise InvalidParameter(
                    f"ends at byte {end} of an upload of {upload.size_bytes} bytes", field="chunk"
                )
            if offset == upload.received_bytes:
                with _room_on_disk(), upload.path.open("r+b") as part:
                    part.seek(offset)
                    part.write(chunk)
                upload.digest.update(chunk)
                upload.received_bytes = end
            elif end > upload.received_bytes or _bytes_at(upload.path, offset, len(chunk)) != chunk:
                raise _out_of_order("these bytes do not go on where the upload is", upload)
            upload.expires_at = self._clock() + self._limits.expiry_s
            return _state(upload_id, upload)

    def finalize(self, upload_id: str, sha256: str, owner: str = NOBODY.name) -> StoredLora:
        """Ends an upload and keeps its file; asked again, tells the same.

        Raises:
            UploadNotFound: the owner has no such upload, or it was dropped.
            UploadOutOfOrder: bytes are missing.
            InvalidParameter: not a hash.
            LoraInvalid: another hash, or not an adapter file; the upload is dropped.
            UploadsFull: the disk is full.
        """
        wanted = require_hash(sha256, "sha256")
        try:
            self._finish(upload_id, wanted, owner)
        except UploadNotFound:
            with self._lock:
                finished = self._finished.get(upload_id, ("", "", 0.0))
            if finished[:2] != (owner, wanted):
                raise
        found = self.find(wanted, owner)
        if found is None:
            raise LoraNotFound("the adapter was deleted after it was uploaded", field="upload_id")
        return found

    def _finish(self, upload_id: str, sha256: str, owner: str) -> None:
        with self._open_upload(upload_id, owner) as upload:
            if upload.received_bytes != upload.size_bytes:
                raise _out_of_order("bytes are missing", upload)
            try:
                received = upload.digest.hexdigest()
                if {received} != {sha256, upload.sha256 or received}:
                    raise LoraInvalid(f"the bytes received have another hash: {received}", field="sha256")
                require_adapter_file(upload.path)
                with _room_on_disk():
                    self._keep(upload, received)
                with self._lock:
                    self._finished[upload_id] = (owner, received, self._clock() + self._limits.expiry_s)
            finally:
                upload.is_over = True
                upload.path.unlink(missing_ok=True)
                with self._lock:
                    self._uploads.pop(upload_id, None)
        log.info("adapter.uploaded", extra={"sha256": sha256, "size_bytes": upload.size_bytes})

    def _keep(self, upload: _Upload, sha256: str) -> None:
        with upload.path.open("rb") as part:
            os.fsync(part.fileno())
        file = self._loras / f"{sha256}{SUFFIX}"
        with self._noting:
            owners = owners_of(file) if _is_plain_file(file) else {}
            note_owners(file, {**owners, upload.owner: upload.filename})
            # The same bytes stay the same file: jobs that wait, and what is resident, know it by its inode.
            if not _is_plain_file(file) or file.stat().st_size != upload.size_bytes:
                upload.path.replace(file)
            _sync_folder(self._loras)

    @contextmanager
    def _open_upload(self, upload_id: str, owner: str) -> Iterator[_Upload]:
        missing = UploadNotFound(
            "no such upload: it was dropped, or never begun; begin it anew", field="upload_id"
        )
        with self._lock:
            upload = self._uploads.get(upload_id)
        if upload is None or upload.owner != owner:
            raise missing
        with upload.lock:
            if upload.is_over or upload.expires_at <= self._clock():
                raise missing
            yield upload

    def _drop_expired(self) -> None:
        """Forgets what has expired, and removes every old part that is nobody's; holds the lock."""
        now = self._clock()
        for upload_id, upload in list(self._uploads.items()):
            if upload.expires_at <= now and upload.lock.acquire(blocking=False):
                upload.is_over = True
                upload.lock.release()
                upload.path.unlink(missing_ok=True)
                del self._uploads[upload_id]
        self._finished = {key: value for key, value in self._finished.items() if value[2] > now}
        ours = {upload.path.name for upload in self._uploads.values()}
        for entry in _entries(self._parts):
            # Another server's uploads may lie here too: theirs are as old as their last chunk.
            with suppress(OSError):
                if entry.name not in ours and entry.stat(follow_symlinks=False).st_mtime <= now - self._expiry_s:
                    Path(entry.path).unlink()

    @property
    def _expiry_s(self) -> float:
        return self._limits.expiry_s

    def _require_room(self, size_bytes: int, now: float, caller: Caller) -> None:
        """One's own bounds come first, so that nobody can use up what is everybody's."""
        limits = self._limits
        own = [upload for upload in self._uploads.values() if upload.owner == caller.name]
        for uploads, bound, subject, whose in (
            (own, limits.max_open, "caller", "you have"),
            (list(self._uploads.values()), limits.max_open_in_all, "server", "the server has"),
        ):
            if len(uploads) >= bound:
                first = min(upload.expires_at for upload in uploads)
                message = f"{whose} {bound} uploads under way, as many as may be at once"
                raise UploadsFull(
                    message,
                    retry_after_s=max(1.0, min(30.0, first - now)),
                    quota=QuotaViolation(subject, "max_open_uploads", bound, message),
                )
        there = sum(lora.size_bytes for lora in self._by_hash(self._loras, LoraSource.UPLOAD, caller.name))
        there += sum(upload.size_bytes for upload in own)
        quota = caller.limits.max_upload_bytes
        if there + size_bytes > quota:
            raise QuotaExceeded.of(
                "caller",
                "max_upload_bytes",
                quota,
                f"{size_bytes} bytes more than the {there} of your uploads exceed the {quota} that you may have: "
                "delete some",
            )
        kept = sum(lora.size_bytes for lora in self._by_hash(self._loras, LoraSource.UPLOAD, None))
        coming = sum(upload.size_bytes for upload in self._uploads.values())
        if kept + coming + size_bytes > limits.max_total_bytes:
            message = (
                f"{size_bytes} bytes more exceed the {limits.max_total_bytes} of uploads that this server keeps"
            )
            total = QuotaViolation("server", "max_uploads_bytes", limits.max_total_bytes, message)
            raise UploadsFull(f"{message}: delete some", quota=total)

    def _make_folders(self) -> None:
        with _room_on_disk():
            for folder in (self._loras, self._parts):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _by_hash(self, folder: Path | None, source: LoraSource, owner: str | None) -> Iterator[StoredLora]:
        """Those of one owner, or all for None."""
        for entry in _entries(folder):
            if found := _stored(Path(entry.path), source, owner):
                yield found

    def _below_root(self) -> tuple[list[StoredLora], bool]:
        """The root's adapters in any order, and whether there is more than was looked at."""
        found, truncated = self.files()
        return [
            StoredLora(
                path=path,
                source=LoraSource.ROOT,
                size_bytes=file.size_bytes,
                sha256=self._root_hashes.of(file),
                modified=_time(file.modified_ns / 1e9),
            )
            for path, file in found.items()
        ], truncated

    def _root_files(self) -> list[AdapterFile]:
        """Those of the root's adapters that fit the bounds on looking, links to one file told once."""
        return list(dict.fromkeys(self.files()[0].values()))


def require_hash(text: str, field: str) -> str:
    """A SHA-256 in lower case.

    Raises:
        InvalidParameter: blaming `field`.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise InvalidParameter("must be 64 hexadecimal digits", field=field)
    return text.lower()


def display_name(filename: str) -> str:
    """A name from a client as lists may show it: its last component, printable, of bounded length."""
    last = re.split(r"[/\\]", filename[-4 * MAX_FILENAME :])[-1]
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in last)
    return plain if len(plain) <= MAX_FILENAME else plain[: MAX_FILENAME - 1] + "…"


def _hash_in(path: str) -> str | None:
    found = re.fullmatch(HASH_PREFIX + r"([0-9a-f]{64})", path)
    return found[1] if found else None


def _stored(file: Path, source: LoraSource, owner: str | None) -> StoredLora | None:
    """What a file of a folder by hash is; None for others', and for anything else that lies there."""
    sha256 = file.name.removesuffix(SUFFIX)
    if file.name == sha256 or _hash_in(HASH_PREFIX + sha256) is None or not _is_plain_file(file):
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    owners = owners_of(file)
    if owner is not None and owner not in owners:
        return None
    return StoredLora(
        path=HASH_PREFIX + sha256,
        source=source,
        size_bytes=status.st_size,
        sha256=sha256,
        modified=_time(status.st_mtime),
        filename=display_name(owners.get(owner, "") if owner is not None else ""),
    )


def _entries(folder: Path | None) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name; nothing where it cannot be read."""
    if folder is None:
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_plain_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _bytes_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as part:
        part.seek(offset)
        return part.read(count)


def _state(upload_id: str, upload: _Upload) -> UploadState:
    return UploadState(upload_id, upload.received_bytes, _time(upload.expires_at))


def _out_of_order(what: str, upload: _Upload) -> UploadOutOfOrder:
    return UploadOutOfOrder(
        f"{what}: send what begins at byte {upload.received_bytes}",
        field="offset",
        metadata={"expected_offset": str(upload.received_bytes)},
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@contextmanager
def _room_on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UploadsFull("the server's disk has no room for this upload") from None
        raise


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder last; systems that cannot open folders need nothing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
