"""From a request's message to a job: the way that `Generate` and `CreateJob` share."""

from __future__ import annotations

import time
from dataclasses import replace

from chromarpc.v1 import generation_service_pb2
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.jobs.job import AnyJob
from chromarpc_server.jobs.submission import Submission
from chromarpc_server.runtime.device import withheld_because
from chromarpc_server.transport.messages.fingerprints import fingerprint
from chromarpc_server.transport.messages.jobs import require_describable
from chromarpc_server.transport.messages.requests import generation_request


async def submit(
    engine: Engine,
    serving: Serving,
    request: generation_service_pb2.GenerateRequest,
    *,
    detach: bool = False,
    deadline_s: float | None = None,
) -> tuple[AnyJob, bool]:
    """The job of a request, and whether the same request had made it before.

    Args:
        engine: what runs jobs.
        serving: what the settings say about requests.
        request: of the current caller.
        detach: let the job go on without its caller, whatever the request says.
        deadline_s: seconds until the call's deadline, which only a job with an attached caller has.

    Raises:
        ChromaError: the request cannot be served.
    """
    plan = resolve(generation_request(request), serving)
    if detach:
        plan = replace(plan, detached=True)
    require_describable(plan)
    withheld = withheld_because(plan.profile, plan.served_model, engine.status().devices)
    if withheld:
        raise InvalidParameter(withheld, field="profile")
    deadline_at = None if plan.detached or deadline_s is None else time.monotonic() + deadline_s
    return await engine.submit(
        Submission(
            plan,
            serving.models[plan.served_model],
            caller=current_caller(),
            deadline_at=deadline_at,
            hf_token=request.hf_token or None,
            fingerprint=fingerprint(request),
        )
    )
