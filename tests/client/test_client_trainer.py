"""What the trainer's profiles take, from Python and from the shell: into the request, back out of what is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from chromarpc import AdapterPlacement, Client, InvalidRequest, Lora, Prompt, TrainerOptions, parse_request_json
from chromarpc.cli import app
from chromarpc.cli.inquiry import _model_lines
from chromarpc.cli.request import parse_lora
from chromarpc.request import build_request
from chromarpc.v1 import job_event_pb2, model_service_pb2, options_pb2
from tests.client.client_fake_server import FakeServer, JobEvent, Request, Story, png

SHA256 = "ab" * 32
BODY: dict[str, Any] = {
    "model": "chroma",
    "profile": "preview",
    "loras": [{"path": "j/l.safetensors", "network_multiplier": 0.8, "expected_sha256": SHA256}],
    "prompts": [{"prompt": "a", "neg": "ugly"}],
    "output": {"format": "IMAGE_FORMAT_JPEG_TRAINER", "picture_record": True},
    "trainer": {
        "quantize": True,
        "qtype": "uint4",
        "quantize_te": False,
        "dtype": "float32",
        "lokr_form": "LOKR_FORM_WEIGHT",
    },
}
TRAINER = TrainerOptions(quantize=True, qtype="uint4", quantize_te=False, dtype="float32", lokr_form="weight")


def sent(body: dict[str, Any]) -> Request:
    parsed = parse_request_json(json.dumps(body))
    assert parsed.unknown == ()
    return parsed.request


def as_asked(request: Request, context: Any) -> Iterator[JobEvent]:
    """A job whose plan is its request, and whose adapters are beside the weights."""
    story = Story()
    accepted = story.accepted(request)
    accepted.accepted.output.CopyFrom(request.output)
    if request.HasField("trainer"):
        accepted.accepted.trainer.CopyFrom(request.trainer)
    for prompt, said in zip(accepted.accepted.prompts, request.prompts, strict=True):
        prompt.neg = said.neg
    for lora, asked in zip(accepted.accepted.loras, request.loras, strict=True):
        if asked.HasField("expected_sha256"):
            lora.expected_sha256 = asked.expected_sha256
    yield accepted
    prepared = story.prepared(request)
    for adapter in prepared.prepared.adapters:
        adapter.placement = job_event_pb2.ADAPTER_PLACEMENT_BESIDE
    yield prepared
    is_jpeg = request.output.format == options_pb2.IMAGE_FORMAT_JPEG_TRAINER
    data = png(1, file_format="JPEG" if is_jpeg else "PNG")
    yield story.header(data, media_type="image/jpeg" if is_jpeg else "image/png")
    yield story.chunk(data)
    yield story.completed()


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    server.script = as_asked

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": server.target})

    return run


def test_arguments_become_the_request_and_come_back_in_the_plan(server: FakeServer, client: Client) -> None:
    server.script = as_asked
    (image,) = client.generate_images(
        Prompt("a", neg="ugly"),
        profile="preview",
        loras=Lora("j/l.safetensors", 0.8, SHA256),
        output_format="jpeg-trainer",
        picture_record=True,
        trainer=TRAINER,
    )
    assert server.requests == [sent(BODY)]
    plan = image.plan
    assert (plan.output_format, plan.output_quality, plan.picture_record) == ("jpeg-trainer", None, True)
    assert (plan.trainer, plan.prompts[0].neg, plan.loras[0].expected_sha256) == (TRAINER, "ugly", SHA256)
    assert image.prepared is not None
    assert image.prepared.adapters[0].placement is AdapterPlacement.BESIDE


def test_the_record_repeats_all_of_it(server: FakeServer, client: Client) -> None:
    server.script = as_asked
    (image,) = client.generate_images(
        "a", neg="ugly", loras=Lora("l", 0.8, SHA256), output_format="png", trainer=TRAINER
    )
    request: Any = image.record()["request"]
    assert request["trainer"] == BODY["trainer"]
    assert (request["prompts"][0]["neg"], request["loras"][0]["expected_sha256"]) == ("ugly", SHA256)
    assert "picture_record" not in request["output"]
    assert sent(request).trainer == sent(BODY).trainer
    assert b"Negative prompt: ugly" in image.file_bytes()


@pytest.mark.parametrize(
    ("image_format", "said", "wanted"),
    [
        ("jpeg-trainer", None, {"format": "IMAGE_FORMAT_JPEG_TRAINER"}),
        ("jpeg-trainer", True, {"format": "IMAGE_FORMAT_JPEG_TRAINER", "picture_record": True}),
        ("png", None, {"format": "IMAGE_FORMAT_PNG"}),
        ("png", True, {"format": "IMAGE_FORMAT_PNG"}),
        ("png", False, {"format": "IMAGE_FORMAT_PNG", "picture_record": False}),
    ],
)
def test_the_record_says_whether_there_is_one_where_that_is_not_the_default(
    server: FakeServer, client: Client, image_format: Any, said: bool | None, wanted: dict[str, object]
) -> None:
    server.script = as_asked  # which, like an older server, does not say where it was not told
    (image,) = client.generate_images("a", output_format=image_format, picture_record=said)
    request: Any = image.record()["request"]
    assert request["output"] == wanted


def test_what_was_asked_for_without_a_record_is_saved_without_one(server: FakeServer, client: Client) -> None:
    server.script = as_asked
    (image,) = client.generate_images("a", picture_record=False)
    assert image.file_bytes() == image.data


def test_nothing_that_was_not_said_is_sent() -> None:
    bare = build_request("a")
    assert build_request("a", trainer=None, picture_record=None, loras=()) == bare
    assert build_request("a", trainer=TrainerOptions()).HasField("trainer")
    assert not build_request("a", loras=Lora("l")).loras[0].HasField("expected_sha256")
    assert build_request("a", picture_record=False).output.HasField("picture_record")


@pytest.mark.parametrize(
    ("trainer", "path"),
    [
        (TrainerOptions(lokr_form="old"), "trainer.lokr_form"),  # type: ignore[arg-type]
        (TrainerOptions(qtype=8), "trainer.qtype"),  # type: ignore[arg-type]
    ],
)
def test_what_no_request_can_hold_names_its_field(trainer: TrainerOptions, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_request("a", trainer=trainer)
    assert [violation.field for violation in caught.value.violations] == [path]


def test_options_of_the_shell_become_the_request(server: FakeServer, shell: Any) -> None:
    result = shell(
        "generate", "a", "--profile", "preview", "--neg", "ugly", "--lora", f"j/l.safetensors:0.8#sha256={SHA256}",
        "--format", "jpeg-trainer", "--picture-record", "--trainer-quantize", "--trainer-qtype", "uint4",
        "--no-trainer-quantize-te", "--trainer-dtype", "float32", "--lokr-form", "weight",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "out.jpg\n"), result.stderr
    assert server.requests == [sent(BODY)]
    with Image.open("out.jpg") as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ((), None),
        (("--no-trainer-quantize",), {"quantize": False}),
        (("--trainer-quantize-te",), {"quantize_te": True}),
        (("--lokr-form", "factorized"), {"lokr_form": "LOKR_FORM_FACTORIZED"}),
    ],
)
def test_the_shell_says_no_more_of_the_trainer_than_it_was_told(
    server: FakeServer, shell: Any, options: tuple[str, ...], trainer: dict[str, Any] | None
) -> None:
    assert shell("generate", "a", "-o", "a.jpg", "--format", "jpeg-trainer", *options).exit_code == 0
    said = {"model": "chroma", "prompts": [{"prompt": "a"}], "output": {"format": "IMAGE_FORMAT_JPEG_TRAINER"}}
    assert server.requests == [sent(said if trainer is None else {**said, "trainer": trainer})]


def test_the_trainers_jpeg_is_no_png_and_a_body_is_sent_without_other_options(shell: Any) -> None:
    result = shell("generate", "a", "-o", "a.png", "--format", "jpeg-trainer")
    assert result.exit_code == 2
    assert "the name says png and the request says jpeg-trainer" in result.stderr
    result = shell("generate", "--json", "a.json", "--trainer-qtype", "qint8", "--no-picture-record")
    assert result.exit_code == 2
    assert "leave out --picture-record, --trainer-… and --lokr-form" in result.stderr


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        (f"a.safetensors#sha256={SHA256}", Lora("a.safetensors", None, SHA256)),
        (f"a.safetensors:-0.5#sha256={SHA256}", Lora("a.safetensors", -0.5, SHA256)),
        (f"sha256:{SHA256}:0.5#sha256={SHA256}", Lora(f"sha256:{SHA256}", 0.5, SHA256)),
        ("https://example.org/a.safetensors#sha256=", Lora("https://example.org/a.safetensors", None, "")),
        ("a#b.safetensors:1", Lora("a#b.safetensors", 1.0)),
        ("a#sha256=b.safetensors", Lora("a#sha256=b.safetensors")),
    ],
)
def test_a_lora_of_the_shell_may_say_what_it_must_be(text: str, lora: Lora) -> None:
    assert parse_lora(text) == lora


def test_models_tell_what_differs_in_the_trainers_profiles() -> None:
    profiles = [
        model_service_pb2.ModelProfile(id="reference", resolution_divisor=32),
        model_service_pb2.ModelProfile(
            id="preview", resolution_divisor=16, honours_neg=True, takes_trainer_options=True
        ),
    ]
    lines = list(_model_lines(model_service_pb2.Model(id="chroma", weights_present=True, profiles=profiles)))
    assert lines == ["ready", "in preview: sizes are floored to 16, negative text is honoured"]
