"""Where the tokens of one or two sequences lie in the packed buffer.

    unused | text 0 | image 0                        one sequence
    unused | text 0 | image 0 | image 1 | text 1     two: the prompt's, and the empty text's

Each sequence is contiguous for attention, and all image tokens are for the products that treat image and text
apart. The rows before the first text are there so that texts of many lengths share one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chromarpc_server.pipeline.fused.attention import Spans
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.positions import rope_table


@dataclass(frozen=True)
class Layout:
    """Sizes of the buffer's parts."""

    text_rows: int
    """Rows kept for the first text, its own and unused ones."""
    text_tokens: tuple[int, ...]
    """Of each sequence."""
    image_tokens: int

    @classmethod
    def of(cls, text_tokens: Sequence[int], image_tokens: int, *, multiple: int = 1) -> Layout:
        """For texts of these lengths, with the first one's rows rounded up to a multiple."""
        rows = -(-text_tokens[0] // multiple) * multiple
        return cls(rows, tuple(text_tokens), image_tokens)

    @property
    def shape(self) -> tuple[int, ...]:
        """What decides every tensor's shape."""
        return (self.text_rows, *self.text_tokens[1:], self.image_tokens, len(self.text_tokens))

    @property
    def rows(self) -> int:
        """In all."""
        return self.text_rows + sum(self.text_tokens[1:]) + len(self.text_tokens) * self.image_tokens

    @property
    def image(self) -> slice:
        """Image tokens of all sequences."""
        return slice(self.text_rows, self.text_rows + len(self.text_tokens) * self.image_tokens)

    @property
    def texts(self) -> tuple[slice, ...]:
        """Rows kept for each text."""
        first = slice(0, self.text_rows)
        return (first, *(slice(self.rows - count, self.rows) for count in self.text_tokens[1:]))

    @property
    def text_sizes(self) -> list[int]:
        """Rows of each."""
        return [rows.stop - rows.start for rows in self.texts]

    def spans(self, device: torch.device) -> Spans:
        """The sequences."""
        first = self.text_rows + self.image_tokens
        bounds = (self.text_rows - self.text_tokens[0], first)
        if len(self.text_tokens) > 1:
            bounds = (*bounds, self.rows)  # type: ignore[assignment]
        return Spans(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), first)

    def pad_texts(self, texts: Sequence[Tensor]) -> Tensor:
        """Embeddings (L, context) of each text → (all text rows, context), zeros in unused ones."""
        unused = texts[0].new_zeros(self.text_rows - self.text_tokens[0], texts[0].shape[1])
        return torch.cat((unused, *texts))

    def rope(self, config: ChromaConfig, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R, D/2) of every row; text tokens, and unused rows, are at position 0."""
        tables = rope_table(config, self.text_rows, grid, device)
        if len(self.text_tokens) == 1:
            return tables
        count = self.text_tokens[1]
        packed = [torch.cat((table, table[self.text_rows :], table[:1].expand(count, -1))) for table in tables]
        return packed[0], packed[1]
