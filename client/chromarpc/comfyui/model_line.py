"""From a sampler back to where its model is loaded: the file, adapters, and the shift of noise levels.

Every node type that is known stands in one of the tables below, with a small function that says what it means: to
add one, add its entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from chromarpc.comfyui.graph import Graph, Node, is_number
from chromarpc.comfyui.problems import Findings, Problem

MU: Final = 1.15
"""Shift of ComfyUI's own noise levels for Chroma, whatever the size: σ = e^μ / (e^μ + 1/t − 1)."""


@dataclass(frozen=True)
class ModelFile:
    """The file that a model is loaded from."""

    name: str
    """As the workflow has it, maybe with folders."""
    node: Node
    input: str
    rounded_to: str = ""
    """What its weights are rounded to as they are loaded, such as `fp8_e4m3fn`; empty where they stay."""

    def problem(self, reason: str) -> Problem:
        """Why it cannot be had."""
        return self.node.problem(self.input, reason)


@dataclass(frozen=True)
class Adapter:
    """One adapter on the model."""

    name: str
    """As the workflow has it: below ComfyUI's folder of LoRAs, maybe with backslashes."""
    multiplier: float
    node: Node
    input: str

    def problem(self, reason: str) -> Problem:
        """Why it cannot be had."""
        return self.node.problem(self.input, reason)


@dataclass(frozen=True)
class ModelLine:
    """A model as a sampler gets it."""

    file: ModelFile
    adapters: tuple[Adapter, ...]
    """In the order in which they are applied."""
    shift: float | None
    """Of the last node that sets one; None: the model's own, `MU`."""


Loader: TypeAlias = Callable[[Graph, Node], ModelFile]
Adapters: TypeAlias = Callable[[Graph, Node], Iterator[Adapter]]
Shift: TypeAlias = Callable[[Graph, Node], float | None]


def follow_model(graph: Graph, node: Node, name: str, found: Findings) -> ModelLine:
    """The model that an input gets.

    Raises:
        Unmapped: the links end before a loader.
    """
    adapters: list[Adapter] = []
    shifts: list[float | None] = []
    seen: set[str] = set()
    while True:
        step = graph.source(node, name)
        kind = step.node.class_type
        if step.node.id in seen:
            raise node.unmapped(name, "its links lead in a circle")
        if step.index != 0:
            raise node.unmapped(name, f"output {step.index} of {step.node.label} is no model")
        seen.add(step.node.id)
        file = None
        if kind in LOADERS:
            file = LOADERS[kind](graph, step.node)
        elif "model" in found.given and not graph.is_linked(step.node, "model"):
            file = ModelFile("", step.node, "")  # a loader of any kind, in whose place the caller names a model
        if file is not None:
            return ModelLine(file, tuple(adapters), shifts[0] if shifts else None)
        if kind in ADAPTERS:
            adapters[:0] = found.read("loras", _listed, ADAPTERS[kind], graph, step.node) or ()
        elif kind in SHIFTS and not shifts:
            shifts.append(found.read("shift", SHIFTS[kind], graph, step.node))
        elif kind not in SHIFTS and kind not in HARMLESS:
            found.refuse(step.node.problem("", "what it does to the model is not known here"))
        node, name = step.node, "model"


def _listed(kind: Adapters, graph: Graph, node: Node) -> tuple[Adapter, ...]:
    return tuple(kind(graph, node))


def _unet(graph: Graph, node: Node) -> ModelFile:
    dtype = graph.text(node, "weight_dtype") if "weight_dtype" in node.inputs else "default"
    if dtype.endswith("_fast"):
        raise node.unmapped(
            "weight_dtype", f"{dtype} rounds what each layer gets, too, which is not done here: set it to default"
        )
    return ModelFile(graph.text(node, "unet_name"), node, "unet_name", "" if dtype == "default" else dtype)


