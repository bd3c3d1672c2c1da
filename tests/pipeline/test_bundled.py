"""What ships inside the package for models that come without it."""

from __future__ import annotations

from chromarpc_server.pipeline.bundled import t5_tokenizer_folder
from chromarpc_server.pipeline.models.text_encoder import END, Tokenizer


def test_the_bundled_tokenizer_is_t5s() -> None:
    tokenized = Tokenizer(t5_tokenizer_folder())("a photo of a cat")
    assert tokenized.ids[0, : tokenized.token_count].tolist() == [3, 9, 1202, 13, 3, 9, 1712, END]
