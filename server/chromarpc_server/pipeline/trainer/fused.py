"""`preview`: the trainer's function through the fused forward, low-rank adapters beside the quantized weights.

A linear layer with a path beside it holds `[W̃, up]` (out, in + rank) and `down` (rank, in): its product takes
`[x, x · downᵀ]`, so that base and adapter are one product. The rank of all adapters together is padded to a
bucket; within a bucket nothing moves, and recorded graphs go on. No base weight is rewritten for another adapter
or multiplier.

Modulations are the trainer's own, bit for bit: see `approximator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters.change import Kronecker
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.fused.forward import FusedTransformer
from chromarpc_server.pipeline.fused.graphs import GraphedForward
from chromarpc_server.pipeline.merged_transformer import AdapterSet, SwitchReport, packed_velocity
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.progress import SILENT, Check, LoadContext
from chromarpc_server.pipeline.sampling import Velocity
from chromarpc_server.pipeline.trainer.approximator import TrainerApproximator, held_dtype, in_approximator
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES, trainer_arithmetic, trainer_precision
from chromarpc_server.pipeline.trainer.forward import attended_text
from chromarpc_server.pipeline.trainer.held import HeldWeights
from chromarpc_server.pipeline.trainer.layer import Layer, rank_bucket
from chromarpc_server.pipeline.trainer.paths import (
    Placed,
    add_to_quantized,
    merge,
    pair_of,
    place,
)
from chromarpc_server.pipeline.trainer.sizes import padded_bytes
from chromarpc_server.pipeline.weights.quantization import FLOAT8
from chromarpc_server.pipeline.weights.quantizers import QuantizedLinear, quantize_linear
from chromarpc_server.pipeline.weights.stored import StoredTensor


class FusedPreview:
    """One transformer's weights on the device, as the trainer quantizes them. Belongs to the device thread."""

    def __init__(
        self,
        config: ChromaConfig,
        master: Mapping[str, StoredTensor],
        profile: NumericsProfile,
        settings: TrainerSettings,
        placement: DevicePlacement,
        *,
        modulation_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocates nothing; the first `switch` does.

        Args:
            config: sizes.
            master: parameters by name, as they are stored, on the device or in host memory.
            profile: `preview`.
            settings: what the trainer's config says; weights are quantized in the dtype it names.
            placement: where the transformer lies, and what it takes there; weights are held in float8 only where
                the quantizer's values are float8.
            modulation_dtype: what modulations are computed in, if not in the trainer's dtype.
        """
        with torch.device("meta"):
            self.model = ChromaTransformer(config)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.profile = profile
        self.settings = settings
        self.text_settings = settings
        self.rounded = True
        self._device = placement.device
        self._dtype = placement.dtype
        self._trainer_dtype = TORCH_DTYPES[settings.dtype]
        self._hold_float8 = placement.hold_float8
        self._record_graphs = placement.record_graphs
        self._modulation_dtype = modulation_dtype or self._trainer_dtype
        self._modulations = TrainerApproximator(self.model, self._modulation_dtype)
        self._layers = {
            f"{name}.weight": Layer(
                module, module.in_features, device=placement.device, dtype=self._dtype_of(name)
            )
            for name, module in self.model.named_modules()
            if isinstance(module, Linear)
        }
        self._others: dict[str, Tensor] = {}
        """Parameters that are no linear layers' weights."""
        self._held = HeldWeights(master, settings, device=placement.device)
        self._capacity = 0
        """Ranks that there is room for beside every layer."""
        self._run: GraphedForward | None = None

    def _dtype_of(self, name: str) -> torch.dtype:
        """What a parameter is held in, by its name."""
        return held_dtype(name, self._dtype, self._modulation_dtype)

    @property
    def run(self) -> GraphedForward:
        """The fused forward over these weights, once they are there."""
        if self._run is None:
            fused = FusedTransformer(self.model, float8_products=False)
            self._run = GraphedForward(fused, record=self._record_graphs)
        return self._run

    @property
    def fallbacks(self) -> tuple[DeviceFallback, ...]:
        """What its forward does without, as far as it was tried."""
        if self._run is None:
            return ()
        return tuple(
            found for found in (self._run.fused.attention.fallback, self._run.fallback) if found is not None
        )

    @property
    def size_bytes(self) -> int:
        """Of the weights, scales and adapters it holds."""
        layers = sum(layer.size_bytes for layer in self._layers.values())
        return layers + sum(tensor.nbytes for tensor in self._others.values())

    def growth_bytes(self, adapters: AdapterSet) -> int:
        """What it would hold more than now, once it was switched to these adapters."""
        wanted = padded_bytes(
            adapters,
            {name: layer.shape for name, layer in self._layers.items()},
            self.settings,
            self._dtype_of,
            capacity=self._capacity,
            in_float8=[name for name, layer in self._layers.items() if layer.is_float8],
        )
        return max(0, wanted - sum(layer.beside_bytes for layer in self._layers.values()))

    @torch.inference_mode()
    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """Makes the weights those that the trainer would sample with, given these adapters.

        Only base weights that an adapter is merged into (see `paths.place`) are rewritten; for the others' sake
        `up` and `down` are.

        Args:
            adapters: in order, with their multipliers.
            context: reports how many bytes of those to rewrite are done; checked between tensors.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: a weight has a row that the quantizer turns into NaN.
        """
        placement = place(adapters, tuple(self._layers), self.settings)
        written = self._held.rewrite(placement, self._write, context)
        return SwitchReport(written + self._put_beside(placement.beside, context.check))

    def _write(self, name: str, weight: Tensor, merged: Sequence[Placed], added: Sequence[Placed]) -> Tensor:
        """Puts one parameter where it is held."""
        # For one at a time: threads of other devices wait for their precision as long.
        with trainer_precision(self._device, self.settings):
            return self._write_as_trainer(name, weight, merged, added)

    def _write_as_trainer(
        self, name: str, weight: Tensor, merged: Sequence[Placed], added: Sequence[Placed]
    ) -> Tensor:
        for placed in merged:
            weight = merge(placed.change, weight, placed.multiplier)
        layer = self._layers.get(name)
        if layer is None:
            self._put_other(name, weight)
            return weight
        quantized = quantize_linear(weight, self.settings.qtype if self.settings.quantize else None)
        if in_approximator(name):
            self._modulations.put_bias(name, quantized.bias)
        whole = quantized.dequantized
        for placed in added:
            whole = add_to_quantized(placed.change, whole, placed.multiplier)
        codes = self._float8(name, quantized)
        # What is added to a weight makes values of it that float8 does not have.
        moved = layer.put_weight(whole) if codes is None or added else layer.put_float8(*codes)
        if moved:
            self._run = None
        return whole

    def _float8(self, name: str, quantized: QuantizedLinear) -> tuple[Tensor, Tensor] | None:
        """Values and scales, where the layer is to be held by them."""
        codes = quantized.codes
        is_float8 = codes is not None and codes[0].dtype == FLOAT8
        return codes if is_float8 and self._hold_float8 and "_blocks." in name else None

    def _put_other(self, name: str, tensor: Tensor) -> None:
        if name not in self._others:
            self._others[name] = torch.empty(tensor.shape, dtype=self._dtype_of(name), device=self._device)
            module, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(self._others[name], requires_grad=False)
            self.model.get_submodule(module).register_parameter(leaf, parameter)
        self._others[name].copy_(tensor)

    def _put_beside(self, wanted: Mapping[str, Sequence[Placed]], check: Check) -> int:
        """Puts these adapters beside the weights. Returns for how many layers something was rewritten."""
        pairs = {name: [(placed, pair_of(placed.change)) for placed in those] for name, those in wanted.items()}
        low_rank = {
            name: [(placed, pair) for placed, pair in those if pair is not None] for name, those in pairs.items()
        }
        ranks = {name: sum(pair.rank for _, pair in those) for name, those in low_rank.items()}
        bucket = rank_bucket(max(ranks.values(), default=0))
        if bucket > self._capacity:
            # A recorded step reads the tensors that grow.
            self._run = None
            for layer in self._layers.values():
                layer.grow(bucket)
            self._capacity = bucket
        rewritten = 0
        for name, layer in self._layers.items():
            check()
            rewritten += layer.put_factors(low_rank.get(name, ()))
        for name, layer in self._layers.items():
            rank = bucket if ranks.get(name) else 0
            if rank != layer.rank:
                layer.show(rank)
        for name, layer in self._layers.items():
            those = [placed for placed in wanted.get(name, ()) if isinstance(placed.change, Kronecker)]
            if layer.put_kronecker(those):
                # A recorded step reads the factors where they were.
                self._run = None
                rewritten += 1
        self.run.fused.variant = (bucket, frozenset(name for name, rank in ranks.items() if rank))
        return rewritten

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`: both passes at once, with the modulations of all steps made before."""
        modulations = self.modulations(timesteps)
        conditioning = self.run.fused.condition([self._kept(text) for text in texts], grid)
        return packed_velocity(self.run, conditioning, modulations)

    def modulations(self, timesteps: Tensor) -> Tensor:
        """Of every step. (S,) in 0…1 → (S, slots, C) in their dtype."""
        with trainer_arithmetic(self._device, self.settings):
            return self._modulations(timesteps)

    def _kept(self, text: Text) -> Tensor:
        """(attended, context): what the trainer's attention sees."""
        return text.embeds[0][attended_text(text.mask, self._trainer_dtype)[0]]

    @property
    def records_ahead(self) -> bool:
        """Whether `record` is any use."""
        return self.run.records_ahead

    @torch.inference_mode()
    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """Has a step for prompts of this length and images of this size ready, without running it."""
        modulations = self.modulations(torch.ones(1, dtype=latents.dtype, device=latents.device))
        conditioning = self.run.fused.condition([self._kept(text) for text in texts], grid)
        self.run.record(latents[0], conditioning, modulations[0])
