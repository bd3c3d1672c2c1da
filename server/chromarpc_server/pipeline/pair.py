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

from collections.abc import Sequence
from typing import Protocol

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
from chromarpc_server.pipeline.progress import SILENT, LoadContext, LoadProgress
from chromarpc_server.pipeline.sampling import Velocity


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

    def __init__(self, first: Transformer, second: Transformer, device: torch.device) -> None:
        """Takes two with nothing in them yet, or with the same adapters; `device` is where the second one lies."""
        self.first = first
        self.second = second
        self._device = device

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
    def size_bytes(self) -> int:
        """See `Transformer.size_bytes`."""
        return max(self.first.size_bytes, self.second.size_bytes)

    def growth_bytes(self, adapters: AdapterSet) -> int:
        """See `Transformer.growth_bytes`."""
        return max(self.first.growth_bytes(adapters), self.second.growth_bytes(adapters))

    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """See `Transformer.switch`: first one, then the other, each from the same master weights.

        Each knows what is in it, so that a switch that ended between the two is repaired like any other.
        """
        one = self.first.switch(adapters, _half(context, 0))
        with on_device(self._device):
            other = self.second.switch(adapters, _half(context, 1))
        return SwitchReport(max(one.rewritten_tensors, other.rewritten_tensors))

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`. Without guidance there is one pass, and the second device has no part."""
        conditional = self.first.velocity(texts[:1], timesteps, grid)
        if len(texts) == 1:
            return conditional
        device = self._device
        there = timesteps.to(device)
        with on_device(device):
            text = Text.of(texts[1].embeds, texts[1].mask, there)
            unconditional = self.second.velocity([text], there, grid)

        def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            sent = latents.to(device)
            with on_device(device):
                other, _ = unconditional(sent, index)
            own, _ = conditional(latents, index)
            # Only now: the copy waits for all that the first device was given.
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
        with on_device(self._device):
            others = [Text.of(text.embeds, text.mask, there) for text in texts[1:2]]
            if others:
                self.second.record(others, there, grid)

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """See `Transformer.fallbacks`: of both, and that the second one computes without kernels."""
        kernels = kernels_fallback(self._device)
        found = (*self.first.fallbacks, *self.second.fallbacks, *([] if kernels is None else [kernels]))
        return tuple(dict.fromkeys(found))


def _half(context: LoadContext, number: int) -> LoadContext:
    """Of a switch of two transformers, the one of this number, which does half of it."""

    def report(progress: LoadProgress) -> None:
        total = progress.total_bytes
        context.progress(LoadProgress(progress.stage, number * total + progress.done_bytes, 2 * total))

    return LoadContext(context.check, report)
