"""Is everything there, and what its name promises? Changes nothing, and runs beside a server too.

What a server changes meanwhile is no problem: whatever looks wrong is looked at a second time before it is told.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Callable

from chromarpc_server.maintenance import databases
from chromarpc_server.maintenance.contents import Content, contents_of
from chromarpc_server.maintenance.files import damage_of
from chromarpc_server.maintenance.kept import listed
from chromarpc_server.maintenance.layout import DataFolder
from chromarpc_server.maintenance.report import Report


def check(folder: DataFolder, report: Report) -> None:
    """Looks at every row and at every byte.

    Raises:
        CannotBeDone: there is no store, or it cannot be read.
    """
    folder.require_store()
    if folder.database.exists():
        try:
            with databases.opened_to_read(folder.database) as connection:
                _check_database(connection, folder, report)
        except sqlite3.DatabaseError as error:
            _tell_damaged_database(report, folder, [str(error)])
    else:
        advice = "restore a backup, or start the server, which begins with an empty one"
        report.add(folder.name_of(folder.database), "there is no database", advice)
    _check_contents(folder, report)
    for path in (folder.lost_and_found, folder.quarantine):
        report.listed[folder.name_of(path)] = listed(path)
        report.count(f"files in {folder.name_of(path)}", len(report.listed[folder.name_of(path)]))
    report.count("half-written files, of writes that go on or were cut", len(folder.half_written()))


def repair_command(folder: DataFolder) -> str:
    """As it is to be typed."""
    return f"`chromarpc-server store repair --data-dir {shlex.quote(str(folder.root))}`"


def _tell_damaged_database(report: Report, folder: DataFolder, why: list[str]) -> None:
    advice = f"stop the server and run {repair_command(folder)}, or restore a backup"
    report.add(folder.name_of(folder.database), f"the database is damaged ({'; '.join(why)})", advice)


def _check_database(connection: sqlite3.Connection, folder: DataFolder, report: Report) -> None:
    version = databases.require_known_schema(connection, folder.database)
    if damages := databases.damages(connection):
        _tell_damaged_database(report, folder, damages)
    if not version:
        return  # a server was stopped before it made the tables
    _check_rows(connection, folder, report)
    _check_images(connection, folder, report)


def _check_rows(connection: sqlite3.Connection, folder: DataFolder, report: Report) -> None:
    report.count("jobs that ended", 0)
    report.count("jobs that wait or run", 0)
    for number in databases.numbers(connection):
        found, why = databases.judged(connection, number)
        if why is not None:
            found, why = databases.judged(connection, number)
        if why is not None:
            name = f"the job in row {number}" if found is None else f"job {found['id']}"
            advice = f"stop the server and run {repair_command(folder)}, which puts it into quarantine"
            report.add(name, why, advice)
        elif found is not None:
            report.count("jobs that wait or run" if found["ended_us"] is None else "jobs that ended")
            if why_not := databases.why_events_unreadable(found):
                advice = "the job and its images are served all the same; delete it, or restore a backup"
                report.add(f"job {found['id']}", why_not, advice)


def _check_images(connection: sqlite3.Connection, folder: DataFolder, report: Report) -> None:
    named = databases.named_images(connection)
    report.count("images", len(named))
    for sha256 in named:
        why = damage_of(folder.image(sha256), sha256)
        if why is None:
            continue
        # Deleted, or drawn again, meanwhile?
        jobs = databases.jobs_naming(connection, sha256)
        why = damage_of(folder.image(sha256), sha256) if jobs else None
        if why is not None:
            report.add(folder.name_of(folder.image(sha256)), why, _image_advice(folder, sha256, jobs))
    unnamed = [path for path in folder.image_files() if not databases.jobs_naming(connection, path.name)]
    report.count("images that no job names, of jobs that run or of a cut process", len(unnamed))


def _image_advice(folder: DataFolder, sha256: str, jobs: list[str]) -> str:
    if damage_of(folder.lost_and_found / sha256, sha256) is None:
        return f"it lies in lost+found: stop the server and run {repair_command(folder)}, which puts it back"
    named_by = ", ".join(jobs)
    return f"draw it again with RedrawJob, or restore a backup; jobs that name it: {named_by}"


def _check_contents(folder: DataFolder, report: Report) -> None:
    for path, what, advice in (
        (folder.loras, "uploads", "upload the same file again"),
        (folder.downloads, "downloads", "the next job with its URL fetches it again"),
    ):
        report.count(what, 0)
        for content in contents_of(path):
            _check_content(content, folder, report, what, advice)


def _check_content(content: Content, folder: DataFolder, report: Report, what: str, advice: str) -> None:
    if not content.file.exists():
        return  # deleted meanwhile, or a note that a cut process left
    report.count(what)
    for path, look in ((content.file, content.damage), (content.note, content.note_damage)):
        why = _twice(look)
        if why is not None and content.file.exists():
            told = f"{advice}; {repair_command(folder)} moves it to quarantine"
            report.add(folder.name_of(path), why, told)
    if what == "uploads" and not content.note.exists() and content.file.exists():
        why = "the note of its owners is gone, and nobody sees the file"
        report.add(folder.name_of(content.note), why, "upload the same file again")


def _twice(look: Callable[[], str | None]) -> str | None:
    return None if look() is None else look()
