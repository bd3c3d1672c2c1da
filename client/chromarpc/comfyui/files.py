"""A workflow out of its file: JSON of ComfyUI's API form, or a picture that carries it. Strangers wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chromarpc.comfyui.graph import Graph, Node
from chromarpc.comfyui.problems import NoWorkflow
from chromarpc.pictures.files import MAX_TEXT_BYTES, RECORD_KEY, NoPicture, kind_of, read_picture

MAX_FILE_BYTES: Final = 64 * 1024**2
"""Of a picture; a workflow alone may have `MAX_TEXT_BYTES`."""
MAX_NODES: Final = 10_000
HOW_TO_EXPORT: Final = "in ComfyUI, choose Workflow → Export (API), and give that file"
_API_KEY: Final = "prompt"
_EDITOR_KEY: Final = "workflow"


def read_graph(source: str | os.PathLike[str] | bytes) -> Graph:
    """The graph of a file, or of a file's content.

    Raises:
        NoWorkflow: it holds none of the API form.
        OSError: the file cannot be read.
    """
    content = source if isinstance(source, bytes) else _read(Path(source))
    if len(content) > MAX_FILE_BYTES:
        raise NoWorkflow(f"has more than {MAX_FILE_BYTES // 1024**2} MiB, which no workflow has")
    return _graph(_from_picture(content) if kind_of(content) else content)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _from_picture(content: bytes) -> bytes:
    """The text of a picture that holds the workflow which drew it."""
    try:
        texts = read_picture(content).texts
    except NoPicture as error:
        raise NoWorkflow(f"is a picture that cannot be read: it {error}") from None
    if _API_KEY in texts:
        return texts[_API_KEY].encode("utf-8", "replace")
    if RECORD_KEY in texts:
        raise NoWorkflow("is a picture of this service, and of no workflow: `--json` draws it again")
    if _EDITOR_KEY in texts:
        raise NoWorkflow(f"is a picture that holds the editor's form of its workflow alone: {HOW_TO_EXPORT}")
    raise NoWorkflow("is a picture without a workflow: it was written by another program, or anew by one")


def _graph(text: bytes) -> Graph:
    values = _parsed(text)
    if not isinstance(values, dict):
        raise NoWorkflow("is no workflow: it is JSON, but no object")
    if isinstance(values.get("nodes"), list):
        raise NoWorkflow(f"is a workflow in the editor's form, which does not name its values: {HOW_TO_EXPORT}")
    sent = values.get(_API_KEY)
    # What programs send to ComfyUI has the graph under `prompt`.
    described: Mapping[str, Any] = sent if isinstance(sent, dict) and "class_type" not in sent else values
    if len(described) > MAX_NODES:
        raise NoWorkflow(f"has more than {MAX_NODES} nodes")
    nodes = {node_id: node for node_id, value in described.items() if (node := _node(node_id, value)) is not None}
    if not nodes:
        raise NoWorkflow(f"is no workflow: it has no node with a class_type and inputs; {HOW_TO_EXPORT}")
    return Graph(nodes)


def _parsed(text: bytes) -> Any:
    if len(text) > MAX_TEXT_BYTES:
        raise NoWorkflow(f"holds more than {MAX_TEXT_BYTES} bytes of text, which no workflow does")
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise NoWorkflow("is neither a picture that can be read here nor text") from None
    except json.JSONDecodeError as error:
        raise NoWorkflow(f"is no workflow: it is not JSON: {error}") from None
    except ValueError:  # the interpreter's bound on the digits of a whole number
        raise NoWorkflow("is no workflow: it holds a number of thousands of digits") from None
    except RecursionError:
        raise NoWorkflow("is no workflow: it is nested too deeply") from None


def _node(node_id: str, value: Any) -> Node | None:
    if not isinstance(value, dict):
        return None
    class_type, inputs = value.get("class_type"), value.get("inputs")
    if not isinstance(class_type, str) or not isinstance(inputs, dict):
        return None
    return Node(node_id, class_type, inputs)
