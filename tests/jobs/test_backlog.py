"""Jobs that wait: what is remembered of their adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.jobs.backlog import Backlog
from chromarpc_server.jobs.estimates import StepTimes
from chromarpc_server.jobs.job import Job
from chromarpc_server.jobs.queue import ScheduledJob
from chromarpc_server.pipeline import CheckpointFiles
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.running_time import RunningTime
from tests.jobs.takers import StubTaker

KEPT, FETCHED = "aa" * 32, "bb" * 32


class Adapters:
    """Fetches the second of two adapters."""

    def __init__(self, second: AdapterFile) -> None:
        self._second = second

    async def fetch(self, _: Any, found: FoundAdapters, **__: Any) -> FoundAdapters:
        download = SimpleNamespace(sha256=FETCHED, release=lambda: None)
        return FoundAdapters((found.files[0], self._second), (download,))  # type: ignore[arg-type]


class Store:
    """Takes what is known of adapters."""

    def __init__(self) -> None:
        self.noted: asyncio.Future[list[str | None]] = asyncio.get_running_loop().create_future()

    async def note_adapters(self, _: Job, known: list[Any]) -> None:
        self.noted.set_result([one.sha256 for one in known])


async def test_a_recovered_job_of_which_one_download_is_gone_fetches_that_one_and_remembers_both(
    tmp_path: Path,
) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(b"x")
        files.append(AdapterFile.of(tmp_path / name, "loras.0.path"))
    plan = Plan(
        model="chroma",
        served_model="chroma",
        profile="reference",
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(PlannedPrompt("a", 64, 64, 1, 4.0, 1),),
        loras=tuple(PlannedLora(f"https://example.org/{name}", 1.0) for name in ("first", "second")),
        output=PlannedOutput(ImageFormat.PNG, 95),
        preview=None,
        warnings=(),
    )
    job = Job(plan, (), Cancellation(), adapter_hashes=(KEPT, FETCHED))
    store = Store()
    backlog = Backlog(Adapters(files[1]), store, None, StepTimes(), RunningTime(), max_jobs=1)  # type: ignore[arg-type]
    backlog.open()
    model_files = CheckpointFiles(Path("t"), Path("e"), Path("k"), Path("v"))
    backlog.schedule(ScheduledJob(job, model_files, FoundAdapters((files[0], None))))
    assert await asyncio.wait_for(store.noted, 10) == [KEPT, FETCHED]
    assert (await asyncio.wait_for(backlog.next(StubTaker()), 10)).job is job
