"""What ships inside the package for models that come without it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def t5_tokenizer_folder() -> Path:
    """The folder with tokenizer.json of T5 v1.1, which every text encoder of Chroma was trained with."""
    return Path(str(resources.files("chromarpc_server") / "assets" / "t5_tokenizer"))
