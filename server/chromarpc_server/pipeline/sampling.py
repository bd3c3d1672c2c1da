"""Flow-matching sampling as free functions: noise → schedule → denoise → unpack.

Shapes: h, w image size in pixels; N = h/16 · w/16 packed latent tokens of 64 channels (c, dy, dx).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from chromarpc_server.pipeline.libraries import libraries

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

LATENT_CHANNELS = 16
PATCH = 2
PIXELS_PER_LATENT = 8
BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
_LEGACY_BLOCK = 16


def token_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of packed latent tokens of an image."""
    side = PIXELS_PER_LATENT * PATCH
    return height // side, width // side


def image_tokens(width: int, height: int) -> int:
    """N, packed latent tokens of an image."""
    rows, columns = token_grid(width, height)
    return rows * columns


def pack(latents: Tensor) -> Tensor:
    """(B, 16, h/8, w/8) → (B, N, 64), channel order (c, dy, dx)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(packed: Tensor, width: int, height: int) -> Tensor:
    """(B, N, 64) → (B, 16, h/8, w/8)."""
    rows, columns = token_grid(width, height)
    patches = packed.reshape(packed.shape[0], rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(packed.shape[0], -1, rows * PATCH, columns * PATCH)


def draw_noise(width: int, height: int, seed: int, dtype: torch.dtype, draw: str) -> Tensor:
    """Initial noise of an image, the same on every torch and every machine.

    Args:
        width: pixels, a multiple of 16.
        height: pixels, a multiple of 16.
        seed: of the CPU generator.
        dtype: of the latents; float32 latents are always drawn in float32.
        draw: `float32`, drawn in float32 and rounded; or `legacy`, what torch up to 2.11 drew in bf16.

    Returns:
        (1, N, 64) in `dtype`, on the CPU.
    """
    shape = (1, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    generator = torch.Generator("cpu").manual_seed(seed)
    if draw == "legacy" and dtype == torch.bfloat16:
        noise = _legacy_bfloat16_normal(shape, generator)
    else:
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return pack(noise.to(dtype))


def _legacy_bfloat16_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Box–Muller in bf16 from 8-bit uniforms, in blocks of 16, as torch up to 2.11 fills a bf16 tensor.

    `torch.rand` in float32 gives the low 24 bits of each 32-bit output; the low 8 of them are kept.
    """
    count = 1
    for size in shape:
        count *= size
    bits = (torch.rand(count, generator=generator, dtype=torch.float32) * 2**24).to(torch.int64) & 0xFF
    uniform = (bits.float() / 256).reshape(-1, 2, _LEGACY_BLOCK // 2)
    first = (1 - uniform[:, 0]).bfloat16()
    log = torch.log(first.float()).bfloat16()
    radius = torch.sqrt((-2 * log.float()).bfloat16().float()).bfloat16()
    angle = (2 * torch.pi * uniform[:, 1].double()).bfloat16()
    cos = torch.cos(angle.float()).bfloat16()
    sin = torch.sin(angle.float()).bfloat16()
    pairs = torch.stack([(radius.float() * cos.float()), (radius.float() * sin.float())], dim=1)
    return pairs.bfloat16().reshape(shape)


def shift_mu(image_tokens: int) -> float:
    """Shift of the schedule: linear in the token count, 0.5 at 256 and 1.15 at 4096, extrapolated beyond."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return image_tokens * slope + BASE_SHIFT - slope * BASE_TOKENS


def make_scheduler(image_tokens: int, steps: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """A fresh flow-match Euler scheduler with its sigmas set; it holds the state of one run."""
    scheduler = libraries().scheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=BASE_SHIFT,
        max_shift=MAX_SHIFT,
        base_image_seq_len=BASE_TOKENS,
        max_image_seq_len=MAX_TOKENS,
    )
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_mu(image_tokens), device=device)
    return scheduler


def scheduler_of(sigmas: Sequence[float], device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """The same over given noise levels, falling, the last of which is 0."""
    scheduler = libraries().scheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(sigmas[:-1]), device=device)
    return scheduler


@dataclass(frozen=True)
class DenoiseStep:
    """What one step did."""

    index: int
    """From 0."""
    total: int
    """Steps of the schedule, which may be others than were asked for; never calls of the model."""
    sigma: float
    """Noise level the step started from."""
    timestep: float
    """As the transformer saw it, 0 to 1000."""
    sigmas: tuple[float, ...]
    """The whole schedule, total + 1 values."""
    latents: Tensor = field(repr=False)
    """(1, N, 64) after the step."""
    predicted_x0: Tensor = field(repr=False)
    """(1, N, 64): the finished image as this step predicts it."""


Velocity = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(latents, number of the call) → conditional and, where guidance is on, unconditional velocity."""


def seen_timesteps(scheduler: FlowMatchEulerDiscreteScheduler, dtype: torch.dtype) -> Tensor:
    """Timesteps in 0…1000 as the transformer sees them: rounded to `dtype`, the latents' own. (S,)."""
    timesteps: Tensor = scheduler.timesteps.to(dtype)
    return timesteps


def denoise(
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    timesteps: Tensor,
    guidance_scale: float,
    velocity: Velocity,
) -> Iterator[DenoiseStep]:
    """Runs the Euler steps from `noise`, yielding after each; `timesteps` (S,) are reported as they are.

    v = u + g · (c − u) in the latents' dtype; the scheduler adds (σ' − σ) · v in float32 and rounds back.
    """
    latents = noise
    sigmas = tuple(scheduler.sigmas.tolist())
    seen = timesteps.tolist()
    for index, timestep in enumerate(scheduler.timesteps):
        conditional, unconditional = velocity(latents, index)
        guided = conditional
        if unconditional is not None:
            guided = unconditional + guidance_scale * (conditional - unconditional)
        predicted_x0 = latents.float() - sigmas[index] * guided.float()
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        yield DenoiseStep(
            index=index,
            total=len(seen),
            sigma=sigmas[index],
            timestep=seen[index],
            sigmas=sigmas,
            latents=latents,
            predicted_x0=predicted_x0,
        )
