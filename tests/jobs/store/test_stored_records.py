"""Plans and events as they are stored: those of older versions are read, those of now come back as they were."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chromarpc.json_request import parse_request_json
from chromarpc_server.domain.events import Accepted, AdapterPlacement, Prepared, Restarted
from chromarpc_server.domain.plan import Plan
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.trainer import PREVIEW_PROFILES
from chromarpc_server.jobs.log import LoggedEvent
from chromarpc_server.jobs.store import records
from chromarpc_server.transport.messages.fingerprints import fingerprint
from chromarpc_server.transport.messages.requests import generation_request

BEFORE = json.loads((Path(__file__).parent / "stored_before_preview_profiles.json").read_text("utf-8"))
"""A request, its fingerprint, its plan and its events, as a version without the trainer's profiles stored them."""
SECRET = "a prompt that nobody may store"


def test_a_plan_stored_before_is_read_and_draws_the_same_picture() -> None:
    stored = records.read_plan(json.dumps(BEFORE["plan"]))
    now = resolve(generation_request(parse_request_json(json.dumps(BEFORE["request"])).request), Serving())
    assert (stored.prompts, stored.loras, stored.preview) == (now.prompts, now.loras, now.preview)
    assert (stored.profile, stored.noise_draw, stored.trainer) == (now.profile, now.noise_draw, None)
    assert (stored.output.format, stored.output.quality) == (now.output.format, now.output.quality)
    assert not stored.output.picture_record, "its picture carried none"
    assert {warning.code for warning in stored.warnings} == {warning.code for warning in now.warnings}


def test_events_stored_before_are_read() -> None:
    plan = records.read_plan(json.dumps(BEFORE["plan"]))
    packed = zlib.compress(json.dumps(BEFORE["events"]).encode())
    _, prepared = records.unpack_events(packed, Accepted("job", plan))
    assert isinstance(prepared.event, Prepared)
    assert [adapter.placement for adapter in prepared.event.adapters] == [AdapterPlacement.MERGED] * 2
    assert (prepared.event.device_id, prepared.event.second_device) == ("", "")


def test_a_restart_stored_before_moved_from_nowhere() -> None:
    plan = records.read_plan(json.dumps(BEFORE["plan"]))
    packed = zlib.compress(json.dumps([[2, 0, "Restarted", {"attempt": 2}]]).encode())
    (restarted,) = records.unpack_events(packed, Accepted("job", plan))
    assert restarted.event == Restarted(2, moved_from="", bits_may_differ=False)


@pytest.mark.parametrize("field", ["device_id", "second_device", "stored_as"])
def test_the_devices_that_drew_come_back(field: str) -> None:
    plan = records.read_plan(json.dumps(BEFORE["plan"]))
    packed = zlib.compress(json.dumps(BEFORE["events"]).encode())
    _, before = records.unpack_events(packed, Accepted("job", plan))
    assert isinstance(before.event, Prepared)
    event = replace(before.event, **{field: "cuda:1"})
    assert _stored_and_read(event) == event


def test_the_device_that_a_job_moved_from_comes_back() -> None:
    event = Restarted(2, moved_from="cuda:0", bits_may_differ=True)
    assert _stored_and_read(event) == event


def test_a_request_without_the_new_fields_is_known_by_its_old_fingerprint() -> None:
    message = parse_request_json(json.dumps(BEFORE["request"])).request
    assert fingerprint(message).matches(BEFORE["fingerprint"])
    told_apart = {fingerprint(message).current}
    message.loras[0].expected_sha256 = "ab" * 32
    told_apart.add(fingerprint(message).current)
    message.output.picture_record = False
    told_apart.add(fingerprint(message).current)
    message.trainer.quantize = True
    told_apart.add(fingerprint(message).current)
    assert not fingerprint(message).matches(BEFORE["fingerprint"])
    assert len(told_apart) == 4


def test_a_plan_of_the_trainers_profiles_comes_back_as_it_was() -> None:
    plan = _trainers_plan()
    assert plan.trainer is not None
    assert records.read_plan(records.plan_json(plan, with_prompts=True)) == plan


def test_a_plan_stored_before_samplers_could_be_chosen_draws_as_it_did() -> None:
    plan = records.read_plan(json.dumps(BEFORE["plan"]))
    assert {(prompt.sampler, prompt.schedule, prompt.shift) for prompt in plan.prompts} == {
        ("flowmatch", "flowmatch", None)
    }
    assert plan.settings is DrawingSettings.REFERENCE


def test_sampler_schedule_shift_and_settings_come_back_as_they_were() -> None:
    body = {
        "model": "chroma",
        "prompts": [{"prompt": "a", "sampler": "heun", "schedule": "beta", "shift": 1.5}],
        "settings": "comfyui",
    }
    plan = resolve(generation_request(parse_request_json(json.dumps(body)).request), Serving())
    assert (plan.prompts[0].shift, plan.settings) == (1.5, DrawingSettings.COMFYUI)
    assert records.read_plan(records.plan_json(plan, with_prompts=True)) == plan


def test_negative_text_is_a_prompt_too_where_none_may_be_stored() -> None:
    plan = _trainers_plan()
    assert records.plan_json(plan, with_prompts=True).count(SECRET) == 2
    assert SECRET not in records.plan_json(plan, with_prompts=False)


def _stored_and_read(event: Prepared | Restarted) -> object:
    plan = records.read_plan(json.dumps(BEFORE["plan"]))
    entry = LoggedEvent(3, datetime(2026, 5, 4, tzinfo=UTC), event)
    (stored,) = records.unpack_events(records.pack_events([entry]), Accepted("job", plan))
    return stored.event


def _trainers_plan() -> Plan:
    body = {
        "model": "chroma",
        "profile": "preview",
        "loras": [{"path": "a", "expected_sha256": "ab" * 32}],
        "prompts": [{"prompt": SECRET, "neg": SECRET, "width": 80, "height": 16}],
        "output": {"format": "IMAGE_FORMAT_JPEG_TRAINER", "picture_record": True},
        "trainer": {"qtype": "qint8", "quantize_te": False, "dtype": "fp32", "lokr_form": "LOKR_FORM_WEIGHT"},
    }
    serving = Serving(profiles=("reference", *sorted(PREVIEW_PROFILES)))
    return resolve(generation_request(parse_request_json(json.dumps(body)).request), serving)