def _checkpoint(graph: Graph, node: Node) -> ModelFile:
    return ModelFile(graph.text(node, "ckpt_name"), node, "ckpt_name")


def _gguf(graph: Graph, node: Node) -> ModelFile:
    return ModelFile(graph.text(node, "unet_name"), node, "unet_name")


def _gguf_advanced(graph: Graph, node: Node) -> ModelFile:
    for name in ("dequant_dtype", "patch_dtype"):
        if graph.text(node, name) != "default":
            raise node.unmapped(name, "only ComfyUI's own choice of types is known here: set it to default")
    return _gguf(graph, node)


def _one_lora(graph: Graph, node: Node) -> Iterator[Adapter]:
    multiplier = graph.number(node, "strength_model")
    if multiplier:
        yield Adapter(graph.text(node, "lora_name"), multiplier, node, "lora_name")


def _power_loras(_graph: Graph, node: Node) -> Iterator[Adapter]:
    """Rows `lora_N`: whether one is on, its file, its strength, and maybe one for the text encoder."""
    for name, row in power_rows(node):
        strength = row["strength"]
        if row["lora"] in (None, "None"):
            continue
        if not is_number(strength):
            raise node.unmapped(name, "its strength is no number")
        if not isinstance(row["lora"], str):
            raise node.unmapped(name, "names no file")
        if strength:
            yield Adapter(row["lora"], float(strength), node, name)


def power_rows(node: Node) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a Power Lora Loader that are on, by the names of their inputs."""
    for name, row in node.inputs.items():
        is_row = name.lower().startswith("lora_") and isinstance(row, dict)
        if is_row and {"on", "lora", "strength"} <= row.keys() and row["on"]:
            yield name, row


def _lora_stack(graph: Graph, node: Node) -> Iterator[Adapter]:
    for number in range(1, 5):
        name = f"lora_{number:02d}"
        if name not in node.inputs:
            continue
        file, multiplier = graph.text(node, name), graph.number(node, f"strength_{number:02d}")
        if file != "None" and multiplier:
            yield Adapter(file, multiplier, node, name)


def _aura_flow(graph: Graph, node: Node) -> float:
    return graph.number(node, "shift")


def _sd3(_graph: Graph, node: Node) -> float:
    raise node.unmapped(
        "shift",
        "it tells Chroma a thousand times the noise level, so that ComfyUI draws no picture with it either: use "
        "ModelSamplingAuraFlow",
    )


def _flux(graph: Graph, node: Node) -> None:
    """A shift by the size, which has to come to the model's own."""
    most, least = graph.number(node, "max_shift"), graph.number(node, "base_shift")
    tokens = graph.number(node, "width") * graph.number(node, "height") / 256
    mu = least + (most - least) * (tokens - 256) / (4096 - 256)
    if not math.isclose(mu, MU, rel_tol=1e-9):
        raise node.unmapped(
            "max_shift",
            f"a shift of {mu:.6g} by the size cannot be said here, where it is {MU}: take this node out, or use "
            "ModelSamplingAuraFlow",
        )


LOADERS: Final[Mapping[str, Loader]] = {
    "UNETLoader": _unet,
    "CheckpointLoaderSimple": _checkpoint,
    "UnetLoaderGGUF": _gguf,
    "UnetLoaderGGUFAdvanced": _gguf_advanced,
}
ADAPTERS: Final[Mapping[str, Adapters]] = {
    "LoraLoader": _one_lora,
    "LoraLoaderModelOnly": _one_lora,
    "Power Lora Loader (rgthree)": _power_loras,
    "Lora Loader Stack (rgthree)": _lora_stack,
}
SHIFTS: Final[Mapping[str, Shift]] = {
    "ModelSamplingAuraFlow": _aura_flow,
    "ModelSamplingSD3": _sd3,
    "ModelSamplingFlux": _flux,
}
HARMLESS: Final = frozenset({"TorchCompileModel"})
"""Nodes that make a model faster and draw the same, to rounding."""
