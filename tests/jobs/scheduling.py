"""Jobs that wait, and devices as the queue sees them, for tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.domain.plan import Plan, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.model_cache import SetKey

FILES: Any = None


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


def scheduled(owner: str = "", model: str = "m", profile: str = "reference", steps: int = 1) -> ScheduledJob:
    """A job of 16 × 16 pixels and so many steps."""
    plan = Plan(
        model=model,
        served_model=model,
        profile=profile,
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(PlannedPrompt("a", 16, 16, steps, 4.0, 1),),
        loras=(),
        output=PlannedOutput(ImageFormat.PNG, 95),
        preview=None,
        warnings=(),
    )
    return ScheduledJob(Job(plan, (), Cancellation(), owner=owner), FILES, FoundAdapters(()))
