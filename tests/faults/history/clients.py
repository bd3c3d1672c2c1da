"""Clients that do at random what callers do, each on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from tests.faults.history.adapters import adapters_of
from tests.faults.history.calls import Calls
from tests.faults.history.choices import ADAPTERS, DETACH, OWNERS, Intent
from tests.faults.history.memory import KnownJob, Memory
from tests.faults.history.messages import STATES, generate_request, what
from tests.faults.history.recorded import Asked, Outcome

NOTHING = Outcome()
AFTER_REFUSAL_S = 0.3
"""How long a client waits that nobody answered."""


class RandomClient:
    """Does what it intends to, one thing after the other."""

    def __init__(self, calls: Calls, intents: Iterator[Intent], memory: Memory, stop: threading.Event) -> None:
        """`stop`: ends it after the call that it is in."""
        self._calls = calls
        self._intents = intents
        self._memory = memory
        self._stop = stop

    def run(self) -> None:
        """Returns once it was stopped."""
        try:
            for intent in self._intents:
                if self._stop.wait(intent.pause_s):
                    return
                if self._do(intent).status == "UNAVAILABLE":
                    self._stop.wait(AFTER_REFUSAL_S)
        finally:
            self._calls.close()

    def _do(self, intent: Intent) -> Outcome:
        match intent.method:
            case "CreateJob" | "Generate":
                return self._make(intent)
            case "ListJobs":
                return self._list(intent)
            case "ListLoras":
                return self._calls.list_loras()
            case "UploadLora" | "DeleteLora" | "InspectLora":
                return self._adapter(intent)
            case _:
                job = self._memory.choose(self._owner(intent), intent.pick)
                return NOTHING if job is None else self._about(intent, job)

    def _owner(self, intent: Intent) -> str:
        """Whose job it is about."""
        own = self._calls.owner
        others = [owner for owner in OWNERS if owner != own]
        return others[intent.variant % len(others)] if intent.is_foreign else own

    def _make(self, intent: Intent) -> Outcome:
        owner = self._owner(intent) if not intent.request_id else self._calls.owner
        drawing = intent.drawing
        adapter = "" if drawing.adapter is None else adapters_of(owner)[drawing.adapter].sha256
        request = generate_request(drawing, request_id=intent.request_id, policy=intent.policy, adapter=adapter)
        drawn = what(drawing, adapter)
        asked = Asked(
            request_id=intent.request_id,
            what="" if drawing.seed is None else drawn,
            request=f"{drawn}, {intent.policy or 'no policy'}",
            is_detached=intent.method == "CreateJob" or intent.policy == DETACH,
            deadline_s=intent.deadline_s if intent.method == "Generate" else None,
            adapter=adapter,
        )
        if intent.method == "CreateJob":
            return self._calls.create(request, asked)
        return self._calls.generate(request, asked, intent.cut_after)

    def _list(self, intent: Intent) -> Outcome:
        states = {}
        if intent.variant == 0:
            number = list(STATES)[int(intent.pick * len(STATES))]
            states = {number: STATES[number]}
        return self._calls.list_pages((3, 20, 100, 1000)[intent.variant], 1 + intent.variant % 3, states)

    def _adapter(self, intent: Intent) -> Outcome:
        owner = self._calls.owner if intent.method == "UploadLora" else self._owner(intent)
        adapter = adapters_of(owner)[int(intent.pick * ADAPTERS)]
        match intent.method:
            case "UploadLora":
                return self._calls.upload(adapter)
            case "InspectLora":
                return self._calls.inspect_lora(adapter.sha256)
            case _:
                return self._calls.delete_lora(adapter.sha256)

    def _redraw(self, intent: Intent, job_id: str) -> Outcome:
        if intent.request_id and not intent.conflicts and not intent.is_foreign:
            job_id = self._memory.redrawn_under(intent.request_id, job_id)
        return self._calls.redraw(
            Asked(job_id=job_id, request_id=intent.request_id, request=f"redraw {job_id}", is_detached=True)
        )

    def _about(self, intent: Intent, job: KnownJob) -> Outcome:
        match intent.method:
            case "WatchJob":
                asked = Asked(
                    job_id=job.job_id,
                    after_sequence=int(job.last_sequence * intent.part),
                    omits_image_bytes=intent.variant == 0,
                )
                return self._calls.watch(asked, intent.cut_after)
            case "GetJob":
                return self._calls.get(job.job_id)
            case "CancelJob":
                by_request = intent.variant == 1 and job.request_id
                return self._calls.cancel(
                    Asked(
                        job_id="" if by_request else job.job_id,
                        request_id=job.request_id if by_request else "",
                        when_unattended=intent.variant == 2,
                    )
                )
            case "DeleteJob":
                return self._calls.delete(job.job_id)
            case "RedrawJob":
                return self._redraw(intent, job.job_id)
            case _:
                offset = int(job.image_bytes * intent.part)
                return self._calls.get_image(Asked(job_id=job.job_id, offset_bytes=offset), intent.cut_after)
