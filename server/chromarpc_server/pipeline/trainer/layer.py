"""One linear layer of `preview`: its quantized weight on the device, and what adapters add beside it.

What is written stays where it is: only room for more ranks moves a weight, and another form of holding it. Every
part remembers which adapters it was written for, so that only what differs is written again, and what a stopped
switch left undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chromarpc_server.pipeline.adapters.change import Kronecker
from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.trainer.paths import KroneckerPath, Pair, Placed, kronecker_path
from chromarpc_server.pipeline.weights.quantization import FLOAT8

RANK_BUCKETS = (64, 128, 256, 512)
"""Ranks of all adapters of a set together are padded to one of these, and beyond the last to a multiple of it."""
Keys = tuple[tuple[str, float], ...]
"""sha256 and multiplier of each adapter."""


def rank_bucket(rank: int) -> int:
    """What a rank is padded to; 0 for none."""
    if rank <= RANK_BUCKETS[-1]:
        return next(bucket for bucket in (0, *RANK_BUCKETS) if rank <= bucket)
    return -(-rank // RANK_BUCKETS[-1]) * RANK_BUCKETS[-1]


class Layer:
    """A linear layer's tensors, of which its module is shown what is in use."""

    def __init__(self, linear: Linear, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        """Allocates nothing.

        Args:
            linear: the module.
            width: of its input.
            device: where its tensors lie.
            dtype: what it computes in.
        """
        self._linear = linear
        self._width = width
        self._device = device
        self._dtype = dtype
        self._capacity = 0
        self._weight: Tensor | None = None
        """(out, in + capacity), its last columns adapters' `up`; or float8 (out, in)."""
        self._down: Tensor | None = None
        """(capacity, in): rows beyond the adapters' are zeros."""
        self._up: Tensor | None = None
        """(out, capacity), where the weight is held in float8 and has no columns for it."""
        self._ups: list[Tensor] = []
        """Each adapter's `up` (out, rank), at multiplier 1."""
        self._held: Keys | None = ()
        """Whose factors are in place; None while that is not certain."""
        self._held_shas: tuple[str, ...] | None = ()
        """Those whose `down` and `ups` are here."""
        self._held_kronecker: Keys | None = ()
        self._paths: tuple[KroneckerPath, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of everything it holds."""
        parts = (self._weight, self._linear.scale, self._down, self._up, *self._ups)
        paths = sum(path.size_bytes for path in self._paths)
        return sum(part.nbytes for part in parts if part is not None) + paths

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of its weight."""
        return self._linear.out_features, self._width

    @property
    def is_float8(self) -> bool:
        """Whether its weight is held in float8."""
        return self._weight is not None and self._weight.dtype == FLOAT8

    @property
    def beside_bytes(self) -> int:
        """Of what lies beside its weight, and of the room for more ranks."""
        columns = 0
        if self._weight is not None and self._up is None:
            columns = self._weight.shape[0] * self._capacity * self._dtype.itemsize
        held = sum(part.nbytes for part in (self._down, self._up, *self._ups) if part is not None)
        return columns + held + sum(path.size_bytes for path in self._paths)

    @property
    def rank(self) -> int:
        """Ranks that the module is shown."""
        return 0 if self._linear.down is None else self._linear.down.shape[0]

    def put_weight(self, weight: Tensor) -> bool:
        """Holds W̃ (out, in). Returns whether it lies elsewhere than before."""
        moves = self._weight is None or self._weight.dtype == FLOAT8
        if self._weight is None or moves:
            shape = (weight.shape[0], self._width + self._capacity)
            self._weight = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._linear.scale = self._up = None
            self._held = None if self._capacity else self._held
            self.show(0)
        self._weight[:, : self._width].copy_(weight)
        return moves

    def put_float8(self, values: Tensor, scale: Tensor) -> bool:
        """The same as float8 values (out, in) and their scales (out,)."""
        moves = self._linear.scale is None
        if self._weight is None or self._linear.scale is None:
            self._weight = torch.empty(values.shape, dtype=FLOAT8, device=self._device)
            self._linear.scale = torch.empty(scale.shape, dtype=scale.dtype, device=self._device)
            self._make_up()
            self._held = None if self._capacity else self._held
            self.show(0)
        self._weight.copy_(values)
        self._linear.scale.copy_(scale)
        return moves

    def grow(self, capacity: int) -> None:
        """Makes room for more ranks. What was recorded reads the old tensors."""
        weight = self._written()
        self._held = self._held_shas = None
        self._down = torch.zeros(capacity, self._width, dtype=self._dtype, device=self._device)
        if weight.dtype != FLOAT8:
            wider = torch.zeros(weight.shape[0], self._width + capacity, dtype=self._dtype, device=self._device)
            wider[:, : self._width] = weight[:, : self._width]
            self._weight = wider
        self._capacity = capacity
        self._make_up()
        self.show(0)

    def show(self, rank: int) -> None:
        """Shows the module the weight with `rank` of what lies beside it."""
        weight = self._written()
        if weight.dtype != FLOAT8:
            weight = weight[:, : self._width + rank]
        self._linear.down = None if self._down is None or rank == 0 else self._down[:rank]
        self._linear.up = None if self._up is None or rank == 0 else self._up[:, :rank]
        self._linear.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))

    def put_factors(self, those: Sequence[tuple[Placed, Pair]]) -> bool:
        """Writes the factors of low-rank paths where they differ. Returns whether they did."""
        keys = tuple(placed.key for placed, _ in those)
        if self._held == keys:
            return False
        shas = tuple(placed.sha256 for placed, _ in those)
        self._held = None
        if self._held_shas != shas:
            self._held_shas = None
            self._ups = [pair.up.to(self._device) for _, pair in those]
            if self._down is not None:
                self._down.zero_()
                start = 0
                for _, pair in those:
                    self._down[start : start + pair.rank].copy_(pair.down)
                    start += pair.rank
            self._held_shas = shas
        if self._capacity:
            up = self._written()[:, self._width :] if self._up is None else self._up
            up.zero_()
            start = 0
            for (placed, pair), factor in zip(those, self._ups, strict=True):
                up[:, start : start + pair.rank].copy_(factor.float() * placed.multiplier)
                start += pair.rank
        self._held = keys
        return True

    def put_kronecker(self, those: Sequence[Placed]) -> bool:
        """Puts LoKrs beside the layer, factorized, where others are. Returns whether there were others."""
        keys = tuple(placed.key for placed in those)
        if self._held_kronecker == keys:
            return False
        self._held_kronecker = None
        self._linear.paths = self._paths = tuple(
            kronecker_path(placed.change, placed.multiplier, self._device)
            for placed in those
            if isinstance(placed.change, Kronecker)
        )
        self._held_kronecker = keys
        return True

    def _make_up(self) -> None:
        """Room for `up` apart from the weight, where that is held in float8."""
        weight = self._written()
        if self._capacity and weight.dtype == FLOAT8:
            shape = (weight.shape[0], self._capacity)
            self._up = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _written(self) -> Tensor:
        if self._weight is None:
            raise RuntimeError("a layer that holds no weight yet")
        return self._weight
