"""Makes a damaged store one that a server starts with. What is damaged goes to quarantine, and is not deleted.

Each step leaves a store that another repair can go on with, so that one that was cut is run again.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from chromarpc_server.durable import make_folder, sync_file, sync_folder
from chromarpc_server.jobs.store.lock import StoreLock
from chromarpc_server.maintenance import databases
from chromarpc_server.maintenance.contents import contents_of, remove_half_written, remove_leftovers
from chromarpc_server.maintenance.files import damage_of, move_aside
from chromarpc_server.maintenance.kept import ROWS
from chromarpc_server.maintenance.layout import REBUILT_SUFFIX, DataFolder
from chromarpc_server.maintenance.report import Report
from chromarpc_server.maintenance.salvage import salvage


def repair(folder: DataFolder, report: Report) -> None:
    """Repairs what can be, and says what it did and what is left to do.

    Raises:
        CannotBeDone: there is no store, or its database cannot be read now.
        StoreInUse: a server runs.
        OSError: there is no room, or the folder cannot be written.
    """
    folder.require_store()
    folder.require_ours()
    make_folder(folder.jobs)
    lock = StoreLock(folder.jobs)
    lock.acquire()
    try:
        _clear_half_done(folder, report)
        if folder.database.exists():
            _repair_database(folder, report)
            with closing(databases.opened_to_write(folder.database)) as database:
                if databases.require_known_schema(database, folder.database):
                    _repair_rows(database, folder, report)
                    _repair_images(database, folder, report)
        _repair_contents(folder, report)
    finally:
        lock.release()


def _clear_half_done(folder: DataFolder, report: Report) -> None:
    """Removes what cut writes left: nobody was told that it is kept."""
    half_written = remove_half_written(folder)
    remove_leftovers(folder)
    if half_written:
        report.done.append(f"removed {half_written} half-written files")


def _repair_database(folder: DataFolder, report: Report) -> None:
    database = folder.database
    rebuilt = database.with_name(f"{database.name}{REBUILT_SUFFIX}")
    is_damaged = _is_damaged(database)
    if rebuilt.exists() and not is_damaged:
        # A repair was cut, and a server went on with what there was: that is newer.
        report.done.append(f"moved {rebuilt.name} to {move_aside(rebuilt, folder.quarantine / 'jobs')}")
        return
    if not is_damaged:
        return
    if not rebuilt.exists():
        part = rebuilt.with_name(f"{rebuilt.name}.part")
        saved = salvage(database, part)
        sync_file(part)
        part.rename(rebuilt)
        sync_folder(folder.jobs)
        report.done.append(
            f"rebuilt the database: saved {saved.jobs} jobs, {saved.unreadable} known ones cannot be read"
        )
    kept = _keep_damaged(folder)
    # The new database must never be read with the old one's WAL.
    for suffix in ("-wal", "-shm"):
        database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)
    sync_folder(folder.jobs)
    rebuilt.replace(database)
    sync_folder(folder.jobs)
    report.done.append(f"the damaged database is kept in {kept}")


def _is_damaged(path: Path) -> bool:
    try:
        with databases.opened_to_read(path) as connection:
            version = databases.require_known_schema(connection, path)
            if databases.damages(connection):
                return True
            if version:
                connection.execute("SELECT COUNT(*) FROM jobs").fetchone()
                databases.named_images(connection)
            return False
    except sqlite3.DatabaseError:
        return True


def _keep_damaged(folder: DataFolder) -> Path:
    """Puts the damaged database into quarantine while it still has its name here. Returns the folder."""
    for earlier in sorted((folder.quarantine / "jobs").glob(f"damaged-*/{folder.database.name}")):
        if earlier.samefile(folder.database):
            return earlier.parent  # by a repair that was cut
    kept = folder.quarantine / "jobs" / datetime.now(UTC).strftime("damaged-%Y%m%dT%H%M%S.%fZ")
    make_folder(kept)
    for name in (folder.database.name, f"{folder.database.name}-wal"):
        path = folder.jobs / name
        if path.exists():
            try:
                os.link(path, kept / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, kept / name)
                sync_file(kept / name)
    sync_folder(kept)
    return kept


def _repair_rows(database: sqlite3.Connection, folder: DataFolder, report: Report) -> None:
    """Moves rows that cannot be read out of the database, each to a file of its own."""
    for number in databases.numbers(database):
        found, why = databases.judged(database, number)
        if found is None or why is None:
            continue
        if databases.is_newer(found):
            report.done.append(f"left: {why}: run that version, or delete the job")
            continue
        kept = folder.quarantine / "jobs" / ROWS
        make_folder(kept)
        values = {name: value.hex() if isinstance(value, bytes) else value for name, value in dict(found).items()}
        path = _keep_row(kept, number, json.dumps(values))
        database.execute("DELETE FROM jobs WHERE number = ?", (number,))
        report.done.append(f"moved the job {found['id']} to {path}: {why}")


def _keep_row(kept: Path, number: int, text: str) -> Path:
    """Writes a row to a file; another row with its number, of another database, keeps its own."""
    path, again = kept / f"{number}.json", 0
    while path.exists() and path.read_text("utf-8") != text:
        again += 1
        path = kept / f"{number}-{again}.json"
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
    sync_file(path)
    sync_folder(kept)
    return path


def _repair_images(database: sqlite3.Connection, folder: DataFolder, report: Report) -> None:
    named = databases.named_images(database)
    for sha256, jobs in named.items():
        path, lost = folder.image(sha256), folder.lost_and_found / sha256
        why = damage_of(path, sha256)
        if why is None:
            continue
        if path.exists():
            report.done.append(
                f"moved {folder.name_of(path)} to {move_aside(path, folder.quarantine / 'jobs' / 'images')}: {why}"
            )
        if damage_of(lost, sha256) is None:
            make_folder(path.parent)
            lost.rename(path)
            sync_folder(path.parent)
            report.done.append(f"put {folder.name_of(path)} back, which lay in lost+found")
        else:
            report.done.append(
                f"left: {folder.name_of(path)} is gone; draw it again with RedrawJob: {', '.join(jobs)}"
            )
    kept = named.keys() | databases.intended_images(database)
    unnamed = [path for path in folder.image_files() if path.name not in kept]
    for path in unnamed:
        make_folder(folder.lost_and_found)
        lost = folder.lost_and_found / path.name
        if lost.exists() and damage_of(path, path.name) is not None:
            move_aside(path, folder.quarantine / "jobs" / "images")  # the one that lies there may be good
        else:
            path.replace(lost)
    if unnamed:
        sync_folder(folder.lost_and_found)
        report.done.append(f"moved {len(unnamed)} images that no job names to {folder.lost_and_found}")


def _repair_contents(folder: DataFolder, report: Report) -> None:
    for area, advice in ((folder.loras, "upload the same file again"), (folder.downloads, "it is fetched again")):
        kept = folder.quarantine / area.name
        for content in contents_of(area):
            why = content.damage()
            moved = [] if why is None else [content.file, content.note]
            if why is None and (why := content.note_damage()):
                moved = [content.note]
            for path in moved:
                if path.exists():
                    report.done.append(
                        f"moved {folder.name_of(path)} to {move_aside(path, kept)}: {why}; {advice}"
                    )
