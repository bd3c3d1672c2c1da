"""Two equal devices that draw one image: each has the weights and makes one of guidance's two passes.

The first one has everything else, too: text encoder, sampler, decoder. In every step it sends its latents to the
second one, which makes the unconditional pass meanwhile, and takes the velocity back. Both are copies from device
to device: torch puts such a copy into the source's stream, where it waits for what the target's stream was given
before, and has the target's stream wait for the copy. So the devices wait for each other and the host for neither.
Nothing of it is inside a recorded step: each device replays graphs of its own.

What a pass computes does not depend on where it is made. A profile that makes its passes one after the other gives
the same bits as on one device; one that packs both into one sequence differs from that in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from threading import Lock
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.denoising import Text, VelocityMaker
from chromarpc_server.pipeline.device import on_device
from chromarpc_server.pipeline.fused.check import kernels_fallback
from chromarpc_server.pipeline.merged_transformer import AdapterSet, SwitchReport
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.progress import SILENT, LoadContext, LoadProgress, Progress
from chromarpc_server.pipeline.sampling import Velocity

_T = TypeVar("_T")


class Transformer(VelocityMaker, Protocol):
    """Whatever a profile draws with: weights in which adapters are switched, on one device or on two."""

    @property
    def config(self) -> ChromaConfig:
        """Sizes."""
        ...

    @property
    def profile(self) -> NumericsProfile:
        """What it is run with."""
        ...

    @property
    def settings(self) -> TrainerSettings | None:
        """What the trainer's config says, where it draws the trainer's image."""
        ...

    @property
    def rounded(self) -> bool:
        """Whether its weights were rounded to float8, or to what the trainer's config says."""
        ...

    @property
    def text_settings(self) -> TrainerSettings | None:
        """Which of `TrainerParts`' text encoders it is used with; None: with the checkpoint's own."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of everything it holds on a device: of two, on each."""
        ...

    def growth_bytes(self, adapters: AdapterSet) -> int:
        """What it would hold more than now, once it was switched to these adapters; of two devices, on each."""
        ...

    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """Makes the weights those with `adapters`. Stopped or failing, it leaves what the next switch repairs.

        Args:
            adapters: in order, with their multipliers.
            context: reports how many bytes of those to rewrite are done; checked between tensors.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: a weight has a row that the trainer's quantizer turns into NaN.
        """
        ...

    @property
    def records_ahead(self) -> bool:
        """Whether `record` is any use."""
        ...

    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """Has a step for prompts of this length and images of this size ready, without running it."""
        ...

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """What its forward does without, as far as it was tried."""
        ...


class TransformerPair:
    """The same transformer on two devices. Belongs to the one thread that owns both."""

    def __init__(
        self, first: Transformer, second: Transformer, device: torch.device, helper: Executor | None = None
    ) -> None:
        """Takes two with nothing in them yet, or with the same adapters.

        Args:
            first: on the device that has the latents.
            second: on the other one.
            device: where the second one lies.
            helper: another thread, which gives the second device its work where giving it takes as long as
                computing it; None to give it all on one thread.
        """
        self.first = first
        self.second = second
        self._device = device
        self._helper = helper

    @property
    def config(self) -> ChromaConfig:
        """See `Transformer.config`."""
        return self.first.config

    @property
    def profile(self) -> NumericsProfile:
        """See `Transformer.profile`."""
        return self.first.profile

    @property
    def settings(self) -> TrainerSettings | None:
        """See `Transformer.settings`."""
        return self.first.settings

    @property
    def rounded(self) -> bool:
        """See `Transformer.rounded`."""
        return self.first.rounded

    @property
    def text_settings(self) -> TrainerSettings | None:
        """See `Transformer.text_settings`."""
        return self.first.text_settings

    @property
    def size_bytes(self) -> int:
        """See `Transformer.size_bytes`."""
        return max(self.first.size_bytes, self.second.size_bytes)

    def growth_bytes(self, adapters: AdapterSet) -> int:
        """See `Transformer.growth_bytes`."""
        return max(self.first.growth_bytes(adapters), self.second.growth_bytes(adapters))

    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """See `Transformer.switch`: both, each from the same master weights.

        Each knows what is in it, so that a switch of which only one was done is repaired like any other.
        """
        progress = _JointProgress(context.progress)

        def one() -> SwitchReport:
            return self.first.switch(adapters, LoadContext(context.check, progress.of(0)))

        def other() -> SwitchReport:
            return self.second.switch(adapters, LoadContext(context.check, progress.of(1)))

        reports = self._both(one, other, self._helper)
        return SwitchReport(max(report.rewritten_tensors for report in reports))

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`. Without guidance there is one pass, and the second device has no part."""
        if len(texts) == 1:
            return self.first.velocity(texts, timesteps, grid)
        there = timesteps.to(self._device)
        text = Text(texts[1].embeds.to(self._device), texts[1].mask.to(self._device))
        # In float32 this thread has the process's precision of products for the whole step (see `precision`), and
        # the other one might wait for it.
        beside = self._helper if text.embeds.dtype == torch.bfloat16 else None
        # What all steps have in common takes milliseconds, and then the host waits for it.
        conditional, unconditional = self._both(
            lambda: self.first.velocity(texts[:1], timesteps, grid),
            lambda: self.second.velocity([text], there, grid),
            beside,
        )
        helper = None if self.profile.fused else beside  # a recorded step is given in no time

        def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            sent = latents.to(self._device)
            (own, _), (other, _) = self._both(
                lambda: conditional(latents, index), lambda: unconditional(sent, index), helper
            )
            # Only now: this copy waits for whatever the first device was given before.
            return own, other.to(latents.device)

        return velocity

    @property
    def records_ahead(self) -> bool:
        """See `Transformer.records_ahead`."""
        return self.first.records_ahead

    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """See `Transformer.record`."""
        self.first.record(texts[:1], latents, grid)
        there = latents.to(self._device)
        others = [Text.of(text.embeds, text.mask, there) for text in texts[1:]]
        if others:
            self._on_second(lambda: self.second.record(others, there, grid))

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """See `Transformer.fallbacks`: of both, and that the second one computes without kernels."""
        kernels = kernels_fallback(self._device)
        found = (*self.first.fallbacks, *self.second.fallbacks, *([] if kernels is None else [kernels]))
        return tuple(dict.fromkeys(found))

    def _on_second(self, work: Callable[[], _T]) -> _T:
        """Gives the second device work, as the current one."""
        with on_device(self._device):
            return work()

    def _both(self, one: Callable[[], _T], other: Callable[[], _T], helper: Executor | None) -> tuple[_T, _T]:
        """Gives each device its work, the second one from another thread where there is one.

        When this returns or raises, nobody gives either of them more.
        """
        if helper is None:
            found = self._on_second(other)
            return one(), found

        @torch.inference_mode()
        def give() -> _T:
            return self._on_second(other)

        given = helper.submit(give)
        try:
            own = one()
        finally:
            wait([given])
        return own, given.result()


class _JointProgress:
    """Reports two switches, which may run at the same time, as one of twice the size."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._one_at_a_time = Lock()
        self._done = [0, 0]

    def of(self, number: int) -> Progress:
        """What one of them reports to."""

        def report(progress: LoadProgress) -> None:
            with self._one_at_a_time:
                self._done[number] = progress.done_bytes
                self._report(LoadProgress(progress.stage, sum(self._done), 2 * progress.total_bytes))

        return report
