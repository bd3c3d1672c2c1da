"""Which models a ComfyUI folder has, of which parts, from headers alone."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromarpc_server.domain.models import LocalPart, ModelSpec
from chromarpc_server.runtime.comfyui_folder import find_models
from chromarpc_server.runtime.model_files import ModelFiles
from tests.comfyui_folder import (
    AUTOENCODER,
    TEXT_ENCODER,
    TRANSFORMER,
    metadata_of,
    shapes_of,
    write_comfyui_folder,
    write_header,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_comfyui_folder(tmp_path / "models")


def only(folder: Path) -> ModelSpec:
    (spec,) = find_models(folder).models
    return spec


def path_of(source: object) -> Path:
    assert isinstance(source, LocalPart)
    return source.path


def test_a_chroma_is_a_model_of_its_files_name_with_what_lies_beside_it(folder: Path) -> None:
    spec = only(folder)
    assert spec.id == "my-chroma-v2"
    assert path_of(spec.transformer) == folder / "diffusion_models" / "My Chroma v2.safetensors"
    assert path_of(spec.text_encoder) == folder / "text_encoders" / "t5xxl_mini.safetensors"
    assert path_of(spec.autoencoder) == folder / "vae" / "ae.safetensors"
    files = ModelFiles().require(spec)
    assert files.tokenizer.parent.name == "chroma_mini", "the bundled one that knows as many pieces"
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".copy"))]


def test_comfyuis_own_folder_will_do(folder: Path) -> None:
    assert find_models(folder.parent).models == find_models(folder).models


def test_a_published_checkpoint_has_its_defaults_whatever_its_file_is_stored_as(folder: Path) -> None:
    (folder / "unet" / "Chroma1-HD-Flash_fp8.safetensors").symlink_to(
        shutil.copy(TRANSFORMER, folder.parent / "x")
    )
    specs = {spec.id: spec for spec in find_models(folder).models}
    flash, other = specs["chroma1-hd-flash_fp8"], specs["my-chroma-v2"]
    assert (flash.defaults.sample_steps, flash.defaults.guidance_scale, flash.defaults.sampler) == (8, 1.0, "heun")
    assert flash.base_name == "lodestones/Chroma1-Flash"
    assert (other.defaults.sample_steps, other.defaults.sampler) == (25, "flowmatch")


def test_equal_names_become_different_ids_and_one_file_is_one_model(folder: Path) -> None:
    for name in ("a/Fine.safetensors", "b/fine.safetensors", "b/FINE.sft"):
        path = folder / "diffusion_models" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(TRANSFORMER, path)
    (folder / "unet" / "again").symlink_to(folder / "diffusion_models", target_is_directory=True)
    (folder / "diffusion_models" / "loop").symlink_to(folder / "diffusion_models", target_is_directory=True)
    ids = [spec.id for spec in find_models(folder, taken=("my-chroma-v2",)).models]
    assert ids == ["diffusion_models-my-chroma-v2", "fine", "b-fine", "fine-2"]


def test_links_lead_to_folders_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2" / "chroma"
    elsewhere.mkdir(parents=True)
    shutil.copy(TRANSFORMER, elsewhere / "far.safetensors")
    (folder / "checkpoints" / "disk2").symlink_to(elsewhere, target_is_directory=True)
    (folder / "checkpoints" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert "far" in [spec.id for spec in find_models(folder).models]


def test_other_models_are_skipped_and_said_to_be_what_they_are(folder: Path) -> None:
    write_header(folder / "checkpoints" / "sdxl.safetensors", {
        "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
        "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
        "model.diffusion_model.middle_block.0.in_layers.0.weight": [1280],
    })  # fmt: skip
    (folder / "unet" / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (folder / "unet" / "notes.txt").write_text("no weights")
    found = find_models(folder)
    assert [spec.id for spec in found.models] == ["my-chroma-v2"]
    skipped = {file.path.name: file.reason for file in found.skipped}
    assert set(skipped) == {"sdxl.safetensors", "broken.gguf"}
    assert "Stable Diffusion XL" in skipped["sdxl.safetensors"]
    assert "give a Chroma" not in skipped["sdxl.safetensors"], "nobody gave it as one"


def test_of_several_text_encoders_the_largest_that_fits_is_taken(folder: Path) -> None:
    shapes = shapes_of(TEXT_ENCODER)
    write_header(folder / "clip" / "flan_t5_larger.safetensors", {**shapes, "shared.weight": [390, 128]})
    write_header(folder / "clip" / "wider.safetensors", {
        name: [side * 2 if side == 128 else side for side in shape] for name, shape in shapes.items()
    })  # fmt: skip
    assert path_of(only(folder).text_encoder).name == "t5xxl_mini.safetensors"
    write_header(folder / "clip" / "another.safetensors", shapes)
    assert path_of(only(folder).text_encoder).name == "another.safetensors", "equal ones by their paths"


def test_of_several_autoencoders_another_models_is_the_last(folder: Path) -> None:
    shutil.copy(AUTOENCODER, folder / "vae" / "a_sd3_vae.safetensors")
    assert path_of(only(folder).autoencoder).name == "ae.safetensors"


def test_what_lies_inside_the_transformers_file_is_taken_first(folder: Path) -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes_of(TRANSFORMER).items()}
    shapes |= {f"text_encoders.t5xxl.transformer.{name}": shape for name, shape in shapes_of(TEXT_ENCODER).items()}
    whole = write_header(folder / "checkpoints" / "all in one.safetensors", shapes, metadata_of(TRANSFORMER))
    spec = next(spec for spec in find_models(folder).models if spec.id == "all-in-one")
    assert (spec.text_encoder, path_of(spec.autoencoder).name) == (None, "ae.safetensors")
    files = ModelFiles().require(spec)
    assert (files.transformer, files.text_encoder) == (whole, whole)
    assert files.tokenizer.parent.name == "chroma_mini"


def test_a_file_that_was_replaced_is_looked_at_again(folder: Path) -> None:
    path = folder / "diffusion_models" / "My Chroma v2.safetensors"
    assert find_models(folder).models
    path.unlink()
    path.write_bytes(b"no weights at all, whatever it is called")
    assert not find_models(folder).models


def test_a_folder_of_many_large_files_is_gone_through_by_their_headers(folder: Path) -> None:
    shapes = {name: [side * 8 for side in shape] for name, shape in shapes_of(TEXT_ENCODER).items()}
    for number in range(100):
        write_header(folder / "checkpoints" / f"{number:03}.safetensors", shapes)
    began = time.process_time()
    found = find_models(folder)
    assert time.process_time() - began < 5
    assert (len(found.models), len(found.skipped)) == (1, 100)


def test_what_cannot_be_followed_is_told_and_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = folder / "diffusion_models"
    (models / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (models / "itself.safetensors").symlink_to(models / "itself.safetensors")
    (models / "closed").mkdir()
    scandir = os.scandir

    def denied(path: Path) -> Iterator[os.DirEntry[str]]:  # whoever runs tests may read everything
        if path.name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = find_models(folder)
    assert [spec.id for spec in found.models] == ["my-chroma-v2"]
    assert {file.path.name: file.reason for file in found.skipped} == {
        "gone.safetensors": "is a link to a file that is not there",
        "itself.safetensors": f"cannot be read: {os.strerror(errno.ELOOP)}",
        "closed": "cannot be read: Permission denied",
    }


@pytest.mark.parametrize(
    "name", [b"line\nfeed.safetensors", b"\x1b[31mred.safetensors", b"latin1-\xe4.safetensors"]
)
def test_a_name_that_no_client_can_be_told_is_skipped(folder: Path, name: bytes) -> None:
    try:
        shutil.copy(TRANSFORMER, folder / "unet" / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes no such name")
    found = find_models(folder)
    assert [spec.id for spec in found.models] == ["my-chroma-v2"]
    assert [file.reason for file in found.skipped] == ["its name has characters that no client can be told"]


def test_letters_with_accents_are_plain_letters_in_an_id(folder: Path) -> None:
    shutil.copy(TRANSFORMER, folder / "unet" / "Chröma Détail.safetensors")
    assert "chroma-detail" in [spec.id for spec in find_models(folder).models]


def test_a_folder_that_is_none_of_comfyuis_says_so(tmp_path: Path) -> None:
    found = find_models(tmp_path)
    assert [(file.path, file.reason) for file in found.skipped] == [
        (tmp_path, "has none of the folders diffusion_models, unet, checkpoints")
    ]


def test_clients_are_told_a_files_name_and_no_folder(folder: Path) -> None:
    (folder / "unet" / "private").mkdir()
    shutil.copy(TRANSFORMER, folder / "unet" / "private" / "mine.safetensors")
    specs = {spec.id: spec for spec in find_models(folder).models}
    assert specs["mine"].description == "mine.safetensors, of this server's ComfyUI folder"


@pytest.mark.parametrize("fails", ["exists", "is_dir", "is_file"])
def test_parts_that_cannot_be_looked_at_are_not_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    spec, files = only(folder), ModelFiles()
    looks = getattr(Path, fails)

    def looked(path: Path) -> bool:
        if path.is_relative_to(folder):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return bool(looks(path))

    monkeypatch.setattr(Path, fails, looked)
    assert files.find(spec) is None
    transformer, *_, tokenizer, autoencoder = files.parts(spec)
    assert not (transformer.is_present and not transformer.problem)
    assert not (autoencoder.is_present and not autoencoder.problem)
    assert tokenizer.is_present
    assert "ready" not in files.state(spec)
