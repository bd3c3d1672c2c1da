"""The trainer's weight quantizers against weights that its own libraries quantized."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.trainer import TRAINER_QTYPES, UNSUPPORTED_QTYPES
from chromarpc_server.pipeline.weights.quantizers import (
    QUANTIZERS,
    ZEROS_BECOME_NAN,
    Bias,
    quantize_linear,
    require_finite,
)
from tests.tiny_checkpoint import GOLDENS

FOLDER = GOLDENS / "preview" / "cpu"
RECORDED = FOLDER / "quantized.safetensors"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


@pytest.fixture(scope="module")
def base(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = load_file(FOLDER / "transformer.safetensors")
    kept = {name.removesuffix(".weight"): tensor for name, tensor in weights.items()}
    return kept | {n.removeprefix("base."): tensor for n, tensor in recorded.items() if n.startswith("base.")}


def _of(recorded: dict[str, Tensor], qtype: str, what: str) -> dict[str, Tensor]:
    """By module."""
    return {
        name.removeprefix(f"{qtype}.").removesuffix(f".{what}"): tensor
        for name, tensor in recorded.items()
        if name.startswith(f"{qtype}.") and name.endswith(f".{what}")
    }


@pytest.mark.parametrize("qtype", [name for name in TRAINER_QTYPES if name != "qint4"])  # which needs a GPU there
def test_every_weight_is_what_the_trainer_multiplies_by_bit_for_bit(
    qtype: str, recorded: dict[str, Tensor], base: dict[str, Tensor]
) -> None:
    expected = _of(recorded, qtype, "dequantized")
    assert len(expected) == 4
    for module, weight in expected.items():
        assert torch.equal(quantize_linear(base[module], qtype).dequantized, weight), module
        assert torch.equal(base[module], weight) == (qtype == "uint8" or _is_left_alone(qtype, weight)), module


def _is_left_alone(qtype: str, weight: Tensor) -> bool:
    return qtype.startswith("uint") and weight.shape[1] % 64 != 0


@pytest.mark.parametrize("qtype", ["qfloat8", "float8"])
def test_what_is_held_in_float8_has_the_recorded_codes_and_scales(
    qtype: str, recorded: dict[str, Tensor], base: dict[str, Tensor]
) -> None:
    codes, scales = _of(recorded, qtype, "codes"), _of(recorded, qtype, "scale")
    assert codes.keys() == scales.keys()
    assert len(codes) == (37 if qtype == "qfloat8" else 4)
    for module, expected in codes.items():
        found = quantize_linear(base[module], qtype)
        held = found.codes
        assert held is not None
        assert torch.equal(held[0].view(torch.uint8), expected.view(torch.uint8)), module
        assert torch.equal(held[1], scales[module].flatten()), module
        assert torch.equal(held[0].to(torch.bfloat16) * held[1][:, None], found.weight)


def test_every_quantizer_that_a_config_can_name_is_built_or_refused_by_name() -> None:
    with safe_open(RECORDED, "pt") as file:
        named = set(json.loads(file.metadata()["qtypes"]))
    assert set(QUANTIZERS) == set(TRAINER_QTYPES)
    assert {name for name in named - set(TRAINER_QTYPES) if not name.startswith(UNSUPPORTED_QTYPES)} == set()


def test_a_row_that_groups_do_not_divide_is_left_alone() -> None:
    narrow = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(quantize_linear(narrow, "uint4").dequantized, narrow)
    assert quantize_linear(narrow, "uint4").bias is Bias.FUSED
    assert not torch.equal(quantize_linear(narrow, "qint4").dequantized, narrow)


def test_the_bias_is_added_where_the_library_adds_it() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = {name for name in QUANTIZERS if quantize_linear(weight, name).bias is Bias.AFTER}
    assert after == {"qfloat8", "qfloat8_e5m2", "qint8", "qint4", "qint2", "int8"}
    assert quantize_linear(weight, None).bias is Bias.FUSED


@pytest.mark.parametrize("qtype", ZEROS_BECOME_NAN)
def test_a_row_of_zeros_becomes_nan_and_is_refused_by_name(qtype: str) -> None:
    weight = torch.ones(3, 128, dtype=torch.bfloat16)
    weight[1] = 0
    found = {
        "a.weight": torch.isfinite(quantize_linear(weight, qtype).dequantized).all(),
        "b.weight": torch.tensor(True),
    }
    with pytest.raises(WeightsInvalid, match=rf"^a\.weight: has a row of zeros, which {qtype} turns into NaN"):
        require_finite(found, qtype)


@pytest.mark.parametrize("qtype", [name for name in TRAINER_QTYPES if name not in ZEROS_BECOME_NAN])
def test_others_leave_a_row_of_zeros_what_it_is(qtype: str) -> None:
    weight = torch.ones(3, 128, dtype=torch.bfloat16)
    weight[1] = 0
    found = quantize_linear(weight, qtype).dequantized
    assert bool(torch.isfinite(found).all())
    assert not found[1].any()


@pytest.mark.parametrize("qtype", [name for name in TRAINER_QTYPES if name not in ZEROS_BECOME_NAN])
def test_values_that_are_not_finite_themselves_are_not_taken_for_zeros(qtype: str) -> None:
    weight = torch.ones(3, 128, dtype=torch.bfloat16)
    weight[1, 5] = torch.nan
    found = torch.isfinite(quantize_linear(weight, qtype).dequantized).all()
    with pytest.raises(WeightsInvalid, match=r"^a\.weight: has values that are not finite$"):
        require_finite({"a.weight": found}, qtype)


@pytest.mark.parametrize("qtype", ["qint4", "qint2"])
def test_a_group_of_equal_values_keeps_them_although_its_scale_is_zero(qtype: str) -> None:
    weight = torch.full((2, 256), 0.25, dtype=torch.bfloat16)
    weight[0, :128] = -3
    assert torch.equal(quantize_linear(weight, qtype).dequantized, weight)
