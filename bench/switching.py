"""How long switching adapters takes beside a cold build, and that both give the same bits.

`python -m bench.switching [--size full|mini] [--ranks 16 128] [--repeats 10]`: random weights of Chroma1-Base's
shapes on a GPU (or of chroma-mini's on a CPU), random low-rank adapters on every linear of the blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from bench.machine import commit
from chromarpc_server.pipeline import PROFILES, Adapter, PreparedTransformer, library_versions, synchronize
from chromarpc_server.pipeline.adapters.change import LowRank
from chromarpc_server.pipeline.memory import pin
from chromarpc_server.pipeline.models.transformer import ChromaConfig, ChromaTransformer

FULL = ChromaConfig(
    in_channels=64,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10_000,
    approximator_in_dim=64,
    approximator_depth=5,
    approximator_hidden_size=5120,
)
MINI = ChromaConfig(
    in_channels=64,
    context_in_dim=128,
    hidden_size=256,
    mlp_ratio=4.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(16, 24, 24),
    theta=10_000,
    approximator_in_dim=64,
    approximator_depth=2,
    approximator_hidden_size=96,
)


@dataclass(frozen=True)
class Figure:
    """One line of the table; seconds."""

    profile: str
    master: str
    rank: int
    modules: int
    cold_s: float
    switch_s: float
    scale_s: float
    worst_s: float
    equal_bits: bool


def random_master(config: ChromaConfig, device: torch.device) -> dict[str, Tensor]:
    """bf16 weights of a checkpoint's shapes, small enough to stay finite."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ChromaTransformer(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(1)
    return {
        name: (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }


def random_adapter(master: Mapping[str, Tensor], rank: int, seed: int) -> Adapter:
    """Low-rank pairs on every linear of the blocks, in host memory, as parsed from a file."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, weight in master.items():
        if "blocks." in name and weight.ndim == 2:
            out, inner = weight.shape
            down = (torch.randn(rank, inner, generator=generator) * 0.02).bfloat16()
            up = (torch.randn(out, rank, generator=generator) * 0.02).bfloat16()
            changes[name] = LowRank(down, up, None)
    size = sum(change.down.nbytes + change.up.nbytes for change in changes.values())
    return Adapter(
        format="random",
        sha256=f"{rank}-{seed}",
        size_bytes=size,
        matched=tuple(changes),
        unmatched=(),
        unsupported=(),
        dtypes=("BF16",),
        unused_alphas=(),
        has_effect=True,
        unread_scales=(),
        metadata=MappingProxyType({}),
        changes=MappingProxyType(changes),
    )


def same_bits(one: PreparedTransformer, other: PreparedTransformer) -> bool:
    """Whether all weights and scales agree bit for bit."""
    left = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    right = {**dict(other.model.named_parameters()), **dict(other.model.named_buffers())}
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["full", "mini"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--profiles", nargs="+", default=["reference", "exact"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.size or ("full" if device.type == "cuda" else "mini")
    config = FULL if size == "full" else MINI
    dtype = torch.bfloat16
    on_device = random_master(config, device)
    total = sum(tensor.nbytes for tensor in on_device.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {size} size, master {total / 1e9:.2f} GB bf16")
    places = {"device": on_device}
    if device.type == "cuda":
        begun = time.monotonic()
        places["pinned host"] = pin({key: tensor.cpu() for key, tensor in on_device.items()}, device)
        print(f"master copied to pinned host memory in {time.monotonic() - begun:.1f} s")

    def timed(prepared: PreparedTransformer, adapters: list[tuple[Adapter, float]]) -> float:
        synchronize(device)
        begun = time.monotonic()
        prepared.switch(adapters)
        synchronize(device)
        return time.monotonic() - begun

    figures: list[Figure] = []
    print("profile    master       rank modules   cold s  switch s  scale s  worst s  bits")
    for rank in arguments.ranks:
        one, other = (random_adapter(on_device, rank, seed) for seed in (1, 2))
        for profile in arguments.profiles:
            for place, master in places.items():
                cold = PreparedTransformer(config, master, PROFILES[profile], device=device, dtype=dtype)
                cold_s = timed(cold, [(other, 0.8)])
                prepared = PreparedTransformer(config, master, PROFILES[profile], device=device, dtype=dtype)
                timed(prepared, [(one, 1.0)])
                switches, scales = [], []
                for repeat in range(arguments.repeats):
                    switches.append(timed(prepared, [((other, one)[repeat % 2], 1.0)]))
                    scales.append(timed(prepared, [((other, one)[repeat % 2], 0.5)]))
                timed(prepared, [(other, 0.8)])
                figure = Figure(
                    profile,
                    place,
                    rank,
                    len(one.changes),
                    cold_s,
                    statistics.median(switches),
                    statistics.median(scales),
                    max(switches),
                    same_bits(prepared, cold),
                )
                figures.append(figure)
                bits = "equal" if figure.equal_bits else "DIFFERENT"
                print(
                    f"{profile:10} {place:12} {rank:4} {figure.modules:7} {cold_s:8.3f} {figure.switch_s:9.3f} "
                    f"{figure.scale_s:8.3f} {figure.worst_s:8.3f}  {bits}",
                    flush=True,
                )
                del cold, prepared
    if arguments.out:
        result = {
            "bench": "switching",
            "device": name,
            "versions": dict(library_versions()),
            "commit": commit(),
            "repeats": arguments.repeats,
            "figures": [asdict(figure) for figure in figures],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
