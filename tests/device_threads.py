"""Device threads of one process that share a host, and images of theirs; for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.limits import Budgets
from chromarpc_server.domain.plan import Plan, PlannedLora, PlannedOutput, PlannedPrompt
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import CheckpointFiles, DeviceChoice
from chromarpc_server.runtime.cancellation import Cancellation
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.host_share import HostShare
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.runtime.work import Pixels, RenderedImage, Report, Work

MODEL = "chroma-mini"


def files_in(folder: Path) -> CheckpointFiles:
    """A checkpoint's files, laid out as chroma-mini's."""
    return CheckpointFiles(
        transformer=folder / "chroma-mini.safetensors",
        text_encoder=folder / "text_encoder_2",
        tokenizer=folder / "tokenizer_2",
        vae=folder / "vae",
    )


class Host:
    """Devices of one process, with what they share."""

    def __init__(self, choices: Sequence[DeviceChoice], budgets: Budgets | None = None) -> None:
        self.share = HostShare.within(budgets or Budgets())
        self.devices = [DeviceThread(choice, RunningTime(), budgets, None, self.share) for choice in choices]

    async def __aenter__(self) -> Host:
        for device in self.devices:
            await device.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for device in self.devices:
            device.close()

    async def draw(self, index: int, works: Sequence[Work]) -> list[Pixels]:
        """Each work's image, on one device."""
        images = []
        for work in works:
            reports: list[Report] = []
            await self.devices[index].run(work, reports.append)
            images += [report.pixels for report in reports if isinstance(report, RenderedImage)]
        return images


def work_of(
    folder: Path,
    profile: str,
    adapter: Path | None = None,
    *,
    trainer: TrainerSettings | None = None,
    size: tuple[int, int] = (64, 64),
    multiplier: float = 0.7,
    steps: int = 2,
) -> Work:
    """One image of the checkpoint in `folder`."""
    files = () if adapter is None else (AdapterFile.of(adapter, "path"),)
    plan = Plan(
        model=MODEL,
        served_model=MODEL,
        profile=profile,
        noise_draw=NoiseDraw.FLOAT32,
        prompts=(PlannedPrompt("a red circle", *size, steps, 4.0, 7, neg="blue" if trainer else ""),),
        loras=tuple(PlannedLora(file.path.name, multiplier) for file in files),
        output=PlannedOutput(ImageFormat.PNG, 95),
        preview=None,
        warnings=(),
        request_id=None,
        trainer=trainer,
    )
    return Work(profile, plan, files_in(folder), files, Cancellation())
