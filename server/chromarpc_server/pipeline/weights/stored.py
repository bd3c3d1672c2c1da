"""A part of a model as its file stores it: tensors that become dense one by one, where they are needed."""

from __future__ import annotations

import math
from collections import Counter
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
    widened: bool = False
    """Whether `make` gives more than the file's own numbers, float32 of codes or of fp16: where the checkpoint is
    one of bf16, such a tensor is rounded to that once adapters are merged."""
    detail: str = ""
    """What beside names, dtypes, shapes and bytes of the pieces decides the values, for the revision's hash."""


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
    def device(self) -> torch.device:
        """Where it lies."""
        return self.pieces[0].device

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


def how_stored(recipes: Recipes) -> str:
    """How a part is stored, for people: as most of its values are."""
    values: Counter[str] = Counter()
    for recipe in recipes.values():
        values[recipe.stored_as] += math.prod(recipe.shape)
    return max(values, key=lambda kind: (values[kind], kind), default="")


class StoredWeights(dict[str, StoredTensor]):
    """Tensors of a model by its own names, made of pieces that are there as long as somebody holds this."""

    def __init__(self, recipes: Recipes, pieces: Mapping[str, Tensor]) -> None:
        """`pieces`: by the files' names; what several devices share, they find as long as one holds it here."""
        super().__init__(
            (name, StoredTensor(recipe, tuple(pieces[piece] for piece in recipe.pieces)))
            for name, recipe in recipes.items()
        )
        self.pieces = pieces


def rounding_dtype(recipes: Recipes) -> torch.dtype:
    """What a transformer counts as stored in: float32 where its blocks' weights are plain float32, else bf16.

    Widened tensors are rounded to it once adapters are merged; noise and timesteps are rounded to it, too.
    """
    blocks = [recipe for name, recipe in recipes.items() if "_blocks." in name and len(recipe.shape) > 1]
    plain = all(recipe.dtype == torch.float32 and not recipe.widened for recipe in blocks)
    return torch.float32 if blocks and plain else torch.bfloat16


def as_they_are(tensors: Mapping[str, Tensor]) -> StoredWeights:
    """Tensors that no file holds otherwise than as they are."""
    recipes = {
        name: Recipe((name,), tuple(tensor.shape), tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    return StoredWeights(recipes, tensors)
