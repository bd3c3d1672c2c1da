"""The transformer as the trainer runs it: every operation in the weights' dtype, adapters beside the weights.

The same function as `pipeline.transformer`, from the same parameter names, in another sequence of roundings: no
autocast, so normalisations, shift and scale stay in the weights' dtype; a quantized product is rounded before its
bias is added; an adapter's low-rank path runs in float32 and is rounded before it is added to the layer's output.

Shapes: B batch, N image tokens (h/16 · w/16), L text tokens, C hidden size, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from chromarpc_server.pipeline.models.blocks import rotate, split_heads
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import NORM_EPS
from chromarpc_server.pipeline.models.positions import sinusoids
from chromarpc_server.pipeline.models.transformer import SLOT_INDEX_FEATURES, TIMESTEP_FEATURES
from chromarpc_server.pipeline.trainer.paths import Path
from chromarpc_server.pipeline.weights.quantizers import Bias, QuantizedLinear

APPROXIMATOR = "distilled_guidance_layer"
"""Name of the module that makes the modulations."""
Modulation = tuple[Tensor, Tensor, Tensor]
"""Shift, scale and gate, each (B, 1, C)."""


@dataclass(frozen=True)
class TrainerLinear:
    """One linear layer with what adapters add beside it."""

    weight: QuantizedLinear
    bias: Tensor | None = field(repr=False)
    beside: tuple[Path, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out) in the weight's dtype."""
        quantized = self.weight
        if quantized.bias is Bias.FUSED:
            output = F.linear(x, quantized.weight, self.bias)
        else:
            output = torch.matmul(x, quantized.weight.t())
            if quantized.scale is not None:
                output = output * quantized.scale
            if self.bias is not None:
                output = output + self.bias
        for path in self.beside:
            output = path(x, output)
        return output


