"""What a tool found and did, for people and as JSON. Never what a prompt says, nor a token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from chromarpc_server.maintenance.files import ListedFile


class CannotBeDone(Exception):
    """The message is one sentence: which file, why, and what to do."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    subject: str
    """What is wrong: a file by its path below the data folder, a job by its id."""
    why: str
    advice: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.why}; {self.advice}"


@dataclass
class Report:
    """Grows while a tool works."""

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    """What was changed, and what the reader has to know about it; a sentence each."""
    listed: dict[str, list[ListedFile]] = field(default_factory=dict)
    """Files that nothing names, by the folder they lie in."""

    def add(self, subject: str, why: str, advice: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(subject, why, advice))

    def count(self, what: str, number: int = 1) -> None:
        """Adds to a count, which shows even if it stays 0."""
        self.counts[what] = self.counts.get(what, 0) + number

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{what}: {number}" for what, number in self.counts.items()]
        for folder, files in self.listed.items():
            lines += [f"{folder}/{file}" for file in files]
        lines += self.done
        lines += [f"problem: {problem}" for problem in self.problems]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "ok": not self.problems,
            "counts": self.counts,
            "problems": [asdict(problem) for problem in self.problems],
            "done": self.done,
            "listed": {folder: [asdict(file) for file in files] for folder, files in self.listed.items()},
        }
