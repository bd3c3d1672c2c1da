"""Prompts to embeddings: the tokenizer and the T5 encoder.

T5 runs over all 512 tokens without an attention mask, so the padding changes the embeddings; that is the
reference's function, and slicing comes after it, never before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.quantization import dequantize_rows, quantize_rows
from chromarpc_server.pipeline.safetensors_file import SafetensorsFile
from chromarpc_server.pipeline.weights import (
    ReadingProgress,
    open_weights,
    read_json,
    require_same_keys,
    shard_paths,
)

MAX_TOKENS = 512
PAD, END = 0, 1
_SHARED = "shared.weight"
_EMBED = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder takes it."""

    ids: Tensor = field(repr=False)
    """(1, 512) int64: pieces, the end mark, padding."""
    mask: Tensor = field(repr=False)
    """(1, 512) int64, 1 for real tokens."""
    token_count: int
    """Real tokens, with the end mark."""
    cut_count: int
    """Tokens that did not fit."""


@dataclass(frozen=True)
class PromptEmbedding:
    """Conditional and unconditional text, as the transformer takes them."""

    embeds: Tensor = field(repr=False)
    """(1, 512, context)."""
    mask: Tensor = field(repr=False)
    """(1, 512)."""
    empty_embeds: Tensor = field(repr=False)
    """(1, 512, context) of the empty prompt: Chroma's unconditional text."""
    empty_mask: Tensor = field(repr=False)
    """(1, 512)."""


class Tokenizer:
    """T5's tokenizer, truncating at 511 pieces and the end mark, padding to 512."""

    def __init__(self, folder: Path) -> None:
        """Reads `folder`/tokenizer.json.

        Raises:
            WeightsInvalid: it cannot be used.
        """
        try:
            self._tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - the library raises a bare Exception
            raise WeightsInvalid(f"tokenizer.json cannot be used: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Tokenizes one prompt."""
        pieces = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        kept = pieces[: MAX_TOKENS - 1]
        count = len(kept) + 1
        ids = torch.full((1, MAX_TOKENS), PAD, dtype=torch.int64)
        ids[0, :count] = torch.tensor([*kept, END])
        mask = (torch.arange(MAX_TOKENS)[None] < count).to(torch.int64)
        return TokenizedPrompt(ids, mask, count, len(pieces) - len(kept))


def build_text_encoder(
    config: T5Config, weights: dict[str, Tensor], *, device: torch.device, dtype: torch.dtype, quantize: bool
) -> T5EncoderModel:
    """A T5 encoder with these weights, built on `meta` and assigned.

    Args:
        config: sizes.
        weights: by the checkpoint's names; the shared embedding may come under either of its names, or both.
        device: where to compute.
        dtype: what to compute in.
        quantize: round every linear weight to float8 and back, as the reference's quantized encoder does.

    Raises:
        WeightsInvalid: tensors are missing or unknown.
    """
    with torch.device("meta"):
        model = T5EncoderModel(config)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shared = weights.get(_SHARED, weights.get(_EMBED))
    if shared is None:
        raise WeightsInvalid("text encoder: no shared embedding")
    given = {name: tensor for name, tensor in weights.items() if name not in (_SHARED, _EMBED)}
    expected = {name: None for name in model.state_dict() if name not in (_SHARED, _EMBED)}
    require_same_keys(expected, given, "text encoder")
    placed: dict[str, Tensor] = {}
    for name, tensor in given.items():
        weight = tensor.to(device)
        if quantize and name in linears:
            weight = dequantize_rows(*quantize_rows(weight))
        placed[name] = weight.to(dtype)
    embedding = shared.to(device=device, dtype=dtype)
    placed[_SHARED] = placed[_EMBED] = embedding
    model.load_state_dict(placed, assign=True)
    model.set_attn_implementation("sdpa")
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.eval().requires_grad_(False)


def text_encoder_config(folder: Path) -> T5Config:
    """Sizes of the encoder in a Hugging Face folder."""
    return T5Config(**{key: value for key, value in read_json(folder / "config.json").items() if key != "dtype"})


def open_text_encoder(folder: Path) -> tuple[SafetensorsFile, ...]:
    """The encoder's files, with their headers checked."""
    return tuple(open_weights(path) for path in shard_paths(folder))


def read_all(files: tuple[SafetensorsFile, ...], reading: ReadingProgress) -> dict[str, Tensor]:
    """Every tensor of several files."""
    return {name: tensor for file in files for name, tensor in reading.read(file)}


@contextmanager
def _reference_attention(device: torch.device) -> Iterator[None]:
    """The attention that the reference's embeddings come from: unfused, its float32 products in TF32 on a GPU.

    transformers 5.17 hands the position bias over in a layout that no fused kernel takes; later versions do
    not, so the choice is made here.
    """
    with sdpa_kernel(SDPBackend.MATH):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@torch.inference_mode()
def encode(model: T5EncoderModel, ids: Tensor) -> Tensor:
    """Embeds all 512 tokens, padding included, without a mask. (1, 512) → (1, 512, context)."""
    with _reference_attention(model.device):
        embeds: Tensor = model(input_ids=ids.to(model.device))[0]
    return embeds
