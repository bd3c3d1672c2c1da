"""A copy of the store, beside a running server too: a snapshot of the database, and what its rows name.

The copy is written beside its place and gets its name when it is whole and synced, so that a folder with the name
of a backup is one.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from chromarpc_server.durable import make_folder, sync_file, sync_folder
from chromarpc_server.maintenance import databases
from chromarpc_server.maintenance.check import repair_command
from chromarpc_server.maintenance.contents import contents_of
from chromarpc_server.maintenance.files import Damaged, copy_whole, damage_of, sha256_of, sync_tree
from chromarpc_server.maintenance.layout import DataFolder
from chromarpc_server.maintenance.manifest import FILE as MANIFEST
from chromarpc_server.maintenance.manifest import Manifest
from chromarpc_server.maintenance.report import CannotBeDone, Report

_SNAPSHOTS = 5
"""How often the database is copied anew because images of deleted jobs went while they were copied."""

_SEE_CHECK = "see `chromarpc-server store check`"


def backup(folder: DataFolder, target: Path, report: Report, *, with_downloads: bool = True) -> None:
    """Copies the store to a folder that does not exist, or is empty.

    Raises:
        CannotBeDone: there is no store, its database is too damaged to be copied, or the folder cannot be used.
        OSError: there is no room.
    """
    folder.require_store()
    target = target.resolve()
    if target.is_relative_to(folder.root.resolve()):
        raise CannotBeDone(
            f"{target} lies in the data folder that it would be a backup of: name a folder outside, best on "
            "another disk"
        )
    part = _make_part(target)
    try:
        _Backup(folder, DataFolder(part), report).write(with_downloads=with_downloads)
        part.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    report.done.append(f"the backup is {target}")


def _make_part(target: Path) -> Path:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CannotBeDone(f"{target} is there already: name a folder that does not exist, or is empty")
    if target.is_mount():
        raise CannotBeDone(f"{target} is a disk's own folder, which cannot be made at once: name a folder in it")
    part = target.with_name(f"{target.name}.part")
    try:
        make_folder(part.parent)
        part.mkdir(mode=0o700)
    except FileExistsError:
        raise CannotBeDone(
            f"{part} is there already: wait for the backup that writes it, or remove it if that one was killed"
        ) from None
    return part


class _Backup:
    """One that is being written."""

    def __init__(self, source: DataFolder, target: DataFolder, report: Report) -> None:
        self._source = source
        self._target = target
        self._report = report
        self._left_out: list[str] = []
        self._notes: dict[str, str] = {}

    def write(self, *, with_downloads: bool) -> None:
        begun = _now()
        for folder in (self._target.images, self._target.loras, self._target.downloads):
            make_folder(folder)
        schema, database_sha256 = self._copy_jobs() if self._source.database.exists() else (0, "")
        self._copy_contents(self._source.loras, self._target.loras, "uploads")
        if with_downloads:
            self._copy_contents(self._source.downloads, self._target.downloads, "downloads")
        manifest = Manifest(
            chromarpc=metadata.version("chromarpc"),
            schema=schema,
            begun=begun,
            ended=_now(),
            database_sha256=database_sha256,
            with_downloads=with_downloads,
            counts=self._report.counts,
            notes=self._notes,
            left_out=tuple(self._left_out),
        )
        sync_file(manifest.write(self._target.root))
        sync_tree(self._target.root)

    def _copy_jobs(self) -> tuple[int, str]:
        """Copies the database and its images. Returns the schema's version and the hash of the copy."""
        source, target = self._source.database, self._target.database
        lost: dict[Path, str] = {}
        try:
            with databases.opened_to_read(source) as live:
                schema = databases.require_known_schema(live, source)
                for number in range(_SNAPSHOTS):
                    _snapshot(live, target)
                    if not schema:
                        break  # a server was stopped before it made the tables
                    with closing(_opened(target)) as copy:
                        lost, changed = self._copy_images(live, copy)
                        if not changed or number == _SNAPSHOTS - 1:
                            self._drop_deleted(live, copy, changed)
                            break
        except sqlite3.DatabaseError as error:
            raise CannotBeDone(
                f"{source} is too damaged to be copied ({error}): stop the server and run "
                f"{repair_command(self._source)}, then back up"
            ) from None
        for path, why in lost.items():
            self._leave_out(path, why)
        with databases.opened_to_read(target) as copy:
            self._judge(copy)
        sync_file(target)
        return schema, sha256_of(target)

    def _copy_images(self, live: sqlite3.Connection, copy: sqlite3.Connection) -> tuple[dict[Path, str], set[str]]:
        """Copies what the snapshot names and is not copied yet.

        Returns:
            Images that are damaged, and why; ids of jobs that were deleted meanwhile, and their images with them.
        """
        lost: dict[Path, str] = {}
        changed: set[str] = set()
        for sha256, jobs in databases.named_images(copy).items():
            source, target = self._source.image(sha256), self._target.image(sha256)
            if target.exists():
                continue
            make_folder(target.parent)
            try:
                copy_whole(source, target, sha256)
            except (Damaged, FileNotFoundError) as error:
                if databases.jobs_naming(live, sha256):
                    lost[source] = _why(error)
                else:
                    changed.update(jobs)
        return lost, changed

    def _drop_deleted(self, live: sqlite3.Connection, copy: sqlite3.Connection, changed: set[str]) -> None:
        """Takes from the copy what was deleted while it was made, and images that nothing in it names any more."""
        kept = databases.job_ids(live).keys() - changed
        deleted = [(number,) for job, number in databases.job_ids(copy).items() if job not in kept]
        copy.execute("BEGIN")
        copy.executemany("DELETE FROM jobs WHERE number = ?", deleted)
        copy.execute("COMMIT")
        named = databases.named_images(copy)
        for path in self._target.image_files():
            if path.name not in named:
                path.unlink()
        self._report.count("images", sum(1 for _ in self._target.image_files()))

    def _judge(self, copy: sqlite3.Connection) -> None:
        """Says what the copy took over that is damaged."""
        if found := databases.damages(copy):
            advice = f"stop the server and run {repair_command(self._source)}, then back up again"
            why = f"the database is damaged ({'; '.join(found)}), and so is its copy"
            self._report.add(self._source.name_of(self._source.database), why, advice)
        if databases.require_known_schema(copy, self._target.database):
            for number in databases.numbers(copy):
                found_row, why_not = databases.judged(copy, number)
                self._report.count("jobs")
                if why_not is None and found_row is not None:
                    why_not = databases.why_events_unreadable(found_row)
                if why_not is not None:
                    name = f"the job in row {number}" if found_row is None else f"job {found_row['id']}"
                    self._report.add(name, f"{why_not}, in the backup neither", _SEE_CHECK)

    def _copy_contents(self, source: Path, target: Path, what: str) -> None:
        self._report.count(what, 0)
        for content in contents_of(source):
            if not content.file.exists():
                continue  # deleted meanwhile, or a note that a cut process left
            copied = target / content.file.name
            try:
                copy_whole(content.file, copied, content.sha256)
            except (Damaged, FileNotFoundError) as error:
                if content.file.exists():
                    self._leave_out(content.file, _why(error))
                continue
            self._report.count(what)
            if why := content.note_damage():
                self._leave_out(content.note, why)
            else:
                self._copy_note(content.note, target)

    def _copy_note(self, note: Path, target: Path) -> None:
        with suppress(FileNotFoundError):  # a download that nobody has asked for yet, or deleted meanwhile
            path = target / note.name
            self._notes[self._target.name_of(path)] = copy_whole(note, path)

    def _leave_out(self, path: Path, why: str) -> None:
        name = self._source.name_of(path)
        self._left_out.append(name)
        self._report.add(name, f"{why}, so that the backup is without it", _SEE_CHECK)


