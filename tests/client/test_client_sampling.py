"""Sampler, schedule, shift, settings and negative text, from Python and the shell: said, told and repeated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from chromarpc import Client, InvalidRequest, Prompt, parse_request_json
from chromarpc.cli import app
from chromarpc.cli.inquiry import _info_lines, _model_lines
from chromarpc.cli.jobs import _lines
from chromarpc.request import build_request
from chromarpc.sampling import SAMPLERS, SCHEDULES
from chromarpc.v1 import job_event_pb2, job_service_pb2, model_service_pb2
from chromarpc_server.domain.sampling_choices import SAMPLERS as SERVED
from chromarpc_server.domain.sampling_choices import SCHEDULES as SERVED_SCHEDULES
from tests.client.client_fake_server import FakeServer, JobEvent, Request, Story, png

ROOT = Path(__file__).parents[2]
PROMPT: dict[str, Any] = {
    "prompt": "a",
    "neg": "ugly",
    "use_neg": True,
    "sampler": "heun",
    "schedule": "beta",
    "shift": 1.5,
}
BODY: dict[str, Any] = {
    "model": "chroma",
    "prompts": [PROMPT],
    "settings": "comfyui",
    "output": {"format": "IMAGE_FORMAT_PNG"},
}


def test_the_names_that_are_known_without_a_server_are_the_servers() -> None:
    page = (ROOT / "client/web/src/pictures/sampling.ts").read_text("utf-8")
    for name, here, served in (("SAMPLERS", SAMPLERS, SERVED), ("SCHEDULES", SCHEDULES, SERVED_SCHEDULES)):
        assert list(here) == list(served)
        listed = re.search(rf"{name}: readonly string\[\] = \[\n  FLOWMATCH,(.*?)\];", page, re.DOTALL)
        assert listed is not None
        assert ["flowmatch", *re.findall(r'"(\w+)"', listed[1])] == list(served)


def sent(body: dict[str, Any]) -> Request:
    parsed = parse_request_json(json.dumps(body))
    assert parsed.unknown == ()
    return parsed.request


def as_asked(request: Request, context: Any) -> Iterator[JobEvent]:
    """A job whose plan is its request."""
    story = Story()
    accepted = story.accepted(request, settings=request.settings)
    for prompt, said in zip(accepted.accepted.prompts, request.prompts, strict=True):
        prompt.sampler, prompt.schedule, prompt.neg = said.sampler, said.schedule, said.neg
        if said.HasField("shift"):
            prompt.shift = said.shift
    yield accepted
    prepared = story.prepared(request)
    prepared.prepared.stored_as = "GGUF Q4_K"
    yield prepared
    data = png(1)
    yield story.header(data)
    yield story.chunk(data)
    yield story.completed()


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    server.script = as_asked

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": server.target})

    return run


def test_arguments_become_the_request_and_come_back_in_plan_and_record(server: FakeServer, client: Client) -> None:
    server.script = as_asked
    (image,) = client.generate_images(
        Prompt("a", sampler="heun", shift=1.5),
        sampler="euler",
        schedule="beta",
        neg="ugly",
        use_neg=True,
        settings="comfyui",
        output_format="png",
    )
    assert server.requests == [sent(BODY)]
    (planned,) = image.plan.prompts
    assert (planned.sampler, planned.schedule, planned.shift, planned.neg) == ("heun", "beta", 1.5, "ugly")
    assert image.plan.settings == "comfyui"
    record: Any = image.record()
    again = record["request"]
    assert again["settings"] == "comfyui"
    assert {name: again["prompts"][0][name] for name in PROMPT} == PROMPT
    assert record["stored_as"] == "GGUF Q4_K"
    assert b"Sampler: heun, Schedule type: beta, " in image.file_bytes()


def test_an_older_server_samples_as_the_reference_does(server: FakeServer, client: Client) -> None:
    server.script = as_asked
    (image,) = client.generate_images("a", output_format="png")
    (planned,) = image.plan.prompts
    assert (planned.sampler, planned.schedule, planned.shift) == ("flowmatch", "flowmatch", None)
    assert image.plan.settings == "reference"
    request: Any = image.record()["request"]
    assert "settings" not in request
    assert "shift" not in request["prompts"][0]


@pytest.mark.parametrize(
    ("guidance", "settings", "said"),
    [(1.0, "comfyui", False), (0.5, "comfyui", True), (0.5, "", False), (4.0, "", True)],
)
def test_a_record_of_a_pair_says_whether_there_were_two_passes(
    server: FakeServer, client: Client, guidance: float, settings: str, said: bool
) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        for event in as_asked(request, context):
            if event.HasField("accepted"):
                event.accepted.prompts[0].guidance_scale = guidance
            if event.HasField("prepared"):
                event.prepared.second_device = "cuda:1"
            yield event

    server.script = script
    (image,) = client.generate_images("a", settings=settings or None)
    assert ("guidance_on_two_devices" in image.record()) is said


def test_what_no_request_can_hold_names_its_field() -> None:
    for name, value in (("sampler", 1), ("shift", "much"), ("use_neg", "yes")):
        with pytest.raises(InvalidRequest) as caught:
            build_request("a", **{name: value})  # type: ignore[arg-type]
        assert [violation.field for violation in caught.value.violations] == [f"prompts.0.{name}"]


def test_options_of_the_shell_become_the_request(server: FakeServer, shell: Any) -> None:
    result = shell(
        "generate", "a", "--neg", "ugly", "--use-neg", "--sampler", "heun", "--schedule", "beta",
        "--shift", "1.5", "--settings", "comfyui",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "out.png\n"), result.stderr
    assert server.requests == [sent(BODY)]


def test_names_are_completed_in_the_shell() -> None:
    complete = {"_CHROMARPC_COMPLETE": "complete_bash"}

    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        result = CliRunner().invoke(app, [], prog_name="chromarpc", env={**complete, **words})
        return result.stdout.split()

    assert completed("chromarpc generate --sampler dpm") == ["dpm_2", "dpmpp_2m"]
    assert completed("chromarpc generate --schedule k") == ["kl_optimal", "karras"]
    assert completed("chromarpc generate --settings c") == ["comfyui"]


def test_a_picture_is_drawn_again_with_another_sampler(server: FakeServer, shell: Any) -> None:
    assert shell("generate", "a", "--schedule", "beta", "--settings", "comfyui", "-o", "a.png").exit_code == 0
    assert shell("generate", "--json", "a.png", "--sampler", "dpmpp_2m", "-o", "b.png").exit_code == 0
    first, again = server.requests
    assert (again.prompts[0].sampler, again.prompts[0].schedule) == ("dpmpp_2m", "beta")
    assert (first.settings, again.settings) == ("comfyui", "comfyui")


def test_a_server_tells_its_lists_and_a_model_its_defaults() -> None:
    info = model_service_pb2.GetServerInfoResponse(
        samplers=["flowmatch", "heun"], schedules=["flowmatch", "beta"], settings=["reference", "comfyui"]
    )
    lines = list(_info_lines(info))
    assert "samplers   flowmatch, heun" in lines
    assert "schedules  flowmatch, beta" in lines
    assert "settings   reference, comfyui" in lines
    defaults = model_service_pb2.ModelDefaults(sampler="heun", schedule="beta", shift=1.0, profile="fp8")
    told = "\n".join(_model_lines(model_service_pb2.Model(weights_present=True, defaults=defaults)))
    assert told.endswith(", sampler heun, schedule beta, shift 1, profile fp8")
    older = model_service_pb2.Model(weights_present=True, defaults=model_service_pb2.ModelDefaults(width=8))
    assert "sampler" not in "\n".join(_model_lines(older))


def test_a_job_says_what_it_is_sampled_with_where_that_is_not_the_references_way() -> None:
    def lines(prompt: job_event_pb2.PlannedPrompt, settings: str) -> str:
        plan = job_event_pb2.Accepted(
            served_model="chroma", profile="reference", prompts=[prompt], settings=settings
        )
        return "\n".join(_lines(job_service_pb2.Job(plan=plan)))

    other = job_event_pb2.PlannedPrompt(sampler="heun", schedule="beta", shift=1.5, neg="ugly\nand so on")
    assert "chroma, reference, as comfyui" in lines(other, "comfyui")
    assert "seed 0, sampler heun, schedule beta, shift 1.5\n  negative  ugly and so on" in lines(other, "comfyui")
    for usual in (("", "", ""), ("flowmatch", "flowmatch", "reference")):
        prompt = job_event_pb2.PlannedPrompt(sampler=usual[0], schedule=usual[1])
        told = lines(prompt, usual[2])
        assert "sampler" not in told
        assert ", as " not in told


def test_a_model_with_a_part_that_cannot_be_used_is_not_ready() -> None:
    part = model_service_pb2.ModelPart(part="transformer", source="a.gguf", present=True, problem="truncated")
    model = model_service_pb2.Model(weights_present=True, parts=[part])
    assert list(_model_lines(model))[:2] == ["cannot be used", "transformer: a.gguf cannot be used: truncated"]


@pytest.mark.parametrize(
    ("named", "sampled"),
    [
        ({}, ("flowmatch", "flowmatch", None)),
        ({"sampler": "heun"}, ("heun", "", None)),
        ({"shift": 2.0}, ("", "", 2.0)),
    ],
)
def test_a_record_from_before_there_were_samplers_is_drawn_as_it_was(
    server: FakeServer, shell: Any, named: dict[str, Any], sampled: tuple[str, str, float | None]
) -> None:
    info = PngInfo()
    prompt = {"prompt": "a", "width": 64, "height": 64, **named}
    info.add_text("chromarpc", json.dumps({"request": {"model": "chroma1-hd", "prompts": [prompt]}}))
    Image.new("RGB", (8, 8)).save("old.png", pnginfo=info)
    assert shell("generate", "--json", "old.png", "-o", "again.png").exit_code == 0
    (again,) = server.requests
    asked = again.prompts[0]
    assert (asked.sampler, asked.schedule, asked.shift if asked.HasField("shift") else None) == sampled
