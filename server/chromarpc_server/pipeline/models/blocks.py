"""Chroma's blocks: double ones, with text and image in streams of their own, and single ones.

Attention is computed in the weights' dtype, and so is the residual stream.

Shapes: B batch, N image tokens (h/16 · w/16), L text tokens, C hidden size, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import Linear, RMSNorm, modulate


def attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """Rotary embedding, then attention. q, k, v (B, H, L, D) → (B, L, H · D)."""
    x = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates adjacent channel pairs (2i, 2i + 1) by their angles, in float32. (B, H, L, D) → the same."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 · H · D) → q, k, v, each (B, H, L, D)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class QKNorm(nn.Module):
    """RMS norms of queries and keys, per head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)


class SelfAttention(nn.Module):
    """The projections around attention; the attention itself joins two streams (see DoubleBlock)."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, C) → normalised q and k, and v, each (B, H, L, D)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        return self.norm.query_norm(q), self.norm.key_norm(k), v


def _mlp(config: ChromaConfig) -> nn.Sequential:
    inner = int(config.hidden_size * config.mlp_ratio)
    return nn.Sequential(
        Linear(config.hidden_size, inner), nn.GELU(approximate="tanh"), Linear(inner, config.hidden_size)
    )


class DoubleBlock(nn.Module):
    """Text and image in streams of their own, joined in attention."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        self.img_attn = SelfAttention(config)
        self.img_mlp = _mlp(config)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = _mlp(config)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Img (B, N, C), txt (B, L, C), modulations (B, 6, C) each → img, txt."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = img_mod.split(1, dim=1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = txt_mod.split(1, dim=1)
        img_q, img_k, img_v = self.img_attn.project(modulate(img, i_shift1, i_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, t_shift1, t_scale1))
        joined = attend(
            torch.cat((txt_q, img_q), dim=2),
            torch.cat((txt_k, img_k), dim=2),
            torch.cat((txt_v, img_v), dim=2),
            rope,
            mask,
        )
        txt_out, img_out = joined[:, : txt.shape[1]], joined[:, txt.shape[1] :]
        img = img + i_gate1 * self.img_attn.proj(img_out)
        img = img + i_gate2 * self.img_mlp(modulate(img, i_shift2, i_scale2))
        txt = txt + t_gate1 * self.txt_attn.proj(txt_out)
        txt = txt + t_gate2 * self.txt_mlp(modulate(txt, t_shift2, t_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side between two fused linears."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.hidden_size = config.hidden_size
        self.inner = int(config.hidden_size * config.mlp_ratio)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + self.inner)
        self.linear2 = Linear(config.hidden_size + self.inner, config.hidden_size)
        self.norm = QKNorm(config.head_dim)

    def forward(self, x: Tensor, mod: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """X (B, L + N, C), modulation (B, 3, C) → x."""
        shift, scale, gate = mod.split(1, dim=1)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split([3 * self.hidden_size, self.inner], dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        attention = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, rope, mask)
        output: Tensor = self.linear2(torch.cat((attention, F.gelu(mlp, approximate="tanh")), dim=2))
        gated: Tensor = x + gate * output
        return gated
