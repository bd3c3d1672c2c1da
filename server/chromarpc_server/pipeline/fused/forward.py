"""The same function as `ChromaTransformer.forward`, over several texts at once and with few passes over memory.

All sequences of a step (with guidance two: the prompt's and the empty text's) share latents and timestep, so they
share every matrix product. Their tokens lie packed in one buffer (see `layout`); nothing is masked, and no size or
text length is special.

Between products everything is one kernel: `kernels` on a GPU, `plain` elsewhere. Linears are computed in bf16
from weights as they are held (dequantized w̃, or float8 that is dequantized into a buffer at every call), or, with
`float8_products`, from float8 on both sides: the weights' own, and activations quantized row by row as they are
made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chromarpc_server.pipeline.fused.attention import Attention, Spans, select_attention
from chromarpc_server.pipeline.fused.check import fused_ops
from chromarpc_server.pipeline.fused.layout import Layout
from chromarpc_server.pipeline.fused.streaming import BlockStream
from chromarpc_server.pipeline.models.blocks import DoubleBlock, SelfAttention, SingleBlock
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.layers import Linear
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.weights.quantization import FLOAT8

TEXT_ROWS_MULTIPLE = 32
"""Rows kept for a prompt are a multiple of it where attention takes any length: 16 shapes serve all prompts."""


@dataclass(frozen=True)
class Conditioning:
    """What all steps of one image share."""

    layout: Layout
    texts: Tensor
    """(text rows, C) after the transformer's own projection."""
    rope: tuple[Tensor, Tensor]
    """(R, D/2) float32 each."""
    spans: Spans


@dataclass(frozen=True)
class Activation:
    """Rows as a linear takes them: in the model's dtype, or float8 with a scale for each row."""

    values: Tensor
    scale: Tensor | None = None
    room: Tensor | None = None
    """The buffer (R, in + rank) whose first columns the values are, where there is room beside them."""


class FusedTransformer:
    """Runs a prepared `ChromaTransformer`'s weights. Holds no weights of its own; switches show at once."""

    def __init__(
        self,
        model: ChromaTransformer,
        *,
        float8_products: bool,
        attention: Attention | None = None,
        blocks: BlockStream | None = None,
    ) -> None:
        """Takes a model whose parameters are there.

        Args:
            model: what to run.
            float8_products: multiply the blocks' linears in float8; their weights must be held in float8.
            attention: what to attend with; by default what the device has.
            blocks: what has the blocks' weights where they compute, where some are streamed.
        """
        self._model = model
        self._config: ChromaConfig = model.config
        self._float8 = float8_products
        weight: Tensor = model.img_in.bias
        self.attention = attention or select_attention(weight.device, weight.dtype, model.config.head_dim)
        self.blocks = blocks
        self.variant: object = None
        """What a recorded step depends on besides its shape: the layers that have a path beside them, its rank."""
        self._buffer: Tensor | None = None
        """Where float8 weights are dequantized, one at a time."""

    def condition(self, texts: Sequence[Tensor], grid: tuple[int, int]) -> Conditioning:
        """Embeddings (L, context) of one or two texts, for images of `grid` tokens."""
        device = texts[0].device
        multiple = TEXT_ROWS_MULTIPLE if self.attention.any_length else 1
        layout = Layout.of([len(text) for text in texts], grid[0] * grid[1], multiple=multiple)
        return Conditioning(
            layout=layout,
            texts=self.product(self._model.txt_in, Activation(layout.pad_texts(texts))),
            rope=layout.rope(self._config, grid, device),
            spans=layout.spans(device),
        )

    def __call__(self, latents: Tensor, conditioning: Conditioning, modulations: Tensor) -> Tensor:
        """One step's velocities.

        Args:
            latents: (N, in_channels), shared by the sequences.
            conditioning: from `condition`.
            modulations: (slots, C) of this step, from `ChromaTransformer.modulations`.

        Returns:
            (S, N, in_channels), one for each sequence.
        """
        model, config = self._model, self._config
        layout = conditioning.layout
        ops = fused_ops(latents.device)
        if self.blocks is not None:
            self.blocks.begin()
        run = _Run(self, ops, conditioning, config.num_heads)
        singles, doubles = config.depth_single_blocks, config.depth
        single_mods, image_mods, text_mods, final_mods = modulations.split(
            [3 * singles, 6 * doubles, 6 * doubles, 2]
        )
        image = self.product(model.img_in, Activation(latents)).repeat(len(layout.text_tokens), 1)
        # Both are written to in place, step after step from the same embeddings.
        streams = run.doubles(
            cast("Sequence[DoubleBlock]", model.double_blocks),
            image,
            conditioning.texts.clone(),
            image_mods,
            text_mods,
        )
        packed = run.singles(
            cast("Sequence[SingleBlock]", model.single_blocks), run.pack(*streams), single_mods, doubles
        )
        normed = ops.norm_modulate(packed[layout.image], final_mods[0], final_mods[1])
        velocity = self.product(model.final_layer.linear, Activation(normed))
        return velocity.view(len(layout.text_tokens), layout.image_tokens, -1)

    def product(self, linear: Linear, x: Activation, out: Tensor | None = None) -> Tensor:
        """X · wᵀ + b, into `out` where given. (R, in) → (R, out)."""
        if x.scale is not None:
            if linear.scale is None:
                raise ValueError("float8 products need float8 weights")
            ops = fused_ops(x.values.device)
            scaled: Tensor = ops.scaled_product(x.values, x.scale, linear.weight, linear.scale, linear.bias, out)
            return scaled
        weight = self._weight(linear)
        bias: Tensor = linear.bias
        values = x.values.to(weight.dtype)
        if x.room is not None and linear.has_room_for_adapters:
            taken = self._fill_room(linear, x.room)
        else:
            taken, weight = values, linear.base_of(weight)
        found = F.linear(taken, weight, bias) if out is None else torch.addmm(bias, taken, weight.t(), out=out)
        if taken is values and linear.down is not None:
            self._add_beside(linear, values, found)
        for path in linear.paths:
            found.copy_(path(values, found))
        return found

    def gelu_product(self, linear: Linear, x: Activation) -> Tensor:
        """tanh-GELU of x · wᵀ + b. (R, in) → (R, out)."""
        has_room = x.room is not None and linear.has_room_for_adapters
        if linear.paths or (linear.down is not None and not has_room):
            return F.gelu(self.product(linear, x), approximate="tanh")
        weight = self._weight(linear)
        taken = self._fill_room(linear, x.room) if has_room and x.room is not None else x.values.to(weight.dtype)
        result: Tensor = fused_ops(taken.device).gelu_product(taken, weight, linear.bias)
        return result

    def _fill_room(self, linear: Linear, room: Tensor) -> Tensor:
        """Puts a layer's input times `down` beside the input. (R, in + rank), its last columns free → the same."""
        if linear.down is None:
            raise ValueError("nothing lies beside this layer")
        inner = linear.down.shape[1]
        fused_ops(room.device).narrow_product(room[:, :inner], linear.down, room[:, inner:])
        return room

    def _add_beside(self, linear: Linear, values: Tensor, found: Tensor) -> None:
        """Adds what an adapter gives to a product, in place: for inputs without room beside them."""
        if linear.down is None:
            return
        narrow = values.new_empty(values.shape[0], linear.down.shape[0])
        fused_ops(values.device).narrow_product(values, linear.down, narrow)
        torch.addmm(found, narrow, linear.adapter_up.t(), out=found)

    def _weight(self, linear: Linear) -> Tensor:
        weight: Tensor = linear.weight
        if linear.scale is None:
            return weight
        count = weight.numel()
        if self._buffer is None or self._buffer.numel() < count or self._buffer.device != weight.device:
            largest = max(p.numel() for p in self._model.parameters() if p.dtype == FLOAT8)
            self._buffer = torch.empty(largest, dtype=linear.bias.dtype, device=weight.device)
        dequantized: Tensor = fused_ops(weight.device).dequantize(
            weight, linear.scale, self._buffer[:count].view(weight.shape)
        )
        return dequantized

    @property
    def float8_products(self) -> bool:
        """Whether the blocks' linears are multiplied in float8."""
        return self._float8


