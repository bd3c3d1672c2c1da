"""Cuts a recorded scenario after every operation, and has what is left judged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.cuts import recorder
from tests.faults.cuts.disk import Disk, Names, Tree
from tests.faults.cuts.judge import judge
from tests.faults.cuts.promises import Promises
from tests.faults.cuts.recorder import Operation
from tests.faults.cuts.scenario import ACKNOWLEDGED, Line, leave_image, leave_old_store

SCENARIO = "tests.faults.cuts.scenario"
PROCESS, POWER = "process", "power"


@dataclass(frozen=True)
class Cut:
    """One cut."""

    play: str
    point: int
    """After so many operations."""
    what: str
    """`process` or `power`."""
    names: Names | None = None
    variant: int = 0
    """0 drops everything that was not synced; others keep a part of it, by chance."""
    of_start: int | None = None
    """The cut is in the start after this one, after so many of its operations."""

    def __str__(self) -> str:
        kept = f" {self.names} variant {self.variant}" if self.names else ""
        start = "" if self.of_start is None else f", in the start after it at {self.of_start}"
        return f"{self.play} at {self.point}: {self.what}{kept}{start}"


@dataclass
class Report:
    """What came of it."""

    points: int = 0
    process_cuts: int = 0
    power_cuts: int = 0
    variants: int = 0
    """Power cuts that keep a part of what was not synced."""
    cuts_of_starts: int = 0
    judged: int = 0
    """Different disks: equal ones with equal promises are judged once."""
    problems: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, cut: Cut, problems: Sequence[tuple[str, str]], operation: str) -> None:
        """What was found wrong after a cut."""
        for kind, detail in dict.fromkeys(problems):
            name = f"{kind} ({cut.names or cut.what})"
            self.problems[name] = self.problems.get(name, 0) + 1
            examples = self.examples.setdefault(name, [])
            if len(examples) < 3:
                examples.append(f"{cut}, after `{operation}`: {detail}")

    @property
    def line(self) -> str:
        """The counts."""
        return (
            f"points {self.points}, process cuts {self.process_cuts}, power cuts {self.power_cuts}, of these with "
            f"a part kept {self.variants}, cuts of starts {self.cuts_of_starts}, different disks {self.judged}, "
            f"problems {sum(self.problems.values())}"
        )


@dataclass(frozen=True)
class Play:
    """Acts that are recorded one after the other, in processes of their own, over one folder."""

    name: str
    acts: tuple[str, ...]
    prepare: Callable[[Path], list[Line]]
    """Leaves there what lies there before the first one. Returns what is promised of it."""


@dataclass(frozen=True)
class Recording:
    """A play as it was played."""

    play: str
    begin: Tree
    """What lay there before."""
    operations: tuple[Operation, ...]
    found: tuple[Line, ...] = ()
    """What was promised before."""


PLAYS = (
    Play("day", ("first", "second"), leave_image),
    Play("fresh", ("fresh",), lambda _: []),
    Play("old", ("old",), leave_old_store),
)


class Explorer:
    """Records, cuts, judges. Works below one folder, best in memory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._library = recorder.build(folder)
        self._seed = seed
        self._counted: set[Cut] = set()
        self._judged: set[tuple[int, int, str]] = set()
        self._loop = asyncio.new_event_loop()
        self.report = Report()

    def close(self) -> None:
        """Ends what judging needed."""
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def record(self, play: Play) -> Recording:
        """Plays it once."""
        data = self._empty("data")
        found = tuple(play.prepare(data))
        begin = _tree_of(data)
        recording = Recording(play.name, begin, tuple(self._recorded(data, play.acts)), found)
        self.report.points += len(recording.operations) + 1
        return recording

    def cut(self, recording: Recording, *, every: int = 1, variants: int = 0, starts: int = 0) -> None:
        """Cuts a recording.

        Args:
            recording: of a play.
            every: after every so many operations.
            variants: power cuts that keep a part by chance, at each of these points and for each rule for names.
            starts: at so many points, spread evenly, the start that follows is recorded and cut everywhere too.
        """
        count = len(recording.operations)
        started = {round((index + 0.5) * count / starts) for index in range(starts)}
        for cut, tree, promises, before in _cuts(recording, every, variants, self._seed):
            self._judge(cut, tree, promises, before)
            if cut.point in started and cut.variant == 0 and cut.names is not Names.JOURNAL:
                self._cut_start(cut, tree, promises)

    def _recorded(self, data: Path, acts: Sequence[str]) -> list[Operation]:
        trace = self._folder / "trace"
        trace.unlink(missing_ok=True)
        for act in acts:
            recorder.record(self._library, data, trace, SCENARIO, str(data), act)
        return list(recorder.operations(trace, data))

    def _cut_start(self, cut: Cut, tree: Tree, promises: Promises) -> None:
        """Cuts the start after a cut, too."""
        data = self._empty("data")
        tree.write(data)
        recording = Recording(cut.play, tree, tuple(self._recorded(data, ["start"])))
        for second, left, _, before in _cuts(recording, 1, 1, self._seed):
            of_start = Cut(cut.play, cut.point, second.what, second.names, second.variant, second.point)
            self.report.cuts_of_starts += 1
            self._judge(of_start, left, promises, before)

    def _judge(self, cut: Cut, tree: Tree, promises: Promises, before: str) -> None:
        report = self.report
        if cut not in self._counted and cut.of_start is None:
            self._counted.add(cut)
            report.process_cuts += cut.what == PROCESS
            report.power_cuts += cut.what == POWER
            report.variants += cut.variant > 0
        key = (tree.key, promises.lines, cut.play)
        if key in self._judged:
            return
        self._judged.add(key)
        report.judged += 1
        left, beside = self._empty("left"), self._empty("beside")
        tree.write(left)
        verdict = self._loop.run_until_complete(judge(left, promises, beside))
        report.note(cut, verdict.problems, before)

    def _empty(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def _cuts(recording: Recording, every: int, variants: int, seed: int) -> Iterator[tuple[Cut, Tree, Promises, str]]:
    """Every cut, what it leaves, what was acknowledged before, and the last operation before it."""
    play, operations = recording.play, recording.operations
    disks = {names: Disk(names, recording.begin) for names in Names}
    promises, before = Promises(), "the beginning"
    for line in recording.found:
        promises.take(line)
    for point in range(len(operations) + 1):
        if point:
            operation = operations[point - 1]
            before = str(operation)
            if operation.path != ACKNOWLEDGED:
                for disk in disks.values():
                    disk.apply(operation)
            elif operation.data:
                promises.take(json.loads(operation.data))
        if point % every:
            continue
        yield Cut(play, point, PROCESS), disks[Names.POSIX].after_process_cut(), promises, before
        for names, disk in disks.items():
            for variant in range(variants + 1):
                chance = Random(f"{seed} {point} {variant}") if variant else None
                yield Cut(play, point, POWER, names, variant), disk.after_power_cut(chance), promises, before


def _tree_of(folder: Path) -> Tree:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return Tree(
        frozenset(name for name, path in found.items() if path.is_dir()),
        {name: path.read_bytes() for name, path in found.items() if path.is_file()},
    )
