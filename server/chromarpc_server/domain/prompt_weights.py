r"""ComfyUI's prompt syntax: `(words:1.2)` weighs words, `(words)` weighs them 1.1, `\(` and `\)` are brackets.

Brackets nest: a number replaces what the brackets around it gave, and its absence multiplies that by 1.1. Brackets
that do not pair up are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

EMPHASIS = 1.1
"""Of brackets without a number."""
MAX_DEPTH = 32
"""Of brackets within brackets; deeper ones are text. Every level is looked through again."""
_EMBEDDING = re.compile(r"(?:^|[ \n()])embedding:")
_OPEN, _CLOSE = "\0", "\1"
"""Stand for escaped brackets while others are looked for."""


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A prompt's parts in order, each with its weight; empty parts are left out."""
    hidden = prompt.replace("\\(", _OPEN).replace("\\)", _CLOSE)
    return [
        (text.replace(_OPEN, "(").replace(_CLOSE, ")"), weight) for text, weight in _weighted(hidden, 1.0) if text
    ]


def names_embedding(prompt: str) -> bool:
    """Whether a prompt names a textual inversion, as `embedding:name` does in ComfyUI."""
    return _EMBEDDING.search(prompt) is not None


def _weighted(text: str, weight: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    if depth == MAX_DEPTH:
        yield text, weight
        return
    for piece in _pieces(text):
        if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
            yield from _weighted(*_group(piece[1:-1], weight), depth + 1)
        else:
            yield piece, weight


def _group(inner: str, around: float) -> tuple[str, float]:
    """What stands between two brackets, and its weight."""
    words, colon, number = inner.rpartition(":")
    if colon and words:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if math.isfinite(weight):
            return words, weight
    return inner, around * EMPHASIS


def _pieces(text: str) -> Iterator[str]:
    """Whole brackets and what is between them. A closing bracket too many holds back later opening ones."""
    depth, begin = 0, 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0:
                if begin < place:
                    yield text[begin:place]
                begin = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[begin : place + 1]
                begin = place + 1
    if begin < len(text):
        yield text[begin:]
