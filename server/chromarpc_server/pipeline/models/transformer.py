"""Chroma's transformer: parameter names are the checkpoint's own, dtypes are explicit at every step.

One forward serves every numerics profile: the caller decides how text is padded or masked, how modulations are
batched, and whether weights are held dequantized (see `profiles`). Where the reference relies on autocast,
this module casts by hand, to the same effect: linears and attention in the weights' dtype, normalisations
and the shift and scale after them in float32, the residual stream in the weights' dtype.

Shapes: B batch, N image tokens (h/16 · w/16), L text tokens, S steps, C hidden size, H heads, D head size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.domain.errors import WeightsInvalid

NORM_EPS = 1e-6
SINUSOID_MAX_PERIOD = 10_000
TIMESTEP_FEATURES = 16
SLOT_INDEX_FEATURES = 32
FLUX_AXES = (16, 56, 56)


@dataclass(frozen=True)
class ChromaConfig:
    """Sizes of a Chroma transformer, named as in the reference."""

    in_channels: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    """Double blocks: text and image in separate streams."""
    depth_single_blocks: int
    axes_dim: tuple[int, int, int]
    """RoPE channels of (text, row, column); they add up to the head size."""
    theta: int
    approximator_in_dim: int
    approximator_depth: int
    approximator_hidden_size: int

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def modulation_slots(self) -> int:
        """Vectors the approximator makes for one timestep."""
        return 3 * self.depth_single_blocks + 12 * self.depth + 2

    def to_json(self) -> str:
        """As a checkpoint's header metadata holds it, under `config`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
    ) -> ChromaConfig:
        """Reads the sizes off a checkpoint's tensor names and shapes.

        Block counts and widths come from the tensors. The split of the head over the RoPE axes cannot be seen in
        them: it is Flux's for heads of 128, and else read from `metadata["config"]`.

        Raises:
            WeightsInvalid: another model, or tensors missing.
        """
        if "__x0__" in shapes or any(key.startswith(("nerf_", "img_in_patch")) for key in shapes):
            raise WeightsInvalid(
                "a pixel-space checkpoint (Chroma Radiance or x0 prediction), which is another model"
            )
        try:
            hidden, in_channels = shapes["img_in.weight"]
            context = shapes["txt_in.weight"][1]
            head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
            mlp = shapes["double_blocks.0.img_mlp.0.weight"][0]
            approximator_hidden, approximator_in = shapes["distilled_guidance_layer.in_proj.weight"]
        except KeyError as error:
            raise WeightsInvalid(f"not a Chroma checkpoint: it has no tensor {error}") from None
        axes, theta = _axes(head_dim, metadata or {})
        return cls(
            in_channels=in_channels,
            context_in_dim=context,
            hidden_size=hidden,
            mlp_ratio=mlp / hidden,
            num_heads=hidden // head_dim,
            depth=_count(shapes, r"double_blocks\.(\d+)\."),
            depth_single_blocks=_count(shapes, r"single_blocks\.(\d+)\."),
            axes_dim=axes,
            theta=theta,
            approximator_in_dim=approximator_in,
            approximator_depth=_count(shapes, r"distilled_guidance_layer\.layers\.(\d+)\."),
            approximator_hidden_size=approximator_hidden,
        )


def _axes(head_dim: int, metadata: Mapping[str, str]) -> tuple[tuple[int, int, int], int]:
    axes: Sequence[int] = FLUX_AXES
    theta = 10_000
    if "config" in metadata:
        try:
            config = json.loads(metadata["config"])
            axes = [int(axis) for axis in config.get("axes_dim", axes)]
            theta = int(config.get("theta", theta))
        except (ValueError, TypeError, AttributeError):
            raise WeightsInvalid("the checkpoint's header has a `config` that cannot be read") from None
    if len(axes) != 3 or sum(axes) != head_dim or any(axis <= 0 or axis % 2 for axis in axes):
        raise WeightsInvalid(f"RoPE axes {tuple(axes)} do not add up to a head of {head_dim} channels")
    return (axes[0], axes[1], axes[2]), theta


def _count(shapes: Mapping[str, Sequence[int]], pattern: str) -> int:
    found = (re.match(pattern, key) for key in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


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
    """Shuts off text beyond real + 1 padding token as keys only, which image tokens cannot tell apart.

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


class Linear(nn.Linear):
    """A linear layer that multiplies in its weights' dtype, whatever its input's.

    A float8 weight is dequantized at every call: `bf16(weight) · scale`, one scale for each output row.

    With `down` (rank, in), an adapter's path lies beside the weight: the weight is (out, in + rank), its last
    columns are the adapter's `up`, and the input is taken beside its own product with `down`; a float8 weight has
    its `up` apart.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.down: Tensor | None
        self.register_buffer("down", None, persistent=False)
        self.up: Tensor | None
        self.register_buffer("up", None, persistent=False)
        self.paths: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
        """Further paths beside the weight: each takes input and output, and adds its part to the output."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """(…, in) → (…, out) in the weights' dtype."""
        weight: Tensor = self.weight
        if self.scale is not None:
            weight = weight.to(self.scale.dtype) * self.scale[:, None]
        values = input.to(weight.dtype)
        if self.down is None:
            return self._with_paths(values, F.linear(values, weight, self.bias))
        narrow = F.linear(values, self.down)
        if self.up is None:
            return self._with_paths(values, F.linear(torch.cat((values, narrow), dim=-1), weight, self.bias))
        return self._with_paths(values, F.linear(values, weight, self.bias) + F.linear(narrow, self.up))

    def _with_paths(self, values: Tensor, output: Tensor) -> Tensor:
        for path in self.paths:
            output = path(values, output)
        return output

    @property
    def has_room_for_adapters(self) -> bool:
        """Whether the weight's last columns are an adapter's `up`."""
        return self.down is not None and self.up is None

    @property
    def adapter_up(self) -> Tensor:
        """The adapter's `up` (out, rank), wherever it is held.

        Raises:
            ValueError: no adapter lies beside the weight.
        """
        if self.down is None:
            raise ValueError("no adapter lies beside this layer")
        return self.weight[:, self.down.shape[1] :] if self.up is None else self.up

    def base_of(self, weight: Tensor) -> Tensor:
        """The weight without an adapter's columns. (out, in + rank) → (out, in)."""
        return weight if self.down is None or self.up is not None else weight[:, : self.down.shape[1]]


def linear_weights(config: ChromaConfig) -> tuple[str, ...]:
    """Names of the parameters that are linear layers' weights."""
    with torch.device("meta"):
        model = ChromaTransformer(config)
    return tuple(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear))