def _snapshot(live: sqlite3.Connection, target: Path) -> None:
    """Copies a database as it is at one moment; writers go on meanwhile."""
    target.unlink(missing_ok=True)
    target.touch(mode=0o600)
    with closing(sqlite3.connect(target, isolation_level=None)) as copy:
        live.backup(copy)


def _opened(path: Path) -> sqlite3.Connection:
    """The copy, which is one file from here on."""
    copy = sqlite3.connect(path, isolation_level=None)
    copy.row_factory = sqlite3.Row
    copy.execute("PRAGMA journal_mode = DELETE")
    copy.execute("PRAGMA foreign_keys = ON")
    copy.execute("PRAGMA secure_delete = ON")
    return copy


def _why(error: Damaged | FileNotFoundError) -> str:
    return str(error) if isinstance(error, Damaged) else "the file is gone"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def verify(backup_folder: DataFolder, manifest: Manifest, report: Report) -> None:
    """Looks at every byte of a backup; what is damaged goes into the report.

    Raises:
        CannotBeDone: its database is damaged, or none that the manifest knows.
    """
    expected = {*manifest.left_out}
    if not manifest.database_sha256 and backup_folder.database.exists():
        raise CannotBeDone(
            f"{backup_folder.root / MANIFEST} vouches for no database, and there is one: take another backup"
        )
    if manifest.database_sha256:
        path = backup_folder.database
        if why := damage_of(path, manifest.database_sha256):
            raise CannotBeDone(f"{path} of the backup is damaged ({why}): take another backup")
        with databases.opened_to_read(path) as connection:
            if databases.require_known_schema(connection, path):
                for sha256 in databases.named_images(connection):
                    _verify_file(backup_folder, backup_folder.image(sha256), sha256, expected, report)
    for folder in (backup_folder.loras, backup_folder.downloads):
        for content in contents_of(folder):
            _verify_file(backup_folder, content.file, content.sha256, expected, report)
    for name, sha256 in manifest.notes.items():
        _verify_file(backup_folder, backup_folder.root / name, sha256, expected, report)


def _verify_file(folder: DataFolder, path: Path, sha256: str, expected: set[str], report: Report) -> None:
    why = damage_of(path, sha256)
    if why is not None and folder.name_of(path) not in expected:
        report.add(folder.name_of(path), f"{why} in the backup", "take another backup, or restore with --partial")
