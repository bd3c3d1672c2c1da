"""Which picture a workflow draws, and how it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chromarpc.comfyui.graph import Graph, Node
from chromarpc.comfyui.problems import Findings, Problem, Unmapped, cut

_SAVERS: Final = ("SaveImage", "SaveImageWebsocket", "Image Save")
_VIEWERS: Final = ("PreviewImage",)


@dataclass(frozen=True)
class Decoded:
    """The picture that is drawn."""

    decoder: Node
    autoencoder: str
    """Name of its file as the workflow has it; empty where that is the model's file."""


def follow_output(graph: Graph, found: Findings) -> Decoded | None:
    """The one picture that is saved, or where none is, shown; None where that cannot be mapped, which is kept.

    Raises:
        Unmapped: there is none, or more than one.
    """
    savers = _of(graph, _SAVERS)
    viewers = _of(graph, _VIEWERS)
    if not savers and not viewers:
        known = ", ".join(_SAVERS + _VIEWERS)
        raise Unmapped(Problem("", "", "", f"it has no node that saves or shows a picture: one of {known}"))
    decoders = {node.id: node for saver in savers or viewers if (node := found.attempt(_decoder, graph, saver))}
    if savers:
        for viewer in viewers:
            found.remark(f"{viewer.label} is left out, since another node saves the picture")
    if not decoders:
        return None
    if len(decoders) > 1:
        labels = ", ".join(node.label for node in list(decoders.values())[:5])
        raise Unmapped(Problem("", "", "", f"it draws several pictures ({labels}): leave one of them"))
    decoder = next(iter(decoders.values()))
    return Decoded(decoder, found.attempt(_autoencoder, graph, decoder) or "")


def _of(graph: Graph, kinds: tuple[str, ...]) -> list[Node]:
    return [node for node in graph.nodes.values() if node.class_type in kinds]


def _decoder(graph: Graph, saver: Node) -> Node:
    output = graph.source(saver, "images")
    if output.node.class_type == "VAEDecodeTiled":
        raise output.node.unmapped("", "decodes in tiles, which changes pixels: use VAEDecode")
    if output.node.class_type != "VAEDecode":
        raise output.node.unmapped("", "what it does to the picture is not known here")
    return output.node


def _autoencoder(graph: Graph, decoder: Node) -> str:
    output = graph.source(decoder, "vae")
    node = output.node
    if node.class_type == "VAELoader":
        name = graph.text(node, "vae_name")
        if "." not in name:  # no file: ComfyUI's small decoders, such as taef1, and `pixel_space`
            raise node.unmapped("vae_name", f"{cut(name)} is another decoder than Chroma's autoencoder")
        return name
    if node.class_type == "CheckpointLoaderSimple" and output.index == 2:
        return ""
    raise node.unmapped("", "is no autoencoder that is known here: use VAELoader")
