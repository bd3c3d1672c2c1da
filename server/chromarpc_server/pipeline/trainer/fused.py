"""`preview`: the trainer's function through the fused forward, low-rank adapters beside the quantized weights.

A linear layer with a path beside it holds `[W̃, up]` (out, in + rank) and `down` (rank, in): its product takes
`[x, x · downᵀ]`, so that base and adapter are one product. The rank of all adapters together is padded to a
bucket; within a bucket nothing moves, and recorded graphs go on. No base weight is rewritten for another adapter
or multiplier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline.adapters.change import Kronecker
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.fused.forward import FusedTransformer
from chromarpc_server.pipeline.fused.graphs import GraphedForward
from chromarpc_server.pipeline.prepared import AdapterSet, SwitchReport, on_device, packed_velocity
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.quantization import FLOAT8
from chromarpc_server.pipeline.sampling import Velocity
from chromarpc_server.pipeline.trainer.arithmetic import TORCH_DTYPES
from chromarpc_server.pipeline.trainer.forward import attended_text
from chromarpc_server.pipeline.trainer.paths import (
    Pair,
    Placed,
    add_to_quantized,
    kronecker_path,
    merge,
    pair_of,
    place,
    require_finite_weights,
)
from chromarpc_server.pipeline.trainer.quantizers import QuantizedLinear, quantize_linear
from chromarpc_server.pipeline.transformer import ChromaConfig, ChromaTransformer, Linear
from chromarpc_server.pipeline.weights import Check, LoadProgress, Progress

RANK_BUCKETS = (64, 128, 256, 512)
"""Ranks of all adapters of a set together are padded to one of these, and beyond the last to a multiple of it."""


def rank_bucket(rank: int) -> int:
    """What a rank is padded to; 0 for none."""
    if rank <= RANK_BUCKETS[-1]:
        return next(bucket for bucket in (0, *RANK_BUCKETS) if rank <= bucket)
    return -(-rank // RANK_BUCKETS[-1]) * RANK_BUCKETS[-1]


@dataclass
class _Beside:
    """What lies beside one linear layer."""

    keys: tuple[tuple[str, float], ...] | None = ()
    """sha256 and multiplier of each adapter whose factors are in place; None while that is not certain."""
    shas: tuple[str, ...] | None = ()
    """Those whose `down` and `ups` are here."""
    ups: list[Tensor] = field(default_factory=list)
    """Each adapter's `up` (out, rank) on the device, at multiplier 1."""
    down: Tensor | None = None
    """(capacity, in): rows beyond the adapters' are zeros."""
    up: Tensor | None = None
    """(out, capacity), where the weight is held in float8 and has no columns for it."""


