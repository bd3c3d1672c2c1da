"""A cheap look at an unfinished image: a linear map from latent channels to RGB."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.precision import float32_products
from chromarpc_server.pipeline.weights.reading import read_json

# ComfyUI's published factors for the Flux VAE, for latents as the transformer sees them.
_FLUX_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
_FLUX_BIAS = (-0.0329, -0.0718, -0.0851)


@dataclass(frozen=True)
class LatentPreview:
    """rgb = latent · factors + bias, in −1…1, one pixel for each latent."""

    factors: Tensor = field(repr=False)
    """(16, 3) float32."""
    bias: Tensor = field(repr=False)
    """(3,) float32."""

    @classmethod
    def flux(cls) -> LatentPreview:
        """The Flux VAE's map."""
        return cls(torch.tensor(_FLUX_FACTORS), torch.tensor(_FLUX_BIAS))

    @classmethod
    def read(cls, path: Path) -> LatentPreview:
        """A map from JSON: `{"factors": 16 × 3, "bias": 3}`.

        Raises:
            WeightsInvalid: not of that shape.
        """
        value = read_json(path)
        try:
            factors, bias = torch.tensor(value["factors"]), torch.tensor(value["bias"])
        except (KeyError, TypeError, ValueError):
            raise WeightsInvalid(f"{path.name} holds no factors and bias") from None
        if factors.shape != (16, 3) or bias.shape != (3,):
            raise WeightsInvalid(f"{path.name}: factors must be 16 × 3 and bias 3 long")
        return cls(factors.float(), bias.float())

    def render(self, latents: Tensor, max_side: int) -> npt.NDArray[np.uint8]:
        """Draws latents.

        Args:
            latents: (1, 16, h/8, w/8), the predicted x0.
            max_side: pixels of the longer side; larger grids are averaged down, smaller ones kept.

        Returns:
            (height, width, 3) uint8.
        """
        device = latents.device
        with float32_products(device):
            rgb = torch.einsum("bchw,cr->brhw", latents.float(), self.factors.to(device))
        rgb = rgb + self.bias.to(device)[None, :, None, None]
        longer = max(rgb.shape[-2:])
        if longer > max_side:
            size = [max(1, round(side * max_side / longer)) for side in rgb.shape[-2:]]
            rgb = F.interpolate(rgb, size=size, mode="area")
        image = (rgb[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
        pixels: npt.NDArray[np.uint8] = (image * 255).round().to(torch.uint8).cpu().contiguous().numpy()
        return pixels
