"""Sampler, schedule, shift, settings and negative text: what is filled in, refused by name, and warned of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.limits import Limits
from chromarpc_server.domain.models import CHROMA, IGNORED_OPTIONS, REFUSED_OPTIONS, ModelDefaults
from chromarpc_server.domain.plan import Plan, PlannedPrompt
from chromarpc_server.domain.requests import GenerationRequest, NoiseDraw, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.domain.sampling_choices import (
    SAMPLERS,
    SCHEDULES,
    UNSUPPORTED_SAMPLERS,
    DrawingSettings,
    has_guidance,
)
from chromarpc_server.domain.sampling_options import require_known_sampling

PROFILES = ("reference", "exact", "fp8", "preview", "preview-exact")
REFERENCES = ModelDefaults()
HD = ModelDefaults(sampler="heun", schedule="beta", shift=1.0)


def _serving(defaults: ModelDefaults = REFERENCES, **changes: Any) -> Serving:
    return Serving(models={"chroma": replace(CHROMA, defaults=defaults)}, profiles=PROFILES, **changes)


def _plan(serving: Serving | None = None, *, request: dict[str, Any] | None = None, **prompt: Any) -> Plan:
    prompts = (PromptRequest("a", **prompt),)
    return resolve(GenerationRequest(model="chroma", prompts=prompts, **request or {}), serving or _serving())


def _sampling(plan: Plan) -> tuple[str, str, float | None]:
    (prompt,) = plan.prompts
    return prompt.sampler, prompt.schedule, prompt.shift


def _warned(plan: Plan) -> list[tuple[str, str]]:
    return [(warning.code, warning.field) for warning in plan.warnings]


def _refusals(*arguments: Any, **prompt: Any) -> dict[str, str]:
    with pytest.raises(InvalidParameter) as caught:
        _plan(*arguments, **prompt)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_who_names_nothing_gets_the_references_picture() -> None:
    plan = _plan()
    assert _sampling(plan) == ("flowmatch", "flowmatch", None)
    assert (plan.settings, plan.warnings) == (DrawingSettings.REFERENCE, ())


def test_what_is_left_out_is_the_models_default() -> None:
    assert _sampling(_plan(_serving(HD))) == ("heun", "beta", 1.0)
    assert _plan(_serving(replace(HD, profile="fp8"))).profile == "fp8"


def test_as_comfyui_draws_by_euler_and_simple_unless_the_model_says_otherwise() -> None:
    comfyui = {"settings": "comfyui"}
    assert _sampling(_plan(request=comfyui)) == ("euler", "simple", None)
    assert _sampling(_plan(_serving(HD), request=comfyui)) == ("heun", "beta", 1.0)
    assert _sampling(_plan(_serving(replace(HD, schedule="flowmatch")), request=comfyui)) == (
        "heun",
        "simple",
        1.0,
    )
    assert _plan(request=comfyui).settings is DrawingSettings.COMFYUI


@pytest.mark.parametrize("settings", ["reference", "comfyui"])
def test_what_the_request_names_wins(settings: str) -> None:
    named = {"sampler": "flowmatch", "schedule": "flowmatch", "shift": 3.0}
    assert _sampling(_plan(_serving(HD), request={"settings": settings}, **named)) == tuple(named.values())


@pytest.mark.parametrize("settings", ["reference", "comfyui"])
def test_a_models_shift_is_for_requests_that_name_neither_schedule_nor_shift(settings: str) -> None:
    def sampled(**asked: Any) -> tuple[str, str, float | None]:
        return _sampling(_plan(_serving(HD), request={"settings": settings}, **asked))

    assert sampled() == ("heun", "beta", 1.0)
    assert sampled(schedule="", sampler="euler") == ("euler", "beta", 1.0)
    assert sampled(shift=2.0) == ("heun", "beta", 2.0)
    for schedule in ("beta", "simple"):
        assert sampled(schedule=schedule) == ("heun", schedule, None), "the schedule's own can be asked for"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_with_every_schedule(sampler: str) -> None:
    for schedule in SCHEDULES:
        assert _sampling(_plan(sampler=sampler, schedule=schedule)) == (sampler, schedule, None)


@pytest.mark.parametrize("name", ["sampler", "schedule"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name: str) -> None:
    known = {"sampler": list(SAMPLERS), "schedule": list(SCHEDULES)}[name]
    told = _refusals(**{name: "dpm"})
    assert told == {f"prompts.0.{name}": f"no such {name}: 'dpm'; give one of {', '.join(known)}"}


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        ("euler_ancestral", "draws fresh noise at every step"),
        ("dpmpp_2m_sde_gpu", "draws fresh noise at every step"),
        ("lcm", "draws fresh noise at every step"),
        ("euler_cfg_pp", "another kind of guidance"),
        ("dpm_adaptive", "chooses its steps by itself"),
    ],
)
def test_a_sampler_that_is_not_built_is_refused_with_the_reason(sampler: str, reason: str) -> None:
    told = _refusals(sampler=sampler)["prompts.0.sampler"]
    assert told.startswith(f"{sampler} ")
    assert reason in told
    assert "euler, heun" in told


def test_no_sampler_is_both_built_and_refused() -> None:
    assert SAMPLERS.keys().isdisjoint(UNSUPPORTED_SAMPLERS)


@pytest.mark.parametrize("shift", [0.0, 1e-300, 0.009, -1.0, 100.1, math.nan, math.inf])
def test_a_shift_out_of_range_is_refused_on_its_field(shift: float) -> None:
    assert "must be between 0.01 and 100" in _refusals(shift=shift)["prompts.0.shift"]
    assert [_sampling(_plan(shift=edge))[2] for edge in (0.01, 100.0)] == [0.01, 100.0]


def test_a_shift_that_the_schedule_does_not_have_is_told_and_not_planned() -> None:
    plan = _plan(schedule="linear_quadratic", shift=3.0)
    assert (_warned(plan), _sampling(plan)[2]) == ([("SHIFT_IGNORED", "prompts.0.shift")], None)
    by_default = _plan(_serving(replace(HD, schedule="linear_quadratic")))
    assert (_warned(by_default), _sampling(by_default)[2]) == ([], None)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_a_schedule_of_other_kinds_of_models_is_drawn_and_warned_of(schedule: str) -> None:
    assert _warned(_plan(schedule=schedule)) == [("SCHEDULE_UNUSUAL", "prompts.0.schedule")]


def test_a_schedule_that_cannot_be_computed_for_one_step_says_how_many_it_needs() -> None:
    told = _refusals(schedule="kl_optimal", sample_steps=1)
    assert told == {"prompts.0.sample_steps": "the schedule kl_optimal needs 2 steps or more, got 1"}
    assert _plan(schedule="kl_optimal", sample_steps=2).prompts[0].sample_steps == 2


@pytest.mark.parametrize("profile", ["preview", "preview-exact"])
def test_the_trainers_profiles_sample_as_the_trainer_does_and_no_other_way(profile: str) -> None:
    request = {"profile": profile}
    assert _sampling(_plan(_serving(HD), request=request)) == ("flowmatch", "flowmatch", None)
    assert _sampling(_plan(request=request, sampler="flowmatch", schedule="flowmatch"))[0] == "flowmatch"
    told = _refusals(request=request, sampler="euler", schedule="beta", shift=1.0)
    assert list(told) == ["prompts.0.sampler", "prompts.0.schedule", "prompts.0.shift"]
    assert all(profile in said and "use the profile reference" in said for said in told.values())


@pytest.mark.parametrize("profile", ["exact", "preview", "preview-exact"])
def test_profiles_that_promise_anothers_operations_cannot_follow_comfyui(profile: str) -> None:
    told = _refusals(request={"profile": profile, "settings": "comfyui"})
    assert told == {
        "settings": f"the profile {profile} cannot draw as ComfyUI does: give the profile reference or fp8, or "
        "leave the settings out"
    }


def test_settings_that_nobody_knows_and_noise_that_comfyui_does_not_have_are_refused() -> None:
    assert _refusals(request={"settings": "a1111"}) == {
        "settings": "no such settings: 'a1111'; known are reference, comfyui"
    }
    legacy = {"settings": "comfyui", "noise_draw": NoiseDraw.LEGACY}
    assert list(_refusals(request=legacy)) == ["noise_draw"]
    assert _plan(request={**legacy, "settings": "reference"}).noise_draw is NoiseDraw.LEGACY


@pytest.mark.parametrize("profile", ["reference", "exact", "fp8"])
def test_negative_text_counts_once_it_is_turned_on_and_the_warning_says_how(profile: str) -> None:
    request = {"profile": profile}
    off = _plan(request=request, neg="ugly")
    assert (off.prompts[0].neg, _warned(off)) == ("", [("NEG_IGNORED", "prompts.0.neg")])
    assert "`use_neg`" in off.warnings[0].message
    on = _plan(request=request, neg=" ugly ", use_neg=True)
    assert (on.prompts[0].neg, _warned(on)) == (" ugly ", [])
    assert _warned(_plan(request=request, use_neg=True)) == []


def test_the_trainers_profiles_honour_negative_text_whatever_use_neg_says() -> None:
    for use_neg in (None, True, False):
        plan = _plan(request={"profile": "preview"}, neg="ugly", use_neg=use_neg)
        assert (plan.prompts[0].neg, _warned(plan)) == ("ugly", [])


def test_negative_text_has_the_prompts_limit() -> None:
    serving = _serving(limits=Limits(max_prompt_bytes=3))
    assert list(_refusals(serving, neg="ugly", use_neg=True)) == ["prompts.0.neg"]
    assert _plan(serving, neg="ugly").prompts[0].neg == ""


@pytest.mark.parametrize(
    ("settings", "guidance_scale", "two_passes"),
    [
        ("reference", 4.0, True),
        ("reference", 1.0, False),
        ("reference", 0.5, False),
        ("comfyui", 4.0, True),
        ("comfyui", 1.0, False),
        ("comfyui", 0.5, True),
        ("comfyui", 0.0, True),
    ],
)
def test_a_single_pass_leaves_negative_text_without_effect(
    settings: str, guidance_scale: float, two_passes: bool
) -> None:
    plan = _plan(request={"settings": settings}, neg="ugly", use_neg=True, guidance_scale=guidance_scale)
    assert _warned(plan) == ([] if two_passes else [("NEG_WITHOUT_GUIDANCE", "prompts.0.neg")])
    assert plan.has_guidance(plan.prompts[0]) is two_passes
    assert has_guidance(guidance_scale, plan.settings) is two_passes


def test_a_step_costs_what_its_calls_of_the_model_cost() -> None:
    euler, heun = (PlannedPrompt("a", 64, 32, 10, 4.0, 1, sampler=name) for name in ("euler", "heun"))
    assert (euler.pixels_per_step, euler.pixel_steps) == (64 * 32, 64 * 32 * 10)
    assert (heun.pixels_per_step, heun.pixel_steps) == (2 * 64 * 32, 2 * 64 * 32 * 10)
    serving = _serving(limits=Limits(max_pixel_steps=1024 * 1024 * 25))
    assert _plan(serving).pixel_steps == 1024 * 1024 * 25
    assert list(_refusals(serving, sampler="heun")) == ["prompts"]


def test_a_plan_of_another_version_is_refused_for_what_is_not_known_here() -> None:
    plan = _plan()
    require_known_sampling(plan)
    for name in ("sampler", "schedule"):
        other = replace(plan, prompts=(replace(plan.prompts[0], **{name: "newer"}),))
        with pytest.raises(InvalidParameter) as caught:
            require_known_sampling(other)
        assert [violation.field for violation in caught.value.violations] == [f"prompts.0.{name}"]


def test_lists_of_options_say_what_is_still_ignored_and_refused() -> None:
    assert "prompts.neg" not in IGNORED_OPTIONS
    assert "prompts.sampler" not in REFUSED_OPTIONS
