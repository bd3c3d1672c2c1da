"""A disk as a process and as a power cut leave it, computed from recorded operations.

A process that is cut leaves everything that it did. A power cut leaves what was synced, and of the rest anything:
nothing, all, or a part, in pieces of sectors. Two rules are known for names (creating, renaming and removing):

- `POSIX`: a name is certain once the folder that it is in was synced; syncing the file is not enough.
- `JOURNAL`: names are journaled in order, as ext4 and xfs do it: any fsync makes every earlier name certain, and
  what is lost of the others is lost from the end.

Renaming is atomic in both: the file is under its old name or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from random import Random
from typing import Final

from tests.faults.cuts.recorder import Operation

SECTOR: Final = 512
NEVER_DURABLE: Final = ("-shm",)
"""Ends of the names of files that are never asked for after a cut."""


class Names(StrEnum):
    """When a name is certain."""

    POSIX = "posix"
    JOURNAL = "journal"


@dataclass(frozen=True)
class Tree:
    """What lies on a disk: paths relative to the folder."""

    folders: frozenset[str]
    files: Mapping[str, bytes]
    attributes: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Makes it real below an empty folder."""
        for path in sorted(self.folders):
            (folder / path).mkdir()
        for path, data in self.files.items():
            (folder / path).write_bytes(data)
        for path, attributes in self.attributes.items():
            for name, value in attributes.items():
                os.setxattr(folder / path, name, value)

    @property
    def key(self) -> int:
        """Equal for equal trees."""
        return hash((self.folders, frozenset(self.files.items())))


@dataclass
class _File:
    """Content that is certain, and what was done to it since."""

    certain: bytes = b""
    attributes: dict[str, bytes] = field(default_factory=dict)
    pending: list[Operation] = field(default_factory=list)

    def now(self) -> tuple[bytes, dict[str, bytes]]:
        return _changed(self, self.pending)

    def sync(self) -> None:
        self.certain, self.attributes = self.now()
        self.pending = []


@dataclass(frozen=True)
class _NameChange:
    kind: str
    path: str
    second: str
    file: int
    """Number of the file; 0 for a folder."""

    @property
    def paths(self) -> frozenset[str]:
        return frozenset((self.path, self.second) if self.kind in "rl" else (self.path,))

    def apply(self, names: dict[str, int]) -> None:
        if self.kind == "r":
            if names.pop(self.path, None) is not None:
                names[self.second] = self.file
        elif self.kind == "l":
            names[self.second] = self.file
        elif self.kind in "uR":
            names.pop(self.path, None)
        else:
            names[self.path] = self.file