@dataclass(frozen=True)
class TrainerTransformer:
    """A Chroma transformer's weights, and its forward as the trainer computes it."""

    config: ChromaConfig
    linears: Mapping[str, TrainerLinear] = field(repr=False)
    """By module name, `double_blocks.0.img_attn.qkv`."""
    gains: Mapping[str, Tensor] = field(repr=False)
    """Of the RMS norms, by parameter name, `double_blocks.0.img_attn.norm.query_norm.scale`."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.linears["img_in"].weight.weight.dtype

    @torch.inference_mode()
    def __call__(
        self, img: Tensor, txt: Tensor, timestep: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """Velocity of packed latents.

        Args:
            img: (1, N, in_channels) packed latents.
            txt: (1, L, context) text embeddings.
            timestep: (1,) in 0…1, in the latents' dtype.
            rope: cosines and sines (L + N, D/2) float32.
            mask: (1, H, L + N, L + N) bool, True where attention is allowed.

        Returns:
            (1, N, in_channels) in the weights' dtype.
        """
        config = self.config
        modulations = self._modulations(timestep)
        singles, doubles = 3 * config.depth_single_blocks, 6 * config.depth
        img, txt = self.linears["img_in"](img), self.linears["txt_in"](txt)
        for index in range(config.depth):
            image_at, text_at = singles + 6 * index, singles + doubles + 6 * index
            img, txt = self._double(
                f"double_blocks.{index}",
                img,
                txt,
                (_modulation(modulations, image_at), _modulation(modulations, image_at + 3)),
                (_modulation(modulations, text_at), _modulation(modulations, text_at + 3)),
                rope,
                mask,
            )
        tokens = txt.shape[1]
        x = torch.cat((txt, img), dim=1)
        for index in range(config.depth_single_blocks):
            x = self._single(f"single_blocks.{index}", x, _modulation(modulations, 3 * index), rope, mask)
        last = singles + 2 * doubles
        shift, scale = modulations[:, last : last + 1], modulations[:, last + 1 : last + 2]
        return self.linears["final_layer.linear"](_modulate(x[:, tokens:], shift, scale))

    def _modulations(self, timestep: Tensor) -> Tensor:
        """(1,) → (1, slots, C)."""
        return make_modulations(self.config, self._linear, self.gains, timestep)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.linears[name](x)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return _rms(x, self.gains[name])

    def _heads(self, name: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3 · C) → normalised q and k, and v, each (B, H, L, D)."""
        q, k, v = split_heads(qkv, self.config.num_heads)
        return self._rms(q, f"{name}.query_norm.scale"), self._rms(k, f"{name}.key_norm.scale"), v

    def _double(
        self,
        name: str,
        img: Tensor,
        txt: Tensor,
        image_modulation: tuple[Modulation, Modulation],
        text_modulation: tuple[Modulation, Modulation],
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        linears = self.linears
        heads = []
        for side, x, (before, _) in (("txt", txt, text_modulation), ("img", img, image_modulation)):
            qkv = linears[f"{name}.{side}_attn.qkv"](_modulate(x, *before[:2]))
            heads.append(self._heads(f"{name}.{side}_attn.norm", qkv))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        joined = _attend(q, k, v, rope, mask)
        tokens = txt.shape[1]
        img = self._finish(name, "img", img, joined[:, tokens:], image_modulation)
        txt = self._finish(name, "txt", txt, joined[:, :tokens], text_modulation)
        return img, txt

    def _finish(
        self, name: str, side: str, x: Tensor, attention: Tensor, modulation: tuple[Modulation, Modulation]
    ) -> Tensor:
        """One stream of a double block after attention."""
        linears = self.linears
        (_, _, attention_gate), (shift, scale, gate) = modulation
        x = x + attention_gate * linears[f"{name}.{side}_attn.proj"](attention)
        inner = linears[f"{name}.{side}_mlp.0"](_modulate(x, shift, scale))
        return x + gate * linears[f"{name}.{side}_mlp.2"](F.gelu(inner, approximate="tanh"))

    def _single(
        self, name: str, x: Tensor, modulation: Modulation, rope: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        shift, scale, gate = modulation
        hidden = self.config.hidden_size
        joined = self.linears[f"{name}.linear1"](_modulate(x, shift, scale))
        qkv, mlp = joined.split([3 * hidden, joined.shape[-1] - 3 * hidden], dim=-1)
        attention = _attend(*self._heads(f"{name}.norm", qkv), rope, mask)
        output = self.linears[f"{name}.linear2"](torch.cat((attention, F.gelu(mlp, approximate="tanh")), dim=2))
        return x + gate * output


def make_modulations(
    config: ChromaConfig,
    linear: Callable[[str, Tensor], Tensor],
    gains: Mapping[str, Tensor],
    timestep: Tensor,
) -> Tensor:
    """Every block's modulation vectors at some timesteps; see `ChromaTransformer.modulations` for their order.

    Args:
        config: sizes.
        linear: applies the linear layer of a module's name.
        gains: of the RMS norms, by parameter name, in the trainer's dtype.
        timestep: (S,) in 0…1, in the trainer's dtype.

    Returns:
        (S, slots, C) in the trainer's dtype.
    """
    slots = config.modulation_slots
    device = timestep.device
    prefix = APPROXIMATOR
    time = sinusoids(timestep, TIMESTEP_FEATURES)
    guidance = sinusoids(torch.zeros_like(timestep, dtype=torch.float32), TIMESTEP_FEATURES)
    index = sinusoids(torch.arange(slots, device=device), SLOT_INDEX_FEATURES)
    per_step = torch.cat([time, guidance], dim=1)[:, None].repeat(1, slots, 1)
    x = torch.cat([per_step, index.expand(len(timestep), -1, -1)], dim=-1)
    x = x.to(gains[f"{prefix}.norms.0.scale"].dtype)
    x = linear(f"{prefix}.in_proj", x)
    for layer in range(config.approximator_depth):
        inner = _rms(x, gains[f"{prefix}.norms.{layer}.scale"])
        inner = F.silu(linear(f"{prefix}.layers.{layer}.in_layer", inner))
        x = x + linear(f"{prefix}.layers.{layer}.out_layer", inner)
    return linear(f"{prefix}.out_proj", x)


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, NORM_EPS)


def _modulation(modulations: Tensor, at: int) -> Modulation:
    return modulations[:, at : at + 1], modulations[:, at + 1 : at + 2], modulations[:, at + 2 : at + 3]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LN(x) + shift, each operation rounded to the weights' dtype."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) + shift


def _attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    x = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def attended_text(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Which text tokens attention sees: the real ones, and one more at the position that their count names.

    The trainer casts the mask to the model's dtype before it counts. In bf16 a count above 256 is rounded to even,
    so the one more may be a token that is real anyway (301 counts as 300), or one with a gap before it (303 as
    304).

    Args:
        mask: (1, L), 1 for real tokens.
        dtype: the model's.

    Returns:
        (1, L) bool.
    """
    count = int(mask.to(dtype).sum(dim=-1).item())
    attended = mask.bool().clone()
    attended[:, count : count + 1] = True
    return attended


def attention_mask(attended: Tensor, image_tokens: int, heads: int) -> Tensor:
    """(1, L) bool → (1, H, L + N, L + N) bool: rows and columns of text that is not attended are shut off."""
    both = torch.cat([attended[0], torch.ones(image_tokens, dtype=torch.bool, device=attended.device)])
    return (both[:, None] & both[None, :])[None, None].repeat(1, heads, 1, 1)
