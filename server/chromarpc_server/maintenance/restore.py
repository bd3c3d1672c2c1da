"""A backup becomes the store: verified, copied beside its place, and moved there in one go."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from chromarpc_server.adapters.owners import NOTE_SUFFIX
from chromarpc_server.durable import make_folder, sync_folder
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.maintenance import databases
from chromarpc_server.maintenance.backup import verify
from chromarpc_server.maintenance.files import Damaged, copy_whole, files_below, move_aside, sync_tree
from chromarpc_server.maintenance.layout import HASH, REPLACED, STAGING, DataFolder
from chromarpc_server.maintenance.manifest import Manifest, read_manifest
from chromarpc_server.maintenance.report import CannotBeDone, Report


def restore(
    folder: DataFolder, source: Path, report: Report, *, replaces: bool = False, is_partial: bool = False
) -> None:
    """Puts a backup into a data folder that has no store.

    Args:
        folder: need not exist.
        source: what a backup made.
        report: gets what is damaged.
        replaces: moves the store that is there to quarantine.
        is_partial: leaves out damaged files of the backup.

    Raises:
        CannotBeDone: the backup is damaged, or there is a store; nothing was changed.
        StoreInUse: a server runs.
        OSError: there is no room; nothing was changed.
    """
    manifest = read_manifest(source)
    backup = DataFolder(source)
    folder.require_ours()
    verify(backup, manifest, report)
    if report.problems and not is_partial:
        report.done.append("nothing was restored: with --partial what is damaged is left out")
        return
    make_folder(folder.jobs)
    lock = StoreLock(folder.jobs)
    lock.acquire()
    try:
        if folder.has_store() and not replaces:
            raise CannotBeDone(
                f"{folder.root} has a store already: give another --data-dir, or --replace to move that one to "
                "quarantine/"
            )
        _require_movable(folder)
        staged = DataFolder(folder.root / STAGING)
        try:
            _stage(backup, staged, manifest, report)
        except BaseException:
            shutil.rmtree(staged.root, ignore_errors=True)
            raise
        _move_present_away(folder, report)
        _move_into_place(staged, folder)
    finally:
        lock.release()
    report.done.append(f"the backup of {manifest.ended} is in {folder.root}: start the server")


def _require_movable(folder: DataFolder) -> None:
    """Sees that everything can be renamed, before anything is.

    Raises:
        CannotBeDone: something is a link, or on another disk.
    """
    disk = folder.root.stat().st_dev
    for path in (folder.jobs, folder.images, folder.loras, folder.downloads, folder.uploads):
        if path.exists() or path.is_symlink():
            is_link = path.is_symlink() and path != folder.jobs
            if is_link or path.is_mount() or path.stat().st_dev != disk:
                raise CannotBeDone(
                    f"{path} is a link or a disk of its own, which cannot be moved: put a folder in its place, or "
                    "give another --data-dir"
                )


def _stage(backup: DataFolder, staged: DataFolder, manifest: Manifest, report: Report) -> None:
    """Copies what is whole; every byte is verified once more while it is copied."""
    shutil.rmtree(staged.root, ignore_errors=True)
    for folder in (staged.images, staged.loras, staged.downloads):
        make_folder(folder)
    damaged = {problem.subject for problem in report.problems}
    for area, what in ((backup.images, "images"), (backup.loras, "adapters"), (backup.downloads, "adapters")):
        report.count(what, 0)
        for path in files_below(area):
            name = backup.name_of(path)
            if name in damaged or not HASH.fullmatch(path.stem):
                continue
            sha256 = manifest.notes.get(name) if path.suffix == NOTE_SUFFIX else path.stem
            if sha256 is None:
                continue  # a note that no backup put there
            _copy(path, staged.root / name, sha256)
            report.count(what, int(path.suffix != NOTE_SUFFIX))
    if manifest.database_sha256:
        _copy(backup.database, staged.database, manifest.database_sha256)
    sync_tree(staged.root)


def _copy(path: Path, target: Path, sha256: str) -> None:
    make_folder(target.parent)
    try:
        copy_whole(path, target, sha256)
    except Damaged as error:
        raise CannotBeDone(f"{path} of the backup was damaged while it was copied ({error})") from None


def _move_present_away(folder: DataFolder, report: Report) -> None:
    _empty_log(folder)
    present = folder.present()
    if not present:
        return
    named = datetime.now(UTC).strftime(f"{REPLACED}%Y%m%dT%H%M%SZ")
    for path in present:
        below = path.parent.relative_to(folder.root)
        move_aside(path, folder.quarantine / named / below)
    if folder.has_store():
        raise AssertionError("the store that was there is still there")
    report.done.append(f"the store that was there is in {folder.quarantine / named}")


def _empty_log(folder: DataFolder) -> None:
    """Writes what is in SQLite's log into the database, so that nothing is lost if the two are cut apart."""
    if folder.database.exists():
        with suppress(sqlite3.Error), closing(databases.opened_to_write(folder.database)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _move_into_place(staged: DataFolder, folder: DataFolder) -> None:
    """The database comes last: cut before that, nothing names the images, and a start keeps them all the same."""
    moves = [(staged.loras, folder.loras), (staged.downloads, folder.downloads), (staged.images, folder.images)]
    for source, target in [*moves, (staged.database, folder.database)]:
        if source.exists():
            if target.is_dir():
                target.rmdir()
            source.rename(target)
    sync_folder(folder.jobs)
    sync_folder(folder.root)
    shutil.rmtree(staged.root)
