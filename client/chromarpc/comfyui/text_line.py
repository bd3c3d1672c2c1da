"""From a sampler back to a text and to where its encoder is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from chromarpc.comfyui.graph import Graph, Node, Output
from chromarpc.comfyui.model_line import ADAPTERS, power_rows
from chromarpc.comfyui.problems import Findings

_UNPADDED: Final = frozenset({"chroma", "pixart"})
"""Types under which ComfyUI reads a text with T5 alone and pads nothing."""
_WITH_T5: Final = frozenset({"flux"})
"""Types of two encoders of which Chroma takes T5's output alone, but of padded text."""


@dataclass(frozen=True)
class TextEncoder:
    """What a text is encoded with."""

    file: str
    """Name as the workflow has it; empty where that is the model's file, or one of two."""
    weighs_otherwise: bool = False
    """Whether weights such as `(word:1.2)` mean something else in it than with Chroma's own type."""


@dataclass(frozen=True)
class Text:
    """A prompt, or a negative one."""

    words: str
    encoder: TextEncoder


Loader: TypeAlias = Callable[[Graph, Output, bool], TextEncoder]


def follow_text(graph: Graph, node: Node, name: str, field: str, found: Findings) -> Text:
    """The text that an input gets.

    Args:
        graph: the workflow.
        node: whose input it is.
        name: of the input.
        field: of the request that says it, `prompt` or `neg`; where the caller says that, the text is empty.
        found: collects remarks.

    Raises:
        Unmapped: it is none, or changed on its way in a way that is not known here.
    """
    seen: set[str] = set()
    while True:
        step = graph.source(node, name).node
        if step.id in seen:
            raise node.unmapped(name, "its links lead in a circle")
        seen.add(step.id)
        if step.class_type == "CLIPTextEncode":
            words = "" if field in found.given else graph.text(step, "text")
            encoder = follow_encoder(graph, step, found)
            if encoder.weighs_otherwise and "(" in words:
                raise step.unmapped(
                    "text",
                    "prompt weights mean something else with DualCLIPLoader: load T5 alone, by a CLIPLoader of "
                    "type chroma",
                )
            return Text(words, encoder)
        if step.class_type == "ConditioningZeroOut":
            raise step.unmapped(
                "",
                "zeros in place of a text are not known here: encode an empty text, or set the guidance to 1",
            )
        if step.class_type != "FluxGuidance":
            raise step.unmapped("", "what it does to a text is not known here")
        if graph.number(step, "guidance") != 0:
            raise step.unmapped(
                "guidance",
                "Chroma's distilled guidance is 0 here: take this node out; the guidance is `cfg`",
            )
        node, name = step, "conditioning"


def follow_encoder(graph: Graph, node: Node, found: Findings) -> TextEncoder:
    """The encoder that a node gets by its input `clip`.

    Raises:
        Unmapped: it is changed or loaded in a way that is not known here.
    """
    name = "clip"
    is_unpadded = False  # by a node of options
    seen: set[str] = set()
    while True:
        output = graph.source(node, name)
        step = output.node
        if step.id in seen:
            raise node.unmapped(name, "its links lead in a circle")
        seen.add(step.id)
        if step.class_type in ENCODER_LOADERS:
            return ENCODER_LOADERS[step.class_type](graph, output, is_unpadded)
        if step.class_type == "T5TokenizerOptions":
            if not is_unpadded:  # the last such node counts
                _require_no_padding(graph, step)
            is_unpadded = True
        elif step.class_type in ADAPTERS:
            if output.index != 1:
                raise node.unmapped(name, f"output {output.index} of {step.label} is no text encoder")
            for input_name in _adapted_by(graph, step):
                found.remark(
                    f"{step.label}, {input_name}: an adapter's part for the text encoder, if its file has one, "
                    "has no effect here"
                )
        else:
            raise step.unmapped("", "what it does to the text encoder is not known here")
        node = step


def _require_no_padding(graph: Graph, node: Node) -> None:
    if (padding := graph.whole(node, "min_padding")) != 0:
        raise node.unmapped("min_padding", f"texts are not padded here, so only 0 can be drawn, not {padding}")
    # The shortest text is one token long: that which ends it.
    if (length := graph.whole(node, "min_length")) > 1:
        raise node.unmapped("min_length", f"texts are not padded here, so only 0 can be drawn, not {length}")


def _adapted_by(graph: Graph, node: Node) -> list[str]:
    """Inputs of a node of adapters that have it change the text encoder."""
    if node.class_type == "LoraLoader":
        return ["strength_clip"] if graph.number(node, "strength_clip") else []
    if node.class_type == "Power Lora Loader (rgthree)":
        return [name for name, row in power_rows(node) if _strength_for_text(row)]
    return [name for name in node.inputs if name.startswith("lora_") and node.inputs[name] != "None"]


def _strength_for_text(row: Mapping[str, Any]) -> Any:
    own = row.get("strengthTwo")
    return row["strength"] if own is None else own


def _single(graph: Graph, output: Output, _is_unpadded: bool) -> TextEncoder:
    node = output.node
    kind = graph.text(node, "type")
    if kind not in _UNPADDED:
        raise node.unmapped(
            "type", f"encodes texts otherwise than Chroma's own type: set it to chroma, not {kind[:40]}"
        )
    return TextEncoder(graph.text(node, "clip_name"))


def _double(graph: Graph, output: Output, is_unpadded: bool) -> TextEncoder:
    node = output.node
    kind = graph.text(node, "type")
    if kind not in _WITH_T5 or not is_unpadded:
        raise node.unmapped(
            "type",
            "pads the text, or gives Chroma more than T5's output: load T5 alone, by a CLIPLoader of type chroma"
            + (" (or add T5TokenizerOptions with 0 and 0)" if kind in _WITH_T5 else ""),
        )
    return TextEncoder("", weighs_otherwise=True)


def _checkpoint(_graph: Graph, output: Output, _is_unpadded: bool) -> TextEncoder:
    if output.index != 1:
        raise output.node.unmapped("", f"its output {output.index} is no text encoder")
    return TextEncoder("")


ENCODER_LOADERS: Final[Mapping[str, Loader]] = {
    "CLIPLoader": _single,
    "CLIPLoaderGGUF": _single,
    "DualCLIPLoader": _double,
    "DualCLIPLoaderGGUF": _double,
    "CheckpointLoaderSimple": _checkpoint,
}
