"""A transformer with adapters merged, switched from one set of them to another in place.

The master weights stay as they were stored. Every tensor of the transformer remembers what was merged into it, so
that a switch rewrites only the tensors that differ, in the storage they have: whoever holds the module, compiled
code included, goes on with the new weights. A tensor's value depends on the master and its own adapters alone,
never on what it held before, so a switch gives bit for bit what a cold build gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, first_named
from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.profiles import NumericsProfile
from chromarpc_server.pipeline.quantization import dequantize_rows, quantize_rows
from chromarpc_server.pipeline.transformer import ChromaConfig, ChromaTransformer, Linear
from chromarpc_server.pipeline.weights import Check, LoadProgress, Progress

AdapterSet = Sequence[tuple[Adapter, float]]
"""Adapters with their multipliers, in the order of application."""
Merged = tuple[tuple[str, float], ...]
"""What was merged into a tensor: sha256 and multiplier of each adapter that changes it, in order."""


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
        master: Mapping[str, Tensor],
        profile: NumericsProfile,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantize: bool = True,
    ) -> None:
        """Allocates nothing; the first `switch` does.

        Args:
            config: sizes.
            master: parameters by name, in the dtype they are stored in, on the device or in host memory.
            profile: says whether float8 weights are held as they are or dequantized.
            device: where the transformer lies.
            dtype: what it computes in; a profile that dequantizes per call does so in the master's dtype.
            quantize: whether linear weights go through float8.
        """
        with torch.device("meta"):
            self.model = ChromaTransformer(config)
        self.model.eval().requires_grad_(False)
        self.profile = profile
        self._master = master
        self._device = device
        self._dtype = dtype
        self._quantize = quantize
        self._linears = {
            f"{name}.weight": module for name, module in self.model.named_modules() if isinstance(module, Linear)
        }
        self._tensors: dict[str, Tensor] = {}
        self._merged: dict[str, Merged | None] = dict.fromkeys(master)
        """None for a tensor whose contents are unknown: not written yet, or not usable."""

    @property
    def size_bytes(self) -> int:
        """Of the weights and scales it holds."""
        scales = [module.scale for module in self._linears.values() if module.scale is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._tensors.values(), *scales))

    @torch.inference_mode()
    def switch(
        self, adapters: AdapterSet, *, progress: Progress = lambda _: None, check: Check = lambda: None
    ) -> SwitchReport:
        """Makes the weights those of the master with `adapters` merged, each on what the ones before it left, then
        quantized as the reference does.

        Stopped by `check` or failing, it leaves a transformer that must not run, and that the next switch repairs.

        Args:
            adapters: in order; none for the bare base.
            progress: told how many bytes of those to rewrite are done.
            check: called between tensors; raises to stop.

        Raises:
            LoraIncompatible: merging gave values that are not finite.
        """
        wanted = {name: _merged_into(name, adapters) for name in self._master}
        stale = [name for name in self._master if self._merged[name] != wanted[name]]
        total = sum(self._master[name].nbytes for name in stale)
        stage = "merging" if adapters else "quantizing"
        done = 0
        finite: dict[str, Tensor] = {}
        for name in stale:
            check()
            weight = self._master[name].to(self._device, non_blocking=True)
            for adapter, multiplier in adapters:
                weight = adapter.apply(name, weight, multiplier)
            if wanted[name]:
                finite[name] = torch.isfinite(weight).all()
            self._merged[name] = None
            self._write(name, weight)
            self._merged[name] = wanted[name]
            done += self._master[name].nbytes
            progress(LoadProgress(stage, done, total))
        self._refuse_overflow(finite)
        return SwitchReport(len(stale))

    def _write(self, name: str, weight: Tensor) -> None:
        scale = None
        if self._quantize and name in self._linears:
            computes_in_stored = weight.dtype == self._dtype
            weight, scale = quantize_rows(weight)
            if not (self.profile.dequantize_per_call and computes_in_stored):
                weight, scale = dequantize_rows(weight, scale), None
        if scale is None:
            weight = weight.to(self._dtype)
        held = self._tensors.get(name)
        if held is None:
            # The master itself must not become the storage that later switches write to.
            own = weight.clone() if weight.data_ptr() == self._master[name].data_ptr() else weight
            self._tensors[name] = own
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module).register_parameter(leaf, torch.nn.Parameter(own, requires_grad=False))
            if scale is not None:
                self._linears[name].scale = scale
            return
        held.copy_(weight)
        held_scale = self._linears[name].scale if scale is not None else None
        if scale is not None and held_scale is not None:
            held_scale.copy_(scale)

    def _refuse_overflow(self, finite: Mapping[str, Tensor]) -> None:
        """One look at the device for all tensors, instead of one for each."""
        if not finite:
            return
        good = torch.stack(list(finite.values())).tolist()
        bad = [name for name, is_finite in zip(finite, good, strict=True) if not is_finite]
        if bad:
            for name in bad:
                self._merged[name] = None
            raise LoraIncompatible(f"merging the adapters overflows {first_named(bad, 3)}")


def _merged_into(name: str, adapters: AdapterSet) -> Merged:
    return tuple(
        (adapter.sha256, multiplier)
        for adapter, multiplier in adapters
        if multiplier != 0 and name in adapter.changes
    )


def prepare_transformer(
    config: ChromaConfig,
    master: Mapping[str, Tensor],
    adapters: AdapterSet,
    profile: NumericsProfile,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
) -> ChromaTransformer:
    """A transformer prepared once, for whoever never switches it; arguments and errors as above."""
    prepared = PreparedTransformer(config, master, profile, device=device, dtype=dtype, quantize=quantize)
    prepared.switch(adapters)
    return prepared.model
