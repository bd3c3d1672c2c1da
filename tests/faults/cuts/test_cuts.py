"""Process and power are cut at every write of the store, and the start after it holds what was acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import pytest

from tests.faults.cuts import recorder
from tests.faults.cuts.__main__ import folder_in_memory
from tests.faults.cuts.disk import Disk, Names
from tests.faults.cuts.explore import PLAYS, Explorer, Recording, Report
from tests.faults.cuts.recorder import Operation

pytestmark = pytest.mark.skipif(recorder.why_not() is not None, reason=str(recorder.why_not()))


@pytest.fixture(scope="module")
def explorer() -> Iterator[Explorer]:
    with folder_in_memory() as folder:
        made = Explorer(folder, seed=0)
        yield made
        made.close()


@pytest.fixture(scope="module")
def recordings(explorer: Explorer) -> dict[str, Recording]:
    return {play.name: explorer.record(play) for play in PLAYS}


def _said(explorer: Explorer) -> str:
    examples = [
        f"{kind}: {count}, as {explorer.report.examples[kind][0]}"
        for kind, count in explorer.report.problems.items()
    ]
    return "\n".join([explorer.report.line, *examples])


def test_a_start_holds_what_was_acknowledged_wherever_process_or_power_were_cut(
    explorer: Explorer, recordings: dict[str, Recording]
) -> None:
    for recording in recordings.values():
        explorer.cut(recording)
        explorer.cut(recording, every=6, variants=1)
    print(_said(explorer))
    assert not explorer.report.problems, _said(explorer)


def test_a_start_that_is_cut_is_made_again(explorer: Explorer, recordings: dict[str, Recording]) -> None:
    before = dict(explorer.report.problems)
    explorer.cut(recordings["day"], starts=1)
    print(_said(explorer))
    assert explorer.report.cuts_of_starts
    assert explorer.report.problems == before, _said(explorer)


@dataclass(frozen=True)
class _Broken:
    """A store that leaves out one kind of fsync."""

    play: str
    left_out: Callable[[str, Operation], bool]
    """By path, and by what was done before."""
    problem: str
    every: int = 5


_BROKEN = {
    "rows": _Broken("fresh", lambda path, _: path.endswith("-wal"), "job lost (journal)"),
    "images": _Broken("fresh", lambda path, _: path.endswith(".part"), "(journal)"),
    "adapters": _Broken("fresh", lambda path, _: path == "loras", "adapter lost (posix)"),
    "deletions": _Broken("day", lambda _, before: before.kind == "u", "deleted image left (posix)", every=13),
}


@pytest.mark.parametrize("what", _BROKEN)
def test_a_store_that_forgets_to_sync_is_found_out(
    what: str, explorer: Explorer, recordings: dict[str, Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool itself is checked: without one kind of fsync in a recording it finds what is lost."""
    broken = _BROKEN[what]
    whole = recordings[broken.play]
    operations = tuple(
        operation
        for before, operation in pairwise((whole.operations[0], *whole.operations))
        if operation.kind != "s" or not broken.left_out(operation.path, before)
    )
    assert len(operations) < len(whole.operations)
    monkeypatch.setattr(explorer, "report", Report())
    explorer.cut(replace(whole, play=f"without syncs of {what}", operations=operations), every=broken.every)
    assert any(kind.endswith(broken.problem) for kind in explorer.report.problems), _said(explorer)


def _disk(names: Names, *operations: Operation) -> Disk:
    disk = Disk(names)
    for operation in operations:
        disk.apply(operation)
    return disk


def test_what_was_not_synced_is_lost_and_what_was_stays() -> None:
    made = (Operation("c", "a"), Operation("w", "a", data=b"one"), Operation("s", "a"))
    assert _disk(Names.POSIX, *made).after_process_cut().files == {"a": b"one"}
    assert _disk(Names.POSIX, *made).after_power_cut().files == {}
    assert _disk(Names.JOURNAL, *made).after_power_cut().files == {"a": b"one"}
    named = (*made, Operation("s", ""), Operation("w", "a", offset=3, data=b" two"))
    assert _disk(Names.POSIX, *named).after_power_cut().files == {"a": b"one"}
    assert _disk(Names.POSIX, *named).after_process_cut().files == {"a": b"one two"}


def test_a_rename_is_whole_or_not_at_all() -> None:
    made = (
        Operation("c", "a.part"),
        Operation("w", "a.part", data=b"a"),
        Operation("s", "a.part"),
        Operation("s", ""),
    )
    disk = _disk(Names.POSIX, *made, Operation("r", "a.part", "a"))
    seen = {frozenset(disk.after_power_cut(Random(seed)).files.items()) for seed in range(20)}
    assert seen == {frozenset({("a", b"a")}), frozenset({("a.part", b"a")})}
    disk.apply(Operation("s", ""))
    assert disk.after_power_cut(Random(0)).files == {"a": b"a"}


def test_a_file_in_a_folder_whose_own_name_is_not_certain_is_lost_with_it() -> None:
    inside = (Operation("d", "f"), Operation("c", "f/a"), Operation("s", "f/a"), Operation("s", "f"))
    assert _disk(Names.POSIX, *inside).after_power_cut().folders == frozenset()
    assert _disk(Names.POSIX, *inside).after_power_cut().files == {}
    assert _disk(Names.POSIX, *inside, Operation("s", "")).after_power_cut().files == {"f/a": b""}


def test_chance_leaves_any_part_of_a_write() -> None:
    disk = _disk(Names.JOURNAL, Operation("c", "a"), Operation("s", "a"), Operation("w", "a", data=b"x" * 1024))
    sizes = {disk.after_power_cut(Random(seed)).files["a"] for seed in range(300)}
    assert sizes == {b"", b"x" * 512, b"x" * 1024, bytes(1024)}
