"""From a graph to what it draws: backwards from the picture that it saves."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Final

from chromarpc.comfyui.files import read_graph
from chromarpc.comfyui.graph import Graph
from chromarpc.comfyui.model_line import ModelLine, follow_model
from chromarpc.comfyui.output_line import follow_output
from chromarpc.comfyui.problems import Findings, WorkflowNotMapped
from chromarpc.comfyui.sampling_line import Input, follow_sampler, follow_size
from chromarpc.comfyui.text_line import Text, follow_text
from chromarpc.comfyui.workflow import Workflow, is_single_pass

_READ: Final = frozenset(
    {
        *("prompt", "neg", "width", "height", "sample_steps", "guidance_scale", "seed"),
        *("sampler", "schedule", "shift", "model", "loras"),
    }
)
"""Options that a workflow says."""


def read_workflow(source: str | os.PathLike[str] | bytes, *, given: Collection[str] = ()) -> Workflow:
    """Reads a workflow of ComfyUI's API form, from its JSON or from a picture that carries it.

    Args:
        source: path of the file, or its content.
        given: names of options that `Workflow.request` will get, such as `seed` or `prompt`: what the workflow has
            in their place is not read, so that it may be anything.

    Raises:
        NoWorkflow: there is none in it, or one in the editor's form alone.
        WorkflowNotMapped: something in it cannot be a request; every such thing is named.
        OSError: the file cannot be read.
    """
    return map_graph(read_graph(source), given)


def map_graph(graph: Graph, given: Collection[str] = ()) -> Workflow:
    """What a graph draws; arguments as of `read_workflow`.

    Raises:
        WorkflowNotMapped: as of `read_workflow`.
    """
    found = Findings(given)
    workflow = found.attempt(_followed, graph, found)
    if workflow is None or found.problems:
        raise WorkflowNotMapped(found.problems)
    return workflow


def _followed(graph: Graph, found: Findings) -> Workflow | None:
    picture = follow_output(graph, found)
    if picture is None:
        return None
    sampling = follow_sampler(graph, picture.decoder, "samples", found)
    size = found.attempt(follow_size, graph, sampling.latent, found)
    model = found.attempt(_model, graph, sampling.model, found)
    scheduled = model
    if sampling.scheduled != sampling.model:
        scheduled = found.attempt(_model, graph, sampling.scheduled, found)
    positive = found.attempt(_text, graph, sampling.positive, "prompt", found)
    negative: Text | None = None
    if sampling.negative is not None and "neg" not in found.given:
        # Without an unconditional pass it has no effect, whatever it is.
        into = Findings() if is_single_pass(sampling.guidance_scale) else found
        negative = into.attempt(_text, graph, sampling.negative, "neg", into)
    if size is None or model is None or scheduled is None or positive is None:
        return None
    return Workflow(
        prompt=positive.words,
        neg="" if negative is None else negative.words,
        width=size.width,
        height=size.height,
        sample_steps=sampling.sample_steps,
        guidance_scale=sampling.guidance_scale,
        seed=sampling.seed,
        sampler=sampling.sampler,
        schedule=sampling.schedule,
        shift=scheduled.shift,
        model_file=model.file,
        adapters=model.adapters,
        text_encoder_file=positive.encoder.file,
        autoencoder_file=picture.autoencoder,
        size_node=size.node,
        schedule_node=sampling.scheduled.node,
        unread=found.given & _READ,
        remarks=tuple(found.remarks),
    )


def _model(graph: Graph, at: Input, found: Findings) -> ModelLine:
    return follow_model(graph, at.node, at.name, found)


def _text(graph: Graph, at: Input, field: str, found: Findings) -> Text:
    return follow_text(graph, at.node, at.name, field, found)
