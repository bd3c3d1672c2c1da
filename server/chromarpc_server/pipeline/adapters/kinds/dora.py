"""DoRA: a magnitude beside any other kind, which turns its difference into a new direction.

`dora_scale` is kohya, LyCORIS and OneTrainer; `magnitude` ai-toolkit; `lora_magnitude_vector` PEFT.
"""

from __future__ import annotations

from torch import Tensor

from chromarpc_server.pipeline.adapters.change import Additive, Decomposed
from chromarpc_server.pipeline.adapters.kinds.kind import KindError

NAME = "DoRA"
SUFFIXES = (
    ".dora_scale",
    ".magnitude",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default",
    ".lora_magnitude_vector.default.weight",
)


def decompose(change: Additive, magnitude: Tensor) -> Decomposed:
    """The change with its magnitude: (out,) or (out, 1) for row norms, (1, in) for column norms.

    Raises:
        KindError: the magnitude is of another shape.
    """
    if len(change.shape) != 2:
        raise KindError(f"has a DoRA magnitude and changes {change.shape}")
    rows, columns = change.shape
    if tuple(magnitude.shape) in ((rows,), (rows, 1)):
        return Decomposed(change, magnitude.reshape(rows, 1))
    if tuple(magnitude.shape) == (1, columns):
        return Decomposed(change, magnitude)
    raise KindError(f"the DoRA magnitude is of shape {tuple(magnitude.shape)} for a weight of {change.shape}")