def rank_beside(linear: Linear) -> int:
    """Columns that a layer takes beside its input: the rank of its adapters' path."""
    return linear.down.shape[0] if linear.down is not None and linear.has_room_for_adapters else 0


def with_room(wide: Tensor, room: int) -> Activation:
    """The first columns of a buffer (R, C + room) that `room` columns are left beside."""
    return Activation(wide[:, : wide.shape[1] - room], None, wide) if room else Activation(wide)


@dataclass(frozen=True)
class _Run:
    """One forward on its way."""

    fused: FusedTransformer
    ops: ModuleType
    given: Conditioning
    heads: int

    def doubles(
        self, blocks: Sequence[DoubleBlock], image: Tensor, text: Tensor, image_mods: Tensor, text_mods: Tensor
    ) -> tuple[_Pending, _Pending]:
        """All double blocks, over image and text tokens."""
        streams = _Pending(image), _Pending(text)
        for index, block in enumerate(blocks):
            mods = [stream[6 * index : 6 * index + 6] for stream in (image_mods, text_mods)]
            with self.weights_of(index):
                streams = self._double(block, streams, mods)
        return streams

    def _double(
        self, block: DoubleBlock, streams: tuple[_Pending, _Pending], mods: Sequence[Tensor]
    ) -> tuple[_Pending, _Pending]:
        layout, product = self.given.layout, self.fused.product
        (image, text), (image_mod, text_mod) = streams, mods
        normed_image = self.norm(image, image_mod[0], image_mod[1], rank_beside(block.img_attn.qkv))
        normed_text = self.norm(text, text_mod[0], text_mod[1], rank_beside(block.txt_attn.qkv))
        width = 3 * image.x.shape[1]
        qkv = torch.empty(layout.rows, width, dtype=image.x.dtype, device=image.x.device)
        product(block.img_attn.qkv, normed_image, qkv[layout.image])
        joined_text = product(block.txt_attn.qkv, normed_text)
        for rows, part in zip(layout.texts, joined_text.split(layout.text_sizes), strict=True):
            qkv[rows] = part
            self._rotate(block.txt_attn, qkv, rows)
        self._rotate(block.img_attn, qkv, layout.image)
        attended = self.fused.attention(qkv, self.heads, self.given.spans)
        text_out = torch.cat([attended[rows] for rows in layout.texts])
        image_out = attended[layout.image]
        return (
            self._mlp(block.img_attn.proj, block.img_mlp, image, image_out, image_mod),
            self._mlp(block.txt_attn.proj, block.txt_mlp, text, text_out, text_mod),
        )

    def _mlp(self, proj: Linear, mlp: nn.Sequential, stream: _Pending, attended: Tensor, mod: Tensor) -> _Pending:
        product = self.fused.product
        out = product(proj, self.activation(attended))
        first, second = cast("Linear", mlp[0]), cast("Linear", mlp[2])
        normed = self.norm(_Pending(stream.x, out, mod[2]), mod[3], mod[4], rank_beside(first))
        if self.fused.float8_products:
            inner = self._gelu(None, product(first, normed))
        else:
            inner = Activation(self.fused.gelu_product(first, normed))
        return _Pending(stream.x, product(second, inner), mod[5])

    def _rotate(self, attention: SelfAttention, qkv: Tensor, rows: slice) -> None:
        norm = attention.norm
        rope = self.given.rope[0][rows], self.given.rope[1][rows]
        self.ops.qk_norm_rope(qkv[rows], norm.query_norm.scale, norm.key_norm.scale, rope, self.heads)

    def pack(self, image: _Pending, text: _Pending) -> Tensor:
        """The two streams of the last double block in one buffer."""
        layout = self.given.layout
        packed = torch.empty(layout.rows, image.x.shape[1], dtype=image.x.dtype, device=image.x.device)
        for stream in (image, text):
            if stream.added is not None and stream.gate is not None:
                self.ops.gated_add(stream.x, stream.added, stream.gate)
        packed[layout.image] = image.x
        for rows, part in zip(layout.texts, text.x.split(layout.text_sizes), strict=True):
            packed[rows] = part
        return packed

    def singles(self, blocks: Sequence[SingleBlock], x: Tensor, mods: Tensor, first: int) -> Tensor:
        """All single blocks, over all tokens; `first`: how many blocks come before them."""
        stream = _Pending(x)
        for index, block in enumerate(blocks):
            with self.weights_of(first + index):
                stream = self._single(block, stream, mods[3 * index : 3 * index + 3])
        if stream.added is not None and stream.gate is not None:
            self.ops.gated_add(x, stream.added, stream.gate)
        return x

    def _single(self, block: SingleBlock, stream: _Pending, mods: Tensor) -> _Pending:
        shift, scale, gate = mods
        hidden = stream.x.shape[1]
        normed = self.norm(stream, shift, scale, rank_beside(block.linear1))
        both = self.fused.product(block.linear1, normed)
        norm = block.norm
        self.ops.qk_norm_rope(both, norm.query_norm.scale, norm.key_norm.scale, self.given.rope, self.heads)
        qkv, mlp = both[:, : 3 * hidden], both[:, 3 * hidden :]
        attended = self.fused.attention(qkv, self.heads, self.given.spans)
        joined = self._gelu(attended, mlp, rank_beside(block.linear2))
        return _Pending(stream.x, self.fused.product(block.linear2, joined), gate)

    @contextmanager
    def weights_of(self, block: int) -> Iterator[None]:
        """A block computes inside, with its weights on the device."""
        blocks = self.fused.blocks
        if blocks is None:
            yield
            return
        blocks.enter(block)
        yield
        blocks.leave(block)

    def norm(self, stream: _Pending, shift: Tensor, scale: Tensor, room: int) -> Activation:
        """Adds what is pending to the stream, and makes the next linear's input of it, with `room` beside it."""
        quantizes = self.fused.float8_products
        if stream.added is None or stream.gate is None:
            arguments = (stream.x, shift, scale)
            if quantizes:
                return Activation(*self.ops.norm_modulate_quantized(*arguments))
            return with_room(self.ops.norm_modulate(*arguments, room), room)
        gated = (stream.x, stream.added, stream.gate, shift, scale)
        if quantizes:
            return Activation(*self.ops.add_norm_modulate_quantized(*gated))
        return with_room(self.ops.add_norm_modulate(*gated, room), room)

    def activation(self, x: Tensor) -> Activation:
        """Rows that come from attention, as a linear takes them."""
        return Activation(*self.ops.quantize(x)) if self.fused.float8_products else Activation(x)

    def _gelu(self, beside: Tensor | None, mlp: Tensor, room: int = 0) -> Activation:
        if self.fused.float8_products:
            return Activation(*self.ops.join_gelu_quantized(beside, mlp))
        return with_room(self.ops.join_gelu(beside, mlp, room), room)


@dataclass(frozen=True)
class _Pending:
    """A residual stream, and what is yet to be added to it: x + gate · added."""

    x: Tensor
    added: Tensor | None = None
    gate: Tensor | None = None
