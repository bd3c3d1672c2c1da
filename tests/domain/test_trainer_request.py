"""What a request becomes in the profiles that draw as the trainer does, and what the others make of the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chromarpc.json_request import parse_request_json
from chromarpc.v1 import generation_service_pb2, job_event_pb2, options_pb2
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.limits import Limits
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.requests import (
    GenerationRequest,
    ImageFormat,
    LoraRequest,
    OutputRequest,
    PromptRequest,
    TrainerRequest,
)
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.domain.trainer import PREVIEW_PROFILES, TRAINER_QTYPES, LokrForm, TrainerSettings
from chromarpc_server.transport.messages.events import accepted_message
from chromarpc_server.transport.messages.requests import generation_request

OTHERS = ("reference", "exact", "fp8")
SERVING = Serving(profiles=(*OTHERS, *sorted(PREVIEW_PROFILES)))


def _plan(prompt: PromptRequest | None = None, profile: str | None = "preview", **request: Any) -> Plan:
    prompts = (prompt or PromptRequest("a"),)
    serving = request.pop("serving", SERVING)
    return resolve(GenerationRequest(model="chroma", prompts=prompts, profile=profile, **request), serving)


def _warnings(plan: Plan) -> list[tuple[str, str]]:
    return [(warning.code, warning.field) for warning in plan.warnings]


def _faults(**request: Any) -> dict[str, str]:
    with pytest.raises(InvalidParameter) as caught:
        _plan(**request)
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize("profile", sorted(PREVIEW_PROFILES))
def test_negative_text_is_taken_as_it_stands_and_no_warning_comes(profile: str) -> None:
    plan = _plan(PromptRequest("[trigger]", neg=" [trigger] ugly "), profile, trigger_word="sks")
    assert (plan.prompts[0].prompt, plan.prompts[0].neg) == ("sks", " [trigger] ugly ")
    assert _warnings(plan) == []
    assert "ugly" not in repr(plan)


@pytest.mark.parametrize("profile", OTHERS)
def test_elsewhere_negative_text_is_left_out_and_the_warning_names_the_profile(profile: str) -> None:
    plan = _plan(PromptRequest("a", neg="ugly"), profile)
    assert plan.prompts[0].neg == ""
    assert _warnings(plan) == [("NEG_IGNORED", "prompts.0.neg")]
    assert profile in plan.warnings[0].message


def test_negative_text_without_guidance_is_told_to_be_without_effect() -> None:
    assert _warnings(_plan(PromptRequest("a", neg="ugly", guidance_scale=1.0))) == [
        ("NEG_WITHOUT_GUIDANCE", "prompts.0.neg")
    ]


def test_negative_text_has_the_limit_of_prompts() -> None:
    small = Serving(profiles=SERVING.profiles, limits=Limits(max_prompt_bytes=10))
    assert _plan(PromptRequest("a", neg="é" * 5), serving=small).prompts[0].neg == "ééééé"
    assert set(_faults(prompt=PromptRequest("a", neg="é" * 6), serving=small)) == {"prompts.0.neg"}


@given(width=st.integers(1, 4096), height=st.integers(1, 4096))
def test_sizes_become_what_the_trainer_makes_of_them(width: int, height: int) -> None:
    plan = _plan(PromptRequest("a", width=width, height=height, sample_steps=1))
    wanted = [max(64, size - size % 8) // 16 * 16 for size in (width, height)]
    assert [plan.prompts[0].width, plan.prompts[0].height] == wanted
    changed = [
        f"prompts.0.{name}"
        for name, had, got in zip(("width", "height"), (width, height), wanted, strict=True)
        if had != got
    ]
    assert _warnings(plan) == [("SIZE_SNAPPED", field) for field in changed]


@pytest.mark.parametrize(
    ("profile", "asked", "drawn"),
    [("preview", 40, 64), ("preview-exact", 1000, 992), ("preview", 72, 64), ("reference", 1000, 992)],
)
def test_a_changed_size_is_told_with_both_sizes_and_the_profile(profile: str, asked: int, drawn: int) -> None:
    (warning,) = _plan(PromptRequest("a", width=asked, height=64), profile).warnings
    assert all(part in warning.message for part in (f"{asked} ", f" {drawn},", f"profile {profile}"))


@pytest.mark.parametrize(("profile", "refused"), [("preview", (0, -8, 4097)), ("reference", (63, 4097))])
def test_sizes_beyond_the_profiles_range_are_refused(profile: str, refused: tuple[int, ...]) -> None:
    for size in refused:
        assert set(_faults(prompt=PromptRequest("a", width=size), profile=profile)) == {"prompts.0.width"}


def test_what_the_config_leaves_out_is_the_trainers_default() -> None:
    assert _plan().trainer == _plan(trainer=TrainerRequest()).trainer == TrainerSettings()
    assert TrainerSettings() == TrainerSettings(True, "qfloat8", True, "bfloat16", LokrForm.FACTORIZED)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (TrainerRequest(quantize=False), TrainerSettings(quantize=False, quantize_te=False)),
        (TrainerRequest(quantize=False, quantize_te=True), TrainerSettings(quantize=False)),
        (TrainerRequest(quantize_te=False), TrainerSettings(quantize_te=False)),
        (TrainerRequest(lokr_form=LokrForm.WEIGHT), TrainerSettings(lokr_form=LokrForm.WEIGHT)),
        *((TrainerRequest(qtype=name), TrainerSettings(qtype=name)) for name in TRAINER_QTYPES),
        *((TrainerRequest(dtype=name), TrainerSettings()) for name in ("bf16", "bfloat16")),
        *((TrainerRequest(dtype=n), TrainerSettings(dtype="float32")) for n in ("float32", "fp32", "float")),
    ],
)
def test_what_the_config_says_is_in_the_plan(said: TrainerRequest, wanted: TrainerSettings) -> None:
    plan = _plan(trainer=said)
    assert plan.trainer == wanted
    assert _warnings(plan) == []


@pytest.mark.parametrize("name", ["convrot8", "convrot", "nvfp4", "orbit_w4", "uint3|some/adapter"])
def test_quantizers_that_are_known_and_not_built_are_refused_by_name(name: str) -> None:
    faults = _faults(trainer=TrainerRequest(qtype=name))
    assert set(faults) == {"trainer.qtype"}
    assert "known, and not built" in faults["trainer.qtype"]


def test_names_that_nobody_knows_are_refused_with_those_that_are() -> None:
    faults = _faults(trainer=TrainerRequest(qtype="qflaot8", dtype="bf17"))
    assert set(faults) == {"trainer.qtype", "trainer.dtype"}
    assert all("no such" in description for description in faults.values())
    assert "qfloat8_e5m2" in faults["trainer.qtype"]
    assert "not built" in _faults(trainer=TrainerRequest(dtype="fp16"))["trainer.dtype"]


def test_a_quantizer_is_told_to_be_without_effect_where_nothing_is_quantized() -> None:
    plan = _plan(trainer=TrainerRequest(quantize=False, qtype="nvfp4"))
    assert plan.trainer == TrainerSettings(quantize=False, quantize_te=False)
    assert _warnings(plan) == [("TRAINER_OPTIONS_IGNORED", "trainer.qtype")]


@pytest.mark.parametrize(("form", "told"), [(LokrForm.WEIGHT, True), (LokrForm.FACTORIZED, False), (None, False)])
def test_a_form_of_lokr_is_told_to_be_without_effect_where_adapters_are_merged(
    form: LokrForm | None, told: bool
) -> None:
    warned = _warnings(_plan(trainer=TrainerRequest(quantize=False, quantize_te=True, lokr_form=form)))
    assert warned == ([("TRAINER_OPTIONS_IGNORED", "trainer.lokr_form")] if told else [])
    assert _warnings(_plan(trainer=TrainerRequest(quantize_te=False, lokr_form=form))) == []


@pytest.mark.parametrize("profile", OTHERS)
def test_other_profiles_ignore_the_config_and_name_themselves(profile: str) -> None:
    plan = _plan(profile=profile, trainer=TrainerRequest(qtype="nvfp4"))
    assert plan.trainer is None
    assert _warnings(plan) == [("TRAINER_OPTIONS_IGNORED", "trainer")]
    assert profile in plan.warnings[0].message
    assert _plan(profile=profile).warnings == ()


def test_a_preview_profile_that_is_not_served_is_refused() -> None:
    assert set(_faults(serving=Serving(profiles=OTHERS))) == {"profile"}


def test_the_profile_that_is_taken_by_default_decides_too() -> None:
    serving = Serving(profiles=SERVING.profiles, default_profile="preview-exact")
    plan = _plan(PromptRequest("a", neg="ugly", width=80), None, serving=serving)
    assert (plan.prompts[0].neg, plan.prompts[0].width) == ("ugly", 80)
    assert plan.trainer == TrainerSettings()


@pytest.mark.parametrize(
    ("image_format", "carries"),
    [(None, True), *((one, one is not ImageFormat.JPEG_TRAINER) for one in ImageFormat)],
)
def test_pictures_carry_their_record_unless_told_otherwise(
    image_format: ImageFormat | None, carries: bool
) -> None:
    assert _plan(output=OutputRequest(image_format)).output.picture_record is carries
    for said in (True, False):
        assert _plan(output=OutputRequest(image_format, picture_record=said)).output.picture_record is said


def test_the_trainers_jpeg_has_no_quality_to_choose() -> None:
    assert _plan(output=OutputRequest(ImageFormat.JPEG_TRAINER)).output.quality == 75
    assert set(_faults(output=OutputRequest(ImageFormat.JPEG_TRAINER, 75))) == {"output.quality"}


def test_an_expected_hash_is_told_in_lower_case_and_must_be_one() -> None:
    loras = (LoraRequest("a", expected_sha256="AB" * 32), LoraRequest("b"), LoraRequest("c", expected_sha256=""))
    plan = _plan(loras=loras)
    assert [lora.expected_sha256 for lora in plan.loras] == ["ab" * 32, None, None]
    for wrong in ("ab", "g" * 64, "ab" * 32 + "\n"):
        assert set(_faults(loras=(LoraRequest("a", expected_sha256=wrong),))) == {"loras.0.expected_sha256"}


BODY = """{
  "model": "chroma", "profile": "preview-exact", "noise_draw": "NOISE_DRAW_LEGACY",
  "loras": [{"path": "a.safetensors", "network_multiplier": 0.8, "expected_sha256": "%s"}],
  "prompts": [{"prompt": "a", "width": 80, "height": 64, "neg": "ugly", "seed": 7, "sample_steps": 3,
               "guidance_scale": 3.5}],
  "output": {"format": "IMAGE_FORMAT_JPEG_TRAINER", "picture_record": true},
  "trainer": {"quantize": true, "qtype": "uint4", "quantize_te": false, "dtype": "float32",
              "lokr_form": "LOKR_FORM_WEIGHT"}
}""" % ("ab" * 32)


def test_a_body_says_all_of_it_and_what_is_told_back_repeats_it() -> None:
    message = parse_request_json(BODY).request
    plan = resolve(generation_request(message), SERVING)
    assert plan.warnings == ()
    assert plan.trainer == TrainerSettings(True, "uint4", False, "float32", LokrForm.WEIGHT)
    assert (plan.prompts[0].neg, plan.loras[0].expected_sha256) == ("ugly", "ab" * 32)
    assert (plan.output.format, plan.output.picture_record) == (ImageFormat.JPEG_TRAINER, True)
    assert plan == resolve(generation_request(_repeated(accepted_message("job", plan))), SERVING)


def test_what_is_told_of_other_profiles_has_no_field_that_only_the_trainers_have() -> None:
    told = accepted_message("job", _plan(PromptRequest("a", neg="ugly"), "reference", loras=(LoraRequest("a"),)))
    assert not told.HasField("trainer")
    assert not told.prompts[0].HasField("neg")
    assert not told.loras[0].HasField("expected_sha256")
    assert told.output.picture_record


def test_a_form_of_lokr_from_a_newer_client_is_told_to_be_unknown() -> None:
    message = parse_request_json(BODY).request
    message.trainer.lokr_form = 99  # type: ignore[assignment]
    plan = resolve(generation_request(message), SERVING)
    assert ("UNKNOWN_FIELD", "trainer.lokr_form") in _warnings(plan)
    assert plan.trainer is not None
    assert plan.trainer.lokr_form is LokrForm.FACTORIZED


def _repeated(told: job_event_pb2.Accepted) -> generation_service_pb2.GenerateRequest:
    """A request of nothing but what was told."""
    request = generation_service_pb2.GenerateRequest(
        model=told.model,
        profile=told.profile,
        noise_draw=told.noise_draw,
        trainer=told.trainer,
        output=told.output,
    )
    assert request.output.format == options_pb2.IMAGE_FORMAT_JPEG_TRAINER
    for prompt in told.prompts:
        request.prompts.add()
        for field, value in prompt.ListFields():
            setattr(request.prompts[-1], field.name, value)
    for lora in told.loras:
        request.loras.add()
        for field, value in lora.ListFields():
            setattr(request.loras[-1], field.name, value)
    return request
