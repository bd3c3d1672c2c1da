"""The adapters that requests can name: below the root, uploaded, downloaded.

A request names a file below the root by its path, and any adapter by what it holds: `sha256:` and the file's hash.
Files below the root are everybody's; an uploaded or downloaded one belongs to the callers that sent or fetched its
bytes, and to others does not exist.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.names import HASH_PREFIX, hash_in, require_hash
from chromarpc_server.adapters.root import AdapterRoot
from chromarpc_server.adapters.root_hashes import WAIT_S, RootHashes, StillHashing
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.adapters.uploads.registry import UploadRegistry
from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.domain.errors import InvalidParameter, LoraNotFound

log = logging.getLogger(__name__)

RETRY_HASHING_S = 1.0
"""When a caller should ask again for a hash that is not known yet: soon, as files are hashed only for callers."""


@dataclass(frozen=True)
class Listing:
    """All of them: the root's, then uploads, then downloads, each sorted by path."""

    loras: tuple[StoredLora, ...]
    truncated: bool
    """Whether the root holds more than is looked at."""


class AdapterLibrary:
    """Finds and lists the adapters of a root, of the uploads that were kept, and of the downloads.

    Touches the disk: call it from a thread, and any thread will do; but `look_up` belongs to one event loop.
    """

    def __init__(self, root: AdapterRoot, uploads: UploadRegistry, downloaded: ContentStore) -> None:
        """Touches no file.

        Args:
            root: what paths are relative to.
            uploads: the uploads under way, and those that were kept.
            downloaded: what was downloaded; it is listed and found, never fetched here.
        """
        self._root = root
        self._root_hashes = RootHashes(root.distinct_files)
        self._uploads = uploads
        self._uploaded = uploads.store
        self._downloaded = downloaded

    @property
    def uploads(self) -> UploadRegistry:
        """The uploads under way."""
        return self._uploads

    def locate(self, path: str, field: str, owner: str = NOBODY.name) -> AdapterFile:
        """The file that a request of `owner` names, where no file must be hashed to find it.

        Raises:
            LoraNotFound: blaming `field`; the same answer for everything outside the library.
        """
        if not path.startswith(HASH_PREFIX):
            return self._root.locate(path, field)
        sha256 = hash_in(path)
        if sha256 is not None:
            for store in (self._uploaded, self._downloaded):
                if file := store.locate(sha256, owner):
                    return file
        raise LoraNotFound("the server has no adapter with this hash", field=field)

    async def look_up(
        self, path: str, field: str, owner: str = NOBODY.name, *, wait_s: float = WAIT_S
    ) -> AdapterFile:
        """The file that a request of `owner` names; hashes files below the root where that is needed to find it.

        Args:
            path: as the request names it.
            field: of the request, to blame.
            owner: whose request it is.
            wait_s: how long to wait for hashing, in seconds.

        Raises:
            LoraNotFound: as for `locate`, or the hash is not among those known by then.
        """
        sha256 = hash_in(path)
        try:
            return await asyncio.to_thread(self.locate, path, field, owner)
        except LoraNotFound as error:
            if sha256 is None or self._root.folder is None:
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
        """Learns from an earlier process which file below the root has the hash that `path` names.

        Args:
            path: as a request names it; only `sha256:…` teaches anything.
            is_it: whether a file is the one that the earlier process found.
        """
        sha256 = hash_in(path)
        if sha256 is not None and not self._uploaded.has(sha256):
            for file in self._root.distinct_files():
                if is_it(file):
                    self._root_hashes.learn(file, sha256)

    def remove_abandoned(self) -> None:
        """Deletes what earlier processes have not finished."""
        self._uploaded.unfinished.remove_abandoned()
        self._downloaded.unfinished.remove_abandoned()

    def close(self) -> None:
        """Deletes what this process has not finished; once nobody uploads or fetches any more."""
        self._uploaded.unfinished.close()
        self._downloaded.unfinished.close()

    def stop_hashing(self) -> None:
        """Ends every wait for files to be hashed; any thread may call this."""
        self._root_hashes.close()

    def learn(self, file: AdapterFile, sha256: str) -> None:
        """Notes the hash of a file that was read; a file below the root can be named by it from now on."""
        if file.folder == self._root.folder:
            self._root_hashes.learn(file, sha256)

    def known_hash(self, path: str, file: AdapterFile) -> str | None:
        """The hash of the file that `locate` found for `path`; None where it would have to be read first."""
        return file.sha256 or hash_in(path) or self._root_hashes.of(file) or None

    def listing(self, owner: str = NOBODY.name) -> Listing:
        """Every adapter that a request of `owner` could name now, as far as the bounds on looking allow."""
        below, truncated = self._below_root()
        kept = {lora.path: lora for lora in self._downloaded.all_of(owner)}
        kept |= {lora.path: lora for lora in self._uploaded.all_of(owner)}
        by_hash = sorted(kept.values(), key=lambda lora: (lora.source is LoraSource.DOWNLOAD, lora.path))
        return Listing((*sorted(below, key=lambda lora: lora.path), *by_hash), truncated)

    def find(self, sha256: str, owner: str = NOBODY.name) -> StoredLora | None:
        """The upload or download of `owner` with this hash.

        Raises:
            InvalidParameter: not a hash.
        """
        sha256 = require_hash(sha256, "sha256")
        return self._uploaded.find(sha256, owner) or self._downloaded.find(sha256, owner)

    def whole_upload(
        self, sha256: str, owner: str = NOBODY.name, check: Callable[[], None] = lambda: None
    ) -> StoredLora | None:
        """The owner's upload with this hash, where its bytes still have it: reads the file.

        Args:
            sha256: the hash.
            owner: whose upload.
            check: called between pieces; may raise to stop.

        Raises:
            InvalidParameter: not a hash.
            OSError: the file cannot be read, which says nothing of its bytes.
        """
        found = self._uploaded.find(require_hash(sha256, "sha256"), owner)
        return found if found is not None and self._uploaded.is_whole(found.sha256, check) else None

    def hidden_from(self, owner: str) -> frozenset[str]:
        """Hashes of the uploads and downloads that are others' alone."""
        return self._uploaded.hidden_from(owner) | self._downloaded.hidden_from(owner)

    def add_download(self, sha256: str, owner: str) -> None:
        """Lets `owner` name the downloaded adapter with this hash.

        Raises:
            OSError: the folder cannot be written.
        """
        self._downloaded.add_owner(sha256, owner)

    def delete(self, path: str, owner: str = NOBODY.name) -> None:
        """Deletes an upload, as far as it is the owner's; jobs that have read it already go on.

        Raises:
            InvalidParameter: the path is not an upload's.
            LoraNotFound: the owner has no such upload.
        """
        sha256 = hash_in(path)
        if sha256 is None:
            raise InvalidParameter("only uploads, which are named sha256:…, can be deleted", field="path")
        if not self._uploaded.remove_owner(sha256, owner):
            if self._downloaded.find(sha256, owner) is not None:
                raise InvalidParameter("a download cannot be deleted, only uploads can", field="path")
            raise LoraNotFound("the server has no upload with this hash", field="path")
        log.info("adapter.deleted", extra={"sha256": sha256})

    def _below_root(self) -> tuple[list[StoredLora], bool]:
        """The root's adapters in any order, and whether there is more than was looked at."""
        found, truncated = self._root.files()
        return [
            StoredLora(
                path=path,
                source=LoraSource.ROOT,
                size_bytes=file.size_bytes,
                sha256=self._root_hashes.of(file),
                modified=datetime.fromtimestamp(file.modified_ns / 1e9, UTC),
            )
            for path, file in found.items()
        ], truncated
