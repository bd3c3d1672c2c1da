"""Scenes drawn and encoded ahead, from which batches are taken."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chromarpc_server.pipeline.sampling import pack
from tools.mini import parts
from tools.mini.captions import caption
from tools.mini.recipe import (
    HOLLOW,
    TEXT_TOKENS,
    Buckets,
    Concept,
    scenes_for,
    token_ids,
)
from tools.mini.scenes import (
    Scene,
    render,
)


@dataclass
class Bank:
    """Scenes of one size, drawn and encoded ahead."""

    grid: tuple[int, int]
    latents: Tensor
    """(n, N, 64) bf16."""
    embeds: Tensor
    """(n, 32, context) bf16."""
    mask: Tensor
    """(n, 32), 1 for real tokens."""


_EMBEDDED: dict[str, tuple[Tensor, Tensor]] = {}
"""Captions that were embedded already: they come again in other sizes."""


@torch.no_grad()
def embed(model: nn.Module, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings cut to 32 positions, and their masks. The encoder hardly sees padding as keys, so a caption is
    embedded over 64 positions (its embeddings over 512 differ by less than 1e-4); the empty one over all 512."""
    unique = sorted(set(captions) - _EMBEDDED.keys())
    ids = token_ids(unique, 512 if "" in unique else 64)
    for begin in range(0, len(unique), 256):
        piece = ids[begin : begin + 256].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            embeds = model(input_ids=piece)[0][:, :TEXT_TOKENS].bfloat16()
        masks = (piece[:, :TEXT_TOKENS] != 0).long()
        _EMBEDDED.update(zip(unique[begin : begin + 256], zip(embeds, masks, strict=True), strict=True))
    found = [_EMBEDDED[text] for text in captions]
    return torch.stack([embeds for embeds, _ in found]), torch.stack([mask for _, mask in found])


@torch.no_grad()
def build_bank(
    scenes: list[Scene], captions: list[str], size: tuple[int, int], vae: nn.Module, text: nn.Module,
    device: torch.device, seed: int,
) -> Bank:  # fmt: skip
    """Draws and encodes scenes at one size."""
    width, height = size
    latents = []
    for begin in range(0, len(scenes), 256):
        images = render(scenes[begin : begin + 256], width, height, seed=seed + begin, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents.append(pack(parts.encode_images(vae, images)).bfloat16())
    embeds, mask = embed(text, captions, device)
    return Bank((height // 16, width // 16), torch.cat(latents), embeds, mask)


def build_banks(
    count: int, buckets: Buckets, vae: nn.Module, text: nn.Module, device: torch.device,
    *, seed: int, concept: Concept | None = None,
) -> list[Bank]:  # fmt: skip
    """Banks for every size; with a concept, three quarters of the scenes show it and say its word, or all show it
    where it has no word."""
    banks = []
    for index, (size, share) in enumerate(buckets.items()):
        rng = random.Random(seed * 1000 + index)
        chosen = scenes_for(int(count * share), seed * 100 + index)
        captions = [caption(scene, rng, trigger=concept is HOLLOW) for scene in chosen]
        if concept is not None:
            word = concept.trigger
            plain = [word is not None and rng.random() < 0.25 for _ in chosen]
            captions = [
                said.replace(f"{word} ", "") if skip else said for said, skip in zip(captions, plain, strict=True)
            ]
            chosen = [scene if skip else concept.draw(scene) for scene, skip in zip(chosen, plain, strict=True)]
        banks.append(build_bank(chosen, captions, size, vae, text, device, seed=seed + index))
    return banks


def batches(
    banks: list[Bank], shares: list[float], batch: int, seed: int, empty: tuple[Tensor, Tensor]
) -> Iterator[tuple[Bank, Tensor, Tensor, Tensor]]:
    """Endless random batches: bank, latents, embeddings, masks; a tenth with the empty caption."""
    rng = random.Random(seed)
    device = banks[0].latents.device
    generator = torch.Generator(device).manual_seed(seed)
    while True:
        bank = rng.choices(banks, shares)[0]
        rows = torch.randint(len(bank.latents), (batch,), generator=generator, device=device)
        dropped = torch.rand(batch, generator=generator, device=device) < 0.1
        embeds = torch.where(dropped[:, None, None], empty[0], bank.embeds[rows])
        mask = torch.where(dropped[:, None], empty[1], bank.mask[rows])
        yield bank, bank.latents[rows], embeds, mask
