"""`chromarpc-server models` and `fetch`: what there is, what is missing, and what comes from where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from chromarpc_server.__main__ import main
from chromarpc_server.model_catalogue import catalogue
from chromarpc_server.runtime import model_files
from chromarpc_server.settings import ServerSettings
from tests.comfyui_folder import TRANSFORMER, write_comfyui_folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever this machine has in its Hugging Face cache is not there."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """What was fetched: files by name, folders by pattern."""
    found: list[tuple[str, object]] = []
    monkeypatch.setattr(
        model_files.huggingface_hub, "hf_hub_download", lambda repo, path, **_: found.append((repo, path))
    )
    monkeypatch.setattr(
        model_files.huggingface_hub,
        "snapshot_download",
        lambda repo, allow_patterns, **_: found.append((repo, allow_patterns)),
    )
    return found


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], list[Any]]:
    code = run("models", "--json", *arguments)
    found = json.loads(capsys.readouterr().out)
    return code, {model["id"]: model for model in found["models"]}, found["skipped"]


def test_a_complete_folder_tells_where_each_part_lies_and_how_it_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_comfyui_folder(tmp_path / "models")
    (folder / "unet" / "other.safetensors").write_bytes(b"\0" * 64)
    code, models, skipped = listed(capsys, "--comfyui", str(folder))
    assert code == 0
    assert list(models) == ["my-chroma-v2", "chroma", "chroma1-hd", "chroma1-flash", "chroma-mini"]
    mine = models["my-chroma-v2"]
    assert mine["complete"]
    parts = {part["part"]: part for part in mine["parts"]}
    assert parts["transformer"]["path"] == str(folder / "diffusion_models" / "My Chroma v2.safetensors")
    assert [parts[name]["stored_as"] for name in ("transformer", "text_encoder", "autoencoder")] == ["bf16"] * 3
    assert parts["tokenizer"]["source"] == "bundled:chroma_mini/tokenizer_2"
    assert [file["path"] for file in skipped] == [str(folder / "unet" / "other.safetensors")]
    assert run("models", "--comfyui", str(folder)) == 0
    text = capsys.readouterr().out
    assert "my-chroma-v2  complete" in text
    assert f"autoencoder   bf16, 0.00 GB  {folder / 'vae' / 'ae.safetensors'}" in text
    assert "skipped:" in text


def test_what_is_missing_is_named_with_the_command_that_fetches_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fetched: list[tuple[str, object]]
) -> None:
    folder = write_comfyui_folder(tmp_path / "models")
    (folder / "vae" / "ae.safetensors").unlink()
    code, models, _ = listed(capsys, "--comfyui", str(folder))
    assert code == 1, "a model that ships with the package is none of the folder's"
    command = models["my-chroma-v2"]["fetch_command"]
    assert command == "chromarpc-server fetch ostris/Flex.1-alpha:vae"
    assert run(*command.split()[1:]) == 0
    assert fetched == [("ostris/Flex.1-alpha", ["vae/*"])]


def test_without_settings_the_built_in_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, models, _ = listed(capsys)
    assert (code, models["chroma-mini"]["complete"], models["chroma"]["complete"]) == (0, True, False)
    hd = models["chroma1-hd"]
    assert (hd["base_name"], hd["defaults"]["sample_steps"], hd["defaults"]["schedule"]) == (
        "lodestones/Chroma1-HD", 26, "beta",
    )  # fmt: skip
    assert [part["present"] for part in hd["parts"]] == [False] * 4


def test_a_file_of_the_folder_takes_the_place_of_a_built_in_model_and_of_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_comfyui_folder(tmp_path / "models", "Chroma1-HD.safetensors")
    _, models, _ = listed(capsys, "--comfyui", str(folder))
    assert models["chroma1-hd"]["complete"]
    assert models["chroma1-hd"]["defaults"]["sampler"] == "euler"
    _, models, _ = listed(capsys, "--comfyui", str(folder), "--model", f"chroma1-hd={TRANSFORMER}")
    assert models["chroma1-hd"]["parts"][0]["path"] == str(TRANSFORMER)
    assert models["diffusion_models-chroma1-hd"]["complete"]


def test_settings_may_name_a_model_of_the_folder(tmp_path: Path) -> None:
    folder = write_comfyui_folder(tmp_path / "models")
    named = ServerSettings(comfyui=folder, preload=["my-chroma-v2"], alias={"chroma": "my-chroma-v2"})
    assert "my-chroma-v2" in catalogue(named).models
    with pytest.raises(
        ValueError, match=r"--preload other: no such model: other; known are chroma, .*, my-chroma-v2"
    ):
        catalogue(ServerSettings(comfyui=folder, preload=["other"]))


def test_a_model_of_the_configuration_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini = TRANSFORMER.parent
    config = tmp_path / "server.toml"
    config.write_text(f'[models.mine]\ntransformer = "{TRANSFORMER}"\ntext_encoder = "{mini / "text_encoder_2"}"\n'
                      f'autoencoder = "{mini / "vae"}"\n')  # fmt: skip
    code, models, _ = listed(capsys, "--config", str(config))
    assert (code, models["mine"]["complete"]) == (0, True)
    code, models, _ = listed(capsys, "--model", f"half={TRANSFORMER}")
    assert code == 1
    encoder = next(part for part in models["half"]["parts"] if part["part"] == "text_encoder")
    assert (encoder["present"], encoder["source"]) == (False, "ostris/Flex.1-alpha:text_encoder_2")


def test_a_folder_of_a_whole_model_has_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini = TRANSFORMER.parent
    code, models, _ = listed(capsys, "--model", f"whole={mini}")
    assert code == 0
    paths = [Path(part["path"]) for part in models["whole"]["parts"]]
    assert paths == [TRANSFORMER, mini / "text_encoder_2", mini / "tokenizer_2", mini / "vae"]


def test_a_text_encoder_of_another_width_is_no_part_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], goldens: Path
) -> None:
    other = goldens / "formats" / "t5xxl_fp16.safetensors"
    code, models, _ = listed(capsys, "--model", f"odd={TRANSFORMER},text_encoder={other}")
    encoder = next(part for part in models["odd"]["parts"] if part["part"] == "text_encoder")
    assert (code, encoder["problem"]) == (1, "gives 64 channels of text, and the transformer takes 128")
    tokenizer = next(part for part in models["odd"]["parts"] if part["part"] == "tokenizer")
    assert tokenizer["problem"] == "none is known for a text encoder of 160 pieces: give one"


def test_wrong_flags_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "--comfyui", "/nowhere") == 2
    assert run("models", "--model", "mine") == 2
    assert run("models", "--colour") == 2


@pytest.mark.parametrize("model", ["chroma", "chroma1-hd", "chroma1-flash"])
def test_fetch_knows_every_built_in_model_and_they_share_their_extras(
    model: str, fetched: list[tuple[str, object]]
) -> None:
    assert run("fetch", model) == 0
    name = {"chroma": "Chroma1-Base", "chroma1-hd": "Chroma1-HD", "chroma1-flash": "Chroma1-Flash"}[model]
    extras = [("ostris/Flex.1-alpha", [f"{part}/*"]) for part in ("text_encoder_2", "tokenizer_2", "vae")]
    assert fetched == [(f"lodestones/{name}", f"{name}.safetensors"), *extras]


def test_fetch_knows_models_of_the_settings(
    fetched: list[tuple[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fetch", "mine", "--model", "mine=me/merges:mine-Q8_0.gguf,autoencoder=me/vae") == 0
    assert fetched == [
        ("me/merges", "mine-Q8_0.gguf"),
        ("ostris/Flex.1-alpha", ["text_encoder_2/*"]),
        ("me/vae", ["*.json", "*.safetensors", "*.model"]),
    ]
    assert capsys.readouterr().out == "mine is ready\n", "a server without its flag does not know it"


def test_fetch_says_what_it_knows(capsys: pytest.CaptureFixture[str], fetched: list[tuple[str, object]]) -> None:
    assert run("fetch", "nothing") == 2
    assert (
        "no such model: nothing; known are chroma, chroma1-hd, chroma1-flash; or give" in capsys.readouterr().err
    )
    assert run("fetch", "chroma-mini") == 2
    assert fetched == []


def test_a_files_name_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_comfyui_folder(tmp_path / "models")
    try:
        (folder / "unet" / "\x1b[31mred\n.safetensors").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert run("models", "--comfyui", str(folder)) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"\x1b[31mred\n.safetensors: " in text
