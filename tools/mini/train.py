"""Trains chroma-mini on one GPU: `python -m tools.mini.train --out FOLDER [--minutes 10]`.

Stages, each skipped where its result is in FOLDER already, so that an interrupted run goes on:
autoencoder → text encoder → flow matching (resumed from its last state) → LoRA. Writes the shipped layout to
FOLDER/chroma_mini and the LoRA beside it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tools.mini import parts
from tools.mini.recipe import (
    CONCEPTS,
    RECIPES,
    Recipe,
    clock,
)
from tools.mini.train_autoencoder import train_autoencoder
from tools.mini.train_flow import train_flow, train_lora
from tools.mini.train_text_encoder import train_text_encoder
from tools.mini.vocabulary import save_tokenizer


def export(folder: Path, recipe: Recipe, vae: nn.Module, text: nn.Module) -> Path:
    """Writes the shipped layout."""
    target = folder / "chroma_mini"
    parts.save_autoencoder(vae, target / "vae")
    parts.save_text_encoder(text, target / "text_encoder_2")
    save_tokenizer(target / "tokenizer_2")
    state = {k: v for path in sorted(folder.glob("flow-*.safetensors")) for k, v in load_file(path).items()}
    parts.save_transformer(state, parts.SIZES[recipe.size], target / parts.TRANSFORMER_FILE)
    (target / "latent_preview.json").write_text((folder / "latent_preview.json").read_text())
    return target


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder whose results to start from")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together")
    parser.add_argument("--only-lora", action="store_true", help="keep the flow weights that are there")
    parser.add_argument("--lora", nargs="*", choices=list(CONCEPTS), default=list(CONCEPTS))
    parser.add_argument("--lora-batch", type=int, help="the recipe's if left out")
    parser.add_argument("--recipe", choices=list(RECIPES), default="gpu")
    parser.add_argument("--bank", type=int, default=150_000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    started = time.time()
    device = torch.device(arguments.device)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        for path in arguments.resume.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    recipe = RECIPES[arguments.recipe]
    if arguments.lora_batch:
        recipe = replace(recipe, lora_batch=arguments.lora_batch)
    total = arguments.minutes * 60
    vae = train_autoencoder(folder, recipe.shares["vae"] * total, recipe.vae_crops, device, started)
    text = train_text_encoder(folder, recipe.shares["text"] * total, recipe.text_batch, device, started)
    lora_seconds = total if arguments.only_lora else recipe.shares["lora"] * total
    if not arguments.only_lora:
        remaining = total - (time.time() - started) - lora_seconds
        train_flow(
            folder, max(remaining, 1.0), recipe, vae, text, device, started,
            bank_size=arguments.bank, rate=arguments.rate, compile_blocks=not arguments.no_compile,
        )  # fmt: skip
    export(folder, recipe, vae, text)
    for name in arguments.lora:
        train_lora(
            folder, lora_seconds / len(arguments.lora), recipe, vae, text, device, started,
            concept=CONCEPTS[name], bank_size=max(200, arguments.bank // 10),
        )  # fmt: skip
    clock(f"exported to {folder}", started)


if __name__ == "__main__":
    main()
