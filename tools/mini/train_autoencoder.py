"""The first stage of training: the autoencoder."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tools.mini import parts
from tools.mini.recipe import (
    clock,
    scenes_for,
)
from tools.mini.scenes import (
    hollow,
    render,
)


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
