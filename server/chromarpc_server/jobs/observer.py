"""Observers of jobs: metrics and traces are notified of everything, and change nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from chromarpc_server.domain.events import Event
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.runtime.work import StageDone

log = logging.getLogger(__name__)


class JobObserver:
    """Is notified on the event loop; must not block. An error of its own is logged and harms no job."""

    def __init__(
        self,
        *,
        event: Callable[[Job, Event], None],
        read: Callable[[LoggedEvent], None] | None = None,
        stage: Callable[[Job, StageDone], None] | None = None,
    ) -> None:
        """Any of three functions.

        Args:
            event: called with every event as it happens.
            read: called with every event that a reader has taken.
            stage: called with every stage that is done.
        """
        self._event = event
        self._read = read
        self._stage = stage

    def on_event(self, job: Job, event: Event) -> None:
        """An event has happened."""
        self._safely(self._event, job, event)

    def on_read(self, logged: LoggedEvent) -> None:
        """A reader has taken an event."""
        self._safely(self._read, logged)

    def on_stage(self, job: Job, done: StageDone) -> None:
        """A stage is done."""
        self._safely(self._stage, job, done)

    def _safely(self, call: Callable[..., None] | None, *arguments: Any) -> None:
        if call is None:
            return
        try:
            call(*arguments)
        except Exception:
            log.exception("job.observer_failed")
