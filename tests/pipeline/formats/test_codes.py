"""Codes and their scales: what they stand for, and what is refused rather than guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline import precision
from chromarpc_server.pipeline.libraries import gguf_functions
from chromarpc_server.pipeline.weights import gguf_codes
from chromarpc_server.pipeline.weights.formats.codes import file_recipes, hadamard, joined
from chromarpc_server.pipeline.weights.gguf_codes import dequantizer, is_dequantizable
from chromarpc_server.pipeline.weights.gguf_file import PLAIN_TYPES
from chromarpc_server.pipeline.weights.reading import open_weights
from chromarpc_server.pipeline.weights.stored import StoredWeights
from tests.pipeline.formats import writers

DEQUANTIZED = [kind for kind in GGML_QUANT_SIZES if kind not in PLAIN_TYPES and is_dequantizable(kind)]
FLOAT8 = torch.float8_e4m3fn


def _bits(generator: np.random.Generator, kind: GGMLQuantizationType, blocks: int) -> np.ndarray:
    """Random blocks; fp16 scales among them may be infinite or NaN, which both readers have to agree on."""
    return generator.integers(0, 256, (blocks, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)


def test_every_type_that_the_package_knows_is_read() -> None:
    assert {kind.name for kind in DEQUANTIZED} >= {
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
        "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
    }  # fmt: skip
    assert not is_dequantizable(GGMLQuantizationType.Q8_K)
    assert set(gguf_functions()) >= {GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K}


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_torch_and_numpy_dequantize_alike_bit_for_bit(
    kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that do not divide the tensor."""
    size, _ = GGML_QUANT_SIZES[kind]
    monkeypatch.setattr(gguf_codes, "PIECE_VALUES", 3 * size)
    raw = _bits(np.random.default_rng(kind), kind, 8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw, kind)).reshape(4, 2 * size)
        found = dequantizer(kind, (4, 2 * size))([torch.from_numpy(raw).reshape(4, -1)])
    assert found.dtype == torch.float32
    assert torch.equal(found.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_blocks_that_tests_write_are_what_was_written() -> None:
    values = torch.randn(4, 512, generator=torch.Generator().manual_seed(2))
    codes = writers.q6_k(values.numpy())
    found = dequantizer(GGMLQuantizationType.Q6_K, (4, 512))([torch.from_numpy(codes)])
    assert float((found - values).norm() / values.norm()) < 0.02


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_rotation_is_its_own_inverse_and_regular(size: int) -> None:
    rotation = hadamard(size)
    assert torch.equal(rotation @ rotation, torch.eye(size))
    assert torch.equal(rotation, rotation.T)
    assert torch.equal(rotation.sum(dim=1), torch.ones(size))


def test_a_rotation_keeps_its_digits_where_the_trainer_multiplies_in_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, weights are made dense while the precision of whoever prepares them is set."""
    description = _text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4})
    path = _file(
        tmp_path / "a.safetensors",
        {
            "a.weight": torch.ones(2, 8, dtype=torch.int8),
            "a.weight_scale": torch.ones(2, 1),
            "a.comfy_quant": description,
        },
    )
    file = open_weights(path)
    stored = StoredWeights(file_recipes([file]), dict(file.read()))["a.weight"]
    monkeypatch.setattr(precision, "_is_shared", lambda _: True)
    held: list[str | None] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "matmul"):
                held.append(precision.PRODUCT_PRECISION.held)
            return func(*args, **(kwargs or {}))

    with precision.float32_products(torch.device("cpu"), "tf32"), Seen():
        stored.dense()
    assert held == ["ieee"]


def _file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def _text(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


W = torch.ones(8, 16).to(FLOAT8)
I8 = torch.ones(8, 16, dtype=torch.int8)
ONE = torch.ones(())
E4M3 = {"format": "float8_e4m3fn"}
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "a scale alone": ({"b.weight": W, "a.scale_weight": ONE}, {}, "'a.scale_weight' without its weight"),
    "an input's scale alone": ({"b.weight": W, "a.input_scale": ONE}, {}, "'a.input_scale' without its weight"),
    "a description alone": ({"a.comfy_quant": _text(E4M3)}, {}, "without its weight 'a.weight'"),
    "a named layer that is not there": (
        {"b.weight": W},
        {"_quantization_metadata": json.dumps({"layers": {"a": E4M3}})},
        "without its weight 'a.weight'",
    ),
    "two scales": ({"a.weight": W, "a.scale_weight": ONE, "a.weight_scale": ONE}, {}, "two scales"),
    "no scale": ({"a.weight": W, "a.comfy_quant": _text(E4M3)}, {}, "no scale"),
    "a weight without, beside one with": (
        {"a.weight": W, "a.weight_scale": ONE, "a.comfy_quant": _text(E4M3), "b.weight": W},
        {},
        "'b.weight' has no scale",
    ),
    "a marked file without": (
        {"a.weight": W, "scaled_fp8": torch.zeros(0).to(FLOAT8)},
        {},
        "'a.weight' has no scale",
    ),
    "markers without end": (
        {f"{n}.scaled_fp8": torch.zeros(0) for n in range(17)},
        {},
        "17 tensors say that weights are scaled",
    ),
    "scales of blocks": ({"a.weight": W, "a.weight_scale": torch.ones(2, 4)}, {}, "a scale of F32"),
    "scales of columns": ({"a.weight": W, "a.weight_scale": torch.ones(16)}, {}, "a scale of F32"),
    "a scale of whole numbers": ({"a.weight": W, "a.weight_scale": torch.ones(1).int()}, {}, "a scale of I32"),
    "whole numbers scaled": ({"a.weight": I8, "a.weight_scale": ONE}, {}, "'a.weight' is I8"),
    "another dtype than is said": (
        {"a.weight": W, "a.weight_scale": ONE, "a.comfy_quant": _text({"format": "float8_e5m2"})},
        {},
        "should be F8_E5M2",
    ),
    "groups that are no power of 4": (
        {"a.weight": I8, "a.weight_scale": ONE, "a.comfy_quant": _text(ROTATED | {"convrot_groupsize": 32})},
        {},
        "no power of 4",
    ),
    "a terrible group": (
        {"a.weight": I8, "a.weight_scale": ONE, "a.comfy_quant": _text(ROTATED | {"convrot_groupsize": 4**20})},
        {},
        "no power of 4",
    ),
    "groups that do not divide the row": (
        {"a.weight": I8, "a.weight_scale": ONE, "a.comfy_quant": _text(ROTATED | {"convrot_groupsize": 64})},
        {},
        "no whole groups of 64",
    ),
    "a format of the future": (
        {"a.weight": W, "a.weight_scale": ONE, "a.comfy_quant": _text({"format": "fp3\u202e"})},
        {},
        r"'fp3\u202e', which is not supported",
    ),
    "a format that is none": (
        {"a.weight": W, "a.weight_scale": ONE, "a.comfy_quant": _text({"format": ["x"]})},
        {},
        "not supported",
    ),
    "a description that is no JSON": ({"a.weight": W, "a.comfy_quant": _text({})[:1]}, {}, "not a JSON object"),
    "a long description": (
        {"a.weight": W, "a.comfy_quant": torch.zeros(5000, dtype=torch.uint8)},
        {},
        "no description",
    ),
    "a description in numbers": ({"a.weight": W, "a.comfy_quant": torch.zeros(9)}, {}, "no description"),
    "metadata that is no JSON": ({"a.weight": W}, {"_quantization_metadata": "[" * 100_000}, "not a JSON object"),
    "metadata without layers": ({"a.weight": W}, {"_quantization_metadata": "{}"}, "names no layers"),
    "layers that are none": (
        {"a.weight": W},
        {"_quantization_metadata": '{"layers": {"a": 1}}'},
        "names no layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_codes_that_would_be_guessed_at_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors, metadata, words = REFUSED[name]
    with pytest.raises(WeightsInvalid) as caught:
        file_recipes([open_weights(_file(tmp_path / "model.safetensors", tensors, metadata))])
    assert words in caught.value.message
    assert caught.value.message.startswith("model.safetensors: ")
    assert caught.value.message.isprintable()


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    paths = [_file(tmp_path / name, {"a": ONE}) for name in ("one.safetensors", "other.safetensors")]
    with pytest.raises(WeightsInvalid, match=r"other.safetensors: one.safetensors has a tensor 'a', too"):
        file_recipes([open_weights(path) for path in paths])


def _made(path: Path, **tensors: Tensor) -> dict[str, Tensor]:
    file = open_weights(_file(path, {name.replace("__", "."): tensor for name, tensor in tensors.items()}))
    held = dict(file.read())
    recipes = file_recipes([file])
    return {name: recipe.make([held[piece] for piece in recipe.pieces]) for name, recipe in recipes.items()}


def test_a_scale_is_for_the_tensor_or_for_each_row(tmp_path: Path) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(FLOAT8)
    rows = torch.arange(1.0, 9.0)[:, None]
    found = _made(tmp_path / "a", a__weight=weight, a__weight_scale=torch.tensor(0.3))["a.weight"]
    assert torch.equal(found, weight.float() * torch.tensor(0.3))
    found = _made(tmp_path / "b", a__weight=weight, a__scale_weight=rows, a__scale_input=ONE)["a.weight"]
    assert torch.equal(found, weight.float() * rows)


def test_scales_of_a_layer_named_in_the_header_alone_are_found(tmp_path: Path) -> None:
    layers: dict[str, Any] = {
        "a": {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 4}}
    }
    path = _file(
        tmp_path / "a",
        {"a.weight": I8, "a.weight_scale": torch.full((8, 1), 2.0)},
        {"_quantization_metadata": json.dumps({"layers": layers})},
    )
    (recipe,) = file_recipes([open_weights(path)]).values()
    assert recipe.stored_as == "int8 convrot"
    rotated = recipe.make([I8, torch.full((8, 1), 2.0)])
    assert torch.equal(rotated, (2 * I8.float().view(-1, 4) @ hadamard(4)).view(8, 16))


def test_a_layer_may_be_named_without_the_prefix_of_its_part(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "a",
        {"model.diffusion_model.img_in.weight": W, "model.diffusion_model.img_in.weight_scale": ONE},
        {"_quantization_metadata": json.dumps({"layers": {"img_in": E4M3}})},
    )
    (recipe,) = file_recipes([open_weights(path)]).values()
    assert recipe.stored_as == "fp8 scaled"


def test_a_part_without_scales_may_lie_beside_one_with(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "a",
        {
            "model.diffusion_model.img_in.weight": W,
            "model.diffusion_model.img_in.weight_scale": ONE,
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": W,
        },
    )
    recipes = file_recipes([open_weights(path)])
    assert sorted(recipe.stored_as for recipe in recipes.values()) == ["fp8", "fp8 scaled"]


def test_joined_tensors_keep_their_own_codes(tmp_path: Path) -> None:
    file = open_weights(
        _file(
            tmp_path / "a", {"a.weight": W, "a.weight_scale": torch.tensor(2.0), "b": torch.ones(3, 16).bfloat16()}
        )
    )
    recipes, held = file_recipes([file]), dict(file.read())
    whole = joined([recipes["a.weight"], recipes["b"]])
    assert whole.shape == (11, 16)
    assert whole.widened
    dense = whole.make([held[piece] for piece in whole.pieces])
    assert dense.dtype == torch.float32
    assert torch.equal(dense, torch.cat([torch.full((8, 16), 2.0), torch.ones(3, 16)]))
