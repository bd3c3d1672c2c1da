"""Facts of pictures of ComfyUI, out of the graph in them: `prompt`, or `workflow` where that is all.

A graph is `{id: {class_type, inputs}}`; an input is a value or `[id, output]` of the node that gives it. The
picture is followed from where it is saved back to its sampler, and from there to model, adapters, texts and size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from chromarpc.pictures.facts import UNKNOWN, Fact, PictureFacts, name_of_file
from chromarpc.pictures.requests import request_of
from chromarpc.sampling import COMFYUI, SAMPLERS, SCHEDULES

Graph: TypeAlias = "Mapping[str, Node]"
Inputs: TypeAlias = Mapping[str, Any]

MAX_NODES: Final = 20_000
MAX_FOLLOWED: Final = 2_000
PROGRAM: Final = "ComfyUI"
_SAVERS: Final = ("SaveImage", "PreviewImage", "SaveAnimated", "Image Save", "SaveWEBP")
_LOADED: Final = ("unet_name", "ckpt_name", "model_name", "gguf_name")
_VALUES: Final = ("value", "seed", "noise_seed", "int", "float", "number", "text", "string", "width", "height")
_WIDGETS: Final[Mapping[str, tuple[str, ...]]] = {
    # What a node's values mean that `workflow` lists without names.
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "ModelSamplingAuraFlow": ("shift",),
    "ModelSamplingSD3": ("shift",),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "PrimitiveInt": ("value",),
    "PrimitiveFloat": ("value",),
    "PrimitiveNode": ("value",),
}


class Node:
    """One node of a graph."""

    def __init__(self, kind: str, inputs: Inputs) -> None:
        """`kind`: its class."""
        self.kind = kind
        self.inputs = inputs


def comfyui_facts(texts: Mapping[str, str]) -> PictureFacts | None:
    """What a picture's texts say; None where they hold no graph."""
    graph = _graph(texts)
    return None if graph is None else _facts(graph)


def _facts(graph: Graph) -> PictureFacts:
    sampler = _sampler(graph)
    if sampler is None:
        remark = "its workflow has no sampler that is known here, so most of it is unknown"
        return PictureFacts(program=PROGRAM, facts={}, request=None, remarks=(remark,))
    guider = _node(graph, sampler.inputs.get("guider")) or sampler
    sigmas = _node(graph, sampler.inputs.get("sigmas")) or sampler
    noise = _node(graph, sampler.inputs.get("noise")) or sampler
    selected = _node(graph, sampler.inputs.get("sampler")) or sampler
    conditioning = guider.inputs.get("positive", guider.inputs.get("conditioning"))
    model = list(_upstream_model(graph, guider if "model" in guider.inputs else sampler))
    latent = _size_node(graph, sampler.inputs.get("latent_image"))
    steps = _number(graph, sigmas.inputs.get("steps"))
    facts = {
        "prompt": _words(graph, conditioning),
        "neg": _words(graph, guider.inputs.get("negative")) if "negative" in guider.inputs else Fact(""),
        "seed": _number(graph, noise.inputs.get("noise_seed", noise.inputs.get("seed"))),
        "noise_draw": Fact(None, "drawn on the CPU in float32, in a layout of its own"),
        "sample_steps": steps,
        "sampler": _sampler_fact(_text(graph, selected.inputs.get("sampler_name"))),
        "scheduler": _scheduler(graph, sigmas, model),
        **_shift(graph, model),
        "settings": Fact(COMFYUI),
        "guidance_scale": _float(graph, guider.inputs.get("cfg")),
        "guidance": _guidance(graph, guider, conditioning),
        **_loaded(model),
        **_adapters(graph, model),
    }
    if latent is not None:
        facts |= {side: _number(graph, latent.inputs.get(side)) for side in ("width", "height")}
    return PictureFacts(
        program=PROGRAM,
        facts=facts,
        request=request_of(facts),
        remarks=tuple(_remarks(graph, sampler, sigmas, facts)),
    )


