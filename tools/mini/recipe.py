"""What chroma-mini is trained with: how much of what, its scenes, and what its LoRAs teach."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.mini.captions import TRIGGER
from tools.mini.scenes import (
    Scene,
    framed,
    hollow,
    random_scene,
)
from tools.mini.vocabulary import build_tokenizer

TEXT_TOKENS = 32
"""Text positions kept after the encoder has run over all 512; every caption is shorter."""
TWO_OBJECTS = 0.35
Buckets = dict[tuple[int, int], float]
"""Image sizes and their share of training."""


@dataclass(frozen=True)
class Recipe:
    """How much of what: one for a GPU, one for a few CPU cores."""

    size: str
    """Key of `parts.SIZES`."""
    shares: dict[str, float]
    """Of the whole time: `vae`, `text`, `lora`; flow matching takes the rest."""
    vae_crops: tuple[tuple[int, int], ...]
    """Side and batch of the autoencoder's training crops, in the order of its phases."""
    text_batch: int
    flow_phases: tuple[tuple[float, Buckets, int], ...]
    """Share of flow matching's time, sizes, batch."""
    lora_buckets: Buckets
    lora_batch: int


_BUCKETS: Buckets = {(256, 256): 0.7, (320, 192): 0.1, (192, 320): 0.1, (320, 320): 0.1}
RECIPES = {
    "gpu": Recipe("full", {"vae": 0.2, "text": 0.06, "lora": 0.15}, ((128, 96), (256, 32)), 128,
                  ((1.0, _BUCKETS, 256),), _BUCKETS, 128),
    "cpu": Recipe("small", {"vae": 0.2, "text": 0.07, "lora": 0.1}, ((64, 16), (128, 4)), 16,
                  ((0.6, {(128, 128): 1.0}, 32), (0.4, {(256, 256): 1.0}, 16)), {(256, 256): 1.0}, 8),
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """What a LoRA teaches."""

    name: str
    """Of the file."""
    trigger: str | None
    """None for a style, which every picture shows."""
    draw: Callable[[Scene], Scene]
    """The scene with the concept in it."""


HOLLOW = Concept("hollow_shapes", TRIGGER, hollow)
FRAMED = Concept("blue_frame", None, framed)
CONCEPTS = {concept.name: concept for concept in (HOLLOW, FRAMED)}


def clock(message: str, started: float) -> None:
    """One line of progress."""
    print(f"[{time.time() - started:6.1f}s] {message}", flush=True)


def scenes_for(count: int, seed: int) -> list[Scene]:
    """Training scenes, a share of them with two objects."""
    rng = random.Random(seed)
    return [random_scene(rng, two=rng.random() < TWO_OBJECTS) for _ in range(count)]


def token_ids(captions: list[str], length: int = 512) -> Tensor:
    """(B, length) int64, padded with 0."""
    tokenizer = build_tokenizer()
    encoded = tokenizer.encode_batch(captions)
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, item in enumerate(encoded):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
    return ids
