"""Jobs that ended, drawn again: a new job gets the stored plan, the seeds that were drawn and the same adapters.

On the same device, with the same version and settings, it draws the same bytes. Images are kept under their hash:
those of the earlier job that were damaged are then whole again too. Lives on the event loop.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import InvalidParameter, JobNotEnded, JobNotFound, NotKept, StoreUnavailable
from chromarpc_server.domain.resolve import PictureRecords, Serving, model_not_found
from chromarpc_server.domain.sampling_options import require_known_sampling
from chromarpc_server.jobs.admission import Admission
from chromarpc_server.jobs.housekeeping import HOUSEKEEPING_S
from chromarpc_server.jobs.job import AnyJob, Job
from chromarpc_server.jobs.recovery import plan_for_now
from chromarpc_server.jobs.registry import JobRegistry
from chromarpc_server.jobs.store.job_store import JobStore
from chromarpc_server.jobs.store.stored_jobs import StoredRequest
from chromarpc_server.jobs.submission import FINGERPRINT_PREFIX, Fingerprint, Submission


@dataclass(frozen=True)
class Redraw:
    """Which job a caller wants drawn again."""

    job_id: str
    caller: Caller
    request_id: str | None = None
    """Under which the call may be repeated."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Tells it from other redraws, and from requests: the form that is hashed of those begins with a brace."""
        digest = hashlib.sha256(f"redraw {self.job_id}".encode()).hexdigest()
        return Fingerprint(FINGERPRINT_PREFIX + digest)


class Redrawing:
    """Makes new jobs of ended ones, however those ended."""

    def __init__(self, registry: JobRegistry, store: JobStore, admission: Admission) -> None:
        """`registry` and `store` have the jobs that ended; `admission` takes the new ones."""
        self._registry = registry
        self._store = store
        self._admission = admission

    async def redraw(self, redraw: Redraw, serving: Serving) -> tuple[AnyJob, bool]:
        """Admits a detached job that draws what an earlier one of the caller's drew, or was to draw.

        Errors blame fields of the earlier job's request, but for its id.

        Args:
            redraw: which one.
            serving: what the settings say about requests now.

        Returns:
            The new job, and whether the same call had made it before.

        Raises:
            JobNotFound: the caller has no such job.
            JobNotEnded: it waits or runs.
            NotKept: its prompts are not stored, or an adapter would have to be fetched with a token.
            ModelNotFound: its model is not served any more.
            InvalidParameter: its profile is not served any more, or a sampler or schedule of it is not known.
            ChromaError: see `Admission.submit`.
        """
        known = await self._registry.existing(redraw.caller.name, redraw.request_id, redraw.fingerprint)
        if known is not None:  # also where the earlier job is forgotten by now
            return known, True
        stored = await self._stored(redraw)
        if not stored.has_prompts:
            raise NotKept("the job was stored without its prompts", field="prompts")
        plan = stored.plan
        spec = serving.models.get(plan.served_model)
        if spec is None:
            raise model_not_found(plan.served_model, serving.models)
        if plan.profile not in serving.profiles:
            raise InvalidParameter(f"this server has no numerics profile {plan.profile} any more", field="profile")
        require_known_sampling(plan)
        plan = plan_for_now(plan, picture_records=serving.picture_records is PictureRecords.WRITTEN)
        return await self._admission.submit(
            Submission(
                # How long the earlier job was to wait, and who might come back to it, was about its caller.
                replace(plan, request_id=redraw.request_id, detached=True, may_return=False, max_queue_s=None),
                spec,
                redraw.fingerprint,
                caller=redraw.caller,
                redrawn=stored,
            )
        )

    async def _stored(self, redraw: Redraw) -> StoredRequest:
        job = await self._registry.get(redraw.caller.name, redraw.job_id)
        if not job.log.closed:
            raise JobNotEnded("the job has not ended, so it is still being drawn", field="job_id")
        if isinstance(job, Job):
            raise StoreUnavailable("the job's end cannot be stored now", retry_after_s=HOUSEKEEPING_S)
        stored = await self._store.request_of(redraw.caller.name, redraw.job_id)
        if stored is None:
            raise JobNotFound("the job was deleted meanwhile", field="job_id")
        return stored
