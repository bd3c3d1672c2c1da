"""A folder of adapters named by their content: `<sha256>.safetensors`, and a note of each file's owners beside it.

Uploads and downloads each have one. A caller sees only the files that it owns: those whose bytes it sent, or whose
URL it had fetched. To others a file does not exist, even when they know its hash.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.names import HASH_PREFIX, SUFFIX, display_name, hash_in
from chromarpc_server.adapters.owners import NOTE_SUFFIX, note_owners, owners_of
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.domain.errors import LoraNotFound

_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_out_of_space(error: OSError) -> bool:
    """Whether a file could not be written because the disk, a quota or the file system has no room for it."""
    return error.errno in _OUT_OF_SPACE


class ContentStore:
    """Files by their SHA-256, each with its owners. Safe to call from any thread.

    Hashes are 64 lower-case hexadecimal digits, owners are callers' names. A folder that does not exist, or cannot
    be read, counts as empty.
    """

    def __init__(self, folder: Path, source: LoraSource) -> None:
        """Touches no file.

        Args:
            folder: where the files are; made by `make_folder`.
            source: what lists say of where the files come from.
        """
        self._folder = folder
        self._source = source
        self._noting = threading.Lock()
        """Held while owners are changed."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def make_folder(self) -> None:
        """Makes the folder, for this user alone, where there is none.

        Raises:
            OSError: it cannot be made.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the file with this hash lies, or would lie."""
        return self._folder / f"{sha256}{SUFFIX}"

    def has(self, sha256: str) -> bool:
        """Whether there is a file with this hash, whichever owners it has."""
        return _is_plain_file(self.path(sha256))

    def locate(self, sha256: str, owner: str) -> AdapterFile | None:
        """The owner's file with this hash; None where there is none."""
        try:
            file = AdapterFile.of(self.path(sha256), "path")
        except LoraNotFound:
            return None
        return file if owner in owners_of(file.path) else None

    def find(self, sha256: str, owner: str) -> StoredLora | None:
        """What lists say of the owner's file with this hash; None where there is none."""
        return self._describe(self.path(sha256), owner)

    def all_of(self, owner: str) -> Iterator[StoredLora]:
        """The owner's files, sorted by hash."""
        return self._described(owner)

    def total_bytes(self, owner: str | None = None) -> int:
        """Size of the owner's files together; of everybody's for None."""
        return sum(lora.size_bytes for lora in self._described(owner))

    def hidden_from(self, owner: str) -> frozenset[str]:
        """Hashes of the files that are others' alone."""
        files = (Path(entry.path) for entry in entries_of(self._folder))
        return frozenset(file.stem for file in files if file.suffix == SUFFIX and owner not in owners_of(file))

    def place(self, part: Path, sha256: str, size_bytes: int) -> None:
        """Renames a whole file of this file system to its place in the folder.

        A file that is there already stays, unless its size differs: jobs that wait, and adapters that are
        resident, know it by its inode.

        Args:
            part: the file; it is left alone if one is there already.
            sha256: its hash.
            size_bytes: its size.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        if not self.has(sha256) or file.stat().st_size != size_bytes:
            part.replace(file)

    def add(self, part: Path, sha256: str, size_bytes: int, owner: str, filename: str) -> None:
        """Places a whole file, as `place` does, for an owner who calls it `filename`; outlasts a power failure.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        with self._noting:
            owners = owners_of(file) if self.has(sha256) else {}
            # The note comes first: without one the file would be everybody's for a moment.
            note_owners(file, {**owners, owner: filename})
            self.place(part, sha256, size_bytes)
            _sync_folder(self._folder)

    def add_owner(self, sha256: str, owner: str) -> None:
        """Makes a file that was placed the owner's too.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        with self._noting:
            # A file that was only placed has no note, and no owner yet.
            owners = owners_of(file) if file.with_suffix(NOTE_SUFFIX).exists() else {}
            if owner not in owners:
                note_owners(file, {**owners, owner: ""})

    def remove_owner(self, sha256: str, owner: str) -> bool:
        """Takes a file from its owner, and deletes it with its last one; False where the owner has no such file.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        with self._noting:
            owners = owners_of(file) if self.has(sha256) else {}
            if owner not in owners:
                return False
            del owners[owner]
            if owners:
                note_owners(file, owners)
            else:
                self.remove(sha256)
            _sync_folder(self._folder)
        return True

    def remove(self, sha256: str) -> None:
        """Deletes a file and the note of its owners, for all of them.

        Takes no lock: nothing else may change the file's owners meanwhile.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        file.unlink(missing_ok=True)
        file.with_suffix(NOTE_SUFFIX).unlink(missing_ok=True)

    def _described(self, owner: str | None) -> Iterator[StoredLora]:
        """The owner's files, sorted by hash; everybody's for None."""
        for entry in entries_of(self._folder):
            if found := self._describe(Path(entry.path), owner):
                yield found

    def _describe(self, file: Path, owner: str | None) -> StoredLora | None:
        """What lists say of a file; None for others' files, and for anything else that lies in the folder."""
        sha256 = file.name.removesuffix(SUFFIX)
        if file.name == sha256 or hash_in(HASH_PREFIX + sha256) is None or not _is_plain_file(file):
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
            source=self._source,
            size_bytes=status.st_size,
            sha256=sha256,
            modified=datetime.fromtimestamp(status.st_mtime, UTC),
            filename=display_name(owners.get(owner, "") if owner is not None else ""),
        )


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name; nothing where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_plain_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder outlast a power failure; systems that cannot open folders need nothing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