class RMSNorm(nn.Module):
    """x / rms(x) · scale, accumulated in float32 and returned in the input's dtype.

    On a GPU in bf16 it runs under autocast, because what autocast does with `rms_norm` is part of the
    reference's sequence of operations and changed inside torch: bf16 up to 2.11, float32 from 2.12.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → the same."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS).to(x.dtype)
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), NORM_EPS).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters over the last axis, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LN(x) + shift in float32; `1 + scale` in the modulation's own dtype."""
    return (1 + scale) * layer_norm(x) + shift


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


class ApproximatorLayer(nn.Module):
    """out(silu(in(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer = Linear(width, width)
        self.out_layer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same."""
        return self.out_layer(F.silu(self.in_layer(x)))  # type: ignore[no-any-return]


class Approximator(nn.Module):
    """Makes every modulation vector from a timestep: what guidance distillation left of Flux's modulations."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        width = config.approximator_hidden_size
        self.in_proj = Linear(config.approximator_in_dim, width)
        self.layers = nn.ModuleList(ApproximatorLayer(width) for _ in range(config.approximator_depth))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(config.approximator_depth))
        self.out_proj = Linear(width, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(S, slots, features) → (S, slots, C)."""
        x = self.in_proj(features)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection back to latent patches."""

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.in_channels)

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """X (B, N, C), modulation (B, 2, C) → (B, N, in_channels)."""
        shift, scale = mod.split(1, dim=1)
        return self.linear(modulate(x, shift, scale))  # type: ignore[no-any-return]


class ChromaTransformer(nn.Module):
    """Predicts the velocity noise − x0 of packed latents."""

    def __init__(self, config: ChromaConfig) -> None:
        """Construct under `torch.device("meta")` to allocate nothing; assign weights afterwards."""
        super().__init__()
        self.config = config
        self.img_in = Linear(config.in_channels, config.hidden_size)
        self.txt_in = Linear(config.context_in_dim, config.hidden_size)
        self.distilled_guidance_layer = Approximator(config)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)

    def modulations(self, timestep: Tensor) -> Tensor:
        """Every block's modulation vectors, which depend on the timestep alone.

        Args:
            timestep: (S,) in 0…1, in the latents' dtype, whose rounding is part of the function.

        Returns:
            (S, slots, C): single blocks 3 each (shift, scale, gate), double blocks' image 6 each (attention, then
            MLP), double blocks' text 6 each, final layer 2 (shift, scale).
        """
        slots = self.config.modulation_slots
        steps = timestep.shape[0]
        time = sinusoids(timestep, TIMESTEP_FEATURES).float()
        guidance = sinusoids(torch.zeros(steps, device=timestep.device), TIMESTEP_FEATURES)
        index = sinusoids(torch.arange(slots, device=timestep.device), SLOT_INDEX_FEATURES)
        per_step = torch.cat([time, guidance], dim=1)[:, None].expand(steps, slots, -1)
        features = torch.cat([per_step, index[None].expand(steps, slots, -1)], dim=-1)
        return self.distilled_guidance_layer(features)  # type: ignore[no-any-return]

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        modulations: Tensor,
        rope: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of packed latents.

        Args:
            img: (B, N, in_channels) packed latents.
            txt: (B, L, context) text embeddings.
            modulations: (B, slots, C), from `modulations`.
            rope: from `rope_table`, for L text tokens.
            attention_mask: broadcastable to (B, H, L + N, L + N) bool, or None where all may attend to all.

        Returns:
            (B, N, in_channels) in the weights' dtype.
        """
        singles, doubles = self.config.depth_single_blocks, self.config.depth
        parts = modulations.split([3 * singles, 6 * doubles, 6 * doubles, 2], dim=1)
        img = self.img_in(img)
        txt = self.txt_in(txt)
        text_tokens = txt.shape[1]
        for index, block in enumerate(self.double_blocks):
            slots = slice(6 * index, 6 * index + 6)
            img, txt = block(img, txt, parts[1][:, slots], parts[2][:, slots], rope, attention_mask)
        x = torch.cat((txt, img), dim=1)
        for index, block in enumerate(self.single_blocks):
            x = block(x, parts[0][:, 3 * index : 3 * index + 3], rope, attention_mask)
        return self.final_layer(x[:, text_tokens:], parts[3])  # type: ignore[no-any-return]
