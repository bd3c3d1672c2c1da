"""A transformer in any format draws, and its adapters are switched bit for bit as a cold build has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Adapter,
    Checkpoint,
    CheckpointFiles,
    Transformer,
    WeightFiles,
    read_adapter,
)
from chromarpc_server.pipeline.merged_transformer import PreparedTransformer
from chromarpc_server.pipeline.opening import OpenCheckpoint
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.weights.gguf_file import open_gguf
from chromarpc_server.pipeline.weights.quantization import dequantize_rows, quantize_rows
from tests.pipeline.formats import writers
from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIDE = 32
ASSETS = Path(writers.__file__).parents[3] / "server" / "chromarpc_server" / "assets"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def native(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint / "chroma-mini.safetensors")


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> str:
    with safe_open(tiny_checkpoint / "chroma-mini.safetensors", "pt") as file:
        return str(file.metadata()["config"])


def _load(folder: Path, transformer: Path) -> Checkpoint:
    files = CheckpointFiles(transformer, folder / "text_encoder_2", folder / "tokenizer_2", folder / "vae")
    return Checkpoint.load(files, device=CPU, dtype=torch.float32)


def _adapters(checkpoint: Checkpoint) -> list[Adapter]:
    names = ("aitk", "kohya_dora")
    return [read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", checkpoint.targets) for name in names]


def _held(transformer: Transformer) -> dict[str, Tensor]:
    """Every tensor that a forward reads."""
    assert isinstance(transformer, PreparedTransformer)
    parameters = dict(transformer.model.named_parameters())
    scales = {f"{name} scale": scale for name, scale in transformer.model.named_buffers()}
    return {name: tensor.detach().clone() for name, tensor in (parameters | scales).items()}


def _latents(checkpoint: Checkpoint, transformer: Transformer, guidance: float = 3.0) -> Tensor:
    pipeline = checkpoint.pipeline(transformer)
    embedding = pipeline.encode(pipeline.tokenize("a red square"))
    *_, last = pipeline.denoise(
        embedding, width=SIDE, height=SIDE, steps=2, guidance_scale=guidance, seed=3, noise_draw="float32"
    )
    return last.latents


def _rel(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", writers.FORMATS)
def test_every_format_draws_and_switches_adapters_as_a_cold_build(
    name: str, native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stored_as, write = writers.FORMATS[name]
    checkpoint = _load(tiny_checkpoint, write(native, config, tmp_path / "model"))
    base = _load(tiny_checkpoint, tiny_checkpoint / "chroma-mini.safetensors")
    assert checkpoint.stored_as == stored_as
    assert checkpoint.stored_dtype == torch.bfloat16
    assert checkpoint.targets == base.targets
    one, other = _adapters(checkpoint)
    profile = PROFILES["reference"]
    switched, cold = checkpoint.allocate(profile), checkpoint.allocate(profile)
    switched.switch([(one, 0.8)])
    switched.switch([(other, 1.0), (one, -0.5)])
    switched.switch([(other, 1.0)])
    cold.switch([(other, 1.0)])
    found, expected = _held(switched), _held(cold)
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
    drawn = _latents(checkpoint, switched)
    assert torch.equal(drawn, _latents(checkpoint, cold))
    reference = base.allocate(profile)
    reference.switch([(other, 1.0)])
    distance = _rel(drawn, _latents(base, reference))
    # What is bf16 in the file is the same picture; codes are as far as their rounding.
    assert distance == 0 if stored_as == "bf16" else 0 < distance < 0.35


@pytest.mark.parametrize("profile", [name for name, profile in PROFILES.items() if profile.trainer])
@pytest.mark.parametrize("name", ["fp8 scaled, new", "GGUF Q8_0"])
def test_the_trainers_profiles_draw_from_codes_as_from_what_they_stand_for(
    profile: str, name: str, native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The trainer loads a base in bf16; from codes that is their value, rounded."""
    _, write = writers.FORMATS[name]
    checkpoint = _load(tiny_checkpoint, write(native, config, tmp_path / "model"))
    dense = {name: stored.dense().bfloat16() for name, stored in checkpoint.master.items()}
    save_file(dense, tmp_path / "dense.safetensors", {"config": config})
    plain = _load(tiny_checkpoint, tmp_path / "dense.safetensors")
    drawn = []
    for each in (checkpoint, plain):
        transformer = each.allocate(PROFILES[profile], TrainerSettings())
        transformer.switch([(_adapters(each)[0], 0.9)])
        drawn.append(_latents(each, transformer))
    assert torch.equal(*drawn)


