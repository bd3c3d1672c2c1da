"""The autoencoder's decoder without the waste: channels innermost, and one pass where torch takes several.

diffusers' own lays images out channel by channel, so that every convolution turns them around twice, and torch
normalises a group in one program, of which an image has too few to fill a GPU. The function is the same.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.pipeline.fallbacks import WrongResult, unusable
from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.fused.check import fused_ops
from chromarpc_server.pipeline.memory_errors import translate_memory_error

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

log = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Relative difference from diffusers' decoder beyond which the fused one is not trusted: in bf16 both are up to
0.02 from float32."""


class FusedDecoder(nn.Module):
    """Computes diffusers' `Decoder` from its own parameters, in its own dtype. Holds no weights of its own."""

    def __init__(self, decoder: nn.Module) -> None:
        """`decoder`: of a Flux-like `AutoencoderKL`."""
        super().__init__()
        self.inner = decoder

    def forward(self, latents: Tensor, latent_embeds: None = None) -> Tensor:
        """(1, C, h, w) → (1, 3, 8 · h, 8 · w). `latent_embeds` belongs to diffusers' signature."""
        if latent_embeds is not None:
            raise ValueError("this decoder is not conditioned")
        run = _Run(self.inner, latents.device)
        return run.decode(latents.contiguous(memory_format=torch.channels_last))


class _Run:
    """One decoding. Names of submodules are diffusers', whose classes declare no types for them."""

    def __init__(self, decoder: Any, device: torch.device) -> None:
        self._decoder = decoder
        self._ops = fused_ops(device)

    def decode(self, x: Tensor) -> Tensor:
        decoder = self._decoder
        x = _convolve(x, decoder.conv_in)
        middle = decoder.mid_block
        x = self._residual(middle.resnets[0], x)
        for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = x if attention is None else self._attend(attention, x)
            x = self._residual(block, x)
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x = self._residual(block, x)
            for upsampler in stage.upsamplers or ():
                x = _convolve(self._ops.double_size(x), upsampler.conv)
        return _convolve(self._norm(decoder.conv_norm_out, x), decoder.conv_out)

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        inner = _convolve(self._norm(block.norm1, x), block.conv1, biased=False)
        inner = self._norm(block.norm2, inner, bias=block.conv1.bias)
        inner = _convolve(inner, block.conv2, biased=False)
        if block.conv_shortcut is not None:
            x = _convolve(x, block.conv_shortcut)
        return cast("Tensor", self._ops.add_residual(x, inner, block.conv2.bias))

    def _attend(self, attention: Any, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        tokens = self._norm(attention.group_norm, x, activates=False).permute(0, 2, 3, 1).reshape(1, -1, channels)
        q, k, v = (
            F.linear(tokens, linear.weight, linear.bias).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(attended, attention.to_out[0].weight)
        out = out.view(1, height, width, channels).permute(0, 3, 1, 2)
        return cast("Tensor", self._ops.add_residual(x, out, attention.to_out[0].bias))

    def _norm(
        self, norm: nn.GroupNorm, x: Tensor, *, bias: Tensor | None = None, activates: bool = True
    ) -> Tensor:
        return cast(
            "Tensor",
            self._ops.group_norm(x, bias, norm.weight, norm.bias, norm.num_groups, norm.eps, activates=activates),
        )


def _convolve(x: Tensor, convolution: nn.Conv2d, *, biased: bool = True) -> Tensor:
    bias = convolution.bias if biased else None
    result = F.conv2d(x, convolution.weight, bias, padding=cast("tuple[int, int]", convolution.padding))
    return result.contiguous(memory_format=torch.channels_last)


def with_fused_decoder(
    model: AutoencoderKL, report: Callable[[DeviceFallback], object] = lambda _: None
) -> AutoencoderKL:
    """The same autoencoder, over the same weights, with a `FusedDecoder`.

    Itself where that is no gain (on a CPU, or where kernels do not compile) or differs from diffusers' decoder.

    Args:
        model: what to decode with.
        report: called with the reason where it should be a gain and is none.

    Raises:
        RuntimeError: the device has too little memory to find out.
    """
    device = model.device
    if fused_ops(device) is plain:
        return model
    fused = fuse(model)
    try:
        difference = _difference(model, fused)
        if not difference <= TOLERANCE:
            raise WrongResult(f"its result is {difference:.3g} off")  # noqa: TRY301 - one way out for all that is wrong
    except Exception as problem:  # another kind of decoder, or a compiler's failure: there is diffusers' own
        if translate_memory_error(problem) is not None:
            raise  # it says nothing of the decoder: the next job finds out
        log.warning(
            "decoder.wrong" if isinstance(problem, WrongResult) else "decoder.unusable",
            extra={"error": f"{type(problem).__name__}: {problem}"[:300]},
        )
        report(DeviceFallback(Part.DECODER, unusable(problem)))
        return model
    return fused


def fuse(model: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder, over the same weights and with the same settings, with a `FusedDecoder`."""
    fused = copy.copy(model)
    fused._modules = {**model._modules, "decoder": FusedDecoder(model.decoder)}
    return fused


@torch.inference_mode()
def _difference(model: AutoencoderKL, fused: AutoencoderKL) -> float:
    """Relative, on a few latents."""
    generator = torch.Generator(model.device).manual_seed(1)
    shape = (1, int(model.config.latent_channels), 8, 12)
    latents = torch.randn(shape, generator=generator, device=model.device).to(model.dtype)
    expected = model.decoder(latents).float()
    return float((fused.decoder(latents).float() - expected).norm() / expected.norm())
