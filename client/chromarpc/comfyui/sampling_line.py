"""A sampler and what it is told: seed, steps, guidance, sampler, schedule, and the latents that it begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from chromarpc.comfyui.graph import Graph, Node
from chromarpc.comfyui.problems import Findings, cut
from chromarpc.sampling import FLOWMATCH

_FULL_DENOISE: Final = 0.9999
"""Above it a KSampler takes the whole schedule."""
_BETA: Final = 0.6
"""Both parameters of the schedule `beta`."""
_SIZED: Final = frozenset({"EmptyLatentImage", "EmptySD3LatentImage"})
_LAST_BUT_ONE: Final = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
"""Samplers for which a KSampler leaves out the last noise level but one, as is done here."""
_SEEDS: Final = 2**64
_OUR_SEEDS: Final = 2**63


@dataclass(frozen=True)
class Input:
    """An input of a node, to be followed."""

    node: Node
    name: str


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled. What was not read is 0 or empty: its problem is kept, or the caller says it."""

    seed: int
    sample_steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    model: Input
    """What is sampled."""
    scheduled: Input
    """The model whose noise levels the schedule has."""
    positive: Input
    negative: Input | None
    """None where there is no unconditional pass."""
    latent: Input


@dataclass(frozen=True)
class Size:
    """Of the picture, in pixels."""

    width: int
    height: int
    node: Node
    """That says it."""


Sampler: TypeAlias = Callable[[Graph, Node, Findings], Sampling]


def follow_sampler(graph: Graph, node: Node, name: str, found: Findings) -> Sampling:
    """How the latents are sampled that an input gets.

    Raises:
        Unmapped: they come from no sampler that is known here.
    """
    output = graph.source(node, name)
    sampler = SAMPLERS.get(output.node.class_type)
    if sampler is None:
        raise output.node.unmapped("", "is no sampler that is known here, and stands where one should")
    if output.index != 0:
        raise node.unmapped(name, f"output {output.index} of {output.node.label} cannot be drawn, only output 0")
    return sampler(graph, output.node, found)


def follow_size(graph: Graph, at: Input, found: Findings) -> Size:
    """The size of the empty latents that an input gets.

    Raises:
        Unmapped: they are not empty, or more than one picture's.
    """
    node = graph.source(at.node, at.name).node
    if node.class_type in SAMPLERS:
        raise at.node.unmapped(at.name, f"continues what {node.label} drew; only one sampler can be drawn")
    if node.class_type not in _SIZED:
        raise node.unmapped("", "a picture has to begin with EmptyLatentImage or EmptySD3LatentImage here")
    count = graph.whole(node, "batch_size")
    if count != 1:
        raise node.unmapped(
            "batch_size",
            f"the noise of {count if abs(count) < 10**6 else 'so many'} pictures is one draw, of which the "
            "first alone has a seed: set it to 1, which draws the first",
        )
    width, height = (found.read(side, graph.whole, node, side) or 0 for side in ("width", "height"))
    return Size(width, height, node)


def _ksampler(graph: Graph, node: Node, found: Findings) -> Sampling:
    found.attempt(_require_full, graph, node, _FULL_DENOISE)
    return _in_one(graph, node, found, "seed")


def _ksampler_advanced(graph: Graph, node: Node, found: Findings) -> Sampling:
    found.attempt(_require_whole_range, graph, node)
    return _in_one(graph, node, found, "noise_seed")


def _in_one(graph: Graph, node: Node, found: Findings, seed: str) -> Sampling:
    model = Input(node, "model")
    return Sampling(
        seed=found.read("seed", _seed, graph, node, seed, found) or 0,
        sample_steps=found.read("sample_steps", graph.whole, node, "steps") or 0,
        guidance_scale=found.read("guidance_scale", graph.number, node, "cfg") or 0.0,
        sampler=found.read("sampler", _name, graph, node, "sampler_name") or "",
        schedule=found.read("schedule", _name, graph, node, "scheduler") or "",
        model=model,
        scheduled=model,
        positive=Input(node, "positive"),
        negative=Input(node, "negative"),
        latent=Input(node, "latent_image"),
    )


def _sampler_custom(graph: Graph, node: Node, found: Findings) -> Sampling:
    found.attempt(_require_noise, graph, node)
    steps, schedule, scheduled = found.attempt(_sigmas, graph, node, found) or (0, "", Input(node, "model"))
    return Sampling(
        seed=found.read("seed", _seed, graph, node, "noise_seed", found) or 0,
        sample_steps=steps,
        guidance_scale=found.read("guidance_scale", graph.number, node, "cfg") or 0.0,
        sampler=found.read("sampler", _selected, graph, node) or "",
        schedule=schedule,
        model=Input(node, "model"),
        scheduled=scheduled,
        positive=Input(node, "positive"),
        negative=Input(node, "negative"),
        latent=Input(node, "latent_image"),
    )


