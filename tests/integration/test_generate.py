"""A request in, events and a true picture out, through the real client and a real server."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
import torch
from PIL import Image

import chromarpc
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 3,
    "guidance_scale": 2.0,
}


def _events(server: RunningServer, **arguments: Any) -> list[Any]:
    with chromarpc.Client(server.target) as client:
        return list(client.generate(arguments.pop("prompts", "a red circle"), **{**SMALL, **arguments}))


def _of(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if type(event).__name__ == kind]


def test_a_generation_streams_every_step_and_ends_with_its_image(server: RunningServer) -> None:
    events = _events(server, preview_every=1)
    names = [type(event).__name__ for event in events]
    assert names[0] == "Accepted"
    assert names[-1] == "Completed"
    steps = _of(events, "Step")
    assert [step.step for step in steps] == [1, 2, 3]
    assert len(steps[0].sigmas) == 4
    assert steps[0].sigma == 1.0
    assert len(_of(events, "Preview")) == 2
    sequences = [event.sequence for event in events]
    assert sequences == sorted(sequences)


def test_the_image_is_whole_and_what_its_header_says(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images("a red circle", **SMALL)
    assert hashlib.sha256(image.data).hexdigest() == image.sha256
    assert Image.open(io.BytesIO(image.data)).size == (64, 64)


def test_the_same_request_gives_the_same_bytes_and_another_seed_others(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        first, again, other = (client.generate_images("a", seed=seed, **SMALL)[0].sha256 for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_several_prompts_give_an_image_each_with_seeds_counted_up(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        images = client.generate_images(["a", "b", "c"], **SMALL)
    assert [image.seed for image in images] == [42, 43, 44]


@pytest.mark.parametrize("profile", ["reference", "exact"])
def test_both_profiles_are_served(server: RunningServer, profile: str) -> None:
    assert _of(_events(server, profile=profile), "Accepted")[0].profile == profile


def test_nothing_is_silent(server: RunningServer) -> None:
    events = _events(server, neg="ugly", width=95, trigger_word="sks")
    codes = {warning.code for warning in _of(events, "Accepted")[0].warnings}
    assert codes == {"NEG_IGNORED", "SIZE_SNAPPED", "TRIGGER_WORD_UNUSED"}


def test_a_prompt_that_is_too_long_is_served_and_the_cut_told(server: RunningServer) -> None:
    (prepared,) = _of(_events(server, prompts="a" * 600), "Prepared")
    assert prepared.token_counts[0].used == 512
    assert prepared.token_counts[0].cut > 0
    assert [warning.code for warning in prepared.warnings] == ["PROMPT_TRUNCATED"]


def test_the_noise_draw_decides_the_picture_on_a_cpu_too(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        today, legacy = (
            client.generate_images("a", noise_draw=draw, **SMALL)[0].sha256 for draw in ("float32", "legacy")
        )
    assert today != legacy


def test_the_timestep_is_the_one_the_transformer_sees(server: RunningServer) -> None:
    second = _of(_events(server, sample_steps=4), "Step")[1]
    assert second.timestep != round(1000 * second.sigma, 6)
    assert second.timestep == float(torch.tensor(1000 * second.sigma).bfloat16())


def test_models_and_server_info(server: RunningServer) -> None:
    with chromarpc.Client(server.target) as client:
        models = {model.id: model for model in client.list_models()}
        info = client.server_info()
        assert client.health()
    assert models["chroma-mini"].weights_present
    assert models["chroma-mini"].resident
    assert not models["chroma"].weights_present
    assert models["chroma"].fetch_command == "chromarpc-server fetch chroma"
    assert {profile.id for profile in info.profiles} == {"reference", "exact", "fp8", "preview", "preview-exact"}
    assert info.device.id == "cpu"
