"""Dequantizes GGUF's types: by diffusers' torch functions on the tensors' device, else by the `gguf` package.

Both give the same values, in float32. A tensor is worked on in pieces, since its codes pass through several wider
forms on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from chromarpc_server.pipeline.libraries import gguf_functions

PIECE_VALUES = 8 * 1024**2
"""Worked on at a time."""


def dequantizer(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Callable[[Sequence[Tensor]], Tensor]:
    """What makes a tensor of this shape, float32, of its bytes."""
    return partial(_dequantize, kind=kind, shape=shape)


@cache
def is_dequantizable(kind: GGMLQuantizationType) -> bool:
    """Whether the `gguf` package knows what the codes mean."""
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantize(pieces: Sequence[Tensor], kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Tensor:
    (stored,) = pieces
    size, size_bytes = GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, size_bytes)
    dense = torch.empty(len(blocks), size, dtype=torch.float32, device=stored.device)
    count = max(1, PIECE_VALUES // size)
    function = gguf_functions().get(kind)
    for begin in range(0, len(blocks), count):
        some = blocks[begin : begin + count]
        if function is not None:
            values = function(some, size, size_bytes, dtype=torch.float32)
        else:
            with np.errstate(all="ignore"):  # what is not finite is looked for once it is merged
                values = torch.from_numpy(gguf.dequantize(some.cpu().numpy(), kind))
        dense[begin : begin + count] = values.view(len(some), size)
    return dense.view(shape)
