"""Samplers, schedules, settings and negative text through a real client of a real server."""

from __future__ import annotations

from typing import Any

import pytest

import chromarpc
from chromarpc import Prompt
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 4,
    "guidance_scale": 3.0,
    "seed": 7,
}
REFERENCE_EULER: dict[str, Any] = {"sampler": "euler", "schedule": "simple"}


def _events(server: RunningServer, prompt: Prompt | str = "a red circle", **arguments: Any) -> list[Any]:
    with chromarpc.Client(server.target) as client:
        return list(client.generate(prompt, **{**SMALL, **arguments}))


def _of(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if type(event).__name__ == kind]


def _hash(events: list[Any]) -> str:
    (ready,) = _of(events, "ImageReady")
    return str(ready.image.sha256)


def _codes(events: list[Any], kind: str) -> list[str]:
    (event,) = _of(events, kind)
    return [str(warning.code) for warning in event.warnings]


def test_a_sampler_with_two_calls_a_step_is_told_by_steps(server: RunningServer) -> None:
    events = _events(server, sampler="heun", schedule="beta", shift=1.0, preview_every=1)
    steps = _of(events, "Step")
    assert [(step.step, step.total_steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].sigmas == pytest.approx((1.0, 0.824, 0.501, 0.177, 0.0), rel=1e-5)
    assert steps[-1].estimated_remaining_s == 0
    assert len(_of(events, "Preview")) == 3
    assert _hash(events) == _hash(_events(server, sampler="heun", schedule="beta", shift=1.0))
    assert _hash(events) != _hash(_events(server))


def test_a_job_with_a_sampler_ends_where_it_is_cancelled(server: RunningServer) -> None:
    seen: list[int] = []

    def cancel_after_two_steps() -> None:
        for event in client.generate("a", **{**SMALL, "sample_steps": 150}, sampler="heun", schedule="beta"):
            if isinstance(event, chromarpc.Accepted):
                job_id = event.job_id
            elif isinstance(event, chromarpc.Step):
                seen.append(event.step)
                if event.step == 2:
                    client.cancel_job(job_id)

    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.Cancelled):
        cancel_after_two_steps()
    assert 2 <= len(seen) < 150


def test_a_negative_text_counts_where_it_is_asked_for(server: RunningServer) -> None:
    plain = _events(server)
    ignored = _events(server, Prompt("a red circle", neg="blue"))
    used = _events(server, Prompt("a red circle", neg="blue", use_neg=True))
    assert _hash(plain) == _hash(ignored) != _hash(used)
    assert "NEG_IGNORED" in _codes(ignored, "Accepted")
    assert _codes(used, "Accepted") == _codes(used, "Prepared") == []


def test_the_settings_comfyui_draw_another_picture_of_other_weights(server: RunningServer) -> None:
    as_reference = _events(server, **REFERENCE_EULER)
    events = _events(server, settings="comfyui")
    assert [(p.sampler, p.schedule) for p in _of(events, "Accepted")[0].prompts] == [("euler", "simple")]
    assert _hash(events) != _hash(as_reference)
    assert _codes(events, "Prepared") == []
    # Their weights are a set of its own, and both stay.
    for first, options in ((events, {"settings": "comfyui"}), (as_reference, REFERENCE_EULER)):
        again = _events(server, **options)
        assert _of(again, "Prepared")[0].weights.source == chromarpc.WeightsSource.RESIDENT
        assert _hash(again) == _hash(first)
    assert _hash(_events(server, "a (red:1.5) circle", settings="comfyui")) != _hash(events)


def test_a_schedule_with_other_steps_says_so(server: RunningServer) -> None:
    events = _events(server, sample_steps=12, sampler="euler", schedule="ddim_uniform", shift=1.0)
    assert "STEPS_DIFFER" in _codes(events, "Prepared")
    assert _of(events, "Step")[-1].total_steps == 13
    with chromarpc.Client(server.target) as client:
        job = client.get_job(events[0].job_id)
    assert (job.done_steps, job.total_steps) == (13, 13)


def test_weights_that_are_rounded_all_the_same_are_told(server: RunningServer) -> None:
    events = _events(server, settings="comfyui", profile="fp8")
    assert _codes(events, "Prepared") == ["SETTINGS_ROUNDED"]


def test_a_textual_inversion_is_refused_where_comfyui_would_read_it(server: RunningServer) -> None:
    with pytest.raises(chromarpc.InvalidRequest, match=r"prompts\.0\.prompt"):
        _events(server, "a embedding:bad", settings="comfyui")


def test_a_sampler_without_numbers_for_a_schedule_is_an_error_of_the_request(server: RunningServer) -> None:
    with pytest.raises(chromarpc.InvalidRequest, match="uni_pc cannot be computed over 50 steps") as caught:
        _events(server, sample_steps=50, sampler="uni_pc", schedule="exponential")
    assert "prompts.0.sampler" in str(caught.value.violations)
