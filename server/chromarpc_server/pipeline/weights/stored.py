"""A part of a model as its file stores it: tensors that become dense one by one, where they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def as_stored(pieces: Sequence[Tensor]) -> Tensor:
    """Of a tensor that the file holds as it is."""
    (tensor,) = pieces
    return tensor


@dataclass(frozen=True)
class Recipe:
    """How one of the model's tensors is made of a file's."""

    pieces: tuple[str, ...]
    """Names of the file's tensors, in the order in which `make` takes them."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what `make` gives: the file's own where it stores plain numbers, float32 where it stores codes."""
    stored_as: str
    """For people: `bf16`, `fp8`, `fp8 scaled`, `GGUF Q4_K`."""
    make: Callable[[Sequence[Tensor]], Tensor] = field(default=as_stored, repr=False, compare=False)
    """Pieces on any one device to the dense tensor there. Pure."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored, on the host or on a device. Behaves like the dense one where sizes are asked."""

    recipe: Recipe
    pieces: tuple[Tensor, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""
        return self.recipe.shape

    @property
    def ndim(self) -> int:
        """Of the dense tensor."""
        return len(self.recipe.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense tensor."""
        return self.recipe.dtype

    @property
    def nbytes(self) -> int:
        """Of what is stored."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        return all(piece.is_cuda for piece in self.pieces)

    def numel(self) -> int:
        """Of the dense tensor."""
        return math.prod(self.recipe.shape)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> StoredTensor:
        """The same, as stored, on a device."""
        return StoredTensor(
            self.recipe, tuple(piece.to(device, non_blocking=non_blocking) for piece in self.pieces)
        )

    def dense(self) -> Tensor:
        """The tensor, where the pieces are."""
        return self.recipe.make(self.pieces)


Recipes = Mapping[str, Recipe]
"""By the model's own names of its tensors."""
