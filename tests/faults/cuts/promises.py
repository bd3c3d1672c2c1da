"""What the store has acknowledged by some point, folded from the scenario's own lines.

A step that was attempted and not acknowledged may have happened or not: what it changes is then `None`, unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.cuts.scenario import KEEP_JOBS, secret


@dataclass
class PromisedJob:
    """What is known of a job. `None` for a fact: unknown."""

    id: str
    name: str
    prompt: str | None
    """What it is to draw; None where that is not known."""
    owner: str
    request_id: str | None
    is_kept: bool | None = None
    """False once it was deleted."""
    has_ended: bool | None = False
    is_cancelled: bool | None = False
    """Whether its cancellation was acknowledged."""
    is_released: bool | None = False
    """Whether another one may have its request id."""
    attempts: int = 0
    begins: bool = False
    """Whether one more attempt may have been counted."""
    images: tuple[str, ...] = ()
    """Of its end, once it is attempted."""
    sequence: int = 0
    """Of its end."""


@dataclass
class Promises:
    """All of it. Jobs are in the order of admission."""

    jobs: dict[str, PromisedJob] = field(default_factory=dict)
    owned: dict[tuple[str, str], bool | None] = field(default_factory=dict)
    """Whether an owner has an adapter: by its hash and the owner's name."""
    lines: int = 0
    """How many lines were read."""
    _ended: list[str] = field(default_factory=list)

    def take(self, line: Mapping[str, Any]) -> None:
        """One more line of the scenario."""
        self.lines += 1
        getattr(self, f"_{line['does']}")(line, line["done"])

    def owns(self, sha256: str, owner: str) -> bool | None:
        """Whether it does; None where that is unknown."""
        return self.owned.get((sha256, owner), False)

    @property
    def adapters(self) -> set[str]:
        """Hashes of all that ever were."""
        return {sha256 for sha256, _ in self.owned}

    def _insert(self, line: Mapping[str, Any], done: bool) -> None:
        job = self.jobs.setdefault(
            line["job"],
            PromisedJob(line["job"], line["name"], secret(line["name"]), line["owner"], line["request_id"]),
        )
        job.is_kept = True if done else None

    def _find(self, line: Mapping[str, Any], done: bool) -> None:
        """A job of an earlier version was there before anything else."""
        job_id = line["job"]
        self.jobs[job_id] = PromisedJob(
            job_id,
            job_id,
            None,
            line["owner"],
            line["request_id"],
            is_kept=done,
            has_ended=line["ended"],
            is_cancelled=line["cancelled"],
            attempts=line["attempts"],
            images=tuple(line["images"]),
            sequence=line["sequence"],
        )
        if line["ended"]:
            self._ended.append(job_id)

    def _begin(self, line: Mapping[str, Any], done: bool) -> None:
        job = self.jobs[line["job"]]
        job.attempts += done
        job.begins = not done

    def _put(self, line: Mapping[str, Any], done: bool) -> None:
        """Nobody is told of an image before its job has ended."""

    def _finish(self, line: Mapping[str, Any], done: bool) -> None:
        job = self.jobs[line["job"]]
        job.has_ended = True if done else None
        job.images, job.sequence = tuple(line["images"]), line["sequence"]
        if not done:
            self._ended.append(job.id)
            for job_id in self._ended[:-KEEP_JOBS]:
                self.jobs[job_id].is_kept = None  # the oldest may be forgotten for it

    def _cancel(self, line: Mapping[str, Any], done: bool) -> None:
        self.jobs[line["job"]].is_cancelled = True if done else None

    def _release(self, line: Mapping[str, Any], done: bool) -> None:
        self.jobs[line["job"]].is_released = True if done else None

    def _delete(self, line: Mapping[str, Any], done: bool) -> None:
        self.jobs[line["job"]].is_kept = False if done else None
        if done:
            self._ended.remove(line["job"])

    def _own(self, line: Mapping[str, Any], done: bool) -> None:
        key = (line["sha256"], line["owner"])
        if done or not self.owned.get(key):
            self.owned[key] = True if done else None

    def _disown(self, line: Mapping[str, Any], done: bool) -> None:
        self.owned[line["sha256"], line["owner"]] = False if done else None