class Disk:
    """A disk on which operations happen one by one."""

    def __init__(self, names: Names, begin: Tree | None = None) -> None:
        """`names`: when names are certain; `begin`: what lies there already, all of it certain."""
        self._rule = names
        self._files: dict[int, _File] = {}
        self._now: dict[str, int] = {}
        self._pending: list[_NameChange] = []
        if begin is not None:
            self._now.update(dict.fromkeys(begin.folders, 0))
            for path, data in begin.files.items():
                self._now[path] = self._add(_File(data, dict(begin.attributes.get(path, {}))))
        self._certain = dict(self._now)

    def apply(self, operation: Operation) -> None:
        """One more operation has happened."""
        path = operation.path
        if operation.kind == "s":
            self._sync(path)
        elif operation.kind in "wtax":
            self._files[self._now[path]].pending.append(operation)
        else:
            number = self._add(_File()) if operation.kind == "c" else self._now.get(path, 0)
            change = _NameChange(operation.kind, path, operation.second, number)
            change.apply(self._now)
            self._pending.append(change)

    def after_process_cut(self) -> Tree:
        """Everything that was done."""
        return self._tree(self._now, {number: file.now() for number, file in self._files.items()})

    def after_power_cut(self, chance: Random | None = None) -> Tree:
        """What is certain, and of the rest nothing, or what chance keeps."""
        names = dict(self._certain)
        for change in self._kept_names(chance):
            change.apply(names)
        contents = {number: _remains(self._files[number], chance) for number in set(names.values()) - {0}}
        return self._tree(names, contents)

    def _add(self, file: _File) -> int:
        number = len(self._files) + 1
        self._files[number] = file
        return number

    def _sync(self, path: str) -> None:
        number = self._now.get(path, 0)
        if number:
            self._files[number].sync()
        if self._rule is Names.JOURNAL:
            certain = list(self._pending)
        elif number:
            return
        else:
            certain = _with_earlier(
                self._pending, lambda change: any(_folder_of(name) == path for name in change.paths)
            )
        for change in certain:
            change.apply(self._certain)
        self._pending = [change for change in self._pending if change not in certain]

    def _kept_names(self, chance: Random | None) -> list[_NameChange]:
        if chance is None:
            return []
        if self._rule is Names.JOURNAL:
            return self._pending[: chance.randint(0, len(self._pending))]
        likely = chance.choice((0.2, 0.5, 0.8, 1.0))
        return _with_earlier(self._pending, lambda _: chance.random() < likely)

    def _tree(self, names: Mapping[str, int], contents: Mapping[int, tuple[bytes, Mapping[str, bytes]]]) -> Tree:
        folders = {path for path, number in names.items() if not number}
        found = {
            path: contents[number]
            for path, number in names.items()
            if number and not path.endswith(NEVER_DURABLE) and _is_reachable(path, folders)
        }
        return Tree(
            frozenset(path for path in folders if _is_reachable(path, folders)),
            {path: data for path, (data, _) in found.items()},
            {path: attributes for path, (_, attributes) in found.items() if attributes},
        )


def _with_earlier(changes: list[_NameChange], chosen: Callable[[_NameChange], bool]) -> list[_NameChange]:
    """The chosen changes, and earlier ones of the same names: a name's changes are not reordered."""
    kept: list[_NameChange] = []
    names: set[str] = set()
    for change in reversed(changes):
        if change.paths & names or chosen(change):
            kept.append(change)
            names |= change.paths
    return kept[::-1]


def _remains(file: _File, chance: Random | None) -> tuple[bytes, dict[str, bytes]]:
    """What a power cut leaves of a file's content."""
    if chance is None or not file.pending:
        return file.certain, file.attributes
    how = chance.choice(("nothing", "all", "prefix", "some"))
    if how == "nothing":
        return file.certain, file.attributes
    if how == "all":
        return file.now()
    if how == "prefix":
        *kept, last = file.pending[: chance.randint(1, len(file.pending))]
        return _changed(file, [*kept, *_torn(last, chance)])
    return _changed(
        file, [part for change in file.pending if chance.random() < 0.5 for part in _torn(change, chance)]
    )


def _torn(change: Operation, chance: Random) -> list[Operation]:
    """A write of which some sectors arrived, or of whose bytes only the length did."""
    if change.kind != "w":
        return [change]
    how = chance.choice(("whole", "whole", "torn", "zeros"))
    if how == "zeros":
        return [Operation("a", change.path, offset=change.offset + len(change.data))]
    if how == "torn":
        # Sectors are those of the disk, wherever in them the write begins.
        into = change.offset % SECTOR
        ends = range(SECTOR - into, len(change.data), SECTOR)
        end = chance.choice([0, *ends])
        return [Operation("w", change.path, offset=change.offset, data=change.data[:end])] if end else []
    return [change]


def _changed(file: _File, changes: Iterable[Operation]) -> tuple[bytes, dict[str, bytes]]:
    content, attributes = bytearray(file.certain), dict(file.attributes)
    for change in changes:
        if change.kind == "x":
            attributes[change.second] = change.data
            continue
        content.extend(bytes(max(0, change.offset - len(content))))
        if change.kind == "t":
            del content[change.offset :]
        elif change.kind == "w":
            content[change.offset : change.offset + len(change.data)] = change.data
    return bytes(content), attributes


def _folder_of(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def _is_reachable(path: str, folders: set[str]) -> bool:
    return all(str(parent) in folders for parent in PurePosixPath(path).parents if str(parent) != ".")
