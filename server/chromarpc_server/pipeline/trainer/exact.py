"""`preview-exact`: the trainer's own sequence of operations, with its weights and adapters as it holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters.change import Kronecker
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.merged_transformer import AdapterSet, SwitchReport
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.positions import rope_table
from chromarpc_server.pipeline.models.transformer import linear_weights
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.progress import SILENT, LoadContext
from chromarpc_server.pipeline.sampling import Velocity
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, trainer_arithmetic
from chromarpc_server.pipeline.trainer.forward import (
    TrainerLinear,
    TrainerTransformer,
    attended_text,
    attention_mask,
)
from chromarpc_server.pipeline.trainer.held import HeldWeights
from chromarpc_server.pipeline.trainer.paths import (
    Path,
    Placed,
    add_to_quantized,
    kronecker_path,
    merge,
    pair_of,
    place,
)
from chromarpc_server.pipeline.trainer.sizes import factor_bytes
from chromarpc_server.pipeline.weights.quantizers import Bias, QuantizedLinear, quantize_linear
from chromarpc_server.pipeline.weights.stored import StoredTensor


class ExactPreview:
    """One transformer's weights as the trainer holds them. Belongs to the thread that owns the device."""

    def __init__(
        self,
        config: ChromaConfig,
        master: Mapping[str, StoredTensor],
        profile: NumericsProfile,
        settings: TrainerSettings,
        *,
        device: torch.device,
    ) -> None:
        """Allocates nothing; the first `switch` does.

        Args:
            config: sizes.
            master: parameters by name, as they are stored, on the device or in host memory.
            profile: `preview-exact`.
            settings: what the trainer's config says.
            device: where it computes, in the trainer's dtype.
        """
        self.profile = profile
        self.settings = settings
        self.text_settings = settings
        self.rounded = True
        self.config = config
        self._device = device
        self._dtype = TORCH_DTYPES[settings.dtype]
        self._linear_names = frozenset(linear_weights(config))
        self._weights: dict[str, QuantizedLinear] = {}
        self._others: dict[str, Tensor] = {}
        self._held = HeldWeights(master, settings, device=device)
        self._transformer: TrainerTransformer | None = None
        self._beside_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Of the weights and adapters it holds."""
        weights = [held.weight for held in self._weights.values()]
        scales = [held.scale for held in self._weights.values() if held.scale is not None]
        return sum(tensor.nbytes for tensor in (*weights, *scales, *self._others.values())) + self._beside_bytes

    def growth_bytes(self, adapters: AdapterSet) -> int:
        """What it would hold more than now, once it was switched to these adapters."""
        return max(0, factor_bytes(adapters, tuple(self._linear_names), self.settings) - self._beside_bytes)

    @property
    def transformer(self) -> TrainerTransformer:
        """What it runs, once the weights are there."""
        if self._transformer is None:
            raise RuntimeError("velocity before switch")
        return self._transformer

    @torch.inference_mode()
    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """Makes the weights those that the trainer would sample with, given these adapters.

        Args:
            adapters: in order, with their multipliers.
            context: reports how many bytes of those to rewrite are done; checked between tensors.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: a weight has a row that the quantizer turns into NaN.
        """
        self._transformer = None
        placement = place(adapters, sorted(self._linear_names), self.settings)
        written = self._held.rewrite(placement, self._write, context)
        beside = {
            name.removesuffix(".weight"): tuple(self._path(placed) for placed in those)
            for name, those in placement.beside.items()
        }
        self._beside_bytes = sum(path.size_bytes for paths in beside.values() for path in paths)
        linears = {
            name.removesuffix(".weight"): TrainerLinear(
                weight,
                self._others.get(f"{name.removesuffix('.weight')}.bias"),
                beside.get(name.removesuffix(".weight"), ()),
            )
            for name, weight in self._weights.items()
        }
        self._transformer = TrainerTransformer(self.config, linears, self._others)
        return SwitchReport(written)

    def _write(self, name: str, weight: Tensor, merged: Sequence[Placed], added: Sequence[Placed]) -> Tensor:
        with trainer_arithmetic(self._device, self.settings):
            return self._write_as_trainer(name, weight, merged, added)

    def _write_as_trainer(
        self, name: str, weight: Tensor, merged: Sequence[Placed], added: Sequence[Placed]
    ) -> Tensor:
        for placed in merged:
            weight = merge(placed.change, weight, placed.multiplier)
        if name not in self._linear_names:
            self._others[name] = weight
            return weight
        held = quantize_linear(weight, self.settings.qtype if self.settings.quantize else None)
        if added:
            whole = held.dequantized
            for placed in added:
                whole = add_to_quantized(placed.change, whole, placed.multiplier)
            held = QuantizedLinear(whole, Bias.FUSED)
        self._weights[name] = QuantizedLinear(held.weight, held.bias, held.scale)
        return held.weight

    def _path(self, placed: Placed) -> Path:
        if isinstance(placed.change, Kronecker):
            return kronecker_path(placed.change, placed.multiplier, self._device)
        pair = pair_of(placed.change)
        if pair is None:
            raise TypeError(f"a {type(placed.change).__name__} has no path beside its layer")
        return pair.path(placed.multiplier, self._device)

    @torch.inference_mode()
    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`: one pass after the other, on one thread on a CPU."""
        transformer = self.transformer
        rope = rope_table(self.config, texts[0].embeds.shape[1], grid, timesteps.device)
        masks = [
            attention_mask(attended_text(text.mask, self._dtype), grid[0] * grid[1], self.config.num_heads)
            for text in texts
        ]

        def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            timestep = timesteps[index : index + 1]
            with trainer_arithmetic(self._device, self.settings):
                passes = [
                    transformer(latents, text.embeds, timestep, rope, mask)
                    for text, mask in zip(texts, masks, strict=True)
                ]
            return passes[0], passes[1] if len(passes) > 1 else None

        return velocity

    @property
    def records_ahead(self) -> bool:
        """Never: it records nothing."""
        return False

    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """Nothing to do."""

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """Nothing: the trainer's own sequence has no faster form that it could do without."""
        return ()