def _sampler_custom_advanced(graph: Graph, node: Node, found: Findings) -> Sampling:
    seed = found.attempt(_random_noise, graph, node, found) or 0
    sampler = found.read("sampler", _selected, graph, node) or ""
    sigmas = found.attempt(_sigmas, graph, node, found)
    guider = graph.source(node, "guider").node
    steps, schedule, scheduled = sigmas or (0, "", Input(guider, "model"))
    if guider.class_type == "BasicGuider":
        guidance_scale, positive, negative = 1.0, Input(guider, "conditioning"), None
    elif guider.class_type == "CFGGuider":
        guidance_scale = found.read("guidance_scale", graph.number, guider, "cfg") or 0.0
        positive, negative = Input(guider, "positive"), Input(guider, "negative")
    else:
        raise guider.unmapped("", "is no guider that is known here: use CFGGuider or BasicGuider")
    return Sampling(
        seed=seed,
        sample_steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        schedule=schedule,
        model=Input(guider, "model"),
        scheduled=scheduled,
        positive=positive,
        negative=negative,
        latent=Input(node, "latent_image"),
    )


def _seed(graph: Graph, node: Node, name: str, found: Findings) -> int:
    seed = graph.whole(node, name)
    if not 0 <= seed < _SEEDS:
        raise node.unmapped(name, "must be 0 to 2⁶⁴ − 1, as ComfyUI has it")
    if seed < _OUR_SEEDS:
        return seed
    found.remark(
        f"{node.label}, {name}: {seed} is said as {seed - _OUR_SEEDS}, which draws the same noise: the generator "
        "takes the low 32 bits alone"
    )
    return seed - _OUR_SEEDS


def _name(graph: Graph, node: Node, name: str) -> str:
    """Of a sampler or a schedule; whether the server has it, the server says."""
    value = graph.text(node, name)
    if value in ("", FLOWMATCH):
        raise node.unmapped(name, f"{value!r} is none of ComfyUI's")
    return value


def _selected(graph: Graph, node: Node) -> str:
    chosen = graph.source(node, "sampler").node
    if chosen.class_type != "KSamplerSelect":
        raise chosen.unmapped("", "is no choice of a sampler that is known here: use KSamplerSelect")
    sampler = _name(graph, chosen, "sampler_name")
    if sampler in _LAST_BUT_ONE:
        raise chosen.unmapped(
            "sampler_name",
            f"{sampler} leaves out the last noise level but one here, as in a KSampler, and in {node.class_type} "
            "none: use a KSampler",
        )
    return sampler


def _sigmas(graph: Graph, node: Node, found: Findings) -> tuple[int, str, Input]:
    """Steps, schedule, and the model whose noise levels it has."""
    sigmas = graph.source(node, "sigmas").node
    if sigmas.class_type == "BasicScheduler":
        found.attempt(_require_full, graph, sigmas, 1.0)
        schedule = found.read("schedule", _name, graph, sigmas, "scheduler") or ""
    elif sigmas.class_type == "BetaSamplingScheduler":
        for name in () if "schedule" in found.given else ("alpha", "beta"):
            if (value := graph.number(sigmas, name)) != _BETA:
                raise sigmas.unmapped(name, f"the schedule beta has {_BETA} here, not {value:g}")
        schedule = "beta"
    else:
        raise sigmas.unmapped("", "is no schedule that is known here: use BasicScheduler")
    steps = found.read("sample_steps", graph.whole, sigmas, "steps") or 0
    return steps, schedule, Input(sigmas, "model")


def _random_noise(graph: Graph, node: Node, found: Findings) -> int:
    noise = graph.source(node, "noise").node
    if noise.class_type != "RandomNoise":
        raise noise.unmapped("", "is no noise that is known here: use RandomNoise")
    return found.read("seed", _seed, graph, noise, "noise_seed", found) or 0


def _require_full(graph: Graph, node: Node, least: float) -> None:
    denoise = graph.number(node, "denoise")
    if denoise < least:
        raise node.unmapped(
            "denoise", f"{denoise:g} begins with a picture, and here each begins with noise: only 1"
        )


def _require_noise(graph: Graph, node: Node) -> None:
    if not graph.flag(node, "add_noise"):
        raise node.unmapped("add_noise", "here each picture begins with noise: only true")


def _require_whole_range(graph: Graph, node: Node) -> None:
    if (value := graph.text(node, "add_noise")) != "enable":
        raise node.unmapped("add_noise", f"here each picture begins with noise: only enable, not {cut(value)}")
    if graph.whole(node, "start_at_step") > 0:
        raise node.unmapped("start_at_step", "here each picture is drawn from the first step on: only 0")
    if graph.whole(node, "end_at_step") < graph.whole(node, "steps"):
        raise node.unmapped("end_at_step", "here each picture is drawn to its last step: only `steps` or more")


SAMPLERS: Final[Mapping[str, Sampler]] = {
    "KSampler": _ksampler,
    "KSamplerAdvanced": _ksampler_advanced,
    "SamplerCustom": _sampler_custom,
    "SamplerCustomAdvanced": _sampler_custom_advanced,
}
