"""CUDA graphs of the fused forward: one launch a step instead of a thousand.

A graph is recorded for a shape (image size, kept text rows), not for a prompt: whatever differs between prompts is
copied into the tensors that it reads. The first call of a shape runs as it is, which also compiles and plans what
is new to it; the second one records, or `record` does. Weights are switched in place, so graphs survive that.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline.fallbacks import unusable
from chromarpc_server.pipeline.fused.attention import Spans
from chromarpc_server.pipeline.fused.forward import Conditioning, FusedTransformer
from chromarpc_server.pipeline.recording import recording

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

log = logging.getLogger(__name__)

MAX_GRAPHS = 32
Shape = tuple[object, ...]


@dataclass(frozen=True)
class _Recorded:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: Tensor
    conditioning: Conditioning
    modulations: Tensor
    velocities: Tensor

    def replay(self, latents: Tensor, conditioning: Conditioning, modulations: Tensor) -> Tensor:
        """Copies the inputs in, runs, and copies the result out."""
        self.latents.copy_(latents)
        self.modulations.copy_(modulations)
        for mine, given in zip(_tensors(self.conditioning), _tensors(conditioning), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.velocities.clone()


def _tensors(conditioning: Conditioning) -> tuple[Tensor, ...]:
    return (conditioning.texts, *conditioning.rope, conditioning.spans.starts)


class GraphedForward:
    """Calls like `FusedTransformer`'s own, recorded where that can be done. Belongs to the device thread."""

    def __init__(self, fused: FusedTransformer, *, record: bool = True) -> None:
        """`fused`: what to record, unless `record` is off; its weights must stay where they are."""
        self.fused = fused
        self._recorded: OrderedDict[Shape, _Recorded] = OrderedDict()
        self._met: set[Shape] = set()
        self._pool: _POOL_HANDLE | None = None
        self._usable = record
        self.fallback: DeviceFallback | None = None
        """Why steps are not recorded, where they should be."""

    @property
    def recorded_count(self) -> int:
        """Graphs held."""
        return len(self._recorded)

    @property
    def records_ahead(self) -> bool:
        """Whether `record` is any use: not where torch's own attention plans every length while it runs."""
        return self._usable and self.fused.attention.any_length

    def record(self, latents: Tensor, conditioning: Conditioning, modulations: Tensor) -> None:
        """Records the shape of these inputs without running it, once another shape has run: all that shapes
        share is compiled then.
        """
        shape = self._shape(conditioning)
        if self.records_ahead and latents.is_cuda and self._met and shape not in self._recorded:
            self._record(shape, latents, conditioning, modulations)
            self._met.add(shape)

    def __call__(self, latents: Tensor, conditioning: Conditioning, modulations: Tensor) -> Tensor:
        """As `FusedTransformer.__call__`."""
        if not self._usable or not latents.is_cuda:
            return self.fused(latents, conditioning, modulations)
        shape = self._shape(conditioning)
        recorded = self._recorded.get(shape)
        if recorded is None and shape in self._met:
            recorded = self._record(shape, latents, conditioning, modulations)
        self._met.add(shape)
        if recorded is None:
            return self.fused(latents, conditioning, modulations)
        self._recorded.move_to_end(shape)
        return recorded.replay(latents, conditioning, modulations)

    def _shape(self, conditioning: Conditioning) -> Shape:
        if self.fused.attention.any_length:
            return (self.fused.variant, *conditioning.layout.shape)
        return (self.fused.variant, *conditioning.layout.shape, *conditioning.spans.bounds)

    def _record(
        self, shape: Shape, latents: Tensor, conditioning: Conditioning, modulations: Tensor
    ) -> _Recorded | None:
        spans = conditioning.spans
        inputs = (latents.clone(), modulations.clone())
        own = replace(
            conditioning,
            texts=conditioning.texts.clone(),
            rope=(conditioning.rope[0].clone(), conditioning.rope[1].clone()),
            spans=Spans(spans.bounds, spans.starts.clone(), spans.longest),
        )
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, latents.device, self._pool):
                velocities = self.fused(inputs[0], own, inputs[1])
        except Exception as problem:  # noqa: BLE001 - a step that cannot be recorded can still be run
            log.warning("graph.unusable", extra={"error": f"{type(problem).__name__}: {problem}"[:300]})
            self._recorded.clear()
            self._pool = None
            self._usable = False
            self.fallback = DeviceFallback(Part.STEP_GRAPHS, unusable(problem))
            return None
        self._pool = self._pool or graph.pool()
        recorded = _Recorded(graph, inputs[0], own, inputs[1], velocities)
        self._recorded[shape] = recorded
        while len(self._recorded) > MAX_GRAPHS:
            self._recorded.popitem(last=False)
        return recorded
