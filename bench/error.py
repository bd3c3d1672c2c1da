"""How far each profile is from float32, at full size with random weights: `python -m bench.error [--out FILE]`.

The truth is the same function of the same quantized weights, computed in float32 (no TF32): one forward, and the
latents after all steps. Errors are relative L2 norms. The reference's function and the trainer's are two functions
with a truth each: ratios are to `exact`, the reference's own sequence of operations, and to `preview-exact`, the
trainer's, with the same adapter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import synthetic
from bench.machine import commit
from bench.speed import PROMPT, adapter_rank, mini
from bench.switching import random_adapter
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    PreparedTransformer,
    Transformer,
    choose_device,
    describe_device,
    release_memory,
)
from chromarpc_server.pipeline.denoising import denoise_from
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.sampling import draw_noise
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview

REFERENCE_FORMS = ("exact", "reference", "fp8")
TRAINER_FORMS = ("preview-exact", "preview")
"""The first of each is what the others are measured by."""


@dataclass(frozen=True)
class Error:
    """One profile's."""

    profile: str
    rank: int
    """Of the adapter; 0 for none."""
    first_velocity: float
    latents: float
    velocity_ratio: float | None
    latents_ratio: float | None


def latents(
    prepared: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, side: int, steps: int
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


class Measurement:
    """Runs of one checkpoint's transformer, at one size."""

    def __init__(self, checkpoint: Checkpoint, side: int, steps: int) -> None:
        self._checkpoint = checkpoint
        self._side = side
        self._steps = steps

    def errors(self, forms: tuple[str, ...], truth_of: str, adapter: Adapter | None) -> Iterator[Error]:
        """Each form's distance from the truth of their function.

        Args:
            forms: names of profiles, the one that ratios are to first.
            truth_of: the fused one, which in float32 has no roundings of its own.
            adapter: the one that all of them draw with.
        """
        truth = self._run(truth_of, torch.float32, adapter)
        own: Error | None = None
        for profile in forms:
            found = self._run(profile, torch.bfloat16, adapter)
            first, last = (_relative(mine, true) for mine, true in zip(found, truth, strict=True))
            error = Error(
                profile,
                adapter_rank(adapter),
                first,
                last,
                first / own.first_velocity if own else None,
                last / own.latents if own else None,
            )
            own = own or error
            yield error

    def _run(self, profile: str, dtype: torch.dtype, adapter: Adapter | None) -> tuple[Tensor, Tensor]:
        transformer = self._transformer(profile, dtype)
        transformer.switch([] if adapter is None else [(adapter, 1.0)])
        found = latents(transformer, self._checkpoint, dtype, self._side, self._steps)
        del transformer
        release_memory(self._checkpoint.device)
        return found

    def _transformer(self, name: str, dtype: torch.dtype) -> Transformer:
        profile, device = PROFILES[name], self._checkpoint.device
        config, master = self._checkpoint.config, self._checkpoint.master
        if not profile.trainer:
            return PreparedTransformer(
                config, master, profile, DevicePlacement(device, dtype, record_graphs=False)
            )
        settings = TrainerSettings()
        if not profile.fused:
            return ExactPreview(config, master, profile, settings, device=device)
        return FusedPreview(config, master, profile, settings, DevicePlacement(device, dtype, record_graphs=False))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 16], help="of the trainer's function; 0: none")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    choice = choose_device("auto", "bfloat16")
    device = choice.device
    checkpoint = synthetic.checkpoint(device) if device.type == "cuda" else mini(device)
    measurement = Measurement(checkpoint, arguments.side, arguments.steps)
    print(f"{describe_device(choice).name}, {arguments.side}x{arguments.side}, {arguments.steps} steps")
    print(f"{'profile':14}{'rank':>5}{'first velocity':>16}{'latents':>10}{'ratio':>8}{'ratio':>8}", flush=True)
    errors: list[Error] = []
    functions = [
        (REFERENCE_FORMS, "reference", 0),
        *((TRAINER_FORMS, "preview", rank) for rank in arguments.ranks),
    ]
    for forms, truth_of, rank in functions:
        adapter = random_adapter(checkpoint.master, rank, 1) if rank else None
        for e in measurement.errors(forms, truth_of, adapter):
            errors.append(e)
            ratios = (e.velocity_ratio, e.latents_ratio)
            told = "".join(f"{ratio:8.3f}" for ratio in ratios if ratio is not None)
            print(f"{e.profile:14}{e.rank or '':>5}{e.first_velocity:16.5f}{e.latents:10.5f}{told}", flush=True)
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
