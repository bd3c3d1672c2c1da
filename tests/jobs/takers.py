"""Devices as the queue sees them, for tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from chromarpc_server.jobs.job import Job
from chromarpc_server.runtime.model_cache import SetKey


@dataclass(eq=False)
class StubTaker:
    """What a test says of a device."""

    model: str = "card"
    used_s: float = 0.0
    profiles: Collection[str] = ()
    """That it can compute; all, where none is named."""
    resident: Collection[str] = ()
    """Models whose weights it has."""
    parsed: Collection[str] = ()
    """Models whose jobs' adapters are parsed."""

    def can_compute(self, job: Job) -> bool:
        return not self.profiles or job.plan.profile in self.profiles

    def is_resident(self, key: SetKey) -> bool:
        return key.model_id in self.resident

    def has_parsed(self, job: Job) -> bool:
        return job.plan.model in self.parsed