def test_adapters_merge_before_anything_is_rounded(
    native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = _load(tiny_checkpoint, writers.scaled_float8(native, config, tmp_path / "model"))
    adapter = _adapters(checkpoint)[0]
    name = next(target for target in adapter.targets if "_blocks." in target and target.endswith(".weight"))
    stored = checkpoint.master[name]
    codes, scale = stored.pieces
    dense = codes.float() * scale
    transformer = checkpoint.allocate(PROFILES["reference"])
    transformer.switch([(adapter, 0.7)])
    merged = adapter.apply(name, dense, 0.7)
    expected = dequantize_rows(*quantize_rows(merged.bfloat16())).float()
    assert torch.equal(_held(transformer)[name].float(), expected)
    early = dequantize_rows(*quantize_rows(adapter.apply(name, dense.bfloat16(), 0.7))).float()
    assert not torch.equal(early, expected)


def test_without_rounding_of_ours_weights_are_what_the_codes_stand_for(
    native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = _load(tiny_checkpoint, writers.as_gguf(native, config, tmp_path / "model"))
    placement = DevicePlacement(CPU, torch.float32)
    prepared = PreparedTransformer(
        checkpoint.config, checkpoint.master, PROFILES["reference"], placement, quantize=False
    )
    prepared.switch([])
    for name, held in _held(prepared).items():
        assert torch.equal(held, checkpoint.master[name].dense().float())


def test_a_file_of_float32_blocks_counts_as_float32(
    native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    kept = {name: tensor.float() for name, tensor in native.items()}
    kept["img_in.weight"] = kept["img_in.weight"].half()
    save_file(kept, tmp_path / "model", {"config": config})
    checkpoint = _load(tiny_checkpoint, tmp_path / "model")
    assert checkpoint.stored_dtype == torch.float32
    assert checkpoint.pipeline(checkpoint.allocate(PROFILES["reference"])).stored_dtype == torch.float32


@pytest.mark.parametrize("format", ["scaled", "GGUF"])
def test_codes_of_no_finite_value_are_refused_by_the_tensors_name(
    format: str,  # noqa: A002 - what it is
    native: dict[str, Tensor],
    config: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model"
    name = "single_blocks.0.linear2.weight"
    if format == "scaled":
        tensors = load_file(writers.scaled_float8(native, config, path, layout="old"))
        tensors["single_blocks.0.linear2.scale_weight"] = torch.tensor(float("nan"))
        save_file(tensors, path, {"config": config})
    else:
        file = open_gguf(writers.as_gguf(native, config, path))
        with path.open("r+b") as stream:
            stream.seek(file.require_unchanged(stream.fileno()) + file.tensors[name].begin)
            stream.write(b"\xff\x7f")  # the first block's scale
    checkpoint = _load(tiny_checkpoint, path)
    transformer = checkpoint.allocate(PROFILES["reference"])
    with pytest.raises(WeightsInvalid, match=name):
        transformer.switch([])
    with pytest.raises(WeightsInvalid, match=name):
        transformer.switch([])


@cache
def _mini() -> tuple[dict[str, Tensor], str]:
    path = ASSETS / "chroma_mini" / "chroma-mini.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), str(file.metadata()["config"])


@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q6_K], ids=lambda kind: kind.name
)
def test_chroma_mini_as_gguf_draws_nearly_the_same_picture(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    weights, config = _mini()
    folder = ASSETS / "chroma_mini"
    drawn = []
    for path in (writers.as_gguf(weights, config, tmp_path / "model", kind), folder / "chroma-mini.safetensors"):
        checkpoint = _load(folder, path)
        transformer = checkpoint.allocate(PROFILES["reference"])
        adapter = read_adapter(ASSETS / "loras" / "blue_frame.safetensors", checkpoint.targets)
        transformer.switch([(adapter, 1.0)])
        drawn.append(_latents(checkpoint, transformer))
    assert checkpoint.stored_as == "bf16"
    assert 0 < _rel(*drawn) < 0.1


def test_the_master_is_as_small_as_the_file(
    native: dict[str, Tensor], config: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What the memory plan counts, and what is held."""
    path = writers.as_gguf(native, config, tmp_path / "model")
    files = CheckpointFiles(
        path, tiny_checkpoint / "text_encoder_2", tiny_checkpoint / "tokenizer_2", tiny_checkpoint / "vae"
    )
    sizes = OpenCheckpoint.open(files, WeightFiles()).sizes(torch.bfloat16)
    held = sum(stored.nbytes for stored in _load(tiny_checkpoint, path).master.values())
    assert sizes.master == held < path.stat().st_size
    assert held < 0.8 * sizes.dequantized
    assert sizes.dequantized == sum(2 * tensor.numel() for tensor in native.values())
