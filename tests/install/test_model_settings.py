"""Models of the settings: by flag, environment and file; what is wrong names the flag and the key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chromarpc_server.__main__ import main
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.models import CHROMA, CHROMA_FLASH, REGISTRY, HubPart, LocalPart, ModelSpec
from chromarpc_server.model_settings import parse_models
from tests.install.test_settings import _from_flags


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "Chroma1-HD-Q8_0.gguf"
    path.write_bytes(b"GGUF")
    return path


def only(*flags: str) -> ModelSpec:
    (spec,) = _from_flags(*flags).configured_models().values()
    return spec


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_file_is_a_model_with_what_its_name_tells_filled_in(weights: Path) -> None:
    spec = only("--model", f"mine={weights}")
    assert (spec.id, spec.transformer, spec.base_name) == ("mine", LocalPart(weights), "lodestones/Chroma1-HD")
    assert (spec.text_encoder, spec.tokenizer, spec.autoencoder) == (None, None, None)
    assert (spec.defaults.sampler, spec.defaults.schedule, spec.defaults.shift) == ("euler", "beta", 1.0)


def test_keys_follow_the_file_and_flags_repeat(weights: Path) -> None:
    flags = ("--model", f"a={weights},steps=8,guidance=1,sampler=heun,schedule=simple,width=768,base_name=me/a")
    settings = _from_flags(*flags, "--model", "b=me/b:b.gguf,description=of b", "--preload", "a")
    a, b = settings.configured_models().values()
    assert (a.defaults.sample_steps, a.defaults.guidance_scale, a.defaults.sampler) == (8, 1.0, "heun")
    assert (a.defaults.schedule, a.defaults.shift) == ("simple", None), "a shift goes with its schedule"
    assert (a.defaults.width, a.defaults.height, a.base_name) == (768, 1024, "me/a")
    assert (b.description, b.transformer) == ("of b", HubPart("me/b", "b.gguf"))


@pytest.mark.parametrize(
    ("text", "repo", "path"),
    [
        ("lodestones/Chroma1-Flash", "lodestones/Chroma1-Flash", "Chroma1-Flash.safetensors"),
        ("me/merges:q4/fine.gguf", "me/merges", "q4/fine.gguf"),
        ("me/merges:transformer", "me/merges", "transformer"),
    ],
)
def test_a_hub_id_is_a_model_of_the_file_that_the_trainer_would_take(text: str, repo: str, path: str) -> None:
    assert only("--model", f"mine={text}").transformer == HubPart(repo, path)


def test_other_parts_are_files_folders_or_hub_ids(weights: Path, tmp_path: Path) -> None:
    spec = only(
        "--model", f"mine={weights},text_encoder={tmp_path},autoencoder=me/vae,tokenizer=me/t5:tokenizer.json"
    )
    assert (spec.text_encoder, spec.autoencoder) == (LocalPart(tmp_path), HubPart("me/vae"))
    assert spec.tokenizer == HubPart("me/t5", "tokenizer.json")


def test_the_environment_takes_what_the_flag_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMARPC_MODEL", "mine=me/mine,steps=8")
    assert only().defaults.sample_steps == 8
    assert list(_from_flags("--model", "other=me/other").configured_models()) == ["other"]


def test_the_file_takes_commas_and_equals_signs_and_a_flag_wins(tmp_path: Path) -> None:
    odd = tmp_path / "a=1, b.safetensors"
    odd.write_bytes(b"")
    config = tmp_path / "server.toml"
    config.write_text(f'[models.odd]\ntransformer = "{odd}"\ndescription = "one, two"\n[models.both]\n'
                      'transformer = "me/both"\nsteps = 4\n')  # fmt: skip
    found = configured(config)
    assert (found["odd"].transformer, found["odd"].description) == (LocalPart(odd), "one, two")
    assert found["both"].defaults.sample_steps == 4
    assert configured(config, "--model", "both=me/both,steps=9")["both"].defaults.sample_steps == 9


def configured(config: Path, *flags: str) -> dict[str, ModelSpec]:
    from chromarpc_server.__main__ import _settings
    from chromarpc_server.settings import ServerSettings

    settings = _settings(ServerSettings, ["--config", str(config), *flags])
    assert settings is not None
    return settings.configured_models()


def test_a_model_may_take_a_built_in_ones_place() -> None:
    assert only("--model", "chroma1-hd=me/my-hd").transformer != CHROMA.transformer
    assert only("--model", "x=lodestones/Chroma1-Flash").defaults == CHROMA_FLASH.defaults


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("mine", "--model: mine: write NAME=FILE_OR_REPO"),
        ("mine=me/mine,stepz=8", "--model: stepz=8: no such key: stepz; known are transformer"),
        ("mine=me/mine,steps=8,steps=9", "--model: steps=9: the key steps is given twice"),
        ("steps=8", "--model: steps=8: begin with NAME=FILE_OR_REPO"),
        ("mine=me/mine,steps=800", "--model mine: steps: "),
        ("mine=me/mine,shift=0", "--model mine: shift: "),
        (
            "mine=me/mine,schedule=kl_optimal,steps=1",
            "--model mine: steps: the schedule kl_optimal needs 2 or more, got 1",
        ),
        ("mine=me/mine,sampler=dpm_fast", "--model mine: sampler: no such name: dpm_fast; known are flowmatch"),
        ("mine=me/mine,height=1000", "--model mine: height: must be a multiple of 32, got 1000"),
        ("mine=me/mine,width=10", "--model mine: width: must be between 64 and 4096, got 10"),
        (
            "mine=/nowhere/x.safetensors",
            "--model mine: transformer: /nowhere/x.safetensors: no such file",
        ),
        ("mine=x.safetensors", "--model mine: transformer: x.safetensors: no such file"),
        ("mine=me/mine:../x", "--model mine: transformer: me/mine:../x: no such file"),
        ("mine=me/mine,text_encoder=./nowhere", "--model mine: text_encoder: ./nowhere: no such file"),
        ("My Model=me/mine", "--model: My Model: a model's name"),
    ],
)
def test_what_is_wrong_names_the_flag_and_the_key(
    flag: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in said(capsys, "--model", flag)


def test_a_wrong_key_of_the_file_names_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "server.toml"
    config.write_text('[models.mine]\ntransformer = "me/mine"\ncolour = 1\n')
    assert "[models.mine]: colour: " in said(capsys, "--config", str(config))
    config.write_text('[models.mine]\ntransformer = "/nowhere"\n')
    assert "[models.mine]: transformer: /nowhere: no such file" in said(capsys, "--config", str(config))


def test_settings_that_name_a_model_know_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    text, known = said(capsys, "--model", "mine=me/mine", "--preload", "yours"), ", ".join([*REGISTRY, "mine"])
    assert f"--preload yours: no such model: yours; known are {known}" in text
    assert "--comfyui /nowhere: not a folder" in said(capsys, "--comfyui", "/nowhere")


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ("fast", "--model mine: profile: no such profile: fast; known are reference"),
        ("fp8", "--model mine: profile: the profile fp8 needs a GPU"),
    ],
)
def test_a_models_profile_is_one_that_a_device_computes(profile: str, told: str) -> None:
    from chromarpc_server.devices import require_profiles

    settings = _from_flags("--model", f"mine=me/mine,profile={profile}")
    devices: Any = SimpleNamespace(profiles=("reference", "exact"))
    with pytest.raises(InvalidParameter, match=told):
        require_profiles(settings, settings.configured_models(), devices)


def test_several_models_in_one_text_are_told_apart_by_their_keys() -> None:
    assert parse_models("a=me/a,steps=8,b=x.gguf,base_name=z") == {
        "a": {"transformer": "me/a", "steps": "8"},
        "b": {"transformer": "x.gguf", "base_name": "z"},
    }
