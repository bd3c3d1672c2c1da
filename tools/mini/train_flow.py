"""The last stages of training: flow matching of the transformer, and LoRAs on it."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chromarpc_server.pipeline.models.positions import key_attention_mask, rope_table
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.sampling import shift_mu
from tools.mini import parts
from tools.mini.banks import Bank, batches, build_banks, embed
from tools.mini.recipe import (
    TEXT_TOKENS,
    Concept,
    Recipe,
    clock,
)


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
