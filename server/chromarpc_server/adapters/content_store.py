"""A folder of adapters named by their content: `<sha256>.safetensors`, and a note of each file's owners beside it.

Uploads and downloads each have one. A caller sees only the files that it owns: those whose bytes it sent, or whose
URL it had fetched. To others a file does not exist, even when they know its hash.

What a call has kept or deleted outlasts a power failure when it returns. A file's note is on the disk before the
file is, and goes after it: at no moment does a file lie there without the note that says whose it is.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from chromarpc_server.adapters.damage import report_healed
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.names import HASH_PREFIX, SUFFIX, display_name, hash_in
from chromarpc_server.adapters.owners import note_of, note_text, owners_of, read_owners, shorten_note
from chromarpc_server.adapters.process_folder import ProcessFolder
from chromarpc_server.adapters.stored_lora import LoraSource, StoredLora
from chromarpc_server.disk_room import RETRY_AFTER_S
from chromarpc_server.domain.errors import DiskFull, LoraChanged, LoraDamaged, LoraNotFound
from chromarpc_server.durable import is_out_of_space, make_folder, sync_folder, write_file


class ContentStore:
    """Files by their SHA-256, each with its owners. Safe to call from any thread.

    Hashes are 64 lower-case hexadecimal digits, owners are callers' names. A folder that does not exist, or cannot
    be read, counts as empty.
    """

    def __init__(self, folder: Path, source: LoraSource, unfinished: Path | None = None) -> None:
        """Touches no file.

        Args:
            folder: where the files are; made by `make_folder`.
            source: what lists say of where the files come from.
            unfinished: for files that are not whole yet, on the same file system; by default a folder in `folder`.
        """
        self._folder = folder
        self._source = source
        self._unfinished = ProcessFolder(unfinished or folder / "unfinished")
        self._noting = threading.Lock()
        """Held while owners are changed."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    @property
    def unfinished(self) -> ProcessFolder:
        """Where files are written before they are placed."""
        return self._unfinished

    def make_folder(self) -> None:
        """Makes the folder, for this user alone, where there is none.

        Raises:
            OSError: it cannot be made.
        """
        make_folder(self._folder)

    def path(self, sha256: str) -> Path:
        """Where the file with this hash lies, or would lie."""
        return self._folder / f"{sha256}{SUFFIX}"

    def has(self, sha256: str) -> bool:
        """Whether there is a file with this hash, whichever owners it has."""
        return _is_plain_file(self.path(sha256))

    def locate(self, sha256: str, owner: str) -> AdapterFile | None:
        """The owner's file with this hash; None where there is none."""
        try:
            file = AdapterFile.of(self.path(sha256), "path", sha256=sha256)
        except LoraNotFound:
            return None
        return file if owner in owners_of(file.path) else None

    def is_whole(self, sha256: str, check: Callable[[], None] = lambda: None) -> bool:
        """Whether there is a file with this hash, whichever owners it has, and it still has the bytes: reads it.

        Args:
            sha256: the hash.
            check: called between pieces; may raise to stop.

        Raises:
            OSError: the file cannot be read, which says nothing of its bytes.
        """
        try:
            file = AdapterFile.of(self.path(sha256), "path", sha256=sha256)
            with file.open() as stream:
                file.require_content(stream, check)
        except (LoraNotFound, LoraChanged, LoraDamaged):
            return False
        return True

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

    def place(self, part: Path, sha256: str) -> None:
        """Moves a whole file of this file system, synced before, to its place in the folder.

        One that is there already is replaced, which heals it where it is damaged. A new one is nobody's until it
        is given owners.

        Args:
            part: the file.
            sha256: its hash.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._noting:
            self._place(part, sha256, read_owners(self.path(sha256)) if self.has(sha256) else {})

    def add(self, part: Path, sha256: str, owner: str, filename: str) -> None:
        """Places a whole file, as `place` does, for an owner who calls it `filename`.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._noting:
            owners = read_owners(self.path(sha256)) if self.has(sha256) else {}
            self._place(part, sha256, {**owners, owner: filename})

    def add_owner(self, sha256: str, owner: str) -> None:
        """Makes a file that was placed the owner's too.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        with self._noting:
            owners = read_owners(file) if note_of(file).exists() else {}
            if owner not in owners:
                self._note(file, {**owners, owner: ""})

    def remove_owner(self, sha256: str, owner: str) -> bool:
        """Takes a file from its owner, and deletes it with its last one; False where the owner has no such file.

        Needs no room on the disk.

        Raises:
            OSError: the folder cannot be written.
        """
        file = self.path(sha256)
        with self._noting:
            owners = read_owners(file) if self.has(sha256) else {}
            if owner not in owners:
                return False
            del owners[owner]
            if not owners:
                self.remove_file(sha256)
                self._drop_notes(sha256)
                return True
            try:
                self._note(file, owners)
            except OSError as error:
                if not is_out_of_space(error):
                    raise
                shorten_note(file, owners)
        return True

    def remove_file(self, sha256: str) -> None:
        """Deletes a file at once, for all its owners; `drop_notes` is to follow.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path(sha256).unlink(missing_ok=True)

    def drop_notes(self, hashes: Iterable[str]) -> None:
        """Makes the end of files outlast a power failure, and deletes the notes of those that are not back since.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._noting:
            self._drop_notes(*hashes)

    def _place(self, part: Path, sha256: str, owners: Mapping[str, str]) -> None:
        file = self.path(sha256)
        with suppress(FileNotFoundError):
            # It keeps its age: lists tell nobody that somebody else has sent the same bytes.
            os.utime(part, ns=(time.time_ns(), file.stat().st_mtime_ns))
        self._note(file, owners)
        part.replace(file)
        sync_folder(self._folder)
        report_healed(sha256)

    def _note(self, file: Path, owners: Mapping[str, str]) -> None:
        """Replaces the note of `file` atomically."""
        part = self._unfinished.path() / f"{secrets.token_hex(8)}.note"
        try:
            write_file(part, note_text(owners))
            part.replace(note_of(file))
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        sync_folder(self._folder)

    def _drop_notes(self, *hashes: str) -> None:
        sync_folder(self._folder)
        for sha256 in hashes:
            if not self.has(sha256):
                note_of(self.path(sha256)).unlink(missing_ok=True)
                report_healed(sha256)
        sync_folder(self._folder)

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


@contextmanager
def room_on_disk(what: str) -> Iterator[None]:
    """Reports a full disk as an error for the caller.

    Args:
        what: is written in the context: `this upload`.

    Raises:
        DiskFull: it finds no room on the disk.
    """
    try:
        yield
    except OSError as error:
        if not is_out_of_space(error):
            raise
        raise DiskFull(
            f"the server's disk has no room for {what}: delete jobs or uploads that you need no longer, or ask "
            "its operator for room",
            retry_after_s=RETRY_AFTER_S,
        ) from None


def _is_plain_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()