class FusedPreview:
    """One transformer's weights on the device, as the trainer quantizes them. Belongs to the device thread."""

    def __init__(
        self,
        config: ChromaConfig,
        master: Mapping[str, Tensor],
        profile: NumericsProfile,
        settings: TrainerSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        hold_float8: bool = False,
        record_graphs: bool = True,
    ) -> None:
        """Allocates nothing; the first `switch` does.

        Args:
            config: sizes.
            master: parameters by name, as they are stored, on the device or in host memory.
            profile: `preview`.
            settings: what the trainer's config says; weights are quantized in the dtype it names.
            device: where the transformer lies.
            dtype: what it computes in.
            hold_float8: hold the blocks' weights in float8 where the quantizer's values are float8: half the
                memory.
            record_graphs: record steps as CUDA graphs.
        """
        with torch.device("meta"):
            self.model = ChromaTransformer(config)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.profile = profile
        self.settings = settings
        self._master = master
        self._device = device
        self._dtype = dtype
        self._trainer_dtype = TORCH_DTYPES[settings.dtype]
        self._hold_float8 = hold_float8
        self._record_graphs = record_graphs
        self._linears = {
            f"{name}.weight": module for name, module in self.model.named_modules() if isinstance(module, Linear)
        }
        self._storage: dict[str, Tensor] = {}
        """By parameter name; a linear layer's is (out, in + capacity)."""
        self._held: dict[str, tuple[tuple[str, float], ...] | None] = dict.fromkeys(master)
        self._beside = {name: _Beside() for name in self._linears}
        self._kronecker: dict[str, tuple[tuple[str, float], ...] | None] = {}
        """By parameter name, what lies beside it factorized; None while that is not certain."""
        self._bucket = 0
        self._capacity = 0
        """Columns of every linear layer's storage beyond its weight's."""
        self._run: GraphedForward | None = None

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
        scales = [module.scale for module in self._linears.values() if module.scale is not None]
        beside = [
            tensor
            for held in self._beside.values()
            for tensor in (*held.ups, *(part for part in (held.down, held.up) if part is not None))
        ]
        return sum(tensor.nbytes for tensor in (*self._storage.values(), *scales, *beside))

    @torch.inference_mode()
    def switch(
        self, adapters: AdapterSet, *, progress: Progress = lambda _: None, check: Check = lambda: None
    ) -> SwitchReport:
        """Makes the weights those that the trainer would sample with, given these adapters.

        Only base weights that an adapter is merged into (see `paths.place`) are rewritten; for the others' sake
        `up` and `down` are.

        Args:
            adapters: in order, with their multipliers.
            progress: told how many bytes of those to rewrite are done.
            check: called between tensors; raises to stop.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
            WeightsInvalid: a weight has a row that the quantizer turns into NaN.
        """
        placement = place(adapters, tuple(self._linears), self.settings)
        changes = {
            name: (*placement.merged.get(name, ()), *placement.added.get(name, ())) for name in self._master
        }
        wanted = {name: tuple(placed.key for placed in changes[name]) for name in self._master}
        stale = [name for name in self._master if self._held[name] != wanted[name]]
        total, done = sum(self._master[name].nbytes for name in stale), 0
        finite: dict[str, Tensor] = {}
        for name, stored in on_device(self._master, stale, self._device):
            check()
            self._held[name] = None
            weight = stored.to(self._trainer_dtype)
            written = self._write(name, weight, placement.merged.get(name, ()), placement.added.get(name, ()))
            finite[name] = torch.isfinite(written).all()
            self._held[name] = wanted[name]
            done += self._master[name].nbytes
            progress(LoadProgress("quantizing" if self.settings.quantize else "merging", done, total))
        try:
            require_finite_weights(finite, wanted, self.settings.qtype if self.settings.quantize else None)
        except ChromaError:
            self._held.update(dict.fromkeys(finite))
            raise
        return SwitchReport(len(stale) + self._put_beside(placement.beside, check))

    def _write(self, name: str, weight: Tensor, merged: Sequence[Placed], added: Sequence[Placed]) -> Tensor:
        """Puts one parameter where it is held. Storage is made once; only a larger bucket replaces it."""
        for placed in merged:
            weight = merge(placed.change, weight, placed.multiplier)
        linear = self._linears.get(name)
        if linear is None:
            self._store(name, weight)
            return weight
        quantized = quantize_linear(weight, self.settings.qtype if self.settings.quantize else None)
        whole = quantized.dequantized
        for placed in added:
            whole = add_to_quantized(placed.change, whole, placed.multiplier)
        if self._holds_float8(name, quantized):
            self._store_float8(name, linear, quantized)
        else:
            self._store(name, whole)
        return whole

    def _holds_float8(self, name: str, quantized: QuantizedLinear) -> bool:
        codes = quantized.codes
        return self._hold_float8 and "_blocks." in name and codes is not None and codes[0].dtype == FLOAT8

    def _store(self, name: str, weight: Tensor) -> None:
        storage = self._storage.get(name)
        if storage is None:
            wide = self._capacity if name in self._linears and weight.ndim == 2 else 0
            shape = (weight.shape[0], weight.shape[1] + wide) if wide else weight.shape
            storage = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._storage[name] = storage
            self._register(name)
        (storage[:, : weight.shape[1]] if weight.ndim > 1 else storage).copy_(weight)

    def _store_float8(self, name: str, linear: Linear, quantized: QuantizedLinear) -> None:
        if quantized.codes is None:
            raise TypeError("weights without float8 values are held dequantized")
        values, scale = quantized.codes
        if name not in self._storage:
            self._storage[name] = torch.empty(values.shape, dtype=FLOAT8, device=self._device)
            linear.scale = torch.empty(scale.shape, dtype=scale.dtype, device=self._device)
            self._register(name)
        self._storage[name].copy_(values)
        if linear.scale is not None:
            linear.scale.copy_(scale)

    def _register(self, name: str, rank: int = 0) -> None:
        """Shows the model a parameter as it is held now, with `rank` of what lies beside it."""
        storage = self._storage[name]
        linear = self._linears.get(name)
        if linear is not None:
            beside = self._beside[name]
            if storage.dtype != FLOAT8:
                storage = storage[:, : self._master[name].shape[1] + rank]
            linear.down = None if beside.down is None or rank == 0 else beside.down[:rank]
            linear.up = None if beside.up is None or rank == 0 else beside.up[:, :rank]
        module, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(storage, requires_grad=False)
        self.model.get_submodule(module).register_parameter(leaf, parameter)

    def _put_beside(self, wanted: Mapping[str, Sequence[Placed]], check: Check) -> int:
        """Puts these adapters beside the weights. Returns for how many layers something was rewritten."""
        pairs = {name: [(placed, pair_of(placed.change)) for placed in those] for name, those in wanted.items()}
        low_rank = {
            name: [(placed, pair) for placed, pair in those if pair is not None] for name, those in pairs.items()
        }
        ranks = {name: sum(pair.rank for _, pair in those) for name, those in low_rank.items()}
        bucket = rank_bucket(max(ranks.values(), default=0))
        if bucket > self._capacity:
            self._grow(bucket)
        rewritten = 0
        for name in self._linears:
            check()
            rewritten += self._put_factors(name, low_rank.get(name, ()))
        self._bucket = bucket
        for name, linear in self._linears.items():
            rank = bucket if ranks.get(name) else 0
            if rank != (0 if linear.down is None else linear.down.shape[0]):
                self._register(name, rank)
        rewritten += self._put_kronecker(wanted)
        self.run.fused.variant = (bucket, frozenset(name for name, rank in ranks.items() if rank))
        return rewritten

    def _put_factors(self, name: str, those: Sequence[tuple[Placed, Pair]]) -> bool:
        """Writes the factors of one layer's low-rank paths where they differ. Returns whether they did."""
        held = self._beside[name]
        keys = tuple(placed.key for placed, _ in those)
        if held.keys == keys:
            return False
        shas = tuple(placed.sha256 for placed, _ in those)
        held.keys = None
        if held.shas != shas:
            held.shas = None
            held.ups = [pair.up.to(self._device) for _, pair in those]
            if held.down is not None:
                held.down.zero_()
                start = 0
                for _, pair in those:
                    held.down[start : start + pair.rank].copy_(pair.down)
                    start += pair.rank
            held.shas = shas
        up = self._up(name)
        if up is not None:
            up.zero_()
            start = 0
            for (placed, pair), factor in zip(those, held.ups, strict=True):
                up[:, start : start + pair.rank].copy_(factor.float() * placed.multiplier)
                start += pair.rank
        held.keys = keys
        return True

    def _up(self, name: str) -> Tensor | None:
        """Where a layer's `up` is held, (out, capacity)."""
        if self._capacity == 0:
            return None
        beside = self._beside[name]
        return self._storage[name][:, self._master[name].shape[1] :] if beside.up is None else beside.up

    def _grow(self, capacity: int) -> None:
        """Makes room for more ranks. What was recorded reads the old storage, so it goes."""
        self._run = None
        for name, linear in self._linears.items():
            width = self._master[name].shape[1]
            beside = self._beside[name]
            storage = self._storage[name]
            beside.down = torch.zeros(capacity, width, dtype=self._dtype, device=self._device)
            beside.keys = beside.shas = None
            if storage.dtype == FLOAT8:
                beside.up = torch.zeros(storage.shape[0], capacity, dtype=self._dtype, device=self._device)
            else:
                wider = torch.zeros(storage.shape[0], width + capacity, dtype=self._dtype, device=self._device)
                wider[:, :width] = storage[:, :width]
                self._storage[name] = wider
                del storage
            linear.down = linear.up = None
            self._register(name, 0)
        self._capacity = capacity

    def _put_kronecker(self, wanted: Mapping[str, Sequence[Placed]]) -> int:
        """Puts LoKrs beside their layers, factorized. Returns how many layers have another one than before."""
        keys = {
            name: tuple(placed.key for placed in those if isinstance(placed.change, Kronecker))
            for name, those in wanted.items()
        }
        keys = {name: those for name, those in keys.items() if those}
        changed = {
            name
            for name in keys.keys() | self._kronecker.keys()
            if keys.get(name, ()) != self._kronecker.get(name, ())
        }
        if not changed:
            return 0
        # A recorded step reads the factors where they were.
        self._run = None
        for name in changed:
            self._kronecker[name] = None
            self._linears[name].paths = tuple(
                kronecker_path(placed.change, placed.multiplier, self._device)
                for placed in wanted.get(name, ())
                if isinstance(placed.change, Kronecker)
            )
            self._kronecker[name] = keys.get(name, ())
        return len(changed)

    def velocity(self, texts: Sequence[Text], timesteps: Tensor, grid: tuple[int, int]) -> Velocity:
        """See `VelocityMaker.velocity`: both passes at once, with the modulations of all steps made before."""
        modulations = self.model.modulations(timesteps)
        conditioning = self.run.fused.condition([self._kept(text) for text in texts], grid)
        return packed_velocity(self.run, conditioning, modulations)

    def _kept(self, text: Text) -> Tensor:
        """(attended, context): what the trainer's attention sees."""
        return text.embeds[0][attended_text(text.mask, self._trainer_dtype)[0]]

    @property
    def records_ahead(self) -> bool:
        """Whether `record` is any use."""
        return self.run.records_ahead

    @torch.inference_mode()
    def record(self, texts: Sequence[Text], latents: Tensor, grid: tuple[int, int]) -> None:
        """Has a step for prompts of this length and pictures of this size ready, without running it."""
        modulations = self.model.modulations(torch.ones(1, dtype=latents.dtype, device=latents.device))
        conditioning = self.run.fused.condition([self._kept(text) for text in texts], grid)
        self.run.record(latents[0], conditioning, modulations[0])
