"""What a transformer knows of places and times: sinusoids, the RoPE table, and attention masks.

Shapes: B batch, N image tokens (h/16 · w/16), L text tokens, H heads, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chromarpc_server.pipeline.models.config import ChromaConfig

SINUSOID_MAX_PERIOD = 10_000


def sinusoids(positions: Tensor, features: int) -> Tensor:
    """Cosines, then sines, of 1000 · position at geometric frequencies exp(−ln 10⁴ · k / (features/2)).

    Args:
        positions: (n,) of any dtype; the product with 1000 is taken in it, the rest in float32.
        features: even number of features.

    Returns:
        (n, features) in the dtype of `positions`, float32 for integers.
    """
    half = features // 2
    exponent = -math.log(SINUSOID_MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half
    frequencies = torch.exp(exponent).to(positions.device)
    scaled = 1000.0 * positions if positions.is_floating_point() else 1000 * positions
    arguments = scaled[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(arguments), torch.sin(arguments)], dim=-1)
    return embedding.to(positions.dtype) if positions.is_floating_point() else embedding


def rope_table(
    config: ChromaConfig, text_tokens: int, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles: text tokens at position 0, then the image grid row by row.

    Angles are taken in float64 and stored in float32.

    Returns:
        Two tensors (L + N, D/2) float32.
    """
    rows, columns = grid
    image = torch.stack(
        torch.meshgrid(
            torch.arange(rows, dtype=torch.float64, device=device),
            torch.arange(columns, dtype=torch.float64, device=device),
            indexing="ij",
        ),
        dim=-1,
    ).reshape(-1, 2)
    positions = torch.zeros(text_tokens + rows * columns, 3, dtype=torch.float64, device=device)
    positions[text_tokens:, 1:] = image
    angles = []
    for axis, channels in enumerate(config.axes_dim):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        omega = 1.0 / (config.theta**exponent)
        angles.append(positions[:, axis, None] * omega[None])
    angle = torch.cat(angles, dim=-1)
    return torch.cos(angle).float(), torch.sin(angle).float()


def dense_attention_mask(text_mask: Tensor, image_tokens: int, heads: int) -> Tensor:
    """The reference's mask: rows and columns of text beyond real + 1 padding token are shut off.

    Args:
        text_mask: (1, L), 1 for real tokens. One sample: the reference's own construction mixes samples.
        image_tokens: N.
        heads: H. The mask is repeated for each, as the reference does: which attention kernel torch picks may
            depend on the mask's layout.

    Returns:
        (1, H, L + N, L + N) bool, True where attention is allowed.
    """
    kept = attended_text(text_mask)[0]
    both = torch.cat([kept, torch.ones(image_tokens, dtype=torch.bool, device=kept.device)])
    return (both[:, None] & both[None, :])[None, None].repeat(1, heads, 1, 1)


def key_attention_mask(text_mask: Tensor, image_tokens: int) -> Tensor:
    """Shuts off text beyond real + 1 padding token as keys only, which makes no difference to image tokens.

    Args:
        text_mask: (B, L), 1 for real tokens; every sample its own.
        image_tokens: N.

    Returns:
        (B, 1, 1, L + N) bool, True where attention is allowed.
    """
    kept = attended_text(text_mask)
    image = torch.ones(kept.shape[0], image_tokens, dtype=torch.bool, device=kept.device)
    return torch.cat([kept, image], dim=1)[:, None, None]


def attended_text(text_mask: Tensor) -> Tensor:
    """Real tokens plus one padding token, if there is any. (B, L) of 0 and 1 → (B, L) bool."""
    count = text_mask.sum(dim=-1, keepdim=True) + 1
    return torch.arange(text_mask.shape[1], device=text_mask.device)[None] < count