def _remarks(graph: Graph, sampler: Node, sigmas: Node, facts: Mapping[str, Fact]) -> Iterator[str]:
    denoise = _number(graph, sigmas.inputs.get("denoise")).value
    if denoise not in (None, 1, 1.0):
        yield f"denoise {denoise}: it began from another picture, which is not known here"
    if sum(node.kind == sampler.kind for node in graph.values()) > 1:
        yield "the workflow has several samplers; the one nearest to the saved picture is taken"
    for name, known in (("sampler", SAMPLERS), ("scheduler", SCHEDULES)):
        if facts[name].value is not None and facts[name].value not in known:
            yield f"the {name} {facts[name].shown} has no counterpart here"


def _graph(texts: Mapping[str, str]) -> Graph | None:
    for keyword, made in (("prompt", _from_prompt), ("workflow", _from_workflow)):
        try:
            values = json.loads(texts[keyword])
        except (KeyError, ValueError, RecursionError):
            continue
        graph = made(values) if isinstance(values, dict) else {}
        if graph:
            return graph
    return None


def _from_prompt(values: Mapping[str, Any]) -> Graph:
    return {
        number: Node(node["class_type"], node["inputs"])
        for number, node in list(values.items())[:MAX_NODES]
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }


def _from_workflow(values: Mapping[str, Any]) -> Graph:
    """The same out of what the editor keeps: nodes with values in the order of widgets, and a list of links."""
    nodes, links = values.get("nodes"), values.get("links")
    if not isinstance(nodes, list) or not isinstance(links, list):
        return {}
    sources = {
        link[0]: [f"{link[1]}", link[2]]
        for link in links[: 4 * MAX_NODES]
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int)
    }
    graph: dict[str, Node] = {}
    for node in nodes[:MAX_NODES]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str):
            continue
        inputs: dict[str, Any] = {}
        widgets = node.get("widgets_values")
        if isinstance(widgets, list):
            inputs |= dict(zip(_WIDGETS.get(node["type"], ()), widgets, strict=False))
        elif isinstance(widgets, dict):
            inputs |= widgets
        for joined in node["inputs"] if isinstance(node.get("inputs"), list) else []:
            if isinstance(joined, dict) and isinstance(joined.get("link"), int) and joined["link"] in sources:
                inputs[f"{joined.get('name')}"] = sources[joined["link"]]
        graph[f"{node.get('id')}"] = Node(node["type"], inputs)
    return graph


def _node(graph: Graph, link: Any) -> Node | None:
    if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int):
        return graph.get(f"{link[0]}")
    return None


def _upstream(graph: Graph, first: Node) -> Iterator[Node]:
    """A node and all that lead to it, the nearest first, each once."""
    waiting, seen = [first], {id(first)}
    for node in waiting:
        yield node
        for link in node.inputs.values():
            found = _node(graph, link)
            if found is not None and id(found) not in seen and len(waiting) < MAX_FOLLOWED:
                seen.add(id(found))
                waiting.append(found)


def _is_sampler(node: Node) -> bool:
    inputs = node.inputs
    return ("steps" in inputs and "cfg" in inputs and "positive" in inputs) or (
        "sigmas" in inputs and ("guider" in inputs or "positive" in inputs)
    )


def _sampler(graph: Graph) -> Node | None:
    savers = [node for node in graph.values() if any(kind in node.kind for kind in _SAVERS)]
    for saver in savers:
        for node in _upstream(graph, saver):
            if _is_sampler(node):
                return node
    return next((node for node in graph.values() if _is_sampler(node)), None)


def _upstream_model(graph: Graph, first: Node) -> Iterator[Node]:
    """The nodes that the model goes through, the nearest to the sampler first, up to where it is loaded."""
    node: Node | None = first
    seen: set[int] = set()
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        if node is not first:
            yield node
        node = _node(graph, node.inputs.get("model"))


def _loaded(model: list[Node]) -> dict[str, Fact]:
    for node in model:
        for name in _LOADED:
            value = node.inputs.get(name)
            if isinstance(value, str):
                weights = node.inputs.get("weight_dtype")
                note = "a file's name; what is in it is not told"
                found = {"model": Fact(value, note, same_as=name_of_file(value))}
                if isinstance(weights, str):
                    found["dtype"] = Fact(None, f"its weights are loaded as {weights}")
                return found
    return {}


