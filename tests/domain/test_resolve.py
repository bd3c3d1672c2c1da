"""Defaults, triggers, sizes, seeds: what a request becomes, without torch or grpc."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chromarpc_server.domain.errors import ChromaError, InvalidParameter, ModelNotFound
from chromarpc_server.domain.limits import Limits
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.requests import (
    GenerationRequest,
    LoraRequest,
    PreviewRequest,
    PromptRequest,
)
from chromarpc_server.domain.resolve import Serving, resolve


def _plan(*prompts: PromptRequest, serving: Serving | None = None, **request: object) -> Plan:
    whole = GenerationRequest(model="chroma", prompts=prompts or (PromptRequest("a"),), **request)  # type: ignore[arg-type]
    return resolve(whole, serving or Serving(), draw_seed=lambda: 123)


def _codes(plan: Plan) -> list[str]:
    return [warning.code for warning in plan.warnings]


def test_what_is_left_out_is_filled_in() -> None:
    (prompt,) = _plan().prompts
    assert (prompt.width, prompt.height, prompt.sample_steps, prompt.guidance_scale) == (1024, 1024, 25, 4.0)
    assert prompt.seed == 42


def test_seeds_count_up_unless_given_and_minus_one_draws() -> None:
    plan = _plan(PromptRequest("a"), PromptRequest("b", seed=0), PromptRequest("c", seed=-1), PromptRequest("d"))
    assert [prompt.seed for prompt in plan.prompts] == [42, 0, 123, 45]


def test_a_prompts_own_trigger_word_wins_and_an_empty_one_counts_as_none() -> None:
    plan = _plan(
        PromptRequest("[trigger] x [trigger]"),
        PromptRequest("[trigger]", trigger_word="own"),
        PromptRequest("[trigger]", trigger_word=""),
        trigger_word="sks",
    )
    assert [prompt.prompt for prompt in plan.prompts] == ["sks x sks", "own", "sks"]
    assert _codes(plan) == []


def test_a_trigger_without_a_word_stays_and_is_told() -> None:
    plan = _plan(PromptRequest("[trigger] x"))
    assert plan.prompts[0].prompt == "[trigger] x"
    assert _codes(plan) == ["TRIGGER_NOT_REPLACED"]


def test_an_alias_keeps_the_requested_models_defaults_and_says_who_serves() -> None:
    plan = _plan(serving=Serving(aliases={"chroma": "chroma-mini"}))
    assert (plan.model, plan.served_model, plan.prompts[0].width) == ("chroma", "chroma-mini", 1024)
    assert _codes(plan) == ["MODEL_ALIASED"]


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(InvalidParameter) as caught:
        _plan(
            PromptRequest("a", width=1, guidance_scale=math.nan, seed=-2),
            PromptRequest(None),
            loras=(LoraRequest(None),),
            kv_cache=True,
        )
    assert {violation.field for violation in caught.value.violations} == {
        "kv_cache", "loras.0.path", "prompts.0.width", "prompts.0.guidance_scale", "prompts.0.seed",
        "prompts.1.prompt",
    }  # fmt: skip


@pytest.mark.parametrize("model", [None, "none"])
def test_a_model_that_is_missing_or_unknown_hides_no_other_fault(model: str | None) -> None:
    request = GenerationRequest(
        model=model, prompts=(PromptRequest("a", width=1), PromptRequest(None)), kv_cache=True
    )
    with pytest.raises(ChromaError) as caught:
        resolve(request, Serving())
    told = {violation.field for violation in caught.value.violations}
    assert told == {"model", "kv_cache", "prompts.0.width", "prompts.1.prompt"}
    assert isinstance(caught.value, InvalidParameter)


def test_sizes_that_only_a_model_would_fill_in_are_not_blamed_without_one() -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve(GenerationRequest(prompts=(PromptRequest("a"),) * 5), Serving(limits=Limits(max_pixels=2**20)))
    assert [violation.field for violation in caught.value.violations] == ["model"]


EMPTY_PROMPT = dict.fromkeys(
    (
        "prompt",
        "trigger_word",
        "neg",
        "sampler",
        "resolution",
        "ctrl_img",
        "ctrl_img_1",
        "ctrl_img_2",
        "ctrl_img_3",
    ),
    "",
)


@pytest.mark.parametrize("name", EMPTY_PROMPT)
def test_an_empty_text_means_nothing(name: str) -> None:
    try:
        plan = _plan(PromptRequest(**{"prompt": "a", name: ""}))
    except InvalidParameter as error:
        pytest.fail(f"refused: {error}")
    assert _codes(plan) == []


def test_every_empty_text_together_means_nothing() -> None:
    try:
        plan = _plan(
            PromptRequest(**EMPTY_PROMPT),
            loras=(LoraRequest("a.safetensors", transformer=""),),
            hf_token="",
            trigger_word="",
            profile="",
            request_id="",
        )
    except InvalidParameter as error:
        pytest.fail(f"refused: {error}")
    assert plan.profile == "reference"
    assert plan.request_id is None
    assert _codes(plan) == []


def test_options_that_have_no_effect_are_told() -> None:
    plan = _plan(
        PromptRequest("a", neg="ugly", fps=24, sample_steps=2),
        hf_token="secret",
        preview=PreviewRequest(every_n_steps=5),
        unknown_fields=("field 99",),
    )
    assert set(_codes(plan)) == {
        "NEG_IGNORED", "FPS_IGNORED", "HF_TOKEN_UNUSED", "PREVIEW_NEVER", "UNKNOWN_FIELD",
    }  # fmt: skip
    assert "secret" not in repr(plan)


def test_an_unknown_model_names_those_that_are() -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(GenerationRequest(model="x", prompts=(PromptRequest("a"),)), Serving())
    assert caught.value.metadata["models"] == "chroma,chroma-mini,chroma1-flash,chroma1-hd"


@given(width=st.integers(64, 4096), height=st.integers(64, 4096))
def test_sizes_floor_to_the_divisor_and_never_silently(width: int, height: int) -> None:
    plan = _plan(PromptRequest("a", width=width, height=height, sample_steps=1))
    prompt = plan.prompts[0]
    assert (prompt.width, prompt.height) == (width // 32 * 32, height // 32 * 32)
    assert len(plan.warnings) == (width % 32 > 0) + (height % 32 > 0)


@pytest.mark.slow
@given(words=st.text(max_size=50), count=st.integers(0, 40))
def test_a_replaced_prompt_never_exceeds_its_limit(words: str, count: int) -> None:
    limits = Limits(max_prompt_bytes=500)
    try:
        plan = _plan(PromptRequest("[trigger]" * count), trigger_word=words, serving=Serving(limits=limits))
    except InvalidParameter:
        assert count * max(len(words.encode()), 0 if words else 9) > 500
    else:
        assert len(plan.prompts[0].prompt.encode()) <= 500
