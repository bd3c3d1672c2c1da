"""A transformer's prepared weights: adapters merged, switched from one set of them to another in place.

The master weights stay as they were stored. Every tensor of the transformer remembers what was merged into it, so
that a switch rewrites only the tensors that differ, in the storage they have: every holder of the module, compiled
code included, goes on with the new weights. A tensor's value depends on the master and its own adapters alone,
never on what it held before, so a switch gives bit for bit what a cold build gives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, WeightsInvalid, first_named
from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.device import release_memory
from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.fused.check import fused_ops
from chromarpc_server.pipeline.fused.forward import Conditioning, FusedTransformer
from chromarpc_server.pipeline.fused.graphs import GraphedForward
from chromarpc_server.pipeline.fused.streaming import BlockStream
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.models.positions import dense_attention_mask, rope_table
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.progress import SILENT, LoadContext, LoadProgress
from chromarpc_server.pipeline.sampling import Velocity
from chromarpc_server.pipeline.weights.quantization import FLOAT8, dequantize_rows, quantize_rows
from chromarpc_server.pipeline.weights.stored import StoredTensor, as_they_are, rounding_dtype

AdapterSet = Sequence[tuple[Adapter, float]]
"""Adapters with their multipliers, in the order of application."""
Merged = tuple[tuple[str, float], ...]
"""What was merged into a tensor: sha256 and multiplier of each adapter that changes it, in order."""


COPIES_AHEAD = 2
"""Tensors of a master in host memory that are on their way while one is worked on."""


CALLS_AT_ONCE = 150
"""Whose modulations are made together: those of as many steps as there may be, with one call each."""


@dataclass(frozen=True)
class SwitchReport:
    """What a switch did."""

    rewritten_tensors: int
    """0 where the set was in place already."""


class PreparedTransformer:
    """One transformer's weights on the device. Belongs to the thread that owns the device."""

    def __init__(
        self,
        config: ChromaConfig,
        master: Mapping[str, StoredTensor],
        profile: NumericsProfile,
        placement: DevicePlacement,
        *,
        quantize: bool = True,
    ) -> None:
        """Allocates nothing; the first `switch` does.

        Args:
            config: sizes.
            master: parameters by name, as they are stored, on the device or in host memory.
            profile: what it will be run with.
            placement: where the transformer lies, and what it takes there.
            quantize: whether linear weights go through float8, and what was stored as codes or as fp16 through the
                dtype that the checkpoint counts as; else nothing is rounded but to the dtype it computes in.
        """
        with torch.device("meta"):
            self.model = ChromaTransformer(config)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.profile = profile
        self.settings: TrainerSettings | None = None
        """The trainer's config has no part in it."""
        self.rounded = quantize
        self.text_settings = None if quantize else unrounded_text(placement.dtype)
        self._master = master
        self._device = placement.device
        self._dtype = placement.dtype
        self._quantize = quantize
        self._rounding = rounding_dtype({name: stored.recipe for name, stored in master.items()})
        self._record_graphs = placement.record_graphs and not placement.streamed_blocks
        self._hold_float8 = placement.hold_float8 or profile.needs_float8_weights
        self._streamed_blocks = placement.streamed_blocks
        self._blocks: BlockStream | None = None
        """Holds the blocks' matrices, where some of them are streamed, once they are there."""
        self._linears = {
            f"{name}.weight": module for name, module in self.model.named_modules() if isinstance(module, Linear)
        }
        self._tensors: dict[str, Tensor] = {}
        self._run: GraphedForward | None = None
        self._merged: dict[str, Merged | None] = dict.fromkeys(master)
        """None for a tensor whose contents are unknown: not written yet, or not usable."""

    @property
    def run(self) -> GraphedForward:
        """The fused forward over these weights, once they are there."""
        if self._run is None:
            fused = FusedTransformer(self.model, float8_products=self.profile.float8_products, blocks=self._blocks)
            self._run = GraphedForward(fused, record=self._record_graphs)
        return self._run

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`."""
        make = self._fused_velocity if self.profile.fused else self._padded_velocity
        return make(texts, timesteps, grid)

    def _fused_velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """Both passes at once over packed tokens, with the modulations of all calls made before."""
        parts = [self.model.modulations(part) for part in timesteps.split(CALLS_AT_ONCE)]
        modulations = parts[0] if len(parts) == 1 else torch.cat(parts)
        conditioning = self.run.fused.condition([text.kept for text in texts], grid)
        return packed_velocity(self.run, conditioning, modulations)

    def _padded_velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """As the reference: pass after pass, 512 text tokens under a dense mask, modulations step by step."""
        model = self.model
        rope = rope_table(model.config, texts[0].embeds.shape[1], grid, timesteps.device)
        masks = [dense_attention_mask(text.mask, grid[0] * grid[1], model.config.num_heads) for text in texts]

        def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
            modulations = model.modulations(timesteps[index : index + 1])
            passes = [
                model(latents, text.embeds, modulations, rope, mask)
                for text, mask in zip(texts, masks, strict=True)
            ]
            return passes[0], passes[1] if len(passes) > 1 else None

        return velocity

    @property
    def records_ahead(self) -> bool:
        """Whether `record` is any use."""
        return self.profile.fused and self.run.records_ahead

    @torch.inference_mode()
    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """Has a step for prompts of this length and images of this size ready, without running it."""
        modulations = self.model.modulations(torch.ones(1, dtype=latents.dtype, device=latents.device))
        conditioning = self.run.fused.condition([text.kept for text in texts], grid)
        self.run.record(latents[0], conditioning, modulations[0])

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
        """Of the weights and scales it holds."""
        scales = [module.scale for module in self._linears.values() if module.scale is not None]
        blocks = self._blocks
        own = [tensor for name, tensor in self._tensors.items() if blocks is None or name not in blocks]
        return sum(tensor.nbytes for tensor in (*own, *scales)) + (0 if blocks is None else blocks.size_bytes)

    @property
    def blocks(self) -> BlockStream | None:
        """What streams its blocks, where some are streamed, once weights are there."""
        return self._blocks

    def growth_bytes(self, _: AdapterSet) -> int:
        """What it would hold more than now, once it was switched: nothing, since adapters are merged."""
        return 0

    @torch.inference_mode()
    def switch(self, adapters: AdapterSet, context: LoadContext = SILENT) -> SwitchReport:
        """Makes the weights those of the master with `adapters` merged, each on what the ones before it left, then
        quantized as the reference does.

        Stopped or failing, it leaves a transformer that must not run, and that the next switch repairs.

        Args:
            adapters: in order; none for the bare base.
            context: reports how many bytes of those to rewrite are done; checked between tensors.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: the checkpoint's own codes or scales are of no finite value.
        """
        wanted = {name: _merged_into(name, adapters) for name in self._master}
        stale = [name for name in self._master if self._merged[name] != wanted[name]]
        total = sum(self._master[name].nbytes for name in stale)
        self._open_blocks()
        if stale and self._blocks is not None:
            self._blocks.forget()
        stage = "merging" if adapters else "quantizing"
        done = 0
        finite: dict[str, Tensor] = {}
        for name, weight in on_device(self._master, stale, self._device):
            context.check()
            merged = self._merge(name, weight, adapters)
            if wanted[name] or self._master[name].recipe.widened:
                finite[name] = torch.isfinite(merged).all()
            self._merged[name] = None
            self._write(name, merged)
            self._merged[name] = wanted[name]
            done += self._master[name].nbytes
            context.progress(LoadProgress(stage, done, total))
        self._require_finite(finite, wanted)
        return SwitchReport(len(stale))

    def _merge(self, name: str, weight: Tensor, adapters: AdapterSet) -> Tensor:
        """A dense weight with adapters merged, in the dtype that the checkpoint has it in."""
        for adapter, multiplier in adapters:
            weight = adapter.apply(name, weight, multiplier)
        return weight.to(self._rounding) if self._quantize and self._master[name].recipe.widened else weight

    def _write(self, name: str, weight: Tensor) -> None:
        """Puts a merged weight where it is held, as it is held. Storage is made once and never replaced."""
        held = self._tensors.get(name)
        linear = self._linears.get(name) if self._quantize else None
        float8 = linear is not None and self._holds_float8(name, weight)
        if held is None:
            if self._blocks is not None and name in self._blocks:
                held = self._blocks.weight(name)
            else:
                held = torch.empty(weight.shape, dtype=FLOAT8 if float8 else self._dtype, device=self._device)
            self._tensors[name] = held
            module, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(held, requires_grad=False)
            self.model.get_submodule(module).register_parameter(leaf, parameter)
            if linear is not None and float8:
                # Products of float8 take their scales in float32; the values are bf16's all the same.
                scale_dtype = torch.float32 if self.profile.float8_products else weight.dtype
                linear.scale = torch.empty(weight.shape[0], dtype=scale_dtype, device=self._device)
        if self._blocks is not None and self._blocks.is_streamed(name):
            # Where it is multiplied by lies another block's, as long as that computes.
            values = torch.empty_like(held)
            self._put(linear, values, weight)
            self._blocks.put(name, values)
        else:
            self._put(linear, held, weight)

    def _put(self, linear: Linear | None, held: Tensor, weight: Tensor) -> None:
        """Rounds a merged weight as it is held; `linear`: the layer whose weight it is, if it is to be rounded."""
        ops = fused_ops(self._device) if weight.dtype == torch.bfloat16 else plain
        if linear is None:
            held.copy_(weight)
        elif linear.scale is not None and ops is not plain:
            ops.quantize_weight(weight.contiguous(), held, linear.scale)
        elif linear.scale is not None:
            q, scale = quantize_rows(weight)
            held.copy_(q)
            linear.scale.copy_(scale)
        elif held.dtype == torch.bfloat16 and ops is not plain:
            ops.round_weight(weight.contiguous(), held)
        else:
            held.copy_(dequantize_rows(*quantize_rows(weight)))

    def _open_blocks(self) -> None:
        """Takes the memory that streamed blocks need, before anything else is allocated."""
        if not self._streamed_blocks or self._blocks is not None:
            return
        if not (self.profile.fused and self._hold_float8 and self._quantize):
            raise ValueError("only float8 weights of a fused profile are streamed")
        release_memory(self._device)
        self._blocks = BlockStream(self.model, self._streamed_blocks, self._device)

    def _holds_float8(self, name: str, weight: Tensor) -> bool:
        if not self._hold_float8:
            return False
        if not self.profile.fused:
            # They are dequantized at every call in the dtype they are stored in, as the reference does.
            return weight.dtype == self._dtype
        return "_blocks." in name

    def _require_finite(self, finite: Mapping[str, Tensor], merged: Mapping[str, Merged]) -> None:
        """One look at the device for all tensors, instead of one for each."""
        if not finite:
            return
        good = torch.stack(list(finite.values())).tolist()
        bad = [name for name, is_finite in zip(finite, good, strict=True) if not is_finite]
        if bad:
            for name in bad:
                self._merged[name] = None
            damaged = [name for name in bad if not merged[name]]
            if damaged:
                raise WeightsInvalid(f"{first_named(damaged, 3)}: has values that are not finite, as it is stored")
            raise LoraIncompatible(f"merging the adapters overflows {first_named(bad, 3)}")


def unrounded_text(dtype: torch.dtype) -> TrainerSettings:
    """Which of the trainer's text encoders is one without rounding of ours: the one that it does not quantize."""
    return TrainerSettings(
        quantize=False, quantize_te=False, dtype="float32" if dtype == torch.float32 else "bfloat16"
    )


def on_device(
    master: Mapping[str, StoredTensor], names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Master weights on the device, made dense there one by one; those in host memory are copied, as they are
    stored, while the ones before are worked on.
    """
    if device.type != "cuda" or all(master[name].is_cuda for name in names):
        for name in names:
            yield name, master[name].to(device).dense()
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    ahead: deque[tuple[str, StoredTensor, torch.cuda.Event]] = deque()

    def take() -> tuple[str, Tensor]:
        name, stored, copied = ahead.popleft()
        working.wait_event(copied)
        for piece in stored.pieces:
            piece.record_stream(working)
        return name, stored.dense()

    for name in names:
        with torch.cuda.stream(copying):
            stored = master[name].to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(copying)
        ahead.append((name, stored, copied))
        if len(ahead) > COPIES_AHEAD:
            yield take()
    while ahead:
        yield take()


def packed_velocity(run: GraphedForward, conditioning: Conditioning, modulations: Tensor) -> Velocity:
    """Both passes of a step at once, over packed tokens."""

    def velocity(latents: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        found = run(latents[0], conditioning, modulations[index])
        return found[:1], found[1:] if len(conditioning.layout.text_tokens) > 1 else None

    return velocity


def prepared_bytes(
    master: Mapping[str, StoredTensor],
    profile: NumericsProfile,
    dtype_of: Callable[[str], torch.dtype],
    *,
    hold_float8: bool,
) -> int:
    """What a transformer will take, but for its scales (a few thousandths).

    Args:
        master: its parameters, by name.
        profile: what it will be run with.
        dtype_of: what a parameter of this name is held in, where not in float8.
        hold_float8: whether the blocks' weights are held in float8 where the profile could do without.
    """
    float8 = hold_float8 or profile.needs_float8_weights
    return sum(
        tensor.numel() * (1 if float8 and tensor.ndim > 1 and "_blocks." in name else dtype_of(name).itemsize)
        for name, tensor in master.items()
    )


def _merged_into(name: str, adapters: AdapterSet) -> Merged:
    return tuple(
        (adapter.sha256, multiplier)
        for adapter, multiplier in adapters
        if multiplier != 0 and name in adapter.changes
    )


def prepare_transformer(
    config: ChromaConfig,
    weights: Mapping[str, Tensor],
    adapters: AdapterSet,
    profile: NumericsProfile,
    placement: DevicePlacement,
    *,
    quantize: bool,
) -> PreparedTransformer:
    """A transformer of dense weights, prepared once, for callers that never switch it; the rest as above."""
    prepared = PreparedTransformer(config, as_they_are(weights), profile, placement, quantize=quantize)
    prepared.switch(adapters)
    return prepared