def _adapters(graph: Graph, model: list[Node]) -> dict[str, Fact]:
    facts: dict[str, Fact] = {}
    number = 0
    for node in reversed(model):  # in the order in which they are applied
        for name, multiplier in _loras_of(graph, node):
            at = f"loras.{number}"
            facts[f"{at}.path"] = Fact(name, same_as=name_of_file(name))
            facts[f"{at}.sha256"] = UNKNOWN
            facts[f"{at}.network_multiplier"] = multiplier
            note = "merged as the model is loaded, or at each call where memory is short"
            facts[f"{at}.placement"] = Fact(None, note)
            number += 1
    return facts


def _loras_of(graph: Graph, node: Node) -> Iterator[tuple[str, Fact]]:
    name = node.inputs.get("lora_name")
    if isinstance(name, str):
        yield name, _float(graph, node.inputs.get("strength_model", node.inputs.get("strength")))
    for value in node.inputs.values():  # nodes that hold a list of adapters
        if isinstance(value, dict) and isinstance(value.get("lora"), str) and value.get("on", True):
            yield value["lora"], _float(graph, value.get("strength"))


def _words(graph: Graph, link: Any) -> Fact:
    """The first text upstream of a conditioning."""
    first = _node(graph, link)
    if first is None:
        return UNKNOWN
    for node in _upstream(graph, first):
        if "Zero" in node.kind:
            return Fact("", "zeros in place of a text")
        for name in ("text", "t5xxl", "prompt"):
            if name in node.inputs:
                found = _text(graph, node.inputs[name])
                return UNKNOWN if found is None else Fact(found)
    return UNKNOWN


def _size_node(graph: Graph, link: Any) -> Node | None:
    first = _node(graph, link)
    upstream = () if first is None else _upstream(graph, first)
    return next((node for node in upstream if {"width", "height"} <= node.inputs.keys()), None)


def _scheduler(graph: Graph, sigmas: Node, model: list[Node]) -> Fact:
    name = _text(graph, sigmas.inputs.get("scheduler"))
    if name is None:
        return Fact(None, f"its steps come from {sigmas.kind}")
    shifting = _shifting(model)
    if shifting is None:
        return Fact(name, "with the model's own shift")
    shift = _number(graph, shifting.inputs.get("shift", shifting.inputs.get("max_shift")))
    return Fact(name, f"shift {shift.shown} ({shifting.kind})")


def _shift(graph: Graph, model: list[Node]) -> dict[str, Fact]:
    """The fixed shift, where a node says one; that of ModelSamplingFlux depends on the size."""
    shifting = _shifting(model)
    if shifting is None or "shift" not in shifting.inputs:
        return {}
    return {"shift": _float(graph, shifting.inputs["shift"])}


def _shifting(model: list[Node]) -> Node | None:
    return next((node for node in model if node.kind.startswith("ModelSampling")), None)


def _guidance(graph: Graph, guider: Node, conditioning: Any) -> Fact:
    first = _node(graph, conditioning)
    upstream = () if first is None else _upstream(graph, first)
    distilled = next((node for node in upstream if node.kind == "FluxGuidance"), None)
    if distilled is not None:
        scale = _number(graph, distilled.inputs.get("guidance")).shown
        return Fact("classifier-free", f"and a distilled guidance of {scale}, which Chroma has not")
    if "cfg" not in guider.inputs:
        return Fact(f"as {guider.kind} does it")
    return Fact("classifier-free", "one pass at 1, without negative text")


def _sampler_fact(name: str | None) -> Fact:
    return UNKNOWN if name is None else Fact(name)


def _value(graph: Graph, value: Any) -> Any:
    """A value, or that of the node that gives it where it holds just one."""
    for _ in range(20):
        node = _node(graph, value)
        if node is None:
            break
        value = next((node.inputs[name] for name in _VALUES if name in node.inputs), None)
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | int | float) else None


def _number(graph: Graph, value: Any) -> Fact:
    found = _value(graph, value)
    return Fact(found) if isinstance(found, int | float) else UNKNOWN


def _float(graph: Graph, value: Any) -> Fact:
    found = _value(graph, value)
    return Fact(float(found)) if isinstance(found, int | float) and abs(found) < 1e300 else UNKNOWN


def _text(graph: Graph, value: Any) -> str | None:
    found = _value(graph, value)
    return found if isinstance(found, str) else None
