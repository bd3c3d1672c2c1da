"""A request on its way to being a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import Plan


@dataclass(frozen=True)
class Submission:
    """What a caller asks for, resolved, and what belongs to the call alone."""

    plan: Plan
    spec: ModelSpec
    """The model that computes (`plan.served_model`)."""
    caller: Caller = NOBODY
    """Whose job it will be."""
    deadline_at: float | None = None
    """When the caller stops waiting, as `time.monotonic()` gives it; None if it never does."""
    hf_token: str | None = field(default=None, repr=False)
    """For adapters that are fetched from Hugging Face; forgotten once they are."""
    fingerprint: str = ""
    """Of the request: another one under the same request id has another fingerprint."""
