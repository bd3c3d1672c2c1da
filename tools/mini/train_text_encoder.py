"""The second stage of training: the text encoder learns what captions say."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tools.mini import parts
from tools.mini.captions import PLACE_PHRASES, TRIGGER, caption
from tools.mini.recipe import (
    TEXT_TOKENS,
    clock,
    token_ids,
)
from tools.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    random_scene,
)
from tools.mini.vocabulary import build_tokenizer

_CLASSES = (
    len(COLORS), len(SHAPES), len(COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, len(PLACES) + 1,
    len(BACKGROUNDS) + 1, len(RELATIONS) + 1, 2,
)  # fmt: skip
"""What the heads read: colours and shapes of both objects, size, place, background, relation, the LoRA's word."""


def _said(scene: Scene, text: str) -> list[int]:
    """The classes that a caption states; the last of each where it leaves them open."""
    lower = text.lower()
    words = set(re.findall(r"\w+", lower))
    first = scene.things[0]
    second = scene.things[1] if len(scene.things) > 1 else None
    relation, place = len(RELATIONS), len(PLACES)
    if second and " and " not in lower:
        relation = list(RELATIONS).index(scene.relation)
    if second is None and any(phrase in lower for phrase in PLACE_PHRASES[first.place]):
        place = list(PLACES).index(first.place)
    return [
        list(COLORS).index(first.color),
        SHAPES.index(first.shape),
        list(COLORS).index(second.color) if second else len(COLORS),
        SHAPES.index(second.shape) if second else len(SHAPES),
        list(SIZES).index(first.size) if first.size in words else len(SIZES),
        place,
        list(BACKGROUNDS).index(scene.background) if scene.background in words else len(BACKGROUNDS),
        relation,
        int(TRIGGER in words),
    ]


def train_text_encoder(
    folder: Path, seconds: float, batch: int, device: torch.device, started: float
) -> nn.Module:
    """Teaches the encoder the captions' meaning, by having linear heads read scenes off every token."""
    path = folder / "t5.safetensors"
    torch.manual_seed(2)
    model = parts.new_text_encoder(build_tokenizer().get_vocab_size()).to(device)
    if path.is_file():
        model.load_state_dict(load_file(path), strict=False)
        return model.eval().requires_grad_(False)
    heads = nn.ModuleList(nn.Linear(parts.CONTEXT, size) for size in _CLASSES).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3, betas=(0.9, 0.98))
    begun, step = time.time(), 0
    while (progress := (time.time() - begun) / seconds) < 1:
        rng = random.Random(30_000 + step)
        chosen = [random_scene(rng, two=rng.random() < 0.6) for _ in range(batch)]
        captions = [caption(scene, rng, trigger=rng.random() < 0.1) for scene in chosen]
        ids = token_ids(captions, TEXT_TOKENS).to(device)
        labels = torch.tensor([_said(*pair) for pair in zip(chosen, captions, strict=True)]).to(device)
        rate = 2e-3 * min(1, (step + 1) / 50) * (1 if progress < 0.4 else max(0.01, (1 - progress) / 0.6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        real = ids != 0
        embeds = model(input_ids=ids)[0][real]
        wanted = labels[:, None].expand(-1, ids.shape[1], -1)[real]
        loss = sum(F.cross_entropy(head(embeds), wanted[:, index]) for index, head in enumerate(heads))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            clock(f"text encoder step {step} loss {float(loss.detach()):.3f}", started)
    clock(f"text encoder done: {step} steps, loss {float(loss.detach()):.3f}", started)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(state, path)
    return model.eval().requires_grad_(False)
