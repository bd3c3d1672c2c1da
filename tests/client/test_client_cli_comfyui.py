"""`chromarpc generate --comfyui`, and `--print-request`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from chromarpc import parse_request_json
from chromarpc.request import build_request
from chromarpc.v1 import lora_service_pb2, lora_service_pb2_grpc, model_service_pb2
from tests.client.client_fake_server import FakeServer
from tests.client.comfyui_workflows import as_bytes, changed, ksampler_flow, node, replaced, served_model
from tests.client.picture_files import RECORD, WORKFLOW, png_with
from tests.client.shell import Shell, files


@dataclass
class ServerOfFiles(FakeServer):
    """Has a model of a file, and adapters."""

    models: list[model_service_pb2.Model] = field(
        default_factory=lambda: [served_model("other", "x"), served_model()]
    )
    loras: list[str] = field(default_factory=lambda: ["styles/ink.safetensors"])
    lists: int = 0
    """How often it was asked for its adapters."""

    def ListModels(self, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:  # noqa: N802
        return model_service_pb2.ListModelsResponse(models=self.models)

    def ListLoras(self, request: Any, context: Any) -> lora_service_pb2.ListLorasResponse:  # noqa: N802
        self.lists += 1
        stored = [lora_service_pb2.StoredLora(path=path) for path in self.loras]
        return lora_service_pb2.ListLorasResponse(loras=stored)

    def add_services(self, server: grpc.Server) -> None:
        lora_service_pb2_grpc.add_LoraServiceServicer_to_server(self, server)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name[:1].isupper():  # calls that no test makes
            return lambda request, context: context.abort(grpc.StatusCode.UNIMPLEMENTED, name)
        raise AttributeError(name)


@pytest.fixture
def server() -> Iterator[ServerOfFiles]:
    fake = ServerOfFiles()
    running = fake.start()
    yield fake
    running.stop(grace=None).wait()


@pytest.fixture
def flow(shell: Shell) -> str:
    Path("flow.json").write_bytes(as_bytes(ksampler_flow()))
    return "flow.json"


EXPECTED: dict[str, Any] = {
    "model": "chroma1-hd",
    "loras": [{"path": "styles/ink.safetensors", "network_multiplier": 0.8}],
    "prompts": [
        {
            "prompt": "a (red:1.2) circle",
            "width": 1024,
            "height": 768,
            "guidance_scale": 3.5,
            "sample_steps": 26,
            "neg": "blurry",
            "seed": 43,
            "sampler": "euler",
            "schedule": "beta",
            "shift": 1.0,
            "use_neg": True,
        }
    ],
    "settings": "comfyui",
}


def test_a_workflow_is_drawn_and_saved(shell: Shell, server: ServerOfFiles, flow: str) -> None:
    result = shell("generate", "--comfyui", flow, "-o", "drawn.png", "--quiet")
    assert result.exit_code == 0, result.stderr
    (request,) = server.requests
    body = {**EXPECTED, "output": {"format": "IMAGE_FORMAT_PNG"}}
    assert request == parse_request_json(json.dumps(body)).request
    assert files() == ["drawn.png", "flow.json"]


def test_a_picture_that_comfyui_saved_is_drawn(shell: Shell, server: ServerOfFiles) -> None:
    Path("ComfyUI_00001_.png").write_bytes(png_with({"prompt": ksampler_flow(), "workflow": WORKFLOW}))
    assert shell("generate", "--comfyui", "ComfyUI_00001_.png").exit_code == 0
    assert server.requests[0].prompts[0].seed == 43


def test_options_and_a_prompt_change_just_what_they_say(shell: Shell, server: ServerOfFiles, flow: str) -> None:
    options = "--seed 9 --model other --lora mine.safetensors:0.5 --steps 4 --width 512 --sampler heun --shift 3"
    result = shell("generate", "a dog", "--comfyui", flow, *options.split())
    assert result.exit_code == 0, result.stderr
    (request,) = server.requests
    prompt = request.prompts[0]
    assert (request.model, request.loras[0].path, request.settings) == ("other", "mine.safetensors", "comfyui")
    assert (prompt.prompt, prompt.seed, prompt.sample_steps) == ("a dog", 9, 4)
    assert (prompt.width, prompt.height, prompt.sampler, prompt.shift) == (512, 768, "heun", 3.0)
    assert server.lists == 0  # nothing of the workflow's adapters is asked for


def test_what_the_command_line_says_may_come_from_any_node(shell: Shell, server: ServerOfFiles) -> None:
    flow = {**changed(ksampler_flow(), n6={"text": ["20", 0]}, n9={"seed": ["20", 1]}), "20": node("Anything")}
    Path("flow.json").write_bytes(as_bytes(flow))
    assert shell("generate", "--comfyui", "flow.json").exit_code == 2
    assert shell("generate", "a dog", "--comfyui", "flow.json", "--seed", "9").exit_code == 0
    (request,) = server.requests
    assert (request.prompts[0].prompt, request.prompts[0].seed) == ("a dog", 9)


def test_the_request_is_printed_and_nothing_drawn(shell: Shell, server: ServerOfFiles, flow: str) -> None:
    result = shell("generate", "--comfyui", flow, "--print-request")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == EXPECTED
    assert server.requests == []
    assert files() == ["flow.json"]


def test_a_request_that_was_printed_is_the_one_that_json_sends(shell: Shell, server: ServerOfFiles) -> None:
    arguments = ("generate", "a cat", "a dog", "--model", "m", "--seed", "7", "--noise-draw", "legacy")
    Path("body.json").write_text(shell(*arguments, "--print-request").stdout)
    assert shell("generate", "--json", "body.json").exit_code == 0
    assert server.requests == [build_request(["a cat", "a dog"], model="m", seed=7, noise_draw="legacy")]


def test_what_cannot_be_drawn_is_named_and_nothing_is(shell: Shell, server: ServerOfFiles) -> None:
    flow = changed(ksampler_flow(), n9={"denoise": 0.5}, n8={"batch_size": 2})
    Path("flow.json").write_bytes(as_bytes(replaced(flow, "5", "TeaCache", model=["4", 0])))
    result = shell("generate", "--comfyui", "flow.json")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: flow.json: the workflow cannot be drawn here:",
        "  node 9 (KSampler), denoise: 0.5 begins with a picture, and here each begins with noise: only 1",
        "  node 8 (EmptySD3LatentImage), batch_size: the noise of 2 pictures is one draw, of which the first "
        "alone has a seed: set it to 1, which draws the first",
        "  node 5 (TeaCache): what it does to the model is not known here",
    ]
    assert server.requests == []


def test_files_that_the_server_has_not_are_named_together(shell: Shell, server: ServerOfFiles, flow: str) -> None:
    server.models, server.loras = [served_model("other", "x")], []
    result = shell("generate", "--comfyui", flow)
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.stderr.splitlines()[1:]] == [
        "  node 1 (UNETLoader), unet_name",
        "  node 4 (LoraLoaderModelOnly), lora_name",
    ]
    assert server.requests == []


def test_what_is_left_out_without_harm_is_noted(shell: Shell, server: ServerOfFiles) -> None:
    server.loras = ["mine/ink.safetensors"]
    flow = ksampler_flow()
    flow["20"] = node("PreviewImage", images=["10", 0])
    Path("flow.json").write_bytes(as_bytes(flow))
    result = shell("generate", "--comfyui", "flow.json", "--quiet")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("note: ")] == [
        "note: node 20 (PreviewImage) is left out, since another node saves the picture",
        "note: node 4 (LoraLoaderModelOnly), lora_name: styles/ink.safetensors is mine/ink.safetensors on this "
        "server",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--comfyui", "nothing.json"), "nothing.json: No such file or directory"),
        (("--comfyui", "flow.json", "--json", "flow.json"), "--json and --comfyui each say what to draw"),
        (("--comfyui", "flow.json", "a", "b"), "a workflow draws one picture; give one PROMPT at most"),
        (("--comfyui", "editor.json"), "editor.json: is a workflow in the editor's form, which does not name its"),
        (("--comfyui", "ours.png"), "ours.png: is a picture of this service"),
        (("--json", "theirs.png"), "theirs.png: ComfyUI drew this picture; give it as --comfyui theirs.png"),
        (("--comfyui", "flow.json", "-o", "out.jpeg", "--format", "png"), "the name says jpeg"),
        ((), "say what to draw: a PROMPT, a request by --json, or a workflow by --comfyui"),
    ],
)
def test_bad_input_ends_before_anything_is_drawn(
    shell: Shell, server: ServerOfFiles, flow: str, arguments: tuple[str, ...], said: str
) -> None:
    Path("editor.json").write_bytes(as_bytes(WORKFLOW))
    Path("ours.png").write_bytes(png_with({"chromarpc": RECORD}))
    Path("theirs.png").write_bytes(png_with({"prompt": ksampler_flow()}))
    result = shell("generate", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert server.requests == []


def test_a_workflow_comes_from_standard_input_too(shell: Shell, server: ServerOfFiles) -> None:
    result = shell("generate", "--comfyui", "-", "--print-request", text_in=json.dumps(ksampler_flow()))
    assert json.loads(result.stdout) == EXPECTED


def test_a_workflow_is_queued_and_left(shell: Shell, server: ServerOfFiles, flow: str) -> None:
    result = shell("generate", "--comfyui", flow, "--detach")
    assert result.exit_code != 2  # the fake server has no jobs; it was asked for one


async def test_both_clients_give_what_a_workflow_needs(
    shell: Shell, server: ServerOfFiles, flow: str, client: Any, async_client: Any
) -> None:
    from chromarpc.comfyui import read_workflow

    workflow = read_workflow(flow)
    request = workflow.request(client.list_models(), client.list_loras())
    assert request == workflow.request(await async_client.list_models(), await async_client.list_loras())
    assert request == parse_request_json(json.dumps(EXPECTED)).request
