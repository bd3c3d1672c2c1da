"""Wipes what is kept of one caller: rows, images, adapters, and what lies where nothing names it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
from pathlib import Path

from chromarpc_server.adapters.content_store import ContentStore
from chromarpc_server.adapters.stored_lora import LoraSource
from chromarpc_server.durable import make_folder, sync_file, sync_folder
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.maintenance import databases
from chromarpc_server.maintenance.check import repair_command
from chromarpc_server.maintenance.contents import contents_of, remove_half_written, remove_leftovers
from chromarpc_server.maintenance.files import files_below
from chromarpc_server.maintenance.kept import disown_kept, is_note, owners_kept, remove_kept
from chromarpc_server.maintenance.layout import REBUILT_SUFFIX, REPLACED, DataFolder
from chromarpc_server.maintenance.report import CannotBeDone, Report

_ROOM = 1.2
"""Sizes of the database that must be free to write it anew."""
_UNKNOWN = "files among these whose owner is not known"


def forget(folder: DataFolder, name: str, report: Report) -> None:
    """Wipes a caller's data. What was cut is finished by the next call.

    Args:
        folder: of a server that is stopped.
        name: the caller's; empty for the one caller of a server without a callers file.
        report: counts what was removed.

    Raises:
        CannotBeDone: there is no store, or its database is damaged.
        StoreInUse: a server runs.
        OSError: the folder cannot be written.
    """
    folder.require_store()
    folder.require_ours()
    make_folder(folder.jobs)
    lock = StoreLock(folder.jobs)
    lock.acquire()
    try:
        for what in ("jobs", "images", "uploads", "downloads", "lost+found", "quarantine"):
            report.count(f"removed: {what}", 0)
        report.count(_UNKNOWN, 0)
        _wipe(folder, name, report)
        for replaced in sorted(folder.quarantine.glob(f"{REPLACED}*")):
            _wipe(DataFolder(replaced), name, report, is_kept=True)
    finally:
        lock.release()
    report.done += [
        f"forgot the caller {name!r}" if name else "forgot the one caller of a server without a callers file",
        "not touched: backups, log files and the audit log, traces, and what clients have saved",
    ]


def _wipe(folder: DataFolder, name: str, report: Report, *, is_kept: bool = False) -> None:
    """Wipes a store: the present one, or one in quarantine, of which less need be known."""
    named: Collection[str] = ()
    if folder.database.exists():
        try:
            named = _wipe_rows(folder.database, name, report)
        except sqlite3.DatabaseError as error:
            if not databases.is_unreadable(error):
                raise CannotBeDone(
                    f"{folder.database} cannot be changed now ({error}): see to it, then run this again"
                ) from None
            if not is_kept:
                raise CannotBeDone(
                    f"{folder.database} is damaged, so that nobody can say what is left in it: run "
                    f"{repair_command(folder)}, then this again"
                ) from None
            _wipe_files(folder.jobs.glob(f"{folder.database.name}*"), name, report, "quarantine")
        else:
            _write_anew(folder, report)
            # Of a repair that was cut before it put this in the place of a database that is whole after all.
            folder.database.with_name(f"{folder.database.name}{REBUILT_SUFFIX}").unlink(missing_ok=True)
    _wipe_files((path for path in folder.image_files() if path.name not in named), name, report, "images")
    for path in folder.image_files():
        if name in (owners_kept(path) or ()):
            disown_kept(path, name)  # another caller's job names it
    _wipe_contents(ContentStore(folder.loras, LoraSource.UPLOAD, folder.uploads), "uploads", name, report)
    _wipe_contents(ContentStore(folder.downloads, LoraSource.DOWNLOAD), "downloads", name, report)
    # Nobody can go on with what an earlier process began to receive, and nothing says whose it was.
    remove_half_written(folder)
    remove_leftovers(folder)
    _wipe_files(files_below(folder.lost_and_found), name, report, "lost+found")
    quarantined = (path for path in files_below(folder.quarantine) if not _is_replaced(folder, path))
    _wipe_files(quarantined, name, report, "quarantine")


def _is_replaced(folder: DataFolder, path: Path) -> bool:
    return path.relative_to(folder.quarantine).parts[0].startswith(REPLACED)


def _wipe_rows(path: Path, name: str, report: Report) -> Collection[str]:
    """Deletes the caller's jobs. Returns the images that others' jobs name."""
    with closing(databases.opened_to_write(path)) as database:
        if not databases.require_known_schema(database, path):
            return ()
        if found := databases.damages(database):
            raise sqlite3.DatabaseError(found[0])
        report.count("removed: jobs", database.execute("DELETE FROM jobs WHERE owner = ?", (name,)).rowcount)
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return databases.named_images(database).keys()


def _write_anew(folder: DataFolder, report: Report) -> None:
    """Writes the database into a new file, so that nothing is left between its rows either."""
    database = folder.database
    if shutil.disk_usage(folder.jobs).free < _ROOM * database.stat().st_size:
        report.done.append(
            f"{database} was not written anew, as there is no room: what was deleted in it is overwritten with "
            "zeros, and its size stays"
        )
        return
    part = database.with_name(f"{database.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    with closing(databases.opened_to_write(database)) as connection:
        connection.execute("VACUUM INTO ?", (str(part),))
    sync_file(part)
    # The last connection has written everything into the file; a log of its own the new one must not find.
    for suffix in ("-wal", "-shm"):
        database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)
    part.replace(database)
    sync_folder(folder.jobs)


def _wipe_files(paths: Iterable[Path], name: str, report: Report, what: str) -> None:
    """Removes files that are the caller's alone, or whose owner nothing tells; others keep shared ones."""
    for path in list(paths):
        if not path.exists() or is_note(path):
            continue
        owners = owners_kept(path)
        if owners is None or owners <= {name}:
            remove_kept(path)
            report.count(f"removed: {what}")
            report.count(_UNKNOWN, int(not owners))
        elif name in owners:
            disown_kept(path, name)


def _wipe_contents(store: ContentStore, what: str, name: str, report: Report) -> None:
    for content in contents_of(store.folder):
        if content.note_damage() is None and content.file.exists():
            report.count(f"removed: {what}", int(store.remove_owner(content.sha256, name)))
        else:
            # It is nobody's until its bytes are sent again, and the note may have the caller's name.
            was_there = content.file.exists()
            store.remove_file(content.sha256)
            store.drop_notes([content.sha256])
            report.count(f"removed: {what}", int(was_there))
            report.count(_UNKNOWN, int(was_there))
    store.unfinished.close()
