"""How long switching adapters takes beside a cold build, and that both give the same bits.

`python -m bench.switching [--size full|mini] [--ranks 16 128] [--repeats 10]`: random weights of Chroma1-Base's
shapes on a GPU (or of chroma-mini's on a CPU), random adapters on every linear of the blocks, parsed on the host.
In the trainer's profiles a LoRA lies beside the weights; DoRA, and a LoRA on a model that is not quantized, are
merged. Where steps are recorded as graphs, it also counts those that a switch had recorded anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from bench.machine import commit
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    PreparedTransformer,
    PromptEmbedding,
    Transformer,
    library_versions,
    lies_beside,
    release_memory,
    synchronize,
)
from chromarpc_server.pipeline.adapters.change import Change, Decomposed, LowRank
from chromarpc_server.pipeline.denoising import denoise_from
from chromarpc_server.pipeline.memory import pin
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.weights.stored import StoredTensor, as_they_are

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
class Case:
    """What is switched."""

    profile: str
    adapter: str = "lora"
    """`lora` or `dora`."""
    quantize: bool = True
    """The trainer's `model.quantize`; it counts in the trainer's profiles."""


CASES = (
    Case("reference"),
    Case("exact"),
    Case("preview"),
    Case("preview", "dora"),
    Case("preview", quantize=False),
    Case("preview-exact"),
)


@dataclass(frozen=True)
class Figure:
    """One line of the table; seconds."""

    profile: str
    adapter: str
    place: str
    """Where the adapter goes: `merged`, or `beside` the weights."""
    quantize: bool
    master: str
    rank: int
    modules: int
    cold_s: float
    first_s: float
    """From no adapter, with room for one to be made where it goes beside."""
    switch_s: float
    scale_s: float
    worst_s: float
    rewritten_tensors: int
    """By a switch to another adapter."""
    graphs_recorded: int | None
    """Anew, by pictures after switches; None where steps are not recorded."""
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


def random_adapter(
    master: Mapping[str, Tensor | StoredTensor], rank: int, seed: int, form: str = "lora"
) -> Adapter:
    """Low-rank pairs on every linear of the blocks, in host memory, as parsed from a file.

    Args:
        master: the weights that it is for; its values are drawn where they lie.
        rank: of every pair.
        seed: of its values.
        form: `lora`, or `dora` for pairs with a magnitude.
    """
    changes: dict[str, Change] = {}
    generator: torch.Generator | None = None
    for name, weight in master.items():
        if "blocks." in name and weight.ndim == 2:
            generator = generator or torch.Generator(weight.device).manual_seed(seed)
            out, inner = weight.shape
            down, up = (
                (torch.randn(shape, generator=generator, device=weight.device) * 0.02).bfloat16().cpu()
                for shape in ((rank, inner), (out, rank))
            )
            pair = LowRank(down, up, None)
            changes[name] = pair
            if form == "dora":
                magnitude = torch.rand(out, 1, generator=generator, device=weight.device) + 0.5
                changes[name] = Decomposed(pair, magnitude.cpu())
    return Adapter(
        format="random",
        sha256=f"{form}-{rank}-{seed}",
        size_bytes=2 * rank * sum(sum(change.shape) for change in changes.values()),
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


def _held(transformer: Transformer) -> Iterator[tuple[str, Tensor]]:
    """All that a transformer multiplies by, by name."""
    if not isinstance(transformer, ExactPreview):
        yield from transformer.model.named_parameters()
        yield from transformer.model.named_buffers()
        return
    assert transformer._transformer is not None
    for name, linear in transformer._transformer.linears.items():
        yield name, linear.weight.weight
        for number, path in enumerate(linear.beside):
            for part, value in vars(path).items():
                if isinstance(value, Tensor):
                    yield f"{name} {number} {part}", value


def same_bits(one: Transformer, other: Transformer) -> bool:
    """Whether all weights, scales and factors agree bit for bit."""
    left, right = dict(_held(one)), dict(_held(other))
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


class Graphs:
    """Counts the steps that a transformer had to record anew since it was made."""

    SIDE, TEXT_TOKENS, REAL_TOKENS = 256, 512, 40

    def __init__(self, transformer: Transformer, device: torch.device) -> None:
        """Draws, so that a step is recorded."""
        self._transformer = transformer
        self._device = device
        self._draw()
        self._run = None if isinstance(transformer, ExactPreview) else transformer.run
        self._recorded = self._run.recorded_count if self._run else 0

    def anew(self) -> int | None:
        """Draws again. Returns how many were recorded since; None where none ever were."""
        if self._run is None or isinstance(self._transformer, ExactPreview) or not self._recorded:
            return None
        self._draw()
        run = self._transformer.run
        return run.recorded_count - (self._recorded if run is self._run else 0)

    def _draw(self) -> None:
        """Two steps: the first runs, the second is recorded, if it was not before."""
        if not self._transformer.profile.fused or self._device.type != "cuda":
            return
        width = self._transformer.config.context_in_dim
        text = torch.zeros(1, self.TEXT_TOKENS, width, dtype=torch.bfloat16, device=self._device)
        mask = (torch.arange(self.TEXT_TOKENS, device=self._device)[None] < self.REAL_TOKENS).long()
        noise = torch.zeros(1, (self.SIDE // 16) ** 2, 64, dtype=torch.bfloat16, device=self._device)
        embedding = PromptEmbedding(text, mask, text, mask)
        for _ in denoise_from(self._transformer, embedding, noise, self.SIDE, self.SIDE, 2, 4.0):
            pass
        synchronize(self._device)


def allocate(
    case: Case, config: ChromaConfig, master: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Transformer:
    """A transformer of this case with nothing in it yet."""
    profile = PROFILES[case.profile]
    if not profile.trainer:
        return PreparedTransformer(config, as_they_are(master), profile, DevicePlacement(device, dtype))
    settings = TrainerSettings(quantize=case.quantize)
    if not profile.fused:
        return ExactPreview(config, as_they_are(master), profile, settings, device=device)
    return FusedPreview(config, as_they_are(master), profile, settings, DevicePlacement(device, dtype))


def measure(
    case: Case,
    config: ChromaConfig,
    master: Mapping[str, Tensor],
    place: str,
    adapters: tuple[Adapter, Adapter],
    repeats: int,
    device: torch.device,
) -> Figure:
    """Switches between two adapters, and between two multipliers of one.

    Args:
        case: what is switched.
        config: sizes.
        master: weights.
        place: where they lie, in words.
        adapters: of one rank.
        repeats: switches of each sort.
        device: where the transformer lies.
    """
    one, other = adapters
    dtype = torch.bfloat16
    rewritten = 0

    def timed(transformer: Transformer, adapter: Adapter, multiplier: float) -> float:
        nonlocal rewritten
        synchronize(device)
        begun = time.perf_counter()
        report = transformer.switch([(adapter, multiplier)])
        synchronize(device)
        rewritten = report.rewritten_tensors
        return time.perf_counter() - begun

    cold = allocate(case, config, master, device, dtype)
    cold_s = timed(cold, other, 0.8)
    transformer = allocate(case, config, master, device, dtype)
    transformer.switch([])
    first_s = timed(transformer, one, 1.0)
    graphs = Graphs(transformer, device)
    switches, scales = [], []
    for repeat in range(repeats):
        adapter = (other, one)[repeat % 2]
        switches.append(timed(transformer, adapter, 1.0))
        by_switch = rewritten
        scales.append(timed(transformer, adapter, 0.5))
    timed(transformer, other, 0.8)
    trainer = PROFILES[case.profile].trainer
    beside = trainer and lies_beside(one, TrainerSettings(quantize=case.quantize))
    figure = Figure(
        case.profile,
        case.adapter,
        "beside" if beside else "merged",
        case.quantize,
        place,
        next(iter(one.changes.values())).rank or 0,
        len(one.changes),
        cold_s,
        first_s,
        statistics.median(switches),
        statistics.median(scales),
        max(switches),
        by_switch,
        graphs.anew(),
        same_bits(transformer, cold),
    )
    del cold, transformer, graphs
    release_memory(device)
    return figure


HEADER = (
    f"{'profile':14}{'adapter':>8}{'goes':>7}{'quantized':>10}  {'master':12}{'rank':>5}{'modules':>8}"
    f"{'cold s':>9}{'first s':>9}{'switch s':>9}{'scale s':>9}{'worst s':>9}{'written':>8}{'graphs':>7}  bits"
)


def line(f: Figure) -> str:
    """Of the printed table."""
    graphs = "-" if f.graphs_recorded is None else f.graphs_recorded
    return (
        f"{f.profile:14}{f.adapter:>8}{f.place:>7}{'yes' if f.quantize else 'no':>10}  {f.master:12}{f.rank:5}"
        f"{f.modules:8}{f.cold_s:9.3f}{f.first_s:9.3f}{f.switch_s:9.3f}{f.scale_s:9.3f}{f.worst_s:9.3f}{f.rewritten_tensors:8}"
        f"{graphs:>7}  {'equal' if f.equal_bits else 'DIFFERENT'}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["full", "mini"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--profiles", nargs="+", default=list(dict.fromkeys(case.profile for case in CASES)))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.size or ("full" if device.type == "cuda" else "mini")
    config = FULL if size == "full" else MINI
    on_device = random_master(config, device)
    total = sum(tensor.nbytes for tensor in on_device.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {size} size, master {total / 1e9:.2f} GB bf16", flush=True)
    places: dict[str, Mapping[str, Tensor]] = {"device": on_device}
    if device.type == "cuda":
        begun = time.monotonic()
        places["pinned host"] = pin({key: tensor.cpu() for key, tensor in on_device.items()}, device)
        print(f"master copied to pinned host memory in {time.monotonic() - begun:.1f} s", flush=True)
    figures: list[Figure] = []
    print(HEADER, flush=True)
    for rank in arguments.ranks:
        for form in ("lora", "dora"):
            cases = [case for case in CASES if case.adapter == form and case.profile in arguments.profiles]
            if not cases:
                continue
            adapters = random_adapter(on_device, rank, 1, form), random_adapter(on_device, rank, 2, form)
            for case in cases:
                for place, master in places.items():
                    figure = measure(case, config, master, place, adapters, arguments.repeats, device)
                    figures.append(figure)
                    print(line(figure), flush=True)
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
