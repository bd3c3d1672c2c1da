"""How far each profile is from float32, at full size with random weights: `python -m bench.error [--out FILE]`.

The truth is the same function of the same float8-rounded weights, computed in float32 (no TF32): one forward, and
the latents after all steps. Errors are relative L2 norms; ratios are to `exact`, the reference's own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import synthetic
from bench.machine import commit
from bench.speed import PROMPT, mini
from chromarpc_server.pipeline import PROFILES, Checkpoint, PreparedTransformer, choose_device, describe_device
from chromarpc_server.pipeline.denoising import denoise_from
from chromarpc_server.pipeline.sampling import draw_noise


@dataclass(frozen=True)
class Error:
    """One profile's."""

    profile: str
    first_velocity: float
    latents: float
    velocity_ratio: float | None
    latents_ratio: float | None


def latents(
    prepared: PreparedTransformer, checkpoint: Checkpoint, dtype: torch.dtype, side: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Latents after the first step less the noise (the velocity, scaled), and after the last."""
    embedding = checkpoint.pipeline(prepared).encode(checkpoint.tokenizer(PROMPT))
    noise = draw_noise(side, side, 42, torch.bfloat16, "float32").to(device=checkpoint.device, dtype=dtype)
    done = [
        step.latents
        for step in denoise_from(prepared, embedding, noise, side, side, steps, 4.0, timestep_dtype=torch.bfloat16)
    ]
    return (done[0].float() - noise.float()), done[-1].float()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    choice = choose_device("auto", "bfloat16")
    device = choice.device
    checkpoint = synthetic.checkpoint(device) if device.type == "cuda" else mini(device)

    def run(profile: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        prepared = PreparedTransformer(
            checkpoint.config,
            checkpoint.master,
            PROFILES[profile],
            device=device,
            dtype=dtype,
            record_graphs=False,
        )
        prepared.switch([])
        found = latents(prepared, checkpoint, dtype, arguments.side, arguments.steps)
        del prepared
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    truth = run("reference", torch.float32)
    errors: list[Error] = []
    print(f"{describe_device(choice).name}, {arguments.side}x{arguments.side}, {arguments.steps} steps")
    print(f"{'profile':10}{'first velocity':>16}{'latents':>10}{'ratio':>8}{'ratio':>8}")
    for profile in ("exact", "reference", "fp8"):
        found = run(profile, torch.bfloat16)
        first, last = (_relative(mine, true) for mine, true in zip(found, truth, strict=True))
        own = errors[0] if errors else None
        errors.append(
            Error(
                profile,
                first,
                last,
                first / own.first_velocity if own else None,
                last / own.latents if own else None,
            )
        )
        e = errors[-1]
        told = f"{e.velocity_ratio:>8.3f}{e.latents_ratio:>8.3f}" if own else ""
        print(f"{e.profile:10}{e.first_velocity:>16.5f}{e.latents:>10.5f}{told}", flush=True)
    if arguments.out:
        result = {
            "bench": "error",
            "device": asdict(describe_device(choice)),
            "commit": commit(),
            "torch": torch.__version__,
            "side": arguments.side,
            "steps": arguments.steps,
            "errors": [asdict(error) for error in errors],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
