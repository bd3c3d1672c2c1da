"""Transformers in every layout: the tensors that they stand for, their sizes, and what is said about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline import CheckpointFiles, LoadContext, WeightFiles
from chromarpc_server.pipeline.models.stored_transformer import StoredTransformer, open_transformer
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.master import read_master, tensor_hash
from chromarpc_server.pipeline.weights.part import StoredPart
from chromarpc_server.pipeline.weights.stored import rounding_dtype
from tests.pipeline.formats import writers
from tests.pipeline.formats.layouts import FORMATS, GOLDENS
from tests.pipeline.formats.writers import Weights

HASHED = GOLDENS / "formats_hashed"
HASHES: dict[str, str] = json.loads((HASHED / "sha256.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def native() -> dict[str, Tensor]:
    return load_file(FORMATS / "native_bf16.safetensors")


@pytest.fixture(scope="module")
def config() -> str:
    with safe_open(FORMATS / "native_bf16.safetensors", "pt") as file:
        return str(file.metadata()["config"])


def _open(path: Path) -> StoredTransformer:
    return open_transformer(path, WeightFiles())


def _dense(part: StoredPart) -> dict[str, Tensor]:
    stored = ReadingProgress((part,), LoadContext()).stored(part)
    return {name: tensor.dense() for name, tensor in stored.items()}


def _revision(path: Path) -> str:
    part = _open(path).part
    return read_master(ReadingProgress((part,), LoadContext()), part, WeightFiles(), CPU, None)[1]


@pytest.mark.parametrize("name", HASHES)
def test_recorded_codes_become_the_recorded_values_bit_for_bit(name: str) -> None:
    found = _dense(_open(HASHED / name).part)
    digest = hashlib.sha256()
    for parameter in sorted(found):
        tensor = found[parameter].float().contiguous()
        digest.update(f"{parameter}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == HASHES[name]


@pytest.mark.parametrize(
    ("path", "stored_as"),
    [
        (FORMATS / "native_bf16.safetensors", "bf16"),
        (FORMATS / "bf16.gguf", "bf16"),
        (FORMATS / "diffusers" / "transformer", "bf16"),
        (FORMATS / "all_in_one.safetensors", "bf16"),
        (FORMATS / "fp8_scaled_old.safetensors", "fp8 scaled"),
        (FORMATS / "fp8_scaled_metadata.safetensors", "fp8 scaled"),
        (FORMATS / "int8_convrot.safetensors", "int8"),
        (HASHED / "fp8_e4m3fn_raw.safetensors", "fp8"),
        (HASHED / "fp8_e5m2_raw.safetensors", "fp8 e5m2"),
        (HASHED / "q8_0.gguf", "GGUF Q8_0"),
        (GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors", "fp32"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else None,
)
def test_a_transformer_says_how_most_of_it_is_stored(path: Path, stored_as: str) -> None:
    transformer = _open(path)
    assert transformer.part.stored_as == stored_as
    plain = stored_as == "fp32"
    assert rounding_dtype(transformer.part.recipes) == (torch.float32 if plain else torch.bfloat16)


def test_heads_of_128_need_no_config() -> None:
    config = _open(HASHED / "k_mixed.gguf").config
    assert config.axes_dim == (16, 56, 56)
    assert config.head_dim == 128


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "by-name"])
@pytest.mark.parametrize("configured", [True, False], ids=["config.json", "config-in-header"])
def test_diffusers_folders_of_any_number_of_shards_are_the_native_weights(
    native: Weights, config: str, shards: int, indexed: bool, configured: bool, tmp_path: Path
) -> None:
    folder = writers.diffusers_folder(
        native, config, tmp_path / "transformer", shards=shards, indexed=indexed, configured=configured
    )
    transformer = _open(folder)
    assert transformer.config == _open(FORMATS / "native_bf16.safetensors").config
    found = _dense(transformer.part)
    assert found.keys() == native.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], native[name]) for name in native)


def test_a_folder_that_lacks_a_shard_or_a_part_of_a_product_is_refused(
    native: Weights, config: str, tmp_path: Path
) -> None:
    folder = writers.diffusers_folder(native, config, tmp_path / "whole", indexed=False)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsInvalid, match="00002-of-00002"):
        _open(folder)
    named = writers.diffusers_names(native)
    del named["single_transformer_blocks.1.proj_mlp.weight"]
    save_file(named, tmp_path / "lacking.safetensors", {"config": config})
    with pytest.raises(WeightsInvalid, match=r"lacking.safetensors.*single_transformer_blocks.1.proj_mlp.weight"):
        _open(tmp_path / "lacking.safetensors")


@pytest.mark.parametrize(
    "prefixes",
    [("cond_stage_model.t5xxl.transformer.", "first_stage_model."), ("text_encoders.t5xxl.transformer.", "vae.")],
)
def test_only_its_own_tensors_of_a_file_with_all_parts_are_read(
    native: Weights, config: str, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    others: dict[str, Weights] = {
        prefixes[0]: load_file(FORMATS / "t5xxl_fp16.safetensors"),
        prefixes[1]: load_file(FORMATS / "ae.safetensors"),
    }
    path = writers.all_in_one(native, config, tmp_path / "all.safetensors", others)
    part = _open(path).part
    found = _dense(part)
    assert found.keys() == native.keys()
    assert part.size_bytes == sum(tensor.nbytes for tensor in native.values())


def test_a_native_file_has_the_revision_that_it_always_had(native: Weights) -> None:
    expected = hashlib.sha256("".join(tensor_hash(name, native[name]) for name in sorted(native)).encode())
    assert _revision(FORMATS / "native_bf16.safetensors") == expected.hexdigest()


def test_what_the_header_says_of_codes_counts_for_the_revision(tmp_path: Path) -> None:
    """The same bytes, rotated in groups of another size, are another model."""
    path = FORMATS / "int8_convrot.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    revisions = set()
    for group in (16, 64):
        layers = {}
        plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
        for name, tensor in tensors.items():
            if name.endswith(".comfy_quant"):
                rotated = b"convrot" in bytes(tensor.tolist())
                layers[name.removesuffix(".comfy_quant")] = {
                    "format": "int8_tensorwise", "convrot": rotated, "convrot_groupsize": group,
                }  # fmt: skip
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
        save_file(plain, tmp_path / f"{group}.safetensors", metadata)
        revisions.add(_revision(tmp_path / f"{group}.safetensors"))
    assert len(revisions) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda t: t | {"single_blocks.99.linear1.weight": t["img_in.weight"]},
            r"single_blocks.2.*single_blocks.99",
        ),
        (
            lambda t: t | {f"single_blocks.{n}.norm.query_norm.scale": torch.ones(32) for n in range(300)},
            "300 single_blocks, more than 256",
        ),
        (lambda t: t | {"img_in.weight": torch.zeros(64, 63)}, "img_in.weight|in_channels|63"),
        (lambda t: t | {"img_in.weight": t["img_in.weight"][0]}, "dimensions"),
        (lambda t: t | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(0)}, "heads of 0"),
        (lambda t: t | {"img_in.bias": torch.zeros(64, dtype=torch.int32)}, "img_in.bias is I32"),
        (lambda t: t | {"single_blocks.0.linear2.weight": torch.zeros(64, 5)}, "linear2.weight is fp32"),
        (lambda t: t | {"single_blocks.0.linear3.weight": torch.zeros(4, 4)}, "1 unknown"),
    ],
)
def test_what_is_no_whole_chroma_is_refused_by_name(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
    native: dict[str, Tensor],
    config: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in spoil(dict(native)).items()}, path, {"config": config})
    with pytest.raises(WeightsInvalid, match=words) as caught:
        _open(path)
    assert "model.safetensors" in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"axes_dim": [1e999, 2, 2]}', '{"axes_dim": [2, 2]}', "[" * 100_000]
)
def test_a_config_that_cannot_be_is_refused(config: str, native: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(native, tmp_path / "model.safetensors", {"config": config})
    with pytest.raises(WeightsInvalid, match=r"model\.safetensors"):
        _open(tmp_path / "model.safetensors")


@pytest.mark.parametrize("found", [None, [], {}, {"a": "../b"}, {"a": ["b"]}, {"a": 1, "b": "c"}])
def test_an_index_that_names_no_shards_is_refused(found: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    with pytest.raises(WeightsInvalid, match=r"model\.safetensors\.index\.json names no shards"):
        _open(tmp_path)


def test_what_is_missing_of_parts_that_are_files_or_folders(tmp_path: Path) -> None:
    single = CheckpointFiles(*(tmp_path / name for name in ("a.gguf", "b.safetensors", "c.json", "d.safetensors")))
    assert set(single.missing()) == {single.transformer, single.text_encoder, single.tokenizer, single.vae}
    for path in single.missing():
        path.touch()
    assert single.missing() == ()
    folders = CheckpointFiles(*(tmp_path / name for name in ("t", "e", "k", "v")))
    assert {path.relative_to(tmp_path).as_posix() for path in folders.missing()} == {
        "t", "e", "v", "e/config.json", "v/config.json", "k/tokenizer.json",
    }  # fmt: skip
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "diffusion_pytorch_model.safetensors").touch()
    assert tmp_path / "t" not in folders.missing()
