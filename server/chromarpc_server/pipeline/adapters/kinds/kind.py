"""What a kind of change is: the parts it is made of, and how they become a change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from chromarpc_server.pipeline.adapters.change import Additive, Factor, Shape

WEIGHT, BIAS = "weight", "bias"


class KindError(ValueError):
    """A module's parts do not make a change."""

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged
        """No model would take it, as with half a pair, rather than this one with its shapes."""


@dataclass(frozen=True)
class Module:
    """What a file has for one module, or for some rows of one."""

    parts: Mapping[str, Tensor]
    """By part, of one kind only."""
    alpha: Callable[[int | None], float | None]
    """From the rank that counts to the file's alpha; None where there is no rank or the file has no alpha."""
    shape: Shape
    """Of the weight, or of the rows of it, that the module stands for."""

    def matrix(self, part: str) -> Tensor:
        """A part that must be there and have two dimensions, neither of them zero.

        Raises:
            KindError: it is not there, or is no matrix.
        """
        tensor = self.parts.get(part)
        if tensor is None:
            raise KindError(f"has no {part}", damaged=True)
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise KindError(f"{part} is of shape {tuple(tensor.shape)}")
        return tensor

    def factor(self, whole: str, left: str, right: str) -> Factor:
        """A matrix given whole, or as the product of two.

        Raises:
            KindError: neither is there, or the two do not fit each other.
        """
        if whole in self.parts:
            return Factor(self.matrix(whole))
        return self.product(left, right)

    def product(self, left: str, right: str) -> Factor:
        """The product of two parts.

        Raises:
            KindError: one is not there, or they do not fit each other.
        """
        a, b = self.matrix(left), self.matrix(right)
        if a.shape[1] != b.shape[0]:
            raise KindError(f"{left} {tuple(a.shape)} and {right} {tuple(b.shape)} differ in rank")
        return Factor(a, b)


@dataclass(frozen=True)
class Kind:
    """One kind of change."""

    name: str
    suffixes: Mapping[str, str]
    """How a key ends → which part it is. A part may have several spellings."""
    build: Callable[[Module], Mapping[str, Additive]]
    """From parts to changes, by what they change: `weight` or `bias`. Raises KindError."""
