"""What the clients of all owners know together of jobs: which to ask for next."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class KnownJob:
    """A job that an owner was told of."""

    job_id: str
    request_id: str = ""
    last_sequence: int = 0
    """The highest that a client was told."""
    image_bytes: int = 0
    """Of its first image, once that is known."""


class Memory:
    """Jobs by owner, in the order in which they were told. May be used on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, dict[str, KnownJob]] = {}
        self._redrawn: dict[str, str] = {}

    def told(
        self, owner: str, job_id: str, *, request_id: str = "", sequence: int = 0, image_bytes: int = 0
    ) -> None:
        """A client of the owner was told of a job."""
        with self._lock:
            job = self._jobs.setdefault(owner, {}).setdefault(job_id, KnownJob(job_id))
            job.request_id = job.request_id or request_id
            job.last_sequence = max(job.last_sequence, sequence)
            job.image_bytes = job.image_bytes or image_bytes

    def choose(self, owner: str, pick: float) -> KnownJob | None:
        """One of the owner's jobs, a new one more often than an old one; the same for equal knowledge."""
        with self._lock:
            jobs = list(self._jobs.get(owner, {}).values())
        return jobs[-1 - int(len(jobs) * pick**3)] if jobs else None

    def redrawn_under(self, request_id: str, job_id: str) -> str:
        """The job that is always redrawn under a request id: this one, unless another one was before."""
        with self._lock:
            return self._redrawn.setdefault(request_id, job_id)

    def all_of(self, owner: str) -> list[KnownJob]:
        """Every job of the owner."""
        with self._lock:
            return list(self._jobs.get(owner, {}).values())
