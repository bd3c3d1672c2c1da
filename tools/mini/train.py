"""Trains chroma-mini on one GPU: `python -m tools.mini.train --out FOLDER [--minutes 10]`.

Stages, each skipped where its result is in FOLDER already, so that an interrupted run goes on:
autoencoder → text encoder → flow matching (resumed from its last state) → LoRA. Writes the shipped layout to
FOLDER/chroma_mini and the LoRA beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chromarpc_server.pipeline.models.transformer import ChromaTransformer, key_attention_mask, rope_table
from chromarpc_server.pipeline.sampling import pack, shift_mu
from tools.mini import parts
from tools.mini.captions import PLACE_PHRASES, TRIGGER, caption
from tools.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    framed,
    hollow,
    random_scene,
    render,
)
from tools.mini.vocabulary import build_tokenizer, save_tokenizer

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


def train_autoencoder(
    folder: Path, seconds: float, crops: tuple[tuple[int, int], ...], device: torch.device, started: float
) -> nn.Module:
    """Reconstruction with L1 and edges, a small KL term, and noise on the latents so that they are smooth."""
    path = folder / "vae.safetensors"
    model = parts.new_autoencoder().to(device)
    if path.is_file():
        model.load_state_dict(load_file(path))
        statistics = json.loads((folder / "vae.json").read_text())
        model.register_to_config(**statistics)
        return model.eval().requires_grad_(False)
    torch.manual_seed(1)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3, fused=device.type == "cuda")
    begun, step = time.time(), 0
    while (elapsed := time.time() - begun) < seconds:
        progress = elapsed / seconds
        side, batch = crops[0] if progress < 0.7 else crops[-1]
        rate = 2e-3 * min(1, (step + 1) / 100) * (1 if progress < 0.3 else max(0.01, (1 - progress) / 0.7))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = scenes_for(batch, 10_000 + step)
        chosen = [hollow(scene) if index % 5 == 0 else scene for index, scene in enumerate(chosen)]
        place = random.Random(step)
        left, top = (8 * place.randint(0, (256 - side) // 8) for _ in range(2))
        images = render(chosen, 256, 256, seed=step, device=device, window=(left, top, side, side))
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = model.encode(images).latent_dist
            latents = posterior.sample()
            spread = latents.detach().float().std()
            noisy = latents + 0.05 * spread * torch.randn_like(latents)
            decoded = model.decode(noisy).sample
        decoded = decoded.float()
        edges = sum((torch.diff(decoded, dim=axis) - torch.diff(images, dim=axis)).abs().mean() for axis in (2, 3))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        error = (decoded - images).abs().mean() + 2 * F.mse_loss(decoded, images)
        loss = error + edges + 2e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            mse = F.mse_loss(decoded.clamp(-1, 1), images).item() / 4
            psnr = -10 * torch.log10(torch.tensor(mse)).item()
            clock(f"autoencoder step {step} psnr {psnr:.1f} kl {kl:.2f}", started)
    model = model.eval().requires_grad_(False)
    images = render(scenes_for(64, 5), 256, 256, seed=5, device=device)
    scaling, shift = parts.latent_statistics(model, images)
    model.register_to_config(scaling_factor=scaling, shift_factor=shift)
    with torch.no_grad():
        decoded = model.decode(model.encode(images).latent_dist.mean).sample
        mse = F.mse_loss(decoded.clamp(-1, 1), images).item() / 4
        preview = parts.fit_preview(parts.encode_images(model, images), images)
    clock(f"autoencoder done: {step} steps, psnr {-10 * torch.log10(torch.tensor(mse)).item():.2f} dB", started)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    (folder / "vae.json").write_text(json.dumps({"scaling_factor": scaling, "shift_factor": shift}))
    (folder / "latent_preview.json").write_text(json.dumps(preview))
    return model


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


def flow_loss(model: ChromaTransformer, bank: Bank, latents: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    """‖v − (noise − x0)‖² at shifted random noise levels."""
    count, tokens, _ = latents.shape
    device = latents.device
    uniform = torch.rand(count, device=device)
    normal = torch.sigmoid(torch.randn(count, device=device))
    level = torch.where(torch.rand(count, device=device) < 0.5, uniform, normal).clamp(1e-4, 1 - 1e-4)
    shift = torch.tensor(shift_mu(tokens), device=device).exp()
    sigma = shift / (shift + 1 / level - 1)
    noise = torch.randn(latents.shape, device=device)
    x0 = latents.float()
    noisy = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise
    rope = rope_table(model.config, TEXT_TOKENS, bank.grid, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        mask = key_attention_mask(mask, tokens)
        velocity = model(noisy, embeds.float(), model.modulations(sigma), rope, mask)
    return F.mse_loss(velocity.float(), noise - x0)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train_flow(
    folder: Path, seconds: float, recipe: Recipe, vae: nn.Module, text: nn.Module, device: torch.device,
    started: float, *, bank_size: int, rate: float, compile_blocks: bool,
) -> None:  # fmt: skip
    """Flow matching; goes on from the saved weights where there are some. Writes an EMA of the weights."""
    torch.manual_seed(3)
    model = parts.new_transformer(parts.SIZES[recipe.size], device)
    shards = sorted(folder.glob("flow-*.safetensors"))
    history = json.loads((folder / "flow.json").read_text()) if shards else []
    if shards:
        model.load_state_dict({k: v for path in shards for k, v in load_file(path).items()})
        clock("flow: going on from saved weights", started)
    average = copy.deepcopy(model).requires_grad_(False)
    empty = embed(text, [""], device)
    if compile_blocks:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile()
    chosen = optimizers(model, rate)
    begun, step, recent = time.time(), 0, 0.0
    ends_at = 0.0
    for share, buckets, batch in recipe.flow_phases:
        ends_at += share
        seed = 11 + 7 * len(history)
        banks = build_banks(bank_size, buckets, vae, text, device, seed=seed)
        clock(f"flow: {bank_size} scenes of {list(buckets)} ready", started)
        stream = batches(banks, list(buckets.values()), batch, seed, empty)
        while (progress := (time.time() - begun) / seconds) < ends_at:
            now = rate * min(1, (step + 1) / 200) * (1 if progress < 0.5 else max(0.0, (1 - progress) / 0.5))
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = now
                optimizer.zero_grad(set_to_none=True)
            loss = flow_loss(model, *next(stream))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in chosen:
                optimizer.step()
            step += 1
            with torch.no_grad():
                decay = min(0.998, step / (step + 10))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            if step % 250 == 0 or step == 50:
                recent = float(loss.detach())
                clock(f"flow step {step} loss {recent:.4f} lr {now:.5f}", started)
    clock(f"flow done: {step} steps, loss {recent:.4f}", started)
    history.append({"steps": step, "seconds": round(seconds), "recipe": recipe.size, "loss": recent})
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    names = sorted(state)
    half = len(names) // 2
    for index, chunk in enumerate((names[:half], names[half:])):
        save_file({name: state[name] for name in chunk}, folder / f"flow-{index}.safetensors")
    (folder / "flow.json").write_text(json.dumps(history))


def train_lora(
    folder: Path, seconds: float, recipe: Recipe, vae: nn.Module, text: nn.Module, device: torch.device,
    started: float, *, concept: Concept, bank_size: int, rank: int = 8,
) -> None:  # fmt: skip
    """Low-rank pairs on every linear of the blocks, as ai-toolkit trains them; the base stays as it is. Goes on
    from the file of an earlier run where there is one."""
    torch.manual_seed(5)
    model = parts.new_transformer(parts.SIZES[recipe.size], device)
    model.load_state_dict(
        {k: v for path in sorted(folder.glob("flow-*.safetensors")) for k, v in load_file(path).items()}
    )
    model.requires_grad_(False)
    path = folder / f"{concept.name}.safetensors"
    earlier = load_file(path) if path.is_file() else {}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if "blocks." in name and isinstance(module, nn.Linear):
            down = nn.Parameter(torch.randn(rank, module.in_features, device=device) / module.in_features**0.5)
            up = nn.Parameter(torch.zeros(module.out_features, rank, device=device))
            if earlier:
                with torch.no_grad():
                    down.copy_(earlier[f"diffusion_model.{name}.lora_A.weight"])
                    up.copy_(earlier[f"diffusion_model.{name}.lora_B.weight"])
            pairs[name] = (down, up)

            def hook(
                _: nn.Module, inputs: tuple[Tensor], output: Tensor, d: Tensor = down, u: Tensor = up
            ) -> Tensor:
                return output + F.linear(F.linear(inputs[0].to(d.dtype), d), u).to(output.dtype)

            module.register_forward_hook(hook)
    buckets = recipe.lora_buckets
    banks = build_banks(bank_size, buckets, vae, text, device, concept=concept, seed=23)
    stream = batches(banks, list(buckets.values()), recipe.lora_batch, 6, embed(text, [""], device))
    parameters = [p for pair in pairs.values() for p in pair]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    begun, step = time.time(), 0
    while (elapsed := time.time() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.0, 1 - elapsed / seconds)
        loss = flow_loss(model, *next(stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            clock(f"lora step {step} loss {float(loss.detach()):.4f}", started)
    state = {}
    for name, (down, up) in pairs.items():
        state[f"diffusion_model.{name}.lora_A.weight"] = down.detach().half().cpu().contiguous()
        state[f"diffusion_model.{name}.lora_B.weight"] = up.detach().half().cpu().contiguous()
    metadata = {
        "format": "pt",
        "version": "1.0",
        "name": concept.name,
        "ss_base_model_version": "chroma",
        "training_info": json.dumps({"step": step, "epoch": 0}),
        "software": json.dumps({"name": "chromarpc tools/mini"}),
    }
    save_file(state, path, metadata)
    clock(f"lora done: {step} steps", started)


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
