"""Prompts as ComfyUI gives them to T5 and the transformer: weighted, without padding, and all of their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from chromarpc_server.domain.prompt_weights import weighted_parts
from chromarpc_server.pipeline.models.text_encoder import END, PAD, TokenizedPrompt, Tokenizer

MAX_UNPADDED_TOKENS = 2048
"""With the end mark. T5's attention takes memory by the square of it: 3 GiB here, were it of Chroma's size."""
_BEFORE_EMBEDDING = re.compile(r"[ \n](?=embedding:)")
"""ComfyUI looks for embeddings behind these, and tokenizes what follows apart."""


def tokenize_weighted(
    tokenizer: Tokenizer, prompt: str, *, min_padding: int = 0, min_length: int = 0
) -> TokenizedPrompt:
    """Tokenizes each part of a prompt with its weight, and puts the end mark behind them.

    Args:
        tokenizer: T5's.
        prompt: in the syntax of `weighted_parts`.
        min_padding: so many padding tokens are put behind the end mark.
        min_length: it is padded to so many tokens at least.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_parts(prompt):
        for part in _BEFORE_EMBEDDING.split(text):
            pieces = tokenizer.pieces(part)
            ids += pieces
            weights += [weight] * len(pieces)
    cut = max(0, len(ids) - (MAX_UNPADDED_TOKENS - 1))
    ids, weights = ids[: len(ids) - cut], weights[: len(weights) - cut]
    count = len(ids) + 1
    padding = max(min_padding, min_length - count)
    ids += [END] + [PAD] * padding
    weights += [1.0] * (1 + padding)
    return TokenizedPrompt(
        ids=torch.tensor([ids], dtype=torch.int64),
        mask=torch.ones(1, len(ids), dtype=torch.int64),
        token_count=count,
        cut_count=cut,
        weights=tuple(weights) if any(weight != 1 for weight in weights) else (),
        padded=False,
    )


@torch.inference_mode()
def embed_weighted(encode: Callable[[Tensor], Tensor], tokens: TokenizedPrompt) -> Tensor:
    """Embeds tokens, each moved away by its weight from what padding has in its place.

    T5 knows tokens' distances only, so of padding alone every token is the same, however many there are.

    Args:
        encode: (1, L) → (1, L, context).
        tokens: from `tokenize_weighted`.

    Returns:
        (1, L, context): p + w · (e − p), where a weight is not 1.
    """
    embeds = encode(tokens.ids)
    if not tokens.weights:
        return embeds
    padding = encode(torch.tensor([[PAD]])).float()
    weights = torch.tensor(tokens.weights, dtype=torch.float32).to(embeds.device)[None, :, None]
    moved = padding + weights * (embeds.float() - padding)
    return torch.where(weights == 1, embeds, moved.to(embeds.dtype))
