"""Drawing what a workflow of ComfyUI draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chromarpc.cli.exits import UsageError, say
from chromarpc.cli.request import read_source
from chromarpc.client import Client
from chromarpc.comfyui import WorkflowError, read_workflow
from chromarpc.v1 import generation_service_pb2


def workflow_request(
    client: Client, source: Path, prompts: list[str], options: Mapping[str, Any]
) -> generation_service_pb2.GenerateRequest:
    """The request that a workflow becomes on a server, with options in place of what it says.

    Says what was taken otherwise than it stands in the workflow, or left out without harm.

    Args:
        client: of the server, which is asked for its models, and for its adapters where the workflow has some.
        source: file of the workflow, or of a picture that carries it; `-` is standard input.
        prompts: none, or one in place of the workflow's.
        options: of `build_request`; those that were given.

    Raises:
        UsageError: it cannot be drawn; every node at fault is named.
    """
    if len(prompts) > 1:
        raise UsageError("a workflow draws one picture; give one PROMPT at most")
    try:
        changed = {*options, "prompt"} if prompts else set(options)
        workflow = read_workflow(read_source(source), given=changed)
        needs_loras = bool(workflow.adapters) and "loras" not in options
        mapped = workflow.map(
            client.list_models(),
            client.list_loras() if needs_loras else None,
            prompt=prompts[0] if prompts else None,
            **options,
        )
    except WorkflowError as error:
        raise UsageError(f"{source}: {error}") from None
    for remark in mapped.remarks:
        say(f"note: {remark}")
    return mapped.request
