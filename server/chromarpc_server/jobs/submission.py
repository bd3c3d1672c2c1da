"""A request on its way to being a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from chromarpc_server.domain.callers import NOBODY, Caller
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.domain.plan import Plan
from chromarpc_server.jobs.store.stored_jobs import StoredRequest

FINGERPRINT_PREFIX = "2:"
"""Of the fingerprints that are made now. Those of versions up to 0.1.0 have none."""


@dataclass(frozen=True)
class Fingerprint:
    """Tells a request from others under the same request id."""

    current: str
    """What a new job is stored with: `2:` and a hash."""
    legacy: str | None = None
    """What 0.1.0 stored for the same request; None where it had no such request."""

    def matches(self, stored: str) -> bool:
        """Whether a stored job was made by the same request."""
        return stored == (self.current if stored.startswith(FINGERPRINT_PREFIX) else self.legacy)


@dataclass(frozen=True)
class Submission:
    """What a caller asks for, resolved, and what belongs to the call alone."""

    plan: Plan
    spec: ModelSpec
    """The model that computes (`plan.served_model`)."""
    fingerprint: Fingerprint
    """Of the request: another one under the same request id has another."""
    caller: Caller = NOBODY
    """Whose job it will be."""
    deadline_at: float | None = None
    """When the caller stops waiting, as `time.monotonic()` gives it; None if it never does."""
    hf_token: str | None = field(default=None, repr=False)
    """For adapters that are fetched from Hugging Face; forgotten once they are."""
    redrawn: StoredRequest | None = None
    """What an earlier job was asked for, if that is drawn again: with the adapters that it had, or not at all."""
