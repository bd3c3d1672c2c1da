"""Latents to pixels: the Flux VAE, from diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.libraries import ONE_BUILDER, libraries
from chromarpc_server.pipeline.weights.reading import require_same_keys
from chromarpc_server.pipeline.weights.stored import StoredTensor
from chromarpc_server.pipeline.weights.tensor_file import shown

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build_autoencoder(
    config: Mapping[str, object],
    weights: Mapping[str, Tensor | StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> AutoencoderKL:
    """An autoencoder with these weights, as they are stored or dense, built on `meta` and assigned.

    Raises:
        WeightsInvalid: the config cannot be used, or tensors are missing, unknown or of other shapes.
    """
    autoencoder = libraries().autoencoder
    try:
        with ONE_BUILDER, torch.device("meta"):
            model = autoencoder.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # noqa: BLE001 - whatever the library raises is about the file's content
        raise WeightsInvalid(f"the autoencoder's config cannot be used: {shown(str(error))}") from None
    expected = model.state_dict()
    require_same_keys(expected, weights, "autoencoder")
    for name, weight in weights.items():
        if tuple(weight.shape) != tuple(expected[name].shape):
            raise WeightsInvalid(
                f"autoencoder: '{name}' has the shape {tuple(weight.shape)}, and not {tuple(expected[name].shape)}"
            )
    placed = {
        name: weight.to(device=device, dtype=dtype)
        if isinstance(weight, Tensor)
        else weight.to(device).dense().to(dtype)
        for name, weight in weights.items()
    }
    model.load_state_dict(placed, assign=True)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def decode(model: AutoencoderKL, latents: Tensor, rounding: torch.dtype | None = None) -> Tensor:
    """Latents (1, 16, h/8, w/8) → (1, 3, h, w) in 0…1.

    `rounding`: what goes in and comes out is in, if another dtype than the model's own.
    """
    dtype = rounding or model.dtype
    scaled = latents.to(dtype) / model.config.scaling_factor + model.config.shift_factor
    decoded: Tensor = model.decode(scaled.to(model.dtype), return_dict=False)[0].to(dtype)
    return (decoded / 2 + 0.5).clamp(0, 1)


def to_pixels(image: Tensor, *, truncated: bool = False) -> npt.NDArray[np.uint8]:
    """(1, 3, h, w) in 0…1 → (h, w, 3) uint8: 255 · x, rounded, or cut off where `truncated`."""
    scaled = image[0].permute(1, 2, 0).float() * 255
    whole = scaled.trunc() if truncated else scaled.round()
    pixels: npt.NDArray[np.uint8] = whole.to(torch.uint8).cpu().contiguous().numpy()
    return pixels
