"""Workflows of ComfyUI as requests: read on this side, without a server and without ComfyUI.

    workflow = chromarpc.comfyui.read_workflow("flow.json")  # or a picture that ComfyUI saved
    request = workflow.request(client.list_models(), client.list_loras())
    for event in client.generate_request(request):
        ...

What a workflow says and no request can is an error that names node, input and reason: nothing is drawn half.

`files.py` takes the graph out of a file, `graph.py` follows links and reads values. From the picture that is saved
backwards go `output_line.py`, `sampling_line.py`, `text_line.py` and `model_line.py`, each with the table of node
types that it knows; `mapping.py` puts together what they find. `workflow.py` makes the request of it, with the
files that `matching.py` finds on the server. `problems.py` has the errors.
"""

from chromarpc.comfyui.mapping import read_workflow
from chromarpc.comfyui.model_line import Adapter, ModelFile
from chromarpc.comfyui.problems import NoWorkflow, Problem, WorkflowError, WorkflowNotMapped
from chromarpc.comfyui.workflow import MappedRequest, Workflow

__all__ = [
    "Adapter",
    "MappedRequest",
    "ModelFile",
    "NoWorkflow",
    "Problem",
    "Workflow",
    "WorkflowError",
    "WorkflowNotMapped",
    "read_workflow",
]
