"""A small T5-compatible tokenizer: whole words of the captions, single characters for everything else."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from tools.mini.captions import PLACE_PHRASES, RELATION_PHRASES
from tools.mini.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES

_EXTRA = "a an the and of on in at to background drawing picture image photo painting with , ."


def words() -> list[str]:
    """Every word that captions use."""
    phrases = [phrase for group in (PLACE_PHRASES, RELATION_PHRASES) for ways in group.values() for phrase in ways]
    texts = [*COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *phrases, _EXTRA]
    found = {word for text in texts for word in text.split()}
    return sorted(found | {word.capitalize() for word in found})


def build_tokenizer() -> Tokenizer:
    """The tokenizer: pad 0, `</s>` 1, unk 2, then words, then characters."""
    vocabulary: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    seen = {piece for piece, _ in vocabulary}
    for word in words():
        for piece, score in ((f"▁{word}", -3.0), (word, -5.0)):
            if piece not in seen:
                seen.add(piece)
                vocabulary.append((piece, score))
    for character in string.ascii_letters + string.digits + string.punctuation:
        for piece, score in ((character, -9.0), (f"▁{character}", -9.5)):
            if piece not in seen:
                seen.add(piece)
                vocabulary.append((piece, score))
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and its config as Hugging Face lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
